"""The scripts as a user runs them: what a run leaves, resume, evaluation, bad input, learning."""

import contextlib
import csv
import importlib
import io
import itertools
import json
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import tiny_envs  # noqa: F401  registers Home-v0
import torch
from helpers import (
    SCRIPTS,
    SMALL,
    assert_same,
    checkpoint,
    command,
    interrupt_after_should_save,
    needs_cuda,
    one_script,
    path_of,
    the_run,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PENDULUM = ["--env-id", "InvertedPendulum-v4", "--learning-starts", "100", *SMALL]
HOPPER = ["--env-id", "Hopper-v4", *SMALL]
TWO_STEPS = [*PENDULUM, "--flow-steps", "2"]  # compiled in 112 s of a core, four in 135; kept for later tests


def returns(run: Path, name: str = "returns.csv") -> list[list[str]]:
    """returns.csv, or eval.csv, without its last column, of seconds."""
    return [row[:-1] for row in csv.reader(open(run / name))]


@pytest.mark.parametrize("crossq", ["--crossq", "--no-crossq"])
@pytest.mark.parametrize("env_id", ["Hopper-v4", "InvertedPendulum-v4"])
def test_300_steps(run, tmp_path, env_id, crossq):
    done = run("--env-id", env_id, crossq, "--total-timesteps", 300, "--learning-starts", 200, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "deterministic: return" in done.stdout and "stochastic: return" in done.stdout
    state = checkpoint(the_run(tmp_path))
    assert state["step"] == 300 and state["updates"] == 100
    assert ("targets" in state) == (crossq == "--no-crossq")


def test_what_a_killed_compilation_left_is_cleared_away(monkeypatch, tmp_path):
    """A library that the linker was kept from filling would fail every later run; one that is being made stays."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for name, content, age in ("killed", "", 60), ("at-work", "", 0), ("whole", "ELF", 60):
        library = tmp_path / "ab" / f"{name}.main.so"
        library.parent.mkdir(exist_ok=True)
        library.write_text(content)
        os.utime(library, (0, time.time() - age))
    script = importlib.import_module("sac_flow_g")
    monkeypatch.setattr(script.torch, "compile", lambda function: function)
    script.find_compiler(torch.device("cpu"))
    assert {library.name for library in tmp_path.rglob("*.so")} == {"at-work.main.so", "whole.main.so"}
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "ab" / "whole.main.so" / "no-folder"))
    assert script.find_compiler(torch.device("cpu")) is script.unchanged  # without a place to compile: eager


@one_script
def test_tau_of_one_and_a_fixed_alpha(run, tmp_path):
    """The target networks are then the critics, and alpha stays where it is."""
    flags = ["--no-crossq", "--tau", 1, "--no-autotune", "--alpha", 0.25]
    assert run(*HOPPER, *flags, "--total-timesteps", 230, "--learning-starts", 200).returncode == 0
    state = checkpoint(the_run(tmp_path))
    assert_same(state["targets"], state["critics"])
    assert state["scalars"]["log_alpha"].exp() == pytest.approx(0.25)


HUMANOID = [*TWO_STEPS, "--env-id", "Humanoid-v4", "--velocity-dim", 20]  # more columns than a vector has
COMPILED = [("sac_flow_g", TWO_STEPS), ("sac_flow_t", [*HUMANOID, "--no-crossq"])]


@pytest.mark.parametrize("device", ["--no-cuda", pytest.param("--cuda", marks=needs_cuda)])
@pytest.mark.parametrize("name, flags", COMPILED)
def test_compiled_is_eager(run, tmp_path, flags, device):
    """Twelve updates, four of the actor (on CUDA the last are graphs), from one seed: equal up to rounding."""
    for i, flag in enumerate(("--no-compile", "--compile")):
        done = run(*flags, device, flag, "--total-timesteps", 112, "--actor-average", 0.5)
        assert done.returncode == 0 and "continuing without it" not in done.stderr, done.stderr
        the_run(tmp_path).rename(tmp_path / str(i))
    eager, compiled = (checkpoint(tmp_path / str(i)) for i in range(2))
    assert eager["updates"] == 12 and eager["scalars"]["losses"].ne(0).all()
    torch.testing.assert_close(compiled["scalars"]["losses"], eager["scalars"]["losses"], rtol=1e-3, atol=1e-4)
    for part in ("actor", "average", "critics"):
        torch.testing.assert_close(compiled[part], eager[part], rtol=1e-2, atol=1e-3)
    # In so few updates weights move by little more than these tolerances. Adam's first moments average the gradients.
    for optimizer in ("actor_optimizer", "critic_optimizer"):
        for i, state in eager[optimizer]["state"].items():
            moments = compiled[optimizer]["state"][i]["exp_avg"]
            torch.testing.assert_close(moments, state["exp_avg"], rtol=1e-2, atol=1e-4)


@one_script
def test_without_a_compiler_it_goes_on(run, tmp_path):
    flags = ["--env-id", "InvertedPendulum-v4", "--total-timesteps", 120, "--learning-starts", 100, *SMALL, "--compile"]
    none = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PATH": "/nowhere"}
    done = run(*flags, env=none)
    assert done.returncode == 0 and "continuing without it" in done.stderr


def test_what_a_run_leaves(run, tmp_path, name):
    compiled = ["--compile"] if name == "sac_flow_g" else []  # the graphs of test_compiled_is_eager
    done = run(*TWO_STEPS, *compiled, "--total-timesteps", 600, "--seed", 7, "--eval-every", 200)
    assert done.returncode == 0, done.stderr
    folder = the_run(tmp_path)
    assert folder.name.startswith(f"InvertedPendulum-v4__{name}__7__")
    names = {path.name for path in folder.iterdir()}
    assert {"args.json", "checkpoint.pt", "returns.csv", "eval.csv", "policy.pt", "policy_best.pt"} <= names
    args = json.loads((folder / "args.json").read_text())
    assert args["seed"] == 7 and args["critic_dim"] == 16

    rows = list(csv.DictReader(open(folder / "returns.csv")))
    assert list(rows[0]) == ["step", "return", "length", "seconds"]
    steps = [int(row["step"]) for row in rows]
    assert steps == [sum(int(row["length"]) for row in rows[: i + 1]) for i in range(len(rows))]  # one row an episode
    assert all(float(row["return"]) == pytest.approx(int(row["length"]), abs=1) for row in rows)  # reward 1 a step

    events = EventAccumulator(str(folder)).Reload()
    losses = {"qf_loss", "qf_values", "actor_loss", "alpha_loss", "alpha", "entropy"}
    expected = {f"losses/{loss}" for loss in losses} | {f"flow/grad_norm_step_{i}" for i in range(3)}
    expected |= {"charts/episodic_return", "charts/episodic_length", "charts/SPS"}
    expected |= {"eval/return", "eval/length", "eval/stochastic_return"}
    assert expected <= set(events.Tags()["scalars"])
    logged = [(event.step, event.value) for event in events.Scalars("charts/episodic_return")]
    assert logged == [(int(row["step"]), pytest.approx(float(row["return"]))) for row in rows]

    evaluations = list(csv.DictReader(open(folder / "eval.csv")))
    assert list(evaluations[0]) == ["step", "kind", "return", "return_error", "length", "episodes", "seconds"]
    kinds = [("200", "deterministic"), ("400", "deterministic"), ("600", "deterministic"), ("600", "stochastic")]
    assert [(row["step"], row["kind"]) for row in evaluations] == kinds
    assert all(float(row["return"]) == float(row["length"]) > 1 for row in evaluations)  # reward 1 a step
    logged = [(event.step, event.value) for event in events.Scalars("eval/return")]
    assert logged == [(int(row["step"]), pytest.approx(float(row["return"]))) for row in evaluations[:3]]

    script = importlib.import_module(name)  # what was compiled for the evaluation is the averaged actor, not the other
    actor, env = script.load_policy(folder / "policy.pt"), script.make_env("InvertedPendulum-v4")

    def evaluate():
        act = lambda obs: actor.act(torch.from_numpy(obs)[None], deterministic=True)[0].numpy()  # noqa: E731
        return script.evaluate(act, env, 5, seed=7)["return"]

    assert evaluate() == float(evaluations[2]["return"])
    actor = script.load_policy(folder / "policy_best.pt")  # an average, too, of an earlier step or the same
    assert evaluate() == max(float(row["return"]) for row in evaluations[:3])
    actor.load_state_dict(checkpoint(folder)["actor"])
    assert evaluate() != float(evaluations[2]["return"])


@one_script
def test_same_seed_same_run_other_seed_other_run(run, tmp_path):
    for seed in (1, 1, 2):
        assert run(*PENDULUM, "--total-timesteps", 150, "--seed", seed).returncode == 0
        time.sleep(1)  # folders are named by the second
    first, second, other = (checkpoint(path) for path in sorted((tmp_path / "runs").iterdir(), key=os.path.getmtime))
    assert_same(first, second)
    assert not torch.equal(first["buffer"]["rows"], other["buffer"]["rows"])


def test_random_actions_are_seeded_also_if_an_environment_renews_its_action_space(shared, main):
    flags = ["--env-id", "tiny_envs:Renewing-v0", "--total-timesteps", 60, "--learning-starts", 50, *SMALL]
    first, second = (checkpoint(main(shared, *flags)) for _ in range(2))
    assert_same(first["buffer"], second["buffer"])
    assert_same(first["generators"], second["generators"])


@one_script
def test_an_observation_that_changes_in_place_is_copied(run, tmp_path):
    done = run("--env-id", "tiny_envs:InPlace-v0", "--total-timesteps", 50, "--learning-starts", 45, *SMALL)
    assert done.returncode == 0, done.stderr
    rows = checkpoint(the_run(tmp_path))["buffer"]["rows"]
    assert (rows[:, 0] != rows[:, -1]).all()


@pytest.mark.parametrize("control", ["sac_flow_naive", "sac_gaussian"])
def test_controls_run_resume_and_evaluate_alike(tmp_path, control, start):
    flags = ["--env-id", "InvertedPendulum-v4", "--learning-starts", 100, "--no-compile", "--no-cuda"]
    flags.append("--total-timesteps")
    done = start(*flags, 150, name=control)
    assert done.returncode == 0, done.stderr
    whole = the_run(tmp_path).rename(tmp_path / "whole")
    end = next(int(row[0]) for row in returns(whole)[1:] if int(row[0]) > 110)
    assert start(*flags, end, name=control).returncode == 0
    folder = the_run(tmp_path)
    assert start("--resume", folder, "--total-timesteps", 150, name=control).returncode == 0
    extended = checkpoint(folder)
    assert_same(extended, checkpoint(whole) | {name: extended[name] for name in ("args", "best", "rows")})
    assert returns(folder) == returns(whole)
    done = start("--evaluate", folder, name=control)
    assert done.returncode == 0 and "deterministic: return" in done.stdout
    assert_refused(start("--evaluate", folder, name="sac_flow_g"), control, "sac_flow_g")
    assert_refused(start("--gamma", 2, name=control), "--gamma")


@pytest.fixture
def main(tmp_path, monkeypatch):
    """Runs a script, imported, in a fresh folder of its own and returns its run's folder."""

    def main(script, *flags):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        monkeypatch.chdir(folder)
        monkeypatch.setattr("sys.argv", ["script", *map(str, flags)])
        script.main()
        return None if {"--resume", "--evaluate"} & set(flags) else the_run(folder)

    return main


HOME = ["--env-id", "tiny_envs:Home-v0", "--learning-starts", 15, *SMALL]


def test_seconds_go_on_when_a_run_is_resumed(shared, main):
    folder = main(shared, *HOME, "--total-timesteps", 60, "--eval-every", 10)
    before = torch.load(folder / "checkpoint.pt")["progress"]["seconds"]
    main(shared, "--resume", folder, "--total-timesteps", 70)
    for name in ("returns.csv", "eval.csv"):
        _, *rows = csv.reader(open(folder / name))
        seconds = [float(row[-1]) for row in rows]
        assert seconds == sorted(seconds) and seconds[-1] > round(before, 2) > 0
    assert torch.load(folder / "checkpoint.pt")["progress"]["seconds"] > before


def test_tensorboard_forgets_what_is_done_again(shared, main, monkeypatch):
    """The run dies after the checkpoint of step 40, during the evaluation at 60."""
    evaluate, calls = shared.evaluate, []

    def dies(*inputs):
        calls.append(inputs)
        if len(calls) == 3:
            sys.exit(1)
        return evaluate(*inputs)

    monkeypatch.setattr(shared, "evaluate", dies)
    with pytest.raises(SystemExit):
        main(shared, *HOME, "--save-every", 20, "--eval-every", 20, "--total-timesteps", 70)
    folder = the_run(Path.cwd())
    assert checkpoint(folder)["step"] == 40
    main(shared, "--resume", folder)
    episodes = EventAccumulator(str(folder)).Reload().Scalars("charts/episodic_return")
    assert [event.step for event in episodes] == list(range(10, 80, 10))


def test_evaluate_plays_episodes_of_the_runs_length(shared, main, capsys):
    folder = main(shared, *HOME, "--max-episode-steps", 4, "--total-timesteps", 40, "--eval-every", 0)
    main(shared, "--evaluate", folder)
    assert capsys.readouterr().out.count(", length 4\n") == 2


def test_flags_that_a_resumed_run_may_change(shared, main, monkeypatch):
    folder = main(shared, *HOME, "--total-timesteps", 20, "--eval-every", 0)
    for flags in ("--compile", "--capture-video", "--eval-every 7", "--eval-episodes 2", "--save-every 9"):
        monkeypatch.setattr("sys.argv", ["x", "--resume", str(folder), "--total-timesteps", "30", *flags.split()])
        shared.parse_args()


def test_actions_are_clipped_to_the_bounds_and_shaped(shared):
    space = gym.spaces.Box(np.float32([[-1, 0]]), np.float32([[2, 4]]))
    action = shared.to_action(np.array([-1.0000001, 4.0000005]), space)
    assert space.contains(action) and action.tolist() == [[-1, 4]]


def test_measuring_leaves_training_as_it_is(shared, main, monkeypatch):
    """Evaluations and gradient norms draw random numbers, run the networks and step an environment of their own."""
    flags = ["--env-id", "tiny_envs:Dice-v0", "--total-timesteps", 200, "--learning-starts", 50, *SMALL]
    flags += ["--seed", 2**32 - 1]
    draws, write_scalars, apply_gradients = [], shared.Run.write_scalars, shared.apply_gradients

    def drawn(function):
        return lambda *inputs: draws.append((function, inputs, torch.get_rng_state())) or function(*inputs)

    monkeypatch.setattr(shared.Run, "write_scalars", drawn(write_scalars))
    monkeypatch.setattr(shared, "apply_gradients", drawn(apply_gradients))
    measured = main(shared, *flags, "--eval-every", 30, "--actor-delay", 1)
    assert len(returns(measured, "eval.csv")) == 1 + 7 + 1
    # The norms' batch and noise leave the generator where they found it.
    norms = [i for i, (f, inputs, _) in enumerate(draws) if f == write_scalars and "grad_norm" in inputs[1]]
    assert norms and all(torch.equal(draws[i][2], draws[i - 1][2]) for i in norms)
    monkeypatch.setattr(shared, "gradient_norms", lambda actor, critics, obs, noise, alpha: torch.zeros(5))
    bare = main(shared, *flags, "--eval-every", 0, "--actor-delay", 1)
    assert len(returns(bare, "eval.csv")) == 1 and not (bare / "policy_best.pt").exists()
    states = [checkpoint(folder) for folder in (measured, bare)]
    for state in states:
        del state["args"], state["best"], state["rows"]["eval.csv"]
    assert_same(*states)
    assert returns(measured) == returns(bare)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_papers_equations_train(name, main):
    """By the flags that the docstring names."""
    script = importlib.import_module(name)
    (flags,) = re.findall(r"^Close to the paper: (.*)", script.__doc__, re.M)
    steps = ["--learning-starts", 20, "--total-timesteps", 26, "--eval-every", 0]
    folder = main(script, *HOPPER, *flags.split(), *steps)
    actor = script.load_policy(folder / "policy.pt")
    assert (actor.score_step, actor.entropy) == ("euler", "path") and not list(actor.encoder.parameters())
    assert json.loads((folder / "args.json").read_text())["target_entropy"] == 0
    if name == "sac_flow_t":  # contractive, they would start as each other's negative
        weights = actor.velocity_net.out.weight, -actor.velocity_net.from_action.weight.T
        assert not torch.allclose(*weights, atol=0.02)


def test_an_evaluations_error_is_that_of_the_sample(shared):
    """The root of the sample's variance over the episodes: of returns 1, 2 and 6 that is sqrt(7 / 3); of one, 0."""
    ends = iter([1.0, 2.0, 6.0, 5.0])
    space = SimpleNamespace(shape=(1,), low=-1, high=1, dtype="float32")
    step = lambda action: (0, 0, True, False, {shared.EPISODE: {"r": next(ends), "l": 1}})  # noqa: E731
    env = SimpleNamespace(reset=lambda seed: (0, {}), step=step, action_space=space)
    act = lambda obs: torch.zeros(1).numpy()  # noqa: E731
    scores = shared.evaluate(act, env, 3, seed=0)
    assert scores["return"] == 3 and scores["return_error"] == pytest.approx((7 / 3) ** 0.5)
    assert shared.evaluate(act, env, 1, seed=0)["return_error"] == 0


def test_without_evaluations_there_is_one_environment(shared, main, monkeypatch):
    """It may be a robot."""
    made = []
    make_env = shared.make_env
    monkeypatch.setattr(shared, "make_env", lambda *args: made.append(args) or make_env(*args))
    main(shared, *PENDULUM, "--total-timesteps", 110, "--eval-every", 0)
    assert len(made) == 1


def test_episodes_that_the_environment_counts_itself(shared, main):
    flags = ["--env-id", "tiny_envs:Episodic-v0", "--learning-starts", 15, "--total-timesteps", 30, "--eval-every", 20]
    folder = main(shared, *flags, *SMALL)
    assert [row[2] for row in returns(folder)[1:]] == 3 * ["10"]
    assert [row[4] for row in returns(folder, "eval.csv")[1:]] == 3 * ["10"]


def test_evaluation_takes_no_time_of_the_run_and_keeps_the_best_policy(shared, main, monkeypatch):
    # At 70, 140 and 210 steps, then of sampled actions; resumed, at 280.
    found = iter([3.0, 5.0, 4.0, 9.0, 4.5, 9.5])
    monkeypatch.setattr(
        shared,
        "evaluate",
        lambda *inputs: time.sleep(1) or {"return": next(found), "return_error": 0.0, "length": 1.0},
    )
    start = time.monotonic()
    folder = main(shared, *PENDULUM, "--total-timesteps", 210, "--eval-every", 70)
    rows = returns(folder, "eval.csv")[1:]
    assert [row[0] for row in rows] == ["70", "140", "210", "210"] and rows[-1][1:3] == ["stochastic", "9"]
    assert [torch.load(folder / name)["step"] for name in ("policy_best.pt", "policy.pt")] == [140, 210]
    training = time.monotonic() - start - 4  # at most: evaluations took 4
    for name in ("returns.csv", "eval.csv"):
        assert float(list(csv.reader(open(folder / name)))[-1][-1]) < training
    assert torch.load(folder / "checkpoint.pt")["progress"]["seconds"] < training
    main(shared, "--resume", folder, "--total-timesteps", 280)
    assert torch.load(folder / "policy_best.pt")["step"] == 140  # 4.5 is below the best of before


def test_a_log_file_gets_lines(shared, main, capsys):
    """Not the fragments of a progress bar: a line every 1 000 updates, with the speed and the time that is left."""
    folder = main(shared, *PENDULUM, "--total-timesteps", 1300, "--run-name", "x")
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    shown = r"1100/1300 \[00:\d\d<00:\d\d, +[\d.]+ steps/s, return [\d.]+, alpha 0.0\d+\]"
    assert re.fullmatch(rf" 85%\|.*\| {shown}", line), line
    ended = [float(row[1]) for row in returns(folder)[1:] if int(row[0]) < 1100]
    assert len(ended) > 20 and f"return {np.mean(ended[-10:]):.4g}," in line
    assert output.out.startswith("run: runs/x\n") and folder.name == "x"


def test_load_policy_is_the_averaged_actor(script, main, tmp_path, capsys):
    folder = main(script, *PENDULUM, "--total-timesteps", 150, "--actor-average", 0.9, "--flow-steps", 3)
    actor, state = script.load_policy(folder / "policy.pt"), checkpoint(folder)
    assert_same(dict(actor.state_dict()), dict(state["average"]))
    assert_same(dict(script.load_policy(str(folder)).state_dict()), dict(state["average"]))
    assert not torch.equal(state["average"]["sigma_net.0.weight"], state["actor"]["sigma_net.0.weight"])
    for statistic in ("running_mean", "running_var", "batches"):
        assert_same(state["average"][f"norm.{statistic}"], state["actor"][f"norm.{statistic}"])
    assert (state["actor"]["norm.running_var"] != 1).all()
    obs = torch.randn(6, 4)
    assert actor.flow_steps == 3 and actor.act(obs, deterministic=True).shape == (6, 1)
    torch.testing.assert_close(actor.act(obs[:1], deterministic=True), actor.act(obs, deterministic=True)[:1])
    (folder / "policy.pt").write_bytes(b"not a policy")
    with pytest.raises(SystemExit):
        script.load_policy(folder / "policy.pt")
    assert "policy.pt is unreadable, truncated or corrupted" in capsys.readouterr().err


# --- checkpoints ---


def test_killed_run_resumes_bit_for_bit(run, name, tmp_path):
    flags = [*PENDULUM, "--total-timesteps", 500, "--save-every", 120, "--buffer-size", 220]  # the buffer wraps around
    flags += ["--eval-every", 50]
    assert run(*flags).returncode == 0
    whole = the_run(tmp_path)
    whole = whole.rename(tmp_path / "whole")

    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(name, *flags), cwd=tmp_path, **quiet)
    while process.poll() is None:  # until it has gone on past its second checkpoint
        time.sleep(0.05)
        saved = [path for path in (tmp_path / "runs").glob("*/checkpoint.pt")]
        if saved and returns(saved[0].parent)[-1][0].isdigit() and int(returns(saved[0].parent)[-1][0]) > 320:
            break
    assert process.poll() is None, "the run ended before it could be killed"
    process.kill()
    process.wait()
    folder = the_run(tmp_path)
    assert 240 <= checkpoint(folder)["step"] < 500
    done = run("--resume", folder)
    assert done.returncode == 0, done.stderr
    assert_same(checkpoint(folder), checkpoint(whole) | {"args": checkpoint(folder)["args"]})
    assert returns(folder) == returns(whole) and returns(folder, "eval.csv") == returns(whole, "eval.csv")
    for policy in ("policy.pt", "policy_best.pt"):
        states = [torch.load(path / policy, weights_only=True) for path in (folder, whole)]
        assert_same(states[0], states[1] | {"args": states[0]["args"]})


EAGER = itertools.product(SCRIPTS, ([*HOPPER, "--crossq"], [*HOPPER, "--no-crossq"]))


# What is compiled here is what test_compiled_is_eager compiled.
@pytest.mark.parametrize("name, kind", [*EAGER, ("sac_flow_g", [*TWO_STEPS, "--compile"])])
def test_finished_run_can_be_extended_bit_for_bit(run, tmp_path, kind):
    """One that ended where an episode did. The evaluations at the first end stay."""
    flags = [*kind, "--learning-starts", 300]
    flags += ["--eval-every", 100]
    assert run(*flags, "--total-timesteps", 400).returncode == 0
    whole = the_run(tmp_path).rename(tmp_path / "whole")
    episodes = ((int(end), int(length)) for end, _, length in returns(whole)[1:])
    start = next(end - length for end, length in episodes if end - length > 302 and length > 3)
    assert run(*flags, "--total-timesteps", start).returncode == 0
    folder = the_run(tmp_path)
    ended = [row for row in returns(folder, "eval.csv") if row[0] == str(start)]
    assert [row[1] for row in ended] == ["deterministic", "stochastic"]
    done = run("--resume", folder, "--total-timesteps", 400)
    assert done.returncode == 0, done.stderr
    extended = checkpoint(folder)
    others = {name: extended[name] for name in ("args", "best", "rows")}
    assert_same(extended, checkpoint(whole) | others)
    assert returns(folder) == returns(whole)
    rows = returns(folder, "eval.csv")
    assert [row for row in rows if row not in ended] == returns(whole, "eval.csv") and len(rows) == 2 + len(
        returns(whole, "eval.csv")
    )
    scores = [float(row[2]) for row in rows[1:] if row[1] == "deterministic"]
    assert extended["best"] == pytest.approx(max(scores), rel=1e-4)


def test_a_run_that_is_extended_within_an_episode_begins_a_new_one(shared, main):
    """The odd episodes of `Scripted`, the first among them, last 7 steps, the even ones 5."""
    flags = ["--env-id", "tiny_envs:Scripted-v0", "--learning-starts", 15, "--eval-every", 0, *SMALL]
    folder = main(shared, *flags, "--total-timesteps", 17)
    main(shared, "--resume", folder, "--total-timesteps", 40)
    rows = [(int(end), int(length)) for end, _, length in returns(folder)[1:]]
    assert rows == [(7, 7), (12, 5), (24, 7), (29, 5), (36, 7)]


def test_evaluations_at_a_checkpoints_step_are_kept(shared, main):
    """Episodes, evaluations and checkpoints end at the same steps, and so does the run that is extended."""
    flags = ["--env-id", "tiny_envs:Home-v0", "--learning-starts", 15, "--save-every", 20, "--eval-every", 20, *SMALL]
    whole = returns(main(shared, *flags, "--total-timesteps", 60), "eval.csv")
    folder = main(shared, *flags, "--total-timesteps", 40)
    assert [row[:2] for row in returns(folder, "eval.csv")[-2:]] == [["40", "deterministic"], ["40", "stochastic"]]
    main(shared, "--resume", folder, "--total-timesteps", 60)
    rows = returns(folder, "eval.csv")
    assert [row for row in rows if row[:2] != ["40", "stochastic"]] == whole and len(rows) == 1 + len(whole) == 1 + 5


def test_a_run_killed_in_its_last_evaluations_makes_them_when_resumed(shared, main, monkeypatch):
    """Its last checkpoint is one from which there is still something to do."""
    flags = ["--env-id", "tiny_envs:Home-v0", "--learning-starts", 15, "--save-every", 20, "--eval-every", 20, *SMALL]
    whole = main(shared, *flags, "--total-timesteps", 60)
    evaluate, calls = shared.evaluate, []
    dies = lambda *inputs: calls.append(None) or (sys.exit(1) if len(calls) == 4 else evaluate(*inputs))  # noqa: E731
    monkeypatch.setattr(shared, "evaluate", dies)  # at 20, 40, 60 deterministic and then 60 stochastic
    with pytest.raises(SystemExit):
        main(shared, *flags, "--total-timesteps", 60)
    folder = the_run(Path.cwd())
    assert checkpoint(folder)["step"] == 40
    main(shared, "--resume", folder)
    assert returns(folder, "eval.csv") == returns(whole, "eval.csv")
    assert_same(*(checkpoint(run)["actor"] for run in (folder, whole)))


def test_a_tracked_run_is_tracked_when_resumed(shared, main, monkeypatch, capsys):
    """Under the same name; what plays its policy is not."""
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **flags: calls.append(flags)))
    folder = main(shared, *PENDULUM, "--total-timesteps", 120, "--track")
    main(shared, "--resume", folder, "--total-timesteps", 130)
    main(shared, "--evaluate", folder)
    assert [(call["id"], call["resume"]) for call in calls] == 2 * [(f"runs-{folder.name}", "allow")]
    main(shared, "--resume", folder, "--total-timesteps", 140, "--no-track")
    with pytest.raises(SystemExit):
        main(shared, "--evaluate", folder, "--track")
    assert len(calls) == 2
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **flags: 1 / 0))
    with pytest.raises(SystemExit):
        main(shared, *PENDULUM, "--track")
    message = capsys.readouterr().err.splitlines()[-1]
    assert "--track: division by zero" in message and "pip install" not in message


