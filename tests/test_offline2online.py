"""sac_flow_offline2online.py: chunks, losses, loaders in the true formats, both phases, resume, bad input."""

import csv
import importlib
import json
import math
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.autograd.functional import jacobian

import sac_flow_offline2online as script

NAME = "sac_flow_offline2online"
PENDULUM = ["--env-id", "tests/pendulum-v0"]
SMALL = "--critic-dim 16 --velocity-dim 16 --gate-dim 8 --decoder-dim 8 --batch-size 16 --no-compile --no-cuda".split()
SHORT = [*SMALL, "--eval-episodes", 2, "--eval-every", 40, "--online-start", 10]
VELOCITIES = {
    "gated": lambda obs_dim, dim: script.GatedVelocity(obs_dim, dim, 16, 2, 8),
    "decoded": lambda obs_dim, dim: script.DecodedVelocity(obs_dim, dim, 16),
    "plain": lambda obs_dim, dim: script.PlainVelocity(obs_dim, dim, 16, 2),
}


def make_actor(velocity="gated", k=4, **keywords):
    """An actor of 3 observations and chunks of two actions of 2, every weight random; float64."""
    sizes = dict(chunk=2, velocity=VELOCITIES[velocity], flow_steps=k, sigma_dim=16, **keywords)
    actor = script.Actor(3, [-0.4, 0.0], [0.4, 5.0], **sizes)
    for parameter in actor.parameters():
        nn.init.normal_(parameter, std=0.3)
    if actor.sigma_net:
        nn.init.normal_(actor.sigma_net[-1].weight, std=0.03)
    return actor.double()


# --- chunks ---


def reference_chunk(rows, h, gamma):
    """One transition of a chunk from h rows (obs, action, reward, terminated, last, next_obs), step by step."""
    total, ended, terminated, own = 0.0, False, False, []
    for i, (_, _, reward, is_terminal, is_last, _) in enumerate(rows):
        own.append(not ended)
        if not ended and not terminated:
            total += gamma**i * reward
        if not ended and is_terminal:
            terminated = True
        if is_last and i < h - 1:
            ended = True
    return total, terminated, terminated or not ended, own


def test_merge_chunks_is_the_step_by_step_sum():
    generator, h, seen = np.random.default_rng(0), 4, set()
    for _ in range(300):
        rows = []
        for _ in range(h):
            terminated = generator.random() < 0.2
            last = generator.random() < 0.25 or terminated and generator.random() < 0.7
            rows.append((*generator.normal(size=3), terminated, last, generator.normal()))
        columns = [torch.tensor([[[row[i]] for row in rows]], dtype=torch.float64) for i in (0, 1, 2, 3, 4, 5)]
        obs, action, own, reward, terminated, valid, next_obs = script.merge_chunks(*columns, 0.9)
        total, is_terminal, is_valid, is_own = reference_chunk([row for row in rows], h, 0.9)
        assert reward.item() == pytest.approx(total) and terminated.item() == is_terminal and valid.item() == is_valid
        assert own[0].tolist() == is_own and obs[0, 0] == rows[0][0] and next_obs[0, 0] == rows[-1][5]
        assert action[0].tolist() == [row[1] for row in rows]
        seen.add((is_terminal, is_valid, all(is_own)))
    assert len(seen) == 4  # whole, cut short, terminated and cut short, terminated within its episode


def test_chunks_stay_within_their_episode_in_a_ring():
    """Observation (episode, t): a valid chunk has successive t of one episode, over the seam and the newest row too."""
    buffer, h = script.ReplayBuffer(30, 2, 1, torch.device("cpu")), 3
    added = 0
    for episode in range(12):
        length = 4 + episode % 3
        for t in range(length):
            terminated = t == length - 1 and episode % 2
            buffer.add([episode, t], [t], 1.0, terminated, [episode, t + 1], follows=t > 0)
            added += 1
            if added < 5:
                continue
            obs, action, own, reward, ended, valid, next_obs = buffer.sample(200, h, 1.0)
            whole = valid.bool() & ~ended.bool()
            assert torch.equal(action[whole], obs[whole, 1:] + torch.arange(h))
            assert torch.equal(next_obs[whole], obs[whole] + torch.tensor([0, h])) and (reward[whole] == h).all()
            assert (obs[ended.bool(), 0] % 2 == 1).all()
            rest = torch.where(obs[:, 0] == episode, t, 3 + obs[:, 0] % 3) + 1 - obs[:, 1]  # rows left to its end
            assert torch.equal(own.sum(1), rest.clamp(max=h)) and torch.equal(whole, (rest >= h) & ~ended.bool())


