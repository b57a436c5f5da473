"""sac_flow_offline2online.py on a user's own data and environment: files, dict observations, units of actions."""

import csv
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import the_run

import sac_flow_offline2online as script

REACH = "goal_envs:Reach-v0"
SMALL = "--critic-dim 16 --velocity-dim 16 --gate-dim 8 --sigma-dim 16 --batch-size 16 --no-compile --no-cuda".split()
SHORT = [*SMALL, "--eval-episodes", 2, "--eval-every", 1000, "--offline-steps", 20, "--online-steps", 30]
SHORT += ["--online-start", 10, "--chunk", 3]


@pytest.fixture
def main(monkeypatch, tmp_path):
    """`main(*flags)`: the script in a fresh folder."""
    monkeypatch.chdir(tmp_path)

    def main(*flags):
        monkeypatch.setattr("sys.argv", ["x", *map(str, flags)])
        script.main()

    return main


@pytest.fixture
def refused(main, capsys):
    """`refused(flags, *texts)`: it stops with exit code 2 and one line that holds every text."""

    def refused(flags, *texts):
        with pytest.raises(SystemExit) as error:
            main(*flags)
        lines = capsys.readouterr().err.splitlines()
        assert error.value.code == 2 and len(lines) == 1, lines
        for text in texts:
            assert text in lines[0], lines

    return refused


def play(episodes: int = 6, unit: float = 1.0) -> dict:
    """D4RL's arrays of `Reach`, played by a noisy controller; dict observations as <key>/<key> of one level each."""
    generator = np.random.default_rng(0)
    env = gym.make(REACH)
    rows = {}
    for i in range(episodes):
        obs, _ = env.reset(seed=i)
        done = False
        while not done:
            goal = np.concatenate([obs["goal"]["x"], obs["goal"]["y"]])
            action = np.clip((goal - obs["position"]) / 0.2 + 0.7 * generator.normal(size=2), -1, 1).astype(np.float32)
            before = obs
            obs, reward, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
            row = dict(actions=unit * action, rewards=reward, terminals=terminated, timeouts=truncated)
            for name, value in (("observations", before), ("next_observations", obs)):
                row[f"{name}/position"] = value["position"]
                row[f"{name}/goal/x"] = value["goal"]["x"]
                row[f"{name}/goal/y"] = value["goal"]["y"]
            for name, value in row.items():
                rows.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in rows.items()}


@pytest.fixture
def reach(tmp_path) -> Path:
    """A file of `Reach`."""
    np.savez(tmp_path / "reach.npz", **play())
    return tmp_path / "reach.npz"


def write_hdf5(path: Path, arrays: dict) -> None:
    """The arrays as datasets of a file, and what D4RL's files have beside them."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
        file["metadata/algorithm"] = "none"
        file["infos/qpos"] = np.zeros(3)


def columns(rows: torch.Tensor, obs_dim: int, action_dim: int) -> dict:
    """Rows of the buffer, by their names."""
    widths = np.cumsum([obs_dim, action_dim, 1, 1, 1])
    parts = np.split(rows.numpy(), widths, axis=1)
    return {name: part.squeeze() for name, part in zip(script.COLUMNS, parts, strict=True)}


# --- files with D4RL's keys ---


class Line(gym.Env):
    """Stands for an environment of which the loader needs the spaces."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))


def line(terminals, timeouts) -> dict:
    """Observation t, action t / 100 and reward -t of a single line of time."""
    t = np.arange(len(terminals), dtype=float)
    return dict(
        observations=t[:, None], actions=t[:, None] / 100, rewards=-t, terminals=np.array(terminals, bool),
        timeouts=np.array(timeouts, bool),
    )  # fmt: skip


@pytest.mark.parametrize("suffix", ["npz", "hdf5"])
def test_rows_of_d4rls_arrays(tmp_path, suffix):
    """Episodes of 3 (terminated), 4 (timeout), 1 (timeout) and 3 steps (the file ends)."""
    arrays = line(terminals=[0, 0, 1, *8 * [0]], timeouts=[0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0])
    path = tmp_path / f"line.{suffix}"
    write = write_hdf5 if suffix == "hdf5" else lambda path, arrays: np.savez(path, **arrays)
    args = script.Args("Line-v0", dataset=str(path), chunk=2)

    write(path, arrays)
    rows = columns(script.load_data(str(path), Line(), args), 1, 1)
    assert rows["obs"].tolist() == [0, 1, 2, 3, 4, 5, 8, 9]  # 6, 7 and 10 lead to what the file does not have
    assert rows["terminated"].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert rows["last"].tolist() == [0, 0, 1, 0, 0, 1, 0, 1]
    assert rows["reward"].tolist() == (-rows["obs"]).tolist()
    np.testing.assert_array_equal(rows["action"], (rows["obs"] / 100).astype(np.float32))
    goes_on = rows["terminated"] == 0
    assert (rows["next_obs"] == rows["obs"] + 1)[goes_on].all()

    write(path, arrays | dict(next_observations=arrays["observations"] + 0.5))
    rows = columns(script.load_data(str(path), Line(), args), 1, 1)
    assert rows["obs"].tolist() == list(range(11)) and (rows["next_obs"] == rows["obs"] + 0.5).all()
    assert rows["last"].tolist() == [0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 1]
    assert rows["terminated"].tolist() == [0, 0, 1, *8 * [0]]


