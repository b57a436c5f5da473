"""sac_flow_offline2online.py on a user's own data and environment: files, dict observations, units of actions."""

import csv
import dataclasses
import json
import math
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import OFFLINE_SMALL, ROOT, assert_same, checkpoint, columns, the_run

import sac_flow_offline2online as script

REACH = "goal_envs:Reach-v0"
SHORT = [*OFFLINE_SMALL, "--eval-episodes", 2, "--eval-every", 1000, "--offline-steps", 20, "--online-steps", 30]
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
def refused(main, refused):
    """`refused(flags, *texts)`: the program stops as conftest.py's `refused` has it."""
    return lambda flags, *texts: refused(partial(main, *flags), *texts)


def play(episodes: int = 6, unit: float = 1.0) -> dict:
    """D4RL's arrays of `Reach`, its dict of observations as <name>/<key>.

    Even episodes are played by a noisy controller, odd ones by its noise alone: they seldom terminate.
    """
    generator = np.random.default_rng(0)
    env = gym.make(REACH)
    rows = {}
    for i in range(episodes):
        obs, _ = env.reset(seed=i)
        done = False
        while not done:
            goal = np.concatenate([obs["goal"]["x"], obs["goal"]["y"]])
            action = np.clip(
                (1 - i % 2) * (goal - obs["position"]) / 0.2 + 0.7 * generator.normal(size=2), -1, 1
            ).astype(np.float32)
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

    refuse({"timeouts": None}, "lacks", "timeouts", "mend it (benchmark/README.md, Your own data)")
    refuse({"observations/goal/y": None}, "lacks", "observations/goal/y")
    refuse({"rewards": np.append(arrays["rewards"], 0)}, "differ in length", "'rewards'")
    refuse({"actions": arrays["actions"][:, :1]}, "(1,)", "(2,)")
    refuse({"observations/position": arrays["observations/position"][:, :1]}, "obs has shape (3,)")
    refuse({"rewards": np.full(len(arrays["rewards"]), np.nan)}, "reward has NaN")
    refuse({"actions": 3 * arrays["actions"]}, "actions leave the bounds", "--rescale-actions")
    n = len(arrays["rewards"])
    refuse({"rewards": np.zeros((n, 2))}, "reward has shape (2,)")
    refuse({"rewards": np.full(n, 1e300)}, "reward has NaN or infinite")
    refuse({"actions": np.full((n, 2), "left")}, "of another format", "left")
    refuse({"timeouts": np.full(n, np.nan)}, "terminals or timeouts have NaN")
    nexts = {f"next_{name}": values for name, values in arrays.items() if name.startswith("observations")}
    refuse(nexts | {"next_observations/position": np.zeros((n, 3))}, "next_obs has shape (5,)")
    flags[1] = "goal_envs:Narrow-v0"
    refuse({"actions": np.full((n, 2), 1.4e-3)}, "actions leave the bounds")
    flags[1] = REACH
    refuse({"terminals": np.full(n, "no")}, "of another format", "no")
    refuse({name: values[:0] for name, values in arrays.items()}, "holds no step")
    path.write_bytes(b"nothing")
    refused(flags, str(path), "truncated, corrupted or of another format")


def test_data_are_described_and_what_looks_wrong_is_noted(capsys):
    """Episodes of 3 (terminated), 5 (it terminates in its second step and goes on) and 2 steps; chunks of 3.

    Critics learn from the chunks that begin at 0, 1, 2 (before a termination), 3, 4 (a termination), and 5 (whole).
    """
    terminated, last = torch.zeros(2, 10)
    terminated[[2, 4]] = 1
    last[[2, 7, 9]] = 1
    zeros = torch.zeros(10, 1)
    rows = torch.cat([zeros, zeros, zeros, terminated[:, None], last[:, None], zeros], dim=1)
    buffer = script.ReplayBuffer(20, 1, 1, torch.device("cpu"))
    buffer.fill(rows)
    script.describe_data(buffer, "some.npz", 3)
    said = "10 transitions of some.npz in 3 episodes of 2 to 5 steps (2 terminate)"
    assert capsys.readouterr().err == f"{said}; the critics learn from 60% of the chunks\n"
    script.describe_data(buffer, "some.npz", 6)
    assert "50% of the chunks" in capsys.readouterr().err
    buffer.rows[4, buffer.last - 1] = 0
    script.describe_data(buffer, "some.npz", 6)
    assert capsys.readouterr().err.splitlines()[1:] == [
        "note: most chunks of 6 steps run over the end of an episode: lower --chunk"
    ]
    buffer.rows[:9, buffer.last] = 0
    script.describe_data(buffer, "some.npz", 2)
    assert capsys.readouterr().err.splitlines()[1:] == [
        "note: some.npz is one episode: are its terminals and timeouts right?"
    ]


