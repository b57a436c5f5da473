"""What benchmark/ measures is what it says."""

import csv
import importlib
import math
import time
from functools import partial

import pytest
import torch
from helpers import FLOWS, ROOT, SMALL
from torch import nn


@pytest.mark.parametrize("name", FLOWS)
def test_gradient_norms_are_the_product_of_jacobians(name):
    """One action, one observation, no score: |dL/dA_i| is the product of the steps' factors."""
    import gradient_norms

    script = importlib.import_module(name)
    actor = script.Actor(3, [-1.0], [1.0], flow_steps=5, score_step="none")
    for parameter in actor.parameters():
        nn.init.normal_(parameter, std=0.5)
    obs = torch.randn(1, 3)
    rows = gradient_norms.measure(actor, obs, partial(gradient_norms.projected, actor, obs, torch.tensor([2.0])))
    assert [row["i"] for row in rows] == list(range(6)) and rows[5] == dict(i=5, grad_norm=2, sigma=1, product=1)
    for row, following in zip(rows, rows[1:], strict=False):
        assert row["grad_norm"] == pytest.approx(2 * row["product"], rel=1e-4)
        assert row["product"] == pytest.approx(row["sigma"] * following["product"], rel=1e-4)


class Matrices(nn.Module):
    """Stands for a velocity network: v(t, a) = M(t) a, whatever the observation; M(0), M(1 / 2) for K = 2."""

    def __init__(self, first, second):
        super().__init__()
        self.matrices = nn.ParameterList([torch.tensor(first), torch.tensor(second)])

    def encode(self, obs):
        return None

    def forward(self, t, a, features):
        return a @ self.matrices[int(2 * t)].T


def test_jacobians_are_multiplied_from_the_last_step_to_the_first():
    """I + M / 2 is [[1, 1], [0, 1]] in step 0 and diag(1, 2) in step 1: their product is [[1, 1], [0, 2]]."""
    import gradient_norms

    import sac_flow_g as script

    actor = script.Actor(3, [-1.0] * 2, [1.0] * 2, flow_steps=2, score_step="none")
    actor.velocity_net = Matrices([[0.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]])
    obs = torch.randn(5, 3)
    u = torch.tensor([0.6, 0.8])
    rows = gradient_norms.measure(actor, obs, partial(gradient_norms.projected, actor, obs, u))
    # u is carried back to diag(1, 2) u = (0.6, 1.6), then to (0.6, 0.6 + 1.6).
    assert [row["grad_norm"] for row in rows] == pytest.approx([5.2**0.5, 2.92**0.5, 1])
    # The largest singular values of [[1, 1], [0, 1]], diag(1, 2) and their product. The other order has 2.288.
    assert [row["sigma"] for row in rows] == pytest.approx([(1 + 5**0.5) / 2, 2, 1], rel=1e-5)
    assert [row["product"] for row in rows] == pytest.approx([(3 + 5**0.5) ** 0.5, 2, 1], rel=1e-5)


def test_weights_at_initialisation_are_scaled(monkeypatch):
    """v = a / 2, K = 1: the step's factor is 1 + scale / 2. Seeds differ in the direction u and the noise alone."""
    import gradient_norms

    import sac_flow_g as script

    make_actor = script.Actor

    def actor(*sizes, **keywords):
        made = make_actor(*sizes, **keywords)
        made.velocity_net = Matrices([[0.5, 0.0], [0.0, 0.5]], [[0.0, 0.0], [0.0, 0.0]])
        return made

    monkeypatch.setattr(script, "Actor", actor)
    monkeypatch.setattr(gradient_norms, "NAMES", {"sac_flow_g": "Flow-G"})
    args = gradient_norms.Args(flow_steps=[1], weight_scales=[1.0, 3.0], seeds=2, action_dim=2, score_step="none")
    rows = list(gradient_norms.at_initialisation(args))
    assert [(row["weight_scale"], row["seed"], row["i"]) for row in rows] == [
        (scale, seed, i) for scale in (1, 3) for seed in (0, 1) for i in (0, 1)
    ]
    for row in rows:
        factor = 1 + row["weight_scale"] / 2 if row["i"] == 0 else 1
        assert (row["grad_norm"], row["sigma"], row["product"]) == pytest.approx(3 * (factor,), rel=1e-5)


