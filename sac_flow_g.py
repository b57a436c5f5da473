"""SAC Flow-G: soft actor-critic whose policy is a flow, trained end to end through its own sampling loop.

An action is the result of K steps along a velocity network, and the critic's gradient runs back through all of them.
That loop is a residual RNN over flow time, whose gradients can explode where the velocity is steep.
Flow-G is the paper's proposed cure, modelled on the GRU: the velocity is gated, so that a noise-free step mixes the
old action and a candidate.
Paper: "SAC Flow", arXiv 2509.25756; benchmark/rnn_equivalence.md derives the equations that comments cite.

    python sac_flow_g.py --env-id Hopper-v4

Close to the paper: --score-step euler --entropy path --target-entropy 0 --encoder-dim 0
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
import glob
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import threading
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass, field
from functools import cache, partial, wraps
from pathlib import Path
from traceback import format_exception
from typing import Literal, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem
EPISODE = "sac_flow_episode"  # where an episode's last info has its return and length; "episode" may be taken
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
    max_episode_steps: int | None = None
    """steps after which an episode is truncated; default: the environment's own limit, or 10 000 if it has none"""
    cuda: bool = torch.cuda.is_available()
    """train on the GPU (the default where there is one)"""
    compile: bool = True
    """torch.compile the losses and the rollout, if a compiler works; on a GPU, replay each update as a CUDA graph"""
    capture_video: bool = False
    """write videos to <run>/videos: of some training episodes or, with --evaluate, of the first deterministic and the
    first stochastic episode"""
    track: bool = False
    """mirror the TensorBoard log to Weights & Biases"""
    save_every: int = 50_000
    """steps between checkpoints, each saved when an episode ends; one is also saved at the end of the run"""
    eval_every: int = 10_000
    """steps between evaluations of the averaged actor; they do not affect training; 0: none, not even at the end"""
    eval_episodes: int = 5
    """episodes per evaluation"""
    run_name: str | None = None
    """the run's folder is runs/<run-name>; default: <env>__<script>__<seed>__<time>"""
    resume: str | None = None
    """folder of a run to continue, bit for bit from an episode's end (on a GPU if its compiled code is still cached)"""
    evaluate: str | None = None
    """folder of a run whose policy.pt is played instead of training, or a policy file such as
    runs/<name>/policy_best.pt; episodes start as in the run's own evaluations unless another --seed is given"""

    # Soft actor-critic
    buffer_size: int = 1_000_000
    """capacity of the replay buffer in transitions"""
    batch_size: int = 256
    """transitions per update"""
    learning_starts: int = 5_000
    """steps with uniformly random actions before learning starts"""
    gamma: float = 0.99
    """discount factor"""
    critic_lr: float = 1e-3
    """learning rate of the critics"""
    # actor_lr and alpha were chosen together on Hopper-v4: with the paper's alpha of 0.2 the entropy term at first
    # inflated sigma, and Flow-G returned less than half as much at step 30 000 (one seed: benchmark/results/tuning).
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
    # Flow-G runs continued from step 100 000 to 110 000 and evaluated every 1 000 or 2 000 steps: the frozen policy's
    # lowest return, as a fraction of the training episodes' return at that time. Walker2d-v4, two seeds: 0.36 and 0.47
    # (decay 0.995), 0.98 and 1.08 (0.999), 0.94 and 1.09 (0.9995), 0.19 and 0.15 (last weights). Hopper-v4, two seeds:
    # 1.25 or more with each decay tried from 0.995 up.
    actor_average: float = 0.999
    """decay per actor update of the averaged weights, which are evaluated and saved as policy.pt; they lag behind by
    about 1 / (1 - decay) updates; 0: use the last weights"""
    autotune: bool = True
    """learn alpha such that the policy's entropy meets --target-entropy"""
    alpha: float = 0.02
    """entropy coefficient: its initial value, or its fixed value with --no-autotune"""
    target_entropy: float | None = None
    """target of the policy's entropy in nats, summed over dimensions, for actions scaled to [-1, 1] whatever the
    environment's units; default: computed by `Actor`, usually -1 per dimension"""
    crossq: bool = True
    """CrossQ: BatchRenorm in critics and actor, a joint forward pass, no target networks; --no-crossq: SAC with target
    networks and without BatchRenorm"""
    tau: float = 0.005
    """with --no-crossq: update rate of the target networks' moving average"""
    # CrossQ switches to running statistics after 100 000 batches. On Humanoid-v4 that halved Flow-G's return (seen up
    # to step 115 000); the Gaussian's mean return from step 110 000 to 200 000 was 2 967, with drops to 450, against
    # 5 263 without the switch. Flow-G did not suffer on HalfCheetah-v4 (up to 112 500) or Hopper-v4 (up to 150 000).
    # One seed each.
    renorm_warmup: int | None = None
    """training batches after which BatchRenorm switches to its running statistics; default: never, so that it stays
    plain batch normalisation"""

    # Flow policy
    flow_steps: int = 4
    """K, steps from noise to action; the target entropy depends on it (see `Actor`)"""
    # On Hopper-v4 after 60 000 steps, the exponential step returned 1 041 and 396 with a constant sigma, 3 039 and
    # 3 213 with sigma sqrt(1 - t), which is kept here (frozen averages, two seeds: benchmark/results).
    score_step: Literal["exponential", "euler", "none"] = "exponential"
    """how to integrate the score, which preserves a true flow's marginals; euler: as in the paper; none: no score"""
    # Returns of frozen averages near step 60 000: Ant-v4 806 with the path's entropy, 2 371 with the last step's (at
    # 56 000, one seed); HalfCheetah-v4 7 376 and 6 231 with the path's, 6 626 and 7 116 with the last step's. Hopper-v4
    # takes longer with the last step's: 483 against 1 616 at step 36 000 (one seed); seeds 4 to 6, run after the
    # choice, reached 3 108, 3 216 and 3 137 at step 50 000.
    entropy: Literal["last-step", "path"] = "last-step"
    """which entropy to regularise: the last step's, a lower bound on the action's, or the whole path's, as in the
    paper; the path's default target is its entropy at a sigma of 0.46"""
    sigma_dim: int = 256
    """width of the two hidden layers of the network for sigma"""
    # On HalfCheetah-v4 at 60 000 steps, Flow-G returned 7 376 and 6 231 with the encoder, 5 932 and 5 555 without (two
    # seeds, the path's entropy); it costs 10 % more time per step.
    encoder_dim: int = 256
    """width of the layer between the observation and the velocity network; 0: none"""
    velocity_dim: int = 256
    """width of the gate's and of the candidate's hidden layer"""


class TimeEmbedding(nn.Module):
    """Embedding of the flow time t in [0, 1] (float or (B, 1)): linear in its sines and cosines, (dim,) or (B, dim)."""

    def __init__(self, dim: int, frequencies: int = 16):
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0, 2, frequencies), persistent=False)  # 1 to 100 rad
        self.linear = nn.Linear(2 * frequencies, dim, bias=False)

    def forward(self, t):
        phase = t * self.frequencies
        waves = torch.cat([torch.sin(phase), torch.cos(phase)], dim=-1)
        return self.linear(waves)


class Velocity(nn.Module):
    """Flow-G: v = g * (vhat - a), gate g = sigmoid(z(t, a, s)), candidate vhat(t, a, s).

    Without noise and score, a step a + dt v is then (1 - dt g) a + dt g vhat: a GRU update with update gate dt * g. The
    gate and the candidate are MLPs with one hidden layer. The gate starts at sigmoid(5) = 0.993 everywhere, so that the
    rollout starts contractive.
    """

    def __init__(self, obs_dim: int, action_dim: int, dim: int = 256):
        super().__init__()
        # The first layers of gate and candidate are merged, and split by input instead: the observation's part is the
        # same at all K steps, so `encode` computes it once per rollout.
        self.from_obs = nn.Linear(obs_dim, 2 * dim)
        self.from_action = nn.Linear(action_dim, 2 * dim, bias=False)
        self.from_time = TimeEmbedding(2 * dim)
        self.gate = nn.Linear(dim, action_dim)
        self.candidate = nn.Linear(dim, action_dim)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, 5.0)

    def encode(self, obs):
        """What the K steps share: (B, obs_dim) -> (B, 2 dim)."""
        return self.from_obs(obs)

    def forward(self, t, a, features):
        """Velocity (B, D) at flow time t (float or (B, 1)) and pre-squash action a (B, D)."""
        hidden = F.silu(features + self.from_action(a) + self.from_time(t))
        for_gate, for_candidate = hidden.chunk(2, dim=-1)
        return torch.sigmoid(self.gate(for_gate)) * (self.candidate(for_candidate) - a)


