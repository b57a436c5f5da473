"""The loop of sac_flow_g.py: what its losses and its policy are given, what its updates move, what is stored.

Its twins have the same loop, word for word (test_project.py).
"""

import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import tiny_envs
import torch
from helpers import SMALL, checkpoint, the_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sac_flow_g as script

FLAGS = "--env-id tiny_envs:Recorded-v0 --total-timesteps 40 --learning-starts 20 --actor-delay 2 --eval-every 0"
FLAGS += " --gamma 0.9 --tau 0.3 --critic-lr 3e-3 --actor-lr 2e-3 --alpha-lr 1e-2 --alpha 0.2 --adam-b1 0.6"
FLAGS += " --target-entropy -7 --flow-steps 2 --seed 3"


def copied(value):
    """A tensor, or the parameters of a network, as they are now."""
    if isinstance(value, torch.nn.Module):
        return [parameter.detach().clone() for parameter in value.parameters()]
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


@pytest.fixture(scope="module", params=[True, False], ids=["crossq", "targets"])
def recorded(request, tmp_path_factory):
    """A run of 20 random steps and 20 with an update each, of the actor every second time.

    `critic_loss`, `actor_loss` and `alpha_loss` are lists of their calls' inputs and `result`, `policy` is a list of
    (actor, keywords, observation, action), `norms` of (observation, noise, alpha) of `gradient_norms`; `run` is the
    folder, `state` the checkpoint, `rows` what the environment saw, `seeds` those of its resets, `actor` the actor that
    learns.
    """
    calls = {name: [] for name in ("critic_loss", "actor_loss", "alpha_loss", "policy", "norms")}
    folder = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:

        def record(name, *names):
            loss = getattr(script, name)

            def recording(*inputs):
                call = {key: copied(value) for key, value in zip(names, inputs, strict=True)}
                result = loss(*inputs)
                calls[name].append(SimpleNamespace(**call, result=result))
                return result

            patch.setattr(script, name, recording)

        record("critic_loss", "actor", "critics", "targets", "batch", "noise", "alpha", "gamma")
        record("actor_loss", "actor", "critics", "obs", "noise", "alpha")
        record("alpha_loss", "log_alpha", "log_prob", "target_entropy")
        make_networks, compiled_policy = script.make_networks, script.compiled_policy

        def recording_networks(*inputs):
            networks = make_networks(*inputs)
            calls["actor"] = networks[0]
            return networks

        def recording_policy(actor, *rest):
            choose = compiled_policy(actor, *rest)

            def choice(obs, **keywords):
                action = choose(obs, **keywords)
                calls["policy"].append((actor, keywords, obs.copy(), action))
                return action

            return choice

        patch.setattr(script, "make_networks", recording_networks)
        patch.setattr(script, "compiled_policy", recording_policy)
        norms = lambda *inputs: calls["norms"].append(inputs[2:]) or torch.tensor([1.0, 2.0, 3.0])  # noqa: E731
        patch.setattr(script, "gradient_norms", norms)  # it calls actor_loss, too
        patch.setattr(tiny_envs.Recorded, "made", [])
        patch.chdir(folder)
        crossq = "--crossq" if request.param else "--no-crossq"
        patch.setattr("sys.argv", ["script", *SMALL, *FLAGS.split(), crossq])
        script.main()
        (env,) = tiny_envs.Recorded.made
    state = checkpoint(the_run(folder))
    of_run = dict(run=the_run(folder), state=state, rows=env.rows, seeds=env.seeds)
    return SimpleNamespace(**calls, **of_run, crossq=request.param)


def test_losses_are_given_what_the_flags_say(recorded):
    critic, actor, alpha = recorded.critic_loss, recorded.actor_loss, recorded.alpha_loss
    assert (len(critic), len(actor), len(alpha)) == (20, 10, 10)
    assert all(call.gamma == 0.9 for call in critic)
    assert all(call.target_entropy == -7 for call in alpha)
    assert alpha[0].log_alpha.exp().item() == pytest.approx(0.2)
    for of_critic, of_actor, of_alpha in zip(critic[::2], actor, alpha, strict=True):
        assert of_critic.alpha == of_actor.alpha == of_alpha.log_alpha.exp()
    noise = torch.stack([call.noise for call in (*critic, *actor)])
    assert noise.shape == (30, 3, 16, 2) and noise.unique().numel() > 0.999 * noise.numel()
    batches = {tuple(call.batch[0].flatten().tolist()) for call in critic}
    batches |= {tuple(call.obs.flatten().tolist()) for call in actor}
    assert len(batches) == 30  # a new batch for each


