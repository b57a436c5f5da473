"""sac_flow_offline2online.py with its tasks: loaders in the true formats, both phases, resume, bad input."""

import csv
import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import OFFLINE_SMALL, assert_same, checkpoint, columns, command, needs_cuda, the_run, write_minari
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sac_flow_offline2online as script

h5py, minari, ogbench = (pytest.importorskip(name) for name in ("h5py", "minari", "ogbench"))

NAME = "sac_flow_offline2online"
PENDULUM = ["--env-id", "tests/pendulum-v0"]
SHORT = [*OFFLINE_SMALL, "--eval-episodes", 2, "--eval-every", 40, "--online-start", 10]
robosuite_installed = importlib.util.find_spec("robosuite") is not None
needs_robosuite = pytest.mark.skipif(not robosuite_installed, reason="needs robosuite")


def write_robomimic(path: Path, lengths=(6, 7, 8), sizes=(3, 4, 2, 10), drop=(), env_name="Lift", **changes) -> None:
    """A file of robomimic's layout; the demonstrations succeed in their last two rows, the first in none."""
    generator, keys = np.random.default_rng(0), dict(zip(script.OBS_KEYS, sizes, strict=True))
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs.update(env_args=json.dumps({"env_name": env_name}), total=sum(lengths))
        for i in reversed(range(len(lengths))):
            demo, n = data.create_group(f"demo_{i}"), lengths[i]
            demo.attrs["num_samples"] = n
            reward = (np.arange(n) >= n - 2) * float(i > 0)
            states = generator.normal(size=(n + 1, sum(sizes)))
            states[:, 0] = i
            dones = (np.arange(n) == n - 1) | (reward > 0)
            arrays = dict(actions=generator.uniform(-1, 1, (n, 7)), rewards=reward, dones=dones) | changes
            for name, values in arrays.items():
                if name not in drop:
                    demo[name] = values
            for kind, rows in (("obs", states[:-1]), ("next_obs", states[1:])):
                for (key, _), part in zip(keys.items(), np.split(rows, np.cumsum(sizes)[:-1], axis=1), strict=True):
                    demo[f"{kind}/{key}"] = part


class Spaces:
    """Stands for an environment of which a loader needs the spaces."""

    def __init__(self, obs_dim, action_dim):
        Box = importlib.import_module("gymnasium").spaces.Box
        self.observation_space, self.action_space = Box(-np.inf, np.inf, (obs_dim,)), Box(-1, 1, (action_dim,))


@needs_robosuite
def test_robomimic_rows(tmp_path):
    """Demonstrations in the order of their numbers; reward - 1; success terminates, a demonstration's end does not."""
    path = tmp_path / "low_dim_v15.hdf5"
    lengths = [5] * 10 + [6]  # demo_10 comes after demo_9, not after demo_1
    write_robomimic(path, lengths)
    rows = script.load_data(path, Spaces(19, 7), script.Args())
    obs, action, reward, terminated, last, next_obs = columns(rows, 19, 7).values()
    assert obs[:, 0].tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
    assert np.flatnonzero(last).tolist() == (np.cumsum(lengths) - 1).tolist()
    assert reward[:5].tolist() == [-1] * 5 and not terminated[:5].any()  # no success: `dones` alone does not terminate
    assert reward[5:10].tolist() == [-1, -1, -1, 0, 0] and terminated[5:10].tolist() == [0, 0, 0, 1, 1]
    with h5py.File(path) as file:
        demo = file["data/demo_3"]
        expected = np.concatenate([demo[f"obs/{key}"] for key in script.OBS_KEYS], axis=1)
        np.testing.assert_array_equal(obs[15:20], expected.astype(np.float32))
        np.testing.assert_array_equal(action[15:20], demo["actions"][:].astype(np.float32))
        expected = np.concatenate([demo[f"next_obs/{key}"] for key in script.OBS_KEYS], axis=1)  # the last row's too
        np.testing.assert_array_equal(next_obs[15:20], expected.astype(np.float32))


