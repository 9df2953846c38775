"""Registers, spills and instructions of the Triton kernels, compiled without a GPU.

A kernel that a change made slower shows here before anyone measures it. A change that is meant
is recorded by `python -m benchmarks.compiled_code --write`, once per version of Triton.
"""

import dataclasses
import inspect

import pytest
import torch
import triton
from benchmarks import compiled_code, machine_code
from benchmarks.compiled_code import (
    EVERYTHING,
    GUARDED,
    TARGETS,
    UNGUARDED,
    compile_for,
    measure,
    op_modules,
    over_budget,
    read_budgets,
    record,
    write_budgets,
)
from benchmarks.machine_code import Code, cuobjdump, loop_sizes, read_amd
from benchmarks.ops import OPS
from benchmarks.shapes import SHAPES, Shape
from triton.runtime.jit import JITFunction

pytestmark = pytest.mark.skipif(
    compiled_code.interpreted(), reason="TRITON_INTERPRET=1: kernels are not compiled"
)
SMALL = Shape("small", 2, 40, 32)
BEFORE = Code(registers=100, spilled=8, instructions=10.0)


def need_tools(target: str) -> None:
    if TARGETS[target].backend == "cuda" and cuobjdump() is None:
        pytest.skip("no cuobjdump in Triton's wheel or PATH: instructions cannot be counted")


@pytest.mark.parametrize("case", GUARDED, ids="-".join)
def test_kernels_stay_within_their_budgets(case: tuple[str, str, str, str]):
    need_tools(case[0])
    rows = measure(*case)
    assert rows
    budgets = read_budgets()
    over = [over_budget(key, code, budgets) for key, code in rows.items()]
    assert not any(over), "\n".join(filter(None, over))


def folder(kernel: JITFunction) -> str:
    """Of scanweave.core.ops.<folder>.kernels."""
    return kernel.__module__.split(".")[3]


def test_every_kernel_of_a_guarded_folder_is_guarded():
    """A kernel that no guarded op launches could get slower unseen."""
    kernels = set()
    for module in op_modules():
        for name, value in inspect.getmembers(module, lambda v: isinstance(v, JITFunction)):
            if value.__module__ == module.__name__ and name.endswith("_kernel"):
                kernels.add(value)
    launched = set()
    for op, name in {case[1:3] for case in GUARDED}:
        (shape,) = (s for s in SHAPES[op]["cuda"] if s.name == name)
        for launches in record(op, shape).values():
            launched |= {launch.kernel for launch in launches}
    folders = {folder(kernel) for kernel in launched}
    assert folders >= {"selective", "conv"}
    missing = {kernel for kernel in kernels - launched if folder(kernel) in folders}
    assert {f"{kernel.__module__}.{kernel.__name__}" for kernel in missing} == set()


def test_recording_neither_launches_nor_patches_for_good(monkeypatch: pytest.MonkeyPatch):
    # outputs have no values, so nothing can have run
    before = JITFunction.run, torch.version.cuda, torch.version.hip
    found = record("selective_scan", SMALL)
    assert [launch.name for launch in found["inference"]]
    assert len(found["training"]) > len(found["inference"])
    assert before == (JITFunction.run, torch.version.cuda, torch.version.hip)
    for launches in found.values():
        for launch in launches:
            tensors = [v for v in launch.arguments if isinstance(v, torch.Tensor)]
            assert {v.device.type for v in tensors} == {"meta"}
            assert launch.elements > 1


def compiled_as(launch: compiled_code.Launch) -> tuple[object, ...]:
    """What Triton compiles a kernel for: constants, types, and divisors of numbers."""
    kinds: list[object] = [launch.kernel]
    for parameter in launch.kernel.params:
        value = launch.named.get(parameter.name)
        if isinstance(value, torch.Tensor):
            value = value.dtype
        elif type(value) is int and not parameter.is_constexpr:
            shared = not parameter.do_not_specialize
            value = (value >= 1 << 31, shared and value % 16 == 0, shared and value == 1)
        kinds.append((parameter.name, value))
    return tuple(kinds)


OPS_OF_ROWS = [
    *("selective_scan", "causal_conv1d", "bidirectional_conv", "linear_scan", "wkv"),
    "gated_linear_attention",
]


@pytest.mark.parametrize("op", OPS_OF_ROWS)
def test_packed_rows_of_all_lengths_share_kernels(op: str):
    """A batch of graphs has another number of nodes every time."""
    (shape,) = (s for s in SHAPES[op]["cuda"] if s.name == "graph")
    forms = [
        [
            compiled_as(launch)
            for launch in record(op, dataclasses.replace(shape, length=n))["training"]
        ]
        for n in (90_000, 90_016, 91_003, 90_112)
    ]
    assert forms[0]
    assert all(form == forms[0] for form in forms)


def test_launch_options_are_those_of_the_vendor():
    """A cap on registers is an option of NVIDIA's compiler only."""
    (vim,) = (s for s in SHAPES["selective_scan"]["cuda"] if s.name == "vim_s")
    capped = {
        backend: any(
            "maxnreg" in launch.options
            for launches in record("selective_scan", vim, backend).values()
            for launch in launches
        )
        for backend in ("cuda", "hip")
    }
    assert capped == {"cuda": True, "hip": False}


