"""The flow policy: its density, its marginals, and the RNN that it is."""

import importlib
import math

import pytest
import torch
from helpers import FLOWS
from torch import nn
from torch.autograd.functional import jacobian
from torch.nn import functional as F

SCORE_STEPS = ["exponential", "euler", "none"]
LOW, HIGH = [-0.4, -3.0, 0.0], [0.4, 1.0, 5.0]  # unequal bounds, one of them not symmetric


PLAIN_START = {"sac_flow_t": {"contractive": False}}  # Flow-T as PyTorch initialises it


def make_actor(script, k=4, double=True, entropy="path", **keywords):
    """An actor of 5 observations and 3 actions whose every weight is random, so that no term is 0 by its start."""
    sizes = dict(sigma_dim=16, encoder_dim=16, dim=16, **PLAIN_START.get(script.__name__, {}))
    actor = script.Actor(5, LOW, HIGH, flow_steps=k, entropy=entropy, **sizes, **keywords)
    for parameter in actor.parameters():
        nn.init.normal_(parameter, std=0.3)
    return actor.double() if double else actor


def hold_sigma(actor, sigma):
    """Make the actor's sigma a constant, or one for each dimension."""
    nn.init.zeros_(actor.sigma_net[-1].weight)
    actor.sigma_net[-1].bias.data[:] = torch.atanh((torch.tensor(sigma).log() + 1.5) / 3.5)
    return actor


