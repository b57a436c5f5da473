"""sac_flow_offline2online.py trains: what its updates are given, what they do, what is played, stored and evaluated."""

import csv
import math
import re
import signal
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import tiny_envs
import torch
from helpers import OFFLINE_SMALL, checkpoint, interrupt_after_should_save, the_run, write_minari

import sac_flow_offline2online as script

for package in ("h5py", "minari"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """`data(env_id, episodes, **keywords)`: the folder of a Minari data set tests/data-v0, random actions in it."""

    def data(env_id, episodes, **keywords):
        folder = tmp_path_factory.mktemp("minari")
        write_minari(folder, "tests/data-v0", gym.make(f"tiny_envs:{env_id}", **keywords), episodes)
        return folder

    return data


@pytest.fixture(scope="module")
def scripted(data):
    """Data of `Recorded`."""
    return data("Recorded-v0", 6)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """`train(data, *flags)`: runs the script in this process, in a new folder, and returns the run's folder."""

    def train(data, *flags):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        monkeypatch.chdir(folder)
        of_data = ["--env-id", "tests/data-v0", "--dataset", data]
        monkeypatch.setattr("sys.argv", ["x", *map(str, [*of_data, *OFFLINE_SMALL, *flags])])
        monkeypatch.setattr(tiny_envs.Recorded, "made", [])
        script.main()
        return the_run(folder)

    return train


@pytest.mark.parametrize(
    "flags",
    [
        "--velocity plain --alpha 0 --no-autotune --no-learn-sigma",
        "--velocity gated --alpha 0.01 --normalize-observations --online-fraction 0.5",
        "--velocity decoded --decoder-dim 16 --alpha 0.01",
    ],
)
def test_what_cloning_cannot_do_is_learned(train, data, flags):
    """Home-v0: offline random actions are cloned alone (a large beta), online nothing holds the policy to them.

    Seeds 1 to 3 return -8.3 to -11.1, then -2.2 to -3.1. Standing still returns -10.0 to -10.6, walking straight home
    -1.9 to -2.1.
    """
    flags = flags.split()
    flags += "--critic-dim 64 --velocity-dim 32 --batch-size 64 --chunk 2 --flow-steps 2 --tau 0.05".split()
    flags += "--gamma 0.95 --critic-lr 1e-3 --actor-lr 1e-3 --eval-episodes 20".split()
    flags += "--beta 100 --online-beta 0 --offline-steps 250 --online-steps 310 --online-start 10 --utd 2".split()
    run = train(data("Home-v0", 100), *flags)
    returns = {row["phase"]: float(row["return"]) for row in csv.DictReader(open(run / "eval.csv"))}
    assert returns["offline"] < -6 and returns["online"] > -4, returns


# --- one recorded run: what each update is given and does, and what is played and stored ---


def copies(network) -> list[torch.Tensor]:
    """Its parameters as they are now."""
    return [parameter.detach().clone() for parameter in network.parameters()]


@pytest.fixture
def calls(train, scripted, monkeypatch):
    """A run of 4 updates offline and 20 x 2 online: what its losses and its policy were given, call by call.

    A dict of lists of dicts: of the arguments and the result of critic_loss, of actor_loss (offline also x0, t and
    matching) and of alpha_loss, networks as copies of their parameters; of (observation, chunk) under "policy"; of the
    losses of each update under "logged"; the actor and the run's folder.
    """
    calls = {name: [] for name in ("critic_loss", "actor_loss", "alpha_loss", "policy", "logged")}

    def record(name, *names):
        loss = getattr(script, name)

        def recording(*inputs):
            call = dict(zip(names, inputs, strict=True))
            for key, value in call.items():
                if isinstance(value, torch.nn.Module):
                    call[key] = copies(value)
                if isinstance(value, torch.Tensor):
                    call[key] = value.detach().clone()
            calls[name].append(call)
            call["result"] = loss(*inputs)
            return call["result"]

        monkeypatch.setattr(script, name, recording)

    record("critic_loss", "actor", "critics", "targets", "batch", "noise", "alpha", "discount")
    record("actor_loss", "actor", "critics", "batch", "noise", "alpha", "beta")
    record("alpha_loss", "log_alpha", "log_prob", "target")
    offline_actor_loss, compiled_policy = script.offline_actor_loss, script.compiled_policy

    def recording_offline(*inputs):
        result = offline_actor_loss(*inputs)
        calls["actor_loss"][-1] |= dict(x0=inputs[-2].clone(), t=inputs[-1].clone(), matching=result[-1])
        return result

    def recording_policy(actor, *rest):
        choose = compiled_policy(actor, *rest)
        calls.setdefault("actor", actor)  # later calls are the average's

        def choice(obs):
            chunk = choose(obs)
            calls["policy"].append((obs.copy(), chunk))
            return chunk

        return choice

    log_update = script.Run.log_update
    monkeypatch.setattr(
        script.Run, "log_update", lambda run, losses: calls["logged"].append(losses.tolist()) or log_update(run, losses)
    )
    monkeypatch.setattr(script, "offline_actor_loss", recording_offline)
    monkeypatch.setattr(script, "compiled_policy", recording_policy)
    monkeypatch.setattr(script, "evaluate", lambda *_: dict.fromkeys(script.SCORES, 0.0))
    flags = "--offline-steps 4 --online-steps 32 --online-start 12 --utd 2 --beta 5 --online-beta 2 --gamma 0.9".split()
    flags += "--tau 0.3 --critic-lr 3e-3 --actor-lr 2e-3 --alpha-lr 1e-2 --alpha 0.2 --target-entropy -7".split()
    flags += "--chunk 3 --score-step euler --flow-steps 2 --velocity decoded --seed 3".split()
    calls["run"] = train(scripted, *flags)
    return calls


def test_updates_are_given_what_the_flags_and_the_data_say(calls):
    critic, actor, alpha = (calls[name] for name in ("critic_loss", "actor_loss", "alpha_loss"))
    assert len(critic) == len(alpha) == len(actor) == checkpoint(calls["run"])["updates"] == 4 + 2 * 20
    assert [i for i, call in enumerate(actor) if "t" in call] == [0, 1, 2, 3]
    assert [call["beta"].item() for call in actor] == 4 * [5] + 2 * 20 * [2]
    assert all(call["discount"] == pytest.approx(0.9**3) for call in critic)
    assert all(call["target"] == -7 for call in alpha)
    policy = calls["actor"]
    assert (policy.score_step, policy.flow_steps, policy.action_dim) == ("euler", 2, 6)
    assert isinstance(policy.velocity_net, script.DecodedVelocity)
    for one, other, coefficient in zip(critic, actor, alpha, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one["batch"], other["batch"], strict=True))
        assert one["alpha"] == other["alpha"] == coefficient["log_alpha"].exp()
    assert len({tuple(call["batch"][1].flatten().tolist()) for call in critic}) == 44  # a new batch for each
    noise = torch.stack([call["noise"] for call in (*critic, *actor)])
    assert noise.shape == (88, 3, 16, 6) and noise.unique().numel() > 0.999 * noise.numel()
    x0, t = (torch.stack([call[name] for call in actor[:4]]) for name in ("x0", "t"))
    assert t.shape == (4, 16, 1) and t.unique().numel() > 60 and 0 <= t.min() < 0.1 and 0.9 < t.max() <= 1
    assert x0.unique().numel() > 0.99 * 4 * 16 * 6


