"""sac_flow_offline2online.py: chunks, the policy over them, losses."""

import math
import re
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import ROOT, FixedPolicy, Table
from torch import nn
from torch.autograd.functional import jacobian
from torch.nn import functional as F

import sac_flow_offline2online as script

NAME = "sac_flow_offline2online"
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
    total, ended, terminated, own, executed = 0.0, False, False, [], []
    for i, (_, _, reward, is_terminal, is_last, _) in enumerate(rows):
        own.append(not ended)
        executed.append(not ended and not terminated)
        if not ended and not terminated:
            total += gamma**i * reward
        if not ended and is_terminal:
            terminated = True
        if is_last and i < h - 1:
            ended = True
    return total, terminated, own, executed


def test_merge_chunks_is_the_step_by_step_sum():
    """Actions have two dimensions: (a, -a)."""
    generator, h, seen = np.random.default_rng(0), 4, set()
    for _ in range(300):
        rows = []
        for _ in range(h):
            terminated = generator.random() < 0.2
            last = generator.random() < 0.25 or terminated and generator.random() < 0.7
            rows.append((*generator.normal(size=3), terminated, last, generator.normal()))
        columns = [torch.tensor([[[row[i]] for row in rows]], dtype=torch.float64) for i in (0, 1, 2, 3, 4, 5)]
        columns[1] = torch.cat([columns[1], -columns[1]], dim=2)
        obs, action, own, executed, reward, terminated, next_obs = script.merge_chunks(*columns, 0.9)
        total, is_terminal, is_own, is_executed = reference_chunk(rows, h, 0.9)
        assert reward.item() == pytest.approx(total) and terminated.item() == is_terminal
        assert own[0].tolist() == [value for value in is_own for _ in range(2)]
        assert executed[0].tolist() == [value for value in is_executed for _ in range(2)]
        assert obs[0, 0] == rows[0][0] and next_obs[0, 0] == rows[-1][5]
        assert action[0].tolist() == [value for row in rows for value in (row[1], -row[1])]
        seen.add((is_terminal, all(is_own), all(is_executed)))
    assert len(seen) == 5  # whole, cut short; terminated: at the end, and cut short, and within its episode


def test_a_ring_that_wrapped_around_goes_on_where_it_was():
    ring, resumed = (script.ReplayBuffer(8, 1, 1, torch.device("cpu")) for _ in range(2))
    for i in range(21):
        if i == 11:
            resumed.load_state_dict(ring.state_dict())
        for buffer in [ring, resumed] if i >= 11 else [ring]:
            buffer.add([i], [0], 0, 0, [i + 1], follows=i % 5 > 0)
    assert torch.equal(ring.rows, resumed.rows) and ring.added == resumed.added


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
            obs, action, own, executed, reward, ended, next_obs = buffer.sample(200, h, 1.0)
            whole = executed.bool().all(1) & ~ended.bool()
            assert torch.equal(action[whole], obs[whole, 1:] + torch.arange(h))
            assert torch.equal(next_obs[whole], obs[whole] + torch.tensor([0, h])) and (reward[whole] == h).all()
            assert (obs[ended.bool(), 0] % 2 == 1).all()
            rest = torch.where(obs[:, 0] == episode, t, 3 + obs[:, 0] % 3) + 1 - obs[:, 1]  # rows left to its end
            assert torch.equal(own.sum(1), rest.clamp(max=h)) and torch.equal(whole, (rest >= h) & ~ended.bool())


# --- the policy: as in test_flow.py, over chunks ---


