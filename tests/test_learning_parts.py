"""What surrounds the flow: BatchRenorm, replay buffer, losses, alpha."""

import copy

import numpy as np
import pytest
import torch
from helpers import FixedPolicy, Table, needs_cuda
from torch import nn


def reference_renorm(x, norm, mean, var):
    """Batch renormalisation as its paper writes it, one step after the other; returns y and the new statistics."""
    batch_mean, batch_std = x.mean(0), (x.var(0, unbiased=False) + norm.eps).sqrt()
    running_std = (var + norm.eps).sqrt()
    r, d = torch.ones_like(mean), torch.zeros_like(mean)
    if norm.batches >= norm.warmup:
        r = (batch_std / running_std).clamp(1 / 3, 3).detach()
        d = ((batch_mean - mean) / running_std).clamp(-5, 5).detach()
    y = ((x - batch_mean) / batch_std * r + d) * norm.weight + norm.bias
    weight = max(0.01, 1 / (int(norm.batches) + 1))
    new_mean = (1 - weight) * mean + weight * batch_mean.detach()
    return y, new_mean, (1 - weight) * var + weight * x.var(0, unbiased=False).detach()


@pytest.mark.parametrize("shift", [0.3, 30.0])  # the second clips r and d
@pytest.mark.parametrize("warmup", [0, 2, 100])  # at 2 the last of three batches is past the switch
def test_batch_renorm_matches_a_straightforward_reference(shared, warmup, shift):
    norm = shared.BatchRenorm(6, warmup=warmup).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    for _ in range(3):
        x = (shift + shift * torch.randn(32, 6)).double().requires_grad_()
        mean, var = norm.running_mean.clone(), norm.running_var.clone()
        expected, mean, var = reference_renorm(x, norm, mean, var)
        weights = torch.randn(32, 6).double()
        expected_gradient = torch.autograd.grad((expected * weights).sum(), [x, norm.weight, norm.bias])
        y = norm(x)
        torch.testing.assert_close(y, expected)
        gradient = torch.autograd.grad((y * weights).sum(), [x, norm.weight, norm.bias])
        torch.testing.assert_close(gradient, expected_gradient)
        torch.testing.assert_close((norm.running_mean, norm.running_var), (mean, var))
    norm.eval()
    expected = (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close((norm.running_mean, norm.running_var), (mean, var))  # evaluation changes nothing


@pytest.mark.parametrize("n", [1, 2, 50, 5000])
def test_batch_renorm_statistics_are_means_of_all_batches_then_moving_ones(shared, n):
    """The mean of the first 100 batches, from which the moving average with momentum 0.99 goes on."""
    norm, x = shared.BatchRenorm(3).double(), 7 * torch.randn(n, 8, 3).double() - 20
    for batch in x:
        norm(batch)
    for running, values in ((norm.running_mean, x.mean(1)), (norm.running_var, x.var(1, correction=0))):
        weights = 0.01 * 0.99 ** torch.arange(n - 1, -1, -1).double()
        weights[:100] = 0.99 ** max(0, n - 100) / min(n, 100)
        torch.testing.assert_close(weights.sum().item(), 1.0)
        torch.testing.assert_close(running, weights @ values)


def test_batch_renorm_stays_batch_norm_unless_a_flag_says_when_to_switch(shared):
    x = 5 + torch.randn(64, 4)
    for flags, switched in (({}, False), ({"renorm_warmup": 100_000}, True)):
        norm = shared.renorm_of(shared.Args(**flags))(4)
        norm(x)
        norm.batches.fill_(10**9)
        assert (norm(x + 20).mean().item() > 3) == switched


def test_batch_renorm_keeps_its_precision_far_from_0(shared):
    norm, x = shared.BatchRenorm(3), torch.tensor([1000.0, -300.0, 5.0]) + 0.1 * torch.randn(256, 3)
    x[:, 2] = 5.0  # a feature that never changes
    for _ in range(1500):
        norm(x)
    expected = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-3).sqrt()
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=5e-3)  # a unit in the last place of 1000 is 6e-5
    norm, x = shared.BatchRenorm(1), torch.full((256, 1), 5e4)  # float32 has no digits to spare
    assert norm(x).isfinite().all() and norm.running_var >= 0