def test_what_is_logged_is_what_its_name_says(calls):
    """And alpha is moved by log p_c."""
    parts = (calls[name] for name in ("critic_loss", "actor_loss", "alpha_loss", "logged"))
    for critic, actor, alpha, logged in zip(*parts, strict=True):
        (qf_loss, q), (loss, bc, log_prob, *_) = critic["result"], actor["result"]
        assert alpha["log_prob"] == log_prob
        expected = dict(qf_loss=qf_loss, qf_values=q, actor_loss=loss, flow_matching=actor.get("matching", 0.0), bc=bc)
        expected |= dict(alpha_loss=alpha["result"], alpha=actor["alpha"], entropy=-log_prob)
        expected |= dict(alpha_log_prob=actor["alpha"] * log_prob)
        expected = {name: pytest.approx(float(value), rel=1e-5) for name, value in expected.items()}
        assert dict(zip(script.LOSSES, logged, strict=True)) == expected


def test_rewards_of_a_chunk_are_discounted_up_to_its_episodes_end(calls):
    """Step t of an episode of 5 steps (even), which then terminates, or of 7 (odd) has the reward t + 1."""
    for i, call in enumerate(calls["critic_loss"]):
        obs, _, own, executed, reward, terminated, *_ = call["batch"]
        assert torch.equal(executed, own)  # a termination is an episode's end here
        t, steps = obs[:, 1], own.sum(1) / 2
        even = obs[:, 0] % 2 == 0
        left = torch.where(even, 5, 7) - t
        assert (steps <= left).all()
        if i < 4:  # online the newest episode is known as far as it went
            assert torch.equal(steps, left.clamp(max=3))
        torch.testing.assert_close(reward, sum(0.9**j * (t + 1 + j) * (j < steps) for j in range(3)))
        assert torch.equal(terminated, (even & (steps == left)).float())


