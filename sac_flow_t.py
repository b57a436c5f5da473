"""SAC Flow-T: soft actor-critic whose policy is a flow, trained end to end through its own sampling loop.

An action is made by K Euler steps of a velocity network, and gradients of the critic run back through all of
them. That loop is a residual RNN over the flow time, so its gradients can explode. Flow-T is the paper's proposed
cure, after the Transformer: the velocity is a pre-norm decoder, whose normalised read-out bounds each step.
Paper: "SAC Flow", arXiv 2509.25756; the README's "The argument" has the equations that comments name.

    python sac_flow_t.py --env-id Hopper-v4

Resume with --resume runs/<name>; watch with --evaluate runs/<name> --capture-video.
"""
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[mujoco]==1.4.0",
#     "mujoco==3.8.1",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
#     "numpy>=1.26,<3",
# ]
# ///

import contextlib
import copy
import csv
import json
import math
import os
import random
import re
import signal
import sys
import time
import warnings
import zipfile
from collections import deque
from dataclasses import asdict, dataclass, fields, replace
from functools import partial, wraps
from pathlib import Path
from typing import Literal, NoReturn, Optional

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem
LOSSES = ("qf_loss", "qf_values", "actor_loss", "alpha_loss", "alpha", "entropy")


@dataclass
class Args:
    """Flags of the command line; `alpha_lr` is --alpha-lr."""

    # What to run
    env_id: str = "Hopper-v4"
    """Gymnasium id with 1-D Box observations and bounded Box actions; `my_package:MyEnv-v0` imports my_package first"""
    seed: int = 1
    """seed of every random generator"""
    total_timesteps: int = 1_000_000
    """environment steps of the whole run"""
    cuda: bool = torch.cuda.is_available()
    """train on the GPU (the default where there is one)"""
    compile: bool = True
    """torch.compile the losses and the rollout, if a C++ compiler is found; on a GPU, replay CUDA graphs of them"""
    bf16: bool = False
    """let matrix products round their float32 factors to bfloat16 (TF32 on a GPU) where that is faster"""
    capture_video: bool = False
    """write videos of some training episodes, or of those of --evaluate, to <run>/videos"""
    track: bool = False
    """mirror the TensorBoard log to Weights & Biases"""
    save_every: int = 50_000
    """steps between checkpoints; each is saved at the next end of an episode, and one at the end of the run"""
    eval_every: int = 10_000
    """steps between evaluations of the averaged actor, which training does not notice; 0: none, not even at the end"""
    eval_episodes: int = 5
    """episodes of an evaluation"""
    resume: Optional[str] = None
    """folder of a run to continue, bit for bit, from its checkpoint"""
    evaluate: Optional[str] = None
    """folder of a run whose policy.pt is played instead of training, or a policy file: runs/<name>/policy_best.pt"""

    # Soft actor-critic
    buffer_size: int = 1_000_000
    """capacity of the replay buffer in transitions"""
    batch_size: int = 256
    """transitions per update"""
    learning_starts: int = 5_000
    """uniformly random actions before learning starts"""
    gamma: float = 0.99
    """discount factor"""
    critic_lr: float = 1e-3
    """learning rate of the critics"""
    # actor_lr and alpha were chosen together on Hopper-v4: from the paper's alpha 0.2 the entropy term first inflates
    # sigma (path entropy 14 for a target of 0) and Flow-G stood near 660 at step 30 000; with these, near 1 460.
    actor_lr: float = 1e-3
    """learning rate of the actor"""
    alpha_lr: float = 1e-3
    """learning rate of the entropy coefficient"""
    adam_b1: float = 0.5
    """beta1 of every Adam optimizer"""
    critic_dim: int = 256
    """width of the two hidden layers of each critic"""
    actor_delay: int = 3
    """critic updates per update of actor and alpha"""
    # Flow-G on Walker2d-v4 and Hopper-v4, three seeds each, frozen at 92 000 to 100 000 steps: means 3 240 (0.99),
    # 3 249 (0.995), 3 196 (0.999) and 3 100 (last weights, which in five of the six runs also vary more than 0.995).
    actor_average: float = 0.995
    """decay per actor update of the averaged weights, which are evaluated and make policy.pt; 0: the last weights"""
    autotune: bool = True
    """learn alpha such that the entropy of the path meets --target-entropy"""
    alpha: float = 0.02
    """entropy coefficient: its start, or its value with --no-autotune"""
    target_entropy: Optional[float] = None
    """target of the policy's entropy in nats, all dimensions (and a flow's steps) together; default 0, Gaussian -D"""
    crossq: bool = True
    """CrossQ critic: BatchRenorm and a joint forward, no target networks; --no-crossq is SAC with target networks"""
    tau: float = 0.005
    """with --no-crossq: step of the target networks' moving average"""
    renorm_warmup: int = 100_000
    """training batches for which a BatchRenorm is plain batch normalisation (the actor's sees one per actor update)"""

    # Flow policy
    flow_steps: int = 4
    """K, Euler steps from noise to action"""
    # With a constant sigma the exponential step stood at 1 041 and 396 on Hopper-v4 after 60 000 steps, with sigma
    # sqrt(1 - t), which is kept here, at 3 039 and 3 213 (frozen averages, two seeds; more in the README's Results).
    score_step: Literal["exponential", "euler", "none"] = "exponential"
    """how the score, which keeps the marginals those of the noise-free flow, is integrated; euler is the paper's"""
    sigma_dim: int = 256
    """width of the two hidden layers of the network for sigma"""
    velocity_dim: int = 64
    """width of the decoder's tokens"""
    velocity_layers: int = 2
    """decoder layers"""


class TimeEmbedding(nn.Module):
    """Linear map of sines and cosines of the flow time t in [0, 1] (float or (B, 1)) to (dim,) or (B, dim)."""

    def __init__(self, dim: int, frequencies: int = 16):
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0, 2, frequencies), persistent=False)  # 1 to 100 rad
        self.linear = nn.Linear(2 * frequencies, dim, bias=False)

    def forward(self, t):
        phase = t * self.frequencies
        return self.linear(torch.cat([torch.sin(phase), torch.cos(phase)], dim=-1))


