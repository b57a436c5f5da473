"""Does a flow's expressiveness survive SAC with the path's entropy? A bandit with two equal modes, and two others.

One observation, one action in [-1, 1], and a known reward, which SAC's actor loss gets as Q in place of learned
critics, so that nothing but the policy is measured. Plain, gated (Flow-G) and decoded (Flow-T) velocities and the
Gaussian are trained with the scripts' own `actor_loss` and optimizer, a fixed alpha and a quarter of their widths.
Flow-T starts from PyTorch's initialisation, not from its script's contractive one.

    python benchmark/measurements/bandit.py --out benchmark/results/bandit

Rewards, their highest values near 1:
  modes     two equal bumps, at -0.5 and 0.5: SAC's optimum for the action's entropy has half of the actions at each
  edges     action^2: the best actions are the bounds
  comb      eight equal bumps

Writes <out>/<reward>.csv, a row for each policy at the end of its training:
  right         share of actions above 0
  reward        mean reward
  entropy       of the action, in nats, by a histogram; `optimum` is that of the density exp(reward / alpha)
  kl            of the histogram from that density, in nats; if the entropy were the action's, 0 would be SAC's optimum
  path_entropy  mean -log p_c, what the loss sees
  sigma         the learned one
  growth        |dL/dA_0| / |dL/dA_K|, means over the batch; `largest_growth`: the largest during training
"""

import csv
import importlib
import itertools
import math
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn

import torch
import tyro
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark" / "controls")]
SCRIPTS = {"plain": "sac_flow_naive", "gated": "sac_flow_g", "decoded": "sac_flow_t", "gaussian": "sac_gaussian"}
# A toy needs less than the scripts' defaults: a quarter of the widths, so that plain still has as many parameters as
# gated.
SIZES = {
    "plain": dict(dim=128, sigma_dim=64, encoder_dim=0),  # there is nothing to observe
    "gated": dict(dim=64, sigma_dim=64, encoder_dim=0),
    "decoded": dict(dim=16, contractive=False, sigma_dim=64, encoder_dim=0),
    "gaussian": dict(dim=64),
}
BINS = 100  # of the histograms over [-1, 1]


@dataclass
class Args:
    """Flags of the command line."""

    out: Path = Path("bandit")
    """folder for the CSVs"""
    rewards: list[Literal["modes", "edges", "comb"]] = field(default_factory=lambda: ["modes"])
    """rewards to train on"""
    policies: list[Literal["plain", "clipped", "gated", "decoded", "gaussian"]] = field(
        default_factory=lambda: ["plain", "gated", "decoded", "gaussian"]
    )
    """policies to train; clipped is plain with a backward pass in which no |dL/dA_i| exceeds |dL/dA_{i+1}|"""
    flow_steps: list[int] = field(default_factory=lambda: [1, 4, 8])
    """K; the Gaussian has none and runs once"""
    alphas: list[float] = field(default_factory=lambda: [0.005, 0.02, 0.05, 0.1])
    """entropy coefficients, held fixed"""
    seeds: int = 5
    """policies per point, with seeds 1, 2, ..."""
    updates: int = 1500
    """actor updates per policy"""
    batch_size: int = 128
    """actions per update"""


def fail(message: str) -> NoReturn:
    """Stop with one line on standard error and exit code 2."""
    print(f"bandit: error: {message}", file=sys.stderr)
    raise SystemExit(2)


class Reward(nn.Module):
    """A known reward in place of a critic: Q(s, a) = reward(a) for actions (B, 1) in [-1, 1]."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, obs, action):
        """(B, obs_dim), (B, 1) -> (B,)"""
        if self.name == "edges":
            return action[:, 0] ** 2
        centres = torch.linspace(-0.875, 0.875, 8) if self.name == "comb" else torch.tensor([-0.5, 0.5])
        width = 0.05 if self.name == "comb" else 0.2
        return torch.exp(-0.5 * ((action - centres) / width) ** 2).sum(1)


def clip_backward(path) -> None:
    """Make the next backward pass keep |dL/dA_i| <= |dL/dA_{i+1}| for each action. `path`: A_0 to A_K, (B, D) each.

    The forward pass and the loss stay as they are. The velocity's parameters get their gradient through the clipped
    ones.
    """
    norms = {}

    def at(i):
        def clip(gradient):
            norm = gradient.norm(dim=1, keepdim=True)
            if i + 1 in norms:
                gradient = gradient * (norms[i + 1] / norm.clamp(min=1e-30)).clamp(max=1)
                norm = norm.minimum(norms[i + 1])
            norms[i] = norm
            return gradient

        return clip

    for i, a in enumerate(path):
        if a.requires_grad:
            a.register_hook(at(i))


class Loss(nn.Module):
    """The script's actor loss of one policy on one reward, as a module: forward(noise, alpha) -> ()."""

    def __init__(self, policy: str, reward: Reward, k: int, seed: int):
        super().__init__()
        kind = "plain" if policy == "clipped" else policy
        self.script = importlib.import_module(SCRIPTS[kind])
        torch.manual_seed(seed)
        flow = {} if policy == "gaussian" else dict(flow_steps=k, entropy="path")
        self.actor = self.script.Actor(1, [-1.0], [1.0], **SIZES[kind], **flow)
        self.critics = nn.ModuleList([reward])
        self.clipped = policy == "clipped"

    def forward(self, noise, alpha):
        obs = torch.zeros(noise.shape[1], 1)
        loss, _, *path = self.script.actor_loss(self.actor, self.critics, obs, noise, alpha)
        if self.clipped:
            clip_backward(path)
        return loss

    def growth(self, alpha, batch_size: int) -> float:
        """|dL/dA_0| / |dL/dA_K|, means over a batch, never clipped; the Gaussian has no rollout: 1."""
        obs = torch.zeros(batch_size, 1)
        norms = self.script.gradient_norms(self.actor, self.critics, obs, self.actor.draw_noise(batch_size), alpha)
        return (norms[0] / norms[-1]).item()