class Actor(nn.Module):
    """Flow policy: K noisy steps along a velocity network, then a tanh into the action bounds.

    Needs no environment, so that it can be copied elsewhere: `action_low` and `action_high` are sequences of D finite
    bounds, `renorm` is a factory dim -> module that normalises observations, `velocity` is passed to `Velocity`.
    """

    def __init__(
        self, obs_dim: int, action_low, action_high, *, flow_steps: int = 4, score_step: str = "exponential",
        entropy: str = "last-step", sigma_dim: int = 256, encoder_dim: int = 256, renorm=nn.Identity,
        **velocity,
    ):  # fmt: skip
        super().__init__()
        low = torch.as_tensor(action_low, dtype=torch.float32)
        high = torch.as_tensor(action_high, dtype=torch.float32)
        same_shape = low.ndim == 1 and low.shape == high.shape
        if not (same_shape and len(low) and (high - low).isfinite().all() and (low < high).all()):
            raise ValueError(f"every action needs finite bounds, low < high, not {action_low} and {action_high}")
        self.flow_steps = flow_steps
        self.score_step = score_step
        self.entropy = entropy
        self.counted_steps = slice(-1, None) if entropy == "last-step" else slice(None)  # whose entropy counts
        self.obs_dim = obs_dim
        self.action_dim = len(low)
        if score_step not in ("exponential", "euler", "none"):
            raise ValueError(f"score_step must be exponential, euler or none, not {score_step}")
        if entropy not in ("last-step", "path"):
            raise ValueError(f"entropy must be last-step or path, not {entropy}")
        self.norm = renorm(obs_dim)
        self.encoder = nn.Identity()
        if encoder_dim:
            self.encoder = nn.Sequential(nn.Linear(obs_dim, encoder_dim), nn.ReLU())
        self.velocity_net = Velocity(encoder_dim or obs_dim, self.action_dim, **velocity)
        self.sigma_net = nn.Sequential(
            nn.Linear(obs_dim, sigma_dim), nn.ReLU(),
            nn.Linear(sigma_dim, sigma_dim), nn.ReLU(),
            nn.Linear(sigma_dim, self.action_dim),
        )  # fmt: skip
        self.register_buffer("scale", (high - low) / 2)
        self.register_buffer("bias", (high + low) / 2)
        # Last step: SAC's customary target, -1 for each dimension of actions in [-1, 1], implies a sigma of 0.36 at
        # K = 4 (0.18 with Euler's step or without the score). The last deviation is about sigma / K (sigma / sqrt(K)
        # there), so for larger K the target is lowered to what the same sigma gives: -1 would imply a sigma of 1.5 at
        # K = 16, and more than the bound e^2 from K = 69 on. Returns of both targets: benchmark/results/gradients.
        # Path: sigma 0.46 meets the paper's target, 0, at K = 4. At K = 16 that target would imply a sigma of 1.4. With
        # Euler's step the entropy at 0.46 is 1.2 per dimension: give --target-entropy 0 for the paper's.
        power = 1 if score_step == "exponential" else 0.5
        last_step = -self.action_dim * (1 + power * math.log(max(flow_steps, 4) / 4))
        self.target_entropy = last_step if entropy == "last-step" else self.entropy_at(sigma=0.46)

    def velocity(self, t, a, obs):
        """v(t, a, s), (B, D), at flow time t in [0, 1) (float or (B, 1)) and pre-squash action a (B, D).

        For tests and measurements in evaluation mode; `rollout` itself encodes the observation once for all steps.
        """
        features = self.velocity_net.encode(self.encoder(self.norm(obs)))
        return self.velocity_net(t, a, features)

    def step(self, i: int, a, v, sigma):
        """Mean and standard deviation of A_{i+1} given a = A_i, v = v(t_i, A_i, s) and sigma, all (B, D).

        The score of the linear path's marginal is (t v - a) / (1 - t). For the velocity of a true flow and large K, the
        Euler and the exponential step both keep the marginals of the rollout without noise. Euler's step, the paper's,
        overshoots where sigma is large. The exponential step has noise of scale sigma sqrt(1 - t), holds v and that
        scale fixed within the step and solves the rest exactly, so that the score's factor rho is in (0, 1) for any
        sigma and K (step 8 of the derivation).
        """
        dt = 1 / self.flow_steps
        t = i * dt
        if self.score_step == "exponential":
            x = sigma**2 * dt / 2
            rho = torch.exp(-x)
            mean = (t + dt) * v + rho * (a - t * v)
            variance = (1 - t) * -torch.expm1(-2 * x)
            return mean, torch.sqrt(variance)
        if self.score_step == "euler":
            v = v + sigma**2 / 2 * (t * v - a) / (1 - t)
        return a + dt * v, sigma * math.sqrt(dt)

    def rollout(self, obs, noise):
        """Sample actions and their log density, of the last step or of the whole path.

        A_0 = noise[0],  A_{i+1} = m_i + sqrt(V_i) noise[i+1]  (`step` gives m_i and sqrt(V_i)),  action = squash(A_K),
        log p_c(path | s) = log N(A_0; 0, I) + sum_i log N(A_{i+1}; m_i, diag V_i) - sum_d log(1 - tanh(A_{K,d})^2),
        the log density of A_0 to A_{K-1} and the action in [-1, 1], so that the environment's units do not matter.
        obs (B, obs_dim); noise (K+1, B, D) of unit Gaussians. Returns action (B, D) in the environment's units,
        log_prob (B,), and the path, the list of A_0 to A_K, (B, D) each (A_0 is a graph node only if noise requires
        grad). log_prob is log p_c if the entropy is the path's, else its last step's part, log p(action | A_{K-1}, s).
        Raises ValueError for other shapes.
        """
        expected = (self.flow_steps + 1, obs.shape[0], self.action_dim)
        if obs.shape[1:] != (self.obs_dim,) or noise.shape != expected:
            shapes = f"{tuple(obs.shape)} and {tuple(noise.shape)}"
            raise ValueError(f"rollout takes obs (B, {self.obs_dim}) and noise {expected}, not {shapes}")
        obs = self.norm(obs)
        features = self.velocity_net.encode(self.encoder(obs))
        sigma = torch.exp(-1.5 + 3.5 * torch.tanh(self.sigma_net(obs)))  # (B, D) in [e^-5, e^2], shared by the K steps
        path = [noise[0]]
        log_deviations = []
        for i in range(self.flow_steps):
            v = self.velocity_net(i / self.flow_steps, path[i], features)
            mean, deviation = self.step(i, path[i], v, sigma)
            path.append(mean + deviation * noise[i + 1])
            log_deviations.append(deviation.log())
        # Given A_i, the standardised A_{i+1} is noise[i+1]: hence the noise's log density, less the log deviations, of
        # which A_0's is 0.
        log_normal = -0.5 * (noise[self.counted_steps] ** 2 + math.log(2 * math.pi))
        log_prob = log_normal.sum(0) - sum(log_deviations[self.counted_steps])
        # 1 - tanh(x)^2 = (2 / (e^x + e^-x))^2, written so that its log neither under- nor overflows.
        log_slope = 2 * (math.log(2) - path[-1] - F.softplus(-2 * path[-1]))
        action = torch.tanh(path[-1]) * self.scale + self.bias
        return action, (log_prob - log_slope).sum(1), path

    def entropy_at(self, sigma: float) -> float:
        """Entropy in nats, over all dimensions, with this sigma everywhere; an action's is at most a uniform one's."""
        deviations = [torch.ones(())]  # of A_0, then of A_{i+1} given A_i
        for i in range(self.flow_steps):
            _, deviation = self.step(i, a=0, v=0, sigma=torch.tensor(sigma))
            deviations.append(deviation)
        entropies = 0.5 * math.log(2 * math.pi * math.e) + torch.stack(deviations).log()
        entropies[-1].clamp_(max=math.log(2))
        return self.action_dim * float(entropies[self.counted_steps].sum())

    def largest_entropy(self) -> float:
        """What no policy's entropy can exceed, for `--target-entropy`: that of sigma at its upper bound."""
        return self.entropy_at(math.exp(2))

    def draw_noise(self, batch: int, deterministic: bool = False):
        """Noise for a rollout of `batch` observations: unit Gaussians (K+1, B, D), or zeros for the path's mode."""
        noise = self.scale.new_zeros(self.flow_steps + 1, batch, self.action_dim)
        return noise if deterministic else noise.normal_()

    def act(self, obs, deterministic: bool = False):
        """Actions (B, D) for obs (B, obs_dim), or one action (D,) for one obs (obs_dim,); never uses batch statistics.

        Deterministic: the mode of the path before the squash, with all noise 0.
        """
        training = self.norm.training
        self.norm.eval()
        batch = torch.atleast_2d(obs)
        noise = self.draw_noise(batch.shape[0], deterministic)
        action, *_ = self.rollout(batch, noise)
        self.norm.train(training)
        return action if obs.ndim == 2 else action[0]

    def forward(self, obs):
        """The deterministic action, for torch.export and wherever a module is called."""
        return self.act(obs, deterministic=True)