# --- the policy: as in test_flow.py, over chunks ---


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("velocity", VELOCITIES)
def test_log_prob_is_the_density_of_the_map_from_noise_to_path(velocity, learn_sigma):
    for k in (1, 3):
        actor = make_actor(velocity, k, sigma=0.3, learn_sigma=learn_sigma)
        obs, noise = torch.randn(1, 3).double(), 0.3 * torch.randn(k + 1, 1, 4).double()

        def path_and_action(flat, actor=actor, obs=obs, k=k):
            action, _, path = actor.rollout(obs, flat.view(k + 1, 1, 4))
            return torch.cat([path[:-1].flatten(), action.flatten()])

        log_det = torch.linalg.slogdet(jacobian(path_and_action, noise.flatten())).logabsdet
        expected = torch.distributions.Normal(0, 1).log_prob(noise).sum() - log_det
        torch.testing.assert_close(actor.rollout(obs, noise)[1][0], expected, rtol=1e-10, atol=1e-10)


def test_target_entropy_is_what_sigma_gives_before_the_squash():
    actor = make_actor(sigma=0.1)
    per_dimension = 1.4189 + 4 * (1.4189 + math.log(0.1) + 0.5 * math.log(1 / 4))  # section 4, item 8 of the paper
    assert per_dimension == pytest.approx(-4.89, abs=0.01)
    assert actor.target_entropy == pytest.approx(4 * per_dimension, abs=1e-2)
    noise = torch.randn(5, 40_000, 4).double()
    _, log_prob, path = actor.rollout(torch.zeros(40_000, 3).double(), noise)
    squash = (actor.scale.log() + torch.log1p(-(torch.tanh(path[-1]) ** 2))).sum(1)
    assert (-log_prob - squash).mean().item() == pytest.approx(actor.target_entropy, abs=0.1)
    start = script.Actor(3, [-1.0], [1.0], sigma=0.1, learn_sigma=True)
    torch.testing.assert_close(start.log_std(torch.randn(6, 3)).exp(), torch.full((6, 5), 0.1))


def test_unsquash_is_where_the_rollout_ends():
    actor = make_actor(sigma=0.3)
    action, _, path = actor.rollout(torch.randn(50, 3).double(), torch.randn(5, 50, 4).double())
    inside = path[-1].abs() < 2.9  # tanh(2.99) is 0.995
    assert inside.sum() > 50
    torch.testing.assert_close(actor.unsquash(action)[inside], path[-1][inside])
    bounds = torch.stack([actor.bias - actor.scale, actor.bias + actor.scale])
    back = torch.tanh(actor.unsquash(bounds)) * actor.scale + actor.bias
    assert actor.unsquash(bounds).isfinite().all() and ((back - bounds).abs() <= 0.00501 * actor.scale).all()


def clone(actions, velocity="plain", updates=1000):
    """An actor fitted by flow matching to actions (N, D) given observations (N, 1), and a sampler of it."""
    obs, data = actions
    actor = script.Actor(
        1, [-1.0] * data.shape[1], [1.0] * data.shape[1], chunk=1, flow_steps=16, sigma=0.01,
        velocity=lambda o, d: {"plain": script.PlainVelocity, "gated": script.GatedVelocity}[velocity](o, d, 64, 2),
    )  # fmt: skip
    optimizer = torch.optim.Adam(actor.parameters(), lr=3e-3)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - update / updates)
        index = torch.randint(len(data), (256,))
        batch = [obs[index], data[index], torch.ones_like(data[index])]
        noise = torch.randn_like(data[index])
        script.descend(optimizer, script.flow_matching_loss(actor, batch, noise, torch.rand(256, 1)))
    return actor