def test_what_runs_more_counts_more():
    """The counts are of the code: N = 16 takes more instructions a program than N = 4."""
    need_tools("sm_90")
    sizes = {}
    for state in (4, 16):
        shape = dataclasses.replace(SMALL, state=state)
        launch = record("selective_scan", shape)["inference"][0]
        sizes[state] = compile_for(launch, TARGETS["sm_90"])
    for code in sizes.values():
        assert code.instructions is not None
        # at least an exponential, two multiply-adds and a product an element
        assert 4 < code.instructions < 100
    assert sizes[16].registers > sizes[4].registers


def test_without_cuobjdump_it_says_so(monkeypatch: pytest.MonkeyPatch):
    launch = record("selective_scan", SMALL)["inference"][0]
    monkeypatch.setattr(machine_code, "cuobjdump", lambda: None)
    with pytest.raises(FileNotFoundError, match="cuobjdump is neither in Triton's wheel nor in"):
        compile_for(launch, TARGETS["sm_90"])


LOOPS = """
        /*0000*/                   S2R R3, SR_CTAID.X ;      /* 0x0 */
        /*0010*/                   MOV R0, UR12 ;            /* 0x0 */
        /*0020*/                   FADD R1, R1, R2 ;         /* 0x0 */
        /*0030*/              @!P0 BRA 0x60 ;                /* 0x0 */
        /*0040*/                   MUFU.EX2 R1, R2 ;         /* 0x0 */
        /*0050*/               @P0 BRA 0x20 ;                /* 0x0 */
        /*0060*/                   NOP;                      /* 0x0 */
        /*0070*/                   FADD R1, R1, R2 ;         /* 0x0 */
        /*0080*/                   BRA.U UP0, 0x70 ;         /* 0x0 */
        /*0090*/                   BRA 0x10 ;                /* 0x0 */
        /*00a0*/                   EXIT ;                    /* 0x0 */
        /*00b0*/                   BRA 0xb0;                 /* 0x0 */
"""


def test_innermost_loops_are_counted():
    assert loop_sizes(LOOPS) == [4, 2]
    straight = "\n".join(line for line in LOOPS.splitlines() if " BRA" not in line)
    assert loop_sizes(straight) == [6]


def test_amd_reports_are_read():
    text = "    .private_segment_fixed_size: 12\n    .vgpr_count:     281\n"
    assert read_amd(text) == Code(281, 12, None)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Code)])
def test_more_than_the_budget_fails(name: str):
    budgets = {triton.__version__: {"a": BEFORE}}
    assert over_budget("a", BEFORE, budgets) == ""
    worse = dataclasses.replace(BEFORE, **{name: getattr(BEFORE, name) * 1.1 + 0.1})
    assert f"{name} " in over_budget("a", worse, budgets)
    better = dataclasses.replace(BEFORE, **{name: getattr(BEFORE, name) / 2})
    assert over_budget("a", better, budgets) == ""


def test_another_release_is_held_to_the_worst_with_room():
    better = Code(registers=90, spilled=0, instructions=9.0)
    budgets = {"0.1": {"a": better}, "0.2": {"a": BEFORE}}
    assert over_budget("a", Code(114, 264, 11.4), budgets) == ""
    assert "registers 116 of 115" in over_budget("a", Code(116, 8, 10.0), budgets)
    assert "instructions 12 of 11.5" in over_budget("a", Code(100, 8, 12.0), budgets)


def test_a_kernel_without_budget_fails():
    assert "new has no budget: python -m" in over_budget("new", BEFORE, {"0.1": {"a": BEFORE}})


def test_budgets_cover_what_is_guarded():
    budgets = read_budgets()
    assert budgets
    for version, table in budgets.items():
        covered = {tuple(key.split("/")[:4]) for key in table}
        assert covered >= set(GUARDED), version
        assert covered <= set(EVERYTHING), version


def test_written_budgets_replace_those_of_the_same_op(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled_code, "BUDGETS", tmp_path / "budgets.json")
    keys = [f"sm_90/{op}/s/training/{kernel}" for op in "pq" for kernel in ("old", "new")]
    write_budgets({keys[0]: BEFORE, keys[2]: BEFORE})
    write_budgets({keys[1]: BEFORE})
    assert read_budgets() == {triton.__version__: {keys[1]: BEFORE, keys[2]: BEFORE}}


def test_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
):
    monkeypatch.setattr(compiled_code, "BUDGETS", tmp_path / "budgets.json")
    codes = {"sm_90/selective_scan/vim_s/training/kernel": BEFORE}
    monkeypatch.setattr(compiled_code, "measure", lambda *case: codes)
    one = ["--targets", "sm_90", "--shapes", "graph"]
    assert compiled_code.main(one) == 1
    assert "has no budget" in capsys.readouterr().err
    assert compiled_code.main([*one, "--write"]) == 0
    assert compiled_code.main(one) == 0
    assert "| sm_90 | selective_scan | vim_s | training | kernel | 100 | 8 | 10 |" in (
        capsys.readouterr().out
    )
    codes["sm_90/selective_scan/vim_s/training/kernel"] = Code(101, 8, 10.0)
    assert compiled_code.main(one) == 1
    assert "101 (was 100)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        compiled_code.main(["--targets", "sm_1"])
    assert "must be among ['gfx942', 'sm_100'" in capsys.readouterr().err


def test_registry_has_no_op_that_is_not_compiled():
    launching = set(OPS) - set(UNGUARDED)
    assert {op for _, op, *_ in EVERYTHING} == launching
    assert {op for _, op, *_ in GUARDED} == launching