class BatchRenorm(nn.Module):
    """Batch renormalisation (Ioffe, 2017) of (B, dim): batch norm, then running statistics after `warmup` batches.

    y = ((x - mean) / std * r + d) * weight + bias,  r = std / running_std,  d = (mean - running_mean) / running_std,
    with r and d clipped and without gradient. For the first `warmup` batches r = 1, d = 0: plain batch norm.
    The running statistics are the mean over the batches so far for the first 1 / (1 - momentum) of them, then a
    moving average.
    """

    momentum = 0.99
    eps = 1e-3
    r_max = 3.0
    d_max = 5.0

    def __init__(self, dim: int, warmup: float = math.inf):
        super().__init__()
        self.warmup = warmup
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        # Everything is folded into one scale and one shift per feature, so that x is read only once more after its
        # statistics. The stacks force all four, and their gradients in the backward pass, into memory: otherwise
        # compiled loops over x would repeat the roots and divisions for every element.
        if self.training:
            var, mean = torch.stack(torch.var_mean(x, dim=0, correction=0))
            std = torch.sqrt(var + self.eps)
            with torch.no_grad():
                running_std = torch.sqrt(self.running_var + self.eps)
                r = (std / running_std).clamp(1 / self.r_max, self.r_max)
                d = ((mean - self.running_mean) / running_std).clamp(-self.d_max, self.d_max)
                warm = self.batches >= self.warmup  # a tensor: the switch needs neither a host sync nor a recompilation
                r = torch.where(warm, r, 1.0)
                d = torch.where(warm, d, 0.0)
                share = (1 / (self.batches + 1)).clamp(min=1 - self.momentum)
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(var, share)
                self.batches.add_(1)
            scale = self.weight * r / std
            shift = self.bias + self.weight * d - mean * scale
        else:
            scale = self.weight * torch.rsqrt(self.running_var + self.eps)
            shift = self.bias - self.running_mean * scale
        scale, shift = torch.stack([scale, shift])
        return x * scale + shift


class Critic(nn.Module):
    """Q(s, a): two hidden layers; `renorm`, a factory dim -> module, normalises before each Linear, as in CrossQ."""

    def __init__(self, obs_dim: int, action_dim: int, dim: int, renorm=nn.Identity):
        super().__init__()
        self.net = nn.Sequential(
            renorm(obs_dim + action_dim),
            nn.Linear(obs_dim + action_dim, dim), nn.ReLU(), renorm(dim),
            nn.Linear(dim, dim), nn.ReLU(), renorm(dim),
            nn.Linear(dim, 1),
        )  # fmt: skip

    def forward(self, obs, action):
        """(B, obs_dim), (B, D) -> (B,)"""
        both = torch.cat([obs, action], dim=1)
        return self.net(both).squeeze(1)


def critic_loss(actor, critics, targets, batch, noise, alpha, gamma):
    """sum_j mean (Q_j(s, a) - y)^2 / 2,  y = r + gamma (1 - d) (min_j Q_j(s', a') - alpha log_prob').

    `targets` are the target networks, or None for CrossQ: then Q(s, a) and Q(s', a') come from one joint forward pass,
    so that BatchRenorm sees the mixture of both distributions. Returns the loss and mean Q.
    """
    obs, action, reward, terminated, next_obs = batch
    with torch.no_grad():
        next_action, next_log_prob, _ = actor.rollout(next_obs, noise)
    if targets is None:
        both = torch.cat([obs, next_obs]), torch.cat([action, next_action])
        q = torch.stack([critic(*both) for critic in critics])
        q, next_q = q.chunk(2, dim=1)  # (2, B) each
        next_q = next_q.detach()
    else:
        q = torch.stack([critic(obs, action) for critic in critics])
        with torch.no_grad():
            next_q = torch.stack([target(next_obs, next_action) for target in targets])
    y = reward + gamma * (1 - terminated) * (next_q.amin(0) - alpha * next_log_prob)
    loss = 0.5 * (q - y).square().mean(1).sum()
    return loss, q.mean()


def actor_loss(actor, critics, obs, noise, alpha):
    """mean(alpha log_prob - min_j Q_j(s, a)), with gradients through all K steps; mean log_prob; and A_0 to A_K."""
    action, log_prob, path = actor.rollout(obs, noise)
    q = torch.stack([critic(obs, action) for critic in critics]).amin(0)
    loss = (alpha * log_prob - q).mean()
    return loss, log_prob.mean(), *path


def alpha_loss(log_alpha, log_prob, target_entropy):
    """alpha * (entropy - target): alpha falls while the entropy, mean -log_prob, exceeds its target."""
    return log_alpha.exp() * (-log_prob - target_entropy)


def record(losses, **values) -> None:
    """Store values in `losses`, at their names' places in LOSSES, to be logged."""
    for name, value in values.items():
        losses[LOSSES.index(name)].copy_(value)


def with_gradients(loss_function, network):
    """`loss_function` with its gradients in the same graph: function(*inputs) -> loss, *rest, gradients.

    `rest` is every other scalar that the loss function returns, and `gradients` are those of the loss with respect to
    the parameters of `network`, in their order. In one function, both passes compile to one graph, and nothing else is
    computed: an actor update skips the gradients of the critics' parameters.
    """

    @wraps(loss_function)
    def function(*inputs):
        loss, *rest = loss_function(*inputs)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        scalars = [value.detach() for value in rest if value.ndim == 0]
        return loss.detach(), *scalars, gradients

    return function


def apply_gradients(optimizer, gradients) -> None:
    """One step of `optimizer`, given the gradient of each of its parameters, in their order."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.contiguous()  # compiled code may pad rows; the fused Adam steps in memory order
    optimizer.step()


def average_of(actor):
    """A copy of the actor for a moving average of its weights, sharing the learning actor's running statistics."""
    average = copy.deepcopy(actor).requires_grad_(False)
    for name, statistic in actor.norm.named_buffers():
        setattr(average.norm, name, statistic)
    return average


def move_average(average, network, weight: float) -> None:
    """Move the parameters of `average` a fraction `weight` of the way to those of `network`."""
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), weight)