@pytest.mark.parametrize("score_step", ["exponential", "euler", "none"])
@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("velocity", VELOCITIES)
def test_log_prob_is_the_density_of_the_map_from_noise_to_path(velocity, learn_sigma, score_step):
    for k in (1, 3):
        actor = make_actor(velocity, k, sigma=0.3, learn_sigma=learn_sigma, score_step=score_step)
        obs, noise = torch.randn(1, 3).double(), 0.3 * torch.randn(k + 1, 1, 4).double()

        def path_and_action(flat, actor=actor, obs=obs, k=k):
            action, _, path = actor.rollout(obs, flat.view(k + 1, 1, 4))
            return torch.cat([*path[:-1], actor.normalized(action)]).flatten()

        log_det = torch.linalg.slogdet(jacobian(path_and_action, noise.flatten())).logabsdet
        expected = torch.distributions.Normal(0, 1).log_prob(noise).sum() - log_det
        torch.testing.assert_close(actor.rollout(obs, noise)[1][0], expected, rtol=1e-10, atol=1e-10)


def test_target_entropy_is_what_sigma_gives_before_the_squash():
    actor, euler = make_actor(sigma=0.1), make_actor(sigma=0.1, score_step="euler")
    per_dimension = 1.4189 + 4 * (1.4189 + math.log(0.1) + 0.5 * math.log(1 / 4))  # benchmark/README.md, Differences
    assert euler.target_entropy == pytest.approx(4 * per_dimension, abs=1e-2)
    # The exponential step's noise falls with sqrt(1 - t), t = 0, 1/4, 1/2, 3/4.
    schedule = 0.5 * math.log(1 * 3 / 4 * 2 / 4 * 1 / 4)
    assert actor.target_entropy == pytest.approx(4 * (per_dimension + schedule), abs=1e-2)
    noise = torch.randn(5, 40_000, 4).double()
    _, log_prob, path = actor.rollout(torch.zeros(40_000, 3).double(), noise)
    squash = torch.log1p(-(torch.tanh(path[-1]) ** 2)).sum(1)
    assert (-log_prob - squash).mean().item() == pytest.approx(actor.target_entropy, abs=0.1)
    start = script.Actor(3, [-1.0], [1.0], sigma=0.1, learn_sigma=True)
    torch.testing.assert_close(start.sigma(torch.randn(6, 3)), torch.full((6, 5), 0.1))


def test_bounds_are_those_of_each_action_of_the_chunk():
    """The chunk's actions one after the other, each with both its dimensions."""
    actor = make_actor(sigma=0.3, score_step="none")
    noise = torch.zeros(5, 2, 4).double()
    noise[-1] = torch.tensor([[1e6], [-1e6]])  # as far as it goes, up and down
    action, *_ = actor.rollout(torch.randn(2, 3).double(), noise)
    torch.testing.assert_close(action, torch.tensor([[0.4, 5.0, 0.4, 5.0], [-0.4, 0.0, -0.4, 0.0]]).double())


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
        loss = script.flow_matching_loss(actor, batch, noise, torch.rand(256, 1))
        script.apply_gradients(optimizer, torch.autograd.grad(loss, list(actor.parameters())))
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


def test_layer_normalisation_bounds_the_critic():
    """After each hidden layer: its weights may grow at will, and the observations, and Q stays where it is."""
    critic = script.Critic(3, 4, 32, 3)
    obs, action = torch.randn(6, 3), torch.randn(6, 4)
    q = critic(obs, action)
    assert q.shape == (6,) and q.std() > 0.01
    linear = [layer for layer in critic.net if isinstance(layer, nn.Linear)]
    assert len(linear) == 4
    for layer in linear[:-1]:
        for parameter in layer.parameters():
            parameter.data *= 100
    torch.testing.assert_close(critic(obs, action), q, rtol=0.02, atol=0.005)
    far, farther = critic(1e3 * obs, 1e3 * action), critic(1e6 * obs, 1e6 * action)
    assert far.std() > 0.01
    torch.testing.assert_close(farther, far, rtol=0.02, atol=0.005)


