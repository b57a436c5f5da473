"""The paper's ablation, step by step: from the plain velocity as it is here to the authors' naive control.

The authors' naive control differs from their Flow-G in more than the gate. Each variant adds a difference, or a few
that belong together, to the one before it, or takes one away, so that a run shows which makes gradients grow or returns
collapse:

    plain            sac_flow_naive.py with --entropy path, except for the actor's warm-up (below), as in all variants
    sigma            + sigma(s, A, t) from the velocity's hidden layer; noise without sqrt(dt), and no score
    renorm           + BatchRenorm, with the authors' shift, over (s, A) in place of s
    time             + BatchRenorm over (s, A, t): t as a number, in place of sines and cosines outside it
    authors          + their network, ReLU 2 x 512 with LeCun's initialisation and no encoder: their naive control,
                     except for alpha, learning rates, batch and critics, which are flags
    authors-no-time  authors, but with the number t outside their BatchRenorm
    flow-g           sac_flow_g.py with --entropy path, except for the actor's warm-up
    flow-g-renorm    flow-g with BatchRenorm over (s, A), as in the authors' Flow-G
    flow-g-time      flow-g with BatchRenorm over (s, A, t): t as a number, in place of sines and cosines outside it
    clipped          plain with the same forward pass, but a backward pass in which no |dL/dA_i| exceeds |dL/dA_{i+1}|
    authors-clipped  authors with that backward pass

    python benchmark/controls/ablation.py --variant renorm --env-id Ant-v4

Flags, files, --resume and --evaluate are those of sac_flow_naive.py, whose main() trains. --velocity-dim is the width
of the velocity's hidden layers, in Flow-G that of gate and candidate together. In all variants the actor's BatchRenorm
switches after --renorm-warmup / --flow-steps updates of the actor, as the authors' does, which sees a batch at each of
the K steps. A run also leaves norms.csv: mean, median and largest |dL/dA_i| of a batch, normalised by the batch, as in
the actor's update (`batch`), and by the running statistics, as in the acting policy (`running`); where the backward
pass is limited, also what the batch's would be without the limit (`free`).
"""

import copy
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark" / "controls")]

import sac_flow_naive as naive  # noqa: E402

import sac_flow_g as flow_g  # noqa: E402

# The originals of what `main` replaces; the replacements call them.
naive_parse_args = naive.parse_args
naive_make_networks = naive.make_networks
naive_progress = naive.Progress
make_env = naive.make_env  # for sweep.py, which tries it


class Limit(torch.autograd.Function):
    """A_i, unchanged; on the way back its gradient is scaled down, row by row, to the norm of A_{i+1}'s.

    That norm comes back along the path as the "gradient" of a second output, a (B, 1) of zeros that the next step hands
    on: so nothing is kept outside of the graph, and the compiler can trace it.
    """

    @staticmethod
    def forward(ctx, a, link):
        return a.view_as(a), link.view_as(link)

    @staticmethod
    def backward(ctx, gradient, next_norm):
        norm = gradient.norm(dim=1, keepdim=True)
        kept = torch.minimum(norm, next_norm)
        return gradient * (kept / norm.clamp(min=1e-30)), kept


class LimitStart(torch.autograd.Function):
    """A_K, unchanged; on the way back the norm of its gradient is what limits that of A_{K-1}."""

    @staticmethod
    def forward(ctx, a, link):
        return a.view_as(a)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient.norm(dim=1, keepdim=True)


