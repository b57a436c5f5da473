"""benchmark/controls/ablation.py: each variant is what it claims, and differs from the one before in nothing else."""

import copy
import csv
import json
import math

import ablation
import pytest
import sac_flow_naive
import torch
from helpers import SMALL, assert_same, checkpoint
from torch import nn
from torch.autograd.functional import jacobian
from torch.distributions import Normal, TanhTransform

K = 4
LOW, HIGH = [-0.4, -3.0, 0.0], [0.4, 1.0, 5.0]  # unequal bounds, one of them not symmetric
VARIANTS = list(ablation.VARIANTS)
OWN_SIGMA = ["sigma", "renorm", "time", "authors", "authors-no-time", "authors-clipped"]
TIME_INSIDE = ["time", "authors", "authors-clipped", "flow-g-time"]  # t goes through the BatchRenorm
ONE_BATCH = ["plain", "sigma", "flow-g", "clipped"]  # an update's, for the actor's BatchRenorm; the others see K


def make_actor(variant, dim=16, warmup=100_000):
    """A variant's actor of 5 observations and 3 actions, as the program makes it."""
    sizes = dict(velocity_dim=dim, sigma_dim=16, encoder_dim=16)
    score_step = "none" if variant in OWN_SIGMA else "exponential"
    args = ablation.Args(variant=variant, flow_steps=K, score_step=score_step, renorm_warmup=warmup, **sizes)
    return ablation.make_actor(args, 5, LOW, HIGH)


def make_critics():
    return nn.ModuleList(sac_flow_naive.Critic(5, 3, 8, sac_flow_naive.BatchRenorm) for _ in range(2))


def trained(variant, std=0.3):
    """The same in double precision, every weight random; its BatchRenorm has seen 200 updates and normalises by it."""
    actor = make_actor(variant)
    actor.norm.train()
    for _ in range(200):
        actor.rollout(3 + 7 * torch.randn(64, 5), actor.draw_noise(64))
    for parameter in actor.parameters():
        nn.init.normal_(parameter, std=std)
    actor.norm.eval()
    return actor.double()


def column(actor, t, rows):
    """t as a column, and normalised as the last feature under the BatchRenorm."""
    t = torch.full((rows, 1), t).double()
    norm = actor.norm
    return t, (t - norm.running_mean[-1]) / (norm.running_var[-1] + norm.eps).sqrt() * norm.weight[-1] + norm.bias[-1]