def test_own_files_that_do_not_fit(refused, tmp_path):
    arrays = play()
    path = tmp_path / "own.npz"
    flags = ["--env-id", REACH, "--dataset", path, "--no-cuda"]

    def refuse(changes, *texts):
        changed = arrays | changes
        np.savez(path, **{name: values for name, values in changed.items() if values is not None})
        refused(flags, str(path), *texts)

    refuse({"timeouts": None}, "lacks", "timeouts")
    refuse({"observations/goal/y": None}, "lacks", "observations/goal/y")
    refuse({"rewards": np.append(arrays["rewards"], 0)}, "differ in length", "'rewards'")
    refuse({"actions": arrays["actions"][:, :1]}, "(1,)", "(2,)")
    refuse({"observations/position": arrays["observations/position"][:, :1]}, "obs has shape (3,)")
    refuse({"rewards": np.full(len(arrays["rewards"]), np.nan)}, "reward has NaN")
    refuse({"actions": 3 * arrays["actions"]}, "actions leave the bounds")
    path.write_bytes(b"nothing")
    refused(flags, str(path), "truncated, corrupted or of another format")


def test_own_environments_that_do_not_fit(refused, reach):
    own = ["--dataset", reach, "--no-cuda"]
    refused(["--env-id", "goal_envs:Missing-v0", *own], "--env-id goal_envs:Missing-v0", "Missing")
    refused(["--env-id", "no_such_module:Reach-v0", *own], "no_such_module")
    refused(["--env-id", REACH, *own, "--env-kwargs", "{half: 1}"], "--env-kwargs {half: 1}", "JSON")
    refused(["--env-id", REACH, *own, "--env-kwargs", "[1]"], "--env-kwargs [1]", "dict")
    refused(["--env-id", REACH, *own, "--env-kwargs", '{"whole": 1}'], REACH, "whole")
    refused(["--env-id", "Reach", "--no-cuda"], "no such task", "--dataset FILE.npz")
    refused(["--env-id", "tests/Reach-v0", "--no-cuda"], "tests/Reach-v0", "--dataset FILE.npz")


def test_own_data_in_an_own_environment(main, tmp_path, reach):
    """Both phases; success is what the environment says; its arguments hold in training and evaluation."""
    main("--env-id", REACH, "--dataset", reach, *SHORT, "--env-kwargs", '{"max_episode_steps": 4, "half": true}')
    run = the_run(tmp_path)
    evaluations = list(csv.DictReader(open(run / "eval.csv")))
    assert [row["phase"] for row in evaluations] == ["offline", "online"]
    for row in evaluations:
        assert 0 <= float(row["success_rate"]) <= 1 and float(row["length"]) <= 4
    episodes = list(csv.DictReader(open(run / "returns.csv")))
    assert len(episodes) >= 7 and all(row["success"] == str(float(int(row["length"]) < 4)) for row in episodes)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    added = len(play()["rewards"])
    starts = added + np.cumsum([0] + [int(row["length"]) for row in episodes[:-1]])
    assert state["buffer_added"] == added + 30 and (state["buffer"][starts, 0] <= 0).all()  # x of the position


def test_an_environment_without_an_end_gets_one():
    args = script.Args("goal_envs:Endless-v0", dataset="own.npz")
    assert script.make_env(args).get_wrapper_attr("_max_episode_steps") == 10_000


# --- dict observations ---


@pytest.mark.parametrize("suffix", ["npz", "hdf5"])
def test_dict_observations_are_flattened_as_the_environment_does(tmp_path, suffix):
    """The rows of the data are what the flattened environment returns in the same episodes."""
    path = tmp_path / f"reach.{suffix}"
    arrays = play()
    if suffix == "npz":
        np.savez(path, **arrays)
    else:
        write_hdf5(path, arrays)
    args = script.Args(REACH, dataset=str(path))
    env = script.make_env(args)
    rows = columns(script.load_data(str(path), env, args), 4, 2)
    obs = []
    next_obs = []
    for i in range(6):
        now, _ = env.reset(seed=i)
        done = False
        while not done:
            obs.append(now)
            now, _, terminated, truncated, _ = env.step(arrays["actions"][len(next_obs)])
            next_obs.append(now)
            done = terminated or truncated
    np.testing.assert_array_equal(rows["obs"], np.float32(obs))
    np.testing.assert_array_equal(rows["next_obs"], np.float32(next_obs))