def test_flow_matching_recovers_two_modes():
    """a = +-0.6 (s = 1, odds 3 : 1) or +-0.9 (s = -1, even odds), deviation 0.05: Wasserstein distance below 0.1."""
    n = 4000
    s = torch.randint(2, (n, 1)) * 2.0 - 1
    sign = torch.where(torch.rand(n, 1) < torch.where(s > 0, 0.75, 0.5), 1.0, -1.0)
    data = (sign * torch.where(s > 0, 0.6, 0.9) + 0.05 * torch.randn(n, 1)).clamp(-1, 1)
    actor = clone((s, data))
    for value in (1.0, -1.0):
        with torch.no_grad():
            sampled = actor.act(torch.full((2000, 1), value)).flatten().sort().values
        expected = data[s == value].sort().values
        quantiles = torch.linspace(0.02, 0.98, 49)
        distance = (sampled.quantile(quantiles) - expected.quantile(quantiles)).abs().mean()  # Wasserstein-1
        assert distance < 0.1, (value, distance)
        blind = (0.5 * torch.randn(2000)).quantile(quantiles)  # the test can fail: a Gaussian is far
        assert (blind - expected.quantile(quantiles)).abs().mean() > 0.2


@pytest.mark.parametrize("velocity", ["plain", "gated"])
def test_cloning_reproduces_actions_near_the_bounds(velocity):
    """The paper's code aims at a and samples tanh(a): 0.98 would become 0.75."""
    wanted = torch.tensor([[0.98, -1.0, 0.3, -0.7]])
    actor = clone((torch.zeros(256, 1), wanted.expand(256, 4)), velocity)
    with torch.no_grad():
        error = (actor.act(torch.zeros(500, 1)) - wanted).abs().mean(0)
    assert (error < 0.05).all(), error


# --- losses ---


class Fixed(nn.Module):
    """Stands for an actor: action and log_prob are functions of the observation."""

    def rollout(self, obs, noise, probe=None):
        return obs[:, :1], 10 * obs[:, 0], None


class Table(nn.Module):
    """Stands for a critic: Q(s, a) = scale * (s + a)."""

    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, obs, action):
        return self.scale * (obs[:, 0] + action[:, 0])


def test_critic_loss_uses_the_mean_of_the_targets_on_valid_chunks_alone():
    critics, targets = nn.ModuleList([Table(1.0), Table(2.0)]), nn.ModuleList([Table(3.0), Table(5.0)])
    obs, action, ones = torch.ones(3, 1), torch.zeros(3, 1), torch.ones(3, 1)
    reward, terminated, valid = torch.full((3,), 5.0), torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0])
    batch = [obs, action, ones, reward, terminated, valid, 2 * obs]
    loss, q = script.critic_loss(Fixed(), critics, targets, batch, None, 0.1, 0.9**5)
    y = torch.tensor([5 + 0.9**5 * (4.0 * 4 - 0.1 * 20), 5.0])  # Q' = 4 (2 + 2), the mean of 3 and 5
    expected = sum(((scale - y) ** 2).sum() / 3 / 2 for scale in (1.0, 2.0))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert q == 1.5 and targets[0].scale.grad is None
    torch.testing.assert_close(critics[0].scale.grad, (1.0 - y).sum() / 3)


def test_actor_loss_weighs_bc_where_the_data_is_its_own():
    critics, obs = nn.ModuleList([Table(1.0), Table(3.0)]), torch.tensor([[1.0], [2.0]])
    batch = [obs, torch.tensor([[0.0], [5.0]]), torch.tensor([[1.0], [0.0]])]
    loss, bc, log_prob = script.actor_loss(Fixed(), critics, batch, None, 0.1, torch.tensor(7.0))
    q = 2 * (obs + obs).mean()  # the mean of both critics
    torch.testing.assert_close(bc, torch.tensor(0.5))  # (1 - 0)^2 over a batch of two; the other is beyond its episode
    torch.testing.assert_close(loss, 0.1 * 15 - q + 7 * 0.5)
    assert log_prob == 15


def test_flow_matching_loss_is_that_of_the_paper():
    actor, action, own = make_actor(), torch.rand(6, 4).double(), (torch.rand(6, 4) < 0.5).double()
    obs, noise, t = torch.randn(6, 3).double(), torch.randn(6, 4).double(), torch.rand(6, 1).double()
    action = actor.bias + actor.scale * (1.8 * action - 0.9)
    x1 = torch.atanh((action - actor.bias) / actor.scale)
    expected = own * ((x1 - noise) - actor.velocity(t, (1 - t) * noise + t * x1, obs)) ** 2
    torch.testing.assert_close(script.flow_matching_loss(actor, [obs, action, own], noise, t), expected.mean())


