"""Does a flow rollout's gradient explode, and do gates and decoders cure it? Measurements, whatever they show.

For every velocity (plain, Flow-G, Flow-T) and rollout length K: the norm of dL/dA_i at each step of the rollout, and
the largest singular values of the noise-free steps' Jacobians I + dt dv/dA_i and of their product, the linear map that
carries the gradient from A_K back to A_0 where there is no score. At initialisation (for Flow-T PyTorch's, not the
script's), L = u . A_K with a random unit vector u, and there is no encoder; `--weight-scales` multiplies the velocity's
weight matrices, as training may do. With `--runs`, also: the norms that training logged, and the Jacobians at each
run's checkpoint, on observations from its replay buffer.

    python benchmark/measurements/gradient_norms.py --out benchmark/results/gradients
    python benchmark/measurements/gradient_norms.py --runs runs/Hopper-v4__* --out benchmark/results/gradients

Writes <out>/init.csv, training.csv, checkpoints.csv and a figure of each: means over seeds, bands show their range.
"""

import copy
import csv
import importlib
import math
import re
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Literal

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark"), str(ROOT / "benchmark" / "controls")]
import records  # noqa: E402

from sac_flow_g import explained, fail, flag, read_flags  # noqa: E402

SCRIPTS = ("sac_flow_naive", "sac_flow_g", "sac_flow_t")
NAMES = {script: records.NAMES[script] for script in SCRIPTS}
COLORS = {script: records.COLORS[name] for script, name in NAMES.items()}
RELATIVE = "gradient at step i, relative to A_K"
AS_INITIALISED = {"sac_flow_t": dict(contractive=False)}  # PyTorch's start, not the script's


@dataclass
class Args:
    """Flags of the command line."""

    out: Path = Path("gradients")
    """folder for CSVs and figures"""
    flow_steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    """K at initialisation"""
    weight_scales: list[float] = field(default_factory=lambda: [1.0, 2.0, 3.5])
    """factors by which the velocity's weight matrices are scaled at initialisation"""
    seeds: int = 10
    """networks per point at initialisation"""
    obs_dim: int = 27
    """observation size at initialisation: Ant-v4's"""
    action_dim: int = 8
    """action size at initialisation: Ant-v4's"""
    obs_std: float = 1.0
    """standard deviation of the observations at initialisation: 1 if they are normalised, up to 7 in Walker2d-v4"""
    score_step: Literal["exponential", "euler", "none"] = "exponential"
    """how the rollouts at initialisation integrate the score"""
    runs: list[Path] = field(default_factory=list)
    """folders of runs of sac_flow_naive.py, sac_flow_g.py or sac_flow_t.py"""


def parse_args(kind: type, description: str):
    """Flags of the command line; stops the program if one makes no sense, or if --out cannot be written to."""
    args = read_flags(kind, description)
    rules = [
        ("flow_steps|seeds|obs_dim|action_dim|updates|batch_size|episodes", lambda n: n >= 1, "1 or more"),
        ("weight_scales|obs_std", lambda x: 0 < x < math.inf, "above 0 and finite"),
        ("score_steps", lambda step: True, "one or more of exponential, euler and none"),
    ]
    for names, holds, requirement in rules:
        for name, value in vars(args).items():
            values = value if isinstance(value, list) else [value]
            if re.fullmatch(names, name) and not (values and all(map(holds, values))):
                fail(f"{flag(name)} must be {requirement}, not {' '.join(map(str, values)) or 'empty'}")
    with explained(f"--out {args.out} cannot be written to"):
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    return args