def test_batch_renorm_is_batch_norm_while_r_is_1_and_d_is_0(shared):
    norm, reference = shared.BatchRenorm(6), nn.BatchNorm1d(6, eps=1e-3, momentum=None)  # None: cumulative
    for _ in range(5):
        x = 3 + 2 * torch.randn(32, 6)
        torch.testing.assert_close(norm(x), reference(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_mean, reference.running_mean)
    reference.running_var.copy_(norm.running_var)  # PyTorch's running variance is the unbiased one
    torch.testing.assert_close(norm.eval()(x), reference.eval()(x), rtol=1e-4, atol=1e-5)


def test_replay_buffer_wraps_around(shared):
    buffer = shared.ReplayBuffer(8, 2, 3, torch.device("cpu"))
    for i in range(1, 14):
        buffer.add(np.full(2, i), np.full(3, 10 * i), 100 * i, i % 2 == 0, np.full(2, i + 1))
        assert len(buffer) == min(i, 8)
    obs, action, reward, terminated, next_obs = buffer.sample(1000)
    assert obs.shape == next_obs.shape == (1000, 2) and action.shape == (1000, 3)
    assert reward.shape == terminated.shape == (1000,)
    assert set(obs[:, 0].tolist()) == set(range(6, 14))  # the last 8 and all of them
    assert torch.equal(action[:, 2], 10 * obs[:, 0]) and torch.equal(reward, 100 * obs[:, 0])
    assert torch.equal(terminated, (obs[:, 0] % 2 == 0).float()) and torch.equal(next_obs, obs + 1)


@pytest.mark.parametrize("entropy, direction", [(3.0, -1), (-3.0, 1)])
def test_alpha_moves_the_entropy_towards_its_target(shared, entropy, direction):
    log_alpha = nn.Parameter(torch.tensor(-2.0))
    for target in (0.0, -2.0, 2.0):  # below and above, whatever the target
        before = log_alpha.item()
        loss = shared.alpha_loss(log_alpha, torch.tensor(-(target + entropy)), target)
        shared.apply_gradients(torch.optim.Adam([log_alpha], lr=1e-2), torch.autograd.grad(loss, [log_alpha]))
        assert direction * (log_alpha.item() - before) > 0  # too little entropy raises alpha, too much lowers it


@pytest.mark.parametrize("crossq", [True, False])
def test_critic_loss_bootstraps_truncated_but_not_terminated_transitions(shared, crossq):
    """The larger of the twin critics is the first where s' is 2, the second where it is -2."""
    critics, targets = nn.ModuleList([Table(2.0), Table(1.0)]), nn.ModuleList([Table(4.0), Table(3.0)])
    obs, next_obs = torch.ones(3, 1), torch.tensor([[2.0], [2.0], [-2.0]])
    batch = [obs, torch.zeros(3, 1), torch.full((3,), 5.0), torch.tensor([0.0, 1.0, 0.0]), next_obs]
    loss, q = shared.critic_loss(FixedPolicy(), critics, None if crossq else targets, batch, None, 0.1, 0.9)
    small, large = (1.0, 2.0) if crossq else (3.0, 4.0)
    # a' = s', so Q' is 4 or -4 times the scale; log_prob' is 20 or -20.
    y = torch.tensor([5 + 0.9 * (4 * small - 0.1 * 20), 5.0, 5 + 0.9 * (-4 * large + 0.1 * 20)])
    expected = sum(((scale - y) ** 2 / 2).mean() for scale in (1.0, 2.0))
    torch.testing.assert_close(loss, expected)
    assert q == 1.5
    loss.backward()
    torch.testing.assert_close(critics[0].scale.grad, (2.0 - y).mean())  # through Q(s, a) alone, not the target


def test_each_layer_of_a_critic_reads_what_is_normalised(shared):
    critic, read = shared.Critic(2, 1, 8, shared.BatchRenorm), []
    layers = [layer for layer in critic.net if isinstance(layer, nn.Linear)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    critic(3 + torch.randn(64, 2), torch.rand(64, 1))
    assert len(read) == len(layers) == 3
    for x in read:
        torch.testing.assert_close(x.mean(0), torch.zeros_like(x[0]), atol=1e-4, rtol=0)


def test_crossq_forward_is_joint(shared):
    """The critics' statistics are those of (s, a) and (s', a') together, and are updated once per update."""
    renorm = shared.BatchRenorm
    critics = nn.ModuleList(shared.Critic(2, 1, 8, renorm) for _ in range(2))
    actor = shared.Actor(2, [-1.0], [1.0], renorm=renorm).eval()
    batch = [torch.randn(64, 2), torch.rand(64, 1), torch.zeros(64), torch.zeros(64), 5 + torch.randn(64, 2)]
    shared.critic_loss(actor, critics, None, batch, torch.randn(5, 64, 1), 0.1, 0.99)
    first = critics[0].net[0]
    expected = torch.cat([batch[0], batch[4]]).mean(0)
    torch.testing.assert_close(first.running_mean[:2], expected)
    assert first.batches == 1 and actor.norm.batches == 0


def test_actor_loss_flows_through_every_step(script):
    actor, critics = script.Actor(2, [-1.0], [1.0]), nn.ModuleList(script.Critic(2, 1, 8) for _ in range(2))
    obs, noise = torch.randn(16, 2), torch.randn(5, 16, 1)
    with torch.no_grad():  # so that each critic is the smaller one somewhere
        action, *_ = actor.rollout(obs, noise)
        critics[1].net[-1].bias += (critics[0](obs, action) - critics[1](obs, action)).median()
    loss, log_prob, *path = script.actor_loss(actor, critics, obs, noise, 0.1)
    action, expected_log_prob, expected_path = actor.rollout(obs, noise)
    torch.testing.assert_close(path, expected_path)
    both = [critic(obs, action) for critic in critics]
    q = torch.minimum(*both)
    assert 0 < (q < both[0]).sum() < 16
    torch.testing.assert_close(loss, (0.1 * expected_log_prob - q).mean())
    torch.testing.assert_close(log_prob, expected_log_prob.mean())
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in actor.parameters())


def test_gradient_norms_are_those_that_the_update_sees(script):
    """Of the loss with the batch's statistics, which are not those that run; nothing is changed by measuring."""
    actor = script.Actor(2, [-1.0], [1.0], renorm=script.BatchRenorm).eval()
    critics = nn.ModuleList(script.Critic(2, 1, 8, script.BatchRenorm) for _ in range(2))
    obs, noise = 3 + 7 * torch.randn(16, 2), torch.randn(5, 16, 1)
    before = copy.deepcopy([actor.state_dict(), critics.state_dict()])
    norms = script.gradient_norms(actor, critics, obs, noise.clone(), 0.1)
    torch.testing.assert_close([actor.state_dict(), critics.state_dict()], before, rtol=0, atol=0)
    assert critics.training and not actor.training and not actor.norm.training

    def expected():
        """By each observation's own loss."""
        action, log_prob, path = actor.rollout(obs, noise.requires_grad_())
        q = torch.minimum(critics[0](obs, action), critics[1](obs, action))
        return torch.stack([g.norm(dim=1).mean() for g in torch.autograd.grad((0.1 * log_prob - q).sum(), path)])

    critics.eval()
    assert not torch.allclose(norms, expected(), rtol=0.05)
    actor.norm.train()
    torch.testing.assert_close(norms, expected())


def test_gradients_are_those_of_the_losses_alone(script):
    renorm = script.BatchRenorm
    actor = script.Actor(2, [-1.0], [1.0], renorm=renorm).eval()
    critics = nn.ModuleList(script.Critic(2, 1, 8, renorm) for _ in range(2))
    batch = [torch.randn(16, 2), torch.rand(16, 1), torch.randn(16), torch.zeros(16), torch.randn(16, 2)]
    noise = torch.randn(5, 16, 1)
    for loss, network, inputs in (
        (script.critic_loss, critics, (actor, critics, None, batch, noise, 0.1, 0.99)),
        (script.actor_loss, actor, (actor, critics, batch[0], noise, 0.1)),
    ):
        start = copy.deepcopy([actor.state_dict(), critics.state_dict()])
        value, *rest = loss(*inputs)
        value.backward()
        expected = [parameter.grad.clone() for parameter in network.parameters()]
        actor.zero_grad()
        critics.zero_grad()
        for part, state in zip((actor, critics), start, strict=True):
            part.load_state_dict(state)  # the running statistics before the loss
        found = script.with_gradients(loss, network)(*inputs)
        rest = [part.detach() for part in rest if part.ndim == 0]
        torch.testing.assert_close(found, (value.detach(), *rest, tuple(expected)))
        assert not any(part.requires_grad for part in found[:-1])
        assert not any(p.grad is not None for part in (actor, critics) for p in part.parameters())


def a_small_update(script, device):
    """An update in the style of the scripts': it draws from the buffer and the generator and works in place."""
    buffer = script.ReplayBuffer(50, 2, 1, device)
    for i in range(40):
        buffer.add(np.full(2, i / 40), [0.5], 0.0, False, np.zeros(2))
    critic, losses = script.Critic(2, 1, 8, script.BatchRenorm).to(device), torch.zeros(1, device=device)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2, fused=True, capturable=True)

    def update():
        obs, action, *_ = buffer.sample(16)
        loss = (critic(obs, action) - torch.randn(16, device=device)).square().mean()
        script.apply_gradients(optimizer, torch.autograd.grad(loss, list(critic.parameters())))
        losses[:] = loss.detach()

    return update, critic, losses


