"""The causal test: every velocity against one frozen critic, so that nothing but the velocity can differ.

Takes the critics, observations and alpha of one run's checkpoint and trains a new actor of each velocity on them, from
the same sigma network, with the same batches, noise and optimizer. Records the actor's loss, the growth of the
gradient over the rollout |dL/dA_0| / |dL/dA_K|, and the norm of the gradient of all parameters; for several K, with
the velocity's weight matrices scaled at the start so that dv/dA is large, and with the drift correction on and off.

    python benchmark/frozen_critic.py --run runs/<name> --out benchmark/results/gradients

Writes <out>/frozen_critic.csv and a figure: means over seeds, bands of the range.
"""

import importlib
import itertools
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from gradient_norms import COLORS, NAMES, load, pyplot, write


@dataclass
class Args:
    """Flags of the command line."""

    run: Path
    """folder of a run with a checkpoint: its critics, observations and alpha are used"""
    out: Path = Path("gradients")
    """folder for CSV and figure"""
    flow_steps: list[int] = field(default_factory=lambda: [4, 16])
    """K"""
    weight_scales: list[float] = field(default_factory=lambda: [1.0, 5.0])
    """factors of the velocity's weight matrices at the start"""
    drift_corrections: list[bool] = field(default_factory=lambda: [True, False])
    """with and without the drift correction, whose score term contracts the rollout"""
    seeds: int = 3
    """actors per point"""
    updates: int = 500
    """actor updates of each"""
    batch_size: int = 256
    """observations per update"""


def train(script, old_actor, critics, all_obs, alpha, k, scale, drift, seed, args):
    """Rows (update, loss, growth, gradient) of one new actor against the frozen critics."""
    torch.manual_seed(seed)
    low, high = old_actor.bias - old_actor.scale, old_actor.bias + old_actor.scale
    sizes = dict(flow_steps=k, drift_correction=drift, renorm=script.BatchRenorm)
    actor = script.Actor(all_obs.shape[1], low, high, **sizes)
    torch.manual_seed(seed)  # velocities draw differently: the rest of the actor and all batches are to be the same
    for layer in actor.sigma_net[::2]:
        layer.reset_parameters()
    with torch.no_grad():
        for weight in actor.velocity_net.parameters():
            weight.mul_(scale if weight.ndim == 2 else 1)
    optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3, betas=(0.5, 0.999), fused=True)
    for update in range(args.updates + 1):
        obs, noise = all_obs[torch.randint(len(all_obs), (args.batch_size,))], actor.noise(args.batch_size)
        loss, _ = script.actor_loss(actor, critics, obs, noise, alpha)
        optimizer.zero_grad()
        loss.backward()
        if update % 25 == 0:
            norms = script.gradient_norms(actor.eval(), critics, obs, noise, alpha)
            actor.train()
            gradient = torch.nn.utils.get_total_norm([p.grad for p in actor.parameters() if p.grad is not None])
            growth = (norms[0] / norms[-1]).item()
            yield dict(update=update, loss=loss.item(), growth=growth, gradient=gradient.item())
        optimizer.step()


def draw(axis, rows: list[dict], column: str) -> None:
    """One line per velocity against the update: mean over seeds, band of the range."""
    for name in NAMES:
        points = defaultdict(list)
        for row in rows:
            if row["script"] == name:
                points[row["update"]].append(row[column])
        x = sorted(points)
        axis.plot(x, [sum(points[u]) / len(points[u]) for u in x], label=NAMES[name], color=COLORS[name])
        low, high = [min(points[u]) for u in x], [max(points[u]) for u in x]
        axis.fill_between(x, low, high, color=COLORS[name], alpha=0.2, lw=0)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    plt = pyplot()
    torch.set_num_threads(1)  # the networks are small
    old_actor, critics, state = load(args.run)
    critics.requires_grad_(False)
    all_obs, alpha = state["buffer"][:, : old_actor.velocity_net.from_obs.in_features], state["log_alpha"].exp()
    args.out.mkdir(parents=True, exist_ok=True)
    settings = list(itertools.product(args.flow_steps, args.weight_scales, args.drift_corrections))
    rows = []
    for k, scale, drift in settings:
        for name, seed in itertools.product(NAMES, range(args.seeds)):
            script = importlib.import_module(name)
            point = dict(script=name, K=k, weight_scale=scale, drift_correction=drift, seed=seed)
            for row in train(script, old_actor, critics, all_obs, alpha, k, scale, drift, seed, args):
                rows.append({**point, **row})
        print(f"K = {k}, weights x {scale:g}, drift correction {drift}: done", file=sys.stderr)
        write(args.out / "frozen_critic.csv", rows)  # now and then: the whole takes a while

    labels = {"loss": "actor's loss", "growth": "|dL/dA_0| / |dL/dA_K|", "gradient": "|dL/dparameters|"}
    figure, axes = plt.subplots(3, len(settings), figsize=(2.6 * len(settings), 7.5), sharex=True, squeeze=False)
    for column, (k, scale, drift) in enumerate(settings):
        chosen = [r for r in rows if (r["K"], r["weight_scale"], r["drift_correction"]) == (k, scale, drift)]
        for axis, (name, label) in zip(axes[:, column], labels.items(), strict=True):
            draw(axis, chosen, name)
            axis.set_yscale("linear" if name == "loss" else "log")
            if not column:
                axis.set_ylabel(label)
        axes[0, column].set_title(f"K = {k}, weights x {scale:g}\n{'' if drift else 'no '}drift correction")
        axes[2, column].set_xlabel("update")
    for row in axes[1:]:  # one scale for what is compared across settings
        low, high = zip(*(axis.get_ylim() for axis in row), strict=True)
        for axis in row:
            axis.set_ylim(min(low), max(high))
    axes[0, 0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(args.out / "frozen_critic.png", dpi=110)


if __name__ == "__main__":
    main()