def test_help_has_each_heading_once(main, capsys):
    """Above its first flag, and not above --velocity-dim, whose name begins as that of --velocity does."""
    with pytest.raises(SystemExit):
        main("--help")
    text = capsys.readouterr().out
    for heading, first in (("What to run", "env-id"), ("Flow policy", "velocity {")):
        assert text.count(f" {heading}\n") == text.count(f" {heading}\n  --{first}") == 1


def test_success_as_environments_say_it():
    said = [{"success": True}, {"is_success": np.float32(0)}, {"success": False, "is_success": True}]
    assert [script.succeeded(info) for info in said] == [1, 0, 0]
    assert math.isnan(script.succeeded({})) and math.isnan(script.succeeded({"success": None}))


def test_own_environments_that_do_not_fit(refused, reach):
    own = ["--dataset", reach, *SHORT]
    refused(["--env-id", "goal_envs:Missing-v0", *own], "--env-id goal_envs:Missing-v0", "Missing")
    refused(["--env-id", "no_such_module:Reach-v0", *own], "no_such_module")
    refused(["--env-id", REACH, *own, "--env-kwargs", "{half: 1}"], "--env-kwargs {half: 1}", "JSON")
    refused(["--env-id", REACH, *own, "--env-kwargs", "[1]"], "--env-kwargs [1]", "dict")
    refused(["--env-id", REACH, *own, "--env-kwargs", '{"whole": 1}'], REACH, "whole")
    refused(["--env-id", "goal_envs:Unplugged-v0", *own], "--env-id goal_envs:Unplugged-v0", "robot not connected")
    refused(["--env-id", REACH, *own, "--obs-keys", "position"], "--obs-keys is for robomimic")
    refused(["--env-id", REACH, *own, "--sparse"], "--sparse is for OGBench")
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
    assert state["buffer"]["added"] == added + 30
    assert (state["buffer"]["rows"][starts, 0] <= 0).all()  # x of the position


def test_horizons_of_robosuites_tasks():
    tasks = {"lift": ("Lift", 300), "robosuite/ToolHang": ("ToolHang", 700), "robosuite/Door": ("Door", 400)}
    assert {env_id: script.robosuite_task(env_id) for env_id in tasks} == tasks


def test_a_run_of_robosuite_resumes_with_the_flags_that_started_it(monkeypatch, tmp_path, capsys):
    """Its --env-kwargs hold those of the data's file, too."""
    kept = script.Args("lift", env_kwargs='{"robots": ["Panda"], "control_freq": 20, "horizon": 9}')
    progress = dataclasses.asdict(script.Progress(step=5))
    state = {"script": "sac_flow_offline2online", "args": vars(kept), "progress": progress}
    torch.save(state, tmp_path / "checkpoint.pt")
    for flags, value in (('{"horizon": 9}', kept.env_kwargs), ('{"horizon": 8}', None)):
        monkeypatch.setattr("sys.argv", ["x", "--resume", str(tmp_path), "--env-kwargs", flags])
        if value:
            args, _ = script.parse_args()
            assert args.env_kwargs == value
        else:
            with pytest.raises(SystemExit):
                script.parse_args()
            assert "--env-kwargs" in capsys.readouterr().err


def test_an_environment_without_an_end_gets_one(monkeypatch):
    args = script.Args("goal_envs:Timeless-v0", dataset="own.npz")
    assert script.make_env(args).get_wrapper_attr("_max_episode_steps") == 10_000
    dataset = SimpleNamespace(recover_environment=lambda eval_env: gym.make(args.env_id))
    monkeypatch.setattr(script, "minari_dataset", lambda args: dataset)
    monkeypatch.setattr(script, "benchmark_of", lambda *names: "minari")
    assert script.make_env(script.Args("mine/timeless-v0")).get_wrapper_attr("_max_episode_steps") == 10_000


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


# --- units of actions ---


def trained(main, tmp_path, *flags) -> tuple[Path, dict]:
    """The folder of a short run, and its checkpoint."""
    main(*flags, *SHORT, "--run-name", "trained")
    run = tmp_path / "runs" / "trained"
    return run, torch.load(run / "checkpoint.pt", weights_only=True)