def test_critic_loss_uses_the_mean_of_the_targets_on_valid_chunks_alone():
    critics, targets = nn.ModuleList([Table(1.0), Table(2.0)]), nn.ModuleList([Table(3.0), Table(5.0)])
    obs, action, ones = torch.ones(3, 1), torch.zeros(3, 1), torch.ones(3, 1)
    reward, terminated = torch.full((3,), 5.0), torch.tensor([0.0, 1.0, 0.0])
    executed = torch.tensor([[1.0], [1.0], [0.0]])
    batch = [obs, action, ones, executed, reward, terminated, 2 * obs]
    loss, q = script.critic_loss(FixedPolicy(), critics, targets, batch, None, 0.1, 0.9**5)
    y = torch.tensor([5 + 0.9**5 * (4.0 * 4 - 0.1 * 20), 5.0])  # Q' = 4 (2 + 2), the mean of 3 and 5
    expected = sum(((scale - y) ** 2).sum() / 3 / 2 for scale in (1.0, 2.0))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert q == 1.5 * (1 + 1 + 2) / 3 and targets[0].scale.grad is None  # in the last chunk nothing was executed
    torch.testing.assert_close(critics[0].scale.grad, (1.0 - y).sum() / 3)


def test_critics_see_the_policy_s_own_actions_after_a_termination():
    """Not the next episode's first ones, which the buffer has there, nor those that play data goes on with."""
    actor, obs, noise = make_actor(), torch.randn(3, 3).double(), torch.randn(5, 3, 4).double()
    action = actor.bias + actor.scale * (1.8 * torch.rand(3, 4).double() - 0.9)
    executed = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]).double()
    terminated, seen = torch.tensor([1.0, 1.0, 0.0]).double(), []

    class Recorder(nn.Module):
        def forward(self, obs, action):
            seen.append(action)
            return action.sum(1)

    def loss(action):
        batch = [obs, action, executed, executed, torch.zeros(3).double(), terminated, obs + 1]
        return script.critic_loss(actor, [Recorder(), Recorder()], [Recorder()], batch, noise, 0.1, 0.9)[0]

    before = loss(action)
    expected = torch.where(executed > 0, action, actor.rollout(obs, noise)[0])
    torch.testing.assert_close(seen[-1], (expected - actor.bias) / actor.scale)
    changed = action.clone()
    changed[0, 2:] = 0.1
    assert loss(changed) == before
    changed[0, 1] = 0.1
    assert loss(changed) != before


def test_actor_loss_weighs_bc_where_the_data_is_its_own():
    critics, obs = nn.ModuleList([Table(1.0), Table(3.0)]), torch.tensor([[1.0], [2.0]])
    batch = [obs, torch.tensor([[0.0], [5.0]]), torch.tensor([[1.0], [0.0]])]
    loss, bc, log_prob, *_ = script.actor_loss(FixedPolicy(), critics, batch, None, 0.1, torch.tensor(7.0))
    q = 2 * (obs + obs).mean()  # the mean of both critics
    torch.testing.assert_close(bc, torch.tensor(0.5))  # (1 - 0)^2 over a batch of two; the other is beyond its episode
    torch.testing.assert_close(loss, 0.1 * 15 - q + 7 * 0.5)
    assert log_prob == 15


def test_gradient_norms_are_those_of_the_trained_loss():
    """Of each observation's own loss, its BC term included."""
    actor, critics = make_actor(sigma=0.3), nn.ModuleList(script.Critic(3, 4, 8, 1).double() for _ in range(2))
    obs, data_action, noise = torch.randn(6, 3).double(), torch.rand(6, 4).double(), torch.randn(5, 6, 4).double()
    batch = [obs, data_action, torch.ones(6, 4).double()]
    norms = script.gradient_norms(actor, critics, batch, noise.clone(), 0.1, 7.0)
    action, log_prob, path = actor.rollout(obs, noise.requires_grad_())
    action, data_action = ((part - actor.bias) / actor.scale for part in (action, data_action))
    q = (critics[0](obs, action) + critics[1](obs, action)) / 2
    own = 0.1 * log_prob - q + 7 * (action - data_action).square().mean(1)
    expected = [gradient.norm(dim=1).mean() for gradient in torch.autograd.grad(own.sum(), path)]
    torch.testing.assert_close(norms, torch.stack(expected))