@pytest.mark.parametrize("name", [*SCRIPTS, "sac_flow_offline2online"])
def test_a_failure_goes_through_sys_exit(name, monkeypatch):
    """Weights & Biases replaces that, to learn the exit code; a SystemExit raised by other means it calls a success."""
    codes = []
    monkeypatch.setattr("sys.exit", codes.append)
    monkeypatch.setattr("sys.argv", ["x", "--gamma", "2"])
    runpy.run_path(str(path_of(name)), run_name="__main__")
    assert codes == [2]


def test_evaluations_reach_a_log_file_at_once(shared, tmp_path, monkeypatch):
    """Standard output is buffered there, standard error is not: a sweep shows the log's last line as the reason."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(log := io.BytesIO()))
    run = shared.Run(shared.Args(run_name="x"), 100, None)
    with run:
        run.report("deterministic", {"return": 7.0, "return_error": 0.5, "length": 3.0})
    assert log.getvalue().endswith(b"deterministic: return 7.0 +- 0.5, length 3\n")


def test_a_log_that_cannot_be_closed_is_a_failure(shared, tmp_path, monkeypatch, refused):
    """The disk is full at the end, after the last checkpoint: TensorBoard's log lacks what was still to be written."""

    def full():
        raise OSError("No space left on device")

    monkeypatch.chdir(tmp_path)
    run = shared.Run(shared.Args(run_name="x"), 100, None)
    run.saved_step = 100
    monkeypatch.setattr(run.writer, "close", full)

    def to_its_end():
        with run:
            pass

    refused(to_its_end, "No space left on device", "the checkpoint of step 100 is kept")