@pytest.mark.parametrize("successes", [0, 3, 10])
def test_success_interval_is_wilsons(successes):
    low, high = script.success_interval(successes, 10)
    for edge in {low, high} - {0.0, 1.0}:  # where the normal test of that rate just does not reject
        assert abs(successes / 10 - edge) == pytest.approx(1.96 * math.sqrt(edge * (1 - edge) / 10), rel=1e-6)
    assert low < successes / 10 or successes == low == 0


def test_what_the_scripts_share_is_the_same_text():
    text, g, t = ((ROOT / f"{name}.py").read_text() for name in (NAME, "sac_flow_g", "sac_flow_t"))

    def part(text, start):
        body = re.search(rf"^(?:def|class) {start}\b.*?(?=\n\n\n)", text, re.S | re.M)[0]
        return body.replace("DecodedVelocity", "Velocity").replace("decoder-", "velocity-")

    shared = "fail TimeEmbedding alpha_loss descend load_checkpoint save_checkpoint random_states set_random_states "
    shared += "check_video to_obs to_action find_compiler matmul_precision CudaGraph"
    for name in shared.split():
        assert part(text, name) == part(g, name), name
    assert part(text, "DecoderLayer") == part(t, "DecoderLayer")
    assert part(text, "DecodedVelocity") == part(t, "Velocity")
    loop = r"        std, dt = .*?(?=\n\n    def )"  # of Actor.rollout
    assert re.search(loop, text, re.S)[0] == re.search(loop, g, re.S)[0]


# --- loaders ---

h5py, minari, ogbench = (pytest.importorskip(name) for name in ("h5py", "minari", "ogbench"))
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


def columns(rows: np.ndarray, obs_dim: int, action_dim: int) -> list[np.ndarray]:
    """obs, action, reward, terminated, last, next_obs of rows of the buffer."""
    widths = np.cumsum([obs_dim, action_dim, 1, 1, 1])
    return [part.squeeze(1) if part.shape[1] == 1 else part for part in np.split(rows, widths, axis=1)]


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
    obs, action, reward, terminated, last, next_obs = columns(rows, 19, 7)
    assert obs[:, 0].tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
    assert np.flatnonzero(last).tolist() == (np.cumsum(lengths) - 1).tolist()
    assert reward[:5].tolist() == [-1] * 5 and not terminated[:5].any()  # no success: `dones` alone does not terminate
    assert reward[5:10].tolist() == [-1, -1, -1, 0, 0] and terminated[5:10].tolist() == [0, 0, 0, 1, 1]
    with h5py.File(path) as file:
        demo = file["data/demo_3"]
        expected = np.concatenate([demo[f"obs/{key}"] for key in script.OBS_KEYS], axis=1)
        np.testing.assert_array_equal(obs[15:20], expected.astype(np.float32))
        np.testing.assert_array_equal(action[15:20], demo["actions"][:].astype(np.float32))
    same = last[:-1] == 0
    np.testing.assert_array_equal(next_obs[:-1][same], obs[1:][same])


