"""Data sets of collect.py: the published layouts, successful experts, the same bytes whatever happens."""

import hashlib
import json
import subprocess
import time

import collect
import numpy as np
import pytest
from helpers import SMALL, command

LIFT = ["--env-id", "lift", "--episodes", 3, "--workers", 1]


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """Three demonstrations of Lift, collected once: the path of the file."""
    pytest.importorskip("robosuite")
    pytest.importorskip("h5py")
    out = tmp_path_factory.mktemp("lift") / "lift.hdf5"
    done = subprocess.run(command("collect", *LIFT, "--out", out), text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "robosuite" not in done.stderr and len(done.stdout.splitlines()) == 1  # no notes of the simulator's
    assert [path.name for path in out.parent.iterdir()] == ["lift.hdf5"]
    return out


def test_lift_is_laid_out_as_robomimic(demos):
    import h5py

    widths = dict(object=10, robot0_eef_pos=3, robot0_eef_quat=4, robot0_gripper_qpos=2, robot0_joint_pos=7)
    with h5py.File(demos) as file:
        data = file["data"]
        assert sorted(data) == ["demo_0", "demo_1", "demo_2"]
        assert data.attrs["total"] == sum(demo.attrs["num_samples"] for demo in data.values())
        env_args = json.loads(data.attrs["env_args"])
        assert (env_args["env_name"], env_args["type"]) == ("Lift", 1)
        assert env_args["env_kwargs"] == collect.ENV_KWARGS
        for demo in data.values():
            steps = demo.attrs["num_samples"]
            assert demo.attrs["model_file"].startswith("<mujoco")
            assert demo["actions"].shape == (steps, 7) and abs(demo["actions"][:]).max() <= 1
            assert demo["states"].shape == (steps, 32)
            assert demo["dones"].dtype == np.int64
            assert demo["rewards"][:].tolist() == demo["dones"][:].tolist() == [0] * (steps - 1) + [1]
            for key, width in widths.items():
                obs, next_obs = demo[f"obs/{key}"][:], demo[f"next_obs/{key}"][:]
                assert obs.shape == next_obs.shape == (steps, width) and obs.dtype == np.float64
                assert np.array_equal(obs[1:], next_obs[:-1])


def test_lift_replays(demos):
    """The episode's seed and actions lead to the stored observations and states, the first ones included."""
    import h5py

    env = collect.make_robosuite("lift")
    with h5py.File(demos) as file:
        for i in (2, 0):  # in another order: an episode does not depend on those before it
            demo, seed = file[f"data/demo_{i}"], np.random.SeedSequence((1, i, 0)).generate_state(1)[0]
            obs = collect.reset_robosuite(env, int(seed))
            for t, action in enumerate(demo["actions"]):
                assert np.array_equal(env.sim.get_state().flatten(), demo["states"][t])
                for key, value in collect.robomimic_obs(obs).items():
                    assert np.array_equal(value, demo[f"obs/{key}"][t]), (i, t, key)
                obs, reward, *_ = env.step(action)
            assert reward == 1


def test_killed_and_resumed_by_other_workers_it_is_the_same_file(demos, tmp_path):
    out, parts = tmp_path / "lift.hdf5", tmp_path / "lift.hdf5.parts"
    process = subprocess.Popen(command("collect", *LIFT, "--out", out), stderr=subprocess.DEVNULL)
    while not list(parts.glob("*.npz")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.npz")}
    assert kept and not out.exists()

    def again(*flags):
        return subprocess.run(
            command("collect", *LIFT, "--out", out, *flags), text=True, capture_output=True, timeout=500
        )

    refused = again("--noise", 0.2)
    assert refused.returncode == 2 and "noise 0.1, not 0.2" in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in parts.glob("*.npz")}.items()
    done = again("--workers", 2)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == demos.read_bytes() and not parts.exists()
    refused = again()
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and "exists" in refused.stderr


def test_every_attempt_has_a_seed_of_its_own(monkeypatch, tmp_path):
    """It is made of the data set's seed, the episode and the attempt; each fails twice here, and is counted."""
    seeds = []

    def player_of(args):
        def play(seed):
            seeds.append(seed)
            return dict(actions=np.array([seed])) if len(seeds) % 3 == 0 else None

        return play

    monkeypatch.setattr(collect, "player_of", player_of)
    for seed in (1, 2):
        for i in (0, 1):
            assert collect.collect(collect.Args(seed=seed), tmp_path, i) == 2
            with np.load(tmp_path / f"{i}.npz") as episode:
                assert episode["actions"] == seeds[-1] and episode["failures"] == 2
    assert len(set(seeds)) == 2 * 2 * 3
    monkeypatch.setattr(collect, "player_of", lambda args: lambda seed: None)
    with pytest.raises(RuntimeError, match="episode 7: no success in 20 attempts"):
        collect.collect(collect.Args(), tmp_path, 7)


def test_noise_of_the_experts():
    """robosuite: Gaussian, times --noise, on what the script would do; OGBench's oracles are told of it."""
    pytest.importorskip("robosuite")
    quiet, noisy = (collect.robosuite_player(collect.Args(noise=noise))(7) for noise in (0.0, 0.02))
    expected = 0.02 * np.random.default_rng((7, 1)).standard_normal(7)
    inside = abs(noisy["actions"][0]) < 1
    assert inside.sum() >= 3
    np.testing.assert_allclose((noisy["actions"][0] - quiet["actions"][0])[inside], expected[inside], atol=1e-12)


def test_noise_of_ogbenchs_oracles():
    pytest.importorskip("ogbench")
    args = [collect.Args(env_id="cube-single-play-v0", noise=noise, rows=11) for noise in (0.0, 0.0, 0.5)]
    one, same, noisy = (collect.ogbench_player(arg)(7) for arg in args)
    np.testing.assert_array_equal(one["actions"], same["actions"])
    np.testing.assert_array_equal(one["observations"][0], noisy["observations"][0])
    assert abs(noisy["actions"] - one["actions"]).max() > 0.1


@pytest.mark.parametrize("env_id, width, horizon", [("can", 14, 300), ("square", 14, 400)])
def test_can_and_square_succeed(env_id, width, horizon):
    pytest.importorskip("robosuite")
    demo = collect.robosuite_player(collect.Args(env_id=env_id, noise=0.05))(1)
    assert demo["obs/object"].shape == (len(demo["actions"]), width) and len(demo["actions"]) < horizon
    assert demo["rewards"].sum() == demo["rewards"][-1] == 1


def test_ogbench_loads_what_is_collected(start, tmp_path):
    ogbench = pytest.importorskip("ogbench")
    flags = ["--env-id", "cube-single-play-singletask-task1-v0", "--episodes", 2, "--rows", 101]
    for workers in (1, 2):
        done = start(*flags, "--workers", workers, "--out", tmp_path / f"{workers}.npz", name="collect")
        assert done.returncode == 0, done.stderr
    for name in ("{}.npz", "{}-val.npz"):
        assert (tmp_path / name.format(1)).read_bytes() == (tmp_path / name.format(2)).read_bytes()
    load = dict(dataset_name=flags[1], dataset_path=str(tmp_path / "1.npz"))
    env, train, val = ogbench.make_env_and_datasets(**load)
    assert train["observations"].shape == train["next_observations"].shape == (200, *env.observation_space.shape)
    assert train["actions"].shape == (200, 5) and val["actions"].shape == (100, 5)
    assert np.flatnonzero(train["terminals"]).tolist() == [99, 199]
    assert set(train["rewards"]) <= {-1, 0} and set(train["masks"]) <= {0, 1}
    assert np.array_equal(train["observations"][1:100], train["next_observations"][:99])
    _, compact, _ = ogbench.make_env_and_datasets(**load, compact_dataset=True, add_info=True)
    assert compact["observations"].shape == (202, 28) and compact["observations"].dtype == np.float32
    assert compact["qpos"].shape == (202, 21) and compact["qvel"].shape == (202, 20)
    assert np.flatnonzero(compact["valids"] == 0).tolist() == [100, 201]
    with np.load(tmp_path / "1-val.npz") as held_out, np.load(tmp_path / "1.npz") as whole:
        starts = np.stack([*whole["observations"][[0, 101]], held_out["observations"][0]])
        assert len(np.unique(starts, axis=0)) == 3  # three episodes, each of its own
        assert len(held_out["observations"]) == 101


def test_minari_loads_what_a_policy_played(start, tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    flags = ["--env-id", "InvertedPendulum-v5", "--learning-starts", 100, "--total-timesteps", 120]
    assert start(*flags, *SMALL, name="sac_flow_g").returncode == 0
    (run,) = (tmp_path / "runs").iterdir()
    name, root = "mujoco/invertedpendulum/sac-flow-v0", tmp_path / "minari"
    flags = ["--env-id", name, "--policy", run, "--episodes", 3, "--workers", 1, "--out", root, "--noise", 0.2]
    done = start(*flags, name="collect")
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    dataset = minari.load_dataset(name)
    assert list(minari.list_local_datasets()) == [name]
    episodes = list(dataset.iterate_episodes())
    assert len(episodes) == 3 and dataset.total_steps == sum(len(episode) for episode in episodes)
    for episode in episodes:
        assert episode.observations.shape == (len(episode) + 1, 4) and episode.actions.shape == (len(episode), 1)
        assert not episode.terminations[:-1].any() and episode.terminations[-1] | episode.truncations[-1]
    env = dataset.recover_environment()
    assert env.spec.id == "InvertedPendulum-v5"
    for episode, metadata in zip(episodes, dataset.storage.get_episode_metadata(range(3)), strict=True):
        assert np.array_equal(env.reset(seed=int(metadata["seed"]))[0], episode.observations[0])
        for t, action in enumerate(episode.actions):
            obs, reward, terminated, truncated, _ = env.step(action)
            assert np.array_equal(obs, episode.observations[t + 1]) and reward == episode.rewards[t]
            assert (terminated, truncated) == (episode.terminations[t], episode.truncations[t])
    play = [collect.minari_player(collect.Args(env_id=name, policy=run, noise=noise)) for noise in (0.0, 0.2)]
    quiet, noisy = (player(int(metadata["seed"])) for player in play)
    assert np.array_equal(noisy["actions"], episodes[-1].actions)
    scale = env.action_space.high
    expected = 0.2 * scale * np.random.default_rng((int(metadata["seed"]), 1)).standard_normal(1)
    np.testing.assert_allclose(noisy["actions"][0] - quiet["actions"][0], expected, atol=1e-5)


def test_a_folder_of_an_interrupted_merge_is_replaced(monkeypatch, tmp_path):
    def write(args, files, merged):
        merged.mkdir()
        (merged / "new").touch()
        return 1

    out, parts = tmp_path / "set", tmp_path / "set.parts"
    for folder in (out, parts):
        folder.mkdir()
    (out / "old").touch()
    np.savez(parts / "0.npz", failures=0)
    monkeypatch.setattr(collect, "settings_of", lambda args: {})
    monkeypatch.setitem(collect.KINDS, "robosuite", collect.KINDS["robosuite"]._replace(write=write))
    collect.run(collect.Args(env_id="lift", episodes=1, out=out), parts)
    assert [path.name for path in out.iterdir()] == ["new"] and not parts.exists()


def test_a_policy_is_played_with_its_runs_limit_of_steps(start, tmp_path):
    """With the run's limit of steps; an episode is its seed's."""
    flags = ["--env-id", "tiny_envs:Home-v0", "--learning-starts", 60, "--total-timesteps", 80]
    assert start(*flags, *SMALL, "--max-episode-steps", 7, name="sac_flow_g").returncode == 0
    (run,) = (tmp_path / "runs").iterdir()
    play = collect.minari_player(collect.Args(env_id="some/home/x-v0", policy=run, noise=0.0))
    first = play(3)
    assert len(first["actions"]) <= 7
    play(4)
    again = play(3)
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_a_policy_file_is_played_and_its_observations_are_copied(start, tmp_path):
    """Of an environment that changes its observation in place."""
    flags = ["--env-id", "tiny_envs:InPlace-v0", "--learning-starts", 60, "--total-timesteps", 80]
    assert start(*flags, *SMALL, "--max-episode-steps", 7, name="sac_flow_g").returncode == 0
    (run,) = (tmp_path / "runs").iterdir()
    args = collect.Args(env_id="some/home/x-v0", policy=run / "policy.pt", noise=0.0)
    assert collect.settings_of(args)["policy"] == hashlib.sha256((run / "policy.pt").read_bytes()).hexdigest()
    assert len(np.unique(collect.minari_player(args)(3)["observations"])) > 2


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--env-id", "lifts"], "lifts"),
        (["--env-id", "cube-nine-play-v0"], "cube-nine-play-v0"),
        (["--episodes", 0], "--episodes"),
        (["--workers", 0], "--workers"),
        (["--noise", -1], "--noise"),
        (["--noise", "nan"], "--noise"),
        (["--seed", -1], "--seed"),
        (["--rows", 1], "--rows"),
        (["--out", "lift.npz"], "lift.npz"),
        (["--out", "a-file/lift.hdf5"], "a-file"),
        (["--env-id", "mujoco hopper", "--policy", "runs"], "mujoco hopper"),
        (["--env-id", "m/hopper-v0", "--policy", "runs"], "m/hopper-v0"),
        (["--env-id", "mujoco/hopper/sac-flow-v0", "--policy", "runs"], "runs"),
    ],
    ids=lambda value: "_".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(flags, named, monkeypatch, tmp_path, refused):
    (tmp_path / "a-file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["collect.py", *map(str, flags)])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("importlib.metadata.version", lambda package: "1")
    refused(collect.main, named)


def test_a_missing_package_is_one_line(monkeypatch, refused):
    def missing(package):
        raise collect.metadata.PackageNotFoundError(package)

    monkeypatch.setattr("importlib.metadata.version", missing)
    refused(lambda: collect.settings_of(collect.Args()), collect.INSTALL)