class DecoderLayer(nn.Module):
    """Pre-norm decoder layer: y = phi + Cross(LN(phi), LN(memory)),  phi' = y + FFN(LN(y)), of one token each.

    Over one memory token the attention's softmax is 1, whatever queries, keys and heads are: Cross is the linear
    read-out W_out W_value LN(memory), the same at all K steps, and is all that is built of it here. Self-attention,
    masked to the diagonal so that a step stays Markov in the action, would be linear too: the FFN does that work.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm_memory, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))

    def encode(self, memory):
        """Cross(LN(phi), LN(memory)) for any phi: (B, dim) -> (B, dim)."""
        return self.out(self.value(self.norm_memory(memory)))

    def forward(self, phi, cross):
        """One layer over the action token phi (B, dim)."""
        y = phi + cross
        return y + self.ffn(self.norm_ffn(y))


class Velocity(nn.Module):
    """Flow-T: v = W_o LN(Phi_L), Phi_L from decoder layers that read the observation.

    Phi_0, the action token, is embed(a) + embed(t); the memory is one observation token.
    """

    def __init__(self, obs_dim: int, action_dim: int, dim: int = 64, layers: int = 2):
        super().__init__()
        self.from_obs = nn.Linear(obs_dim, dim)
        self.from_action = nn.Linear(action_dim, dim)
        self.from_time = TimeEmbedding(dim)
        self.layers = nn.ModuleList(DecoderLayer(dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, action_dim)

    def encode(self, obs):
        """What the K steps share: (B, obs_dim) -> what each layer reads out of the observation token, (B, dim) each."""
        memory = self.from_obs(obs)
        return [layer.encode(memory) for layer in self.layers]

    def forward(self, t, a, features):
        """Velocity (B, D) at flow time t (float or (B, 1)) and pre-squash action a (B, D)."""
        phi = self.from_action(a) + self.from_time(t)
        for layer, cross in zip(self.layers, features, strict=True):
            phi = layer(phi, cross)
        return self.out(self.norm(phi))


class Actor(nn.Module):
    """Flow policy: K noisy Euler steps of a velocity network, then tanh to the action bounds.

    Built from sizes alone, so that it can be copied elsewhere: `action_low` and `action_high` are sequences of D finite
    bounds, `renorm` is a factory dim -> module that normalises observations, `velocity` holds the sizes of `Velocity`.
    """

    def __init__(
        self, obs_dim: int, action_low, action_high, *, flow_steps: int = 4, score_step: str = "exponential",
        sigma_dim: int = 256, renorm=lambda dim: nn.Identity(), **velocity,
    ):  # fmt: skip
        super().__init__()
        low, high = (torch.as_tensor(bound, dtype=torch.float32) for bound in (action_low, action_high))
        self.flow_steps, self.score_step, self.action_dim = flow_steps, score_step, len(low)
        if score_step not in ("exponential", "euler", "none"):
            raise ValueError(f"score_step must be exponential, euler or none, not {score_step}")
        self.target_entropy = 0.0  # the paper's, of the path
        self.norm = renorm(obs_dim)
        self.velocity_net = Velocity(obs_dim, self.action_dim, **velocity)
        self.sigma_net = nn.Sequential(
            nn.Linear(obs_dim, sigma_dim), nn.ReLU(),
            nn.Linear(sigma_dim, sigma_dim), nn.ReLU(),
            nn.Linear(sigma_dim, self.action_dim),
        )  # fmt: skip
        self.register_buffer("scale", (high - low) / 2)
        self.register_buffer("bias", (high + low) / 2)

    def velocity(self, t, a, obs):
        """v(t, a, s), (B, D), at flow time t in [0, 1) (float or (B, 1)) and pre-squash action a (B, D)."""
        return self.velocity_net(t, a, self.velocity_net.encode(self.norm(obs)))

    def step(self, i: int, a, v, sigma):
        """Mean and standard deviation of A_{i+1} given a = A_i, v = v(t_i, A_i, s) and sigma, all (B, D).

        Both steps with the score (t v - a) / (1 - t) of the linear path's marginal keep the marginals those of the flow
        without noise, for the velocity of a true flow and K large. Euler's, the paper's, overshoots where sigma is
        large. The exponential one has noise of scale sigma sqrt(1 - t), holds v and 1 - t fixed within the step and
        solves the rest exactly: the score's factor rho is in (0, 1) whatever sigma and K (step 8 of the README).
        """
        dt = 1 / self.flow_steps
        t = i * dt
        if self.score_step == "exponential":
            x = sigma**2 * dt / 2
            rho = torch.exp(-x)
            return (t + dt) * v + rho * (a - t * v), torch.sqrt((1 - t) * -torch.expm1(-2 * x))
        if self.score_step == "euler":
            v = v + sigma**2 / 2 * (t * v - a) / (1 - t)
        return a + dt * v, sigma * math.sqrt(dt)

    def rollout(self, obs, noise):
        """Sample actions and the density of their paths.

        A_0 = noise[0],  A_{i+1} = m_i + sqrt(V_i) noise[i+1]  (`step` has m_i and sqrt(V_i)),  action = squash(A_K),
        log p_c(path | s) = log N(A_0; 0, I) + sum_i log N(A_{i+1}; m_i, V_i I) - sum_d log |d action_d / d A_{K,d}|.
        obs (B, obs_dim); noise (K+1, B, D) of unit Gaussians. Returns action (B, D) in the environment's units,
        log_prob (B,) = log p_c, and the path, the list of A_0 to A_K, (B, D) each (graph nodes if noise requires grad).
        """
        obs = self.norm(obs)
        features = self.velocity_net.encode(obs)
        sigma = torch.exp(-1.5 + 3.5 * torch.tanh(self.sigma_net(obs)))  # (B, D) in [e^-5, e^2], shared by the K steps
        path, log_deviations = [noise[0]], 0.0
        for i in range(self.flow_steps):
            v = self.velocity_net(i / self.flow_steps, path[i], features)
            mean, deviation = self.step(i, path[i], v, sigma)
            path.append(mean + deviation * noise[i + 1])
            log_deviations = log_deviations + deviation.log()
        # Standardised, A_{i+1} given A_i is noise[i+1]: hence the density of the noise, less the log deviations.
        log_prob = -0.5 * (noise**2 + math.log(2 * math.pi)).sum(0) - log_deviations
        # log|da/dA_K|, with 1 - tanh(x)^2 = (2 / (e^x + e^-x))^2 written so that it neither under- nor overflows.
        log_prob = log_prob - self.scale.log() - 2 * (math.log(2) - path[-1] - F.softplus(-2 * path[-1]))
        return torch.tanh(path[-1]) * self.scale + self.bias, log_prob.sum(1), path

    def largest_entropy(self, sigma: float = math.exp(2)) -> float:
        """Entropy of paths with that sigma everywhere, were nothing squashed: in nats, of all dimensions and steps."""
        one = torch.ones_like(self.scale)
        log_deviations = [self.step(i, one, one, sigma * one)[1].log() for i in range(self.flow_steps)]
        normal = 0.5 * math.log(2 * math.pi * math.e)
        return float(((self.flow_steps + 1) * normal + sum(log_deviations) + self.scale.log()).sum())

    def noise(self, batch: int, deterministic: bool = False):
        """What a rollout of `batch` observations takes: (K+1, B, D) of unit Gaussians, or zeros for the path's mode."""
        draw = torch.zeros if deterministic else torch.randn
        shape = self.flow_steps + 1, batch, self.action_dim
        return draw(shape, device=self.scale.device, dtype=self.scale.dtype)

    def act(self, obs, deterministic: bool = False):
        """Actions (B, D) for obs (B, obs_dim); deterministic: the mode of the path, with all noise 0."""
        return self.rollout(obs, self.noise(len(obs), deterministic))[0]