def write_ogbench(path: Path, episodes=2, rows=41) -> None:
    """A cube-single play file: the cube is at its goal of task 1 in some rows of the middle."""
    generator, n = np.random.default_rng(0), episodes * rows
    goal = cube_env().unwrapped._data.mocap_pos[0]
    qpos = generator.normal(size=(n, 21)).astype(np.float32)
    qpos[15:19, 14:17] = goal + 0.01
    terminals = np.arange(n) % rows == rows - 1
    actions = generator.uniform(-1, 1, (n, 5)).astype(np.float32)
    arrays = dict(observations=generator.normal(size=(n, 28)).astype(np.float32), actions=actions, terminals=terminals)
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
    obs, action, reward, terminated, last, next_obs = columns(script.load_data(path, env, args), 28, 5)
    pairs = {"observations": obs, "actions": action, "next_observations": next_obs, "rewards": reward}
    for theirs, ours in pairs.items():
        np.testing.assert_array_equal(ours, data[theirs])
    assert len(obs) == 80 and np.flatnonzero(last).tolist() == [39, 79] == np.flatnonzero(data["terminals"]).tolist()
    assert np.flatnonzero(terminated).tolist() == [15, 16, 17, 18] and (reward[15:19] == 0).all()  # and on it goes
    buffer = script.ReplayBuffer(80, 28, 5, torch.device("cpu"))
    buffer.refill(torch.from_numpy(script.load_data(path, env, args)), 80)
    chunk = script.merge_chunks(*buffer.rows[None, 12:17].split(buffer.widths, dim=2), 1.0)
    _, _, own, reward, terminated, valid, _ = chunk
    assert (reward, terminated, valid) == (-3, 1, 1) and own.all()  # nothing is added after the success, all is cloned


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
    import gymnasium as gym
    from minari.data_collector import EpisodeBuffer

    folder = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        env, buffers = gym.make("InvertedPendulum-v5"), []
        env.action_space.seed(0)
        for i in range(12):
            obs, done = [env.reset(seed=i)[0]], False
            steps = []
            while not done:
                action = env.action_space.sample()
                next_obs, reward, terminated, truncated, _ = env.step(action)
                obs.append(next_obs)
                steps.append((action, reward, terminated, truncated))
                done = terminated or truncated
            action, reward, terminated, truncated = map(np.array, zip(*steps, strict=True))
            flags = dict(terminations=terminated, truncations=truncated)
            buffers.append(EpisodeBuffer(id=i, observations=np.array(obs), actions=action, rewards=reward, **flags))
        minari.create_dataset_from_buffers("tests/pendulum-v0", buffers, env=env)
    return folder


def test_minari_rows_are_those_of_its_own_reader(pendulum):
    args = script.Args(env_id="tests/pendulum-v0", dataset=str(pendulum))
    env = script.make_env(args)
    obs, action, reward, terminated, last, next_obs = columns(script.load_data(None, env, args), 4, 1)
    episodes = list(script.minari_dataset(args).iterate_episodes())
    for ours, theirs in ((reward, "rewards"), (terminated, "terminations")):
        np.testing.assert_allclose(ours, np.concatenate([getattr(episode, theirs) for episode in episodes]))
    np.testing.assert_allclose(obs, np.concatenate([episode.observations[:-1] for episode in episodes]), rtol=1e-6)
    np.testing.assert_allclose(next_obs, np.concatenate([episode.observations[1:] for episode in episodes]), rtol=1e-6)
    assert last.sum() == 12 and action.shape == terminated.shape


# --- runs ---


def the_run(folder: Path) -> Path:
    """The only run in a folder."""
    (run,) = (folder / "runs").iterdir()
    return run