def test_actions_in_another_unit(main, tmp_path, reach):
    """Data in units of a fiftieth: the policy acts in them, the environment in its own."""
    arrays = play(unit=50.0)
    low, high = arrays["actions"].min(0), arrays["actions"].max(0)
    np.savez(reach, **arrays)
    run, state = trained(main, tmp_path, "--env-id", REACH, "--dataset", reach, "--rescale-actions")
    added = len(arrays["rewards"])
    np.testing.assert_allclose(state["buffer"]["rows"][:added, 4:6], arrays["actions"], rtol=1e-6)
    rows = columns(state["buffer"]["rows"][added:], 4, 2)
    moved = rows["next_obs"][:, :2] - rows["obs"][:, :2]
    free = np.abs(rows["next_obs"][:, :2]) < 1  # not at the wall
    expected = 0.2 * (2 * (rows["action"] - low) / (high - low) - 1)
    assert free.sum() > 10 and np.abs(rows["action"]).max() > 5
    np.testing.assert_allclose(moved[free], expected[free], atol=1e-5)
    actor = script.load_policy(run / "policy.pt")
    chunk = actor.act(torch.randn(500, 4)).reshape(-1, 2).numpy()
    assert (chunk >= low - 1e-3).all() and (chunk <= high + 1e-3).all() and np.ptp(chunk) > 50


def test_every_environment_is_given_its_own_units(main, monkeypatch, tmp_path, reach):
    """Those of training, evaluation and --evaluate: actions in another unit would be clipped to +-1."""
    import goal_envs

    seen = {}
    step = goal_envs.Reach.step

    def recorded(self, action):
        seen.setdefault(self, []).append(np.abs(action))
        return step(self, action)

    np.savez(reach, **play(unit=50.0))
    monkeypatch.setattr(goal_envs.Reach, "step", recorded)
    run, _ = trained(main, tmp_path, "--env-id", REACH, "--dataset", reach, "--rescale-actions")
    main("--evaluate", run)
    assert len(seen) == 3
    for actions in map(np.array, seen.values()):
        assert actions.max() <= 1 and (actions == 1).mean() < 0.5


@pytest.mark.filterwarnings("error:overflow:RuntimeWarning")
@pytest.mark.parametrize("kind", ["Unbounded", "Huge"])
def test_unbounded_actions_take_the_bounds_of_the_data(main, refused, tmp_path, reach, kind):
    flags = ["--env-id", f"goal_envs:{kind}-v0", "--dataset", reach]
    refused([*flags, "--no-cuda"], "finite bounds", "--rescale-actions")
    np.savez(reach, **(play(unit=0.5)))
    run, state = trained(main, tmp_path, *flags, "--rescale-actions")
    rows = columns(state["buffer"]["rows"][len(play()["rewards"]) :], 4, 2)
    moved = rows["next_obs"][:, :2] - rows["obs"][:, :2]
    free = np.abs(rows["next_obs"][:, :2]) < 1
    np.testing.assert_allclose(moved[free], 0.2 * rows["action"][free], atol=1e-6)  # as they are
    assert np.abs(rows["action"]).max() <= 0.5 + 1e-6


def test_a_constant_action_stays_what_it_is(capsys):
    args = script.Args(REACH, dataset="own.npz", rescale_actions=True, chunk=1, cuda=False)
    env = script.make_env(args)
    data = torch.zeros(10, 13)
    data[:, 4] = torch.linspace(-2, 2, 10)
    data[:, 5] = 7.0
    actor, *_ = script.make_networks(args, env, torch.device("cpu"), script.data_statistics(data, env))
    torch.testing.assert_close(actor.unsquash(torch.tensor([[0.0, 7.0]])), torch.zeros(1, 2))
    torch.testing.assert_close(actor.unsquash(torch.tensor([[1.0, 7.5]])), torch.full((1, 2), math.atanh(0.5)))
    said = capsys.readouterr().err
    assert "actions are from [-2.  7.] to [2. 7.]" in said and "action 1 is always the same" in said


def test_a_constant_action_within_the_environments_bounds_keeps_its_value():
    """As of a gripper that stays closed: with bounds of its own it was played as the middle of the environment's."""
    args = script.Args(REACH, dataset="own.npz", rescale_actions=True, chunk=1, cuda=False)
    env = script.make_env(args)
    data = torch.zeros(10, 13)
    data[:, 4] = torch.linspace(-2, 2, 10)
    data[:, 5] = 0.75
    actor, *_ = script.make_networks(args, env, torch.device("cpu"), script.data_statistics(data, env))
    seen = []
    env.unwrapped.step = lambda action: seen.append(action) or (start, 0.0, True, False, {})
    start, _ = env.unwrapped.reset(seed=0)
    env.reset(seed=0)
    script.rescaled(env, actor).step(np.float32([1, 0.75]))
    np.testing.assert_allclose(seen, [[0.5, 0.75]])