def write_ogbench(path: Path, episodes=2, rows=41, obs_dim=28, qpos_dim=21) -> None:
    """A cube-single play file: the cube is at its goal of task 1 in some rows of the middle."""
    generator, n = np.random.default_rng(0), episodes * rows
    goal = cube_env().unwrapped._data.mocap_pos[0]
    qpos = generator.normal(size=(n, qpos_dim)).astype(np.float32)
    qpos[15:19, 14:17] = goal + 0.01
    terminals = np.arange(n) % rows == rows - 1
    actions = generator.uniform(-1, 1, (n, 5)).astype(np.float32)
    arrays = dict(
        observations=generator.normal(size=(n, obs_dim)).astype(np.float32), actions=actions, terminals=terminals
    )
    np.savez_compressed(path, **arrays, qpos=qpos, qvel=np.zeros((n, 20), np.float32))


CUBE = "cube-single-play-singletask-task1-v0"


def cube_env():
    env = ogbench.make_env_and_datasets(CUBE, env_only=True)
    env.reset(seed=0)
    return env


def test_ogbench_rows_are_those_of_its_own_reader(tmp_path):
    path = tmp_path / "cube.npz"
    write_ogbench(path)
    write_ogbench(tmp_path / "cube-val.npz")
    args = script.Args(env_id=CUBE, sparse=False)
    env, data, _ = ogbench.make_env_and_datasets(CUBE, dataset_path=str(path))
    obs, action, reward, terminated, last, next_obs = columns(script.load_data(path, env, args), 28, 5).values()
    pairs = {"observations": obs, "actions": action, "next_observations": next_obs, "rewards": reward}
    for theirs, ours in pairs.items():
        np.testing.assert_array_equal(ours, data[theirs])
    assert len(obs) == 80 and np.flatnonzero(last).tolist() == [39, 79] == np.flatnonzero(data["terminals"]).tolist()
    assert np.flatnonzero(terminated).tolist() == [15, 16, 17, 18] and (reward[15:19] == 0).all()  # and on it goes
    buffer = script.ReplayBuffer(80, 28, 5, torch.device("cpu"))
    buffer.fill(script.load_data(path, env, args))
    chunk = script.merge_chunks(*buffer.rows[None, 12:17].split(buffer.widths, dim=2), 1.0)
    _, _, own, executed, reward, terminated, _ = chunk
    assert (reward, terminated) == (-3, 1) and own.all()  # nothing is added after the success, all is cloned
    assert executed[0].tolist() == 20 * [1] + 5 * [0]


def test_sparse_rewards_count_no_cubes(tmp_path):
    """Two cubes out of place are -2, or with --sparse -1, in the data as in the environment."""
    task = "cube-double-play-singletask-task2-v0"
    write_ogbench(tmp_path / "cubes.npz", obs_dim=37, qpos_dim=28)
    for sparse, reward in ((False, -2), (True, -1)):
        args = script.Args(env_id=task, sparse=sparse, dataset=str(tmp_path / "cubes.npz"))
        env = script.make_env(args)
        assert (columns(script.load_data(args.dataset, env, args), 37, 5)["reward"] == reward).all()
        env.reset(seed=0)
        assert env.step(np.zeros(5))[1] == reward


def test_success_belongs_to_the_state_before_the_step():
    """OGBench's timing since 1.2, in which the environment agrees with the labels of the data: r(s)."""
    env = cube_env()
    data = dict(qpos=env.unwrapped._data.qpos[None].copy())
    ogbench.relabel_utils.relabel_dataset(CUBE, cube_env(), data)
    _, reward, terminated, _, info = env.step(np.zeros(5))
    assert reward == data["rewards"][0] == -1 and not terminated and info["success"] == False  # noqa: E712
    cube = env.unwrapped._data.joint("object_joint_0").qpos
    cube[:3] = env.unwrapped._data.mocap_pos[0]
    env.unwrapped.post_step()  # what the step that brought it there would have done
    _, reward, terminated, _, info = env.step(np.zeros(5))
    assert reward == 0 and terminated and info["success"]


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory) -> Path:
    """A folder with a Minari data set of InvertedPendulum-v5, tests/pendulum-v0: 12 episodes of random actions."""
    folder = tmp_path_factory.mktemp("minari")
    write_minari(folder, "tests/pendulum-v0", gym.make("InvertedPendulum-v5"), 12)
    return folder