@pytest.mark.parametrize("score_step", SCORE_STEPS)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_log_prob_is_the_density_of_the_map_from_noise_to_path(script, k, score_step):
    actor = make_actor(script, k, score_step=score_step)
    obs, noise = torch.randn(1, 5).double(), torch.randn(k + 1, 1, 3).double()

    def path_and_action(flat):
        action, _, path = actor.rollout(obs, flat.view(k + 1, 1, 3))
        return torch.cat([*path[:-1], (action - actor.bias) / actor.scale]).flatten()

    log_det = torch.linalg.slogdet(jacobian(path_and_action, noise.flatten())).logabsdet
    expected = torch.distributions.Normal(0, 1).log_prob(noise).sum() - log_det
    torch.testing.assert_close(actor.rollout(obs, noise)[1][0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("score_step", SCORE_STEPS)
@pytest.mark.parametrize("k", [1, 4])
def test_log_prob_of_the_last_step_is_the_density_of_the_action_given_the_state_before(script, k, score_step):
    """The action is a function of the last noise alone if the noise before it, and so A_{K-1}, is held."""
    actor = make_actor(script, k, entropy="last-step", score_step=score_step)
    obs, noise = torch.randn(1, 5).double(), torch.randn(k + 1, 1, 3).double()

    def action_of(last):
        action = actor.rollout(obs, torch.cat([noise[:-1], last.view(1, 1, 3)]))[0]
        return ((action - actor.bias) / actor.scale).flatten()

    log_det = torch.linalg.slogdet(jacobian(action_of, noise[-1].flatten())).logabsdet
    expected = torch.distributions.Normal(0, 1).log_prob(noise[-1]).sum() - log_det
    torch.testing.assert_close(actor.rollout(obs, noise)[1][0], expected, rtol=1e-9, atol=1e-9)


def test_shapes_and_bounds(script):
    for k in (1, 3, 16):
        actor = make_actor(script, k, double=False)
        action, log_prob, path = actor.rollout(torch.randn(7, 5), 3 * torch.randn(k + 1, 7, 3))
        assert action.shape == (7, 3) and log_prob.shape == (7,)
        assert [a.shape for a in path] == (k + 1) * [(7, 3)]
        assert (action >= torch.tensor(LOW) - 1e-6).all() and (action <= torch.tensor(HIGH) + 1e-6).all()
        assert actor.velocity(0.5, path[0], torch.randn(7, 5)).shape == (7, 3)


def test_log_prob_is_finite_and_exact_where_tanh_saturates(script):
    actor = make_actor(script, 1, score_step="none")
    noise = torch.tensor([0.0, 1000.0]).view(2, 1, 1).expand(2, 1, 3).double()
    obs = torch.zeros(1, 5).double()
    _, log_prob, path = actor.rollout(obs, noise)
    assert path[-1].abs().min() > 20  # 1 - tanh^2 is 0 in floating point here
    log_std = -1.5 + 3.5 * torch.tanh(actor.sigma_net(obs))
    no_squash = torch.distributions.Normal(0, 1).log_prob(noise).sum() - log_std.sum()
    correction = math.log(4) - 2 * path[-1].abs()  # its limit, log(4 exp(-2 |x|))
    torch.testing.assert_close(no_squash - log_prob[0], correction.sum(), rtol=1e-6, atol=0)


def test_velocity_is_what_the_rollout_integrates(script):
    actor = make_actor(script, 4, score_step="none")
    obs, noise = torch.randn(6, 5).double(), torch.zeros(5, 6, 3).double()
    noise[0].normal_()
    _, _, path = actor.rollout(obs, noise)
    for i in range(4):
        for t in (i / 4, torch.full((6, 1), i / 4).double()):  # a float and a batch of times
            torch.testing.assert_close(path[i + 1], path[i] + actor.velocity(t, path[i], obs) / 4)


def test_act(script):
    actor = make_actor(script, double=False)
    obs = torch.randn(6, 5)
    zero = torch.zeros(5, 6, 3)
    assert torch.equal(actor.act(obs, deterministic=True), actor.rollout(obs, zero)[0])
    assert not torch.equal(actor.act(obs), actor.act(obs))


# --- the noisy rollout keeps the marginals: step 7 of the argument ---

MEANS, STDS, WEIGHTS = torch.tensor([[-2.0, 0.5], [1.5, -1.0]]), torch.tensor([0.3, 0.5]), torch.tensor([0.3, 0.7])


class ExactVelocity(nn.Module):
    """E[x1 - x0 | x_t = a] of the linear path from N(0, I) to a mixture of isotropic Gaussians, in closed form."""

    def __init__(self, means, stds, weights):
        super().__init__()
        self.means, self.stds, self.weights = means, stds, weights

    def encode(self, obs):
        return None

    def forward(self, t, a, memory):
        variance = ((1 - t) ** 2 + t**2 * self.stds**2)[:, None]  # of x_t in each component, (M, 1)
        deviation = a[:, None] - t * self.means  # (B, M, D)
        logits = self.weights.log() - 0.5 * (variance.log() + deviation**2 / variance).sum(2)  # (B, M)
        velocity = self.means + (t * self.stds[:, None] ** 2 - (1 - t)) / variance * deviation
        return (logits.softmax(1)[:, :, None] * velocity).sum(1)


@pytest.mark.parametrize("modes", [1, 2])
@pytest.mark.parametrize("score_step", ["exponential", "euler"])
def test_noisy_rollout_keeps_the_marginals_only_with_the_score(script, modes, score_step):
    weights, means = WEIGHTS[:modes] / WEIGHTS[:modes].sum(), MEANS[:modes]
    mean = weights @ means
    second = torch.einsum("m,md,me->de", weights, means, means) + (weights @ STDS[:modes] ** 2) * torch.eye(2)
    covariance = second - torch.outer(mean, mean)

    def error(k, score_step):
        """Largest distance of A_K's mean and covariance to those of the flow's end, in its largest deviation."""
        actor = script.Actor(1, [-1.0] * 2, [1.0] * 2, flow_steps=k, score_step=score_step)
        actor.velocity_net = ExactVelocity(means, STDS[:modes], weights)
        hold_sigma(actor, [1.0, 0.5])  # one for each dimension
        with torch.no_grad():
            end = actor.rollout(torch.zeros(20_000, 1), torch.randn(k + 1, 20_000, 2))[2][-1]
        errors = (end.mean(0) - mean).abs().max(), (end.T.cov() - covariance).abs().max().sqrt()
        return float(max(errors) / covariance.diagonal().max().sqrt())

    corrected = [error(k, score_step) for k in (4, 32, 256)]
    assert corrected[0] > 1.5 * corrected[1] and corrected[2] < 0.2  # falls with K, to the sampling error (0.12)
    assert error(256, "none") > 0.4  # without the score the noise widens the distribution


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("means, stds, weights", [([-2.0, 1.5], [0.6, 0.8], [0.3, 0.7]), ([1.0], [0.1], [1.0])])
def test_exponential_step_keeps_wide_and_narrow_marginals_whatever_sigma_is(script, means, stds, weights, sigma):
    """Mean distance between quantiles (W1) of A_64 and of the flow's end; measured 0.001 to 0.033."""
    means, stds, weights = torch.tensor(means)[:, None], torch.tensor(stds), torch.tensor(weights)
    component = torch.multinomial(weights, 200_000, replacement=True)
    exact = (means[component, 0] + stds[component] * torch.randn(200_000)).sort().values[5::10]

    def distance(score_step):
        actor = script.Actor(1, [-1.0], [1.0], flow_steps=64, score_step=score_step)
        actor.velocity_net = ExactVelocity(means, stds, weights)
        hold_sigma(actor, sigma)
        with torch.no_grad():
            end = actor.rollout(torch.zeros(20_000, 1), torch.randn(65, 20_000, 1))[2][-1]
        return float((end[:, 0].sort().values - exact).abs().mean())

    assert distance("exponential") < 0.05
    if sigma >= 1:
        assert distance("none") > 0.2
    if sigma >= 2 and len(stds) == 1:
        assert distance("euler") > 5  # stiff: the narrow flow's velocity is steep, and the score amplifies it


@pytest.mark.parametrize(
    "score_step, power, expected",
    [("euler", 0, 1.55e6), ("euler", 0.5, 4.0), ("exponential", -0.5, 223), ("exponential", 0, 0.83)],
    ids=["euler constant", "euler shrinking", "exponential constant", "exponential shrinking"],
)
def test_the_noise_schedule_matters_most(shared, score_step, power, expected):
    """The table of step 8: mean distance between quantiles of A_16 and those of N(1, 0.1^2), sigma 4."""
    actor = shared.Actor(1, [-1.0], [1.0], flow_steps=16, score_step=score_step)
    actor.velocity_net = ExactVelocity(torch.tensor([[1.0]]), torch.tensor([0.1]), torch.tensor([1.0]))
    hold_sigma(actor, 4.0)
    step = actor.step
    actor.step = lambda i, a, v, sigma: step(i, a, v, sigma * (1 - i / 16) ** power)  # the other schedule's sigma_t
    exact = 1 + 0.1 * torch.special.ndtri((torch.arange(50_000) + 0.5) / 50_000)
    with torch.no_grad():
        end = actor.rollout(torch.zeros(50_000, 1), torch.randn(17, 50_000, 1))[2][-1]
    assert float((end[:, 0].sort().values - exact).abs().mean()) == pytest.approx(expected, rel=0.05)


# --- a rollout is a residual RNN: steps 2 to 6 of the argument ---


class ResidualRNNCell(nn.Module):
    """h' = h + f(h, x) with input x = (t, s) and f = dt * v."""

    def __init__(self, velocity_net, dt):
        super().__init__()
        self.velocity_net, self.dt = velocity_net, dt

    def forward(self, x, h):
        t, obs = x
        return h + self.dt * self.velocity_net(t, h, self.velocity_net.encode(obs))


def test_rollout_is_an_unrolled_residual_rnn(script):
    actor = make_actor(script, 4, score_step="none")
    cell, obs, noise = ResidualRNNCell(actor.velocity_net, 1 / 4), torch.randn(6, 5).double(), torch.zeros(5, 6, 3)
    noise = noise.double()
    noise[0].normal_()
    h, states = noise[0], [noise[0]]
    for i in range(4):
        h = cell((i / 4, actor.encoder(obs)), h)
        states.append(h)
    torch.testing.assert_close(actor.rollout(obs, noise)[2], states)


@pytest.mark.parametrize("score_step", SCORE_STEPS)
def test_gradient_is_the_rnn_product_of_jacobians(script, score_step):
    k, d = 4, 3
    actor = make_actor(script, k, score_step=score_step)
    obs, noise = torch.randn(1, 5).double(), torch.randn(k + 1, 1, d).double().requires_grad_()
    path = actor.rollout(obs, noise)[2]
    readout = torch.randn(d).double()
    gradient = torch.autograd.grad((path[-1] @ readout).sum(), path)  # dL/dA_i, L = readout . A_K

    sigma = (-1.5 + 3.5 * torch.tanh(actor.sigma_net(obs)))[0].exp()
    expected, identity = readout, torch.eye(d).double()
    for i in reversed(range(k)):
        t = i / k
        dv = jacobian(lambda a, t=t: actor.velocity(t, a[None], obs)[0], path[i][0].detach())
        step = identity + dv / k
        if score_step == "euler":  # b = v + sigma^2 (t v - A) / (2 (1 - t))
            step = step + (sigma**2 / (2 * (1 - t)))[:, None] * (t * dv - identity) / k
        if score_step == "exponential":  # rho I + (t_{i+1} - rho t_i) dv/dA
            rho = torch.exp(-(sigma**2) / (2 * k))
            step = torch.diag(rho) + (t + 1 / k - rho * t)[:, None] * dv
        expected = step.T @ expected
        torch.testing.assert_close(gradient[i][0], expected)


def test_more_steps_alone_do_not_make_it_explode(script):
    """|dL/dA_0| of one velocity tends to that of the differential equation as K grows."""
    actor = make_actor(script, score_step="none")
    obs, start, readout = torch.randn(6, 5).double(), torch.randn(1, 6, 3).double(), torch.randn(3).double()
    norms = []
    for k in (8, 64, 512):
        actor.flow_steps = k
        noise = torch.cat([start, torch.zeros(k, 6, 3)]).requires_grad_()
        path = actor.rollout(obs, noise)[2]
        (gradient,) = torch.autograd.grad((path[-1] @ readout).sum(), path[:1])
        norms.append(gradient.norm(dim=1))
    assert (norms[2] / readout.norm() - 1).abs().max() > 0.02
    torch.testing.assert_close(norms[1], norms[2], rtol=0.03, atol=0)
    assert (norms[1] - norms[2]).norm() < 0.3 * (norms[0] - norms[2]).norm()


@pytest.mark.parametrize("k", [1, 4, 16])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.5, 6.1])
def test_the_scores_factors_multiply_to_their_closed_form(script, k, sigma):
    """With v = 0 the rollout multiplies the gradient by a known number, h = sigma^2 / 2.

    Exponential: exp(-h), whatever K. Euler: prod (1 - h / (K - i)) = Gamma(K + 1 - h) / (Gamma(1 - h) Gamma(K + 1)),
    which is 0 at sigma = sqrt 2, in the last step, and of alternating sign and growing above.
    """

    def product(score_step):
        actor = hold_sigma(script.Actor(5, LOW, HIGH, flow_steps=k, score_step=score_step), sigma).double()
        actor.velocity_net.forward = lambda t, a, memory: torch.zeros_like(a)
        noise = torch.randn(k + 1, 6, 3).double().requires_grad_()
        path = actor.rollout(torch.randn(6, 5).double(), noise)[2]
        (gradient,) = torch.autograd.grad(path[-1].sum(), path[:1])
        assert gradient.max() - gradient.min() < 1e-6 * gradient.abs().max()
        return gradient[0, 0].item()

    h = sigma**2 / 2
    assert product("exponential") == pytest.approx(math.exp(-h), rel=1e-5)
    expected = math.gamma(k + 1 - h) / (math.gamma(1 - h) * math.gamma(k + 1))
    assert product("euler") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("entropy", ["last-step", "path"])