def test_growth_is_relative_to_the_last_step_of_the_same_rollout():
    import gradient_norms

    norms = {0: [6.0, 3.0, 2.0], 1: [4.0, 4.0, 8.0]}
    rows = [dict(K=2, seed=seed, i=i, grad_norm=norm) for seed in norms for i, norm in enumerate(norms[seed])]
    curves = gradient_norms.growth_by_step(rows, ["K"], "grad_norm")
    assert curves == {(2,): {0: [3.0, 0.5], 1: [1.5, 0.5], 2: [1.0, 1.0]}}


def test_gradient_norms_of_runs(start, tmp_path):
    flags = ["--env-id", "InvertedPendulum-v4", "--learning-starts", 100, "--total-timesteps", 120, "--flow-steps", 2]
    for name in ("sac_flow_naive", "sac_flow_t"):
        assert start(*flags, *SMALL, "--run-name", f"of {name}", name=name).returncode == 0
    runs = sorted((tmp_path / "runs").iterdir())
    few = ["--flow-steps", 1, 2, "--weight-scales", 1, 3, "--seeds", 2, "--out", tmp_path / "out"]
    done = start(*few, "--runs", *runs, name="gradient_norms")
    assert done.returncode == 0, done.stderr
    tables = {path.stem: list(csv.DictReader(open(path))) for path in (tmp_path / "out").glob("*.csv")}
    assert len(tables["init"]) == 3 * 2 * 2 * (2 + 3)  # velocities, scales, seeds, steps of K = 1 and 2
    assert {row["script"] for row in tables["training"]} == {"sac_flow_naive", "sac_flow_t"}
    assert {(row["K"], row["i"]) for row in tables["checkpoints"]} == {("2", str(i)) for i in range(3)}
    assert all(float(row["grad_norm"]) > 0 for table in tables.values() for row in table)
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {"init", "training", "checkpoints"}
    for given, named in (([tmp_path], str(tmp_path)), ([runs[0], runs[0]], "give one")):
        done = start("--runs", *given, name="gradient_norms")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and named in done.stderr


def test_the_last_value_of_a_flag_counts():
    import speed

    flags = ["--critic-dim", "512", "--extra", "--critic-dim=1024"]
    assert speed.value_of(flags, "--critic-dim") == "1024" and speed.value_of(flags, "--batch-size") is None
    assert speed.value_of(["--critic-dim=64", "--critic-dim", "32"], "--critic-dim") == "32"


def test_speed_measures_a_script(start, tmp_path):
    """Eager, so that it is quick: parts and rest are the whole step, and the FLOPs are those of the networks."""
    out = tmp_path / "speed.csv"
    flags = ["--suite", "baseline", "--scripts", "sac_flow_g", "--extra=--no-compile", "--seconds", 1, "--out", out]
    done = start(*flags, name="speed")
    assert done.returncode == 0, done.stderr
    (row,) = csv.DictReader(open(out))
    step = sum(float(row[f"{part}_ms"]) for part in ("environment", "act", "critic", "actor", "rest"))
    assert step == pytest.approx(1000 / float(row["steps_per_s"]), rel=0.02)
    assert float(row["critic_ms"]) > float(row["actor_ms"]) > 0 and float(row["environment_ms"]) > 0
    assert float(row["fraction"]) == pytest.approx(
        float(row["steps_per_s"]) / float(row["limit_steps_per_s"]), abs=0.01
    )
    # Two critics of 14-256-256-1 on 512 rows, three products each, are the larger part: 426 MFLOP of the step's.
    assert 426 < int(row["mflop_per_step"]) < 750
    done = start("--scripts", "nothing", "--suite", "baseline", name="speed")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "nothing" in done.stderr