@pytest.mark.parametrize("units", [1, 3])
def test_an_action_that_is_constant_but_for_rounding(capsys, units):
    """As of a parked joint: a float32 apart, its bounds would round to the same number."""
    script.note.cache_clear()
    args = script.Args(REACH, dataset="own.npz", rescale_actions=True, chunk=1, cuda=False)
    env = script.make_env(args)
    data = torch.zeros(10, 13)
    data[:, 4] = torch.linspace(-2, 2, 10)
    data[:, 5] = 1.5707963
    data[3, 5] += units * np.spacing(np.float32(1.5707963))
    actor, *_ = script.make_networks(args, env, torch.device("cpu"), script.data_statistics(data, env))
    assert "action 1 is always the same in the data" in capsys.readouterr().err
    np.testing.assert_allclose(script.rescaled(env, actor).action_space.high, [2, 2.5707963], rtol=1e-6)


def test_the_unit_of_actions_changes_no_loss():
    """Bounds and actions fifty times as large: critics see the same, and beta weighs the same."""

    def losses(unit):
        torch.manual_seed(0)
        actor = script.Actor(3, [-unit] * 2, [unit] * 2, chunk=2, sigma_dim=8).double()
        critics = torch.nn.ModuleList(script.Critic(3, 4, 8, 1).double() for _ in range(2))
        obs = torch.randn(6, 3).double()
        action = unit * (2 * torch.rand(6, 4).double() - 1)
        own = torch.ones(6, 4).double()
        executed = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).double().repeat(3, 1)
        reward, terminated = torch.rand(2, 6).double()
        batch = [obs, action, own, executed, reward, terminated, obs + 1]
        noise = torch.randn(5, 6, 4).double()
        q_loss, q = script.critic_loss(actor, critics, critics, batch, noise, 0.1, 0.9)
        actor_loss, bc, *_ = script.actor_loss(actor, critics, batch, noise, 0.1, 10.0)
        return torch.stack([q_loss, q, actor_loss, bc, torch.tensor(actor.target_entropy)])

    torch.testing.assert_close(losses(50.0), losses(1.0))


def test_bounds_are_those_of_all_files_of_a_folder(main, tmp_path):
    (tmp_path / "set").mkdir()
    arrays = play(unit=50.0)
    np.savez(tmp_path / "set" / "a.npz", **arrays)
    position = arrays["observations/position"]
    moved = {"actions": 2 * arrays["actions"], "observations/position": position + 1}
    np.savez(tmp_path / "set" / "b.npz", **(arrays | moved))
    flags = ["--env-id", REACH, "--dataset", tmp_path / "set", "--rescale-actions", "--normalize-observations"]
    run, state = trained(main, tmp_path, *flags)
    mean = state["actor"]["normalizer.mean"]  # of the first file alone, as --help says
    np.testing.assert_allclose(mean[:2], position.mean(0), atol=1e-5)
    bounds = state["actor"]["bias"] - state["actor"]["scale"], state["actor"]["bias"] + state["actor"]["scale"]
    np.testing.assert_allclose(bounds[0][:2], 2 * arrays["actions"].min(0), rtol=1e-6)
    np.testing.assert_allclose(bounds[1][:2], 2 * arrays["actions"].max(0), rtol=1e-6)


def test_a_run_does_without_its_folder_of_data(main, tmp_path, capsys):
    """Evaluated and resumed after the folder has moved."""
    (tmp_path / "set").mkdir()
    np.savez(tmp_path / "set" / "a.npz", **play())
    run, _ = trained(main, tmp_path, "--env-id", REACH, "--dataset", tmp_path / "set")
    (tmp_path / "set").rename(tmp_path / "moved")
    main("--evaluate", run, "--seed", 7)
    assert "stochastic: success" in capsys.readouterr().out
    main("--resume", run, "--online-steps", 35)
    assert torch.load(run / "checkpoint.pt", weights_only=True)["progress"]["step"] == 55


@pytest.mark.parametrize("env_id", [REACH, "goal_envs:Unbounded-v0"])
def test_resumed_and_evaluated_in_these_units(main, tmp_path, reach, capsys, env_id):
    """All that depends on the data comes back without it; the flags of one run are those of all parts here."""
    flags = ["--env-id", env_id, "--dataset", reach, "--rescale-actions", "--normalize-observations"]
    flags += ["--online-fraction", 0.5, *SHORT]
    np.savez(reach, **play(unit=50.0))
    main(*flags, "--run-name", "whole")
    whole = checkpoint(tmp_path / "runs" / "whole")
    stop = next(int(row[0]) for row in whole["rows"]["returns.csv"][1:] if row[0] > 30)
    assert stop < 50
    main(*flags, "--run-name", "part", "--online-steps", stop - 20)
    reach.unlink()
    part = tmp_path / "runs" / "part"
    main("--resume", part, "--online-steps", 30)
    resumed = checkpoint(part)
    resumed["rows"]["eval.csv"] = [row for row in resumed["rows"]["eval.csv"] if row[0] != stop]
    assert_same(resumed, whole | {"args": resumed["args"]})
    capsys.readouterr()
    main("--evaluate", part)
    last = whole["rows"]["eval.csv"][-1]
    assert f"stochastic: success {float(last[3]):.2f}" in capsys.readouterr().out