def test_random_actions_are_not_the_environments_own_draws(main, shared):
    """Seeded alike, both would come from the same stream of numbers."""
    folder = main(shared, *PENDULUM, "--total-timesteps", 101, "--seed", 5)
    actions = checkpoint(folder)["buffer"]["rows"][:100, 4].numpy()  # (obs (4), action (1), ...)
    drawn = np.random.default_rng(5).uniform(-3, 3, 500)  # the action's bounds
    assert np.abs(actions[:, None] - drawn).min() > 3e-7  # float32's rounding is less


def test_an_old_generator_of_an_environment_resumes_within_a_pair_of_gaussians(shared):
    """dm_control's are of numpy's old kind: it draws two Gaussians at once and keeps one."""
    env = gym.make("Pendulum-v1")
    env.unwrapped.np_random = np.random.RandomState(3)
    generators = shared.Generators(torch.device("cpu"), env)
    env.unwrapped.np_random.randn(3)
    states = generators.state_dict()
    drawn = env.unwrapped.np_random.randn(3)
    generators.load_state_dict(states)
    np.testing.assert_array_equal(env.unwrapped.np_random.randn(3), drawn)


@one_script
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_run_saves_at_the_end_of_the_episode(run, name, tmp_path, number):
    flags = command(name, *PENDULUM, "--total-timesteps", 100_000)
    process = subprocess.Popen(flags, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while not (rows := list((tmp_path / "runs").glob("*/returns.csv"))) or len(returns(rows[0].parent)) < 20:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and f"{name}.py --resume runs/" in output
    folder = the_run(tmp_path)
    step = checkpoint(folder)["step"]
    assert step == int(returns(folder)[-1][0])
    assert run("--resume", folder, "--total-timesteps", step + 50).returncode == 0


def test_a_signal_just_before_the_next_episode_is_heeded_at_its_end(shared, main, monkeypatch, capsys):
    """Not before its checkpoint is written."""
    interrupt_after_should_save(shared, monkeypatch)
    with pytest.raises(SystemExit) as error:
        main(shared, "--env-id", "tiny_envs:Home-v0", "--learning-starts", 15, "--total-timesteps", 60, *SMALL)
    assert error.value.code == 128 + signal.SIGINT and "stopped at step 20; resume with" in capsys.readouterr().out
    assert checkpoint(the_run(Path()))["step"] == 20


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_stops_at_once(tmp_path, second):
    """Within an episode of 10 000 steps, which no environment with that name ends."""
    flags = ["--env-id", "tiny_envs:Endless-v0", "--total-timesteps", 200_000, "--learning-starts", 100_000, *SMALL]
    process = subprocess.Popen(command("sac_flow_g", *flags), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "runs").glob("*/returns.csv")):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(second)
    try:
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -second and "at the end of this episode" in stderr and "Traceback" not in stderr