def pyplot():
    """matplotlib.pyplot without a display; stops the program if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        fail("figures need matplotlib: pip install -r benchmark/requirements.txt")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "sac-flow"  # the same data, the same file
    return plt


def jacobians(actor, path, obs):
    """I + dt dv/dA_i along a rollout: path of K+1 (B, D), obs (B, obs_dim) -> (K, B, D, D)."""
    k = actor.flow_steps
    steps = []
    for i in range(k):
        a = path[i].detach().requires_grad_()
        v = actor.velocity(i / k, a, obs)
        rows = []  # dv_j/da, (B, D) each
        for j in range(actor.action_dim):
            (row,) = torch.autograd.grad(v[:, j].sum(), a, retain_graph=True)
            rows.append(row)
        steps.append(torch.eye(actor.action_dim) + torch.stack(rows, dim=1) / k)
    return torch.stack(steps)


def largest_singular_value(matrices) -> float:
    """That of (B, D, D) or (D, D), as a geometric mean over the batch."""
    return torch.linalg.matrix_norm(matrices, 2).log().mean().exp().item()


def measure(actor, obs, loss) -> list[dict]:
    """One row for every step i of a rollout from `obs`, means over the batch (geometric for singular values).

    grad_norm is |dL/dA_i|, where `loss(noise)` returns the sum of the observations' L and the rollout's path; sigma is
    the largest singular value of I + dt dv/dA_i; product is that of the product from step i to K. At i = K there is no
    step: both are 1.
    """
    total, path = loss(actor.draw_noise(len(obs)).requires_grad_())
    gradient = torch.autograd.grad(total, path)
    steps = jacobians(actor, path, obs)
    product = torch.eye(actor.action_dim)
    rows = []
    for i in range(actor.flow_steps, -1, -1):
        single = torch.eye(actor.action_dim)
        if i < actor.flow_steps:
            single = steps[i]
            product = product @ single
        row = {
            "i": i,
            "grad_norm": gradient[i].norm(dim=1).mean().item(),
            "sigma": largest_singular_value(single),
            "product": largest_singular_value(product),
        }
        rows.append(row)
    return rows[::-1]


def projected(actor, obs, u, noise):
    """For `measure`: L = u . A_K."""
    path = actor.rollout(obs, noise)[2]
    return (path[-1] @ u).sum(), path


def at_initialisation(args: Args):
    """Rows of init.csv."""
    for name in NAMES:
        script = importlib.import_module(name)
        for k in args.flow_steps:
            for scale in args.weight_scales:
                for seed in range(args.seeds):
                    torch.manual_seed(seed)
                    bounds = [-1.0] * args.action_dim, [1.0] * args.action_dim
                    own = dict(flow_steps=k, score_step=args.score_step, **AS_INITIALISED.get(name, {}))
                    actor = script.Actor(args.obs_dim, *bounds, encoder_dim=0, **own)
                    with torch.no_grad():
                        for weight in actor.velocity_net.parameters():
                            weight.mul_(scale if weight.ndim == 2 else 1)
                    u = torch.nn.functional.normalize(torch.randn(args.action_dim), dim=0)
                    obs = args.obs_std * torch.randn(64, args.obs_dim)
                    for row in measure(actor, obs, partial(projected, actor, obs, u)):
                        yield dict(script=name, K=k, weight_scale=scale, seed=seed, **row)


def policy_state(run: Path) -> dict:
    """The policy.pt of a run, or a policy file; stops the program if it is none of ours."""
    with explained(f"{run} is not the folder of a run that has saved its policy.pt, such as runs/<name>"):
        file = run if run.suffix == ".pt" else run / "policy.pt"
        state = torch.load(file, map_location="cpu", weights_only=True)
        name = state["script"]
    if name not in NAMES:
        fail(f"{run} is a run of {name}, not of {', '.join(NAMES)}")
    return state


def described(run: Path) -> dict:
    """Script, environment, K and seed of a run or a policy file."""
    state = policy_state(run)
    args = state["args"]
    return dict(script=state["script"], env_id=args["env_id"], K=args["flow_steps"], seed=args["seed"])


def policy_and_env(run: Path):
    """The script of a run or policy file, its actor, and the environment as the actor saw it in evaluations."""
    script = importlib.import_module(policy_state(run)["script"])
    state = script.load(run if run.suffix == ".pt" else run / "policy.pt", "obs_dim")
    env = script.make_env(state["args"]["env_id"], state["args"]["max_episode_steps"])
    return script, script.build_policy(state), env


def through_training(run: Path):
    """Rows of training.csv: what the run logged as flow/grad_norm_step_<i>."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    known = described(run)
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    with explained(f"{run}: its TensorBoard log has no norms of gradients"):
        for i in range(known["K"] + 1):
            for event in events.Scalars(f"flow/grad_norm_step_{i}"):
                yield dict(**known, step=event.step, i=i, grad_norm=event.value)