def test_notebook_runs_from_top_to_bottom():
    """Its numbers are what the formulas beside them say, and what it is stored with."""
    import nbclient
    import nbformat

    path = ROOT / "benchmark" / "rnn_equivalence.ipynb"
    notebook = nbformat.read(path, as_version=4)
    stored = numbers_of(notebook)
    assert path.stat().st_size < 1.5e6
    assert sum("image/png" in data for cell in notebook.cells for data in datas(cell)) == 5
    began = time.monotonic()
    nbclient.NotebookClient(notebook, timeout=400, resources={"metadata": {"path": ROOT / "benchmark"}}).execute()
    assert time.monotonic() - began < 180  # as it says; 57 s on a Zen 4 core beside training
    numbers = numbers_of(notebook)
    (slider,) = (data["text/html"] for cell in notebook.cells for data in datas(cell) if "text/html" in data)
    assert slider.count("data:image/png") == 7

    for k, measured in numbers["scalar"].items():
        k = int(k)
        euler = math.prod(1 - 0.5 / (k - i) for i in range(k))
        expected = [(1 + 3 / k) ** k, (1 - 0.993 / k) ** k, math.exp(-0.5), euler]
        assert measured == pytest.approx(expected, rel=1e-4)
    for s, product in numbers["product_is_s"].items():
        assert product == pytest.approx(float(s), rel=0.02)
    for below, least, largest, log_norm, norm in numbers["bounds"].values():
        assert below <= least <= largest <= min(log_norm, norm)
    assert numbers["bounds"]["Flow-G x 1.0"][3] < 1 < numbers["bounds"]["Flow-G x 1.0"][4]  # one sees the gate

    matched = numbers["matched"]
    plain = matched["Plain flow, weights x 5"]
    assert matched["Flow-T x 5, as fast at the noise"][0] == pytest.approx(plain[0], rel=0.01)
    assert matched["Flow-T x 5, as fast on the path"][1] == pytest.approx(plain[1], rel=0.01)
    growth = {name: row[-1] for name, row in matched.items()}
    assert growth["Flow-T x 5, as fast at the noise"] < 2 and min(plain[-1], growth["Flow-G, weights x 5"]) > 20
    assert 4 < growth["Flow-T x 5, as fast on the path"] < plain[-1] / 2  # steep as it is, it grows, but less

    narrow, wide = numbers["entropies"]["onto one narrow mode"], numbers["entropies"]["onto two wide modes"]
    assert narrow[:2] == pytest.approx([wide[1], wide[1]], abs=0.05) and wide[2] > narrow[2] + 2
    assert numbers["gradient, without the squash"] == 0 < numbers["gradient, the squash"]

    assert max(numbers["toys"].values()) < 2.5
    fit = numbers["fit"]
    for policy in ("plain", "clipped", "gated"):
        assert fit[f"wide, {policy}"][1] == pytest.approx(10, rel=0.1)
    assert fit["far, plain"][0] < fit["far, clipped"][0] and fit["far, plain"][1] > 5
    for policy in ("plain", "clipped", "gated", "decoded"):
        assert fit[f"far, {policy}"][2] == pytest.approx(16, rel=0.15)  # by Stein's lemma
        assert (fit[f"far, {policy}"][3] > 1e6) == (policy == "decoded")  # which its batches, below, do not see
    assert fit["far, decoded"][1] < 6

    for name in ("scalar", "product_is_s", "bounds", "matched", "entropies", "toys", "bandit"):
        assert flat(numbers[name]) == pytest.approx(flat(stored[name]), rel=0.05, abs=1e-3), name


def outputs(cell) -> list:
    """What a cell of a notebook has put out."""
    return cell.get("outputs", [])


def datas(cell) -> list[dict]:
    """What of it is shown as pictures or HTML, by kind."""
    return [output.get("data", {}) for output in outputs(cell)]


def numbers_of(notebook) -> dict:
    """What the notebook's last cell puts out unseen: everything that it measured."""
    return outputs(notebook.cells[-1])[0]["data"]["application/json"]


def flat(values) -> list:
    """The numbers of nested dicts, by their sorted keys, and lists."""
    if isinstance(values, dict):
        values = [values[key] for key in sorted(values)]
    elif not isinstance(values, list):
        return [values]
    return [number for value in values for number in flat(value)]


