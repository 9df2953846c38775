"""Kernels without one part: every part can be left out of the kernels as they are now."""

from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks import stages

PARTS = [(which, part) for which, kernel in stages.KERNELS.items() for part in kernel.parts]


@pytest.mark.parametrize(("which", "part"), PARTS, ids=lambda v: getattr(v, "name", v))
def test_parts_can_be_left_out(which: str, part: stages.Part, tmp_path: Path):
    kernel = stages.KERNELS[which]
    module = stages.without(kernel, part, tmp_path)
    assert getattr(module, kernel.name) is not getattr(kernel.module, kernel.name)
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    assert all(old not in text or old in new for old, new in part.cuts)


def test_a_part_that_is_gone_is_an_error(tmp_path: Path):
    kernel = stages.KERNELS["forward"]
    gone = replace(kernel.parts[0], cuts=(("tl.exp3(", "("),))
    with pytest.raises(ValueError, match=r"_forward_kernel has no 'tl.exp3\('"):
        stages.without(kernel, gone, tmp_path)