def test_minaris_environment_for_evaluation(tmp_path):
    """The one that scores of a data set are about; the one that the data come from if it names none, or if asked."""
    collecting, evaluating = (gym.make("InvertedPendulum-v5", max_episode_steps=n) for n in (1000, 77))
    write_minari(tmp_path, "tests/own-v0", collecting, 1)
    write_minari(tmp_path, "tests/both-v0", collecting, 1, evaluating)
    cases = [("own", None, 1000), ("both", None, 77), ("both", '{"eval_env": false}', 1000)]
    for name, kwargs, steps in cases:
        args = script.Args(f"tests/{name}-v0", dataset=str(tmp_path), env_kwargs=kwargs)
        assert script.make_env(args).get_wrapper_attr("_max_episode_steps") == steps


def test_minari_rows_are_those_of_its_own_reader(pendulum):
    args = script.Args(env_id="tests/pendulum-v0", dataset=str(pendulum))
    env = script.make_env(args)
    obs, action, reward, terminated, last, next_obs = columns(script.load_data(None, env, args), 4, 1).values()
    episodes = list(script.minari_dataset(args).iterate_episodes())
    action = action[:, None]
    for ours, theirs in ((action, "actions"), (reward, "rewards"), (terminated, "terminations")):
        np.testing.assert_allclose(ours, np.concatenate([getattr(episode, theirs) for episode in episodes]))
    assert action.std() > 0.5 and reward.std() > 0
    np.testing.assert_allclose(obs, np.concatenate([episode.observations[:-1] for episode in episodes]), rtol=1e-6)
    np.testing.assert_allclose(next_obs, np.concatenate([episode.observations[1:] for episode in episodes]), rtol=1e-6)
    assert np.flatnonzero(last).tolist() == (np.cumsum([len(episode) for episode in episodes]) - 1).tolist()


# --- runs ---


def table(run: Path, name: str) -> list[list[str]]:
    """A CSV file without its column of seconds."""
    return [row[:-1] for row in csv.reader(open(run / name))]


@pytest.fixture
def run(start, pendulum):
    """`run(*flags)`: the script on the Minari data in a fresh folder."""

    def run(*flags, check=True):
        flags = flags if {"--resume", "--evaluate"} & set(flags) else [*PENDULUM, "--dataset", pendulum, *flags]
        done = start(*flags, name=NAME)
        assert not check or done.returncode == 0, done.stderr
        return done

    return run


def test_both_phases_and_what_they_leave(run, tmp_path, pendulum):
    done = run(*SHORT, "--offline-steps", 100, "--online-steps", 160, "--beta", 5, "--online-beta", 2)
    folder = the_run(tmp_path)
    assert {"args.json", "returns.csv", "eval.csv", "checkpoint.pt"} <= {path.name for path in folder.iterdir()}
    evaluations = list(csv.DictReader(open(folder / "eval.csv")))
    assert [(row["step"], row["phase"]) for row in evaluations] == [
        ("40", "offline"), ("80", "offline"), ("100", "offline"), ("120", "online"), ("160", "online"),
        ("200", "online"), ("240", "online"), ("260", "online"),
    ]  # fmt: skip
    assert all(row["success_rate"] == "nan" and float(row["return"]) >= 1 for row in evaluations)
    assert "step 260, online: return" in done.stderr + done.stdout
    events = EventAccumulator(str(folder)).Reload()
    values = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert [value for _, value in values["charts/online"]] == [0, 1]
    (_, offline), (_, online) = values["losses/flow_matching"]
    assert offline > 0 == online and all(value > 0 for _, value in values["losses/bc"])
    assert {"losses/qf_loss", "losses/alpha", "eval/return", "charts/SPS", "charts/episodic_return"} <= set(values)
    for (_, share), (_, alpha), (_, entropy) in zip(
        values["losses/alpha_log_prob"], values["losses/alpha"], values["losses/entropy"], strict=True
    ):
        assert share == pytest.approx(-alpha * entropy, rel=0.1)  # a mean of products beside a product of means
    episodes = list(csv.DictReader(open(folder / "returns.csv")))
    lengths = np.array([int(row["length"]) for row in episodes])
    assert len(episodes) >= 3 and [int(row["step"]) for row in episodes] == (100 + lengths.cumsum()).tolist()
    state = checkpoint(folder)
    args = script.Args("tests/pendulum-v0", dataset=str(pendulum))
    data = script.load_data(None, script.make_env(args), args)
    assert state["buffer"]["added"] == len(data) + 160 and state["updates"] == 100 + 150  # after --online-start
    assert json.loads((folder / "args.json").read_text())["files"] == []
    done = run("--evaluate", folder)
    assert re.search(r"deterministic: return [\d.]+ .*\nstochastic: return", done.stdout)