class BatchRenorm(nn.Module):
    """Batch renormalisation (Ioffe, 2017) of (B, dim): normalises training batches by the running statistics.

    y = ((x - mean) / std * r + d) * weight + bias,  r = std / running_std,  d = (mean - running_mean) / running_std,
    with r and d clipped and without gradient. For the first `warmup` batches r = 1, d = 0: plain batch norm.
    The running statistics are the mean over all batches so far, up to 1 / (1 - momentum) of them; after that a moving
    average.
    """

    def __init__(self, dim: int, momentum=0.99, eps=1e-3, r_max=3.0, d_max=5.0, warmup=100_000):
        super().__init__()
        self.momentum, self.eps, self.r_max, self.d_max, self.warmup = momentum, eps, r_max, d_max, warmup
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        # Everything is folded into one scale and one shift per feature, so that after its statistics x is read once.
        # The stacks put these, and in the backward pass their gradients, into memory: compiled loops over x would
        # otherwise repeat the roots and divisions at every element.
        if self.training:
            var, mean = torch.stack(torch.var_mean(x, dim=0, correction=0))
            std = torch.sqrt(var + self.eps)
            with torch.no_grad():
                running_std = torch.sqrt(self.running_var + self.eps)
                warm = self.batches >= self.warmup  # a tensor: the switch needs neither a host sync nor a recompilation
                r = torch.where(warm, (std / running_std).clamp(1 / self.r_max, self.r_max), 1.0)
                d = torch.where(warm, ((mean - self.running_mean) / running_std).clamp(-self.d_max, self.d_max), 0.0)
                weight = (1 / (self.batches + 1)).clamp(min=1 - self.momentum)
                self.running_mean.lerp_(mean, weight)
                self.running_var.lerp_(var, weight)
                self.batches.add_(1)
            scale = self.weight * r / std
            shift = self.bias + self.weight * d - mean * scale
        else:
            scale = self.weight * torch.rsqrt(self.running_var + self.eps)
            shift = self.bias - self.running_mean * scale
        scale, shift = torch.stack([scale, shift])
        return x * scale + shift


class Critic(nn.Module):
    """Q(s, a): two hidden layers; with `renorm` (a factory, dim -> module) normalised before each Linear, as CrossQ."""

    def __init__(self, obs_dim: int, action_dim: int, dim: int, renorm=lambda dim: nn.Identity()):
        super().__init__()
        self.net = nn.Sequential(
            renorm(obs_dim + action_dim),
            nn.Linear(obs_dim + action_dim, dim), nn.ReLU(), renorm(dim),
            nn.Linear(dim, dim), nn.ReLU(), renorm(dim),
            nn.Linear(dim, 1),
        )  # fmt: skip

    def forward(self, obs, action):
        """(B, obs_dim), (B, D) -> (B,)"""
        return self.net(torch.cat([obs, action], dim=1)).squeeze(1)


def critic_loss(actor, critics, targets, batch, noise, alpha, gamma):
    """sum_j mean (Q_j(s, a) - y)^2 / 2,  y = r + gamma (1 - d) (min_j Q_j(s', a') - alpha log p_c(path')).

    `targets` are the target networks, or None for CrossQ: then Q(s, a) and Q(s', a') come from one forward of both
    halves, so that BatchRenorm sees the mixture of both distributions. Returns the loss and mean Q.
    """
    obs, action, reward, terminated, next_obs = batch
    with torch.no_grad():
        next_action, next_log_prob, _ = actor.rollout(next_obs, noise)
    if targets is None:
        both = torch.cat([obs, next_obs]), torch.cat([action, next_action])
        q, next_q = torch.stack([critic(*both) for critic in critics]).chunk(2, dim=1)  # (2, B) each
        next_q = next_q.detach()
    else:
        q = torch.stack([critic(obs, action) for critic in critics])
        with torch.no_grad():
            next_q = torch.stack([target(next_obs, next_action) for target in targets])
    y = reward + gamma * (1 - terminated) * (next_q.amin(0) - alpha * next_log_prob)
    return 0.5 * (q - y).square().mean(1).sum(), q.mean()


def actor_loss(actor, critics, obs, noise, alpha):
    """mean(alpha log p_c - min_j Q_j(s, a)), its gradient through all K steps. Returns it, mean log p_c, A_0 to A_K."""
    action, log_prob, path = actor.rollout(obs, noise)
    q = torch.stack([critic(obs, action) for critic in critics]).amin(0)
    return (alpha * log_prob - q).mean(), log_prob.mean(), *path


def alpha_loss(log_alpha, log_prob, target_entropy):
    """alpha * (entropy - target): alpha falls while the paths' entropy, mean -log p_c, exceeds its target."""
    return log_alpha.exp() * (-log_prob - target_entropy)


def with_gradients(loss_function, network):
    """`loss_function` with its gradients in the same graph: function(*inputs) -> loss, *rest, gradients.

    `rest` is every other scalar that the loss function returns, and `gradients` are those of the loss with respect to
    the parameters of `network`, in their order. As one function both passes compile to one graph, and nothing else is
    computed: an actor update leaves out the gradients of the critics' parameters.
    """

    @wraps(loss_function)
    def function(*inputs):
        loss, *rest = loss_function(*inputs)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        return loss.detach(), *(value.detach() for value in rest if value.ndim == 0), gradients

    return function