def test_updates_move_what_they_are_to_move(recorded):
    """Adam's first step moves a weight by at most the learning rate, and the largest move is as long as that."""
    critic = recorded.critic_loss
    half = len(critic[0].critics) // 2
    assert not all(map(torch.equal, critic[0].critics[:half], critic[0].critics[half:]))  # twins would agree for ever
    if not recorded.crossq:
        torch.testing.assert_close(critic[0].targets, critic[0].critics, rtol=0, atol=0)
    for i, (before, after) in enumerate(zip(critic, critic[1:], strict=False)):
        assert all(not torch.equal(a, b) for a, b in zip(before.critics, after.critics, strict=True))
        moved = [not torch.equal(a, b) for a, b in zip(before.actor, after.actor, strict=True)]
        if i % 2:  # --actor-delay 2
            assert not any(moved)
        else:
            assert all(moved)
        if not recorded.crossq:
            expected = [0.7 * old + 0.3 * new for old, new in zip(before.targets, after.critics, strict=True)]
            torch.testing.assert_close(after.targets, expected)
    for name, rate in (("critics", 3e-3), ("actor", 2e-3)):
        before, after = getattr(critic[0], name), getattr(critic[1], name)
        step = max((b - a).abs().max() for a, b in zip(before, after, strict=True))
        assert step.item() == pytest.approx(rate, rel=1e-3)
    first, second = recorded.alpha_loss[:2]
    too_little = -first.log_prob < -7
    expected = 0.01 if too_little else -0.01
    assert (second.log_alpha - first.log_alpha).item() == pytest.approx(expected, rel=1e-3)
    for name in ("actor_optimizer", "critic_optimizer", "alpha_optimizer"):
        (group,) = recorded.state[name]["param_groups"]
        assert tuple(group["betas"]) == (0.6, 0.999)


def test_each_network_is_normalised_by_the_batches_of_its_own_updates(recorded):
    """The actor's statistics are of ten batches, CrossQ's critics' of twenty: an actor's update adds none to them.

    With target networks nothing is normalised.
    """
    for network, batches in (("actor", 10), ("critics", 20)):
        seen = {int(value) for name, value in recorded.state[network].items() if name.endswith("batches")}
        assert seen == ({batches} if recorded.crossq else set())


def test_what_is_logged_is_what_its_name_says(recorded):
    """The critics' of the last update, the actor's of the last but one."""
    qf_loss, q = recorded.critic_loss[-1].result
    actor_loss, log_prob, *_ = recorded.actor_loss[-1].result
    expected = dict(qf_loss=qf_loss, qf_values=q, actor_loss=actor_loss, alpha_loss=recorded.alpha_loss[-1].result)
    expected |= dict(alpha=recorded.actor_loss[-1].alpha, entropy=-log_prob)
    assert set(expected) == set(script.LOSSES)
    logged = dict(zip(script.LOSSES, recorded.state["scalars"]["losses"].tolist(), strict=True))
    assert logged == {name: pytest.approx(value.item(), rel=1e-6) for name, value in expected.items()}


def test_gradient_norms_are_those_of_the_updates_alpha_and_logged_by_step(recorded):
    ((obs, noise, alpha),) = recorded.norms  # with the first update
    assert alpha == recorded.alpha_loss[1].log_alpha.exp() and obs.shape == (16, 3) and noise.shape == (3, 16, 2)
    events = EventAccumulator(str(recorded.run)).Reload()
    assert [events.Scalars(f"flow/grad_norm_step_{i}")[0].value for i in range(3)] == [1, 2, 3]


def test_means_of_losses_are_of_the_updates_since_the_last_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, written = script.Run(script.Args(), 300, None), []
    monkeypatch.setattr(run, "write_scalars", lambda prefix, values: written.append((prefix, values)))
    with run:
        for i in range(1, 201):
            run.progress.step = run.progress.updates = i
            run.log_update(torch.full((len(script.LOSSES),), float(i)))
    means = [values for prefix, values in written if prefix == "losses/"]
    assert means == [dict.fromkeys(script.LOSSES, 50.5), dict.fromkeys(script.LOSSES, 150.5)]


def test_only_the_first_reset_is_seeded(recorded):
    assert recorded.seeds[0] == 3 and len(recorded.seeds) > 4 and not any(recorded.seeds[1:])