def test_logging_gradient_norms_leaves_training_as_it_is():
    """Its batch and noise are drawn from other random numbers; five norms and sigma are written."""
    actor = make_actor(sigma=0.3).float()
    critics = nn.ModuleList(script.Critic(3, 4, 8, 1) for _ in range(2))
    buffer = script.ReplayBuffer(20, 3, 2, torch.device("cpu"))
    for t in range(12):
        buffer.add([t, 0, 1], [0.1, 0.2], -1.0, False, [t + 1, 0, 1], follows=t > 0)
    written = {}
    args = script.Args(batch_size=6, chunk=2)
    write = lambda prefix, values: written.update({f"{prefix}{name}": value for name, value in values.items()})  # noqa: E731
    run = SimpleNamespace(args=args, progress=script.Progress(step=1000), write_scalars=write)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    generators = script.Generators(torch.device("cpu"), gym.make("InvertedPendulum-v4"))
    script.log_gradient_norms(run, actor, critics, buffer, generators, 0.1, 7.0)
    assert torch.equal(torch.get_rng_state(), states[0]) and np.random.get_state()[1].tolist() == states[1]
    assert set(written) == {"flow/sigma"} | {f"flow/grad_norm_step_{i}" for i in range(5)}
    assert all(value > 0 for value in written.values()) and written["flow/sigma"] == pytest.approx(0.3)


def test_gradients_are_those_of_the_losses_alone():
    """Each term written down and differentiated: every one of them has its part in what the optimizers get."""
    actor, obs = make_actor(sigma=0.3, learn_sigma=True), torch.randn(6, 3).double()
    critics, targets = (nn.ModuleList(script.Critic(3, 4, 8, 2).double() for _ in range(2)) for _ in range(2))
    own = (torch.rand(6, 4) < 0.7).double()
    executed = torch.tensor(
        [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    ).double()
    terminated, valid = torch.tensor([[0, 0, 0, 0, 1, 1], [1, 1, 1, 0, 1, 1]]).double()
    reward, next_obs = torch.randn(6).double(), torch.randn(6, 3).double()
    data_action = actor.bias + actor.scale * (1.8 * torch.rand(6, 4).double() - 0.9)
    batch = [obs, data_action, own, executed, reward, terminated, next_obs]
    noise, x0, t = torch.randn(5, 6, 4).double(), torch.randn(6, 4).double(), torch.rand(6, 1).double()

    def gradient(term, network):
        gradients = torch.autograd.grad(term, list(network.parameters()), retain_graph=True, allow_unused=True)
        pairs = zip(gradients, network.parameters(), strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])

    def check(loss, network, inputs, *terms):
        *_, found = script.with_gradients(loss, network)(*inputs)
        parts = [gradient(term, network) for term in terms]
        assert all(part.norm() > 1e-3 for part in parts)
        torch.testing.assert_close(torch.cat([part.flatten() for part in found]), sum(parts))
        assert all(parameter.grad is None for part in (actor, critics, targets) for parameter in part.parameters())

    def of_bounds(action):
        return (action - actor.bias) / actor.scale

    action, log_prob, _ = actor.rollout(obs, noise)
    action = of_bounds(action)
    entropy, bc = 0.1 * log_prob.mean(), 7 * (own * (action - of_bounds(data_action)).square()).mean()
    qs = [-critic(obs, action).mean() / 2 for critic in critics]
    check(script.actor_loss, actor, (actor, critics, batch, noise, 0.1, 7.0), entropy, bc, *qs)
    x1 = actor.unsquash(data_action)
    matching = (own * (x1 - x0 - actor.velocity(t, (1 - t) * x0 + t * x1, obs)).square()).mean()
    inputs = (actor, critics, batch, noise, 0.1, 7.0, x0, t)
    check(script.offline_actor_loss, actor, inputs, entropy, bc, *qs, matching)

    next_action, next_log_prob, _ = actor.rollout(next_obs, noise)
    next_action = of_bounds(next_action)
    next_q = (targets[0](next_obs, next_action) + targets[1](next_obs, next_action)) / 2
    y = (reward + 0.9 * (1 - terminated) * (next_q - 0.1 * next_log_prob)).detach()
    seen = torch.where(executed > 0, of_bounds(data_action), action.detach())
    errors = [0.5 * (valid * (critic(obs, seen) - y).square()).mean() for critic in critics]
    check(script.critic_loss, critics, (actor, critics, targets, batch, noise, 0.1, 0.9), *errors)


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