# --- the buffer ---


def test_the_buffer_takes_what_the_run_needs(tmp_path):
    args = script.Args(REACH, dataset="own.npz", online_steps=30, chunk=3, cuda=False, critic_layers=2, critic_dim=9)
    env = script.make_env(args)
    about_data = script.data_statistics(torch.zeros(100, 13), env)
    _, _, critics, _, buffer = script.make_networks(args, env, torch.device("cpu"), about_data)
    assert [critic.net[0].out_features for critic in critics] == [9, 9] and len(critics[0].net) == 2 * 3 + 1
    assert len(buffer.rows) == 100 + 30 + 3
    args.buffer_size = 110
    args.online_fraction = "uniform"
    *_, buffer = script.make_networks(args, env, torch.device("cpu"), about_data)
    assert len(buffer.rows) == 110


def test_half_of_each_batch_is_online_experience():
    """Observation is the row's number; data are the first 20."""
    buffer = script.ReplayBuffer(100, 1, 1, torch.device("cpu"))
    buffer.fill(torch.zeros(20, 6))
    buffer.rows[:20, 0] = torch.arange(20)
    for i in range(20, 25):
        buffer.add([i], [0], 0, 0, [0], follows=i > 20)
    seen = buffer.sample(4000, 1, 1.0, 0.25)[0].flatten()
    assert (seen >= 20).sum() == 1000 and seen[seen >= 20].unique().tolist() == [20, 21, 22, 23, 24]
    assert seen[seen < 20].unique().tolist() == list(range(20))
    uniform = buffer.sample(4000, 1, 1.0)[0].flatten()
    assert (uniform >= 20).float().mean().item() == pytest.approx(0.2, abs=0.03)
    other = script.ReplayBuffer(100, 1, 1, torch.device("cpu"))
    other.load_state_dict(buffer.state_dict())
    assert (other.sample(4000, 1, 1.0, 0.25)[0] >= 20).sum() == 1000


def test_only_online_batches_are_mixed(main, monkeypatch, refused, reach):
    fractions = []
    sample = script.ReplayBuffer.sample

    def recorded(self, batch_size, chunk, gamma, online_fraction="uniform"):
        fractions.append(online_fraction)
        return sample(self, batch_size, chunk, gamma, online_fraction)

    monkeypatch.setattr(script.ReplayBuffer, "sample", recorded)
    own = ["--env-id", REACH, "--dataset", reach, *SHORT]
    main(*own, "--online-fraction", 0.25)
    main(*own, "--online-fraction", "uniform")
    main(*own)  # the default: half
    # Each run: 20 updates offline, and of 30 steps online the first 10 without an update.
    assert fractions == ["uniform"] * 20 + [0.25] * 20 + ["uniform"] * 60 + [0.5] * 20
    rows = 48 + 30  # the data's and those of the online phase
    main(*own, "--online-fraction", 0.5, "--buffer-size", rows)
    remedy = f"raise --buffer-size to {rows}, or --online-fraction uniform"
    refused([*own, "--online-fraction", 0.5, "--buffer-size", rows - 1], remedy)
    resumed = ["--resume", "runs/full", "--online-steps", 31]
    main(*own, "--buffer-size", rows, "--run-name", "full")
    refused(resumed, "this run has room for --online-steps 30")
    refused([*own, "--online-fraction", 1.5], "--online-fraction must be in [0, 1] or uniform, not 1.5")


# --- observations standardised ---