def test_gradients_with_padded_rows(script):
    """As compiled products give them on a GPU, where the fused Adam refuses them; on the CPU it misreads them."""
    gradient = torch.randn(8, 12)[:, :11]
    weights = []
    for layout in (gradient, gradient.clone(memory_format=torch.contiguous_format)):
        weight = nn.Parameter(torch.zeros(8, 11))
        script.apply_gradients(torch.optim.Adam([weight], fused=True), [layout])
        weights.append(weight)
    assert torch.equal(*weights)


@needs_cuda
def test_cuda_graph_is_the_plain_update(shared):
    """Eight updates, plain and as a graph, from one seed; and the generator is left at the same place."""
    results = []
    for wrap in (lambda function: function, shared.CudaGraph):
        torch.manual_seed(0)
        update, critic, losses = a_small_update(shared, torch.device("cuda"))
        update = wrap(update)
        history = []
        for _ in range(8):
            update()
            history.append(losses.clone())
        results.append((torch.cat(history), critic.state_dict(), torch.randn(3, device="cuda")))
    torch.testing.assert_close(results[1], results[0])
    assert results[0][0].unique().numel() == 8  # every replay drew anew


def test_buffer_draws_from_what_is_filled(shared):
    """Also after the length has changed, which a CUDA graph reads from `size`."""
    buffer = shared.ReplayBuffer(50, 1, 1, torch.device("cpu"))
    for i in range(3):
        buffer.add([i], [0.0], 0.0, False, [0.0])
        assert set(buffer.sample(200)[0].flatten().tolist()) == set(range(i + 1))
    other = shared.ReplayBuffer(50, 1, 1, torch.device("cpu"))
    state = buffer.state_dict()
    other.load_state_dict(state)
    assert set(other.sample(200)[0].flatten().tolist()) == {0, 1, 2}
    rows = state["rows"]
    assert rows.untyped_storage().nbytes() == 4 * rows.numel()  # a view's whole buffer would be saved


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_matmul_precision_does_not_round(shared, device):
    """The products are float32, whichever library computes them; and no random number is drawn."""
    before = torch.get_float32_matmul_precision()
    try:
        state = torch.get_rng_state()
        shared.set_matmul_precision(torch.device(device))
        assert torch.equal(torch.get_rng_state(), state)
        x, y = torch.rand(2, 256, 256, device=device)
        torch.testing.assert_close(x @ y, (x.double() @ y.double()).float(), rtol=5e-6, atol=0)
    finally:
        torch.set_float32_matmul_precision(before)


def test_compiled_functions_are_unguarded_and_those_of_their_own_run(monkeypatch):
    """find_compiler is the same text in every script."""
    import sac_flow_g as script

    def scaled(x, k):
        return x * k

    def times(n):
        def function(x):
            return n * x

        return function

    options, compile = [], torch.compile

    def recording_compile(*args, **keywords):
        options.append(dict(keywords.get("options", {})))
        return compile(*args, **keywords)

    monkeypatch.setattr(torch, "compile", recording_compile)
    x = torch.ones(3)
    for k in (2, 3):  # of two runs in one process, the second does not meet what was compiled for the first
        jit = script.find_compiler(torch.device("cpu"))
        jit(lambda x: x + x)
        assert torch.equal(jit(scaled)(x, k), k * x)
        first, second = (jit(times(n)) for n in (k, k + 5))  # two closures of one text
        assert torch.equal(first(x), k * x) and torch.equal(second(x), (k + 5) * x)
    for kept in options[1:5] + options[6:10]:  # 0 and 5 try the compiler
        assert kept["guard_filter_fn"](["a guard"]) == [False]