def test_updates_move_what_they_are_to_move(calls):
    """Adam's first step is as long as the learning rate, and against the gradient's sign."""
    critic, alpha = calls["critic_loss"], calls["alpha_loss"]
    half = len(critic[0]["critics"]) // 2
    first, second = critic[0]["critics"][:half], critic[0]["critics"][half:]
    assert [a.shape for a in first] == [b.shape for b in second] and not torch.equal(first[0], second[0])
    torch.testing.assert_close(critic[0]["critics"], critic[0]["targets"], rtol=0, atol=0)
    for i, (before, after) in enumerate(zip(critic, critic[1:], strict=False)):
        assert all(not torch.equal(a, b) for a, b in zip(before["critics"], after["critics"], strict=True))
        moved = [not torch.equal(a, b) for a, b in zip(before["actor"], after["actor"], strict=True)]
        assert all(moved) or i == 0 and any(moved)  # the weights of sigma's last layer start at 0
        moved = [0.7 * old + 0.3 * new for old, new in zip(before["targets"], after["critics"], strict=True)]
        torch.testing.assert_close(after["targets"], moved)
    for name, rate in (("critics", 3e-3), ("actor", 2e-3)):
        steps = [(b - a).abs().max() for a, b in zip(critic[0][name], critic[1][name], strict=True)]
        assert max(steps).item() == pytest.approx(rate, rel=1e-3)
    assert alpha[0]["log_alpha"].exp().item() == pytest.approx(0.2)
    entropy_is_above = -alpha[0]["log_prob"] > -7
    step = (alpha[1]["log_alpha"] - alpha[0]["log_alpha"]).item()
    assert step == pytest.approx(-0.01 if entropy_is_above else 0.01, rel=1e-3)


def test_chunks_are_played_in_their_order_and_stored_as_they_went(calls):
    """Against the environment's own record. Its episodes terminate after 5 steps or are truncated after 7."""
    env = tiny_envs.Recorded.made[0]
    played = torch.tensor(np.array(env.rows, np.float32))
    assert env.seeds == [3, *6 * [None]] and played[:, 7].nonzero().flatten().tolist() == [6, 11, 18, 23, 30]
    played[-1, 7] = 1  # the newest row of the buffer counts as its episode's last
    torch.testing.assert_close(checkpoint(calls["run"])["buffer"]["rows"][-32:], played, rtol=0, atol=0)
    starts = (played[:, 1] % 3 == 0).nonzero().flatten().tolist()  # every third step of an episode
    ends = [*starts[1:], 32]
    for (obs, chunk), start, end in zip(calls["policy"], starts, ends, strict=True):
        assert obs.tolist() == played[start, :3].tolist()
        torch.testing.assert_close(played[start:end, 3:5], torch.from_numpy(chunk).view(3, 2)[: end - start])
    returns = list(csv.reader(open(calls["run"] / "returns.csv")))[1:]
    assert [row[1:4] for row in returns[:2]] == [["28.0", "7", "0.0"], ["15.0", "5", "1.0"]]


@pytest.mark.parametrize("compile", [True, False])
def test_losses_and_policy_are_compiled_if_asked(train, scripted, monkeypatch, compile):
    compiled = []

    def jit(function):
        return lambda *inputs: compiled.append(function.__name__) or function(*inputs)

    monkeypatch.setattr(script, "find_compiler", lambda device: jit)
    flags = "--chunk 3 --offline-steps 1 --online-steps 3 --online-start 2 --eval-episodes 1".split()
    train(scripted, *flags, "--compile" if compile else "--no-compile")
    names = {"critic_loss", "actor_loss", "offline_actor_loss", "<lambda>"}  # the last is the policy's rollout
    assert set(compiled) == (names if compile else set())