def test_observations_are_standardised_by_the_data(main, tmp_path, reach):
    """In actor, critics and targets, and in the policy that is loaded elsewhere; the constant one is only shifted."""
    arrays = play()
    for kind in ("observations", "next_observations"):
        arrays[f"{kind}/position"] = arrays[f"{kind}/position"] * [0.001, 0] + [5, 3]
    np.savez(reach, **arrays)
    run, state = trained(main, tmp_path, "--env-id", REACH, "--dataset", reach, "--normalize-observations")
    obs = state["buffer"]["rows"][: len(arrays["rewards"]), :4]
    actor = script.load_policy(run / "policy.pt")
    seen = actor.normalizer(obs)
    torch.testing.assert_close(seen.mean(0), torch.zeros(4), atol=1e-2, rtol=0)
    torch.testing.assert_close(seen.std(0), torch.tensor([1.0, 0, 1, 1]), atol=1e-2, rtol=0)
    for network, parts in (("actor", [""]), ("critics", ["0.", "1."]), ("targets", ["0.", "1."])):
        for part in parts:
            for name in ("mean", "deviation"):
                assert torch.equal(state[network][f"{part}normalizer.{name}"], getattr(actor.normalizer, name))


def test_networks_see_standardised_observations():
    """With mean 3 and deviation 2 they compute of 2 obs + 3 what they computed of obs, whatever is asked of them."""
    actor = script.Actor(2, [-1.0], [1.0], chunk=2, sigma_dim=8, learn_sigma=True)
    torch.nn.init.normal_(actor.sigma_net[-1].weight)
    critic = script.Critic(2, 2, 8, 1)
    obs = torch.randn(5, 2)
    noise = actor.draw_noise(5)
    a = torch.randn(5, 2)

    def outputs(obs):
        return [*actor.rollout(obs, noise)[:2], actor.sigma(obs), actor.velocity(0.5, a, obs), critic(obs, a)]

    before = outputs(obs)
    for network in (actor, critic):
        network.normalizer.mean.fill_(3)
        network.normalizer.deviation.fill_(2)
    torch.testing.assert_close(outputs(2 * obs + 3), before)


def test_without_the_flag_observations_are_as_they_were(main, tmp_path, reach):
    run, state = trained(main, tmp_path, "--env-id", REACH, "--dataset", reach)
    assert state["actor"]["normalizer.mean"].tolist() == [0] * 4
    assert state["critics"]["1.normalizer.deviation"].tolist() == [1] * 4


def test_the_readmes_recipe(main, tmp_path):
    """The lines that save a user's arrays and those that load a policy, run as they stand but for the run's name."""
    readme = (ROOT / "benchmark" / "README.md").read_text()
    save, load = [
        re.search(rf"```python\n({start}.*?)```", readme, re.S)[1] for start in ("# save_data", "import torch")
    ]
    generator = np.random.default_rng(0)
    env = gym.make("Pendulum-v1", max_episode_steps=20)
    steps = []
    for _ in range(3):
        obs, _ = env.reset(seed=0)
        done = False
        while not done:
            action = generator.uniform(-2, 2, 1)
            next_obs, reward, terminated, done, _ = env.step(action)
            steps.append((obs, action, reward, terminated, done))
            obs = next_obs
    names = "observations actions rewards terminals timeouts".split()
    arrays = {name: np.array(values) for name, values in zip(names, zip(*steps, strict=True), strict=True)}
    exec(save, arrays)
    flags = ["--env-id", "Pendulum-v1", "--dataset", "my_data.npz", "--normalize-observations"]
    main(*flags, *SHORT, "--chunk", 5, "--online-steps", 0)
    names = dict(observation=obs)
    exec(load.replace("runs/<name>", str(the_run(tmp_path))), names)
    assert names["chunk"].shape == (5, 1) and np.abs(names["chunk"]).max() <= 2


# --- robomimic ---

ARM = dict(type="JOINT_POSITION", input_max=1, input_min=-1, output_max=0.05, output_min=-0.05, kp=50)
ARM |= dict(damping_ratio=1, impedance_mode="fixed", input_type="delta", interpolation=None, gripper=dict(type="GRIP"))
KEYS = ("robot0_joint_pos", "object")


def robomimic_file(path: Path, env_name="Lift", changes=None, **env_kwargs) -> Path:
    """Two demonstrations of 6 steps, with joint positions' changes as actions and, in `KEYS`, 17 observations."""
    h5py = pytest.importorskip("h5py")
    robosuite = pytest.importorskip("robosuite")
    kwargs = dict(robots=["Panda"], control_freq=10, camera_names=["agentview"], use_camera_obs=True)
    kwargs |= dict(controller_configs=dict(type="BASIC", body_parts=dict(right=ARM))) | env_kwargs
    env_args = dict(env_name=env_name, env_version=robosuite.__version__, type=1, env_kwargs=kwargs)
    generator = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for i in range(2):
            demo = file.create_group(f"data/demo_{i}")
            demo["actions"] = generator.uniform(-1, 1, (6, 8))
            demo["rewards"] = np.arange(6) == 5
            for kind in ("obs", "next_obs"):
                demo[f"{kind}/robot0_joint_pos"] = generator.normal(size=(6, 7))
                demo[f"{kind}/object"] = generator.normal(size=(6, 10))
        file["data"].attrs["env_args"] = json.dumps(env_args | (changes or {}))
    return path