def gradient_norms(actor, critics, obs, noise, alpha):
    """Mean over the batch of |dL/dA_i| for i = 0..K, L the actor's loss: the RNN gradient product made visible.

    As in the actor's update, normalised by the batch; on copies, so that no running statistics move.
    """
    actor = copy.deepcopy(actor).train()
    critics = copy.deepcopy(critics).eval()
    loss, _, *path = actor_loss(actor, critics, obs, noise.requires_grad_(), alpha)
    gradients = torch.stack(torch.autograd.grad(len(obs) * loss, path))  # (K+1, B, D), the mean of the loss undone
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
        row = np.concatenate([obs, action, [reward, terminated], next_obs])
        self.rows[self.added % len(self.rows)] = torch.from_numpy(row)  # float64, which the copy rounds
        self.added += 1
        self.size.fill_(len(self))

    def sample(self, batch_size: int) -> list[torch.Tensor]:
        """Uniform batch: obs (B, obs_dim), action (B, D), reward (B,), terminated (B,), next_obs (B, obs_dim)."""
        # A CUDA graph would keep the first bound of randint; self.size it reads anew at each replay.
        index = torch.randint(2**62, (batch_size,), device=self.rows.device) % self.size
        batch = self.rows[index]
        obs, action, reward, terminated, next_obs = batch.split(self.widths, dim=1)
        return [obs, action, reward.squeeze(1), terminated.squeeze(1), next_obs]

    def state_dict(self) -> dict:
        """The rows in use, copied unless they are all: torch.save of a view would write the whole buffer.

        On the CPU, since a GPU's allocator would keep the memory of ever larger copies reserved.
        """
        full = len(self) == len(self.rows)
        return {"rows": self.rows[: len(self)].to("cpu", copy=not full), "added": self.added}

    def load_state_dict(self, state: dict) -> None:
        """Put back what `state_dict` returned."""
        self.rows[: len(state["rows"])].copy_(state["rows"])
        self.added = state["added"]
        self.size.fill_(len(self))


def main() -> None:
    args, checkpoint = parse_args()
    if args.evaluate:
        return play(args, checkpoint)
    device = torch.device("cuda" if args.cuda else "cpu")
    env = make_env(args.env_id, args.max_episode_steps, "rgb_array" if args.capture_video else None)
    eval_env = make_env(args.env_id, args.max_episode_steps) if args.eval_every else contextlib.nullcontext()
    seed_random(args.seed)
    actor, average, critics, targets, buffer = make_networks(args, env, device)
    log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha), device=device))
    target_entropy = target_entropy_of(args, actor)
    adam = partial(torch.optim.Adam, betas=(args.adam_b1, 0.999), fused=True, capturable=True)
    actor_optimizer = adam(actor.parameters(), lr=args.actor_lr)
    critic_optimizer = adam(critics.parameters(), lr=args.critic_lr)
    alpha_optimizer = adam([log_alpha], lr=args.alpha_lr)
    # The latest losses, a Parameter only so that the ParameterDict below saves them.
    losses = nn.Parameter(torch.zeros(len(LOSSES), device=device), requires_grad=False)
    generators = Generators(device, env)
    # All that decides how a run continues from an episode's end, if the environment's only state is its generator.
    state = dict(
        actor=actor, average=average, critics=critics, actor_optimizer=actor_optimizer,
        critic_optimizer=critic_optimizer, alpha_optimizer=alpha_optimizer,
        scalars=nn.ParameterDict(dict(log_alpha=log_alpha, losses=losses)), buffer=buffer, generators=generators,
    )  # fmt: skip
    if targets:
        state["targets"] = targets
    with explained(f"--env-id {args.env_id}: its reset failed"):
        env.reset(seed=args.seed)
    generators.action_space.seed(args.seed + 1)  # alike, random actions would repeat the environment's own draws
    if checkpoint:
        with explained(f"--resume {args.resume}: it was altered, is of an older version, or not for {args.env_id} now"):
            for name, part in state.items():
                part.load_state_dict(checkpoint.pop(name))  # pop: the buffer's is large
    run = Run(args, args.total_timesteps, checkpoint)
    progress = run.progress
    if args.capture_video:
        env = record_videos(env, run.folder, f"from-step-{progress.step}")
    jit = find_compiler(device) if args.compile else unchanged
    graph = CudaGraph if args.compile and args.cuda else unchanged
    set_matmul_precision(device)
    choose = compiled_policy(actor, jit, graph)
    choose_averaged = compiled_policy(average, jit, graph)
    critic_gradients = jit(with_gradients(critic_loss, critics))
    actor_gradients = jit(with_gradients(actor_loss, actor))

    @graph  # takes and returns nothing: everything is in persistent tensors
    def update_critic() -> None:
        batch = buffer.sample(args.batch_size)
        noise = actor.draw_noise(args.batch_size)
        alpha = log_alpha.detach().exp()
        loss, q, gradients = critic_gradients(actor, critics, targets, batch, noise, alpha, args.gamma)
        apply_gradients(critic_optimizer, gradients)
        if targets:
            move_average(targets, critics, args.tau)
        record(losses, qf_loss=loss, qf_values=q)

    @graph
    def update_actor() -> None:
        obs, *_ = buffer.sample(args.batch_size)
        noise = actor.draw_noise(args.batch_size)
        alpha = log_alpha.detach().exp()
        actor.norm.train()  # outside its own update it normalises by running statistics
        critics.eval()  # Q(s, a) by running statistics, as in CrossQ
        loss, log_prob, gradients = actor_gradients(actor, critics, obs, noise, alpha)
        actor.norm.eval()
        critics.train()
        apply_gradients(actor_optimizer, gradients)
        move_average(average, actor, 1 - args.actor_average)
        loss_alpha = alpha_loss(log_alpha, log_prob, target_entropy)
        if args.autotune:
            apply_gradients(alpha_optimizer, torch.autograd.grad(loss_alpha, [log_alpha]))
        record(losses, actor_loss=loss, alpha_loss=loss_alpha.detach(), alpha=alpha, entropy=-log_prob)

    def log_gradient_norms() -> None:
        with generators.fork(args.seed + progress.step):
            obs, *_ = buffer.sample(args.batch_size)
            norms = gradient_norms(actor, critics, obs, actor.draw_noise(args.batch_size), log_alpha.detach().exp())
        run.write_scalars("flow/grad_norm_step_", dict(enumerate(norms.tolist())))

    def score(kind: Literal["deterministic", "stochastic"]) -> None:
        """Evaluate the averaged actor. Neither training nor its clock notices."""
        with run.paused(), generators.fork(args.seed):
            act = partial(choose_averaged, deterministic=kind == "deterministic")
            scores = evaluate(act, eval_env, args.eval_episodes, args.seed)
        if run.report(kind, scores):  # the best so far
            run.save_policy("policy_best.pt", average)

    with run, env, eval_env:
        done = True
        while progress.step < args.total_timesteps:
            if done:
                obs = to_obs(env.reset()[0])
            if progress.step < args.learning_starts:
                action = generators.action_space.sample().ravel().astype(np.float32)
            else:
                action = choose(obs)
            run.check_finite(observation=obs, action=action)
            next_obs, reward, terminated, truncated, info = env.step(to_action(action, env.action_space))
            next_obs = to_obs(next_obs)
            progress.step += 1
            run.bar.update()
            run.check_finite(reward=reward, observation=next_obs)  # before it is stored
            buffer.add(obs, action, reward, terminated, next_obs)  # truncation is not termination: it bootstraps
            obs = next_obs
            done = terminated or truncated

            if progress.step > args.learning_starts:
                update_critic()
                if progress.updates % args.actor_delay == 0:
                    update_actor()
                if progress.updates % (1000 * args.actor_delay) == 0:
                    log_gradient_norms()
                progress.updates += 1
                run.log_update(losses)

            at_end = progress.step == args.total_timesteps
            if args.eval_every and (at_end or progress.step % args.eval_every == 0):  # before a checkpoint of this step
                score("deterministic")
                if at_end:
                    score("stochastic")
            if done:
                run.end_episode(info)
            if at_end or (done and run.should_save()):
                run.save({name: part.state_dict() for name, part in state.items()}, average)
                if run.interrupted:
                    break
    run.say_where()


# Plumbing: nothing below is the algorithm


class Failure(SystemExit):
    """Raised only by `fail`."""


