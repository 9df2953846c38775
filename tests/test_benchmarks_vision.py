"""The benchmark of whole vision models runs, refuses what is wrong, and sorts kernels."""

import csv
import sys
import types
from pathlib import Path

import pytest
import torch
from benchmarks import vision, vision_models, vision_official, vision_plot
from benchmarks.check import CheckError
from benchmarks.prepared import Skip
from benchmarks.report import columns, environment, write_csv
from benchmarks.vision import MODELS, VisionRow, main
from benchmarks.vision_check import LIMITS, check
from benchmarks.vision_models import CLASSES, Implementation, blocks_of, implementations
from benchmarks.vision_profile import family_of, shares_of, shares_table
from torch import nn

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def test_toy_models_run(tmp_path: Path):
    out = tmp_path / "rows.csv"
    names = ["vim_small", "vmamba_tiny_s1l8", "hydra_vit_small", "deit_small"]
    arguments = ["--toy", "--device", "cpu", "--models", ",".join(names), "--out", str(out)]
    assert main(arguments) == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == columns(VisionRow)
    assert [(r["model"], r["passes"]) for r in rows] == [
        (name, passes) for name in names for passes in vision.PASSES
    ]
    for row in rows:
        assert float(row["images_s_p20"]) <= float(row["images_s"]) <= float(row["images_s_p80"])
        assert float(row["error"]) < LIMITS[torch.float32]
        assert row["checked_by"].endswith("float64")
        assert row["implementation"] == ("timm" if row["model"] == "deit_small" else "scanweave")
    share = shares_of([("gemm", "", 1.0)], 1, ("m", "p", "e", "i"))
    with pytest.raises(ValueError, match="out must have the columns"):
        write_csv(out, environment(CPU), share)


def test_toy_of_every_model():
    for spec in MODELS.values():
        toy = spec.toy()
        model = toy.create(CPU)
        assert sum(p.numel() for p in model.parameters()) < 5e6
        if spec.ours:
            assert len(blocks_of(toy, model)) >= 4


def test_wrong_model_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    spec = MODELS["vim_small"].toy()
    other = spec.create(CPU)
    with torch.no_grad():
        other.get_parameter("head.bias").add_(1.0)
    found = [Implementation("scanweave", spec.create(CPU), dict)]
    found.append(Implementation("official", other, dict))
    x = torch.randn(2, 3, 64, 64)
    errors, refused, by = check(found, x, torch.tensor([1, 2]), torch.float32)
    assert by == "official float32"
    assert set(errors) == {"official"}
    assert "off by" in refused["scanweave"]
    monkeypatch.setattr(vision, "implementations", lambda *_: (found, ""))
    assert main(["--toy", "--device", "cpu", "--models", "vim_small", "--passes", "inference"]) == 1
    assert "scanweave: not timed" in capsys.readouterr().err


def test_modes_must_agree():
    with pytest.raises(CheckError, match="from eager mode"):
        vision._agree(lambda: torch.ones(3), torch.zeros(3), 1e-3)
    vision._agree(lambda: (torch.ones(2), None), torch.ones(2), 1e-3)


def test_options_are_checked(capsys: pytest.CaptureFixture[str]):
    for option in ("models", "passes", "modes"):
        with pytest.raises(SystemExit):
            main(["--device", "cpu", f"--{option}", "nothing"])
        assert f"--{option} must be among" in capsys.readouterr().err


def test_nothing_starts_late(capsys: pytest.CaptureFixture[str]):
    assert main(["--toy", "--device", "cpu", "--models", "vim_small", "--seconds", "0"]) == 0
    assert "time is up" in capsys.readouterr().err


def test_official_models_are_skipped_where_absent(tmp_path: Path):
    for name in ("vim_small", "vmamba_tiny_s1l8"):
        found, why = implementations(MODELS[name].toy(), CPU, tmp_path)
        assert [one.name for one in found] == ["scanweave"]
        assert "no checkout" in why
        found, why = implementations(MODELS[name].toy(), CPU, None)
        assert not why


def test_official_weights_are_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    spec = MODELS["vim_small"].toy()

    def made(folder: Path, entry: str, size: int, classes: int) -> nn.Module:
        assert (folder, entry, size, classes) == (tmp_path, "test_vim", 64, CLASSES)
        model = spec.create(CPU)
        with torch.no_grad():
            model.get_parameter("head.bias").fill_(0.5)
        return model

    monkeypatch.setitem(vision_models.OFFICIAL, "Vim", made)
    (own, other), why = implementations(spec, CPU, tmp_path)
    assert not why
    assert torch.equal(own.model.get_parameter("head.bias"), torch.full((CLASSES,), 0.5))
    assert set(other.renamed(other.model.state_dict())) == set(own.model.state_dict())


def test_imports_leave_no_trace(tmp_path: Path):
    (tmp_path / "rope.py").write_text("import fvcore\nNAME = 'rope of the checkout'\n")
    given = {"fvcore": types.ModuleType("fvcore")}
    before = list(sys.path), set(sys.modules)
    with vision_official._imports([tmp_path], given):
        assert vision_official._loaded("rope").NAME == "rope of the checkout"
    assert (sys.path, set(sys.modules)) == before
    with pytest.raises(Skip, match="does not import"), vision_official._imports([], {}):
        vision_official._loaded("rope")