def load(run: Path):
    """The networks of a run's checkpoint in evaluation mode, and the checkpoint: (actor, critics, state)."""
    script = importlib.import_module(described(run)["script"])
    state = script.load(run / "checkpoint.pt", "buffer")
    args = script.Args(**state["args"])
    obs_dim = state["actor"]["sigma_net.0.weight"].shape[1]
    scale = state["actor"]["scale"]
    bias = state["actor"]["bias"]
    actor = script.make_actor(args, obs_dim, bias - scale, bias + scale)
    sizes = obs_dim, len(scale), args.critic_dim, script.renorm_of(args)
    critics = torch.nn.ModuleList(script.Critic(*sizes) for _ in range(2))
    actor.load_state_dict(state["actor"])
    critics.load_state_dict(state["critics"])
    return actor.eval(), critics.eval(), state


def at_checkpoint(run: Path):
    """Rows of checkpoints.csv: the actor's own loss, and Jacobians, on 256 observations of the run's buffer.

    Once with and once without the score, which is a contraction of its own. As in the actor's update, observations are
    normalised by the batch.
    """
    actor, critics, state = load(run)
    actor.norm.train()
    statistics = copy.deepcopy(actor.norm.state_dict())

    def restore(norm, inputs) -> None:
        norm.load_state_dict(statistics)

    actor.norm.register_forward_pre_hook(restore)  # each forward pass moves them, yet starts from the same
    torch.manual_seed(0)
    rows = state["buffer"]["rows"]
    obs = rows[torch.randint(len(rows), (256,)), : actor.obs_dim]
    alpha = state["scalars"]["log_alpha"].exp()
    known = described(run)
    script = importlib.import_module(known["script"])

    def loss(noise):
        mean, _, *path = script.actor_loss(actor, critics, obs, noise, alpha)
        return len(obs) * mean, path

    for score_step in dict.fromkeys([actor.score_step, "none"]):
        actor.score_step = score_step
        torch.manual_seed(0)
        for row in measure(actor, obs, loss):
            yield dict(**known, step=state["progress"]["step"], score_step=score_step, **row)


def write(path: Path, rows: list[dict]) -> None:
    """Rows as CSV, numbers to five significant digits."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
    print(f"wrote {path}")


def growth_by_step(rows: list[dict], keys: list[str], column: str) -> dict:
    """{values of keys: {i: [column of every seed]}}, each relative to that of the rollout's last step."""

    def values_of(row: dict, *names: str) -> tuple:
        return tuple(row[name] for name in names)

    last = {values_of(row, *keys, "seed"): row[column] for row in rows if row["i"] == row["K"]}
    curves = defaultdict(lambda: defaultdict(list))
    for row in rows:
        reference = last[values_of(row, *keys, "seed")]
        curve = curves[values_of(row, *keys)]
        curve[row["i"]].append(row[column] / reference)
    return curves


def panel(axis, curves: dict, fixed: tuple, title: str) -> None:
    """One line per velocity: geometric mean over seeds against the step, with a band from least to largest."""
    for name in NAMES:
        curve = curves.get((name, *fixed))
        if not curve:
            continue
        x = sorted(curve)
        mean = [geometric_mean([max(value, 1e-12) for value in curve[i]]) for i in x]
        axis.plot(x, mean, label=NAMES[name], color=COLORS[name], marker="o", ms=3)
        low = [min(curve[i]) for i in x]
        high = [max(curve[i]) for i in x]
        axis.fill_between(x, low, high, color=COLORS[name], alpha=0.15, linewidth=0)
    axis.axhline(1, color="black", lw=0.5)
    axis.set(yscale="log", title=title, xlabel="step i of the rollout")