@pytest.mark.parametrize("score_step", ["exponential", "euler"])
def test_largest_entropy_is_that_of_the_largest_sigma(script, score_step, entropy):
    """-log_prob on average with sigma at e^2, the slope of the squash taken out."""
    k = 4
    actor = script.Actor(5, LOW, HIGH, flow_steps=k, score_step=score_step, entropy=entropy)
    nn.init.zeros_(actor.sigma_net[-1].weight)
    nn.init.constant_(actor.sigma_net[-1].bias, 100.0)
    noise = torch.randn(k + 1, 4000, 3)
    _, log_prob, path = actor.rollout(torch.randn(4000, 5), noise)
    log_slope = 2 * (math.log(2) - path[-1] - F.softplus(-2 * path[-1]))
    without_squash = log_prob + log_slope.sum(1)
    last = actor.step(k - 1, path[-2], path[-2], torch.full((1, 3), math.e**2))[1].log()
    of_action = (0.5 * math.log(2 * math.pi * math.e) + last).sum()
    uniform = torch.tensor(3 * math.log(2))
    assert of_action > uniform + 0.05  # what has bounds cannot have that much
    expected = uniform - of_action - without_squash.mean()
    assert expected.item() == pytest.approx(actor.largest_entropy(), abs=0.2)
    assert -log_prob.mean() < actor.largest_entropy()
    if entropy == "last-step":
        assert actor.largest_entropy() == pytest.approx(uniform.item())
    actor.step = lambda i, a, v, sigma: (a, torch.full_like(sigma, math.exp(-5.0)))  # far below the uniform's
    normal = 0.5 * math.log(2 * math.pi * math.e) - 5
    count = 1 if entropy == "last-step" else k
    start = 0 if entropy == "last-step" else 3 * (normal + 5)
    assert actor.largest_entropy() == pytest.approx(3 * count * normal + start, rel=1e-5)