FIXED_SIGMA = ["--no-learn-sigma", "--no-autotune", "--alpha", 0.25, "--utd", 2]


@pytest.mark.parametrize("flags", [["--velocity", "plain"], ["--velocity", "decoded", *FIXED_SIGMA]])
def test_stopped_runs_resume_bit_for_bit(run, tmp_path, flags):
    """Stopped at the end of an online episode, against a run that was never stopped."""
    flags = [*SHORT, *flags, "--offline-steps", 60]
    run(*flags, "--online-steps", 60)
    whole = the_run(tmp_path).rename(tmp_path / "whole")

    stop = next(int(row[0]) for row in table(whole, "returns.csv")[1:] if int(row[0]) > 80)
    run(*flags, "--online-steps", stop - 60)
    folder = the_run(tmp_path)
    assert checkpoint(folder)["step"] == stop
    run("--resume", folder, "--online-steps", 60)
    resumed, final = checkpoint(folder), checkpoint(whole)
    if "--no-autotune" in flags:
        assert final["scalars"]["log_alpha"].exp().item() == pytest.approx(0.25)
    rows = resumed["rows"]["eval.csv"]
    rows[:] = [row for row in rows if row[0] != stop]  # the shorter run's own last evaluation
    assert_same(resumed, final | {"args": resumed["args"]})
    assert table(folder, "returns.csv") == table(whole, "returns.csv")
    assert [row for row in table(folder, "eval.csv") if row[0] != str(stop)] == table(whole, "eval.csv")


def test_killed_in_either_phase(run, tmp_path, pendulum):
    """SIGTERM offline and SIGKILL online; what the last checkpoint promised is kept."""
    flags = [*PENDULUM, "--dataset", pendulum, *SHORT, "--offline-steps", 300, "--online-steps", 200]
    run(*flags[4:], "--save-every", 50)
    whole = the_run(tmp_path).rename(tmp_path / "whole")

    def start(*flags):
        arguments = command(NAME, *flags)
        return subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    process = start(*flags, "--save-every", 50)
    while not list(tmp_path.glob("runs/*/checkpoint.pt")):
        time.sleep(0.05)
        assert process.poll() is None
    folder = the_run(tmp_path)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 143 and "--resume" in out and checkpoint(folder)["step"] < 500, err
    process = start("--resume", folder)
    while checkpoint(folder)["step"] < 310:
        time.sleep(0.1)
        assert process.poll() is None
    process.kill()
    process.communicate()
    assert checkpoint(folder)["step"] < 500
    run("--resume", folder)
    assert_same(checkpoint(folder), checkpoint(whole) | {"args": checkpoint(folder)["args"]})
    assert table(folder, "returns.csv") == table(whole, "returns.csv")


def test_evaluation_leaves_training_as_it_was(run, tmp_path):
    flags = [*OFFLINE_SMALL, "--online-start", 10, "--offline-steps", 40, "--online-steps", 40, "--eval-episodes", 1]
    run(*flags, "--eval-every", 10)
    often = checkpoint(the_run(tmp_path).rename(tmp_path / "often"))
    run(*flags, "--eval-every", 1000)
    seldom = checkpoint(the_run(tmp_path))
    for state in (often, seldom):
        del state["args"], state["rows"]["eval.csv"]
    assert_same(seldom, often)


def test_files_that_no_step_uses(tmp_path, capsys):
    """Of three files, 20 steps of ten each use two; 21 steps use all."""
    (tmp_path / "shards").mkdir()
    for i in range(3):
        write_ogbench(tmp_path / "shards" / f"cube-{i}.npz", 2)
    args = script.Args(CUBE, dataset=str(tmp_path / "shards"), rotate_every=10)
    for steps in (20, 21):
        script.note.cache_clear()
        args.offline_steps = steps
        files, *_ = script.find_data(args, cube_env(), None)
        noted = "only the first 2 of 3 files will be used" in capsys.readouterr().err
        assert len(files) == 3 and noted is (steps == 20)


def test_a_link_to_a_data_file(tmp_path):
    """As of a cache that names its files by their hashes: the link's suffix tells the format."""
    write_ogbench(tmp_path / "data.npz", 2)
    (tmp_path / "data.npz").rename(tmp_path / "9e107d9d")
    (tmp_path / "data.npz").symlink_to(tmp_path / "9e107d9d")
    files, *_ = script.find_data(script.Args(CUBE, dataset=str(tmp_path / "data.npz")), cube_env(), None)
    assert files == [str(tmp_path / "data.npz")]