def fail(message: str) -> NoReturn:
    """Stop with one line on standard error and exit code 2."""
    tqdm.write(f"{Path(sys.argv[0]).stem}: error: {message}", file=sys.stderr)  # above the progress bar, if any
    raise Failure(2)


@cache
def note(message: str) -> None:
    """Say something on standard error, once."""
    print(f"note: {message}", file=sys.stderr)


def first_line(error: BaseException) -> str:
    """What went wrong, as one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def explained(what: str):
    """Turn an exception inside the block into a one-line error: `what` and the reason."""
    try:
        yield
    except Failure:
        raise
    except (Exception, SystemExit) as error:  # a user's environment, or a library, may raise anything
        fail(f"{what}: {first_line(error)}")


def flag(name: str) -> str:
    """alpha_lr -> --alpha-lr"""
    return "--" + name.replace("_", "-")


def read_flags(kind: type, description: str, **options):
    """tyro.cli, described by the first line and the commands of a docstring; an error becomes one line.

    --help gets the source's headings, such as `# Soft actor-critic`, which tyro does not see in a flat class.
    """
    said = io.StringIO()
    shown = "\n".join(re.findall(r"\A.*|^    .*", description, re.M))
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return tyro.cli(kind, description=shown, config=[tyro.conf.DisallowNone], **options)
    except SystemExit as error:
        text = re.sub(r"\x1b.*?m|[╭╮╰╯│]", "", said.getvalue())  # without colours and frame
        if error.code == 0:  # --help
            for title, name in re.findall(r"\n\n    # (.+)\n    (\w+):", inspect.getsource(kind)):
                text = re.sub(rf"^ +{flag(name)}(?![\w-])", f"\n {title}\n\\g<0>", text, flags=re.M)
            print(text)
            raise
        _, *parts = re.split("[─-]{9,}", " ".join(text.split()))
        fail("; ".join(filter(None, map(str.strip, parts))))


def parse_args() -> tuple[Args, dict | None]:
    """Flags, and the checkpoint they name if any. A resumed run keeps its own flags; a conflicting one is an error."""
    args = read_flags(Args, __doc__)
    checkpoint = None
    if args.resume and args.evaluate:
        fail("--resume and --evaluate exclude each other")
    if folder := args.resume or args.evaluate:
        path = Path(folder)
        if args.evaluate:
            checkpoint = read_policy(path)
        elif os.path.isfile(path):
            fail(f"--resume takes a run's folder, not a file in it: {path.parent}")
        else:
            checkpoint = load(path / "checkpoint.pt", "progress")
        own = dict(resume=args.resume, evaluate=args.evaluate)
        saved = Args(**checkpoint["args"] | own)
        saved.track &= bool(args.resume)
        saved.capture_video &= bool(args.resume)
        saved.cuda &= torch.cuda.is_available()
        args = read_flags(Args, __doc__, default=saved)
        may_change = "cuda compile capture_video eval_episodes".split()
        may_change += ["seed"] if args.evaluate else "total_timesteps save_every eval_every track".split()
        for name, old in vars(saved).items():
            new = getattr(args, name)
            if new != old and name not in may_change:
                fail(f"{flag(name)} {new} conflicts with {old} of {folder}: drop the flag")
        if args.resume and args.total_timesteps <= checkpoint["progress"]["step"]:
            fail(f"{folder} has reached step {checkpoint['progress']['step']}: raise --total-timesteps to continue")
    elif args.run_name and os.path.exists(folder := Path("runs") / args.run_name):
        resume = f", or --resume {folder}" if os.path.isfile(folder / "checkpoint.pt") else ""
        fail(f"--run-name {args.run_name}: {folder} exists: remove it or take another name{resume}")

    least = 2 if args.crossq else 1  # BatchRenorm needs a batch
    starts = args.learning_starts
    from_0 = "seed|learning_starts|renorm_warmup|eval_every|encoder_dim"
    from_1 = "(?!encoder).*_(size|dim|layers|steps|timesteps|episodes|delay)|save_every"
    rules = [
        ("resume|evaluate|run_name", lambda name: name != "", "a name (a shell variable was empty?)"),
        (from_0, lambda n: 0 <= n < 2**32, "0 or more, and below 2^32"),
        (from_1, lambda n: n >= 1, "1 or more"),
        ("batch_size", lambda n: least <= n <= args.buffer_size, f"from {least} to --buffer-size {args.buffer_size}"),
        ("total_timesteps", lambda n: n > starts, f"above --learning-starts {starts}, where learning begins"),
        (".*_lr|alpha", lambda x: 0 < x < math.inf, "above 0 and finite"),
        ("gamma", lambda x: 0 <= x <= 1, "in [0, 1]"),
        ("adam_b1|actor_average", lambda x: 0 <= x < 1, "in [0, 1)"),
        ("tau", lambda x: 0 < x <= 1, "in (0, 1]"),
        ("target_entropy", math.isfinite, "finite"),
        ("target_entropy", lambda x: args.autotune, "left out with --no-autotune"),
        ("renorm_warmup", lambda n: args.crossq, "left out with --no-crossq"),
        ("cuda", lambda on: torch.cuda.is_available() or not on, "off where torch finds no CUDA device (--no-cuda)"),
    ]
    for names, holds, requirement in rules:
        for name, value in vars(args).items():
            if value is not None and re.fullmatch(names, name) and not holds(value):
                fail(f"{flag(name)} must be {requirement}, not {value!r}")
    return args, checkpoint


def renorm_of(args: Args):
    """The factory, dim -> module, of the normalisation that the flags ask for."""
    if not args.crossq:
        return nn.Identity
    warmup = math.inf if args.renorm_warmup is None else args.renorm_warmup
    return partial(BatchRenorm, warmup=warmup)


def make_actor(args: Args, obs_dim: int, action_low, action_high) -> Actor:
    """The actor that the flags describe."""
    velocity = {
        name.removeprefix("velocity_"): value
        for name, value in vars(args).items()
        if name.startswith("velocity_")
    }  # fmt: skip
    return Actor(
        obs_dim, action_low, action_high, flow_steps=args.flow_steps, score_step=args.score_step,
        entropy=args.entropy, sigma_dim=args.sigma_dim, encoder_dim=args.encoder_dim, renorm=renorm_of(args),
        **velocity,
    )  # fmt: skip


def make_networks(args: Args, env: gym.Env, device: torch.device):
    """Networks and buffer for the flags and environment; stops the program if they do not fit together, or into memory.

    Returns the actor, its average, two critics, their target networks (None with CrossQ) and an empty buffer.
    """
    obs_dim = env.observation_space.shape[0]
    space = env.action_space
    with explained(f"cannot make the buffer (--buffer-size) or networks (--critic-dim and the like) for {args.env_id}"):
        actor = make_actor(args, obs_dim, space.low.ravel(), space.high.ravel()).to(device).eval()
        sizes = obs_dim, actor.action_dim
        critics = nn.ModuleList(Critic(*sizes, args.critic_dim, renorm_of(args)) for _ in range(2)).to(device)
        targets = None if args.crossq else copy.deepcopy(critics).requires_grad_(False)
        return actor, average_of(actor), critics, targets, ReplayBuffer(args.buffer_size, *sizes, device)


def target_entropy_of(args: Args, actor: Actor) -> float:
    """--target-entropy, or the policy's default; stops the program if the policy cannot reach it."""
    target = actor.target_entropy if args.target_entropy is None else args.target_entropy
    largest = actor.largest_entropy()
    if args.autotune and target > largest:
        fail(f"--target-entropy must be at most {largest:.4g}: no policy exceeds that; lower it, or leave it out")
    return target


@dataclass
class Progress:
    """How far a run has come. Its checkpoint holds this."""

    step: int = 0
    """environment steps"""
    updates: int = 0
    """updates of the critics"""
    seconds: float = 0.0
    """time spent training, without evaluations"""
    best: float = -math.inf
    """highest return of an evaluation"""
    rows: dict = field(
        default_factory=lambda: {
            "returns.csv": [["step", "return", "length", "seconds"]],
            "eval.csv": [["step", "kind", "return", "return_error", "length", "episodes", "seconds"]],
        }
    )
    """the CSV files, written anew when a run is resumed"""


