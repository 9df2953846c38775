"""Finding and fetching D4RL's files: nothing is downloaded unasked, nothing is left half done."""

import hashlib
import http.server
import threading

import numpy as np
import pytest

from scanweave.rl import D4RL_IDS, Episode, find_d4rl, load_d4rl, load_episodes, save_d4rl
from scanweave.rl.d4rl_files import fetch, is_d4rl_id, max_steps_of


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "sets"))
    return tmp_path


def write(path):
    save_d4rl(path, [Episode(np.zeros((2, 3)), np.zeros((2, 1)), np.ones(2), terminated=True)])


def test_ids_and_files():
    for name, file in {
        "hopper-medium-replay-v2": "gym_mujoco_v2/hopper_medium_replay-v2.hdf5",
        "walker2d-medium-replay-v0": "gym_mujoco/walker_mixed.hdf5",
        "halfcheetah-medium-expert-v0": "gym_mujoco/halfcheetah_medium_expert.hdf5",
        "antmaze-large-play-v2": (
            "ant_maze_v2/Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False"
            "_sparse_fixed.hdf5"
        ),
        "door-cloned-v0": "hand_dapg/door-demos-v0-bc-combined.hdf5",
        "pen-human-v1": "hand_dapg_v1/pen-human-v1.hdf5",
        "maze2d-umaze-dense-v1": "maze2d/maze2d-umaze-dense-v1.hdf5",
    }.items():
        assert D4RL_IDS[name] == file
    assert is_d4rl_id("hopper-medium-v2")
    assert not is_d4rl_id("hopper-medium-v2.hdf5")
    steps = {"hopper-medium-v0": 1000, "antmaze-umaze-v2": 700, "door-human-v1": 300}
    assert {name: max_steps_of(name) for name in steps} == steps


def test_files_are_found_in_both_folders(home):
    with pytest.raises(FileNotFoundError, match=r"no hopper_medium-v2\.hdf5 in .*sets or .*home"):
        load_d4rl("hopper-medium-v2")
    write(home / "home/.d4rl/datasets/hopper_medium-v2.hdf5")
    assert len(load_d4rl("hopper-medium-v2")) == 1
    write(home / "sets/hopper_medium-v2.hdf5")
    assert find_d4rl("hopper-medium-v2") == home / "sets/hopper_medium-v2.hdf5"
    assert load_episodes("hopper-medium-v2")[0].meta["source"] == "hopper-medium-v2"


def test_names_that_are_refused():
    with pytest.raises(ValueError, match=r"name must be a D4RL data set such as .*, got 'hoper'"):
        find_d4rl("hoper")
    with pytest.raises(ValueError, match="name must not be a v1 file of hopper, which is wrong"):
        find_d4rl("hopper-medium-v1")


class _Handler(http.server.BaseHTTPRequestHandler):
    content, promised = b"", 0

    def do_GET(self):
        if self.path == "/none":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(self.promised))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, format, *args):
        """Nothing: tests print nothing."""


@pytest.fixture
def server(tmp_path):
    write(tmp_path / "origin.hdf5")
    content = (tmp_path / "origin.hdf5").read_bytes()
    _Handler.content, _Handler.promised = content, len(content)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()
        thread.join()


def test_download_on_request(server, home):
    path = find_d4rl("hopper-medium-v2", download=True, base_url=server)
    assert path.read_bytes() == _Handler.content
    digest = hashlib.sha256(_Handler.content).hexdigest()
    assert path.with_name(f"{path.name}.sha256").read_text() == f"{digest}  {path.name}\n"
    assert len(load_d4rl("hopper-medium-v2")) == 1
    seen = []
    fetch(server + "x", home / "y", sha256=digest.upper(), progress=lambda *at: seen.append(at))
    assert seen[-1] == (len(_Handler.content), len(_Handler.content))
    with pytest.raises(FileExistsError, match="y exists: choose another path"):
        fetch(server + "x", home / "y")


def test_a_failed_download_leaves_nothing(server, home):
    with pytest.raises(ValueError, match="sha256 must be 00, got "):
        fetch(server + "x", home / "new/z", sha256="00")
    with pytest.raises(OSError, match=r"none: cannot be fetched: .*404"):
        fetch(server + "none", home / "new/z")
    _Handler.promised += 7
    with pytest.raises(OSError, match=r"must have \d+ bytes, got|broke off after"):
        fetch(server + "x", home / "new/z")
    assert list((home / "new").iterdir()) == []