class Stepwise:
    """Mixin for an actor: the scripts' rollout, with velocity and sigma of each step from `velocity_and_sigma`."""

    under = "s"
    """which of s, A and t go through the BatchRenorm, side by side: once per rollout if s alone, else at every step"""
    clipped = False
    """whether |dL/dA_i| is limited to |dL/dA_{i+1}|, for each row of the batch"""

    def prepare(self, obs):
        """What the K steps share: the observation, normalised if it is alone under the BatchRenorm."""
        return self.norm(obs) if self.under == "s" else obs

    def inputs(self, t, a, obs):
        """s, A and t as the networks take them, (B, .) each, given what `prepare` returned."""
        parts = {"s": obs, "A": a, "t": torch.ones_like(a[:, :1]) * t}
        if self.under != "s":
            widths = [parts[name].shape[1] for name in self.under]
            normalised = self.norm(torch.cat([parts[name] for name in self.under], dim=1))
            parts |= zip(self.under, normalised.split(widths, dim=1), strict=True)
        return parts["s"], parts["A"], parts["t"]

    def velocity_and_sigma(self, t, a, shared):
        """Both (B, D) at flow time t (float or (B, 1)), given what `prepare` returned."""
        raise NotImplementedError

    def velocity(self, t, a, obs):
        """v(t, a, s), (B, D), at flow time t in [0, 1) (float or (B, 1)) and pre-squash action a (B, D)."""
        return self.velocity_and_sigma(t, a, self.prepare(obs))[0]

    def rollout(self, obs, noise):
        """Sample actions and the density of their paths: shapes and errors as in sac_flow_g.py."""
        expected = (self.flow_steps + 1, obs.shape[0], self.action_dim)
        if obs.shape[1:] != (self.obs_dim,) or noise.shape != expected:
            shapes = f"{tuple(obs.shape)} and {tuple(noise.shape)}"
            raise ValueError(f"rollout takes obs (B, {self.obs_dim}) and noise {expected}, not {shapes}")
        shared = self.prepare(obs)
        path = [noise[0]]
        log_deviations = 0.0
        link = torch.zeros_like(noise[0, :, :1])
        for i in range(self.flow_steps):
            a = path[i]
            if self.clipped:
                a, link = Limit.apply(a, link)
            v, sigma = self.velocity_and_sigma(i / self.flow_steps, a, shared)
            mean, deviation = self.step(i, a, v, sigma)
            path.append(mean + deviation * noise[i + 1])
            log_deviations = log_deviations + deviation.log()
        end = LimitStart.apply(path[-1], link) if self.clipped else path[-1]
        return *self.density(noise, log_deviations, end), path

    def density(self, noise, log_deviations, end):
        """Action (B, D) and log p_c (B,) of paths that end in A_K = `end`, as in sac_flow_g.py.

        Standardised, A_{i+1} given A_i is noise[i+1], whatever mean and deviation depend on.
        """
        log_prob = -0.5 * (noise**2 + math.log(2 * math.pi)).sum(0) - log_deviations
        log_prob = log_prob - 2 * (math.log(2) - end - F.softplus(-2 * end))
        return torch.tanh(end) * self.scale + self.bias, log_prob.sum(1)


class TheirRenorm(naive.BatchRenorm):
    """BatchRenorm as the authors have it: a feature that is constant within a batch is 0 even after the switch.

    They shift by d times the batch's own deviation; `naive.BatchRenorm` shifts by all of d, whatever the deviation is.
    """

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        with torch.no_grad():
            var, mean = torch.var_mean(x, dim=0, correction=0)
            running_std = torch.sqrt(self.running_var + self.eps)
            d = ((mean - self.running_mean) / running_std).clamp(-self.d_max, self.d_max)
            d = torch.where(self.batches >= self.warmup, d, 0.0)
            too_much = d * (1 - torch.sqrt(var / (var + self.eps)))
        return super().forward(x) - self.weight * too_much


def bounded(log_sigma):
    """exp of a network's output bounded to [-5, 2], as in the scripts."""
    return torch.exp(-1.5 + 3.5 * torch.tanh(log_sigma))


def number(inputs: int, dim: int) -> nn.Linear:
    """The part of a layer that takes t as a number, initialised like one of the layer's `inputs` columns."""
    column = nn.Linear(1, dim, bias=False)
    nn.init.uniform_(column.weight, -(inputs**-0.5), inputs**-0.5)
    return column