def thread_failed(failure) -> None:
    """A threading.excepthook that is silent about a full disk: TensorBoard raises that again at the next write."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def new_folder(args: Args) -> Path:
    """runs/<run-name>, or a name with the time that is still free: runs may begin within the same second."""
    if args.run_name:
        return Path("runs") / args.run_name
    env_id = re.sub(r"[^A-Za-z0-9.-]+", "_", args.env_id)
    for seconds in itertools.count(int(time.time())):
        folder = Path("runs") / f"{env_id}__{SCRIPT}__{args.seed}__{seconds}"
        if not os.path.exists(folder):
            return folder


class Run:
    """A run's folder and what is written to it; its progress bar; and the handling of Ctrl-C.

    Created after the networks, so that a wrong flag leaves no folder behind. As a context manager it keeps time, and
    takes the first Ctrl-C or kill as a request to stop at the episode's end; a second one stops at once. An exception
    from the environment, or a full disk, becomes one line, with the traceback in error.txt. No other process can use
    the folder at the same time (on Windows this is not checked).
    """

    def __init__(self, args: Args, total: int, checkpoint: dict | None):
        self.args = args
        self.total = total  # steps
        self.folder = Path(args.resume) if args.resume else new_folder(args)
        self.progress = Progress(**checkpoint["progress"]) if checkpoint else Progress()
        self.saved_step = self.progress.step
        self.interrupted = 0  # the number of the signal
        self.history = []  # (step, losses) of each update since the losses were last checked
        if args.track:  # before there is a folder
            with explained("--track needs wandb (pip install -r benchmark/requirements.txt)"):
                import wandb
        with explained(f"cannot write to {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=bool(checkpoint))
            self.lock = open(self.folder / "lock", "a+")  # noqa: SIM115  held until the run ends
            lock(self.lock)
            if checkpoint and (self.folder / "checkpoint.pt").stat().st_mtime_ns != checkpoint["written"]:
                fail(f"{self.folder} was continued by another process in the meantime: run the command again")
            if args.track:
                run_id = "-".join(self.folder.resolve().parts[-2:])  # with the sweep's name
                with explained("--track"):
                    wandb.init(project="sac-flow", id=run_id, resume="allow", config=vars(args), sync_tensorboard=True)
            flags = json.dumps(asdict(args), indent=2)
            (self.folder / "args.json").write_text(flags + "\n")
            for name, rows in self.progress.rows.items():
                with open(self.folder / name, "w", newline="") as file:
                    csv.writer(file, lineterminator="\n").writerows(rows)
            self.writer = SummaryWriter(self.folder, purge_step=self.progress.step + 1 if checkpoint else None)
        self.writer.add_text("args", f"```\n{flags}\n```")
        print(f"run: {self.folder}", flush=True)

    def __enter__(self):
        threading.excepthook = thread_failed
        self.handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self.on_signal)
        shown = sys.stderr if sys.stderr.isatty() else open(os.devnull, "w")  # noqa: SIM115  a log file gets lines
        self.bar = tqdm(total=self.total, initial=self.progress.step, unit=" steps", dynamic_ncols=True, file=shown)
        self.clock = time.monotonic() - self.progress.seconds
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.bar.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.lock.close()
        try:
            self.writer.close()
        except OSError as full_disk:
            error = error or full_disk
        if isinstance(error, (Exception, SystemExit)) and not isinstance(error, Failure):
            where = "the disk may be full"
            with contextlib.suppress(OSError):
                (self.folder / "error.txt").write_text("".join(format_exception(error)))
                where = f"traceback in {self.folder / 'error.txt'}"
            what = f"{type(error).__name__}: {first_line(error)}"
            message = f"step {self.progress.step} of {self.args.env_id}: {what}; {where}; {self.kept()}"
            if self.interrupted:  # a compiler, or ffmpeg, hears Ctrl-C, too, and fails
                print(f"stopped: {message}", file=sys.stderr)
                raise SystemExit(128 + self.interrupted)
            fail(message)

    def on_signal(self, number, frame) -> None:
        self.interrupted = number
        for either in self.handlers:
            signal.signal(either, signal.SIG_DFL)
        tqdm.write("stopping at the end of this episode; a second Ctrl-C or kill stops at once", file=sys.stderr)

    def seconds(self) -> float:
        """Time spent training so far."""
        return time.monotonic() - self.clock

    @contextlib.contextmanager
    def paused(self):
        """Do not count the time spent inside."""
        began = time.monotonic()
        yield
        self.clock += time.monotonic() - began

    def kept(self) -> str:
        """What is kept after an error, in words."""
        if not self.saved_step:
            return "no checkpoint yet"
        return f"the checkpoint of step {self.saved_step} is kept: --resume {self.folder}"

    def check_finite(self, **values) -> None:
        """Stop the program if a value is not finite, and name it; if a loss was not finite, name that instead."""
        for name, value in values.items():
            if not (np.abs(value) <= np.finfo(np.float32).max).all():  # all is stored as float32
                self.mean_losses()
                fail(f"step {self.progress.step}: {name} is NaN or infinite; {self.kept()}")

    def mean_losses(self) -> dict[str, float]:
        """Means of the losses since the last call, each checked to be finite: the only host-device sync for losses."""
        if not self.history:
            return {}
        steps, rows = zip(*self.history, strict=True)
        rows = torch.stack(rows).cpu()
        for row, column in (~rows.isfinite()).nonzero().tolist():
            fail(f"step {steps[row]}: {LOSSES[column]} is NaN or infinite; {self.kept()}")
        self.history.clear()
        return dict(zip(LOSSES, rows.mean(0).tolist(), strict=True))

    def log_update(self, losses: torch.Tensor) -> None:
        """Record an update and its losses; every 100 updates, write the means since the last write or checkpoint."""
        self.history.append((self.progress.step, losses.clone()))
        if self.progress.updates % 100 == 0:
            means = self.mean_losses()
            self.write_scalars("losses/", means)
            self.write_scalars("charts/", {"SPS": self.progress.step / self.seconds()})
            self.say_how_it_goes(means["alpha"])

    def say_how_it_goes(self, alpha: float) -> None:
        """Show the last ten episodes' mean return and alpha in the bar; a log file gets a line every 1 000 updates."""
        episodes = self.progress.rows["returns.csv"][1:]
        recent = [row[1] for row in episodes[-10:]]
        shown = f"return {np.mean(recent):.4g}, " if recent else ""
        self.bar.set_postfix_str(f"{shown}alpha {alpha:.2g}", refresh=False)
        if not sys.stderr.isatty() and self.progress.updates % 1000 == 0:
            print(self.bar, file=sys.stderr, flush=True)

    def end_episode(self, info: dict) -> None:
        """Record the end of an episode; `info` is that of its last step."""
        episode = info[EPISODE]
        self.write_scalars("charts/episodic_", {"return": episode["r"], "length": episode["l"]})
        self.write_row("returns.csv", float(episode["r"]), episode["l"])

    def report(self, kind: str, scores: dict[str, float]) -> bool:
        """Record an evaluation; returns whether it is the best so far."""
        prefix = "eval/" if kind == "deterministic" else f"eval/{kind}_"
        self.write_scalars(prefix, scores)
        shown = [f"{value:.5g}" for value in scores.values()]
        self.write_row("eval.csv", kind, *shown, self.args.eval_episodes)
        tqdm.write(f"step {self.progress.step}, {kind}: {describe(scores)}")
        sys.stdout.flush()
        better = kind == "deterministic" and scores["return"] > self.progress.best
        if better:
            self.progress.best = float(scores["return"])
        return better

    def write_scalars(self, prefix: str, scalars: dict) -> None:
        """Write to TensorBoard, with `prefix` before each name."""
        for name, value in scalars.items():
            self.writer.add_scalar(f"{prefix}{name}", value, self.progress.step)

    def write_row(self, name: str, *values) -> None:
        """Append a row to a CSV file: the step, the values and the seconds."""
        row = [self.progress.step, *values, round(self.seconds(), 2)]
        self.progress.rows[name].append(row)
        with open(self.folder / name, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)

    def should_save(self) -> bool:
        """Whether a checkpoint is due at the end of this episode."""
        return bool(self.interrupted) or self.progress.step - self.saved_step >= self.args.save_every

    def save(self, state: dict, policy: Actor) -> None:
        """If all weights are finite, write policy.pt and, with `state` and the run's progress, checkpoint.pt."""
        self.mean_losses()
        for network in ("actor", "critics"):
            for name, value in state[network].items():
                self.check_finite(**{f"{network}.{name}": value.cpu().numpy()})
        self.progress.seconds = self.seconds()
        self.save_policy("policy.pt", policy)
        self.save_as("checkpoint.pt", progress=asdict(self.progress), **state)
        self.saved_step = self.progress.step

    def save_policy(self, name: str, actor: Actor) -> None:
        """Write an actor with what is needed to rebuild it, in the form that `load_policy` reads."""
        self.save_as(name, step=self.progress.step, obs_dim=actor.obs_dim, actor=actor.state_dict())

    def save_as(self, name: str, **state) -> None:
        """Write `state` with the script's name and flags, in the form that `load` reads.

        The file is always complete, old or new. Raises OSError if it cannot be written.
        """
        path = self.folder / name
        temporary = path.with_suffix(".pt.tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save({"script": SCRIPT, "args": asdict(self.args), **state}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            # On a full disk, torch.save may fail a second time as it closes the file.
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            raise OSError(f"could not write {path} ({reason})") from error

    def say_where(self) -> None:
        """Say where the run is saved or, if it was stopped, how to resume it; a stopped run has its own exit code."""
        if self.progress.step < self.total:
            print(f"stopped at step {self.progress.step}; resume with: python {sys.argv[0]} --resume {self.folder}")
            raise SystemExit(128 + self.interrupted)
        print(f"saved in {self.folder}")


def load(path: Path, key: str) -> dict:
    """Read a run's file, which must have `key`; stops the program if it is missing, damaged or another script's."""
    if not os.path.isfile(path):  # Path.is_file raises on some paths
        fail(f"there is no {path}: name the folder of a run that has saved one, such as runs/<name>")
    with explained(f"{path} is unreadable, truncated or corrupted: restore it from a copy, or start a new run"):
        written = path.stat().st_mtime_ns
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load would not notice a flipped bit
                raise ValueError(damaged)
        state = torch.load(path, map_location="cpu", weights_only=True)
        written_by = state.get("script", "another program")
        flags = set(state.get("args", {}))
    if written_by != SCRIPT:
        fail(f"{path} was written by {written_by}, not by {SCRIPT}")
    if key not in state:
        fail(f"{path} is another kind of file: --resume takes a run's folder, --evaluate that or a policy file in it")
    if differing := flags ^ set(vars(Args())):
        old = ", ".join(sorted(differing & flags)) or "none"
        new = ", ".join(sorted(differing - flags)) or "none"
        fail(f"{path} was written by another version of {SCRIPT}, whose flags differ: it has {old} for {new}")
    state["written"] = written
    with explained(f"{path} was altered, or written by another version of {SCRIPT}"):
        Progress(**state.get("progress", {}))
    return state


def read_policy(path: Path) -> dict:
    """Read a policy file, or the policy.pt of a run's folder."""
    return load(path if os.path.isfile(path) else path / "policy.pt", "obs_dim")


def build_policy(state: dict) -> Actor:
    """The actor that `Run.save_policy` wrote, frozen."""
    bounds = torch.ones_like(state["actor"]["scale"])  # the true ones are in the state
    actor = make_actor(Args(**state["args"]), state["obs_dim"], -bounds, bounds)
    actor.load_state_dict(state["actor"])
    return actor.eval().requires_grad_(False)


def load_policy(path: str) -> Actor:
    """The actor of a policy file, or of a run's folder, frozen: `load_policy("runs/<name>").act(obs)`.

    Stops the program (SystemExit) if there is none, or if it is damaged or another script's.
    """
    return build_policy(read_policy(Path(path)))


def play(args: Args, policy: dict) -> None:
    """Play a saved policy: in a window where there is a display, or as videos, and print its returns."""
    with explained(f"--evaluate {args.evaluate}: it was altered, or there is no memory for it"):
        actor = build_policy(policy).to("cuda" if args.cuda else "cpu")
    env = make_env(args.env_id, args.max_episode_steps, "rgb_array" if args.capture_video else "human")
    path = Path(args.evaluate)
    if args.capture_video:
        folder, name = (path.parent, path.stem) if path.is_file() else (path, "policy")
        prefix = f"evaluation-of-{name}"
        first = lambda episode: episode % args.eval_episodes == 0  # noqa: E731  of each kind
        env = record_videos(env, folder, prefix, first)
    if env.observation_space.shape != (actor.obs_dim,) or env.action_space.low.size != actor.action_dim:
        fail(f"--evaluate {path}: it was trained on other observations or actions than {args.env_id} has now")
    choose = compiled_policy(actor, jit=unchanged, graph=unchanged)
    print(f"{path} at step {policy['step']}, {args.eval_episodes} episodes of each kind", flush=True)
    with explained(f"--evaluate {path}"), env:
        for kind in ("deterministic", "stochastic"):
            seed_random(args.seed)
            if args.capture_video:
                env.name_prefix = f"{prefix}-{kind}"
            act = partial(choose, deterministic=kind == "deterministic")
            print(f"{kind}: {describe(evaluate(act, env, args.eval_episodes, args.seed))}", flush=True)


def seed_random(seed: int) -> None:
    """Seed the process's random generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def in_plain_types(state):
    """A state without numpy's types, which torch.load(weights_only=True) does not accept."""
    return json.loads(json.dumps(state, default=np.ndarray.tolist))


class Generators:
    """Every random generator that a run draws from, saved and restored as networks are."""

    def __init__(self, device: torch.device, env: gym.Env):
        self.device = device
        self.env = env
        self.action_space = env.action_space  # kept, since some environments make a new one at each access

    def state_dict(self) -> dict:
        """Their states, in types that torch.load(weights_only=True) accepts."""
        of_env = self.env.unwrapped.np_random
        return {
            "python": random.getstate(),
            "numpy": in_plain_types(np.random.get_state(legacy=False)),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "env": in_plain_types(of_env.get_state(False) if is_legacy(of_env) else of_env.bit_generator.state),
            "action_space": self.action_space.np_random.bit_generator.state,
        }

    def load_state_dict(self, states: dict) -> None:
        """Put back what `state_dict` returned, with a note if the run was saved on another kind of device."""
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.set_rng_state(states["torch"])
        of_env = self.env.unwrapped.np_random
        if is_legacy(of_env):
            of_env.set_state(states["env"])
        else:
            of_env.bit_generator.state = states["env"]
        self.action_space.np_random.bit_generator.state = states["action_space"]
        if (states["cuda"] is not None) != (self.device.type == "cuda"):
            note(f"saved on another device, continuing on {self.device.type}: not bit for bit")
        elif self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.device)

    @contextlib.contextmanager
    def fork(self, seed: int):
        """Inside, they start from `seed`; afterwards they are back where they were."""
        states = self.state_dict()
        seed_random(seed % 2**32)
        yield
        self.load_state_dict(states)