def checkpoint(run: Path) -> dict:
    """A run's checkpoint, without what says how long things took."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    return {name: value for name, value in state.items() if name not in ("seconds", "lengths")}


def table(run: Path, name: str) -> list[list[str]]:
    """A CSV file without its column of seconds."""
    return [row[:-1] for row in csv.reader(open(run / name))]


def assert_same(a, b, where="checkpoint"):
    """Equal to the last bit."""
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
        assert a == b or a != a and b != b, where


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
    episodes = list(csv.DictReader(open(folder / "returns.csv")))
    lengths = np.array([int(row["length"]) for row in episodes])
    assert len(episodes) >= 3 and [int(row["step"]) for row in episodes] == (100 + lengths.cumsum()).tolist()
    state = checkpoint(folder)
    args = script.Args("tests/pendulum-v0", dataset=str(pendulum))
    data = script.load_data(None, script.make_env(args), args)
    assert state["buffer_added"] == len(data) + 160 and state["updates"] == 100 + 150  # after --online-start
    assert json.loads((folder / "args.json").read_text())["data"] == ["tests/pendulum-v0"]
    done = run("--evaluate", folder)
    assert re.search(r"deterministic: return [\d.]+ .*\nstochastic: return", done.stdout)


LEARNED_SIGMA = ["--learn-sigma", "--autotune", "--alpha", 0.1, "--utd", 2]


@pytest.mark.parametrize("flags", [["--velocity", "plain"], LEARNED_SIGMA])
def test_stopped_runs_resume_bit_for_bit(run, tmp_path, flags):
    """Stopped in the offline phase, and in mid-chunk of an online episode, against a run that was never stopped."""
    flags = [*SHORT, *flags, "--offline-steps", 60]
    run(*flags, "--online-steps", 60)
    whole = the_run(tmp_path).rename(tmp_path / "whole")

    run(*flags, "--online-steps", 37)
    folder = the_run(tmp_path)
    state = checkpoint(folder)
    assert state["step"] == 97 and (state["episode_length"] % 5 == len(state["queue"]) * 0 or len(state["queue"]))
    run("--resume", folder, "--online-steps", 60)
    final = {**checkpoint(whole), "args": checkpoint(folder)["args"]}
    assert_same(checkpoint(folder), final)
    assert table(folder, "returns.csv") == table(whole, "returns.csv")
    rows = [row for row in table(folder, "eval.csv") if row[0] != "97"]  # the shorter run's own last evaluation
    assert rows == table(whole, "eval.csv")


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
    flags = [*SMALL, "--online-start", 10, "--offline-steps", 40, "--online-steps", 40, "--eval-episodes", 1]
    run(*flags, "--eval-every", 10)
    often = checkpoint(the_run(tmp_path).rename(tmp_path / "often"))
    run(*flags, "--eval-every", 1000)
    assert_same(checkpoint(the_run(tmp_path)), often | {"args": checkpoint(the_run(tmp_path))["args"]})


def test_files_of_a_folder_are_used_in_turn(start, tmp_path):
    (tmp_path / "shards").mkdir()
    for i, rows in enumerate((31, 41)):
        write_ogbench(tmp_path / "shards" / f"cube-{i}.npz", 2, rows)
    write_ogbench(tmp_path / "shards" / "cube-0-val.npz")
    flags = ["--env-id", CUBE, "--dataset", tmp_path / "shards", "--rotate-every", 10, "--online-steps", 0, *SHORT]
    for steps, rows in ((10, 60), (11, 80), (21, 60)):
        done = start(*flags, "--offline-steps", steps, "--eval-episodes", 1, name=NAME)
        assert done.returncode == 0, done.stderr
        run = the_run(tmp_path)
        assert len(checkpoint(run)["buffer"]) == rows
        run.rename(tmp_path / f"{steps}")


@needs_robosuite
def test_robosuite_is_seeded_and_ends_at_success():
    env = script.RobosuiteEnv("lift")

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

    theirs = collect.robosuite_kwargs()
    assert {key: theirs[key] for key in script.ROBOSUITE_KWARGS} == script.ROBOSUITE_KWARGS
    for task in ("can", "square"):
        env, other = script.RobosuiteEnv(task), collect.make_robosuite(task)
        obs = collect.robomimic_obs(collect.reset_robosuite(other, 5))
        np.testing.assert_array_equal(env.reset(seed=5)[0], np.concatenate([obs[key] for key in script.OBS_KEYS]))


@needs_robosuite
def test_lift(start, tmp_path):
    """The real task for 300 steps, from data of the right shape."""
    write_robomimic(tmp_path / "data.hdf5", [20] * 5)
    flags = ["--dataset", tmp_path / "data.hdf5", *SMALL, "--offline-steps", 50, "--online-steps", 300]
    done = start(*flags, "--eval-episodes", 1, "--online-start", 250, name=NAME)
    assert done.returncode == 0, done.stderr
    run = the_run(tmp_path)
    assert checkpoint(run)["buffer_added"] == 100 + 300
    assert table(run, "returns.csv")[1][1:4] == ["-300.0", "300", "0.0"]
    assert table(run, "eval.csv")[1][:3] == ["50", "offline", "0"]


def test_cube_single_on_collected_data(start, tmp_path):
    """A short run on the oracle's play data: the loss of flow matching falls clearly; then the real task online."""
    flags = ["--env-id", CUBE, *SMALL, "--velocity-dim", 64, "--batch-size", 64, "--eval-episodes", 1, "--collect", 1]
    done = start(*flags, "--offline-steps", 500, "--online-steps", 250, "--online-start", 200, name=NAME)
    assert done.returncode == 0, done.stderr
    assert "collecting 1 scripted episodes" in done.stderr
    assert (tmp_path / "data" / "cube-single-play-v0-1.npz").is_file()
    events = EventAccumulator(str(the_run(tmp_path))).Reload()
    losses = [event.value for event in events.Scalars("losses/flow_matching")][:5]
    assert losses[-1] < 0.75 * losses[0], losses