class Extension:
    """What causal_conv1d 1.6 offers, in PyTorch."""

    @staticmethod
    def run(x, weight, bias):
        y = nn.functional.pad(x, (weight.shape[1] - 1, 0))
        return nn.functional.silu(nn.functional.conv1d(y, weight[:, None], bias, groups=x.shape[1]))

    def causal_conv1d_fwd(self, x, weight, bias, index, initial, out, final, silu):
        assert silu
        out.copy_(self.run(x, weight, bias))

    def causal_conv1d_bwd(
        self, x, weight, bias, dout, index, initial, dfinal, dx, dweight, dbias, dinitial, silu
    ):
        with torch.enable_grad():
            leaves = [v.detach().clone().requires_grad_() for v in (x, weight, bias)]
            grads = torch.autograd.grad(self.run(*leaves), leaves, dout)
        for to, grad in zip((dx, dweight, dbias), grads, strict=True):
            to.copy_(grad)


def test_convolution_under_its_old_signature():
    conv = vision_official._Conv(Extension())
    x, weight, bias = torch.randn(2, 3, 5), torch.randn(3, 4), torch.randn(3)
    y = conv.causal_conv1d_fwd(x, weight, bias, None, None, None, True)
    assert torch.equal(y, Extension.run(x, weight, bias))
    dx = torch.empty_like(x)
    found = conv.causal_conv1d_bwd(x, weight, bias, y, None, None, None, dx, False, True)
    assert found[0] is dx
    assert [v is None or v.dtype == torch.float32 for v in found] == [True] * 4
    with pytest.raises(AssertionError, match="dinitial"):
        conv.causal_conv1d_bwd(x, weight, bias, y, None, None, None, dx, True, True)


def test_kernels_are_sorted():
    wanted = {
        ("nvjet_tst_128x256", "aten::mm"): "matmul",
        ("_forward_kernel", "scanweave::selective_scan"): "scan",
        ("forward_kernel", "scanweave::short_conv"): "conv",
        ("conv_pair_kernel", "scanweave::mamba_block"): "conv",
        ("conv_pair_backward_kernel", "scanweave::mamba_block_backward"): "conv",
        ("void selective_scan_fwd_kernel<...>", "MambaInnerFnNoOutProj"): "scan",
        ("void causal_conv1d_fwd_kernel<...>", ""): "conv",
        ("_layer_norm_fwd_1pass_kernel", "LayerNormFn"): "norm",
        ("void at::native::vectorized_elementwise_kernel<add>", "aten::add"): "elementwise",
        ("Memcpy DtoD", "aten::copy_"): "copies",
        ("_forward_kernel", "_AddNormCast"): "norm",
        ("_gate_kernel", "scanweave::mamba_block_backward"): "elementwise",
        ("flash_fwd_kernel", "aten::_flash_attention_forward"): "attention",
        ("void at::native::unrolled_elementwise_kernel<direct_copy>", "aten::copy_"): "copies",
    }
    assert {key: family_of(*key) for key in wanted} == wanted


def test_shares_add_up():
    kernels = [("gemm", "aten::mm", 2000.0)] * 4 + [("Memcpy", "", 1000.0)] * 2
    shares = shares_of(kernels, 2, ("vim", "inference", "eager", "scanweave"))
    assert [(s.family, s.ms, s.launches) for s in shares] == [
        ("matmul", 4.0, 2),
        ("copies", 1.0, 1),
    ]
    text = shares_table(shares)
    assert "| vim | inference | scanweave | eager | all | 5.00 | 100 | 3 |" in text
    assert "| matmul | 4.00 | 80 | 2 |" in text


def test_plot_of_rates(tmp_path: Path):
    pytest.importorskip("matplotlib")
    shared = ("vim_small", 128, 224, "bfloat16")
    rates = (
        ("inference", "eager", "scanweave", 2000.0),
        ("inference", "graph", "scanweave", 8000.0),
        ("inference", "eager", "official", 2000.0),
        ("training", "eager", "official", 500.0),
        ("training", "eager", "scanweave", None),
    )
    rows = [VisionRow(*shared, p, m, name, "", images_s=rate) for p, m, name, rate in rates]
    path = tmp_path / "rows.csv"
    write_csv(path, environment(CPU), rows)
    (cells,) = vision_plot.bars(path).values()
    assert cells["inference"]["scanweave"] == vision_plot.Bar(8000.0, "graph")
    assert set(cells["training"]) == {"official"}
    assert vision_plot.main([str(path)]) == 0
    picture = path.with_suffix(".svg").read_text(encoding="utf-8")
    assert "8,000 (4.0x)" in picture
    again = tmp_path / "again.svg"
    assert vision_plot.main([str(path), "--out", str(again)]) == 0
    assert again.read_text(encoding="utf-8") == picture
    with pytest.raises(ValueError, match="csv must hold rates"):
        vision_plot.draw({}, "")