def is_legacy(generator) -> bool:
    """Whether it is numpy's old kind, as dm_control's are, which keeps a drawn Gaussian beside its bits."""
    return isinstance(generator, np.random.RandomState)


def lock(file) -> None:
    """Lock a file for this process as long as it is open; stops the program if another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        fail(f"{Path(file.name).parent} is in use by process {file.read()}: wait for it to end, or stop it")
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()


def make_env(env_id: str, max_episode_steps: int | None = None, render_mode: str | None = None) -> gym.Env:
    """gym.make with one-line errors for environments that do not exist or that this script cannot control.

    `render_mode` is rgb_array, for videos, or human, for a window if there is a display. Returns are recorded.
    """
    warnings.filterwarnings("ignore", message=".*is out of date")  # v4 is what the paper reports
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    headless = sys.platform == "linux" and not display
    if render_mode == "rgb_array" and headless:
        os.environ.setdefault("MUJOCO_GL", "egl")
    if render_mode == "human" and headless:
        render_mode = None
    with explained(f"--env-id {env_id}"):
        try:
            env = gym.make(env_id, max_episode_steps, **({"render_mode": render_mode} if render_mode else {}))
            if render_mode == "human":
                env.reset()  # opens the window
        except Exception as error:
            if render_mode != "human":
                raise
            note(f"played unseen, as no window opens: {first_line(error)}")
            env = gym.make(env_id, max_episode_steps)
    obs = env.observation_space
    action = env.action_space
    if not isinstance(obs, gym.spaces.Box) or len(obs.shape) != 1:
        fail(f"--env-id {env_id}: observations must be a Box of one dimension, not {obs}; wrap it (FlattenObservation)")
    if not isinstance(action, gym.spaces.Box) or not np.issubdtype(action.dtype, np.floating):
        fail(f"--env-id {env_id}: actions must be a Box of real numbers, not {action}; wrap the environment")
    if not (action.low.size and action.is_bounded() and (action.low < action.high).all()):
        fail(f"--env-id {env_id}: every action needs finite bounds, low < high, not {action}; wrap the environment")
    if env.has_wrapper_attr("obs_rms") or env.has_wrapper_attr("return_rms"):
        fail(f"--env-id {env_id}: what NormalizeObservation or NormalizeReward saw is not saved; drop the wrapper")
    if render_mode == "rgb_array":
        with explained("--capture-video needs moviepy (pip install -r benchmark/requirements.txt) and EGL"):
            import moviepy  # noqa: F401

            env.reset(seed=0)
            env.render()
    if env.spec.max_episode_steps is None:  # else an endless episode would put off checkpoints, too
        env = gym.wrappers.TimeLimit(env, 10_000)
        note(f"{env_id} registers no time limit: episodes are truncated at 10 000 steps, or at --max-episode-steps")
    return gym.wrappers.RecordEpisodeStatistics(env, stats_key=EPISODE)


def record_videos(env: gym.Env, folder: Path, prefix: str, episodes=None) -> gym.Env:
    """Write episodes to MP4 files in `folder`/videos: those that `episodes` selects, by default gymnasium's choice."""
    with explained(f"--capture-video: cannot write to {folder / 'videos'}"):
        return gym.wrappers.RecordVideo(env, str(folder / "videos"), episodes, name_prefix=prefix, disable_logger=True)