@one_script
def test_endless_episodes_are_truncated(run, tmp_path):
    """So that checkpoints and evaluations come to an end; a limit of the environment's own gives way to the flag."""
    for env_id in ("tiny_envs:Endless-v0", "Humanoid-v4"):
        flags = ["--env-id", env_id, "--max-episode-steps", 10, "--learning-starts", 45, "--total-timesteps", 50]
        done = run(*flags, "--save-every", 20, *SMALL)
        assert done.returncode == 0 and "length 10\n" in done.stdout, done.stderr
        folder = the_run(tmp_path)
        assert [row[2] for row in returns(folder)[1:]] == 5 * ["10"]
        state = checkpoint(folder)
        assert not state["buffer"]["rows"][:, -1 - state["actor"]["norm.weight"].numel()].any()
        folder.rename(tmp_path / env_id.replace(":", "-"))


@pytest.mark.parametrize("name", [*SCRIPTS, "sac_flow_offline2online"])
def test_a_limit_that_the_script_sets_is_said_once(name, capsys):
    script = importlib.import_module(name)
    offline = name == "sac_flow_offline2online"
    env_id = "tiny_envs:Endless-v0"
    for _ in range(2):
        env = script.make_env(script.Args(env_id, dataset="none.npz") if offline else env_id)
        assert env.get_wrapper_attr("_max_episode_steps") == 10_000
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: tiny_envs:Endless-v0 registers no time limit: ") and "max" in line


