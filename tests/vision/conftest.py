"""Markers that timm's own tests carry."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Name timm's markers, which `--strict-markers` would refuse."""
    for name in ("base", "cfg", "cfg_nonstd", "forward", "backward", "features"):
        config.addinivalue_line("markers", f"{name}: timm's")
    for name in ("torchscript", "fxforward", "fxbackward"):
        config.addinivalue_line("markers", f"{name}: timm's")
