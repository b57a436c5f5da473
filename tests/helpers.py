"""What the tests share that is no fixture: names, calling a script, reading what it leaves, stand-ins for networks."""

import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
FOLDERS = [ROOT, *(ROOT / "benchmark" / kind for kind in ("", "controls", "demonstrations", "measurements", "parity"))]
SCRIPTS = ["sac_flow_g", "sac_flow_t"]
FLOWS = [*SCRIPTS, "sac_flow_naive"]
SIZES = "--critic-dim 16 --sigma-dim 16 --encoder-dim 16 --velocity-dim 16 --batch-size 16".split()
SMALL = [*SIZES, "--no-compile", "--no-cuda"]
OFFLINE_SIZES = "--critic-dim 16 --velocity-dim 16 --gate-dim 8 --sigma-dim 16 --batch-size 16".split()
OFFLINE_SMALL = [*OFFLINE_SIZES, "--actor-average", "0.5", "--no-compile", "--no-cuda"]
# For tests of text that the scripts share (test_project.py) and that no velocity affects.
one_script = pytest.mark.parametrize("name", SCRIPTS[:1])
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def path_of(name: str) -> Path:
    """The file of a script, or of a program of benchmark/."""
    (path,) = (folder / f"{name}.py" for folder in FOLDERS if (folder / f"{name}.py").exists())
    return path


def command(name: str, *flags: str) -> list[str]:
    """The command line of a script."""
    return [sys.executable, str(path_of(name)), *map(str, flags)]


def the_run(folder: Path) -> Path:
    """The only run in a folder."""
    (run,) = (folder / "runs").iterdir()
    return run


def interrupt_after_should_save(script, monkeypatch) -> None:
    """Ctrl-C comes to `script` in the instant after each question whether a checkpoint is due."""
    should_save = script.Run.should_save

    def interrupted_afterwards(self):
        due = should_save(self)
        self.interrupted = signal.SIGINT
        return due

    monkeypatch.setattr(script.Run, "should_save", interrupted_afterwards)


def checkpoint(run: Path) -> dict:
    """A run's checkpoint and, beside its other entries, the run's progress, without what says how long things took."""
    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    progress = state.pop("progress")
    del progress["seconds"]
    progress["rows"] = {name: [row[:-1] for row in rows] for name, rows in progress["rows"].items()}
    return state | progress


def assert_same(a, b, where="checkpoint"):
    """Equality to the last bit of nested checkpoints."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b or a != a and b != b, where  # NaN is NaN


def columns(rows: torch.Tensor, obs_dim: int, action_dim: int) -> dict[str, np.ndarray]:
    """Rows of the buffer of sac_flow_offline2online.py by the names of their columns; one of width 1 is (N,)."""
    from sac_flow_offline2online import COLUMNS

    widths = np.cumsum([obs_dim, action_dim, 1, 1, 1])
    parts = np.split(rows.numpy(), widths, axis=1)
    return {name: part.squeeze(1) if part.shape[1] == 1 else part for name, part in zip(COLUMNS, parts, strict=True)}


def write_minari(root: Path, name: str, env, episodes: int, eval_env=None) -> None:
    """Minari's data set `name` in the folder `root`: episodes of random actions in `env`; `eval_env` is for tests."""
    import minari
    from minari.data_collector import EpisodeBuffer

    env.action_space.seed(0)
    buffers = []
    for i in range(episodes):
        observations = [env.reset(seed=i)[0]]
        steps = []
        done = False
        while not done:
            action = env.action_space.sample()
            obs, reward, terminated, truncated, _ = env.step(action)
            observations.append(obs)
            steps.append((action, reward, terminated, truncated))
            done = terminated or truncated
        names = "actions", "rewards", "terminations", "truncations"
        columns = dict(zip(names, map(np.array, zip(*steps, strict=True)), strict=True))
        buffers.append(EpisodeBuffer(id=i, observations=np.array(observations), **columns))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        minari.create_dataset_from_buffers(name, buffers, env=env, eval_env=eval_env)


class FixedPolicy(nn.Module):
    """Stands for an actor: action and log_prob are functions of the observation that are known."""

    def normalized(self, action):
        return action

    def rollout(self, obs, noise):
        return obs[:, :1], 10 * obs[:, 0], []


class Table(nn.Module):
    """Stands for a critic: Q(s, a) = scale * (s + a)."""

    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, obs, action):
        return self.scale * (obs[:, 0] + action[:, 0])