def test_bandit(start, tmp_path):
    few = ["--policies", "plain", "clipped", "gaussian", "--flow-steps", 2, "--alphas", 0.01, 0.5, "--seeds", 2]
    done = start(*few, "--updates", 100, "--batch-size", 32, "--out", tmp_path / "out", name="bandit")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(open(tmp_path / "out" / "modes.csv")))
    assert [row["policy"] for row in rows] == 4 * ["plain"] + 4 * ["clipped"] + 4 * ["gaussian"]
    assert {(row["alpha"], row["seed"]) for row in rows} == {("0.01", "1"), ("0.01", "2"), ("0.5", "1"), ("0.5", "2")}
    assert {row["growth"] for row in rows[8:]} == {"1"} and "1" not in {row["growth"] for row in rows[:8]}
    for first, second in zip(rows[::4], rows[2::4], strict=True):  # of one seed: the larger alpha asks for noise
        assert float(first["path_entropy"]) < float(second["path_entropy"])
    wrong = "--alphas 0|--alphas inf|--flow-steps 0|--seeds 0|--policies|--rewards|--out /dev/null/x"
    for flag, *value in map(str.split, wrong.split("|")):
        done = start(flag, *value, name="bandit")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and flag in done.stderr


def test_the_policy_of_the_last_update_is_described():
    """Whether or not it is a multiple of 100."""
    import bandit

    trained = bandit.train("plain", bandit.Reward("modes"), 1, [0.02], [1], updates=3, batch_size=8)
    weights = [(update, models[0].actor.velocity_net.out.weight.clone()) for update, _, models in trained]
    assert [update for update, _ in weights] == [0, 3] and not torch.equal(weights[0][1], weights[1][1])


@pytest.mark.parametrize("alpha", [0.005, 0.5])
def test_bandits_divergence_by_hand(monkeypatch, alpha):
    """KL of a uniform policy from exp(reward / alpha), whose tails are below what float32 can hold at alpha 0.005."""
    import bandit

    class Uniform:
        net = staticmethod(lambda obs: torch.zeros(1, 2))
        draw_noise = staticmethod(lambda samples: None)
        rollout = staticmethod(lambda obs, noise: (torch.linspace(-1, 1, len(obs) + 1)[1:, None], obs[:, 0], []))

    reward = bandit.Reward("modes")
    x = -1 + (torch.arange(1000, dtype=torch.float64) + 0.5) / 500
    log_density = (reward(None, x[:, None]).double() / alpha).log_softmax(0).view(bandit.BINS, -1).logsumexp(1)
    expected = -math.log(bandit.BINS) - log_density.mean().item()
    assert bandit.describe(Uniform(), reward, alpha)["kl"] == pytest.approx(expected, rel=0.01)


def test_bandit_clips_the_backward_pass_alone():
    """No |dL/dA_i| exceeds |dL/dA_{i+1}|; where none did, nothing changes."""
    import bandit

    for slope in (2.0, 0.5):
        a = [torch.tensor([[1.0, 2.0], [3.0, -1.0]], requires_grad=True)]
        for _ in range(3):
            a.append(slope * a[-1])
        bandit.clip_backward(a)
        (gradient,) = torch.autograd.grad(a[-1].sum(), a[:1])
        torch.testing.assert_close(gradient, torch.full((2, 2), min(slope, 1.0) ** 3))


def test_frozen_critic(start, tmp_path):
    flags = ["--env-id", "InvertedPendulum-v4", "--learning-starts", 100, "--total-timesteps", 120]
    assert start(*flags, *SMALL, name="sac_flow_g").returncode == 0
    (run,) = (tmp_path / "runs").iterdir()
    few = ["--flow-steps", 2, "--weight-scales", 1, 3, "--seeds", 2, "--updates", 25, "--out", tmp_path / "out"]
    done = start("--run", run, *few, name="frozen_critic")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(open(tmp_path / "out" / "frozen_critic.csv")))
    assert len(rows) == 3 * 2 * 2 * 2 * 2 and {row["update"] for row in rows} == {"0", "25"}
    assert len({row["loss"] for row in rows}) > 24 and (tmp_path / "out" / "frozen_critic.png").is_file()
    done = start("--run", tmp_path, name="frozen_critic")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