def test_the_environment_is_the_files_own(tmp_path):
    """Controller, frequency and task are those of the file, the observation that of the keys."""
    path = robomimic_file(tmp_path / "lift.hdf5", env_name="Stack")
    args = script.Args("robosuite/Stack", dataset=str(path), obs_keys=KEYS, env_kwargs='{"max_episode_steps": 3}')
    env = script.make_env(args)
    inner = env.unwrapped.env
    assert type(inner).__name__ == "Stack" and inner.control_freq == 10 and env.action_space.shape == (8,)
    assert not inner.use_camera_obs and "max_episode_steps" in args.env_kwargs
    obs, _ = env.reset(seed=0)
    raw = inner._get_observations()
    np.testing.assert_array_equal(obs, np.concatenate([raw["robot0_joint_pos"], raw["object-state"]]))
    assert [env.step(np.zeros(8))[3] for _ in range(3)] == [False, False, True]
    path.unlink()
    kept = script.make_env(script.Args("robosuite/Stack", evaluate="runs/x", obs_keys=KEYS, env_kwargs=args.env_kwargs))
    np.testing.assert_array_equal(kept.reset(seed=0)[0], obs)
    assert kept.unwrapped.env.control_freq == 10


def test_rows_hold_the_keys_of_the_observation(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = robomimic_file(tmp_path / "lift.hdf5")

    class Spaces(Line):
        observation_space = gym.spaces.Box(-np.inf, np.inf, (17,))
        action_space = gym.spaces.Box(-1, 1, (8,))

    rows = columns(script.load_data(str(path), Spaces(), script.Args("lift", obs_keys=KEYS)), 17, 8)
    with h5py.File(path) as file:
        demo = file["data/demo_1"]
        expected = np.concatenate([demo["next_obs/robot0_joint_pos"], demo["next_obs/object"]], axis=1)
    np.testing.assert_array_equal(rows["next_obs"][6:], np.float32(expected))


def test_robomimic_files_that_do_not_fit(refused, tmp_path):
    path = tmp_path / "lift.hdf5"
    flags = ["--dataset", path, *SHORT, "--obs-keys"]

    def refuse(*texts, **changes):
        robomimic_file(path, **changes)
        refused([*flags, *KEYS], str(path), *texts)

    refuse("robosuite 1.4.1", "but 1.5", changes=dict(env_version="1.4.1"))
    refuse("controller", "OSC_POSE", controller_configs=dict(type="OSC_POSE", input_max=1))
    refuse("of Stack, not of --env-id lift", env_name="Stack")
    refuse("shaped rewards", reward_shaping=True)
    for name in ("PickPlace", "NutAssembly", "Wipe"):
        refused(["--env-id", f"robosuite/{name}", *flags, *KEYS], f"--env-id robosuite/{name}", "parts of the task")
    for odd in (dict(env_kwargs="x"), dict(env_kwargs=dict(controller_configs=["a"]))):
        refuse("truncated, corrupted or of another format", changes=odd)
    refuse("robosuite 1.4,", "but 1.5", changes=dict(env_version=1.4))
    robomimic_file(path, changes=dict(env_version=None, env_kwargs=None))
    assert script.robomimic_kwargs(path, "lift") == {}
    robomimic_file(path)
    shaped = ["--env-kwargs", '{"reward_shaping": true}']
    refused([*flags, *KEYS, *shaped], "--env-kwargs", "no shaped reward says success")
    refused([*flags, "object", "camera"], "--obs-keys", "camera", "robot0_joint_pos")
    path.write_bytes(path.read_bytes()[:500])
    refused([*flags, *KEYS], str(path), "truncated, corrupted or of another format")


# --- policy.pt ---


def test_a_loaded_policy_gives_chunks(main, tmp_path, reach):
    """Those of the averaged actor, for a batch and for one observation."""
    run, state = trained(main, tmp_path, "--env-id", REACH, "--dataset", reach, "--normalize-observations")
    actor = script.load_policy(run / "policy.pt")
    obs = torch.randn(7, 4)
    trained_actor = script.make_actor(script.Args(**state["args"]), 4, [-1, -1], [1, 1])
    trained_actor.load_state_dict(state["average"])
    chunks = actor.act(obs, deterministic=True)
    assert chunks.shape == (7, 3 * 2) and (chunks.abs() <= 1).all()
    assert torch.equal(chunks, trained_actor.act(obs, deterministic=True))
    torch.testing.assert_close(actor.act(obs[0], deterministic=True), chunks[0])


# --- LeRobot ---


def write_lerobot(folder: Path, version: str = "v3.0", drop=(), success: bool = False) -> dict:
    """`play` as a LeRobot data set of two files, its frames out of order; returns its columns, in order.

    With `success`, next.done marks the end of every episode and next.success what terminated.
    """
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    arrays = play()
    obs = np.concatenate([arrays[f"observations/{key}"] for key in ("position", "goal/x", "goal/y")], axis=1)
    ends = arrays["terminals"] | arrays["timeouts"]
    frames = {
        "observation.state": obs[:, :2].astype(np.float32), "observation.environment_state": obs[:, 2:],
        "action": arrays["actions"], "next.reward": arrays["rewards"].astype(np.float32),
        "next.done": arrays["terminals"], "episode_index": np.append(0, np.cumsum(ends)[:-1]),
        "index": np.arange(len(obs)),
    }  # fmt: skip
    if success:
        frames |= {"next.done": ends, "next.success": arrays["terminals"]}
    (folder / "meta").mkdir(parents=True)
    (folder / "data" / "chunk-000").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(dict(codebase_version=version, fps=10)))
    half = len(obs) // 2
    for number, part in enumerate((slice(half, None), slice(0, half))):
        columns = {name: list(values[part]) for name, values in frames.items() if name not in drop}
        parquet.write_table(pyarrow.table(columns), folder / "data" / "chunk-000" / f"file-{number:03d}.parquet")
    return frames