@pytest.mark.parametrize("velocity", ["gated", "decoded"])
def test_compiled_is_eager(run, tmp_path, velocity):
    """On the same batches, up to rounding."""
    flags = [*SHORT, "--velocity", velocity, "--offline-steps", 12, "--online-steps", 12, "--online-start", 2]
    run(*flags)
    eager = checkpoint(the_run(tmp_path).rename(tmp_path / "eager"))
    run(*flags, "--compile")
    compiled = checkpoint(the_run(tmp_path))
    for name, value in eager["actor"].items():
        torch.testing.assert_close(compiled["actor"][name], value, rtol=1e-3, atol=1e-4)


# --- bad input ---


def assert_refused(done, *texts):
    """Exit code 2 and one line that holds every text."""
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert lines[0] == done.stderr.splitlines()[-1], done.stderr
    for text in texts:
        assert text in lines[0], done.stderr


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
    ],
)
def test_data_that_does_not_fit(tmp_path, capsys, changes, texts):
    path = tmp_path / "data.hdf5"
    write_robomimic(path, **changes)
    with pytest.raises(SystemExit) as error:
        script.load_data(path, Spaces(19, 7), script.Args())
    stderr = capsys.readouterr().err
    assert error.value.code == 2 and len(stderr.splitlines()) == 1 and all(text in stderr for text in texts), stderr


def test_damaged_files(tmp_path, capsys):
    write_robomimic(tmp_path / "a.hdf5")
    write_ogbench(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", observations=np.zeros((5, 28)))
    cases = [("a.hdf5", "lift", Spaces(19, 7))] if robosuite_installed else []
    for name, env_id, env in [*cases, ("b.npz", CUBE, cube_env()), ("c.npz", CUBE, cube_env())]:
        path = tmp_path / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(SystemExit) as error:
            script.load_data(path, env, script.Args(env_id=env_id, sparse=False))
        stderr = capsys.readouterr().err
        assert error.value.code == 2 and len(stderr.splitlines()) == 1 and str(path) in stderr, stderr


def test_bad_flags(run, start, tmp_path):
    nowhere = tmp_path / "nowhere.npz"
    assert_refused(run("--env-id", CUBE, "--dataset", nowhere, check=False), "--dataset", "nowhere.npz")
    assert_refused(run("--dataset", tmp_path, "--env-id", CUBE, check=False), "no .npz file")
    assert_refused(run("--env-id", CUBE, "--dataset", "", "--collect", 0, check=False), ".ogbench", "--collect 100")
    assert_refused(run("--env-id", "tests/missing-v0", check=False), "tests/missing-v0", "collect.py", "--policy")
    assert_refused(run("--chunk", 10_000, check=False), "--chunk 10000", "at most")
    assert_refused(run("--buffer-size", 30, "--batch-size", 8, check=False), "--buffer-size 30")
    assert_refused(run("--autotune", check=False), "--autotune", "--learn-sigma")
    assert_refused(run("--beta", -1, check=False), "--beta", "0 or more")
    assert_refused(run("--decoder-heads", 3, check=False), "--decoder-heads 3")
    assert_refused(run("--sigma", 0, check=False), "--sigma", "above 0")
    assert not (tmp_path / "runs").exists()
    run(*SHORT, "--offline-steps", 5, "--online-steps", 0)
    folder = the_run(tmp_path)
    assert_refused(run("--resume", folder, check=False), "reached step 5", "--online-steps")
    assert_refused(run("--resume", folder, "--online-steps", 9, "--chunk", 3, check=False), "--chunk 3", "drop the")


def test_missing_package_names_the_remedy(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "ogbench", None)
    with pytest.raises(SystemExit) as error:
        script.benchmark_of(CUBE)
    assert error.value.code == 2 and "pip install " in capsys.readouterr().err


def test_defaults_by_task(monkeypatch):
    expected = {"lift": (10_000, 1_000, False), "cube-double-play-singletask-task2-v0": (300, 300, False)}
    expected |= {"cube-triple-play-singletask-v0": (100, 100, False), "scene-play-singletask-v0": (100, 100, True)}
    for env_id, defaults in expected.items():
        monkeypatch.setattr("sys.argv", ["x", "--env-id", env_id, "--no-cuda"])
        args, _ = script.parse_args()
        assert (args.beta, args.online_beta, args.sparse) == defaults