def to_obs(obs) -> np.ndarray:
    """An environment's observation as float32, the type in which it is stored and fed to the networks."""
    with np.errstate(over="ignore"):  # what becomes infinite stops the run
        return np.array(obs, dtype=np.float32)  # a copy: an environment may change its own in place


def to_action(action: np.ndarray, space: gym.spaces.Box) -> np.ndarray:
    """Action (D,) in the space's shape and type, clipped: rounding may cross the bounds by a unit in the last place."""
    action = np.clip(action.reshape(space.shape), space.low, space.high)
    return action.astype(space.dtype)


def evaluate(act, env: gym.Env, episodes: int, seed: int) -> dict[str, float]:
    """Play episodes from starts determined by `seed`; `act` maps obs (obs_dim,) to an action (D,), both numpy.

    Returns their mean return with its standard error, and their mean length.
    """
    returns = []
    lengths = []
    for start in np.random.SeedSequence(seed).generate_state(episodes):
        obs, _ = env.reset(seed=int(start))
        done = False
        while not done:
            action = act(to_obs(obs))
            obs, _, terminated, truncated, info = env.step(to_action(action, env.action_space))
            done = terminated or truncated
        returns.append(float(info[EPISODE]["r"]))
        lengths.append(info[EPISODE]["l"])
    error = np.std(returns) / math.sqrt(max(episodes - 1, 1))  # np.std divides by n; the sample's deviation by n - 1
    return {"return": np.mean(returns), "return_error": error, "length": np.mean(lengths)}


def describe(scores: dict[str, float]) -> str:
    """An evaluation as one line."""
    return f"return {scores['return']:.1f} +- {scores['return_error']:.1f}, length {scores['length']:.0f}"


def compiled_policy(actor: Actor, jit, graph):
    """`actor.act` for one observation, compiled: a function of obs (obs_dim,) to an action (D,), both numpy."""
    policy_obs = torch.zeros(1, actor.obs_dim, device=actor.scale.device)
    policy_noise = actor.draw_noise(1, deterministic=True)
    policy_action = torch.zeros_like(actor.scale)
    rollout = jit(lambda obs, noise: actor.rollout(obs, noise)[0])

    @graph
    def act() -> None:
        with torch.no_grad():
            policy_action.copy_(rollout(policy_obs, policy_noise)[0])

    def choose(obs: np.ndarray, deterministic: bool = False) -> np.ndarray:
        policy_obs.copy_(torch.from_numpy(obs))
        policy_noise.copy_(actor.draw_noise(1, deterministic))
        act()
        return policy_action.cpu().numpy().copy()

    return choose


def unchanged(function):
    """Stands in for a compiler where there is none."""
    return function


def find_compiler(device: torch.device):
    """torch.compile if it works on this machine, else the identity and a note."""

    def jit(function):
        options = {
            # Each function is always called with the same shapes and modes: checking that would cost 0.2 ms a call.
            "guard_filter_fn": lambda guards: [False] * len(guards),
            # Matrix products of a single row (the policy's) are compiled as sums: a library call costs more.
            "post_grad_fusion_options": {"decompose_mm_pass": {}},
        }
        # With guards off, closures of the same source would share the first one's graph: each gets its own code object.
        function.__code__ = function.__code__.replace()
        return torch.compile(function, dynamic=False, options=options)

    try:
        from torch._inductor.runtime.cache_dir_utils import cache_dir  # here, since it takes seconds

        for library in glob.iglob(f"{glob.escape(cache_dir())}/**/*.so", recursive=True):
            with contextlib.suppress(OSError):  # another process may remove it first
                status = os.stat(library)
                if status.st_size == 0 and time.time() - status.st_mtime > 10:  # of a compilation that was killed
                    os.unlink(library)  # else every later run would fail on it
        torch.compiler.reset()  # guards are off, so graphs of an earlier run in this process would be reused
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
        print("the first update compiles the losses, which takes a minute or two", file=sys.stderr)
        torch._dynamo.config.trace_autograd_ops = True  # else its graphs would break at the gradients
        return jit
    except Exception as error:
        note(f"torch.compile does not work here ({first_line(error)}); continuing without it, slower")
        return unchanged


def set_matmul_precision(device: torch.device) -> None:
    """Ask for "medium" precision of matrix products if that rounds nothing here, else for "highest".

    On a CPU, "medium" hands float32 products to oneDNN. With AMX units, oneDNN rounds their factors to bfloat16;
    without them, it still computes in float32, on AMD processors twice as fast as MKL, which "highest" uses.
    """
    x = torch.arange(2**16, device=device).sin().abs().view(256, 256)  # no random draws: they would change the run
    torch.set_float32_matmul_precision("highest")
    exact = x @ x
    torch.set_float32_matmul_precision("medium")
    if not torch.allclose(x @ x, exact, rtol=5e-6, atol=0):
        torch.set_float32_matmul_precision("highest")


class CudaGraph:
    """`function()` as one CUDA graph: a launch costs the host one call instead of one for every kernel.

    The function takes nothing and returns nothing: it works on tensors that live as long as it does, and draws from
    the device's generator. The first three calls run it directly, which sets up compilation, optimizers and libraries.
    """

    def __init__(self, function):
        self.function = function
        self.plain_calls = 3  # to come
        self.graph = None
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
    try:
        main()
    except KeyboardInterrupt:  # not during a run, which handles it itself
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except SystemExit as stop:
        sys.exit(stop.code)  # Weights & Biases hears of a failure only here