def test_another_seed_has_other_weights(train, scripted):
    flags = "--chunk 3 --offline-steps 1 --online-steps 0 --eval-episodes 1".split()
    runs = [checkpoint(train(scripted, *flags, "--seed", seed)) for seed in (1, 2)]
    one, other = (run["actor"]["velocity_net.from_obs.weight"] for run in runs)
    assert (one - other).abs().max() > 0.05


def test_gradient_norms_are_logged_at_every_thousandth_step(train, scripted, monkeypatch):
    """In either phase, with its own beta. The run is made to begin near such a step."""
    logged, log = [], script.log_gradient_norms
    record = lambda run, *inputs: logged.append((run.progress.step, *map(float, inputs[-2:]))) or log(run, *inputs)  # noqa: E731
    monkeypatch.setattr(script, "log_gradient_norms", record)
    flags = "--chunk 3 --no-autotune --alpha 0.25 --beta 5 --online-beta 2 --eval-episodes 1 --online-start 1".split()
    for begin, offline, beta in ((1998, 2001, 5), (1996, 1997, 2)):
        with monkeypatch.context() as patch:
            patch.setattr(script, "Progress", partial(script.Progress, step=begin))
            train(scripted, *flags, "--offline-steps", offline, "--online-steps", 5)
        assert logged.pop() == (2000, 0.25, beta) and not logged


# --- evaluation ---


def test_evaluation_plays_whole_chunks_from_seeds_of_their_own():
    """Of four episodes the second and the fourth succeed, after 5 steps; the others are truncated after 7."""
    recorder = tiny_envs.Recorded()
    recorder.episode = 0  # the first is odd
    seen = []

    def act(obs):
        seen.append(obs)
        return np.array([0.1, 0.2, 0.3, 0.4, 9.0, 0.6], np.float32)  # 9 is clipped to 2

    counted = gym.wrappers.RecordEpisodeStatistics(recorder, stats_key=script.EPISODE)
    scores = script.evaluate(act, counted, 4, seed=11)
    assert len(set(recorder.seeds)) == 4
    chunk, rows = [[0.1, 0.2], [0.3, 0.4], [2.0, 0.6]], np.array(recorder.rows)
    assert len(rows) == 7 + 5 + 7 + 5 and len(seen) == 3 + 2 + 3 + 2
    np.testing.assert_allclose(rows[:, 3:5], [chunk[int(t) % 3] for t in rows[:, 1]], rtol=1e-6)
    assert all(obs.dtype == np.float32 and obs[1] % 3 == 0 for obs in seen)
    assert (scores["success_rate"], scores["return"], scores["length"]) == (0.5, 21.5, 6)  # returns 28 and 15
    assert scores["return_error"] == pytest.approx(6.5 / 3**0.5)  # the root of the sample's variance over 4
    assert (scores["success_low"], scores["success_high"]) == script.success_interval(2, 4)


def test_an_episode_that_says_nothing_of_success_was_none_if_another_does(monkeypatch):
    """Some environments have `success` in their last info only when there was one."""
    told = iter([1.0, math.nan, math.nan, 1.0, 1.0])
    monkeypatch.setattr(script, "succeeded", lambda info: next(told))
    env = gym.wrappers.RecordEpisodeStatistics(tiny_envs.Recorded(), stats_key=script.EPISODE)
    scores = script.evaluate(lambda obs: np.zeros(6, np.float32), env, 5, seed=11)
    assert scores["success_rate"] == 0.6
    assert (scores["success_low"], scores["success_high"]) == script.success_interval(3, 5)


def test_policy_sees_the_observation_and_is_deterministic_if_asked():
    actor = script.Actor(3, [-1, 0], [2, 4], chunk=3, sigma_dim=16).requires_grad_(False)
    choose = script.compiled_policy(actor, script.unchanged, script.unchanged)
    one, other = np.array([0.0, 1, 7], np.float32), np.array([1.0, 3, 7], np.float32)
    for obs in (one, other):
        expected = actor.act(torch.from_numpy(obs), deterministic=True).numpy()
        np.testing.assert_allclose(choose(obs, deterministic=True), expected, rtol=1e-6)
        assert not np.array_equal(choose(obs), choose(obs))
    assert not np.allclose(choose(one, deterministic=True), choose(other, deterministic=True))
    torch.manual_seed(3)
    sampled = choose(one)
    torch.manual_seed(3)
    np.testing.assert_allclose(sampled, actor.act(torch.from_numpy(one)).numpy(), rtol=1e-6)