def test_the_gated_velocity_is_that_of_flow_g():
    """v = g (vhat - a), and the gate starts open."""
    net, a = script.GatedVelocity(3, 2, 16, 2, 8), torch.randn(6, 2)
    features = net.encode(torch.randn(6, 3))
    hidden = F.silu(features + net.from_action(a) + net.from_time(0.5))
    gate = lambda: torch.sigmoid(net.gate(hidden[:, 16:]))  # noqa: E731
    torch.testing.assert_close(gate(), torch.full((6, 2), 0.9933), atol=1e-4, rtol=0)
    nn.init.normal_(net.gate.weight)
    torch.testing.assert_close(net(0.5, a, features), gate() * (net.candidate(hidden[:, :16]) - a))


def test_the_decoder_starts_as_pytorch_initialises_it():
    """As measured: from scratch Flow-T starts contractive."""
    net = script.make_actor(script.Args(velocity="decoded", chunk=1), 3, [-1.0], [1.0]).velocity_net
    assert not torch.allclose(net.out.weight, -net.from_action.weight.T, atol=0.02)


@pytest.mark.parametrize("low, high", [([-1], [1, 1]), ([-1, -1], [1]), (-1, 1), ([], []), ([0, 0], [1, 0])])
def test_bounds_that_do_not_fit_are_refused(low, high):
    with pytest.raises(ValueError, match="finite bounds, low < high"):
        script.Actor(3, low, high, chunk=2, velocity=VELOCITIES["plain"])


@pytest.mark.parametrize("velocity, body", [("gated", "candidate"), ("plain", "net"), ("decoded", "layers")])
def test_flags_reach_the_networks(velocity, body):
    args = script.Args(
        velocity=velocity, chunk=1, sigma=0.3, sigma_dim=8, velocity_dim=12, velocity_layers=4, gate_dim=6,
        decoder_dim=12, decoder_layers=4,
    )  # fmt: skip
    actor = script.make_actor(args, 3, [-1.0], [1.0])
    torch.testing.assert_close(actor.sigma(torch.zeros(2, 3)), torch.full((2, 1), 0.3))
    assert actor.sigma_net[0].out_features == 8
    kind = script.DecoderLayer if velocity == "decoded" else nn.Linear
    assert sum(isinstance(layer, kind) for layer in getattr(actor.velocity_net, body)) == 4
    assert actor.velocity_net.from_obs.out_features == (18 if velocity == "gated" else 12)
    args.learn_sigma = False
    assert script.make_actor(args, 3, [-1.0], [1.0]).sigma_net is None


def test_the_decoder_is_that_of_flow_t():
    text, t = ((ROOT / f"{name}.py").read_text() for name in (NAME, "sac_flow_t"))

    def part(text, name):
        return re.search(rf"^class {name}\b.*?(?=\n\n\n)", text, re.S | re.M)[0]

    assert part(text, "DecoderLayer") == part(t, "DecoderLayer")
    assert part(text, "DecodedVelocity").replace("DecodedVelocity", "Velocity") == part(t, "Velocity")