def train(policy: str, reward: Reward, k: int, alphas, seeds, updates: int, batch_size: int):
    """Train len(alphas) policies side by side; yields (update, losses, models) every 100 updates, the last included.

    Policy j starts from seeds[j] and keeps alphas[j]. `losses` are the N losses of that update's batch, and `models` a
    list of N `Loss` with the weights before the update.
    """
    models = [Loss(policy, reward, k, seed) for seed in seeds]
    parameters, buffers = torch.func.stack_module_state(models)  # one tensor per name, for all models
    alphas = torch.tensor(alphas)
    call = partial(torch.func.functional_call, models[0])
    args = models[0].script.Args()
    # Adam treats each number separately, so that one optimizer acts as N.
    optimizer = torch.optim.Adam(parameters.values(), lr=args.actor_lr, betas=(args.adam_b1, 0.999), fused=True)
    for update in range(updates + 1):
        noise = torch.stack([models[0].actor.draw_noise(batch_size) for _ in models])
        if policy == "clipped":  # vmap does not support hooks
            losses = torch.stack(
                [
                    call(({name: value[j] for name, value in (parameters | buffers).items()},), (noise[j], alphas[j]))
                    for j in range(len(models))
                ]
            )
        else:
            losses = torch.vmap(call)((parameters, buffers), (noise, alphas))
        if update % 100 == 0 or update == updates:
            for j, model in enumerate(models):
                model.load_state_dict({name: value.detach()[j] for name, value in parameters.items()}, strict=False)
            yield update, losses.tolist(), models
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()


def soft_optimum(reward: Reward, alpha: float):
    """SAC's optimum for the action's entropy, exp(reward / alpha): the logs of the probabilities of the BINS bins."""
    fine = 10
    centres = -1 + (torch.arange(fine * BINS) + 0.5) * 2 / (fine * BINS)
    return (reward(None, centres[:, None]) / alpha).log_softmax(0).view(BINS, fine).logsumexp(1)


def describe(actor, reward: Reward, alpha: float, samples: int = 20_000) -> dict:
    """What a policy does, from samples: the CSV's columns from right to sigma."""
    obs = torch.zeros(samples, 1)
    with torch.no_grad():
        action, log_prob, _ = actor.rollout(obs, actor.draw_noise(samples))
        if hasattr(actor, "sigma_net"):
            log_sigma = -1.5 + 3.5 * torch.tanh(actor.sigma_net(obs[:1]))
        else:
            log_sigma = -1.5 + 3.5 * torch.tanh(actor.net(obs[:1])[:, 1:])
        share = torch.histc(action, BINS, -1, 1) / samples
        optimum = soft_optimum(reward, alpha)
    width = math.log(2 / BINS)  # added to a discrete entropy, it gives the density's
    return dict(
        right=(action > 0).float().mean().item(),
        reward=reward(obs, action).mean().item(),
        entropy=torch.special.entr(share).sum().item() + width,
        optimum=-(optimum.exp() * optimum).sum().item() + width,
        kl=(torch.xlogy(share, share) - share * optimum).sum().item(),
        path_entropy=-log_prob.mean().item(),
        sigma=log_sigma.exp().item(),
    )


def rows(name: str, args: Args):
    """The rows of one reward's CSV, one for each policy, K, alpha and seed."""
    points = list(itertools.product(args.alphas, range(1, args.seeds + 1)))
    alphas, seeds = zip(*points, strict=True)
    reward = Reward(name)
    for policy in args.policies:
        for k in args.flow_steps if policy != "gaussian" else [1]:
            growths = []
            for _, _, models in train(policy, reward, k, alphas, seeds, args.updates, args.batch_size):
                growths.append([m.growth(alpha, args.batch_size) for m, alpha in zip(models, alphas, strict=True)])
            for (alpha, seed), model, growth in zip(points, models, zip(*growths, strict=True), strict=True):
                known = dict(policy=policy, K=k, alpha=alpha, seed=seed) | describe(model.actor, reward, alpha)
                yield known | dict(growth=growth[-1], largest_growth=max(growth))


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    for flag, values in (("flow-steps", args.flow_steps), ("alphas", args.alphas)):
        if not values or not all(0 < value < math.inf for value in values):
            fail(f"--{flag} {' '.join(map(str, values))}: give one or more numbers above 0")
    for flag, values in (("policies", args.policies), ("rewards", args.rewards)):
        if not values:
            fail(f"--{flag}: give one or more")
    for flag, value in (("seeds", args.seeds), ("updates", args.updates), ("batch-size", args.batch_size)):
        if value < 1:
            fail(f"--{flag} {value}: give 1 or more")
    torch.set_num_threads(1)  # the networks are small
    for name in args.rewards:
        path = args.out / f"{name}.csv"
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            file = open(path, "w", newline="")
        except OSError as error:
            fail(f"--out {args.out}: {error.strerror}; name a folder that can be written to")
        with file:
            writer = None
            for row in rows(name, args):
                if writer is None:
                    writer = csv.DictWriter(file, list(row), lineterminator="\n")
                    writer.writeheader()
                writer.writerow({key: f"{x:.4g}" if isinstance(x, float) else x for key, x in row.items()})
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