@pytest.mark.parametrize("name", [*SCRIPTS, "sac_flow_offline2online"])
def test_evaluations_of_two_seeds_share_no_start(name):
    script = importlib.import_module(name)
    env = gym.wrappers.RecordEpisodeStatistics(gym.make("Home-v0", max_episode_steps=1), stats_key=script.EPISODE)
    starts = {}

    def act(obs):
        starts[seed].append(tuple(obs))
        return np.zeros(env.action_space.shape, np.float32)

    for seed, episodes in ((4, 10), (5, 10), (6, 3)):
        starts[seed] = []
        script.evaluate(act, env, episodes, seed)
    assert len({*starts[4], *starts[5]}) == 20
    seed = 0
    starts[seed] = []
    script.evaluate(act, env, 10, 6)
    assert starts[0][:3] == starts[6]  # the first of many are those of few


@pytest.mark.parametrize("env_id", ["Home-v0", "Windowless-v0"])  # the first takes no render_mode
def test_an_environment_that_cannot_be_shown_is_played_unseen(shared, monkeypatch, capsys, env_id):
    monkeypatch.setenv("DISPLAY", ":99")
    shared.note.cache_clear()
    env = shared.make_env(env_id, 5, "human")
    env.reset(seed=0)
    assert "note: played unseen, as no window opens: " in capsys.readouterr().err
    with pytest.raises(SystemExit):  # a video of it is another matter
        shared.make_env(env_id, 5, "rgb_array")
    assert f"error: --env-id {env_id}: " in capsys.readouterr().err


def test_videos_that_cannot_be_written_are_a_line(shared, tmp_path, capsys):
    pytest.importorskip("moviepy")
    (tmp_path / "videos").write_text("")
    with pytest.raises(SystemExit):
        shared.record_videos(gym.make("Recorded-v0", render_mode="rgb_array"), tmp_path, "training")
    assert f"--capture-video: cannot write to {tmp_path / 'videos'}: " in capsys.readouterr().err


def test_both_kinds_of_a_saved_policys_episodes_start_alike(shared, main, monkeypatch):
    """As in the run's own evaluations, where the environment draws from a global generator, too."""
    folder = main(shared, "--env-id", "tiny_envs:Dice-v0", "--learning-starts", 15, "--total-timesteps", 30, *SMALL)
    rolls = []
    evaluate = shared.evaluate
    monkeypatch.setattr(shared, "evaluate", lambda *args: rolls.append(np.random.get_state()[1]) or evaluate(*args))
    main(shared, "--evaluate", folder)
    assert len(rolls) == 2 and (rolls[0] == rolls[1]).all()


def test_an_error_while_playing_is_a_line(shared, main, monkeypatch, capsys):
    """And a run whose name looks like that of a policy file is a run all the same."""
    folder = main(shared, *PENDULUM, "--total-timesteps", 110, "--run-name", "x.pt")

    def evaluate(*args):
        raise RuntimeError("the arm fell off\nand much more")

    monkeypatch.setattr(shared, "evaluate", evaluate)
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main(shared, "--evaluate", folder)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"error: --evaluate {folder}: the arm fell off")
    monkeypatch.undo()
    monkeypatch.setattr(gym.Wrapper, "close", evaluate)  # after all has been printed
    with pytest.raises(SystemExit):
        main(shared, "--evaluate", folder)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"error: --evaluate {folder}: the arm fell off")


@one_script
def test_evaluate(run, tmp_path):
    assert run(*PENDULUM, "--total-timesteps", 200).returncode == 0
    folder = the_run(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    first, second = run("--evaluate", folder), run("--evaluate", folder)
    assert first.returncode == 0, first.stderr
    assert "step 200" in first.stdout and first.stdout == second.stdout
    for _, kind, value, *_ in returns(folder, "eval.csv")[-2:]:  # of step 200, as policy.pt is
        assert f"\n{kind}: return {float(value):.1f} +-" in first.stdout
    others = {run("--evaluate", folder, "--seed", seed).stdout for seed in (2, 3, 4)}  # two may round alike
    assert others != {first.stdout}
    assert_refused(run("--evaluate", folder, "--total-timesteps", 900), "--total-timesteps 900 conflicts with 200")
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    (folder / "checkpoint.pt").unlink()  # policy.pt is enough
    done = run("--evaluate", folder / "policy_best.pt", "--eval-episodes", 2)
    assert done.returncode == 0 and str(folder / "policy_best.pt") in done.stdout, done.stderr


def can_render() -> bool:
    """Whether this machine renders without a display."""
    code = "import gymnasium as g; e = g.make('InvertedPendulum-v5', render_mode='rgb_array'); e.reset(); e.render()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@one_script
def test_capture_video(run, tmp_path):
    if not can_render():
        pytest.skip("no EGL here: apt install libegl1")
    done = run(*PENDULUM, "--total-timesteps", 150, "--capture-video")
    assert done.returncode == 0, done.stderr
    folder = the_run(tmp_path)
    videos = list((folder / "videos").glob("*.mp4"))
    assert videos and all(path.stat().st_size > 1000 for path in videos)
    for policy in (folder, folder / "policy_best.pt"):  # neither's videos give way to the other's
        assert run("--evaluate", policy, "--capture-video", "--eval-episodes", 2).returncode == 0
    kinds = [("deterministic", 0), ("stochastic", 2)]  # the first episode of each
    names = {
        f"evaluation-of-{policy}-{kind}-episode-{n}.mp4" for policy in ("policy", "policy_best") for kind, n in kinds
    }
    assert {path.name for path in (folder / "videos").glob("evaluation*.mp4")} == names
    assert run("--resume", folder, "--total-timesteps", 200).returncode == 0
    assert list((folder / "videos").glob("from-step-150-*.mp4"))


# --- bad input ---


def assert_refused(done, *words):
    """One line on standard error that has the words, exit code 2."""
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if "step/s" not in line and line.strip()]
    assert len(lines) == 1 and all(word in lines[0] for word in words), done.stderr