def mean_and_deviation(variant, actor, i, a, obs):
    """Of A_{i+1} given A_i = a, written out from what the variant claims."""
    t, normalised_t = column(actor, i / K, len(a))
    norm = actor.norm
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    s = (obs - norm.running_mean[:5]) * scale[:5] + norm.bias[:5]
    network = actor.velocity_net
    if variant in OWN_SIGMA:
        if variant != "sigma":
            a_in = (a - norm.running_mean[5:8]) * scale[5:8] + norm.bias[5:8]
        else:
            a_in = a
        if variant in TIME_INSIDE:
            t = normalised_t
        if variant.startswith("authors"):
            first, second, last = network.net[::2]
            out = last(second(first(torch.cat([s, a_in, t], 1)).relu()).relu())
        else:
            time = normalised_t * network.from_time.weight.T if variant == "time" else network.from_time(t)
            hidden = network.from_obs(actor.encoder(s)) + a_in @ network.from_action.weight.T + time
            out = network.out(hidden * hidden.sigmoid())
        v, log_sigma = out[:, :3], out[:, 3:]
        return a + v / K, (3.5 * log_sigma.tanh() - 1.5).exp()
    time = network.from_time(t)
    if variant == "flow-g-time":
        time = normalised_t * network.from_time.weight.T
    a_in = (
        (a - norm.running_mean[5:8]) * scale[5:8] + norm.bias[5:8] if variant in ("flow-g-renorm", "flow-g-time") else a
    )
    hidden = network.from_obs(actor.encoder(s)) + a_in @ network.from_action.weight.T + time
    hidden = hidden * hidden.sigmoid()
    if variant.startswith("flow-g"):
        gate = network.gate(hidden[:, : hidden.shape[1] // 2]).sigmoid()
        v = gate * (network.candidate(hidden[:, hidden.shape[1] // 2 :]) - a)
    else:
        v = network.out(hidden)
    sigma = (3.5 * actor.sigma_net(s).tanh() - 1.5).exp()
    t = i / K
    rho = (-(sigma**2) / K / 2).exp()
    return (t + 1 / K) * v + rho * (a - t * v), ((1 - t) * (1 - rho**2)).sqrt()


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_step_and_its_density_are_what_the_variant_claims(variant):
    actor = trained(variant)
    obs, noise = 3 + 7 * torch.randn(6, 5).double(), torch.randn(K + 1, 6, 3).double()
    action, log_prob, path = actor.rollout(obs, noise)
    expected = Normal(0, 1).log_prob(path[0])
    for i in range(K):
        mean, deviation = mean_and_deviation(variant, actor, i, path[i], obs)
        torch.testing.assert_close(path[i + 1], mean + deviation * noise[i + 1])
        expected = expected + Normal(mean, deviation).log_prob(path[i + 1])
    tanh = TanhTransform()
    torch.testing.assert_close(action, tanh(path[-1]) * actor.scale + actor.bias)
    squashed = tanh.log_abs_det_jacobian(path[-1], tanh(path[-1]))
    torch.testing.assert_close(log_prob, (expected - squashed).sum(1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_prob_is_the_density_of_the_map_from_noise_to_path(variant):
    actor = trained(variant)
    obs, noise = torch.randn(1, 5).double(), torch.randn(K + 1, 1, 3).double()

    def path_and_action(flat):
        action, _, path = actor.rollout(obs, flat.view(K + 1, 1, 3))
        return torch.cat([*path[:-1], (action - actor.bias) / actor.scale]).flatten()

    actor.clipped = False  # or its Jacobian would be that of the limited backward pass
    log_det = torch.linalg.slogdet(jacobian(path_and_action, noise.flatten())).logabsdet
    expected = Normal(0, 1).log_prob(noise).sum() - log_det
    torch.testing.assert_close(actor.rollout(obs, noise)[1][0], expected, rtol=1e-7, atol=0)


NORM = {"norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"}
SIGMA_NET = {f"sigma_net.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
HERE = {f"velocity_net.{part}" for part in "from_obs.weight from_obs.bias from_action.weight".split()}
HERE |= {f"velocity_net.{part}" for part in "from_time.weight out.weight out.bias".split()}
ENCODER = {"encoder.0.weight", "encoder.0.bias"}
THEIRS = {f"velocity_net.net.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
TIME = {"velocity_net.from_time.weight", "velocity_net.from_time.linear.weight"}


@pytest.mark.parametrize(
    "variant, before, differs",
    [
        ("sigma", "plain", SIGMA_NET | {"velocity_net.out.weight", "velocity_net.out.bias"}),
        ("renorm", "sigma", NORM),
        ("time", "renorm", NORM | TIME),
        ("authors", "time", THEIRS | HERE | ENCODER),
        ("authors-no-time", "authors", NORM),
        ("flow-g-renorm", "flow-g", NORM),
        ("flow-g-time", "flow-g-renorm", NORM | TIME),
        ("clipped", "plain", set()),
        ("authors-clipped", "authors", set()),
    ],
)
def test_what_differs_from_the_variant_before(variant, before, differs):
    """Parameters and buffers that are there in one alone or of another size; and the entropy that is asked for."""
    actors = [make_actor(name) for name in (variant, before)]
    shapes = [{name: tensor.shape for name, tensor in actor.state_dict().items()} for actor in actors]
    assert {name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name)} == differs
    features = {"renorm": 5 + 3, "time": 5 + 3 + 1, "authors-no-time": 5 + 3}
    features |= {"flow-g-renorm": 5 + 3, "flow-g-time": 5 + 3 + 1}
    assert features.get(variant, len(actors[1].norm.weight)) == len(actors[0].norm.weight)
    assert actors[0].target_entropy == pytest.approx(actors[1].target_entropy)


def seen_by_the_network(actor, obs, noise):
    """(s, A, t) of every step of a rollout, as the velocity's network is given them."""
    seen = []
    hook = actor.velocity_net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    actor.rollout(obs, noise)
    hook.remove()
    return [(features, a, torch.as_tensor(t)) for t, a, features in seen]


@pytest.mark.parametrize("warmup", [100_000, 8])
@pytest.mark.parametrize("variant", TIME_INSIDE)
def test_time_under_the_batch_renorm_is_0_in_training_and_large_in_acting(variant, warmup):
    """Before and after the switch, as with the authors' shift by the batch's own deviation."""
    actor = make_actor(variant, warmup=warmup)
    actor.norm.train()
    for _ in range(50):
        actor.rollout(torch.randn(64, 5), actor.draw_noise(64))
    assert (actor.norm.batches > actor.norm.warmup) == (warmup == 8)
    obs, noise = torch.randn(64, 5), actor.draw_noise(64)
    training = [t for *_, t in seen_by_the_network(actor, obs, noise)]
    torch.testing.assert_close(torch.cat(training, 1), torch.zeros(64, K), atol=1e-5, rtol=0)
    actor.norm.eval()
    acting = [t for *_, t in seen_by_the_network(actor, obs, noise)]
    # Mean 0.375 and variance 0 of t = 0, 0.25, 0.5, 0.75, as running statistics have them, and eps 1e-3.
    expected = (torch.tensor([0, 0.25, 0.5, 0.75]) - 0.375) / math.sqrt(1e-3)
    torch.testing.assert_close(torch.cat(acting, 1), expected.expand(64, K), atol=1.0, rtol=0)


def test_their_batch_renorm_is_ours_where_a_batch_varies():
    """Before the switch, and after it to within eps; what is constant is 0 in theirs and not in ours."""
    for warmup in (1000, 5):
        ours, theirs = sac_flow_naive.BatchRenorm(3, warmup=warmup), ablation.TheirRenorm(3, warmup=warmup)
        for i in range(20):
            x = torch.randn(64, 3) * torch.tensor([1.0, 30.0, 0.0]) + torch.tensor([2.0, -5.0, 0.1 * (i % 4)])
            y, z = ours(x), theirs(x)
            assert_same(ours.state_dict(), theirs.state_dict())
        torch.testing.assert_close(y[:, :2], z[:, :2], rtol=1e-2, atol=2e-3)
        assert z[:, 2].abs().max() < 1e-3
        assert (y[:, 2].abs().max() > 1) == (warmup == 5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_variants_switch_at_the_same_update(variant):
    """After a K-th of the critics' batches, as the authors' does: here with the second update of the actor."""
    actor = make_actor(variant, warmup=2 * K)
    switched = []
    actor.norm.train()
    for _ in range(4):
        switched.append(bool(actor.norm.batches >= actor.norm.warmup))
        actor.rollout(torch.randn(8, 5), actor.draw_noise(8))
    assert switched == [False, False, True, True]


@pytest.mark.parametrize("variant", ["sigma", "renorm", "authors-no-time", "flow-g-renorm"])
def test_time_beside_the_batch_renorm_is_the_same_in_training_and_acting(variant):
    actor = make_actor(variant)
    for training in (True, False):
        actor.norm.train(training)
        seen = [t for *_, t in seen_by_the_network(actor, torch.randn(64, 5), actor.draw_noise(64))]
        torch.testing.assert_close(torch.cat(seen, 1), torch.tensor([0, 0.25, 0.5, 0.75]).expand(64, K))


@pytest.mark.parametrize("variant", [*OWN_SIGMA, "flow-g-renorm", "flow-g-time"])
def test_actions_under_the_batch_renorm(variant):
    """In training each step's A has mean 0 and deviation 1, but in `sigma`, where it comes as it is."""
    actor = make_actor(variant)
    actor.norm.train()
    noise = 5 + 3 * actor.draw_noise(64)
    actions = [a for _, a, _ in seen_by_the_network(actor, torch.randn(64, 5), noise)]
    for a in actions:
        normalised = a.mean(0).abs().max() < 1e-3 and (a.std(0, correction=0) - 1).abs().max() < 1e-2
        assert normalised == (variant != "sigma")


def test_the_authors_network_starts_as_flax_starts_it():
    net = make_actor("authors", dim=512).velocity_net.net
    assert [type(layer) for layer in net[1::2]] == [nn.ReLU, nn.ReLU]
    for layer, (inputs, outputs) in zip(net[::2], [(9, 512), (512, 512), (512, 6)], strict=True):
        assert layer.weight.shape == (outputs, inputs) and not layer.bias.any()
        assert layer.weight.std().item() == pytest.approx(inputs**-0.5, rel=0.05)
        assert 2 < (layer.weight.abs().max() * inputs**0.5).item() < 2.28  # cut off at two of the wider deviations


@pytest.mark.parametrize("variant", VARIANTS)
def test_batches_per_update(variant):
    """As `batches_per_update` says: what the warm-up counts."""
    actor = make_actor(variant)
    actor.norm.train()
    actor.rollout(torch.randn(8, 5), actor.draw_noise(8))
    expected = 1 if variant in ONE_BATCH else K
    assert actor.norm.batches == expected == ablation.batches_per_update(actor)


# --- the limited backward pass ---


@pytest.mark.parametrize("variant, free", [("clipped", "plain"), ("authors-clipped", "authors")])
@pytest.mark.parametrize("training", [True, False])
def test_clipped_forward_is_bit_equal(variant, free, training):
    limited, actor = make_actor(variant), make_actor(free)
    limited.load_state_dict(actor.state_dict())
    limited.norm.train(training)
    actor.norm.train(training)
    obs, noise = torch.randn(64, 5), actor.draw_noise(64)
    assert_same(list(limited.rollout(obs, noise)), list(actor.rollout(obs, noise)))


def test_clipped_backward_is_the_recursion_written_out():
    """g_K = dL/dA_K, g_i = J_i^T g_{i+1}, shortened to |g_{i+1}| if longer; at step i v's parameters get g_{i+1}."""
    actor = trained("clipped", std=1.0)
    for parameter in actor.norm.parameters():
        nn.init.ones_(parameter)
    obs, noise = torch.randn(32, 5).double(), torch.randn(K + 1, 32, 3).double()
    weights = list(actor.velocity_net.parameters())

    def loss_of(action, log_prob):
        return (action.sin().sum(1) + 0.3 * log_prob).sum()

    action, log_prob, path = actor.rollout(obs, noise.requires_grad_())
    found = torch.autograd.grad(loss_of(action, log_prob), [*path, *weights])

    sizes = dict(sigma_dim=16, encoder_dim=16)
    free = ablation.naive.Actor(5, LOW, HIGH, flow_steps=K, **sizes, dim=16, renorm=sac_flow_naive.BatchRenorm)
    free.double().eval().load_state_dict(actor.state_dict())
    end = path[-1].detach().requires_grad_()
    tanh = TanhTransform()
    log_density = -tanh.log_abs_det_jacobian(end, tanh(end)).sum(1)
    (g,) = torch.autograd.grad(loss_of(end.tanh() * free.scale + free.bias, log_density), end)
    expected = [g]
    parameters = [torch.zeros_like(weight) for weight in weights]
    sigma = ablation.bounded(free.sigma_net(free.norm(obs))).detach()
    shortened = 0
    for i in reversed(range(K)):
        a = path[i].detach().requires_grad_()
        mean, _ = free.step(i, a, free.velocity(i / K, a, obs), sigma)
        g, *of_weights = torch.autograd.grad((mean * g).sum(), [a, *free.velocity_net.parameters()])
        parameters = [total + part for total, part in zip(parameters, of_weights, strict=True)]
        limit = expected[0].norm(dim=1, keepdim=True)
        norm = g.norm(dim=1, keepdim=True)
        shortened += (norm > limit).sum()
        g = torch.where(norm > limit, g * limit / norm, g)
        expected.insert(0, g)
    assert 0 < shortened < K * 32  # some are, some are not
    torch.testing.assert_close(list(found), [*expected, *parameters])


@pytest.mark.parametrize("variant", ["clipped", "authors-clipped"])
def test_clipped_gradients_never_grow_on_the_way_back(variant):
    """Of the update's own gradient, with statistics of the batch; without the limit they do, for most of the batch."""
    actor = make_actor(variant)
    for parameter in actor.velocity_net.parameters():
        parameter.data *= 8
    actor.norm.train()
    obs, noise = torch.randn(64, 5), actor.draw_noise(64).requires_grad_()

    def norms():
        loss, _, *path = sac_flow_naive.actor_loss(actor, critics, obs, noise, 0.1)
        return torch.stack(torch.autograd.grad(loss, path)).norm(dim=2)

    critics = make_critics().eval()
    limited = norms()
    assert (limited[:-1] <= limited[1:] * (1 + 1e-5)).all() and (limited > 0).all()
    actor.clipped = False
    free = norms()
    assert (free[0] > 1.1 * free[K]).float().mean() > 0.5


# --- norms ---


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_norms_of_both_kinds_of_statistics(variant):
    actor, critics = make_actor(variant).eval(), make_critics()
    obs, noise = 3 + 7 * torch.randn(16, 5), actor.draw_noise(16)
    before = copy.deepcopy([actor.state_dict(), critics.state_dict()])
    kinds = ("batch", "running", "free")
    batch, running, free = (ablation.gradient_norms(actor, critics, obs, noise, 0.1, kind) for kind in kinds)
    assert batch.shape == (K + 1, 16)
    if "clipped" in variant:
        assert (batch[:-1] <= batch[1:] * (1 + 1e-5)).all()
        actor.clipped = False
        assert_same(ablation.gradient_norms(actor, critics, obs, noise, 0.1, "batch"), free)
        actor.clipped = True
    else:
        assert_same(batch, free)
    torch.testing.assert_close(batch.mean(1), sac_flow_naive.gradient_norms(actor, critics, obs, noise.clone(), 0.1))
    assert_same([actor.state_dict(), critics.state_dict()], before)
    assert critics.training and not actor.training and not noise.requires_grad
    critics.eval()
    loss, _, *path = sac_flow_naive.actor_loss(actor, critics, obs, noise.requires_grad_(), 0.1)
    gradients = torch.autograd.grad(16 * loss, path)
    torch.testing.assert_close(running, torch.stack([g.norm(dim=1) for g in gradients]))
    assert not torch.allclose(batch, running, rtol=0.01)


# --- runs ---

ON_HOME = ["--env-id", "tiny_envs:Home-v0", "--learning-starts", 100, "--eval-every", 0, *SMALL]


def run_of(start, tmp_path, name, *flags, program="ablation"):
    """The folder of a run that has ended with exit code 0."""
    done = start(*ON_HOME, "--run-name", name, *flags, name=program)
    assert done.returncode == 0, done.stderr
    return tmp_path / "runs" / name, done


@pytest.mark.parametrize("variant", VARIANTS)
def test_300_steps(start, tmp_path, variant):
    folder, done = run_of(start, tmp_path, "x", "--variant", variant, "--total-timesteps", 300, "--norms-every", 60)
    args = json.loads((folder / "args.json").read_text())
    assert args["variant"] == variant and args["score_step"] == ("none" if variant in OWN_SIGMA else "exponential")
    rows = list(csv.DictReader(open(folder / "norms.csv")))
    keys = [(int(row["step"]), row["statistics"], int(row["i"])) for row in rows]
    kinds = ("batch", "running", *(["free"] if "clipped" in variant else []))
    assert keys == [(step, kind, i) for step in (160, 220, 280) for kind in kinds for i in range(K + 1)]
    for row in rows:
        mean, median, largest = (float(row[name]) for name in ("grad_norm", "median", "largest"))
        assert 0 < median <= largest < math.inf and 0 < mean <= largest
    # The actor's updates come with the 1st, 4th, ... and 199th of the critics'.
    batches = 1 if variant in ONE_BATCH else K
    assert checkpoint(folder)["actor"]["norm.batches"] == 67 * batches
    assert f"step {100 + 3 * 100_000 // K}, that of the critics' at step 100100" in done.stderr


@pytest.mark.parametrize("variant, script, dim", [("plain", "sac_flow_naive", 16), ("flow-g", "sac_flow_g", 8)])
def test_those_that_are_scripts_train_as_the_scripts_do(start, tmp_path, variant, script, dim):
    """To the last bit; so measuring the norms, too, changes nothing."""
    flags = ["--total-timesteps", 200]
    mine, _ = run_of(start, tmp_path, "mine", "--variant", variant, "--norms-every", 7, *flags)
    its, _ = run_of(start, tmp_path, "its", "--velocity-dim", dim, "--entropy", "path", *flags, program=script)
    states = [checkpoint(folder) for folder in (mine, its)]
    assert len(states[0]["rows"].pop("norms.csv")) == 1 + 14 * 2 * (K + 1)
    for state in states:
        del state["args"], state["script"]
    assert_same(*states)


def test_norms_change_nothing_and_resume_is_bit_for_bit(start, tmp_path):
    flags = ["--variant", "authors-clipped", "--total-timesteps"]
    whole, _ = run_of(start, tmp_path, "whole", *flags, 200, "--norms-every", 20)
    bare, _ = run_of(start, tmp_path, "bare", *flags, 200, "--norms-every", 0)
    part, _ = run_of(start, tmp_path, "part", *flags, 150, "--norms-every", 20)
    assert start("--resume", part, "--total-timesteps", 200, name="ablation").returncode == 0
    states = [checkpoint(folder) for folder in (whole, part, bare)]
    for state in states:
        del state["args"]
    assert_same(states[0], states[1])
    assert open(part / "norms.csv").read().count("\n") == open(whole / "norms.csv").read().count("\n") == 1 + 5 * 15
    assert states[2]["rows"].pop("norms.csv") == states[0]["rows"].pop("norms.csv")[:1]
    assert_same(states[0], states[2])
    done = start("--evaluate", part, "--eval-episodes", 1, name="ablation")
    assert done.returncode == 0 and "deterministic: return" in done.stdout
    for flags, words in [(["--variant", "plain"], ["--variant", "authors-clipped"]), (["--norms-every", 40], ["20"])]:
        refused(start("--resume", part, "--total-timesteps", 250, *flags, name="ablation"), *words)
    refused(start("--evaluate", part, name="sac_flow_naive"), "ablation", "sac_flow_naive")


def refused(done, *words):
    """One line that says what is wrong."""
    assert done.returncode == 2 and done.stdout == "", done.stderr
    (line,) = done.stderr.splitlines()
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--no-crossq"], ["Unrecognized", "--no-crossq", "always"]),
        (["--norms-every", -5], ["--norms-every", "-5"]),
        (["--variant", "flow-g", "--velocity-dim", 15], ["--velocity-dim", "even", "15"]),
        (["--variant", "renorm", "--score-step", "euler"], ["--score-step euler", "renorm", "drop"]),
        (["--variant", "renorm", "--score-step", "exponential"], ["--score-step exponential", "renorm", "drop"]),
    ],
)
def test_flags_that_would_undo_a_variant(start, tmp_path, flags, words):
    refused(start(*flags, name="ablation"), *words)
    assert not (tmp_path / "runs").exists()


def test_compiled_is_eager(start, tmp_path):
    """The gradients of the first update, half of which Adam keeps: its steps differ where a gradient is rounding.

    They are those of the limited rollout, which are far from those of the free one.
    """
    flags = ["--flow-steps", 2, "--total-timesteps", 101]
    eager, _ = run_of(start, tmp_path, "eager", "--variant", "authors-clipped", *flags)
    free, _ = run_of(start, tmp_path, "free", "--variant", "authors", *flags)
    compiled, done = run_of(start, tmp_path, "compiled", "--variant", "authors-clipped", *flags, "--compile")
    assert "without it" not in done.stderr
    states = [checkpoint(folder) for folder in (eager, compiled, free)]
    for optimizer in ("actor_optimizer", "critic_optimizer"):
        averages = [[part["exp_avg"] for part in state[optimizer]["state"].values()] for state in states]
        assert len(averages[0]) > 5 and sum(average.norm() for average in averages[0]) > 0.01
        torch.testing.assert_close(averages[1], averages[0], rtol=1e-3, atol=1e-5)
        if optimizer == "actor_optimizer":
            for limited, unlimited in zip(averages[0], averages[2], strict=True):
                assert (unlimited - limited).norm() > 0.05 * limited.norm()