def test_files_of_a_folder_are_used_in_turn(monkeypatch, tmp_path):
    """60 rows for ten steps, 80 for ten, 60 again; resumed from either file, it goes on the same."""
    (tmp_path / "shards").mkdir()
    for i, rows in enumerate((31, 41)):
        write_ogbench(tmp_path / "shards" / f"cube-{i}.npz", 2, rows)
    write_ogbench(tmp_path / "shards" / "cube-0-val.npz")
    flags = ["--env-id", CUBE, "--dataset", "shards", "--rotate-every", 10, "--eval-episodes", 1, *OFFLINE_SMALL]
    flags += ["--offline-steps", 25, "--online-steps", 0, "--save-every", 7]
    saved, save_as = {}, script.Run.save_as

    def save(self, name, **state):
        save_as(self, name, **state)
        if name == "checkpoint.pt":
            step = state["progress"]["step"]
            saved[step] = len(state["buffer"]["rows"])
            shutil.copytree(self.folder, tmp_path / f"at-{step}", dirs_exist_ok=True)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script.Run, "save_as", save)
    monkeypatch.setattr("sys.argv", ["x", *map(str, flags)])
    script.main()
    assert saved == {7: 60, 14: 80, 21: 60, 25: 60}
    whole = checkpoint(tmp_path / "at-25")
    for step in (14, 21):  # at 21 the rows behind the 60 are those of the larger file, which a resumed run lacks
        monkeypatch.setattr("sys.argv", ["x", "--resume", str(tmp_path / f"at-{step}")])
        script.main()
        again = checkpoint(tmp_path / f"at-{step}")
        assert_same(again, whole | {"args": again["args"]})


@needs_robosuite
def test_robosuite_is_seeded_and_ends_at_success():
    env = script.RobosuiteEnv("lift")
    assert env.horizon == 300

    def trace(seed):
        start = env.reset(seed=seed)[0]
        return np.stack([start, *(env.step(np.full(7, 0.3))[0] for _ in range(5))])

    first, other, again = trace(3), trace(4), trace(3)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], other[0])
    state = env.np_random.bit_generator.state
    unseeded = env.reset()[0]
    env.np_random.bit_generator.state = state
    np.testing.assert_array_equal(env.reset()[0], unseeded)  # how a run goes on in mid-episode
    obs, reward, terminated, truncated, info = env.step(np.zeros(7))
    assert obs.shape == (19,) and (reward, terminated, truncated, info["success"]) == (-1, False, False, False)
    env.env._check_success = lambda: True
    _, reward, terminated, _, info = env.step(np.zeros(7))
    assert (reward, terminated, info["success"]) == (0, True, True)


@needs_robosuite
def test_the_collector_plays_in_the_same_environment():
    import collect

    for task in ("can", "square"):
        env, other = script.RobosuiteEnv(task), collect.make_robosuite(task)
        obs = collect.robomimic_obs(collect.reset_robosuite(other, 5))
        np.testing.assert_array_equal(env.reset(seed=5)[0], np.concatenate([obs[key] for key in script.OBS_KEYS]))


@needs_robosuite
def test_lift(monkeypatch, tmp_path, capsys):
    """The real task, in episodes of 100 steps, from data of the right shape; and again, stopped and resumed."""
    write_robomimic(tmp_path / "data.hdf5", [20] * 5)
    flags = ["--dataset", tmp_path / "data.hdf5", *OFFLINE_SMALL, "--offline-steps", 50, "--online-start", 40]
    flags += ["--eval-episodes", 1, "--eval-every", 1000]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(script.ROBOSUITE, "lift", ("Lift", 100))

    def main(*flags):
        monkeypatch.setattr("sys.argv", ["x", *map(str, flags)])
        script.main()

    main(*flags, "--online-steps", 110)
    whole = the_run(tmp_path).rename(tmp_path / "whole")
    assert checkpoint(whole)["buffer"]["added"] == 100 + 110
    assert table(whole, "returns.csv")[1][1:4] == ["-100.0", "100", "0.0"]
    assert table(whole, "eval.csv")[1][:4] == ["50", "offline", "stochastic", "0"]
    main(*flags, "--online-steps", 100)  # the first episode
    run = the_run(tmp_path)
    main("--resume", run, "--online-steps", 110)
    resumed, final = checkpoint(run), checkpoint(whole)
    assert_same(resumed, final | {"args": resumed["args"], "rows": resumed["rows"]})