@pytest.mark.filterwarnings("error:overflow:RuntimeWarning")  # a warning would be a second line
@pytest.mark.parametrize(
    "flags, words",
    [
        ("--env-id NoSuch-v0", "NoSuch"),
        ("--env-id no_such_module:NoSuch-v0", "no_such_module"),
        ("--env-id CartPole-v1", "actions must be a Box"),
        ("--env-id tiny_envs:DiscreteObservation-v0", "observations must be a Box"),
        ("--env-id tiny_envs:DictObservation-v0", "observations must be a Box"),
        ("--env-id tiny_envs:ImageObservation-v0", "one dimension"),
        ("--env-id tiny_envs:DiscreteAction-v0", "actions must be a Box"),
        ("--env-id tiny_envs:UnboundedAction-v0", "finite bounds"),
        ("--env-id tiny_envs:NoAction-v0", "finite bounds"),
        ("--env-id tiny_envs:NormalizedObservation-v0", "is not saved"),
        ("--env-id tiny_envs:NormalizedReward-v0", "is not saved"),
        ("--env-id tiny_envs:HugeAction-v0", "finite bounds"),
        ("--flow-steps 0", "--flow-steps must be 1 or more, not 0"),
        ("--batch-size 512 --buffer-size 100", "--batch-size must be from 2 to --buffer-size 100, not 512"),
        ("--batch-size 1", "--batch-size must be from 2"),
        ("--no-crossq --batch-size 0", "--batch-size must be 1 or more"),
        ("--total-timesteps 2000", "--total-timesteps must be above --learning-starts 5000, where learning begins"),
        ("--critic-lr inf", "--critic-lr must be above 0 and finite, not inf"),
        ("--max-episode-steps 0", "--max-episode-steps"),
        ("--critic-dim 0", "--critic-dim"),
        ("--sigma-dim -3", "--sigma-dim"),
        ("--encoder-dim -1", "--encoder-dim"),
        ("--velocity-dim 0", "--velocity-dim"),
        ("--total-timesteps -1", "--total-timesteps"),
        ("--buffer-size 0", "--buffer-size"),
        ("--actor-delay 0", "--actor-delay"),
        ("--learning-starts -1", "--learning-starts"),
        ("--save-every 0", "--save-every"),
        ("--gamma 1.5", "--gamma"),
        ("--tau 0", "--tau"),
        ("--alpha 0", "--alpha"),
        ("--actor-lr nan", "--actor-lr"),
        ("--adam-b1 1", "--adam-b1"),
        ("--renorm-warmup -1", "--renorm-warmup"),
        ("--target-entropy nan", "--target-entropy must be finite"),
        ("--total-timesteps 5000", "--total-timesteps must be above"),
        ("--gamma -0.1", "--gamma"),
        ("--tau 1.5", "--tau"),
        ("--seed -1", "--seed"),
        ("--seed 5000000000", "--seed"),
        ("--env-id tiny_envs:Broken-v0", "tiny_envs:Broken-v0: division by zero"),
        ("--env-id tiny_envs:Exits-v0", "--env-id tiny_envs:Exits-v0: 0"),
        ("--env-id tiny_envs:Absent-v0", "--env-id tiny_envs:Absent-v0: its reset failed: robot not connected"),
        ("--env-id a:b:c", "--env-id a:b:c"),
        ("--critic-dim 10000000", "--critic-dim"),
        ("--resume nowhere", "nowhere/checkpoint.pt"),
        (f"--resume {300 * 'a'}", "there is no aaa"),  # longer than a name may be
        ("--evaluate nowhere", "nowhere/policy.pt"),
        ("--evaluate runs/nothing.pt", "runs/nothing.pt"),
        ("--eval-every -1", "--eval-every"),
        ("--eval-episodes 0", "--eval-episodes"),
        ("--actor-average 1", "--actor-average"),
        ("--target-entropy 100", "--target-entropy must be at most"),
        ("--no-autotune --target-entropy -3", "--target-entropy must be left out with --no-autotune, not -3"),
        ("--no-crossq --renorm-warmup 5", "--renorm-warmup must be left out with --no-crossq, not 5"),
        ("--resume a --evaluate b", "exclude"),
        ("--buffer-size 1000000000000000", "--buffer-size"),
    ],
)
def test_bad_flags(shared, tmp_path, monkeypatch, refused, flags, words):
    monkeypatch.chdir(tmp_path)
    few = ["--total-timesteps", "5001", "--no-compile"]  # should a run start after all
    monkeypatch.setattr("sys.argv", ["script", *few, *flags.split()])
    refused(shared.main, words)
    assert not any(tmp_path.iterdir())  # nothing was created


@pytest.mark.parametrize("flag", ["--resume", "--evaluate", "--run-name"])
def test_an_empty_name_is_an_error(shared, tmp_path, monkeypatch, refused, flag):
    """What an unset shell variable leaves; it used to start a run of a million steps."""
    monkeypatch.chdir(tmp_path)
    few = ["--total-timesteps", "60", "--learning-starts", "50", *SMALL]  # should it start one after all
    monkeypatch.setattr("sys.argv", ["script", flag, "", *few])
    refused(shared.main, f"{flag} must be a name")
    assert not any(tmp_path.iterdir())


@one_script
def test_run_name(run, tmp_path):
    """Names the folder; one that is there is not written to."""
    assert run(*PENDULUM, "--total-timesteps", 120, "--run-name", "a/b").returncode == 0
    before = (tmp_path / "runs/a/b/returns.csv").read_bytes()
    assert_refused(run(*PENDULUM, "--run-name", "a/b"), "runs/a/b exists", "--resume runs/a/b")
    assert (tmp_path / "runs/a/b/returns.csv").read_bytes() == before
    assert run("--resume", "runs/a/b", "--total-timesteps", 130).returncode == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["a"]
    (tmp_path / "runs/b").mkdir()  # of a run that died before its first checkpoint
    done = run(*PENDULUM, "--run-name", "b")
    assert_refused(done, "runs/b exists")
    assert "--resume" not in done.stderr


def test_runs_that_begin_in_the_same_second(shared, monkeypatch, tmp_path):
    """Those of a launcher's loop, which differ in their flags alone; the second used to stop with "File exists"."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shared.time, "time", lambda: 1000.9)
    names = []
    for _ in range(3):
        run = shared.Run(shared.Args(env_id="my/Env-v0", seed=7), 1, None)
        run.writer.close()
        run.lock.close()
        names.append(run.folder.name)
    script = shared.SCRIPT
    assert names == [f"my_Env-v0__{script}__7__1000", f"my_Env-v0__{script}__7__1001", f"my_Env-v0__{script}__7__1002"]


def test_a_run_that_went_on_meanwhile_is_not_set_back(shared, main, monkeypatch, capsys):
    """Two are to resume it; the second has read the checkpoint before the first writes another."""
    folder = main(shared, *PENDULUM, "--total-timesteps", 110)
    monkeypatch.setattr("sys.argv", ["script", "--resume", str(folder), "--total-timesteps", "150"])
    args, old = shared.parse_args()
    main(shared, "--resume", folder, "--total-timesteps", 130)
    before = (folder / "returns.csv").read_bytes()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **flags: pytest.fail("touched")))
    args.track = True
    with pytest.raises(SystemExit):
        shared.Run(args, args.total_timesteps, old)
    assert f"{folder} was continued by another process" in capsys.readouterr().err
    assert (folder / "returns.csv").read_bytes() == before and checkpoint(folder)["step"] == 130


@one_script
def test_a_run_that_is_training_is_not_resumed(run, name, tmp_path):
    flags = [*PENDULUM, "--total-timesteps", 100_000, "--save-every", 1, "--run-name", "x"]
    process = subprocess.Popen(
        command(name, *flags), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "runs/x/checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    assert_refused(run("--resume", "runs/x"), "runs/x is in use by process", str(process.pid))
    process.kill()
    process.wait()
    step = checkpoint(tmp_path / "runs/x")["step"]
    assert run("--resume", "runs/x", "--total-timesteps", max(step, 100) + 20).returncode == 0


@pytest.mark.parametrize("terminal", [False, True])  # there tyro writes colours, and elsewhere, in ASCII, no frame
@pytest.mark.parametrize(
    "flags, words",
    [
        ("--btach-size 3", ("--btach-size", "Perhaps you meant: --batch-size")),
        ("--seed abc", ("--seed", "'abc'")),
        ("--total-timesteps 1e6", ("--total-timesteps", "'1e6'")),
        ("--seed", ("--seed", "Missing value")),
        ("--score-step eulr", ("--score-step", "'eulr'", "'euler'")),
        ("Hopper-v4", ("Unrecognized options: Hopper-v4",)),
        ("--track maybe", ("maybe",)),
    ],
)
def test_flags_that_cannot_be_read(shared, tmp_path, monkeypatch, capsys, flags, words, terminal):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    monkeypatch.setattr("tyro._fmtlib._FORCE_UTF8_BOXES", terminal)
    monkeypatch.setattr("sys.argv", ["script", *flags.split()])
    with pytest.raises(SystemExit) as error:
        shared.main()
    stdout, stderr = capsys.readouterr()
    assert error.value.code == 2 and not stdout and not any(tmp_path.iterdir())
    assert stderr.startswith("script: error: ") and len(stderr.splitlines()) == 1 and stderr[:-1].isprintable(), stderr
    assert all(word in stderr for word in words), stderr


def test_help(script, monkeypatch, capsys):
    """What it is and a command to start with, in lines no longer than the source's; then the flags."""
    monkeypatch.setattr("sys.argv", ["script", "--help"])
    with pytest.raises(SystemExit) as error:
        script.main()
    stdout = capsys.readouterr().out
    assert not error.value.code and max(map(len, stdout.splitlines())) <= 120
    title, *rest = script.__doc__.splitlines()
    (command,) = (line for line in rest if line.startswith("    python "))
    assert f"\n{title}\n{command}\n" in stdout and "--run-name STR" in stdout
    for heading, first in (
        ("What to run", "env-id"),
        ("Soft actor-critic", "buffer-size"),
        ("Flow policy", "flow-steps"),
    ):
        expected = heading in open(script.__file__).read()
        assert stdout.count(f" {heading}\n") == stdout.count(f" {heading}\n  --{first} ") == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_asked_for_and_absent(run):
    assert_refused(run("--cuda"), "--cuda", "--no-cuda")