def test_the_averaged_actor_is_evaluated_and_saved(train, scripted, monkeypatch):
    """It moves a tenth of the way to the actor after each of its updates. The actor itself acts in training."""
    make_networks, apply_gradients = script.make_networks, script.apply_gradients
    compiled_policy = script.compiled_policy
    obs = np.array([1, 2, 7], np.float32)
    actors = []
    expected = []  # the average's parameters, by hand
    played = []
    evaluated = []

    def recording_networks(*inputs):
        actor, *rest = make_networks(*inputs)
        actors.append(actor)
        expected.extend(copies(actor))
        return actor, *rest

    def recording_gradients(optimizer, gradients):
        apply_gradients(optimizer, gradients)
        parameters = list(actors[0].parameters())
        if optimizer.param_groups[0]["params"][0] is parameters[0]:
            pairs = list(zip(expected, parameters, strict=True))
            expected[:] = [0.9 * mean + 0.1 * latest.detach() for mean, latest in pairs]

    def recording_policy(actor, *rest):
        choose = compiled_policy(actor, *rest)

        def choice(obs, deterministic=False):
            played.append(actor)
            return choose(obs, deterministic)

        return choice

    def recording_evaluation(act, *rest):
        evaluated.append((act(obs, deterministic=True), [parameter.clone() for parameter in expected]))
        return dict.fromkeys(script.SCORES, 0.0)

    monkeypatch.setattr(script, "make_networks", recording_networks)
    monkeypatch.setattr(script, "apply_gradients", recording_gradients)
    monkeypatch.setattr(script, "compiled_policy", recording_policy)
    monkeypatch.setattr(script, "evaluate", recording_evaluation)
    flags = "--chunk 3 --offline-steps 4 --online-steps 12 --online-start 2 --eval-every 8 --actor-lr 1e-2"
    run = train(scripted, *flags.split(), "--actor-average", 0.9)
    assert len(evaluated) == 3 == sum(actor is not actors[0] for actor in played)
    assert sum(actor is actors[0] for actor in played) > 3  # chunks that training played
    policy = script.load_policy(run / "policy.pt")
    for chunk, parameters in evaluated:
        for parameter, value in zip(policy.parameters(), parameters, strict=True):
            parameter.copy_(value)
        np.testing.assert_allclose(chunk, policy.act(torch.from_numpy(obs), deterministic=True), rtol=1e-4, atol=1e-5)
    saved = checkpoint(run)
    of_file = script.load_policy(run / "policy.pt").state_dict()
    for state in (of_file, saved["average"]):
        torch.testing.assert_close(dict(state), dict(policy.state_dict()))
    name = "velocity_net.from_obs.weight"
    assert not torch.allclose(saved["average"][name], saved["actor"][name])


def test_a_saved_policy_is_evaluated_both_ways_and_filmed(train, scripted, monkeypatch, capsys):
    pytest.importorskip("moviepy")
    run = train(scripted, *"--chunk 3 --offline-steps 2 --online-steps 0 --eval-episodes 2".split())
    evaluate, chunks = script.evaluate, []

    def recording(act, *rest):
        obs = np.array([1, 2, 7], np.float32)
        chunks.append([act(obs), act(obs)])
        return evaluate(act, *rest)

    monkeypatch.setattr(script, "evaluate", recording)
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["x", "--evaluate", str(run), "--capture-video"])
    script.main()
    (first, again), (sampled, other) = chunks
    actor = script.load_policy(run / "policy.pt")
    expected = actor.act(torch.tensor([1.0, 2, 7]), deterministic=True).numpy()
    np.testing.assert_allclose([first, again], [expected, expected], rtol=1e-6)
    assert not np.array_equal(sampled, other)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == ["deterministic", "stochastic"]
    assert all("success 0.50" in line and "return 21.5" in line and "length 6" in line for line in lines[1:])
    videos = list((run / "videos").glob("*.mp4"))
    assert len(videos) == 2 and all(path.stat().st_size > 500 for path in videos)  # the first episode of each kind