def test_flow_g_step_is_a_gru_update():
    import sac_flow_g as script

    actor = make_actor(script, 4, score_step="none")
    velocity, dt, t, d = actor.velocity_net, 1 / 4, 0.5, 3
    obs, a = torch.randn(6, 5).double(), torch.randn(6, 3).double()
    nn.init.normal_(velocity.candidate.weight, std=0.05)
    hidden = F.silu(velocity.encode(actor.encoder(obs)) + velocity.from_action(a) + velocity.from_time(t))
    gate = torch.sigmoid(velocity.gate(hidden[:, :16]))
    candidate = velocity.candidate(hidden[:, 16:])
    assert candidate.abs().max() < 1  # a GRU's candidate is a tanh

    cell = nn.GRUCell(2 * d, d).double()
    for parameter in cell.parameters():
        nn.init.zeros_(parameter)
    nn.init.normal_(cell.weight_hh[2 * d :])  # the candidate reads the hidden state through the reset gate ...
    nn.init.constant_(cell.bias_hh[:d], 100.0)  # ... which is held open
    cell.weight_ih.data[d : 2 * d, :d] = torch.eye(d)
    cell.weight_ih.data[2 * d :, d:] = torch.eye(d)
    # PyTorch's update gate keeps: h' = (1 - z) n + z h, so z = 1 - dt g and n = vhat.
    inputs = torch.cat([torch.logit(1 - dt * gate), torch.atanh(candidate) - a @ cell.weight_hh[2 * d :].T], dim=1)
    torch.testing.assert_close(cell(inputs, a), a + dt * actor.velocity(t, a, obs))