def apply_gradients(optimizer, gradients) -> None:
    """One step of `optimizer`, given the gradient of each of its parameters, in their order."""
    for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()


def gradient_norms(actor, critics, obs, noise, alpha):
    """Mean over the batch of |dL/dA_i| for i = 0..K, L the actor's loss: the RNN gradient product made visible.

    As the actor's update sees it, normalised by the batch; running statistics and modes stay as they are.
    """
    modes, statistics = (actor.norm.training, critics.training), copy.deepcopy(actor.norm.state_dict())
    actor.norm.train()
    critics.eval()
    loss, _, *path = actor_loss(actor, critics, obs, noise.requires_grad_(), alpha)
    gradients = torch.stack(torch.autograd.grad(len(obs) * loss, path))  # (K+1, B, D), the mean of the loss undone
    actor.norm.load_state_dict(statistics)
    actor.norm.train(modes[0])
    critics.train(modes[1])
    return gradients.norm(dim=2).mean(1)  # (K+1,)


class ReplayBuffer:
    """Ring buffer on the training device. A transition is one row, so adding and sampling are one copy each."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.widths = [obs_dim, action_dim, 1, 1, obs_dim]  # obs, action, reward, terminated, next_obs
        self.rows = torch.zeros(capacity, sum(self.widths), device=device)
        self.added = 0  # transitions ever added; the next one goes to row added % capacity
        self.size = torch.zeros((), dtype=torch.int64, device=device)  # len(self) where a CUDA graph can read it

    def __len__(self) -> int:
        return min(self.added, len(self.rows))

    def add(self, obs, action, reward, terminated, next_obs) -> None:
        """Store one transition: numpy vectors and scalars. `next_obs` is what the step returned, never a reset's."""
        row = np.concatenate([obs, action, [reward, terminated], next_obs]).astype(np.float32)
        self.rows[self.added % len(self.rows)] = torch.from_numpy(row)
        self.added += 1
        self.size.fill_(len(self))

    def sample(self, batch_size: int) -> list[torch.Tensor]:
        """Uniform batch: obs (B, obs_dim), action (B, D), reward (B,), terminated (B,), next_obs (B, obs_dim)."""
        index = torch.randint(2**62, (batch_size,), device=self.rows.device) % self.size
        obs, action, reward, terminated, next_obs = self.rows[index].split(self.widths, dim=1)
        return [obs, action, reward.squeeze(1), terminated.squeeze(1), next_obs]

    def filled(self) -> torch.Tensor:
        """The rows in use, as a tensor of their own: torch.save would write all that a view refers to."""
        return self.rows if len(self) == len(self.rows) else self.rows[: len(self)].clone()

    def refill(self, rows: torch.Tensor, added: int) -> None:
        """Put back what `filled` returned, after `added` transitions."""
        self.rows[: len(rows)].copy_(rows)
        self.added = added
        self.size.fill_(len(self))

    def last_actions(self, n: int) -> np.ndarray:
        """The last n actions added, oldest first, (n, D)."""
        index = torch.arange(self.added - n, self.added, device=self.rows.device) % len(self.rows)
        return self.rows[index].split(self.widths, dim=1)[1].cpu().numpy()

    def last_obs(self) -> np.ndarray:
        """The next_obs of the last transition added, (obs_dim,)."""
        return self.rows[(self.added - 1) % len(self.rows)].split(self.widths)[4].cpu().numpy()


