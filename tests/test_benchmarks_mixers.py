"""The benchmarks of mixers: speed, scores at equal parameters, and the page made of both."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("torch_geometric")
pytest.importorskip("gymnasium")
pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")

from benchmarks import mixer_docs, mixer_scores, mixer_tasks, mixers
from benchmarks.mixer_docs import PAGE, family_of, render, score_table, speed_table
from benchmarks.mixer_families import FAMILIES
from benchmarks.mixer_tasks import TASKS, learn, make_task, match_width, refusal

from scanweave.core import Mixer, create_mixer, list_mixers


def write_peptides(folder: Path, graphs: int = 96) -> None:
    """Paths of three to five atoms in the layout of Peptides-func; their kinds make the labels."""
    rng = np.random.default_rng(0)
    sizes = np.arange(graphs) % 3 + 3
    kinds = np.arange(graphs) // 4 % 2
    folder.mkdir(parents=True)
    np.savez(
        folder / "peptides_func_graphs.npz",
        num_nodes=sizes,
        num_edges=sizes - 1,
        node_feat=2 * rng.integers(0, 2, (sizes.sum(), 9)) + kinds.repeat(sizes)[:, None],
        edge_index=np.concatenate(
            [np.stack([np.arange(n - 1), np.arange(1, n)]) for n in sizes], 1
        ),
        edge_feat=rng.integers(0, 2, ((sizes - 1).sum(), 3)),
        y=(kinds[:, None] + np.arange(10)) % 2,
        # half of the graphs, a quarter, a quarter; both kinds in each
        split=np.tile([0, 0, 1, 2], graphs // 4),
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_peptides(folder / "peptides_func")
    return folder


@pytest.fixture(scope="module")
def tasks(files: Path) -> Iterator[dict[str, mixer_tasks.Task]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixer_tasks.Pendulum, "recordings", 6)
        patch.setattr(mixer_tasks.Peptides, "examples", 40)
        yield {name: make_task(name, data_dir=files) for name in TASKS}


def test_the_page_is_what_is_registered_and_measured() -> None:
    made = render()
    assert PAGE.read_text() == made, "run `python -m benchmarks.mixer_docs`"
    for name in list_mixers():
        assert made.count(f"`{name}`") >= 3, name
    (block,) = re.findall(r"```python\n(.*?)```", made, re.DOTALL)
    found: dict[str, object] = {}
    exec(compile(block, str(PAGE), "exec"), found)
    assert isinstance(found["mixer"], Mixer)


def test_every_mixer_has_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    titles = {name: family_of(name).title for name in list_mixers()}
    assert titles["mamba"] == "Selective scans"
    assert titles["mamba2"] == "Matrix states"
    assert titles["gated_cnn"].startswith("Attention, and controls")
    assert len({family.title for family in FAMILIES}) == len(FAMILIES)
    monkeypatch.setattr(mixer_docs, "FAMILIES", FAMILIES[1:])
    with pytest.raises(ValueError, match=r"mixer must be in a family of mixer_families\.py"):
        family_of("mamba")


def test_tables_show_what_is_there() -> None:
    score = {"dataset": "digits", "model": "mamba", "value": "80.5", "parameters": "20000"}
    rows = [score, {**score, "value": "81.5"}, {**score, "model": "lru"}]
    rows.append({**score, "dataset": "Peptides", "value": "30"})
    lines = score_table(["mamba", "lru", "s5"], rows).splitlines()[2:]
    assert lines == [
        "| `mamba` | 20,000 | 81.0 ± 0.7 (2) | - | - | 30.0 (1) |",
        "| `lru` | 20,000 | 80.5 (1) | - | - | - |",
        "| `s5` | - | - | - | - | - |",
    ]
    row = {"mixer": "mamba", "shape": "rl", "passes": "forward", "median_us": "9", "cpu_us": "7.6"}
    row |= {"kernel_us": "", "graph_us": "", "state_bytes": "1234", "peak_mb": ""}
    step = {**row, "shape": "step", "passes": "step", "graph_us": "2", "state_bytes": "99"}
    (line,) = speed_table(["mamba"], [row]).splitlines()[2:]
    assert line == "| `mamba` | - | - | 8 / - | - | 1,234 B | - |"
    (line,) = speed_table(["mamba"], [row, step]).splitlines()[2:]
    assert line == "| `mamba` | - | - | 8 / - | 2 | 99 B | - |"


def test_speed_is_measured_once(tmp_path: Path) -> None:
    out = tmp_path / "mixers.csv"
    command = ["--toy", "--device", "cpu", "--out", str(out), "--mixers", "lru,hydra,attention"]
    found = mixers.main(command)
    passes = {(row.shape, row.mixer): [] for row in found}
    for row in found:
        passes[row.shape, row.mixer].append(row.passes)
        assert not row.note
        assert row.error is not None
        assert row.tokens_per_s is not None
        assert row.tokens_per_s > 0
    both = ["forward", "forward+backward"]
    assert passes == {
        **{(shape, name): both for shape in ("vision", "graph") for name in ("lru", "hydra")},
        **{(shape, "attention"): both for shape in ("vision", "graph", "rl")},
        ("rl", "lru"): both,
        ("step", "lru"): ["step"],
    }
    states = {row.mixer: row.state_bytes for row in found if row.shape == "vision"}
    assert states["hydra"] is None
    assert states["lru"] == 16 * 8
    assert mixers.main(command) == []
    with pytest.raises(ValueError, match=r"shapes must be among vision, graph.*got \['text'\]"):
        mixers.main(["--toy", "--device", "cpu", "--shapes", "text"])


def test_wrong_mixers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = mixers.create_mixer

    def broken(name: str, dim: int, **config: object) -> Mixer:
        mixer = plain(name, dim, **config)
        # float64 copies are made after this, and double what the original does not
        mixer.double = lambda: plain(name, dim).double()  # type: ignore[method-assign]
        return mixer

    monkeypatch.setattr(mixers, "create_mixer", broken)
    monkeypatch.setattr(mixers.copy, "deepcopy", lambda mixer: mixer)
    (row,) = mixers.main(["--toy", "--device", "cpu", "--mixers", "lru", "--shapes", "vision"])
    assert re.match(r"error must be at most 0\.00016, got ", row.note)
    assert row.median_us is None


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("mixer", ["mamba", "attention", "hyena", "rwkv6"])
def test_models_have_equal_parameters(
    name: str, mixer: str, tasks: dict[str, mixer_tasks.Task]
) -> None:
    task = tasks[name]
    model = task.build(mixer, match_width(task, mixer))
    count = sum(p.numel() for p in model.parameters())
    # widths are even: two RWKV-6 a layer have 17,322 at 8 channels and 22,290 at 10
    assert abs(count / task.parameters - 1) < 0.15


def test_tasks_are_learned_and_scored(tasks: dict[str, mixer_tasks.Task]) -> None:
    # pixels alone need more steps until anything is seen
    for name, steps, share in (
        ("digits", 80, 1),
        ("digit graphs", 25, 0.97),
        ("Pendulum", 25, 1),
        ("Peptides", 25, 0.5),
    ):
        torch.manual_seed(0)
        losses = learn(tasks[name], tasks[name].build("gated_cnn", 16), 0, steps)
        assert len(losses) == steps
        assert sum(losses[-5:]) < share * sum(losses[:5]), name
    with torch.no_grad():
        for name in ("digits", "digit graphs"):
            assert 2 < tasks[name].score(tasks[name].build("lru", 8).eval()) < 30
    assert not refusal(tasks["digits"], "hydra")
    assert refusal(tasks["Pendulum"], "hydra").startswith("mixer must be causal")


def test_peptides_are_the_official_parts(
    files: Path, tasks: dict[str, mixer_tasks.Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tasks["Peptides"]
    assert isinstance(task, mixer_tasks.Peptides)
    assert (task.size, len(task.test)) == (40, 24)
    again = mixer_tasks.Peptides(data_dir=files)
    assert torch.equal(again.graphs._tensors["x"], task.graphs._tensors["x"])
    monkeypatch.setattr(mixer_tasks.Peptides, "examples", 4_000)
    assert mixer_tasks.Peptides(data_dir=files).size == 48
    # bonds are seen
    model = task.build("lru", 8).eval()
    before = task.loss(model, [0, 1])
    task.graphs._tensors["edge_attr"] = 1 - (kept := task.graphs._tensors["edge_attr"])
    after = task.loss(model, [0, 1])
    task.graphs._tensors["edge_attr"] = kept
    assert not torch.equal(before, after)

    class Oracle(torch.nn.Module):
        """The labels, read off the kind that all columns of an atom tell."""

        def __init__(self, sign: int) -> None:
            super().__init__()
            self.sign = sign

        def forward(self, x: torch.Tensor, _: torch.Tensor, **known: torch.Tensor) -> torch.Tensor:
            starts = known["batch"].diff(prepend=torch.tensor([-1])).nonzero()[:, 0]
            kinds = x[starts, 1] + x[starts, 3]
            return self.sign * (2 * ((kinds[:, None] + torch.arange(10)) % 2) - 1)

    assert task.score(Oracle(1)) == 100
    # all labels ranked the wrong way round: half of the graphs have each
    assert 50 <= task.score(Oracle(-1)) <= 50.1


def test_scores_are_run_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mixer_tasks.Pendulum, "episodes", 1)
    monkeypatch.setattr(mixer_tasks.Pendulum, "recordings", 6)
    out = tmp_path / "scores.csv"
    command = ["--csv", str(out), "--steps", "2", "--seeds", "1"]
    command += ["--mixers", "lru,hydra", "--tasks", "Pendulum,digits"]
    found = mixer_scores.main(command)
    assert [(r.dataset, r.model) for r in found] == [
        ("Pendulum", "lru"),
        ("digits", "lru"),
        ("digits", "hydra"),
    ]
    assert "Pendulum: hydra is left out, mixer must be causal" in capsys.readouterr().out
    assert -2000 < found[0].value < 0
    assert mixer_scores.main(command) == []
    assert len(out.read_text().splitlines()) == 4

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(mixer_scores, "run", broken)
    with pytest.raises(
        RuntimeError, match="2 runs failed, the first: digits, lru, seed 0: no luck"
    ):
        mixer_scores.main([*command[:-1], "digits", "--csv", str(tmp_path / "other.csv")])
    with pytest.raises(ValueError, match=r"tasks must be among digits, Pendulum.*got 'chess'"):
        mixer_scores.main(["--tasks", "chess"])
    with pytest.raises(ValueError, match="mixer must be one of"):
        mixer_scores.main(["--mixers", "mambo"])


def test_files_are_read_from_where_they_are(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--csv", str(tmp_path / "scores.csv"), "--steps", "2", "--seeds", "1"]
    command += ["--mixers", "lru", "--tasks", "Peptides", "--data-dir"]
    assert mixer_scores.main([*command, str(tmp_path)]) == []
    left_out = "Peptides is left out, dataset must have its files in "
    assert capsys.readouterr().out.startswith(left_out)
    (row,) = mixer_scores.main([*command, str(files), "--device", "cpu"])
    assert (row.dataset, row.metric) == ("Peptides", "test average precision, %")
    assert 0 < row.value <= 100
    with pytest.raises(ValueError, match="dataset must have its files in"):
        make_task("Peptides", data_dir=tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("name", TASKS)
def test_tasks_run_on_gpus(name: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixer_tasks.Pendulum, "episodes", 1)
    monkeypatch.setattr(mixer_tasks.Pendulum, "recordings", 6)
    row = mixer_scores.run(name, make_task(name, "cuda", files), "lru", 0, steps=2)
    assert row.device == torch.cuda.get_device_name()
    assert np.isfinite(row.value)


def test_states_are_those_of_the_spec() -> None:
    for name in list_mixers(recurrent=True):
        mixer = create_mixer(name, 16)
        spec = mixer.state_spec().values()
        expected = sum(torch.empty(shape, dtype=dtype).nbytes for shape, dtype in spec)
        assert mixers.state_bytes(mixer, 5) == expected, name