@pytest.mark.parametrize("action_dim", [1, 3, 17])
def test_flow_t_starts_contractive(action_dim):
    """As the flags build it: dv/da is near -1, and in a state most of A_0 does not reach A_K."""
    import sac_flow_t as script

    low, high = -torch.ones(action_dim), torch.ones(action_dim)
    for seed in range(5):
        torch.manual_seed(seed)
        actor = script.make_actor(script.Args(), 11, low, high).eval()
        a = torch.randn(64, action_dim, requires_grad=True)
        obs = torch.randn(64, 11)
        v = actor.velocity(0.5, a, obs)
        slopes = [torch.autograd.grad(v[:, i].sum(), a, retain_graph=True)[0][:, i].mean() for i in range(action_dim)]
        assert -1.8 < torch.stack(slopes).mean() < -0.7
        noise = actor.draw_noise(500)
        noise[1:] = 0
        path = actor.rollout(obs[:1].expand(500, -1), noise)[2]
        assert path[-1].std(0).mean() < 0.4 < 0.9 < path[0].std(0).mean()


def test_a_velocity_that_is_too_narrow_for_a_contractive_start_is_refused():
    """Some directions of A_0 would pass: with fewer units than actions, W^T W is a projection onto some of them."""
    import sac_flow_t as script

    script.Velocity(5, 17, dim=17)
    script.Velocity(5, 17, dim=16, contractive=False)
    with pytest.raises(ValueError, match="17 .--velocity-dim., not 16"):
        script.Velocity(5, 17, dim=16)