def main() -> None:
    args, checkpoint = parse_args()
    device = torch.device("cuda" if args.cuda else "cpu")
    headless = sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if args.capture_video and headless:
        os.environ.setdefault("MUJOCO_GL", "egl")
    render_mode = "rgb_array" if args.capture_video else "human" if args.evaluate and not headless else None
    env = make_env(args.env_id, render_mode)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.low.size
    run = Path(args.resume or args.evaluate or "runs")
    run = run.parent if run.suffix == ".pt" else run
    if not checkpoint:
        run /= f"{re.sub(r'[^A-Za-z0-9.-]+', '_', args.env_id)}__{SCRIPT}__{args.seed}__{int(time.time())}"
    if args.capture_video:
        check_video(env)
    videos = partial(gym.wrappers.RecordVideo, video_folder=str(run / "videos"), disable_logger=True)

    precision = matmul_precision(device, args.bf16)
    seed_random(args.seed)
    try:
        actor = make_actor(args, obs_dim, env.action_space.low.ravel(), env.action_space.high.ravel()).to(device).eval()
        critics = [Critic(obs_dim, action_dim, args.critic_dim, renorm_of(args)) for _ in range(2)]
        critics = nn.ModuleList(critics).to(device)
        buffer = None if args.evaluate else ReplayBuffer(args.buffer_size, obs_dim, action_dim, device)
    except (ValueError, RuntimeError) as error:  # sizes that do not fit together, or not into memory
        sizes = ", ".join(f"--{name.replace('_', '-')}" for name in vars(args) if name.endswith(("_dim", "_size")))
        fail(f"{str(error).splitlines()[0]} (sizes: {sizes})")
    if args.evaluate:
        actor.load_state_dict(checkpoint["actor"])
        print(f"{args.evaluate} at step {checkpoint['step']}")
        if args.capture_video:
            env = videos(env, name_prefix="evaluation", episode_trigger=lambda episode: True)

        @torch.no_grad()
        def play(obs: np.ndarray, deterministic: bool) -> np.ndarray:
            return actor.act(torch.from_numpy(obs).to(device)[None], deterministic)[0].cpu().numpy()

        for kind in ("deterministic", "stochastic"):
            act_so = partial(play, deterministic=kind == "deterministic")
            print(f"{kind}: {describe(evaluate(act_so, env, args.eval_episodes, args.seed))}")
        env.close()
        return

    # The actor that is evaluated: a moving average of the weights, with the running statistics of the one that learns.
    average = copy.deepcopy(actor).requires_grad_(False)
    for name, statistic in actor.norm.named_buffers():
        setattr(average.norm, name, statistic)
    targets = None if args.crossq else copy.deepcopy(critics).requires_grad_(False)
    target_entropy = actor.target_entropy if args.target_entropy is None else args.target_entropy
    if args.autotune and target_entropy > actor.largest_entropy():
        reach = f"at most {actor.largest_entropy():.4g}, what the policy can reach; lower it, or --no-autotune"
        fail(f"--target-entropy must be {reach}")
    log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha), device=device))
    adam = partial(torch.optim.Adam, betas=(args.adam_b1, 0.999), fused=True, capturable=True)
    actor_optimizer = adam(actor.parameters(), lr=args.actor_lr)
    critic_optimizer = adam(critics.parameters(), lr=args.critic_lr)
    alpha_optimizer = adam([log_alpha], lr=args.alpha_lr)
    learned = {
        "actor": actor, "average": average, "critics": critics, "actor_optimizer": actor_optimizer,
        "critic_optimizer": critic_optimizer, "alpha_optimizer": alpha_optimizer,
        **({"targets": targets} if targets else {}),
    }  # fmt: skip
    losses = torch.zeros(len(LOSSES), device=device)
    policy_obs, policy_action = torch.zeros(1, obs_dim, device=device), torch.zeros(action_dim, device=device)
    policy_noise = actor.noise(1, deterministic=True)
    step, updates, seconds, saved_step, best = 0, 0, 0.0, 0, -math.inf
    lengths = {"returns.csv": 0, "eval.csv": 0}
    if checkpoint:
        for name, part in learned.items():
            part.load_state_dict(checkpoint[name])
        log_alpha.data.copy_(checkpoint["log_alpha"])
        losses.copy_(checkpoint["losses"])
        buffer.refill(checkpoint.pop("buffer"), checkpoint["buffer_added"])  # pop: it is as large as the buffer
        step, updates, seconds = checkpoint["step"], checkpoint["updates"], checkpoint["seconds"]
        saved_step, best, lengths = step, checkpoint["best"], checkpoint["lengths"]
        for name, length in lengths.items():
            if not (run / name).is_file() or (run / name).stat().st_size < length:
                fail(f"{run / name} is shorter than when the checkpoint was saved: restore it from a copy")

    if args.track:
        try:
            import wandb

            wandb.init(project="sac-flow", id=run.name, resume="allow", config=asdict(args), sync_tensorboard=True)
        except ImportError:
            fail("--track needs wandb: pip install -r benchmark/requirements.txt")
        except Exception as error:
            fail(f"--track: {(str(error) or type(error).__name__).splitlines()[0]}")
    try:
        run.mkdir(parents=True, exist_ok=bool(checkpoint))
        (run / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
        writer = SummaryWriter(run, purge_step=step + 1 if checkpoint else None)
        csv_files = {name: open(run / name, "r+" if checkpoint else "w", newline="") for name in lengths}
        for name, length in lengths.items():
            csv_files[name].truncate(length)
            csv_files[name].seek(length)
    except OSError as error:
        fail(f"cannot write to {run}: {error.strerror}")
    writer.add_text("args", "|flag|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in vars(args).items()))
    returns_csv, eval_csv = (csv.writer(file, lineterminator="\n") for file in csv_files.values())
    if not checkpoint:
        returns_csv.writerow(["step", "return", "length", "seconds"])
        eval_csv.writerow(["step", "kind", "return", "return_error", "length", "episodes", "seconds"])

    eval_env = make_env(args.env_id)
    env.reset(seed=args.seed)
    env.action_space.seed(args.seed)
    env_random, space_random = env.unwrapped.np_random.bit_generator, env.action_space.np_random.bit_generator
    if args.capture_video:
        env = videos(env, name_prefix=f"from-step-{step}")
    episode_return, episode_length = 0.0, 0
    if checkpoint:
        set_random_states(checkpoint["random"], device)
        env_random.state, space_random.state = checkpoint["env_random"], checkpoint["space_random"]
        episode_length = checkpoint["episode_length"]
    episode_random = env_random.state  # before the reset: where this episode can be replayed from
    obs = to_obs(env.reset()[0])
    if episode_length:  # the run stopped in an episode: the same reset and actions lead back to the same state
        for action in buffer.last_actions(min(episode_length, len(buffer))):
            next_obs, reward, *_ = env.step(to_action(action, env.action_space))
            obs, episode_return = to_obs(next_obs), episode_return + float(reward)
        if episode_length > len(buffer) or not np.array_equal(obs, buffer.last_obs()):
            print("note: the interrupted episode could not be replayed; starting a new one", file=sys.stderr)
            episode_random, episode_return, episode_length = env_random.state, 0.0, 0
            obs = to_obs(env.reset()[0])

    jit = find_compiler(device) if args.compile else lambda function: function
    policy = jit(lambda obs, noise: actor.rollout(obs, noise)[0])
    averaged_policy = jit(lambda obs, noise: average.rollout(obs, noise)[0])
    critic_gradients = jit(with_gradients(critic_loss, critics))
    actor_gradients = jit(with_gradients(actor_loss, actor))

    # What runs on the device: actions, to train and to evaluate, and the updates. Nothing is taken or returned, so that
    # each can be a CUDA graph.
    def act() -> None:
        with torch.no_grad():
            policy_action.copy_(policy(policy_obs, policy_noise)[0])

    def act_averaged() -> None:
        with torch.no_grad():
            policy_action.copy_(averaged_policy(policy_obs, policy_noise)[0])

    def update_critic() -> None:
        batch, noise, alpha = buffer.sample(args.batch_size), actor.noise(args.batch_size), log_alpha.detach().exp()
        loss, q, gradients = critic_gradients(actor, critics, targets, batch, noise, alpha, args.gamma)
        apply_gradients(critic_optimizer, gradients)
        if targets:
            with torch.no_grad():
                torch._foreach_lerp_(list(targets.parameters()), list(critics.parameters()), args.tau)
        losses[:2] = torch.stack([loss, q])

    def update_actor() -> None:
        (obs, *_), alpha = buffer.sample(args.batch_size), log_alpha.detach().exp()
        actor.norm.train()  # it normalises by running statistics, but for its own update
        critics.eval()
        loss, log_prob, gradients = actor_gradients(actor, critics, obs, actor.noise(args.batch_size), alpha)
        apply_gradients(actor_optimizer, gradients)
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(actor.parameters()), 1 - args.actor_average)
        actor.norm.eval()
        critics.train()
        loss_alpha = alpha_loss(log_alpha, log_prob, target_entropy)
        if args.autotune:
            apply_gradients(alpha_optimizer, torch.autograd.grad(loss_alpha, [log_alpha]))
        losses[2:] = torch.stack([loss, loss_alpha.detach(), alpha, -log_prob])

    if args.compile and args.cuda:
        act, act_averaged = CudaGraph(act), CudaGraph(act_averaged)
        update_critic, update_actor = CudaGraph(update_critic), CudaGraph(update_actor)

    history, last_returns, start, first_step = [], deque(maxlen=10), time.time(), step

    def choose(obs: np.ndarray, act=act, deterministic: bool = False) -> np.ndarray:
        """An action (D,) for obs (obs_dim,)."""
        policy_obs.copy_(torch.from_numpy(obs))
        policy_noise.copy_(actor.noise(1, deterministic))
        act()
        return policy_action.cpu().numpy().copy()

    def save_policy(name: str) -> None:
        """Write the averaged actor, and what builds it, as `load_policy` reads it."""
        space = env.action_space
        state = dict(script=SCRIPT, args=asdict(args), step=step, obs_dim=obs_dim, actor=average.state_dict())
        state.update(action_low=space.low.ravel().tolist(), action_high=space.high.ravel().tolist())
        write(run / name, state)

    def score(kind: Literal["deterministic", "stochastic"]) -> None:
        """Evaluate the averaged actor and write it down. Neither training nor its clock notices."""
        nonlocal best, start
        began = time.time()
        with fork_random(args.seed, device):
            act_so = partial(choose, act=act_averaged, deterministic=kind == "deterministic")
            scores = evaluate(act_so, eval_env, args.eval_episodes, args.seed)
        for name, value in scores.items():
            writer.add_scalar(f"eval/{name}" if kind == "deterministic" else f"eval/{kind}_{name}", value, step)
        elapsed = round(seconds + began - start, 2)
        eval_csv.writerow([step, kind, *(f"{value:.5g}" for value in scores.values()), args.eval_episodes, elapsed])
        csv_files["eval.csv"].flush()
        tqdm.write(f"step {step}, {kind}: {describe(scores)}")
        if kind == "deterministic" and scores["return"] > best:
            best = float(scores["return"])
            save_policy("policy_best.pt")
        start += time.time() - began

    def save() -> None:
        """Write the checkpoint: all that decides how the run goes on, and the way back to this point of the episode."""
        nonlocal saved_step
        for file in csv_files.values():
            file.flush()
            os.fsync(file.fileno())
        mean_losses()
        for name in ("actor", "critics"):
            for parameter, value in learned[name].state_dict().items():
                if not value.isfinite().all():
                    diverged(step, f"{name}.{parameter}")
        state = {name: part.state_dict() for name, part in learned.items()}
        state.update(
            script=SCRIPT, args=asdict(args), log_alpha=log_alpha.detach(), losses=losses, buffer=buffer.filled(),
            buffer_added=buffer.added, step=step, updates=updates, seconds=seconds + time.time() - start, best=best,
            lengths={name: file.tell() for name, file in csv_files.items()}, random=random_states(device),
            space_random=space_random.state, env_random=episode_random, episode_length=episode_length,
        )  # fmt: skip
        save_policy("policy.pt")
        write(run / "checkpoint.pt", state)
        saved_step = step

    def kept() -> str:
        return f"the checkpoint of step {saved_step} is kept: --resume {run}" if saved_step else "no checkpoint yet"

    def diverged(step: int, name: str) -> NoReturn:
        fail(f"step {step}: {name} is NaN or infinite; {kept()}")

    def mean_losses() -> torch.Tensor:
        """Means of the losses since the last call, after a check of each: the only host-device sync for losses."""
        rows = torch.stack(history).cpu() if history else torch.zeros(1, len(LOSSES))
        for row, column in (~rows.isfinite()).nonzero().tolist():
            diverged(step - len(rows) + 1 + row, LOSSES[column])
        history.clear()
        return rows.mean(0)

    signals = []  # Ctrl-C or a kill is acted upon at the end of the step; the same again stops at once

    def on_signal(number, frame):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", mininterval=1, dynamic_ncols=True)
    try:
        while step < args.total_timesteps and not signals:
            if not np.isfinite(obs).all():
                diverged(step, "observation")
            if step < args.learning_starts:
                action = env.action_space.sample().ravel().astype(np.float32)
            else:
                action = choose(obs)
                if not np.isfinite(action).all():
                    mean_losses()  # if a loss diverged before, it is the one to name
                    diverged(step, "action")
            next_obs, reward, terminated, truncated, _ = env.step(to_action(action, env.action_space))
            next_obs, reward, step = to_obs(next_obs), float(reward), step + 1
            if not math.isfinite(reward):
                diverged(step, "reward")
            if not np.isfinite(next_obs).all():  # before it is stored
                diverged(step, "observation")
            buffer.add(obs, action, reward, terminated, next_obs)  # truncation is not termination: it bootstraps
            obs, episode_return, episode_length = next_obs, episode_return + reward, episode_length + 1
            bar.update()

            if step > args.learning_starts:
                torch.set_float32_matmul_precision(precision)
                update_critic()
                if updates % args.actor_delay == 0:
                    update_actor()
                    if updates // args.actor_delay % 1000 == 0:
                        with fork_random(args.seed + step, device):
                            (batch_obs, *_), noise = buffer.sample(args.batch_size), actor.noise(args.batch_size)
                        norms = gradient_norms(actor, critics, batch_obs, noise, log_alpha.detach().exp())
                        for i, norm in enumerate(norms.tolist()):
                            writer.add_scalar(f"flow/grad_norm_step_{i}", norm, step)
                torch.set_float32_matmul_precision("highest")  # for one observation MKL is the faster
                updates += 1
                history.append(losses.clone())
                if step % 100 == 0:
                    means = mean_losses().tolist()
                    for name, value in zip(LOSSES, means, strict=True):
                        writer.add_scalar(f"losses/{name}", value, step)
                    sps = (step - first_step) / (time.time() - start)
                    writer.add_scalar("charts/SPS", sps, step)
                    recent = f"{np.mean(last_returns):.0f}" if last_returns else "-"
                    bar.set_postfix({"return": recent, "alpha": f"{means[4]:.3g}"}, refresh=False)

            if args.eval_every and step % args.eval_every == 0:  # before a checkpoint of this step
                score("deterministic")
            if terminated or truncated:
                elapsed = seconds + time.time() - start
                writer.add_scalar("charts/episodic_return", episode_return, step)
                writer.add_scalar("charts/episodic_length", episode_length, step)
                returns_csv.writerow([step, episode_return, episode_length, round(elapsed, 2)])
                csv_files["returns.csv"].flush()
                last_returns.append(episode_return)
                episode_random, episode_return, episode_length = env_random.state, 0.0, 0
                if step - saved_step >= args.save_every:
                    save()
                obs = to_obs(env.reset()[0])
        save()
        if args.eval_every and step == args.total_timesteps:  # a run that is extended goes on from before this
            if step % args.eval_every:
                score("deterministic")
            score("stochastic")
    except OSError as error:
        fail(f"step {step}: {error}; {kept()}")
    finally:
        bar.close()
        env.close()
        eval_env.close()
        for file in (writer, *csv_files.values()):
            with contextlib.suppress(OSError):  # a full disk has had its message; what was saved is on it
                file.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)

    if step < args.total_timesteps:
        print(f"stopped at step {step}; to go on: python {SCRIPT}.py --resume {run}")
        raise SystemExit(128 + signals[0])
    print(f"saved in {run}")