class Clipped(Stepwise, naive.Actor):
    """sac_flow_naive.py's actor, with its backward pass limited."""

    clipped = True

    def prepare(self, obs):
        obs = self.norm(obs)
        return self.velocity_net.encode(self.encoder(obs)), bounded(self.sigma_net(obs))

    def velocity_and_sigma(self, t, a, shared):
        features, sigma = shared
        return self.velocity_net(t, a, features), sigma


class Sigma(Stepwise, naive.Actor):
    """Velocity and log sigma from one network of (s, A, t); A_{i+1} = A_i + dt v + sigma eps."""

    def __init__(
        self, obs_dim: int, action_low, action_high, *, dim: int = 512, renorm=lambda dim: nn.Identity(), **sizes
    ):  # fmt: skip
        super().__init__(obs_dim, action_low, action_high, dim=dim, **sizes)
        del self.sigma_net
        self.norm = renorm(sum({"s": obs_dim, "A": self.action_dim, "t": 1}[name] for name in self.under))
        self.velocity_net = self.network(obs_dim, dim)
        # The same in every variant: near 0 for K = 4, like theirs.
        plain = naive.Actor(obs_dim, action_low, action_high, flow_steps=self.flow_steps, entropy="path")
        self.target_entropy = plain.target_entropy

    def network(self, obs_dim: int, dim: int) -> nn.Module:
        """The plain velocity's, with twice the outputs."""
        network = naive.Velocity(self.velocity_net.from_obs.in_features, self.action_dim, dim)
        network.out = nn.Linear(dim, 2 * self.action_dim)
        return network

    def velocity_and_sigma(self, t, a, shared):
        obs, a, t = self.inputs(t, a, shared)
        features = self.velocity_net.encode(self.encoder(obs))
        v, log_sigma = self.velocity_net(t, a, features).chunk(2, dim=1)
        return v, bounded(log_sigma)

    def step(self, i: int, a, v, sigma):
        """Mean and standard deviation of A_{i+1} given a = A_i: no score, and no sqrt(dt)."""
        return a + v / self.flow_steps, sigma


class Renorm(Sigma):
    """`Sigma` with A under the BatchRenorm."""

    under = "sA"


class Time(Renorm):
    """`Renorm` with t under it: as t is constant within a batch, it is 0 in training, but up to +-12 when acting."""

    under = "sAt"

    def network(self, obs_dim: int, dim: int) -> nn.Module:
        network = super().network(obs_dim, dim)
        network.from_time = number(network.from_obs.in_features + self.action_dim + 1, dim)
        return network