def test_flow_g_starts_contractive():
    import sac_flow_g as script

    actor = script.Actor(5, LOW, HIGH)
    velocity, a = actor.velocity_net, torch.randn(6, 3)
    features = velocity.encode(actor.encoder(torch.randn(6, 5)))
    hidden = F.silu(features + velocity.from_action(a) + velocity.from_time(0.0))
    assert torch.allclose(torch.sigmoid(velocity.gate(hidden[:, :256])), torch.tensor(0.9933), atol=1e-4)
    noise = torch.cat([torch.randn(1, 6, 3), torch.zeros(4, 6, 3)]).requires_grad_()
    start, *_, end = actor.rollout(torch.randn(6, 5), noise)[2]
    rows = [torch.autograd.grad(end[:, d].sum(), start, retain_graph=True)[0] for d in range(3)]
    assert torch.linalg.matrix_norm(torch.stack(rows, dim=1), 2).max() < 0.8  # of the rollout; (1 - dt g)^4 is 0.32


@pytest.mark.parametrize("heads", [1, 4, 8])
def test_flow_t_cross_attention_equals_multihead_attention(heads):
    """Of one memory token, whatever queries, keys and heads are, and whatever the action token is."""
    import sac_flow_t as script

    layer, reference = script.DecoderLayer(16), nn.MultiheadAttention(16, heads, batch_first=True)
    reference.in_proj_weight.data[32:] = layer.value.weight.data  # queries and keys stay random
    reference.in_proj_bias.data = torch.cat([torch.randn(32), layer.value.bias.data])
    reference.out_proj.load_state_dict(layer.out.state_dict())
    query, memory = 10 * torch.randn(7, 1, 16), torch.randn(7, 16)
    expected, weights = reference(query, *2 * [layer.norm_memory(memory)[:, None]])
    assert torch.equal(weights, torch.ones(7, 1, 1))
    torch.testing.assert_close(layer.encode(memory), expected[:, 0])