# Plumbing: nothing below is the algorithm


def fail(message: str) -> NoReturn:
    """Stop with one line on standard error and exit code 2."""
    tqdm.write(f"{SCRIPT}: error: {message}", file=sys.stderr)  # above the progress bar, if there is one
    raise SystemExit(2)


def parse_args() -> tuple[Args, Optional[dict]]:
    """Flags, and the checkpoint they name if any. A resumed run keeps its own flags; a conflicting one is an error."""
    args, checkpoint = tyro.cli(Args, description=__doc__), None
    if args.resume and args.evaluate:
        fail("--resume and --evaluate exclude each other")
    if folder := args.resume or args.evaluate:
        path = Path(folder)
        name, key = ("checkpoint.pt", "buffer") if args.resume else ("policy.pt", "obs_dim")
        checkpoint = load(path if path.suffix == ".pt" else path / name, key)
        saved = Args(**{**checkpoint["args"], "resume": args.resume, "evaluate": args.evaluate})
        saved = replace(saved, cuda=saved.cuda and torch.cuda.is_available(), capture_video=False, track=False)
        args = tyro.cli(Args, description=__doc__, default=saved)
        may_change = {"total_timesteps", "cuda", "compile", "capture_video", "track", "save_every"}
        may_change |= {"eval_every", "eval_episodes"}
        for field in fields(Args):
            old, new = getattr(saved, field.name), getattr(args, field.name)
            if old != new and field.name not in may_change:
                fail(f"--{field.name.replace('_', '-')} {new} conflicts with {old} of {folder}: drop the flag")
        if args.resume and args.total_timesteps <= checkpoint["step"]:
            fail(f"{folder} has reached step {checkpoint['step']}: raise --total-timesteps to go on")

    def check(ok: bool, name: str, requirement: str) -> None:
        if not ok:
            fail(f"--{name.replace('_', '-')} must be {requirement}, not {getattr(args, name)}")

    for field in fields(Args):
        value = getattr(args, field.name)
        if field.name in ("seed", "learning_starts", "renorm_warmup", "eval_every"):
            check(0 <= value < 2**32, field.name, "0 or more, and below 2^32")
        elif type(value) is int:
            check(value >= 1, field.name, "1 or more")
        elif field.name.endswith("_lr") or field.name == "alpha":
            check(0 < value < math.inf, field.name, "above 0")
    check(0 <= args.gamma <= 1, "gamma", "in [0, 1]")
    check(0 <= args.adam_b1 < 1, "adam_b1", "in [0, 1)")
    check(0 < args.tau <= 1, "tau", "in (0, 1]")
    check(0 <= args.actor_average < 1, "actor_average", "in [0, 1)")
    check(args.target_entropy is None or math.isfinite(args.target_entropy), "target_entropy", "finite")
    check(args.batch_size <= args.buffer_size, "batch_size", f"at most --buffer-size {args.buffer_size}")
    if args.cuda and not torch.cuda.is_available():
        fail("--cuda: this torch finds no CUDA device; use --no-cuda")
    return args, checkpoint