class AuthorsNetwork(nn.Module):
    """MLP of (s, A, t) with two hidden ReLU layers, LeCun's initialisation and biases of 0."""

    def __init__(self, obs_dim: int, action_dim: int, dim: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(obs_dim + action_dim + 1, dim), nn.ReLU(),
            nn.Linear(dim, dim), nn.ReLU(),
            nn.Linear(dim, 2 * action_dim),
        )  # fmt: skip
        for layer in self.net[::2]:
            # Flax's lecun_normal: truncated at two deviations, and widened so that its variance is still 1 / inputs.
            deviation = layer.in_features**-0.5 / 0.87962566
            nn.init.trunc_normal_(layer.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
            nn.init.zeros_(layer.bias)

    def encode(self, obs):
        return obs

    def forward(self, t, a, features):
        """(B, 2 D) at flow time t (B, 1) and A (B, D)."""
        return self.net(torch.cat([features, a, t], dim=1))


class Authors(Time):
    """`Time` with the authors' network."""

    def network(self, obs_dim: int, dim: int) -> nn.Module:
        self.encoder = nn.Identity()
        return AuthorsNetwork(obs_dim, self.action_dim, dim)


class AuthorsNoTime(Authors):
    """`Authors` with t outside the BatchRenorm."""

    under = "sA"


class AuthorsClipped(Authors):
    """`Authors` with its backward pass limited."""

    clipped = True


class FlowGRenorm(Stepwise, flow_g.Actor):
    """sac_flow_g.py's actor with A under the BatchRenorm; the gate's -A stays as it is."""

    under = "sA"

    def __init__(
        self, obs_dim: int, action_low, action_high, *, dim: int = 256, renorm=lambda dim: nn.Identity(), **sizes
    ):  # fmt: skip
        super().__init__(obs_dim, action_low, action_high, dim=dim, **sizes)
        self.norm = renorm(sum({"s": obs_dim, "A": self.action_dim, "t": 1}[name] for name in self.under))

    def velocity_and_sigma(self, t, a, shared):
        obs, normalised, t = self.inputs(t, a, shared)
        features = self.velocity_net.encode(self.encoder(obs))
        # v = g (vhat - A) with g and vhat of the normalised A: the network subtracts what it is given.
        v = self.velocity_net(t, normalised, features)
        return v + self.gate(t, normalised, features) * (normalised - a), bounded(self.sigma_net(obs))

    def gate(self, t, a, features):
        """Flow-G's gate g, (B, D)."""
        hidden = F.silu(features + self.velocity_net.from_action(a) + self.velocity_net.from_time(t))
        return torch.sigmoid(self.velocity_net.gate(hidden.chunk(2, dim=-1)[0]))


class FlowGTime(FlowGRenorm):
    """`FlowGRenorm` with t under the BatchRenorm, too."""

    under = "sAt"

    def __init__(self, obs_dim: int, action_low, action_high, *, dim: int = 256, **sizes):
        super().__init__(obs_dim, action_low, action_high, dim=dim, **sizes)
        self.velocity_net.from_time = number(self.velocity_net.from_obs.in_features + self.action_dim + 1, 2 * dim)


VARIANTS = {
    "plain": naive.Actor,
    "sigma": Sigma,
    "renorm": Renorm,
    "time": Time,
    "authors": Authors,
    "authors-no-time": AuthorsNoTime,
    "flow-g": flow_g.Actor,
    "flow-g-renorm": FlowGRenorm,
    "flow-g-time": FlowGTime,
    "clipped": Clipped,
    "authors-clipped": AuthorsClipped,
}


@dataclass
class Args(naive.Args):
    """Flags of the command line: those of sac_flow_naive.py, four of them redefined, and two more."""

    entropy: Literal["path"] = "path"
    """which entropy to regularise: that of the whole path, as in the paper"""
    score_step: Literal["exponential", "euler", "none"] | None = None
    """how to integrate the score; default: none if the variant has a sigma of its own, else exponential"""
    crossq: Literal[True] = True
    """CrossQ's critics, always: the variants are about BatchRenorm"""
    renorm_warmup: int = 100_000
    """training batches for which the critics' BatchRenorm is plain batch normalisation; the actor's is for a K-th as
    many updates of the actor"""
    variant: Literal[tuple(VARIANTS)] = "plain"
    """what is trained: see above"""
    norms_every: int = 1_000
    """critic updates between two measurements of the gradient norms for norms.csv; 0: none"""


@dataclass
class Progress(naive.Progress):
    """How far a run has come: with the rows of norms.csv."""

    rows: dict = field(
        default_factory=lambda: {
            **naive_progress().rows,
            "norms.csv": [["step", "statistics", "i", "grad_norm", "median", "largest", "seconds"]],
        }
    )


def parse_args() -> tuple[Args, dict | None]:
    """As in sac_flow_naive.py; also stops the program if a flag contradicts the variant."""
    with mock.patch.multiple(naive, Args=Args, __doc__=__doc__):  # sweep.py calls this without main()
        args, checkpoint = naive_parse_args()
    if args.norms_every < 0:
        naive.fail(f"--norms-every must be 0 or more, not {args.norms_every}")
    if args.variant.startswith("flow-g") and args.velocity_dim % 2:
        naive.fail(
            f"--velocity-dim must be even, half for the gate and half for the candidate, not {args.velocity_dim}"
        )
    own_step = issubclass(VARIANTS[args.variant], Sigma)
    if own_step and args.score_step not in (None, "none"):
        naive.fail(f"--score-step {args.score_step}: variant {args.variant} has no score; drop the flag")
    score_step = args.score_step or ("none" if own_step else "exponential")
    return replace(args, score_step=score_step), checkpoint


def make_actor(args: Args, obs_dim: int, action_low, action_high) -> naive.Actor:
    """The actor of the variant."""
    kind = VARIANTS[args.variant]
    dim = args.velocity_dim // 2 if args.variant.startswith("flow-g") else args.velocity_dim
    actor = kind(
        obs_dim, action_low, action_high, flow_steps=args.flow_steps, score_step=args.score_step,
        entropy="path", sigma_dim=args.sigma_dim, encoder_dim=args.encoder_dim, dim=dim,
        renorm=naive.BatchRenorm if getattr(kind, "under", "s") == "s" else TheirRenorm,
    )  # fmt: skip
    actor.norm.warmup = args.renorm_warmup // args.flow_steps * batches_per_update(actor)
    return actor


def batches_per_update(actor: naive.Actor) -> int:
    """How many batches the actor's BatchRenorm sees in an update of the actor: one, or one at each of the K steps."""
    return 1 if getattr(actor, "under", "s") == "s" else actor.flow_steps


def make_networks(args: Args, env, device: torch.device):
    """As in sac_flow_naive.py; also says when the BatchRenorms switch, and hands `Run` what it is to measure."""
    networks = naive_make_networks(args, env, device)
    actor, _, critics, _, buffer = networks
    Run.measured = actor, critics, buffer, env, device
    updates = actor.norm.warmup // batches_per_update(actor)
    actors_end = args.learning_starts + updates * args.actor_delay
    critics_end = args.learning_starts + args.renorm_warmup
    print(
        f"the warm-up of the actor's BatchRenorm ends at step {actors_end}, that of the critics' at step {critics_end}",
        file=sys.stderr,
    )
    return networks


def gradient_norms(actor, critics, obs, noise, alpha, statistics: str):
    """|dL/dA_i| of each observation, (K+1, B), L the actor's loss, normalised by `statistics`: "batch" or "running".

    Or "free": by the batch, with the backward pass not limited. On copies, so that no running statistics move.
    """
    actor = copy.deepcopy(actor).train(statistics != "running")
    if statistics == "free":
        actor.clipped = False
    critics = copy.deepcopy(critics).eval()
    loss, _, *path = naive.actor_loss(actor, critics, obs, noise.detach().requires_grad_(), alpha)
    gradients = torch.stack(torch.autograd.grad(len(obs) * loss, path))  # (K+1, B, D), the mean of the loss undone
    return gradients.norm(dim=2)


class Run(naive.Run):
    """A run that also writes norms.csv. Neither training nor its clock notices."""

    def log_update(self, losses: torch.Tensor) -> None:
        super().log_update(losses)
        if not self.args.norms_every or self.progress.updates % self.args.norms_every:
            return
        actor, critics, buffer, env, device = self.measured
        alpha = losses[naive.LOSSES.index("alpha")]  # of the actor's latest update
        with self.paused(), naive.Generators(device, env).fork(self.args.seed + self.progress.step):
            obs, *_ = buffer.sample(self.args.batch_size)
            noise = actor.draw_noise(self.args.batch_size)
            kinds = ["batch", "running", *(["free"] if getattr(actor, "clipped", False) else [])]
            norms = {kind: gradient_norms(actor, critics, obs, noise, alpha, kind) for kind in kinds}
        for kind, values in norms.items():
            for i, row in enumerate(values):
                shown = (f"{number:.5g}" for number in (row.mean(), row.median(), row.max()))
                self.write_row("norms.csv", kind, i, *shown)


def main() -> None:
    """sac_flow_naive.py's main(), with what differs here in place of its own."""
    own = dict(SCRIPT=Path(__file__).stem, __doc__=__doc__, Args=Args, Progress=Progress, Run=Run)
    own |= dict(parse_args=parse_args, make_actor=make_actor, make_networks=make_networks)
    vars(naive).update(own)
    naive.main()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # not during a run, which handles it itself
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except SystemExit as stop:
        sys.exit(stop.code)  # Weights & Biases hears of a failure only here