def test_flow_t_layer_is_pre_norm():
    """y = phi + cross, phi' = y + FFN(LN(y)): a phi scaled up is normalised before the FFN sees it."""
    import sac_flow_t as script

    layer, phi, cross = script.DecoderLayer(16).double(), torch.randn(7, 16).double(), torch.randn(7, 16).double()
    y = phi + cross
    normalised = (y - y.mean(1, keepdim=True)) / (y.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    first, _, second = layer.ffn
    expected = y + second(F.silu(first(normalised)))
    torch.testing.assert_close(layer(phi, cross), expected)


def test_observation_is_encoded_once_per_rollout(script):
    actor, calls = make_actor(script, 8), []
    encode, sigma_net = actor.velocity_net.encode, actor.sigma_net.forward
    actor.velocity_net.encode = lambda obs: calls.append("memory") or encode(obs)
    actor.sigma_net.forward = lambda obs: calls.append("sigma") or sigma_net(obs)
    actor.rollout(torch.randn(2, 5).double(), torch.randn(9, 2, 3).double())
    assert sorted(calls) == ["memory", "sigma"]


@pytest.mark.parametrize("k", [2, 4, 8, 16])
def test_gradient_norms_stay_level_where_a_plain_velocitys_grow(k):
    """Largest over smallest |dL/dA_i| along the rollout, every weight matrix of the velocity scaled by 3.5.

    A step multiplies the gradient by I + dt J for the plain velocity and, the gate being open, by (1 - dt) I + dt J
    for Flow-G: over K steps a factor near e less growth for the same J. (With unscaled weights J is small and that
    factor is the whole ratio: Flow-G 3, plain 1.1. Gates pay when weights have grown.) Flow-T's read-out is
    normalised, so that scaling what comes before it does not scale J; its start is PyTorch's. Measured here, geometric
    mean over 40 seeds, K = 2, 4, 8, 16: Flow-G 2.3 to 2.5, Flow-T 1.2, plain 3.1 to 4.8. Hence the bound, 2.7.
    """

    def ratio(name, seed):
        torch.manual_seed(seed)
        script = importlib.import_module(name)
        steps = dict(flow_steps=k, score_step="none", encoder_dim=0, **PLAIN_START.get(name, {}))
        actor = script.Actor(17, [-1.0] * 6, [1.0] * 6, **steps)
        with torch.no_grad():
            for weight in actor.velocity_net.parameters():
                weight.mul_(3.5 if weight.ndim == 2 else 1)
        noise = torch.cat([torch.randn(1, 64, 6), torch.zeros(k, 64, 6)]).requires_grad_()
        path = actor.rollout(torch.randn(64, 17), noise)[2]
        gradients = torch.stack(torch.autograd.grad((path[-1] @ torch.randn(6)).sum(), path))
        norms = gradients.norm(dim=2).mean(1)
        return (norms.max() / norms.min()).log()

    mean_ratio = {name: torch.stack([ratio(name, seed) for seed in range(40)]).mean().exp() for name in FLOWS}
    assert mean_ratio["sac_flow_g"] < 2.7 and mean_ratio["sac_flow_t"] < 2.7 < mean_ratio["sac_flow_naive"]


def test_gaussian_density_is_that_of_torch_distributions():
    import sac_gaussian as script

    actor = script.Actor(5, LOW, HIGH, dim=16)
    for parameter in actor.parameters():
        nn.init.normal_(parameter, std=0.3)
    actor.double()
    obs = torch.randn(6, 5).double()
    action, log_prob, path = actor.rollout(obs, actor.draw_noise(6))
    mean, log_std = actor.net(obs).chunk(2, dim=1)
    gaussian = torch.distributions.Normal(mean, (-1.5 + 3.5 * log_std.tanh()).exp())
    squash = [
        torch.distributions.TanhTransform(cache_size=1),
        torch.distributions.AffineTransform(actor.bias, actor.scale),
    ]
    expected = torch.distributions.TransformedDistribution(gaussian, squash).log_prob(action).sum(1)
    torch.testing.assert_close(log_prob, expected + actor.scale.log().sum())  # of the action in [-1, 1]
    assert [a.shape for a in path] == [(6, 3)] and actor.target_entropy == -3
    assert actor.largest_entropy() == pytest.approx(3 * math.log(2))
    mode = actor.act(obs, deterministic=True)
    torch.testing.assert_close(mode, torch.tanh(mean) * actor.scale + actor.bias)


@pytest.mark.parametrize("name", [*FLOWS, "sac_gaussian"])
def test_the_unit_of_actions_changes_no_entropy(name):
    """Actions in [-1, 1] and in other bounds: the same log_prob, target and largest entropy."""
    script = importlib.import_module(name)
    found = []
    for low, high in ((3 * [-1.0], 3 * [1.0]), (LOW, HIGH)):
        torch.manual_seed(0)
        actor = script.Actor(5, low, high)
        _, log_prob, _ = actor.rollout(torch.randn(6, 5), actor.draw_noise(6))
        ends = torch.stack([actor.bias - actor.scale, actor.bias + actor.scale])  # of the squash
        torch.testing.assert_close(ends, torch.tensor([low, high]))
        found.append([*log_prob.tolist(), actor.target_entropy, actor.largest_entropy()])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("k", [1, 4, 16])
@pytest.mark.parametrize("score_step", SCORE_STEPS)
def test_default_target_entropy_is_that_of_one_sigma_whatever_k_is(script, k, score_step):
    """sigma 0.46 meets that of the path, but for what the squash takes away."""
    actor = hold_sigma(script.Actor(5, LOW, HIGH, flow_steps=k, score_step=score_step, entropy="path"), 0.46)
    noise = actor.draw_noise(4000)
    _, log_prob, path = actor.rollout(torch.randn(4000, 5), noise)
    squash = 2 * (math.log(2) - path[-1] - F.softplus(-2 * path[-1])).sum(1)
    assert (-log_prob - squash).mean().item() == pytest.approx(actor.target_entropy, abs=0.25)


@pytest.mark.parametrize("k", [1, 4, 5, 16, 100])
@pytest.mark.parametrize("score_step, sigma", [("exponential", 0.36), ("euler", 0.178), ("none", 0.178)])
def test_default_target_of_the_last_step_asks_for_one_sigma_from_four_steps_on(script, k, score_step, sigma):
    """-1 per dimension up to K = 4, where this sigma meets it; below what a policy can reach for any K."""
    actor = script.Actor(5, LOW, HIGH, flow_steps=k, score_step=score_step)
    assert actor.target_entropy == -3 if k <= 4 else actor.target_entropy < -3
    assert actor.target_entropy < actor.largest_entropy() - 3
    if k >= 4:
        assert actor.target_entropy == pytest.approx(actor.entropy_at(sigma), abs=0.05)


# --- the actor, copied ---


def test_shapes_are_checked(script):
    """Nine rows of noise for four steps once gave a wrong density without a word."""
    actor = script.Actor(11, [-1] * 3, [1] * 3)
    obs, noise = torch.randn(5, 11), torch.randn(5, 5, 3)
    for bad_obs, bad_noise in ((obs, torch.randn(9, 5, 3)), (obs[:, :4], noise), (obs[:1], noise), (obs[0], noise)):
        with pytest.raises(ValueError, match=r"rollout takes obs \(B, 11\) and noise \(5, "):
            actor.rollout(bad_obs, bad_noise)
    wrong = [([-1, -1], [1, torch.inf]), ([1, -1], [-1, 1]), ([0, 0], [0, 1]), ([], []), ([-3e38], [3e38])]
    wrong += [([-1], [1, 1]), ([-1, -1], [1]), (-1, 1)]  # which would broadcast
    for low, high in wrong:
        with pytest.raises(ValueError, match="finite bounds, low < high"):
            script.Actor(11, low, high)


@pytest.mark.parametrize("name", [*FLOWS, "sac_gaussian"])
def test_act_takes_one_observation_and_never_the_batchs_statistics(name):
    script = importlib.import_module(name)
    actor = script.Actor(11, [-1] * 3, [1] * 3, renorm=script.BatchRenorm)
    obs = 3 + torch.randn(5, 11)
    actor.norm(obs)  # statistics that are neither 0 nor 1
    expected = actor.eval().act(obs, deterministic=True)
    actor.train()
    before = {name: value.clone() for name, value in actor.state_dict().items()}
    assert torch.equal(actor.act(obs, deterministic=True), expected) and torch.equal(actor(obs), expected)
    torch.testing.assert_close(actor.act(obs[2], deterministic=True), expected[2])
    assert actor.act(obs[2]).shape == (3,)
    assert actor.norm.training and all(torch.equal(value, before[name]) for name, value in actor.state_dict().items())


@pytest.mark.parametrize("name", [*FLOWS, "sac_gaussian"])
def test_export_with_a_dynamic_batch(name):
    script = importlib.import_module(name)
    actor = script.Actor(11, [-1] * 3, [1] * 3, renorm=script.BatchRenorm).eval()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(actor, (torch.randn(4, 11),), dynamic_shapes=({0: batch},)).module()
    for size in (1, 7):
        obs = torch.randn(size, 11)
        torch.testing.assert_close(exported(obs), actor.act(obs, deterministic=True))


# --- from the flags ---


def test_flags_reach_the_actor(script):
    args = script.Args(flow_steps=3, score_step="none", entropy="path", sigma_dim=8, encoder_dim=24)
    actor = script.make_actor(args, 5, LOW, HIGH)
    assert (actor.flow_steps, actor.score_step, actor.entropy) == (3, "none", "path")
    assert actor.sigma_net[0].out_features == 8 and actor.encoder[0].out_features == 24
    without = script.make_actor(script.Args(encoder_dim=0), 5, LOW, HIGH)
    assert without.velocity_net.from_obs.in_features == 5 and not list(without.encoder.parameters())
    assert without.act(torch.randn(5)).shape == (3,)
    assert without.target_entropy == -3  # -1 for each, in units of its range


@pytest.mark.parametrize("wrong", [dict(score_step="eulr"), dict(entropy="action")])
def test_words_the_actor_does_not_know_are_refused(script, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        script.Actor(5, LOW, HIGH, **wrong)