@one_script
def test_missing_packages_are_named(run, tmp_path):
    for flag, package in (("--track", "wandb"), ("--capture-video", "moviepy")):
        (tmp_path / "hidden").mkdir(exist_ok=True)
        (tmp_path / "hidden" / f"{package}.py").write_text("raise ImportError")
        path = os.pathsep.join([str(tmp_path / "hidden"), os.environ["PYTHONPATH"]])
        assert_refused(run(flag, env={"PYTHONPATH": path}), package, "benchmark/requirements.txt")
        assert not (tmp_path / "runs").exists()


@one_script
def test_bad_checkpoints(run, name, tmp_path):
    assert run(*PENDULUM, "--total-timesteps", 150).returncode == 0
    folder = the_run(tmp_path)
    other = "sac_flow_t" if name == "sac_flow_g" else "sac_flow_g"
    assert_refused(run("--resume", folder, name=other), name, other)
    assert_refused(run("--evaluate", folder / "checkpoint.pt"), "another kind", "--evaluate")
    assert_refused(run("--resume", folder / "checkpoint.pt"), "--resume takes a run's folder", str(folder))
    assert_refused(run("--resume", folder), "has reached step 150", "--total-timesteps")
    assert_refused(run("--resume", folder, "--total-timesteps", 200, "--gamma", 0.9), "--gamma 0.9", "0.99")
    assert_refused(run("--resume", folder, "--total-timesteps", 200, "--seed", 3), "--seed 3")
    assert_refused(run("--resume", folder, "--total-timesteps", 200, "--env-id", "Hopper-v4"), "--env-id Hopper-v4")

    path = folder / "checkpoint.pt"
    whole = path.read_bytes()
    altered = torch.load(io.BytesIO(whole))
    altered["args"]["env_id"] = "Hopper-v4"
    torch.save(altered, path)
    assert_refused(run("--resume", folder, "--total-timesteps", 200), "not for Hopper-v4 now")
    altered = torch.load(io.BytesIO(whole))
    altered["generators"] = None
    torch.save(altered, path)
    assert_refused(run("--resume", folder, "--total-timesteps", 200), "was altered")
    for key, words in {"progress": "another kind", "args": "another version", "buffer": "was altered"}.items():
        altered = torch.load(io.BytesIO(whole))
        del altered[key]
        torch.save(altered, path)
        assert_refused(run("--resume", folder, "--total-timesteps", 200), words)
        torch.save(altered | {key: 7}, path)
        assert_refused(
            run("--resume", folder, "--total-timesteps", 200), "corrupted" if key == "args" else "was altered"
        )
    policy = torch.load(folder / "policy.pt")
    policy["args"]["env_id"] = "Hopper-v4"
    torch.save(policy, folder / "other.pt")
    assert_refused(run("--evaluate", folder / "other.pt"), "other observations or actions than Hopper-v4")
    del policy["actor"]["scale"]
    torch.save(policy, folder / "other.pt")
    assert_refused(run("--evaluate", folder / "other.pt"), "was altered")
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as archive:  # between its records there is padding, where a bit does not matter
        largest = archive.read(max(archive.infolist(), key=lambda record: record.file_size))
    flipped = bytearray(whole)
    flipped[whole.index(largest) + len(largest) // 2] ^= 1
    for damaged in (whole[: len(whole) // 2], bytes(flipped), b"", b"not a checkpoint"):
        path.write_bytes(damaged)
        assert_refused(run("--resume", folder, "--total-timesteps", 200), "truncated or corrupted")
    old = torch.load(io.BytesIO(whole))
    old["args"]["random_steps"] = old["args"].pop("learning_starts")
    torch.save(old, path)
    assert_refused(run("--resume", folder), "another version", "random_steps for learning_starts")
    torch.save({"model": torch.zeros(3)}, path)
    assert_refused(run("--resume", folder), "another program")
    path.write_bytes(whole)
    rows = (folder / "returns.csv").read_text()
    (folder / "returns.csv").unlink()  # its rows are in the checkpoint
    assert run("--resume", folder, "--total-timesteps", 200).returncode == 0
    assert (folder / "returns.csv").read_text().startswith(rows)


@one_script
@pytest.mark.parametrize(
    "env, step, bad",
    [
        ("BadReward", 60, "reward"),
        ("InfiniteReward", 60, "reward"),
        ("HugeReward", 60, "reward"),  # for the buffer, which is float32
        ("BadObservation", 60, "observation"),
        ("HugeObservation", 60, "observation"),
        ("BadReset", 67, "observation"),
    ],
)
def test_nan_from_the_environment_stops_the_run_and_keeps_the_checkpoint(run, tmp_path, env, step, bad):
    flags = ["--env-id", f"tiny_envs:{env}-v0", "--total-timesteps", 100, "--learning-starts", 20, *SMALL]
    assert_refused(run(*flags, "--save-every", 40), f"step {step}", bad, "checkpoint of step 43")
    assert checkpoint(the_run(tmp_path))["step"] == 43


@pytest.mark.parametrize(
    "failure, words",
    [
        ("RuntimeError", "RuntimeError: the arm fell off;"),
        ("AssertionError", "AssertionError: the arm fell off;"),
        ("OSError", "OSError: the arm fell off;"),
        ("SystemExit", "SystemExit: 0;"),
        ("none", "TypeError: "),
        ("values", "ValueError: not enough values to unpack"),
        ("shape", "Error: "),
        ("start", "RuntimeError: the arm fell off;"),
    ],
)
def test_what_the_environment_raises_is_one_line(main, tmp_path, capsys, failure, words):
    """With what is kept and how to go on; its author finds the traceback in a file."""
    flags = ["--env-id", f"tiny_envs:Failing-{failure}-v0", "--total-timesteps", 100, "--learning-starts", 20, *SMALL]
    with pytest.raises(SystemExit) as error:
        main(importlib.import_module("sac_flow_g"), *flags, "--save-every", 40)
    lines = capsys.readouterr().err.splitlines()
    folder = the_run(tmp_path / "0")
    assert error.value.code == 2 and len(lines) == 1
    assert f"of tiny_envs:Failing-{failure}-v0: " in lines[0] and words in lines[0]
    assert "the checkpoint of step 43 is kept: --resume" in lines[0] and "error.txt" in lines[0]
    assert "tiny_envs.py" in (folder / "error.txt").read_text() or failure in ("none", "values", "shape")
    assert checkpoint(folder)["step"] == 43


def test_what_fails_because_of_ctrl_c_is_a_stop(shared, main, monkeypatch, capsys):
    """In a terminal a C++ compiler that is at work for torch.compile gets the signal as well."""

    def compiler(*inputs):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)  # until the signal is handled
        raise RuntimeError("C++ compile error\nand much more")

    monkeypatch.setattr(shared, "critic_loss", compiler)
    with pytest.raises(SystemExit) as error:
        main(shared, *PENDULUM, "--total-timesteps", 120)
    stopping, stopped = capsys.readouterr().err.splitlines()
    assert error.value.code == 128 + signal.SIGINT and stopped.startswith("stopped: step ")
    assert "C++ compile error" in stopped and stopped.endswith("no checkpoint yet")


def test_interrupted_evaluation_says_so(tmp_path, start):
    """No traceback; a run has a way of its own, above."""
    flags = ["--env-id", "tiny_envs:Endless-v0", "--max-episode-steps", 10, "--learning-starts", 20, *SMALL]
    assert start(*flags, "--total-timesteps", 30, "--eval-every", 0, name="sac_flow_g").returncode == 0
    flags = command("sac_flow_g", "--evaluate", the_run(tmp_path), "--eval-episodes", 100_000)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell makes its background jobs deaf to it
    for _ in range(3):
        process = subprocess.Popen(flags, cwd=tmp_path, preexec_fn=heard, **pipes)
        assert "at step 30, 100000 episodes" in process.stdout.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, stderr = process.communicate(timeout=30)
            break
        process.kill()  # Python drops an interrupt that meets a destructor: once more
        process.communicate()
    assert process.returncode == 130 and stderr == "stopped\n"


def test_weights_that_are_not_finite_are_never_saved(shared, main, monkeypatch, capsys):
    save = shared.Run.save

    def damaged(self, state, policy):
        state["critics"]["0.net.1.weight"][0, 0] = torch.nan
        save(self, state, policy)

    monkeypatch.setattr(shared.Run, "save", damaged)
    with pytest.raises(SystemExit):
        main(shared, *PENDULUM, "--total-timesteps", 110)
    assert "critics.0.net.1.weight is NaN or infinite; no checkpoint yet" in capsys.readouterr().err
    assert not {"checkpoint.pt", "policy.pt"} & {path.name for path in the_run(Path()).iterdir()}


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_diverging_loss_is_named_and_never_saved(shared, tmp_path, monkeypatch, capsys, value):
    monkeypatch.chdir(tmp_path)
    argv = ["x", *PENDULUM, "--total-timesteps", "400", "--save-every", "120"]
    monkeypatch.setattr("sys.argv", argv)
    calls, loss = [], shared.critic_loss

    def diverging_loss(*args):
        calls.append(1)
        value_, q = loss(*args)
        return (value_ * float(value), q) if len(calls) == 137 else (value_, q)

    monkeypatch.setattr(shared, "critic_loss", diverging_loss)
    with pytest.raises(SystemExit) as error:
        shared.main()
    assert error.value.code == 2
    stderr = capsys.readouterr().err
    assert "step 237: qf_loss is NaN or infinite" in stderr and "checkpoint of step" in stderr
    assert 120 <= checkpoint(the_run(tmp_path))["step"] < 237


@one_script
def test_full_disk_while_saving(run, tmp_path):
    """A limit on file sizes stands for the full disk; the buffer's growth hits it."""
    flags = [*PENDULUM, "--total-timesteps", 4000, "--learning-starts", 3900, "--save-every", 300]
    limit = 130_000
    done = run(*flags, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert_refused(done, "could not write", "the checkpoint of step", "is kept", "--resume")
    folder = the_run(tmp_path)
    assert not (folder / "checkpoint.pt.tmp").exists()
    step = checkpoint(folder)["step"]
    assert f"the checkpoint of step {step} is kept" in done.stderr
    assert run("--resume", folder, "--total-timesteps", 3910).returncode == 0


@one_script
def test_full_disk_while_logging(run, tmp_path):
    """TensorBoard's thread is the one that hits it, and prints nothing of its own."""
    flags = [*PENDULUM, "--total-timesteps", 4000, "--learning-starts", 3900]
    done = run(*flags, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)))
    assert_refused(done, "OSError", "too large", "no checkpoint yet")


# --- learning ---


@pytest.mark.parametrize(
    "name, crossq", [("sac_flow_g", "--crossq"), ("sac_flow_g", "--no-crossq"), ("sac_flow_t", "--crossq")]
)
def test_learns_to_walk_home(run, name, tmp_path, crossq):
    """Home-v0: from the ten starts standing still returns -8.6, walking straight home -1.4.

    Found by step 1 200, the way is kept. On a task this small the default target entropy asks for much noise: with it
    Flow-T, with CrossQ's critic, first strays to -20 and is back at step 2 400 only. With -1, seeds 1 and 2 return -1.6
    and -2.4 at step 1 200.
    """
    flags = "--env-id tiny_envs:Home-v0 --total-timesteps 1600 --learning-starts 300 --actor-delay 1".split()
    flags += ["--eval-every", 400, "--eval-episodes", 10, "--actor-average", 0.99, crossq]
    flags += ["--target-entropy=-1"] if name == "sac_flow_t" else []
    done = run(*SMALL, *flags, "--critic-dim", 64, "--batch-size", 64)
    assert done.returncode == 0, done.stderr
    rows = returns(the_run(tmp_path), "eval.csv")[1:]
    found = [float(value) for step, kind, value, *_ in rows if int(step) >= 1200 and kind == "deterministic"]
    assert min(found) > -3, rows


@pytest.mark.parametrize("crossq", ["--crossq", "--no-crossq"])
def test_the_gaussian_learns_to_walk_home(start, tmp_path, crossq):
    """And stays there: the three evaluations from step 1 200 on are above -3.

    A run of 3 200 steps had -1.8 or better at each from step 800 on. Straight home from these starts is -1.4.
    """
    flags = "--env-id tiny_envs:Home-v0 --total-timesteps 1600 --learning-starts 300 --actor-delay 1".split()
    flags += "--eval-every 400 --eval-episodes 10 --policy-dim 16 --critic-dim 64 --batch-size 64".split()
    done = start(*flags, "--actor-average", 0.99, "--no-compile", "--no-cuda", crossq, name="sac_gaussian")
    assert done.returncode == 0, done.stderr
    found = [float(row[2]) for row in returns(the_run(tmp_path), "eval.csv")[1:]]
    assert len(found) == 5 and min(found[2:]) > -3, found


# --- CUDA ---


@needs_cuda
@pytest.mark.parametrize("flags", [["--compile"], ["--no-compile", "--no-crossq"]])
def test_cuda(run, tmp_path, flags):
    flags = [*flags, "--eval-every", 50]
    done = run(*PENDULUM, "--cuda", "--total-timesteps", 300, *flags)
    assert done.returncode == 0, done.stderr
    whole = the_run(tmp_path).rename(tmp_path / "whole")
    end = next(int(row[0]) for row in returns(whole)[1:] if int(row[0]) > 150)
    assert run(*PENDULUM, "--cuda", "--total-timesteps", end, *flags).returncode == 0
    folder = the_run(tmp_path)
    assert run("--resume", folder, "--total-timesteps", 300).returncode == 0
    extended = checkpoint(folder)
    assert_same(extended, checkpoint(whole) | {name: extended[name] for name in ("args", "best", "rows")})
    assert returns(folder) == returns(whole)
    done = run("--resume", folder, "--total-timesteps", 310, "--no-cuda")
    assert done.returncode == 0 and "not bit for bit" in done.stderr


@needs_cuda
def test_cuda_at_the_default_sizes(run):
    """Products of 11 and 14 columns, whose gradients the compiler may pad."""
    flags = ["--env-id", "Hopper-v4", "--cuda", "--learning-starts", 300, "--total-timesteps", 315, "--eval-every", 0]
    done = run(*flags)
    assert done.returncode == 0 and "continuing without it" not in done.stderr, done.stderr