@needs_robosuite
@pytest.mark.parametrize("task", ["can", "square"])
def test_can_and_square(task):
    """A policy plays the real task for 200 steps, chunk by chunk."""
    env = script.RobosuiteEnv(task)
    env.horizon = 200
    actor = script.Actor(23, env.action_space.low, env.action_space.high, sigma_dim=16).requires_grad_(False)
    env = gym.wrappers.RecordEpisodeStatistics(env, stats_key=script.EPISODE)
    scores = script.evaluate(lambda obs: actor.act(torch.from_numpy(obs)[None])[0].numpy(), env, 1, seed=0)
    assert (scores["success_rate"], scores["return"], scores["length"]) == (0, -200, 200)


def test_cube_single_on_collected_data(start, tmp_path):
    """A short run on the oracle's play data: the loss of flow matching falls clearly; then the real task online."""
    flags = ["--env-id", CUBE, "--collect", 1, *OFFLINE_SMALL, "--velocity-dim", 64, "--batch-size", 64]
    flags += ["--eval-episodes", 1]
    done = start(*flags, "--offline-steps", 500, "--online-steps", 250, "--online-start", 200, name=NAME)
    assert done.returncode == 0, done.stderr
    assert "collecting 1 scripted episodes" in done.stderr
    assert (tmp_path / "data" / "cube-single-play-v0-1.npz").is_file()
    events = EventAccumulator(str(the_run(tmp_path))).Reload()
    losses = [event.value for event in events.Scalars("losses/flow_matching")][:5]
    assert losses[-1] < 0.75 * losses[0], losses


def test_where_robomimics_data_are_looked_for(monkeypatch, tmp_path):
    """Collected once if there are none; else human demonstrations, of several people before those of one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(script, "benchmark_of", lambda *names: "robosuite")
    collected = []
    file = Path("data/lift-100.hdf5")

    def run(words):
        collected.append(words[2:])
        file.parent.mkdir()
        file.touch()
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(script.subprocess, "run", run)
    for _ in range(2):
        assert script.find_dataset(script.Args()) == [file]
    assert collected == [["--env-id", "lift", "--episodes", "100", "--seed", "1", "--out", str(file)]]
    for kind in ("ph", "mh"):
        path = tmp_path / ".robomimic" / "lift" / kind / "low_dim_v15.hdf5"
        path.parent.mkdir(parents=True)
        path.touch()
        assert script.find_dataset(script.Args()) == [path]


@pytest.mark.parametrize("device", ["--no-cuda", pytest.param("--cuda", marks=needs_cuda)])
def test_compiled_is_eager(run, tmp_path, device):
    """On the same batches, up to rounding."""
    flags = [*SHORT, device, "--flow-steps", 2, "--offline-steps", 8, "--online-steps", 12, "--online-start", 6]
    flags += ["--critic-layers", 2, "--velocity-layers", 1]
    run(*flags)
    eager = checkpoint(the_run(tmp_path).rename(tmp_path / "eager"))
    done = run(*flags, "--compile")
    assert "continuing without it" not in done.stderr, done.stderr
    compiled = checkpoint(the_run(tmp_path))
    rounding = dict(rtol=1e-2, atol=1e-3) if device == "--cuda" else dict(rtol=1e-3, atol=1e-4)
    for part in ("actor", "average", "critics"):
        torch.testing.assert_close(compiled[part], eager[part], **rounding)


# --- bad input ---


@pytest.fixture
def refused(refused, monkeypatch, tmp_path):
    """conftest.py's `refused`, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return refused