def test_another_seed_has_other_starts_and_other_random_actions(tmp_path, monkeypatch):
    first, weights = [], []
    for seed in ("5", "6"):
        monkeypatch.chdir(tmp_path)
        flags = ["--env-id", "tiny_envs:Home-v0", "--learning-starts", "15", "--total-timesteps", "20", *SMALL]
        monkeypatch.setattr("sys.argv", ["script", *flags, "--eval-every", "0", "--seed", seed, "--run-name", seed])
        script.main()
        state = checkpoint(tmp_path / "runs" / seed)
        first.append(state["buffer"]["rows"][:15, :2])  # observation and action
        weights.append(state["average"]["velocity_net.from_obs.weight"])  # near the first ones
    assert (first[0] != first[1]).all()
    assert (weights[0] - weights[1]).abs().max() > 0.05


def test_the_policy_sees_the_observation_and_is_deterministic_only_if_asked():
    actor = script.Actor(3, [-1, 0], [2, 4]).requires_grad_(False)
    choose = script.compiled_policy(actor, script.unchanged, script.unchanged)
    for obs in (np.array([0, 1, 7], np.float32), np.array([1, 3, 7], np.float32)):
        expected = actor.act(torch.from_numpy(obs), deterministic=True).numpy()
        np.testing.assert_allclose(choose(obs, deterministic=True), expected, rtol=1e-6)
        torch.manual_seed(3)
        sampled = choose(obs)
        torch.manual_seed(3)
        np.testing.assert_allclose(sampled, actor.act(torch.from_numpy(obs)).numpy(), rtol=1e-6)
        assert not np.array_equal(choose(obs), sampled)


def test_the_target_of_the_entropy_is_the_flags_or_else_the_actors():
    actor = script.Actor(5, 3 * [-1], 3 * [1], entropy="path")
    assert actor.target_entropy not in (0, -3)
    for given, expected in ((None, actor.target_entropy), (0.0, 0.0), (-2.0, -2.0)):
        assert script.target_entropy_of(script.Args(target_entropy=given), actor) == expected


@pytest.mark.parametrize("warmup", [None, 0, 7])
def test_the_switch_of_batch_renorm_reaches_actor_average_and_critics(warmup):
    args, env = script.Args(renorm_warmup=warmup, buffer_size=10), gym.make("tiny_envs:Home-v0")
    networks = script.make_networks(args, env, torch.device("cpu"))[:3]
    modules = [module for network in networks for module in network.modules()]
    warmups = [module.warmup for module in modules if isinstance(module, script.BatchRenorm)]
    assert warmups == (1 + 1 + 2 * 3) * [math.inf if warmup is None else warmup]


def test_the_learning_actor_samples_and_its_steps_are_stored_as_they_went(recorded):
    """Against the environment's own record, whose column 7 is whether the row is an episode's last."""
    played = torch.tensor(np.delete(np.array(recorded.rows, np.float32), 7, axis=1))
    torch.testing.assert_close(recorded.state["buffer"]["rows"], played)
    assert len(recorded.policy) == 20
    for (actor, keywords, obs, action), row in zip(recorded.policy, played[20:], strict=True):
        assert actor is recorded.actor and not keywords  # with keywords it might be deterministic
        torch.testing.assert_close(torch.from_numpy(np.concatenate([obs, action])), row[:5])


@pytest.mark.parametrize("decay", [0, 0.8])
def test_the_average_moves_towards_the_actors_weights(tmp_path, monkeypatch, decay):
    """At each update of the actor a becomes decay a + (1 - decay) w: with decay 0, the last weights w."""
    moves, move_average = [], script.move_average

    def flat(network):
        return torch.nn.utils.parameters_to_vector(network.parameters()).detach().clone()

    def recording(average, network, weight):
        before = flat(average)
        move_average(average, network, weight)
        moves.append((before, flat(network), flat(average)))

    monkeypatch.setattr(script, "move_average", recording)
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL, *FLAGS.split(), "--actor-average", str(decay)]
    monkeypatch.setattr("sys.argv", ["script", *flags])
    script.main()
    assert len(moves) == 10
    for before, weights, after in moves:
        torch.testing.assert_close(after, decay * before + (1 - decay) * weights)
    assert all(torch.equal(one[2], other[0]) for one, other in zip(moves, moves[1:], strict=False))
    actor = script.load_policy(the_run(tmp_path) / "policy.pt")
    assert torch.equal(flat(actor), moves[-1][2])
    actor.load_state_dict(checkpoint(the_run(tmp_path))["actor"])
    assert torch.equal(flat(actor), moves[-1][1])