def test_an_environment_that_fails_to_close_is_a_line(train, scripted, monkeypatch, refused):
    """After all has been printed; and --track, which would do nothing there, is refused."""
    run = train(scripted, *"--chunk 3 --offline-steps 2 --online-steps 0 --eval-episodes 1".split())

    def close(self):
        raise RuntimeError("the arm fell off\nand much more")

    monkeypatch.setattr(tiny_envs.Recorded, "close", close)
    for flags, words in (([], "the arm fell off"), (["--track"], "--track True conflicts")):
        monkeypatch.setattr("sys.argv", ["x", "--evaluate", str(run), *flags])
        refused(script.main, words)


def test_evaluate_plays_what_the_runs_own_evaluation_played(train, data, monkeypatch, capsys):
    """The same starts and draws; with another seed others. Home's returns are continuous."""
    flags = "--velocity plain --chunk 2 --offline-steps 2 --online-steps 0 --eval-episodes 3"
    run = train(data("Home-v0", 3), *flags.split())
    (row,) = csv.DictReader(open(run / "eval.csv"))
    said = []
    for seed in ([], ["--seed", "2"]):
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["x", "--evaluate", str(run), *seed])
        script.main()
        said.append(re.search(r"^stochastic: .*?return (\S+)", capsys.readouterr().out, re.M)[1])
    assert said[0] == f"{float(row['return']):.1f}" != said[1]


# --- several processes, and signals ---


def test_a_run_that_went_on_meanwhile_is_not_set_back(train, scripted, monkeypatch, capsys):
    """Two are to resume it; the second has read the checkpoint before the first writes another."""
    run = train(scripted, *"--chunk 3 --offline-steps 2 --online-steps 12 --online-start 9 --eval-episodes 1".split())
    resume = ["x", "--resume", str(run), "--online-steps"]
    monkeypatch.setattr("sys.argv", [*resume, "30"])
    args, old = script.parse_args()
    monkeypatch.setattr("sys.argv", [*resume, "24"])
    script.main()
    before = (run / "returns.csv").read_bytes()
    with pytest.raises(SystemExit):
        script.Run(args, 32, old, old["progress"]["files"])
    assert f"{run} was continued by another process" in capsys.readouterr().err
    assert (run / "returns.csv").read_bytes() == before


@pytest.mark.parametrize("steps", ["--offline-steps 0 --online-steps 12", "--offline-steps 12 --online-steps 0"])
def test_each_checkpoint_is_written_once(train, scripted, monkeypatch, steps):
    """It holds the buffer, which is large: also where the run's end is an episode's, or there is no episode."""
    written, save = [], script.Run.save
    monkeypatch.setattr(script.Run, "save", lambda run, *state: written.append(run.progress.step) or save(run, *state))
    train(scripted, *f"--chunk 3 {steps} --online-start 9 --eval-episodes 1 --save-every 5".split())
    assert written == ([7, 12] if steps.startswith("--offline-steps 0") else [5, 10, 12])


def test_critic_ranking_of_a_run(train, scripted, tmp_path, monkeypatch):
    """The states of its data and of its experience are told apart; the best of one chunk is the policy's own."""
    import critic_ranking

    run = train(scripted, *"--chunk 3 --offline-steps 2 --online-steps 40 --online-start 9 --eval-episodes 1".split())
    measured = []
    monkeypatch.setattr(critic_ranking, "measure", lambda actor, critics, obs: measured.append(obs) or {"value": 1.0})
    monkeypatch.chdir(tmp_path)
    flags = f"--runs {run} --best-of 1 8 --episodes 3 --seed 5 --out ranking"
    monkeypatch.setattr("sys.argv", ["critic_ranking.py", *flags.split()])
    critic_ranking.main()
    buffer = torch.load(run / "checkpoint.pt")["buffer"]
    data, online = buffer["rows"][:, :3].tensor_split([buffer["data_size"]])
    assert len(online) == 40
    for obs, own in zip(measured, (data, online), strict=True):
        assert sorted(obs.tolist()) == sorted(own.tolist())
    ranking = list(csv.DictReader(open("ranking/critic_ranking.csv")))
    assert [(row["states"], row["step"]) for row in ranking] == [("data", "42"), ("online", "42")]
    played = list(csv.DictReader(open("ranking/best_of.csv")))
    assert [row["best_of"] for row in played] == ["1", "8"]
    args, actor, _, _ = critic_ranking.load(run)
    script.seed_random(5)
    scores = script.evaluate(lambda obs: actor.act(torch.from_numpy(obs)).numpy(), script.make_env(args), 3, 5)
    assert float(played[0]["return"]) == pytest.approx(scores["return"], rel=1e-4)