def renorm_of(args: Args):
    """The flags' factory, dim -> module, of what normalises."""
    return partial(BatchRenorm, warmup=args.renorm_warmup) if args.crossq else lambda dim: nn.Identity()


def make_actor(args: Args, obs_dim: int, action_low, action_high) -> Actor:
    """The actor that the flags describe."""
    velocity = {name[len("velocity_") :]: n for name, n in vars(args).items() if name.startswith("velocity_")}
    return Actor(
        obs_dim, action_low, action_high, flow_steps=args.flow_steps, score_step=args.score_step,
        sigma_dim=args.sigma_dim, renorm=renorm_of(args), **velocity,
    )  # fmt: skip


def write(path: Path, state: dict) -> None:
    """Write `state` such that at any instant a complete file is there. Raises OSError if it cannot."""
    temporary = path.with_suffix(".pt.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save may wrap the former in the latter
        temporary.unlink(missing_ok=True)
        raise OSError(f"could not write {path} ({error})") from error


def load(path: Path, key: str) -> dict:
    """Read a file of a run that has `key`; stops the program if it is missing, damaged or written by another script."""
    if not path.is_file():
        fail(f"there is no {path}: name the folder of a run that has saved one, such as runs/<name>")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load would not notice a flipped bit
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        state = None
    if state is None:
        fail(f"{path} is truncated or corrupted: restore it from a copy, or start a new run")
    if not isinstance(state, dict) or state.get("script") != SCRIPT:
        written_by = state.get("script", "another program") if isinstance(state, dict) else "another program"
        fail(f"{path} was written by {written_by}, not by {SCRIPT}: continue it there")
    if key not in state:
        fail(f"{path} is of another kind: --resume takes a run's folder, --evaluate that or one of its policy files")
    theirs, ours = set(state["args"]), {field.name for field in fields(Args)}
    if theirs != ours:
        old, new = (", ".join(sorted(names)) or "none" for names in (theirs - ours, ours - theirs))
        fail(f"{path} was written by another version of {SCRIPT}, whose flags differ: it has {old} for {new}")
    return state


def load_policy(path: str) -> Actor:
    """The actor of a policy.pt, frozen: `load_policy("runs/<name>/policy.pt").act(obs, deterministic=True)`."""
    state = load(Path(path), "obs_dim")
    actor = make_actor(Args(**state["args"]), state["obs_dim"], state["action_low"], state["action_high"])
    actor.load_state_dict(state["actor"])
    return actor.eval().requires_grad_(False)


def random_states(device: torch.device) -> dict:
    """States of the process's random generators, in types that torch.load(weights_only=True) accepts."""
    name, key, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return dict(python=random.getstate(), numpy=[name, key.tolist(), *rest], torch=torch.get_rng_state(), cuda=cuda)


def set_random_states(states: dict, device: torch.device) -> None:
    """Undo `random_states`, with a note if the run was saved on another kind of device."""
    random.setstate(states["python"])
    name, key, *rest = states["numpy"]
    np.random.set_state((name, np.array(key, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if (states["cuda"] is not None) != (device.type == "cuda"):
        print(f"note: saved on another device, going on on {device.type}: not bit for bit", file=sys.stderr)
    elif states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], device)


def seed_random(seed: int) -> None:
    """Seed the process's random generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def fork_random(seed: int, device: torch.device):
    """Within it the random generators start from `seed`; after it they are where they were before."""
    states = random_states(device)
    seed_random(seed % 2**32)
    yield
    set_random_states(states, device)


def make_env(env_id: str, render_mode: Optional[str] = None) -> gym.Env:
    """gym.make with one-line errors for environments that do not exist or that this script cannot control."""
    warnings.filterwarnings("ignore", message=".*is out of date")  # v4 is what the paper reports
    try:
        env = gym.make(env_id, **({"render_mode": render_mode} if render_mode else {}))
    except Exception as error:  # a user's environment may raise anything
        fail(f"--env-id {env_id}: {(str(error) or type(error).__name__).splitlines()[0]}")
    obs, action = env.observation_space, env.action_space
    if not isinstance(obs, gym.spaces.Box) or len(obs.shape) != 1:
        fail(f"--env-id {env_id}: observations must be a Box of one dimension, not {obs}; wrap the environment")
    if not isinstance(action, gym.spaces.Box) or not np.issubdtype(action.dtype, np.floating):
        fail(f"--env-id {env_id}: actions must be a Box of real numbers, not {action}; wrap the environment")
    extent = action.high.astype(np.float32) - action.low.astype(np.float32)
    if not (np.isfinite(extent).all() and (extent > 0).all()):
        fail(f"--env-id {env_id}: every action needs finite bounds, low < high, not {action}; wrap the environment")
    return env


def check_video(env: gym.Env) -> None:
    """Refuse --capture-video where it cannot work; `env` is made with render_mode="rgb_array"."""
    try:
        import moviepy  # noqa: F401
    except ImportError:
        fail("--capture-video needs moviepy: pip install -r benchmark/requirements.txt")
    try:
        env.reset(seed=0)
        env.render()
    except Exception as error:
        fail(f"--capture-video: cannot render here ({error}); without a display set MUJOCO_GL=egl or osmesa")


def to_obs(obs) -> np.ndarray:
    """An environment's observation as float32, the type in which it is stored and fed to the networks."""
    return np.asarray(obs, dtype=np.float32)


def to_action(action: np.ndarray, space: gym.spaces.Box) -> np.ndarray:
    """(D,) in the space's shape and type, clipped: rounding may leave the bounds by a unit in the last place."""
    return np.clip(action.reshape(space.shape), space.low, space.high).astype(space.dtype)


def evaluate(act, env: gym.Env, episodes: int, seed: int) -> dict[str, float]:
    """Play episodes, reset with seed + 0, 1, ...; `act` maps obs (obs_dim,) to an action (D,), both numpy.

    Returns their mean return with its standard error, and their mean length.
    """
    returns, lengths = np.zeros(episodes), np.zeros(episodes)
    for i in range(episodes):
        obs, done = env.reset(seed=seed + i)[0], False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(to_action(act(to_obs(obs)), env.action_space))
            returns[i] += float(reward)
            lengths[i] += 1
            done = terminated or truncated
    error = returns.std() / math.sqrt(episodes)
    return {"return": returns.mean(), "return_error": error, "length": lengths.mean()}


def describe(scores: dict[str, float]) -> str:
    """An evaluation in a line."""
    return f"return {scores['return']:.1f} +- {scores['return_error']:.1f}, length {scores['length']:.0f}"


def find_compiler(device: torch.device):
    """torch.compile if it works on this machine, else the identity and a note."""
    options = {
        # Each function always meets the same shapes and modes: checking that on every call cost 0.2 ms.
        "guard_filter_fn": lambda guards: [False] * len(guards),
        # Products of one row, the policy's, become sums that are compiled with the rest: a call costs more.
        "post_grad_fusion_options": {"decompose_mm_pass": {}},
    }

    def jit(function):
        # Guards are off, so closures of one text would share the first one's graph: each gets its own code object.
        function.__code__ = function.__code__.replace()
        return torch.compile(function, dynamic=False, options=dict(options))  # it takes items out of its options

    try:
        torch.compiler.reset()  # guards are off, so graphs of an earlier run in this process would be reused
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
        print("the first update compiles the losses, for a minute or two", file=sys.stderr)
        torch._dynamo.config.trace_autograd_ops = True  # else its graphs would end before the gradients
        return jit
    except Exception:
        print("note: torch.compile finds no working C++ compiler; going on without it, slower", file=sys.stderr)
        return lambda function: function


def matmul_precision(device: torch.device, bf16: bool) -> str:
    """The precision to ask for in the updates: "medium" if products may be rounded, or if it rounds nothing here.

    On a CPU "medium" hands float32 products to oneDNN. With AMX units it rounds their factors to bfloat16; without, it
    computes in float32 all the same, and on AMD processors twice as fast as MKL, which is what "highest" uses.
    """
    x = torch.rand(256, 256, device=device)
    torch.set_float32_matmul_precision("medium")
    medium = x @ x
    torch.set_float32_matmul_precision("highest")
    return "medium" if bf16 or torch.allclose(medium, x @ x, rtol=5e-6, atol=0) else "highest"


class CudaGraph:
    """`function()` as one CUDA graph: its launch costs the host one call in place of one for every kernel.

    The function takes nothing and returns nothing: it works on tensors that live as long as it does, and draws from
    the device's generator. The first three calls are plain, so that compilation, optimizers and libraries are set up.
    """

    def __init__(self, function, plain_calls: int = 3):
        self.function, self.plain_calls, self.graph = function, plain_calls, None
        self.stream = torch.cuda.Stream()  # what a graph will own must not have been in use on the default stream

    def __call__(self) -> None:
        if self.plain_calls:
            self.plain_calls -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.function()
            torch.cuda.current_stream().wait_stream(self.stream)
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records, runs nothing
                self.function()
        self.graph.replay()


if __name__ == "__main__":
    main()