LEROBOT_KEYS = ["--obs-keys", "observation.state", "observation.environment_state"]


@pytest.mark.parametrize("success", [False, True])
def test_lerobot_in_an_own_environment(main, tmp_path, success):
    frames = write_lerobot(tmp_path / "set", success=success)
    terminals = frames["next.success" if success else "next.done"]
    main("--env-id", REACH, "--dataset", tmp_path / "set", *LEROBOT_KEYS, *SHORT)
    state = torch.load(the_run(tmp_path) / "checkpoint.pt", weights_only=True)
    goes_on = np.append(frames["episode_index"][1:] == frames["episode_index"][:-1], False) | terminals
    n = goes_on.sum()
    assert state["buffer"]["added"] == n + 30 and 0 < n < len(goes_on)  # without what leads to an unknown observation
    rows = columns(state["buffer"]["rows"][:n], 4, 2)
    obs = np.hstack([frames["observation.state"], frames["observation.environment_state"]])
    np.testing.assert_array_equal(rows["obs"], np.float32(obs[goes_on]))
    np.testing.assert_array_equal(rows["action"], frames["action"][goes_on])
    np.testing.assert_array_equal(rows["reward"], frames["next.reward"][goes_on])
    np.testing.assert_array_equal(rows["terminated"], terminals[goes_on])
    inside = (rows["last"] == 0).nonzero()[0]
    np.testing.assert_array_equal(rows["next_obs"][inside], rows["obs"][inside + 1])
    assert rows["last"].sum() == 6


def test_lerobot_sets_that_do_not_fit(refused, tmp_path, monkeypatch):
    flags = ["--env-id", REACH, "--no-cuda", "--dataset"]
    write_lerobot(tmp_path / "old", version="v2.1")
    refused([*flags, tmp_path / "old"], str(tmp_path / "old"), "v2.1, not v3")
    write_lerobot(tmp_path / "imitation", drop=["next.reward"])
    refused([*flags, tmp_path / "imitation", *LEROBOT_KEYS], "lacks", "next.reward")
    refused([*flags, tmp_path / "imitation", "--obs-keys", "observation.stat"], "lacks", "observation.stat")
    refused([*flags, tmp_path / "imitation", "--resume", "x"], "there is no x")
    refused([*flags, "x" * 300], "--dataset", "no such file")
    shutil.rmtree(tmp_path / "imitation" / "data")
    refused([*flags, tmp_path / "imitation"], "there is no", "imitation/data", "put it back")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused([*flags, tmp_path / "old"], "needs pyarrow", "-r benchmark/demonstrations/requirements.txt")


# --- collected data ---


def test_the_expert_closes_the_gripper_without_noise():
    """Its commands are exactly open or closed, the arm's are noisy."""
    pytest.importorskip("robosuite")
    import collect

    actions = collect.robosuite_player(collect.Args(env_id="lift", noise=0.3))(1)["actions"]
    assert set(actions[:, 6]) == {collect.OPEN, collect.CLOSE}
    assert np.abs(np.diff(actions[-8:, 3:6], axis=0)).min() > 0