def test_critic_ranking_goes_on_with_the_critics(train, scripted):
    """From the run's random numbers, its further update is the one that a longer run makes; the policy stays."""
    import critic_ranking

    flags = "--chunk 3 --online-steps 0 --eval-episodes 1 --actor-average 0".split()
    run = train(scripted, *flags, "--offline-steps", "2")
    args, actor, critics, state = critic_ranking.load(run)
    before = copies(actor)
    torch.set_rng_state(state["generators"]["torch"])
    critic_ranking.train_critics(args, actor, critics, state, 1)
    longer = train(scripted, *flags, "--offline-steps", "3")
    expected = torch.load(longer / "checkpoint.pt")["critics"]
    assert all(torch.equal(new, expected[name]) for name, new in critics.named_parameters())
    assert all(map(torch.equal, before, copies(actor)))


def test_a_signal_just_before_the_next_episode_is_heeded_at_its_end(train, scripted, monkeypatch, capsys):
    """Not before its checkpoint is written. Episodes end after 5 and 7 steps."""
    interrupt_after_should_save(script, monkeypatch)
    with pytest.raises(SystemExit) as error:
        train(scripted, *"--chunk 3 --offline-steps 0 --online-steps 60 --online-start 40 --eval-episodes 1".split())
    assert error.value.code == 128 + signal.SIGINT
    assert "stopped at step 12; resume with" in capsys.readouterr().out
    assert torch.load(the_run(Path()) / "checkpoint.pt")["progress"]["step"] == 12


# --- values that are not finite ---


@pytest.mark.parametrize(
    "bad, bad_step, step, named, saved",
    [
        ("reward", 30, 30, "reward", 19),
        ("infinite", 30, 30, "reward", 19),
        ("observation", 31, 31, "observation", 19),
        ("reset", 30, 31, "observation", 31),
    ],
)
def test_nan_from_the_environment_stops_the_run_before_it_is_stored(
    train, data, capsys, bad, bad_step, step, named, saved
):
    """Step 30 is in the middle of an episode, 31 the end of the fifth, where a checkpoint is due."""
    flags = "--chunk 3 --offline-steps 0 --online-steps 60 --online-start 20 --save-every 6".split()
    with pytest.raises(SystemExit) as error:
        train(data("Recorded-v0", 2, bad=bad, bad_step=bad_step), *flags)
    assert error.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"step {step}: {named} is NaN or infinite; the checkpoint of step {saved} is kept" in line, line


@pytest.mark.parametrize("bad, named", [("loss", "actor_loss"), ("gradient", "actor.velocity_net")])
def test_nan_in_a_loss_or_a_weight_is_never_saved(train, scripted, monkeypatch, tmp_path, capsys, bad, named):
    loss_function, calls = script.offline_actor_loss, []

    def diverging(actor, *rest):
        calls.append(actor)
        total, loss, *others = loss_function(actor, *rest)
        zero = sum(0 * parameter.sum() for parameter in actor.velocity_net.parameters())
        extra = {"loss": zero + torch.nan, "gradient": zero.abs().sqrt()}[bad]  # its gradient is 0 times infinity
        return (total + extra, loss + extra, *others) if len(calls) == 5 else (total, loss, *others)

    monkeypatch.setattr(script, "offline_actor_loss", diverging)
    with pytest.raises(SystemExit) as error:
        train(scripted, *"--chunk 3 --offline-steps 6 --online-steps 0 --save-every 1 --eval-episodes 1".split())
    line = capsys.readouterr().err.splitlines()[-1]
    assert error.value.code == 2 and f"step 5: {named}" in line and "is NaN or infinite" in line, line
    assert checkpoint(the_run(tmp_path / "0"))["step"] == 4
