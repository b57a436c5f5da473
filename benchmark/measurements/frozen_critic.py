"""The causal test: every velocity against one frozen critic, so that nothing but the velocity can differ.

Takes the critics, observations and alpha of one run's checkpoint and trains a new actor of each velocity on them, from
the same encoder and sigma network, with the same batches, noise and optimizer. Records the actor's loss, the growth of
the gradient over the rollout |dL/dA_0| / |dL/dA_K|, and the norm of the gradient of all parameters; for several K, with
the velocity's weight matrices scaled at the start so that dv/dA is large, and with the score and without. Each velocity
starts as its script's does: Flow-G with an open gate, Flow-T contractive.

    python benchmark/measurements/frozen_critic.py --run runs/<name> --out benchmark/results/gradients

Writes <out>/frozen_critic.csv and a figure: means over seeds, bands show their range.
"""

import importlib
import itertools
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Literal

import torch
from gradient_norms import COLORS, NAMES, load, parse_args, pyplot, save, write


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
    """factors by which the velocity's weight matrices are scaled at the start"""
    score_steps: list[Literal["exponential", "euler", "none"]] = field(default_factory=lambda: ["exponential", "none"])
    """with and without the score, which contracts the rollout"""
    seeds: int = 3
    """actors per point"""
    updates: int = 500
    """updates per actor"""
    batch_size: int = 256
    """observations per update"""


def train(script, old_actor, critics, all_obs, alpha, k, scale, score_step, seed, args):
    """Rows (update, loss, growth, gradient) of one new actor against the frozen critics."""
    torch.manual_seed(seed)
    low = old_actor.bias - old_actor.scale
    high = old_actor.bias + old_actor.scale
    sizes = dict(flow_steps=k, score_step=score_step, entropy=old_actor.entropy, renorm=script.BatchRenorm)
    actor = script.Actor(all_obs.shape[1], low, high, **sizes)
    torch.manual_seed(seed)  # velocities draw differently, but the rest of the actor and all batches must be the same
    for layer in actor.sigma_net[::2]:
        layer.reset_parameters()
    with torch.no_grad():
        for weight in actor.velocity_net.parameters():
            weight.mul_(scale if weight.ndim == 2 else 1)
    optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3, betas=(0.5, 0.999), fused=True)
    for update in range(args.updates + 1):
        obs = all_obs[torch.randint(len(all_obs), (args.batch_size,))]
        noise = actor.draw_noise(args.batch_size)
        loss, *_ = script.actor_loss(actor, critics, obs, noise, alpha)
        optimizer.zero_grad()
        loss.backward()
        if update % 25 == 0:
            norms = script.gradient_norms(actor, critics, obs, noise, alpha)
            gradients = [p.grad for p in actor.parameters() if p.grad is not None]
            gradient = torch.nn.utils.get_total_norm(gradients)
            growth = (norms[0] / norms[-1]).item()
            yield dict(update=update, loss=loss.item(), growth=growth, gradient=gradient.item())
        optimizer.step()


def draw(rows: list[dict], path: Path) -> None:
    """A column of panels per setting: against the update, each velocity's mean over seeds and, as a band, their range.

    The loss is shown as its excess over the lowest of the velocities' on the same batch, which removes batch noise.
    """
    plt = pyplot()
    setting_of = itemgetter("K", "weight_scale", "score_step")
    batch_of = itemgetter("K", "weight_scale", "score_step", "seed", "update")
    settings = list(dict.fromkeys(map(setting_of, rows)))
    losses = defaultdict(list)
    for row in rows:
        losses[batch_of(row)].append(row["loss"])
    for row in rows:
        row["excess"] = row["loss"] - min(losses[batch_of(row)])
    labels = {"excess": "loss above the lowest", "growth": "|dL/dA_0| / |dL/dA_K|", "gradient": "|dL/dparameters|"}
    size = (2.2 * len(settings), 6.5)
    figure, axes = plt.subplots(3, len(settings), figsize=size, sharex=True, sharey="row")
    for column, setting in zip(axes.reshape(3, -1).T, settings, strict=True):
        for axis, name in zip(column, labels, strict=True):
            for script in NAMES:
                points = defaultdict(list)
                for row in rows:
                    if setting_of(row) == setting and row["script"] == script:
                        points[row["update"]].append(row[name])
                x = sorted(points)
                mean_of = statistics.mean if name == "excess" else statistics.geometric_mean
                mean = [mean_of(points[update]) for update in x]
                low = [min(points[update]) for update in x]
                high = [max(points[update]) for update in x]
                axis.plot(x, mean, label=NAMES[script], color=COLORS[script])
                axis.fill_between(x, low, high, color=COLORS[script], alpha=0.2, lw=0)
            if name == "excess":
                axis.set_yscale("symlog", linthresh=1)
            else:
                axis.set_yscale("log")
        k, scale, score_step = setting
        column[0].set_title(f"K = {k}, weights x {scale:g}\nscore: {score_step}", fontsize=9)
        column[2].set_xlabel("update")
    for axis, label in zip(axes.reshape(3, -1)[:, 0], labels.values(), strict=True):
        axis.set_ylabel(label)
    axes.flat[0].legend(frameon=False)
    figure.tight_layout()
    save(figure, path)


def main() -> None:
    args = parse_args(Args, __doc__)
    pyplot()  # before the work: it may be missing
    torch.set_num_threads(1)  # the networks are small
    old_actor, critics, state = load(args.run)
    critics.requires_grad_(False)
    all_obs = state["buffer"]["rows"][:, : old_actor.obs_dim]
    alpha = state["scalars"]["log_alpha"].exp()
    settings = list(itertools.product(args.flow_steps, args.weight_scales, args.score_steps))
    rows = []
    for k, scale, score_step in settings:
        for name, seed in itertools.product(NAMES, range(args.seeds)):
            script = importlib.import_module(name)
            point = dict(script=name, K=k, weight_scale=scale, score_step=score_step, seed=seed)
            for row in train(script, old_actor, critics, all_obs, alpha, k, scale, score_step, seed, args):
                rows.append({**point, **row})
        print(f"K = {k}, weights x {scale:g}, score {score_step}: done", file=sys.stderr)
        write(args.out / "frozen_critic.csv", rows)  # now and then: the whole takes a while
    draw(rows, args.out / "frozen_critic.png")


if __name__ == "__main__":
    main()
