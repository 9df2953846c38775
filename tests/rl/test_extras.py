"""What is missing is named, with the command that brings it."""

import importlib.util
import sys

import numpy as np
import pytest

from scanweave.rl import Episode, record, rollout, save_d4rl
from scanweave.rl.evaluate import Evaluation, TargetResult
from scanweave.rl.plot import plot_targets

INSTALL = r"pip install 'scanweave\[{}\]'"


def test_without_gymnasium(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    spec = importlib.util.spec_from_file_location("scanweave.rl.probe", rollout.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match="scanweave.rl needs gymnasium: " + INSTALL.format("rl")):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_without_h5py(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "h5py", None)
    episode = Episode(np.zeros((1, 1)), np.zeros((1, 1)), np.zeros(1))
    with pytest.raises(ImportError, match="scanweave.rl needs h5py: " + INSTALL.format("rl")):
        save_d4rl(tmp_path / "set.hdf5", [episode])


def test_without_tyro(monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    with pytest.raises(ImportError, match="needs tyro: " + INSTALL.format("train")):
        record.main()


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    results = [TargetResult(1.0, [1.0], [1])]
    evaluation = Evaluation("Some-v0", "window", [0], results, {}, 1, 0.1)
    with pytest.raises(ImportError, match="needs matplotlib: " + INSTALL.format("train")):
        plot_targets(evaluation, tmp_path / "t.png")
