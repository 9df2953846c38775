"""The shared fixtures do what the other tests trust them to do."""

from typing import Any

import pytest
import torch


def allocate_as(module: str) -> list[torch.Tensor]:
    """What the allocating functions return to a caller in `module`."""
    names: dict[str, Any] = {"__name__": module, "torch": torch}
    code = """def allocate(x):
        return [
            torch.empty(3), torch.empty_like(x), torch.empty_strided((2, 2), (2, 1)),
            x.new_empty(2), x.new_empty_strided((2,), (1,)), torch.empty(2, dtype=torch.int32),
        ]"""
    exec(code, names)
    return names["allocate"](torch.zeros(4))


@pytest.mark.poison
def test_poison_fills_what_scanweave_allocates():
    *floats, ints = allocate_as("scanweave.core.ops.fake")
    assert len(floats) == 5
    assert all(out.isnan().all() for out in floats)
    assert ints.dtype == torch.int32


@pytest.mark.poison
def test_poison_spares_other_callers(monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object) -> None:
        raise AssertionError("filled another package's memory")

    monkeypatch.setattr(torch.Tensor, "fill_", refuse)
    assert len(allocate_as("torch.nn.modules.fake")) == 6


@pytest.mark.poison
def test_poison_compiles_and_follows_the_default_device():
    def double(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x).copy_(x) * 2

    x = torch.ones(3)
    assert torch.compile(double, backend="eager", fullgraph=True)(x).equal(2 * x)
    with torch.device("meta"):
        assert torch.empty(2).device.type == "meta"


def test_assert_near_refuses_what_is_off(assert_near):
    exact = torch.tensor([1.0, -2.0], dtype=torch.float64)
    near = exact.float() * (1 + 5e-6)
    assert_near(near, exact)
    for wrong, reason in (
        (exact.float() * (1 + 5e-5), "relative error"),
        (torch.tensor([1.0, float("nan")]), "holds NaN"),
        (near[:1], "is not"),
        (None, "is None"),
    ):
        with pytest.raises(AssertionError, match=reason):
            assert_near(wrong, exact)
    assert_near(exact.float() * (1 + 5e-5), exact, gradient=True)


def test_tests_start_from_the_same_seed():
    assert torch.initial_seed() == 0
    fresh = torch.Generator().manual_seed(0)
    assert torch.rand(4).equal(torch.rand(4, generator=fresh))