def grid(plt, rows: list[dict], path: Path) -> None:
    """A column for each environment and K. Training: growth over the rollout against the training step, then the last
    norms against the rollout's step. Checkpoints: norms against the rollout's step, with the score and without."""
    columns = sorted({(row["env_id"], row["K"]) for row in rows})
    size = (3 * len(columns), 6)
    figure, axes = plt.subplots(2, len(columns), figsize=size, sharey="row", squeeze=False)
    for column, (env_id, k) in zip(axes.T, columns, strict=True):
        chosen = [row for row in rows if (row["env_id"], row["K"]) == (env_id, k)]
        column[0].set_title(f"{env_id}, K = {k}")
        if "score_step" in rows[0]:
            for axis, score in zip(column, (True, False), strict=True):
                same = [row for row in chosen if (row["score_step"] != "none") == score]
                curves = growth_by_step(same, ["script"], "grad_norm")
                panel(axis, curves, (), f"{env_id}, K = {k}" + ("" if score else "\nwithout the score"))
            continue
        final = {(r["script"], r["seed"]): r["step"] for r in chosen}
        last = [r for r in chosen if r["step"] == final[r["script"], r["seed"]]]
        panel(column[1], growth_by_step(last, ["script"], "grad_norm"), (), "at the end of training")
        for name, seed in sorted(final):
            of_run = [row for row in chosen if (row["script"], row["seed"]) == (name, seed)]
            norms = {(row["step"], row["i"]): row["grad_norm"] for row in of_run}
            steps = sorted({step for step, _ in norms})
            growth = [norms[step, 0] / norms[step, k] for step in steps]
            label = NAMES[name] if seed == min(s for n, s in final if n == name) else None
            column[0].plot(steps, growth, color=COLORS[name], marker="o", ms=2, lw=1, label=label)
        column[0].axhline(1, color="black", lw=0.5)
        column[0].set(yscale="log", xlabel="training step")
    for axis in axes[:, 0]:
        over_steps = axis is axes[1, 0] or "score_step" in rows[0]
        axis.set_ylabel(RELATIVE if over_steps else "gradient at A_0, relative to A_K")
    axes[0, 0].legend(frameon=False)
    figure.tight_layout()
    save(figure, path)


def save(figure, path: Path) -> None:
    """Write a figure as PNG and SVG; the same data give the same files."""
    figure.savefig(path, dpi=120)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    args = parse_args(Args, __doc__)
    plt = pyplot()
    runs = {}
    for run in args.runs:
        load(run)
        known = described(run)
        key = tuple(known.values())
        if key in runs:
            fail(f"--runs: {runs[key]} and {run} are both {' '.join(f'{k} {v}' for k, v in known.items())}: give one")
        runs[key] = run
    torch.set_num_threads(1)  # the networks are small
    tables = {}
    if args.runs:
        tables["training"] = [row for run in args.runs for row in through_training(run)]
        tables["checkpoints"] = [row for run in args.runs for row in at_checkpoint(run)]
    tables["init"] = list(at_initialisation(args))
    for name, rows in tables.items():
        write(args.out / f"{name}.csv", rows)

    largest = max(args.flow_steps)
    curves = growth_by_step(tables["init"], ["script", "K", "weight_scale"], "grad_norm")
    columns = len(args.weight_scales)
    figure, axes = plt.subplots(1, columns, figsize=(4 * columns, 3.4), sharey=True)
    for axis, scale in zip(figure.axes, args.weight_scales, strict=True):
        panel(axis, curves, (largest, scale), f"weights x {scale:g}, K = {largest}")
    figure.axes[0].set_ylabel(RELATIVE)
    figure.axes[0].legend(frameon=False)
    figure.tight_layout()
    save(figure, args.out / "init.png")
    if args.runs:
        grid(plt, tables["training"], args.out / "training.png")
        grid(plt, tables["checkpoints"], args.out / "checkpoints.png")


if __name__ == "__main__":
    main()