@needs_robosuite
@pytest.mark.parametrize(
    "changes, texts",
    [
        (dict(sizes=(3, 4, 2, 14)), ["(23,)", "(19,)"]),
        (dict(actions=np.full((6, 7), 1.5), lengths=(6, 6)), ["actions leave the bounds", "0.5"]),
        (dict(lengths=(3, 4)), ["--chunk 5", "at most 4"]),
        (dict(lengths=()), ["no complete episode"]),
        (dict(drop=("rewards",)), ["rewards"]),
        (dict(env_name="PickPlaceCan"), ["PickPlaceCan", "--env-id lift"]),
        (dict(rewards=np.array([0, 0, 0, np.nan, 1, 1]), lengths=(6, 6)), ["reward", "NaN"]),
        (dict(rewards=np.zeros(5), lengths=(6, 6)), ["differ in length"]),
    ],
)
def test_data_that_does_not_fit(refused, tmp_path, changes, texts):
    path = tmp_path / "data.hdf5"
    write_robomimic(path, **changes)
    refused(lambda: script.load_data(path, Spaces(19, 7), script.Args()), *texts)


def test_damaged_files(refused, tmp_path):
    write_robomimic(tmp_path / "a.hdf5")
    write_ogbench(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", observations=np.zeros((5, 28)))
    with np.load(tmp_path / "b.npz") as whole:
        for name, terminals in (("d", np.zeros(82)), ("e", np.arange(82) == 40)):  # no end; none of the last episode
            np.savez(tmp_path / f"{name}.npz", **{**whole, "terminals": terminals})
        np.savez(tmp_path / "f.npz", **{**whole, "qpos": np.full((82, 21), np.nan)})
    cases = [("a.hdf5", "lift", Spaces(19, 7))] if robosuite_installed else []
    for name, env_id, env in [*cases, *((f"{name}.npz", CUBE, cube_env()) for name in "bcdef")]:
        path, args = tmp_path / name, script.Args(env_id=env_id, sparse=False)
        whole = path.read_bytes()
        for damaged in [whole[: len(whole) // 2], b""] if name in ("a.hdf5", "b.npz") else [whole]:
            path.write_bytes(damaged)
            refused(lambda path=path, env=env, args=args: script.load_data(path, env, args), str(path))


def test_bad_flags(refused, run, monkeypatch, tmp_path, pendulum):
    def refuse(flags, *texts):
        monkeypatch.setattr("sys.argv", ["x", *map(str, flags)])
        refused(script.main, *texts)

    monkeypatch.setenv("HOME", str(tmp_path))
    data = [*PENDULUM, "--dataset", pendulum, *SHORT, "--offline-steps", 5, "--online-steps", 20]  # if not refused
    refuse(["--env-id", CUBE, "--dataset", tmp_path / "nowhere.npz"], "--dataset", "nowhere.npz")
    refuse(["--env-id", CUBE, "--dataset", tmp_path], "no .npz file")
    refuse(["--env-id", CUBE, "--collect", 0], ".ogbench", "--collect 100")
    refuse(["--env-id", "tests/missing-v0", "--dataset", pendulum], "tests/missing-v0", "collect.py", "--policy")
    refuse(["--env-id", "nonsense"], "--env-id nonsense: no such task; there are lift, can, square")
    refuse(["--env-id", "cube-single-play-v0"], "no such task", "singletask")
    for flag in ("--resume", "--evaluate", "--run-name", "--dataset"):
        refuse([flag, "", "--collect", 0], f"{flag} must be a name")
    refuse([*data, "--critic-lr", "inf"], "--critic-lr must be above 0 and finite")
    refuse([*data, "--chunk", 10_000], "--chunk 10000", "at most")
    refuse([*data, "--buffer-size", 30, "--batch-size", 8], "--buffer-size 30")
    refuse([*data, "--no-learn-sigma"], "--autotune", "--learn-sigma")
    refuse([*data, "--alpha", 0], "--autotune", "--alpha")
    refuse([*data, "--beta", -1], "--beta", "0 or more")
    refuse([*data, "--sigma", 0], "--sigma", "above 0")
    refuse([*data, "--online-start", 500, "--online-steps", 400], "--online-start 500", "before the first update")
    refuse([*data, "--collect", 5], "--collect", "--dataset")
    refuse(["--env-id", CUBE.replace("task1", "task9"), "--collect", 5], "task9")
    refuse(["--env-id", CUBE.replace("play", "noisy"), "--collect", 5], "--collect is for lift")
    refuse(["--env-id", "robosuite/Stack", "--collect", 5], "--collect is for lift")
    refuse([*data, "--capture-video"], "--capture-video", "--evaluate")
    refuse([*data, "--no-autotune", "--target-entropy", 0], "--target-entropy needs --autotune")
    refuse([*data, "--online-fraction", 0.001], "--online-fraction 0.001", "is no chunk")
    refuse([*data, "--target-entropy", 100], "--target-entropy must be at most")
    refuse(["--evaluate", tmp_path / "nothing"], "there is no", "nothing")
    assert not (tmp_path / "runs").exists()
    run(*SHORT, "--offline-steps", 5, "--online-steps", 0)
    folder = the_run(tmp_path)
    refuse(["--resume", folder], "reached step 5", "--online-steps")
    refuse(["--resume", folder, "--online-steps", 9, "--chunk", 3], "--chunk 3", "drop the")


def test_missing_package_names_the_remedy(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "ogbench", None)
    refused(lambda: script.benchmark_of(CUBE), "ogbench", "-r benchmark/demonstrations/requirements.txt")


@pytest.mark.parametrize("episodes", [None, 7])
def test_nothing_is_downloaded_where_data_are_to_be_collected(monkeypatch, tmp_path, episodes):
    """--collect asks for other data than the published."""
    ogbench = pytest.importorskip("ogbench")
    downloads = []
    monkeypatch.setattr(script.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(ogbench.utils, "download_datasets", downloads.extend)
    monkeypatch.setattr(script, "collect", lambda args, looked, advice: Path("collected.npz"))
    assert script.find_dataset(script.Args(env_id=CUBE, collect=episodes)) == [Path("collected.npz")]
    assert downloads == ([] if episodes else ["cube-single-play-v0"])


def test_a_collector_is_offered_only_where_there_is_one(refused, monkeypatch, capsys):
    monkeypatch.setattr(ogbench.utils, "download_datasets", lambda names: None)
    for env_id, offered in ((CUBE, True), ("antmaze-large-navigate-singletask-v0", False)):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            script.find_dataset(script.Args(env_id=env_id, dataset=None))
        assert ("--collect 100" in capsys.readouterr().err) is offered


def test_a_data_file_that_is_gone(refused, tmp_path):
    """As it may be when a resumed run wants the next of several."""
    args = script.Args(env_id=CUBE)
    refused(lambda: script.load_data(str(tmp_path / "x.npz"), cube_env(), args), "there is no", "put it back")


class Arm(gym.Env):
    """As OGBench's manipulation tasks, it takes a render mode and forgets it."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, render_mode=None):
        pass

    def reset(self, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 0.0, False, False, {}

    def render(self):
        return np.zeros((32, 32, 3), np.uint8)


def test_a_task_that_forgets_its_render_mode_is_filmed(monkeypatch, tmp_path):
    pytest.importorskip("moviepy")
    spec = gym.envs.registration.EnvSpec("tests/Arm-v0", entry_point=Arm, max_episode_steps=5)
    monkeypatch.setattr(ogbench, "make_env_and_datasets", lambda *_, env_only, **kwargs: gym.make(spec, **kwargs))
    env = script.record_videos(script.make_env(script.Args(env_id=CUBE), "rgb_array"), tmp_path, "evaluation")
    script.evaluate(lambda obs: np.zeros(1), env, episodes=1, seed=1)
    env.close()
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 1


def test_defaults_by_task(monkeypatch):
    expected = {"lift": (10_000, 10_000, False), "cube-double-play-singletask-task2-v0": (300, 300, False)}
    expected |= {"cube-triple-play-singletask-v0": (100, 100, False), "scene-play-singletask-v0": (100, 100, True)}
    expected |= {"scene-of-my-own/play-v0": (100, 100, False), "robosuite/Stack": (10_000, 10_000, False)}
    for env_id, defaults in expected.items():
        dataset = ["--dataset", "x.hdf5"] if env_id.startswith("robosuite/") else []
        monkeypatch.setattr("sys.argv", ["x", "--env-id", env_id, "--no-cuda", *dataset])
        args, _ = script.parse_args()
        assert (args.beta, args.online_beta, args.sparse) == defaults
    monkeypatch.setattr("sys.argv", ["x", "--env-id", "scene-play-singletask-v0", "--no-sparse", "--no-cuda"])
    assert not script.parse_args()[0].sparse
    for flags, betas in (("--beta 5", (5, 5)), ("--beta 0", (0, 0)), ("--online-beta 1000", (10_000, 1_000))):
        monkeypatch.setattr("sys.argv", ["x", "--no-cuda", *flags.split()])
        args, _ = script.parse_args()
        assert (args.beta, args.online_beta) == betas
