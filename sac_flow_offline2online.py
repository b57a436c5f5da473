"""SAC Flow offline-to-online: clone a flow policy from manipulation data, then improve it online with SAC.

The policy generates a chunk of h actions in K steps along a velocity network. Offline, flow matching fits it to the
data, while critics and actor train on the same data with SAC's losses and a behaviour-cloning (BC) term; online, the
chunks are executed, and all of this but flow matching goes on. In both phases the critics' gradient runs back through
the policy's own sampling loop, which a gate (Flow-G) or a decoder (Flow-T) in the velocity is meant to keep stable.
Paper: "SAC Flow", arXiv 2509.25756; benchmark/rnn_equivalence.md derives the equations that comments cite.

    pip install -r requirements.txt -r benchmark/demonstrations/requirements.txt
    python sac_flow_offline2online.py                                # robosuite's lift, 100 scripted demonstrations
    python sac_flow_offline2online.py --env-id cube-double-play-singletask-task2-v0 --velocity decoded

Resume with --resume runs/<name>; watch with --evaluate runs/<name> --capture-video.
"""
# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[mujoco]==1.4.0",
#     "mujoco==3.8.1",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
#     "ogbench==1.2.2",
#     "robosuite==1.5.2",
#     "dm_control==1.0.41",
#     "h5py==3.16.0",
#     "minari[hdf5,hf]==0.5.3",
#     "pyarrow==24.0.0",
#     "numpy==1.26.4",
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
import logging
import math
import os
import random
import re
import signal
import subprocess
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
LOSSES = (
    "qf_loss", "qf_values", "actor_loss", "flow_matching", "bc", "alpha_loss", "alpha", "entropy", "alpha_log_prob",
)  # fmt: skip
# robosuite's tasks: the environment's name, and the steps after which the authors' code truncates an episode
ROBOSUITE = {"lift": ("Lift", 300), "can": ("PickPlaceCan", 300), "square": ("NutAssemblySquare", 400)}
SCORES = ("success_rate", "success_low", "success_high", "return", "return_error", "length")  # of an evaluation
COLUMNS = ("obs", "action", "reward", "terminated", "last", "next_obs")  # of a row of the replay buffer
OBS_KEYS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")  # robomimic's low-dim observation
# The paper's offline weights of the BC term; cube-single gets cube-double's, robosuite's other tasks get lift's.
# Everything else: 100.
BETA = {"lift": 10_000, "can": 10_000, "square": 10_000, "cube-single": 300, "cube-double": 300}


@dataclass
class Args:
    """Flags of the command line; `alpha_lr` is --alpha-lr."""

    # What to run
    env_id: str = "lift"
    """lift, can, square or robosuite/<Name> (robosuite), an OGBench singletask id
    (cube-single-play-singletask-task1-v0), the id of a Minari data set (mujoco/hopper/medium-v0), or with --dataset any
    gymnasium id (my_package:MyEnv-v0)"""
    env_kwargs: str | None = None
    """arguments of the environment as JSON, such as '{"max_episode_steps": 200}'; they override those in a robomimic
    file"""
    dataset: str | None = None
    """file with the data (robomimic's .hdf5, OGBench's .npz; for a gymnasium id .npz or .hdf5 with D4RL's keys), a
    folder of .npz files that are used in turn, the folder of a LeRobot data set (version 3), or the root folder of
    Minari data sets; default: where the packages keep their downloads, then what --collect collects"""
    obs_keys: tuple[str, ...] = ()
    """parts of the observation, in order; default: robomimic's usual four, or LeRobot's observation.state"""
    collect: int | None = None
    """if there is no data: episodes to collect with scripted experts, kept as data/<task>-<collect>; default: 100 for
    lift, can and square, else 0"""
    seed: int = 1
    """seed of every random generator"""
    offline_steps: int = 5_000
    """updates on the data alone, before the policy acts in the environment"""
    online_steps: int = 10_000
    """environment steps after the offline updates"""
    eval_every: int = 5_000
    """steps between evaluations (of which weights: --actor-average); there is one at the end of each phase, too"""
    eval_episodes: int = 50
    """episodes per evaluation"""
    cuda: bool = torch.cuda.is_available()
    """train on the GPU (the default where there is one)"""
    compile: bool = True
    """torch.compile the losses and the rollout, if a compiler works; on a GPU, replay each update as a CUDA graph"""
    capture_video: bool = False
    """with --evaluate, write videos of the first deterministic and the first sampled episode to <run>/videos"""
    track: bool = False
    """mirror the TensorBoard log to Weights & Biases"""
    save_every: int = 5_000
    """steps between checkpoints; online, each is saved when an episode ends; one is also saved at the end of the run"""
    run_name: str | None = None
    """the run's folder is runs/<run-name>; default: <env>__<script>__<seed>__<time>"""
    resume: str | None = None
    """folder of a run to continue, bit for bit from an episode's end (on a GPU if its compiled code is still cached)"""
    evaluate: str | None = None
    """folder of a run whose policy.pt is played instead of training, or a policy file"""

    # Data and critics
    chunk: int = 5
    """h, actions that the policy chooses at once and executes one after the other; 1: no chunks"""
    buffer_size: int = 2_000_000
    """capacity of the replay buffer in transitions, the data included; only what the run can fill is allocated"""
    # On lift with 20 demonstrations (six seeds), success changed by -13 points from the offline end to the first online
    # evaluation with uniform and by -4 with 0.5. The mean of the last two evaluations was 80 and 85 %
    # (benchmark/results/offline-to-online).
    online_fraction: float | Literal["uniform"] = 0.5
    """share of each online batch drawn from online experience, the rest from the data; uniform: from both alike"""
    normalize_observations: bool = False
    """standardise observations by the data's mean and deviation (for a folder, those of its first file); where the
    deviation is below 1e-4, only the mean is subtracted"""
    rescale_actions: bool = False
    """for data whose actions are in other units: each action's smallest and largest value become the policy's bounds,
    mapped to the environment's if those are finite. Correct only if the data reach both ends of every action's range"""
    rotate_every: int = 1_000
    """offline steps on each file of a --dataset folder; the last one used stays in the buffer for the online phase"""
    sparse: bool | None = None
    """reward -1 until the whole task is done, in place of OGBench's, which is minus the number of parts not yet done;
    on by default for scene and puzzle-3x3"""
    batch_size: int = 256
    """chunks per update"""
    utd: int = 1
    """updates per online environment step"""
    online_start: int = 1_000
    """online environment steps before the first online update"""
    gamma: float = 0.99
    """discount factor per environment step"""
    tau: float = 0.005
    """update rate of the target networks' moving average"""
    critic_lr: float = 3e-4
    """learning rate of the critics"""
    critic_dim: int = 128
    """width of the hidden layers of each critic"""
    critic_layers: int = 3
    """hidden layers of each critic"""

    # Actor's losses
    actor_lr: float = 3e-4
    """learning rate of the actor"""
    # An average evens out what changes fast, but was no better on average. On cube-single (seed 2), from 15 000 offline
    # updates to 5 000 online steps, success was 36 to 100 % with the last weights (mean 62) and 44 to 72 % with their
    # average of decay 0.999 (62). On lift after 10 000 online steps (seed 3) it was 94 and 74 %, with decay 0.995 82 %.
    actor_average: float = 0.0
    """decay per update of the averaged weights, which are evaluated and saved as policy.pt, such as 0.999; they lag
    behind by about 1 / (1 - decay) updates; 0: use the last weights"""
    beta: float | None = None
    """offline weight of the BC term, the mean square of a_theta - a_data, for actions in [-1, 1]; default: the paper's
    for the task, cube-double's for cube-single, lift's for robosuite's other tasks, else 100"""
    # On lift, can and square the paper lowers it to 1 000 online. On lift (100 demonstrations, three seeds, a version
    # with faulty critics and Euler's step), success after 2 500 offline updates and after 5 000 online steps was 0.82
    # and 0.79 with that, 0.82 and 0.93 with 10 000 throughout.
    online_beta: float | None = None
    """the same online; a_data is then the batch's action, from the data or from the policy's own experience; default:
    --beta"""
    # Measured in the same way, with the paper's switch of beta: 0.82 and 0.79 with learned sigma and alpha, 0.55 and
    # 0.68 with sigma 0.1 and no entropy.
    alpha: float = 0.1
    """entropy coefficient: its initial value, or its fixed value with --no-autotune"""
    autotune: bool = True
    """learn alpha such that the entropy of the path meets --target-entropy; needs a learned sigma"""
    alpha_lr: float = 3e-4
    """learning rate of the entropy coefficient"""
    target_entropy: float | None = None
    """target of the path's entropy in nats, summed over dimensions and steps; default: that of --sigma before the
    squash, with the action's part counted as at most log 2 per dimension"""

    # Flow policy
    velocity: Literal["gated", "decoded", "plain"] = "gated"
    """Flow-G, Flow-T, or the control without either"""
    flow_steps: int = 4
    """K, steps from noise to action"""
    score_step: Literal["exponential", "euler", "none"] = "exponential"
    """how to integrate the score, which preserves a true flow's marginals; euler: as in the paper; none: no score"""
    sigma: float = 0.1
    """initial noise scale of the rollout, fixed with --no-learn-sigma; for all losses, both phases and acting"""
    learn_sigma: bool = True
    """learn sigma from the observation; --no-learn-sigma needs --no-autotune"""
    sigma_dim: int = 128
    """width of the two hidden layers of the network for a learned sigma"""
    velocity_dim: int = 128
    """width of the hidden layers of the candidate or the plain velocity"""
    velocity_layers: int = 3
    """hidden layers of the candidate or the plain velocity"""
    gate_dim: int = 64
    """width of the gate's hidden layer"""
    decoder_dim: int = 64
    """width of the decoder's tokens"""
    decoder_layers: int = 2
    """decoder layers"""


def mlp(inputs: int, dim: int, layers: int, outputs: int, norm=nn.Identity, activation=nn.SiLU) -> list[nn.Module]:
    """`layers` hidden layers (Linear, norm, activation), then a Linear."""
    sizes = [inputs] + layers * [dim]
    hidden = []
    for n, m in zip(sizes, sizes[1:], strict=False):
        hidden += [nn.Linear(n, m), norm(m), activation()]
    return [*hidden, nn.Linear(sizes[-1], outputs)]


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


class GatedVelocity(nn.Module):
    """Flow-G: v = g * (vhat - a), gate g = sigmoid(z(t, a, s)), candidate vhat(t, a, s).

    Without noise and score, a step a + dt v is then (1 - dt g) a + dt g vhat: a GRU update with update gate dt * g. The
    gate, an MLP with one hidden layer, starts at sigmoid(5) = 0.993 everywhere, so that the rollout starts contractive.
    """

    def __init__(self, obs_dim: int, action_dim: int, dim: int = 128, layers: int = 3, gate_dim: int = 64):
        super().__init__()
        # The first layers of candidate and gate are merged, and split by input instead: the observation's part is the
        # same at all K steps, so `encode` computes it once per rollout.
        self.split = dim, gate_dim
        self.from_obs = nn.Linear(obs_dim, dim + gate_dim)
        self.from_action = nn.Linear(action_dim, dim + gate_dim, bias=False)
        self.from_time = TimeEmbedding(dim + gate_dim)
        self.candidate = nn.Sequential(*mlp(dim, dim, layers - 1, action_dim))
        self.gate = nn.Linear(gate_dim, action_dim)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, 5.0)

    def encode(self, obs):
        """What the K steps share: (B, obs_dim) -> (B, dim + gate_dim)."""
        return self.from_obs(obs)

    def forward(self, t, a, features):
        """Velocity (B, D) at flow time t (float or (B, 1)) and pre-squash action a (B, D)."""
        hidden = F.silu(features + self.from_action(a) + self.from_time(t))
        for_candidate, for_gate = hidden.split(self.split, dim=-1)
        return torch.sigmoid(self.gate(for_gate)) * (self.candidate(for_candidate) - a)


class DecoderLayer(nn.Module):
    """Pre-norm decoder layer on one token each: y = phi + Cross(LN(phi), LN(memory)),  phi' = y + FFN(LN(y)).

    With one memory token the attention's softmax is 1, whatever the queries, keys and heads: Cross reduces to a linear
    read-out W_out W_value LN(memory), the same at all K steps, and only that is built here. Self-attention, masked to
    the diagonal so that a step stays Markov in the action, would be linear, too: the FFN does its work.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm_memory = nn.LayerNorm(dim)
        self.norm_ffn = nn.LayerNorm(dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))

    def encode(self, memory):
        """Cross(LN(phi), LN(memory)) for any phi: (B, dim) -> (B, dim)."""
        return self.out(self.value(self.norm_memory(memory)))

    def forward(self, phi, cross):
        """One layer over the action token phi (B, dim)."""
        y = phi + cross
        return y + self.ffn(self.norm_ffn(y))


class DecodedVelocity(nn.Module):
    """Flow-T: v = W_o LN(Phi_L), Phi_L from decoder layers that read the observation.

    Phi_0, the action token, is embed(a) + embed(t); the memory is one observation token. With `contractive`, which
    needs dim >= action_dim, v starts near -a plus what observation and time add; without it, the rollout initially
    passes all of A_0 on to the action.
    """

    def __init__(self, obs_dim: int, action_dim: int, dim: int = 64, layers: int = 2, contractive: bool = True):
        super().__init__()
        self.from_obs = nn.Linear(obs_dim, dim)
        self.from_action = nn.Linear(action_dim, dim)
        self.from_time = TimeEmbedding(dim)
        self.layers = nn.ModuleList(DecoderLayer(dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, action_dim)
        if contractive:
            if dim < action_dim:
                raise ValueError(f"a contractive start needs dim >= {action_dim} (--velocity-dim), not {dim}")
            nn.init.orthogonal_(self.from_action.weight)
            with torch.no_grad():
                self.out.weight.copy_(-self.from_action.weight.T)

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


class PlainVelocity(nn.Module):
    """The control: v is an MLP of t, a and s, and nothing bounds its Jacobian."""

    def __init__(self, obs_dim: int, action_dim: int, dim: int = 128, layers: int = 3):
        super().__init__()
        self.from_obs = nn.Linear(obs_dim, dim)
        self.from_action = nn.Linear(action_dim, dim, bias=False)
        self.from_time = TimeEmbedding(dim)
        self.net = nn.Sequential(nn.SiLU(), *mlp(dim, dim, layers - 1, action_dim))

    def encode(self, obs):
        """What the K steps share: (B, obs_dim) -> (B, dim)."""
        return self.from_obs(obs)

    def forward(self, t, a, features):
        """Velocity (B, D) at flow time t (float or (B, 1)) and pre-squash action a (B, D)."""
        return self.net(features + self.from_action(a) + self.from_time(t))


class Normalizer(nn.Module):
    """(obs - mean) / deviation, (B, dim) -> (B, dim); the identity until its buffers are set."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))

    def forward(self, obs):
        return (obs - self.mean) / self.deviation


class Actor(nn.Module):
    """Flow policy over chunks of h actions: K noisy steps along a velocity network, then a tanh into the action bounds.

    Needs no environment, so that it can be copied elsewhere: `action_low` and `action_high` are sequences of D finite
    bounds, `velocity` is a factory (obs_dim, h D) -> module. Below, D stands for h D.
    `sigma` is fixed or, with `learn_sigma`, the value at which the learned sigma starts.
    """

    def __init__(
        self, obs_dim: int, action_low, action_high, *, chunk: int = 5, velocity=GatedVelocity, flow_steps: int = 4,
        score_step: str = "exponential", sigma: float = 0.1, learn_sigma: bool = False, sigma_dim: int = 128,
    ):  # fmt: skip
        super().__init__()
        low = torch.as_tensor(action_low, dtype=torch.float32)
        high = torch.as_tensor(action_high, dtype=torch.float32)
        same_shape = low.ndim == 1 and low.shape == high.shape
        if not (same_shape and len(low) and (high - low).isfinite().all() and (low < high).all()):
            raise ValueError(f"every action needs finite bounds, low < high, not {action_low} and {action_high}")
        low = low.repeat(chunk)
        high = high.repeat(chunk)
        self.flow_steps = flow_steps
        self.score_step = score_step
        self.counted_steps = slice(None)  # all: the last step's entropy, as in the other scripts, was not measured here
        self.obs_dim = obs_dim
        self.action_dim = len(low)
        if score_step not in ("exponential", "euler", "none"):
            raise ValueError(f"score_step must be exponential, euler or none, not {score_step}")
        self.normalizer = Normalizer(obs_dim)
        self.velocity_net = velocity(obs_dim, self.action_dim)
        self.log_sigma = math.log(sigma)
        self.sigma_net = None
        if learn_sigma:
            self.sigma_net = nn.Sequential(*mlp(obs_dim, sigma_dim, 2, self.action_dim, activation=nn.ReLU))
            nn.init.zeros_(self.sigma_net[-1].weight)
            start = math.atanh((self.log_sigma + 1.5) / 3.5)  # where `sigma` below equals the flag
            nn.init.constant_(self.sigma_net[-1].bias, start)
        self.register_buffer("scale", (high - low) / 2)
        self.register_buffer("bias", (high + low) / 2)
        # The paper's target, 0, would require far more noise than the paper's sigma gives. This one is met with a sigma
        # near `sigma`, or above it where actions are near their bounds.
        self.target_entropy = self.entropy_at(sigma)

    def velocity(self, t, a, obs):
        """v(t, a, s), (B, D), at flow time t in [0, 1) (float or (B, 1)) and pre-squash action a (B, D)."""
        features = self.velocity_net.encode(self.normalizer(obs))
        return self.velocity_net(t, a, features)

    def sigma(self, obs):
        """sigma (B, D), shared by the K steps; a learned one is in [e^-5, e^2]."""
        if self.sigma_net is None:
            return self.scale.new_full((len(obs), self.action_dim), self.log_sigma).exp()
        raw = self.sigma_net(self.normalizer(obs))
        return torch.exp(-1.5 + 3.5 * torch.tanh(raw))

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
        """Sample actions, with the log density that enters the entropy.

        A_0 = noise[0],  A_{i+1} = m_i + sqrt(V_i) noise[i+1]  (`step` gives m_i and sqrt(V_i)),  action = squash(A_K),
        log p_c(path | s) = log N(A_0; 0, I) + sum_i log N(A_{i+1}; m_i, diag V_i) - sum_d log(1 - tanh(A_{K,d})^2),
        the log density of A_0 to A_{K-1} and the action in [-1, 1], so that the environment's units do not matter.
        obs (B, obs_dim); noise (K+1, B, D) of unit Gaussians. Returns action (B, D) in the environment's units,
        log_prob (B,) = log p_c, and the path, the list of A_0 to A_K, (B, D) each (A_0 is a graph node only if noise
        requires grad).
        Raises ValueError for other shapes.
        """
        expected = (self.flow_steps + 1, obs.shape[0], self.action_dim)
        if obs.shape[1:] != (self.obs_dim,) or noise.shape != expected:
            shapes = f"{tuple(obs.shape)} and {tuple(noise.shape)}"
            raise ValueError(f"rollout takes obs (B, {self.obs_dim}) and noise {expected}, not {shapes}")
        features = self.velocity_net.encode(self.normalizer(obs))
        sigma = self.sigma(obs)
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

    def normalized(self, action):
        """Actions (B, D) scaled to [-1, 1], as the critics and the BC term see them."""
        return (action - self.bias) / self.scale

    def unsquash(self, action):
        """The A_K that `rollout` squashes to `action` (B, D), clipped 0.5 % of the half range short of its bounds.

        Flow matching has to aim at it, since tanh follows: aimed at the action itself, it would clone tanh(action).
        """
        return torch.atanh(self.normalized(action).clamp(-0.995, 0.995))

    def draw_noise(self, batch: int, deterministic: bool = False):
        """Noise for a rollout of `batch` observations: unit Gaussians (K+1, B, D), or zeros for the path's mode."""
        noise = self.scale.new_zeros(self.flow_steps + 1, batch, self.action_dim)
        return noise if deterministic else noise.normal_()

    def act(self, obs, deterministic: bool = False):
        """Chunks of actions (B, D) for obs (B, obs_dim), or one chunk (D,) for one obs (obs_dim,).

        Deterministic: the mode of the path before the squash, with all noise 0.
        """
        batch = obs if obs.ndim == 2 else obs[None]
        noise = self.draw_noise(batch.shape[0], deterministic)
        action, *_ = self.rollout(batch, noise)
        return action if obs.ndim == 2 else action[0]

    def forward(self, obs):
        """The deterministic chunk, for torch.export and wherever a module is called."""
        return self.act(obs, deterministic=True)


class Critic(nn.Module):
    """Q(s, chunk), the chunk in [-1, 1]: hidden layers with layer normalisation, which keeps Q bounded off the data."""

    def __init__(self, obs_dim: int, action_dim: int, dim: int, layers: int):
        super().__init__()
        self.normalizer = Normalizer(obs_dim)
        hidden = mlp(obs_dim + action_dim, dim, layers, 1, norm=nn.LayerNorm, activation=nn.ReLU)
        self.net = nn.Sequential(*hidden)

    def forward(self, obs, action):
        """(B, obs_dim), (B, h D) -> (B,)"""
        both = torch.cat([self.normalizer(obs), action], dim=1)
        return self.net(both).squeeze(1)


def critic_loss(actor, critics, targets, batch, noise, alpha, discount):
    """sum_j mean valid (Q_j(s, a) - y)^2 / 2,  y = r + discount (1 - d) (mean_j Q'_j(s', a') - alpha log p_c(path')).

    `batch` is what `merge_chunks` returns, `discount` is gamma^h. A chunk is valid if all of it was executed, or if it
    terminates. Actions after a termination were never executed, so a new sample of the policy takes their place: from
    those in the buffer, which belong to the next episode or to play that goes on, Q would learn that they mean success.
    Returns the loss and mean Q.
    """
    obs, action, _, executed, reward, terminated, next_obs = batch
    valid = torch.maximum(terminated, executed[:, -1])
    with torch.no_grad():
        continued = actor.rollout(obs, noise)[0]
        action = actor.normalized(torch.where(executed > 0, action, continued))
        next_action, next_log_prob, _ = actor.rollout(next_obs, noise)
        next_action = actor.normalized(next_action)
        next_q = torch.stack([target(next_obs, next_action) for target in targets]).mean(0)
        y = reward + discount * (1 - terminated) * (next_q - alpha * next_log_prob)
    q = torch.stack([critic(obs, action) for critic in critics])  # (2, B)
    loss = 0.5 * (valid * (q - y).square()).mean(1).sum()
    return loss, q.mean()


def flow_matching_loss(actor, batch, noise, t):
    """mean own ((x1 - x0) - v(t, (1 - t) x0 + t x1, s))^2, x0 = noise (B, D), x1 the data's action before the squash.

    The mean is over batch and dimensions. Flow times t (B, 1) are uniform in [0, 1). Where a chunk runs past the end of
    its episode, the later actions are inputs of v, as in Q-chunking (arXiv 2507.07969), but have no error of their own.
    """
    obs, action, own, *_ = batch
    x1 = actor.unsquash(action)
    v = actor.velocity(t, (1 - t) * noise + t * x1, obs)
    return (own * (x1 - noise - v).square()).mean()


def actor_loss(actor, critics, batch, noise, alpha, beta):
    """mean(alpha log p_c - mean_j Q_j(s, a)) + beta mean own (a - a_data)^2, its gradient through all K steps.

    The last mean is over batch and dimensions, a_data the action of the batch, in [-1, 1] like a. Returns the loss, the
    last term without its beta, mean log p_c, and A_0 to A_K.
    """
    obs, data_action, own, *_ = batch
    action, log_prob, path = actor.rollout(obs, noise)
    action = actor.normalized(action)
    q = torch.stack([critic(obs, action) for critic in critics]).mean(0)
    bc = (own * (action - actor.normalized(data_action)).square()).mean()
    loss = (alpha * log_prob - q).mean() + beta * bc
    return loss, bc, log_prob.mean(), *path


def offline_actor_loss(actor, critics, batch, noise, alpha, beta, x0, t):
    """The sum of `actor_loss` and `flow_matching_loss`. Returns it and everything that both return except the path."""
    loss, bc, log_prob, *_ = actor_loss(actor, critics, batch, noise, alpha, beta)
    matching = flow_matching_loss(actor, batch, x0, t)
    return loss + matching, loss, bc, log_prob, matching


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


def move_average(average, network, weight: float) -> None:
    """Move the parameters of `average` a fraction `weight` of the way to those of `network`."""
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), weight)


def gradient_norms(actor, critics, batch, noise, alpha, beta):
    """Mean over the batch of |dL/dA_i| for i = 0..K, L the actor's loss: the RNN gradient product made visible."""
    loss, _, _, *path = actor_loss(actor, critics, batch, noise.requires_grad_(), alpha, beta)
    gradients = torch.stack(torch.autograd.grad(len(noise[0]) * loss, path))  # (K+1, B, D), the loss's mean undone
    return gradients.norm(dim=2).mean(1)  # (K+1,)


class ReplayBuffer:
    """Ring buffer of single transitions on the training device, from which chunks of successive ones are drawn."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.widths = [obs_dim, action_dim, 1, 1, 1, obs_dim]  # COLUMNS
        self.rows = torch.zeros(capacity, sum(self.widths), device=device)
        self.last = obs_dim + action_dim + 2  # the column that is 1 where no row of the same episode follows
        self.added = 0  # transitions ever added; the next one goes to row added % capacity
        self.size = torch.zeros((), dtype=torch.int64, device=device)  # len(self) where a CUDA graph can read it
        self.data_size = torch.zeros_like(self.size)  # rows of the data, which come first

    def __len__(self) -> int:
        return min(self.added, len(self.rows))

    def add(self, obs, action, reward, terminated, next_obs, follows: bool) -> None:
        """Store one transition; `follows`: whether it continues the episode of the one added before.

        The newest counts as the last of its episode until another follows, so that no chunk runs on into older data.
        """
        row = np.concatenate([obs, action, [reward, terminated, 1], next_obs])  # float64, which the copy rounds
        if follows:
            self.rows[(self.added - 1) % len(self.rows), self.last] = 0
        self.rows[self.added % len(self.rows)] = torch.from_numpy(row)
        self.added += 1
        self.size.fill_(len(self))

    def sample(self, batch_size: int, chunk: int, gamma: float, online_fraction="uniform") -> list[torch.Tensor]:
        """A batch of chunks as `merge_chunks` returns it: uniform, or with this fraction from online experience."""
        start = torch.randint(2**62, (batch_size, 1), device=self.rows.device)
        if online_fraction == "uniform":
            start = start % self.size
        else:
            online = round(online_fraction * batch_size)
            newer = self.data_size + start[:online] % (self.size - self.data_size)
            start = torch.cat([newer, start[online:] % self.data_size])
        index = (start + torch.arange(chunk, device=self.rows.device)) % len(self.rows)
        return merge_chunks(*self.rows[index].split(self.widths, dim=2), gamma)

    def state_dict(self) -> dict:
        """The rows in use, copied unless they are all: torch.save of a view would write the whole buffer.

        On the CPU, since a GPU's allocator would keep the memory of ever larger copies reserved.
        """
        full = len(self) == len(self.rows)
        rows = self.rows[: len(self)].to("cpu", copy=not full)
        return {"rows": rows, "added": self.added, "data_size": int(self.data_size)}

    def load_state_dict(self, state: dict) -> None:
        """Put back what `state_dict` returned."""
        self.rows[: len(state["rows"])].copy_(state["rows"])
        self.added = state["added"]
        self.size.fill_(len(self))
        self.data_size.fill_(state["data_size"])

    def fill(self, data: torch.Tensor) -> None:
        """Replace all rows with those of the data."""
        # Chunks at the end of the data run on into the rows after it, which are zeros in a resumed run.
        self.rows[len(data) : len(self)].zero_()
        self.load_state_dict({"rows": data, "added": len(data), "data_size": len(data)})


def merge_chunks(obs, action, reward, terminated, last, next_obs, gamma: float) -> list[torch.Tensor]:
    """h successive rows of the buffer, (B, h, .) each, as one transition of a chunk of h actions.

    Returns obs (B, obs_dim); action (B, h D); own (B, h D), 1 where an action belongs to the first row's episode;
    executed (B, h D), 1 where, in addition, no earlier action terminates, as in the environment (play data goes on
    after a success); reward (B,), the discounted sum over executed actions; terminated (B,), 1 if one of these
    terminates; next_obs (B, obs_dim), from which a chunk that does not terminate bootstraps.
    """
    reward = reward.squeeze(2)  # (B, h)
    terminated = terminated.squeeze(2)
    last = last.squeeze(2)
    first = torch.ones_like(last[:, :1])
    goes_on = torch.cat([first, 1 - last[:, :-1]], dim=1)
    own = goes_on.cumprod(1)
    survives = torch.cat([first, 1 - terminated[:, :-1]], dim=1)
    executed = own * survives.cumprod(1)
    discount = gamma ** torch.arange(reward.shape[1], device=reward.device)
    reward = (discount * executed * reward).sum(1)
    terminated = (executed * terminated).amax(1)
    own, executed = (mask.repeat_interleave(action.shape[2], dim=1) for mask in (own, executed))
    return [obs[:, 0], action.flatten(1), own, executed, reward, terminated, next_obs[:, -1]]


def main() -> None:
    args, checkpoint = parse_args()
    if args.evaluate:
        return play(args, checkpoint)
    device = torch.device("cuda" if args.cuda else "cpu")
    env = make_env(args)
    eval_env = make_env(args)
    total = args.offline_steps + args.online_steps
    files, data, about_data = find_data(args, env, checkpoint)
    seed_random(args.seed)
    actor, average, critics, targets, buffer = make_networks(args, env, device, about_data)
    log_alpha = nn.Parameter(torch.tensor(args.alpha, device=device).log())  # -inf for alpha 0
    target_entropy = target_entropy_of(args, actor)
    beta = torch.zeros((), device=device)  # filled at each step
    adam = partial(torch.optim.Adam, fused=True, capturable=True)
    actor_optimizer = adam(actor.parameters(), lr=args.actor_lr)
    critic_optimizer = adam(critics.parameters(), lr=args.critic_lr)
    alpha_optimizer = adam([log_alpha], lr=args.alpha_lr)
    losses = nn.Parameter(torch.zeros(len(LOSSES), device=device), requires_grad=False)  # for `scalars`, to be saved
    generators = Generators(device, env)
    # All that decides how a run continues from an episode's end, if the environment's only state is its generator.
    state = dict(
        actor=actor, average=average, critics=critics, targets=targets, actor_optimizer=actor_optimizer,
        critic_optimizer=critic_optimizer, alpha_optimizer=alpha_optimizer,
        scalars=nn.ParameterDict(dict(log_alpha=log_alpha, losses=losses)), buffer=buffer, generators=generators,
    )  # fmt: skip
    with explained(f"--env-id {args.env_id}: its reset failed"):
        env.reset(seed=args.seed)
    generators.action_space.seed(args.seed)
    if checkpoint:
        with explained(f"--resume {args.resume}: it was altered, is of an older version, or not for {args.env_id} now"):
            for name, part in state.items():
                part.load_state_dict(checkpoint.pop(name))  # pop: the buffer's is large
    else:
        buffer.fill(data)
        del data
        describe_data(buffer, files[0] if files else args.env_id, args.chunk)
    if args.rescale_actions:
        env = rescaled(env, actor)
        eval_env = rescaled(eval_env, actor)
    run = Run(args, total, checkpoint, files)
    progress = run.progress
    progress.data_statistics = about_data

    jit = find_compiler(device) if args.compile else unchanged
    graph = CudaGraph if args.compile and args.cuda else unchanged
    set_matmul_precision(device)
    choose = compiled_policy(actor, jit, graph)
    choose_averaged = compiled_policy(average, jit, graph)
    critic_gradients = jit(with_gradients(critic_loss, critics))
    actor_gradients = jit(with_gradients(actor_loss, actor))
    offline_actor_gradients = jit(with_gradients(offline_actor_loss, actor))

    def update(offline: bool) -> None:
        batch = buffer.sample(args.batch_size, args.chunk, args.gamma, "uniform" if offline else args.online_fraction)
        noise = actor.draw_noise(args.batch_size)
        alpha = log_alpha.detach().exp()
        discount = args.gamma**args.chunk
        loss, q, gradients = critic_gradients(actor, critics, targets, batch, noise, alpha, discount)
        apply_gradients(critic_optimizer, gradients)
        move_average(targets, critics, args.tau)
        record(losses, qf_loss=loss, qf_values=q)

        noise = actor.draw_noise(args.batch_size)
        if offline:
            x0 = torch.randn_like(noise[0])
            t = torch.rand(args.batch_size, 1, device=device)
            _, loss, bc, log_prob, matching, gradients = offline_actor_gradients(
                actor, critics, batch, noise, alpha, beta, x0, t
            )
        else:
            loss, bc, log_prob, gradients = actor_gradients(actor, critics, batch, noise, alpha, beta)
            matching = torch.zeros_like(loss)
        apply_gradients(actor_optimizer, gradients)
        move_average(average, actor, 1 - args.actor_average)
        loss_alpha = alpha_loss(log_alpha, log_prob, target_entropy)
        if args.autotune:
            apply_gradients(alpha_optimizer, torch.autograd.grad(loss_alpha, [log_alpha]))
        record(losses, actor_loss=loss, flow_matching=matching, bc=bc)
        record(losses, alpha_loss=loss_alpha.detach(), alpha=alpha, entropy=-log_prob, alpha_log_prob=alpha * log_prob)

    update_offline = graph(partial(update, offline=True))  # no inputs or outputs: all is in persistent tensors
    update_online = graph(partial(update, offline=False))

    with run, env, eval_env:
        done = True
        while progress.step < total:
            online = progress.step >= args.offline_steps
            beta.fill_(args.online_beta if online else args.beta)
            if online:
                if done:
                    obs = to_obs(env.reset()[0])
                    queue = []
                if not queue:
                    queue = list(choose(obs).reshape(-1, env.action_space.low.size))
                action = queue.pop(0)
                run.check_finite(observation=obs, action=action)
                next_obs, reward, terminated, truncated, info = env.step(to_action(action, env.action_space))
                next_obs = to_obs(next_obs)
                progress.step += 1
                run.check_finite(reward=reward, observation=next_obs)  # before it is stored
                buffer.add(obs, action, reward, terminated, next_obs, follows=not done)
                obs = next_obs
                done = terminated or truncated
            else:
                if progress.step and progress.step % args.rotate_every == 0 and len(files) > 1:
                    file = files[progress.step // args.rotate_every % len(files)]
                    buffer.fill(load_data(file, eval_env, args))
                progress.step += 1
            run.bar.update()

            if not online or progress.step - args.offline_steps > args.online_start:
                for _ in range(args.utd if online else 1):
                    (update_online if online else update_offline)()
                    progress.updates += 1
                    run.log_update(losses)
                if progress.step % 1000 == 0:
                    log_gradient_norms(run, actor, critics, buffer, generators, log_alpha.detach().exp(), beta)

            if progress.step % 100 == 0:
                run.write_scalars("charts/", {"online": float(online)})
            if online and done:
                run.end_episode(info)
            if progress.step % args.eval_every == 0 or progress.step in (args.offline_steps, total):
                score(run, choose_averaged, eval_env, generators)
            if progress.step == total or (done and run.should_save()):
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
        may_change += ["seed"] if args.evaluate else "online_steps save_every eval_every track".split()
        for name, old in vars(saved).items():
            new = getattr(args, name)
            if name == "env_kwargs" and read_kwargs(new).items() <= read_kwargs(old).items():
                args.env_kwargs = new = old  # these include those of robosuite's file
            if new != old and name not in may_change:
                fail(f"{flag(name)} {new} conflicts with {old} of {folder}: drop the flag")
        if args.resume and args.offline_steps + args.online_steps <= checkpoint["progress"]["step"]:
            fail(f"{folder} has reached step {checkpoint['progress']['step']}: raise --online-steps to continue")
    elif args.run_name and os.path.exists(folder := Path("runs") / args.run_name):
        resume = f", or --resume {folder}" if os.path.isfile(folder / "checkpoint.pt") else ""
        fail(f"--run-name {args.run_name}: {folder} exists: remove it or take another name{resume}")
    task = args.env_id.split("-play")[0]
    if args.beta is None:
        args.beta = BETA.get("lift" if args.env_id.startswith("robosuite/") else task, 100)
    args.online_beta = args.beta if args.online_beta is None else args.online_beta
    if args.sparse is None:
        args.sparse = "-singletask" in args.env_id and task.startswith(("scene", "puzzle-3x3"))

    rules = [
        ("resume|evaluate|run_name|dataset", lambda name: name != "", "a name (a shell variable was empty?)"),
        ("seed|collect|offline_steps|online_st.*", lambda n: 0 <= n < 2**32, "0 or more, and below 2^32"),
        (".*_(size|dim|layers|episodes|every)|flow_steps|chunk|utd", lambda n: n >= 1, "1 or more"),
        (".*_lr|sigma", lambda x: 0 < x < math.inf, "above 0 and finite"),
        ("alpha|beta|online_beta", lambda x: 0 <= x < math.inf, "0 or more and finite"),
        ("gamma", lambda x: 0 <= x <= 1, "in [0, 1]"),
        ("online_fraction", lambda x: x == "uniform" or 0 <= x <= 1, "in [0, 1] or uniform"),
        ("actor_average", lambda x: 0 <= x < 1, "in [0, 1)"),
        ("tau", lambda x: 0 < x <= 1, "in (0, 1]"),
        ("target_entropy", math.isfinite, "finite"),
        ("cuda", lambda on: torch.cuda.is_available() or not on, "off where torch finds no CUDA device (--no-cuda)"),
    ]
    for names, holds, requirement in rules:
        for name, value in vars(args).items():
            if value is not None and re.fullmatch(names, name) and not holds(value):
                fail(f"{flag(name)} must be {requirement}, not {value!r}")
    if args.capture_video and not args.evaluate:
        fail("--capture-video needs --evaluate")
    if args.offline_steps + args.online_steps == 0:
        fail("--online-steps must be above 0 if --offline-steps is 0")
    if 0 < args.online_steps <= args.online_start:
        what = f"--online-steps {args.online_steps} ends before the first update"
        fail(f"{what}: raise it above --online-start {args.online_start}")
    if not (args.resume or args.evaluate):
        package = benchmark_of(args.env_id, args.dataset)
        if args.obs_keys and package not in ("robosuite", "pyarrow"):
            fail("--obs-keys is for robomimic's files and LeRobot's data sets: drop the flag")
        if args.sparse and package != "ogbench":
            fail("--sparse is for OGBench: drop the flag")
    if args.collect and (args.dataset or not has_experts(args.env_id)):
        fail("--collect is for lift, can, square and OGBench's play sets, without --dataset")
    if args.target_entropy is not None and not args.autotune:
        fail("--target-entropy needs --autotune, which pursues it: drop one of the flags")
    if args.online_fraction not in (0, "uniform") and not round(args.online_fraction * args.batch_size):
        fail(f"--online-fraction {args.online_fraction} of --batch-size {args.batch_size} is no chunk: raise it")
    if args.learn_sigma and not math.exp(-5) < args.sigma < math.exp(2):
        fail(f"--sigma must be in (0.0068, 7.38), the range of a learned one, not {args.sigma}")
    if args.autotune and not (args.learn_sigma and args.alpha > 0):
        fail("--autotune needs --learn-sigma, as no fixed sigma meets a target, and --alpha above 0: add --no-autotune")
    return args, checkpoint


def read_kwargs(text: str | None) -> dict:
    """--env-kwargs; stops the program if it is not the JSON of a dict."""
    with explained(f"--env-kwargs {text}: not the JSON of a dict"):
        return dict(**json.loads(text or "{}"))


def make_actor(args: Args, obs_dim: int, action_low, action_high) -> Actor:
    """The actor that the flags describe."""
    velocity = {
        "gated": partial(GatedVelocity, dim=args.velocity_dim, layers=args.velocity_layers, gate_dim=args.gate_dim),
        "plain": partial(PlainVelocity, dim=args.velocity_dim, layers=args.velocity_layers),
        # Not contractive, unlike in sac_flow_t.py: whether that helps after cloning has not been measured.
        "decoded": partial(DecodedVelocity, dim=args.decoder_dim, layers=args.decoder_layers, contractive=False),
    }[args.velocity]
    return Actor(
        obs_dim, action_low, action_high, chunk=args.chunk, velocity=velocity, flow_steps=args.flow_steps,
        score_step=args.score_step, sigma=args.sigma, learn_sigma=args.learn_sigma, sigma_dim=args.sigma_dim,
    )  # fmt: skip


def data_statistics(data: torch.Tensor, env: gym.Env) -> dict:
    """Number of rows; mean and deviation of the data's observations, low and high of its actions, as lists.

    A deviation below 1e-4 counts as that of a constant, and is set to 1.
    """
    obs_dim = env.observation_space.shape[0]
    deviation, mean = torch.std_mean(data[:, :obs_dim], dim=0)
    low, high = data[:, obs_dim : obs_dim + env.action_space.low.size].aminmax(dim=0)
    deviation = torch.where(deviation > 1e-4, deviation, 1)
    return dict(rows=len(data), mean=mean.tolist(), deviation=deviation.tolist(), low=low.tolist(), high=high.tolist())


def bounds_of(args: Args, env: gym.Env, about_data: dict) -> tuple[np.ndarray, np.ndarray]:
    """The policy's action bounds, low and high: the environment's or, with --rescale-actions, the data's."""
    space = env.action_space
    own_low = space.low.ravel()
    own_high = space.high.ravel()
    if not args.rescale_actions:
        return own_low, own_high
    low = np.array(about_data["low"])
    high = np.array(about_data["high"])
    print(f"--rescale-actions: the data's actions are from {low} to {high}", file=sys.stderr)
    constant = high - low <= 1e-6 * np.maximum(abs(low), abs(high))  # up to rounding
    if constant.any():
        which = ", ".join(map(str, np.flatnonzero(constant)))
        bounds = "the environment's if these hold it, else that value +-1"
        note(f"action {which} is always the same in the data: its bounds are {bounds}")
    own = constant & np.isfinite(extent_of(space)).ravel() & (own_low <= low) & (high <= own_high)
    return np.where(own, own_low, low - constant), np.where(own, own_high, high + constant)


def make_networks(args: Args, env: gym.Env, device: torch.device, about_data: dict):
    """Networks and buffer for the flags, environment and data; stops the program if these do not fit together.

    Returns the actor, its average, two critics, their target networks and an empty buffer, with room for all that the
    run will store: it cannot grow later, as CUDA graphs need it to stay at its address.
    """
    obs_dim = env.observation_space.shape[0]
    action_dim = env.action_space.low.size
    low, high = bounds_of(args, env, about_data)
    rows = about_data["rows"] + args.online_steps
    if args.online_fraction != "uniform" and rows > args.buffer_size:
        remedy = f"raise --buffer-size to {rows}, or --online-fraction uniform"
        if args.resume:
            remedy = f"this run has room for --online-steps {args.buffer_size - about_data['rows']}"
        fail(f"--online-fraction tells data from experience by their place in the buffer: {remedy}")
    rows += args.chunk  # chunks run on into zeros until the ring is full
    with explained("cannot make the buffer (--buffer-size) or networks (--critic-dim and the like)"):
        actor = make_actor(args, obs_dim, low, high)
        of_critic = obs_dim, actor.action_dim, args.critic_dim, args.critic_layers
        critics = nn.ModuleList(Critic(*of_critic) for _ in range(2))
        if args.normalize_observations:
            for network in (actor, *critics):
                network.normalizer.mean.copy_(torch.tensor(about_data["mean"]))
                network.normalizer.deviation.copy_(torch.tensor(about_data["deviation"]))
        average = copy.deepcopy(actor).requires_grad_(False)
        targets = copy.deepcopy(critics).requires_grad_(False)
        networks = [network.to(device) for network in (actor, average, critics, targets)]
        return *networks, ReplayBuffer(min(rows, args.buffer_size), obs_dim, action_dim, device)


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
    """offline updates and environment steps, together"""
    updates: int = 0
    """updates of the critics"""
    seconds: float = 0.0
    """time spent training, without evaluations"""
    files: list = field(default_factory=list)
    """the files that hold the data"""
    data_statistics: dict = field(default_factory=dict)
    """the `data_statistics` of the first file, but with the rows of the largest and the action bounds of all"""
    rows: dict = field(
        default_factory=lambda: {
            "returns.csv": [["step", "return", "length", "success", "seconds"]],
            "eval.csv": [["step", "phase", "kind", *SCORES, "episodes", "seconds"]],
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
    the folder at the same time.
    """

    def __init__(self, args: Args, total: int, checkpoint: dict | None, files: list[str]):
        self.args = args
        self.total = total  # steps
        self.folder = Path(args.resume) if args.resume else new_folder(args)
        self.progress = Progress(**checkpoint["progress"]) if checkpoint else Progress(files=files)
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
            flags = json.dumps(asdict(args) | {"files": self.progress.files}, indent=2)
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
        self.write_row("returns.csv", float(episode["r"]), episode["l"], succeeded(info))

    def report(self, phase: str, scores: dict[str, float]) -> None:
        """Record an evaluation."""
        self.write_scalars("eval/", scores)
        shown = [f"{value:.5g}" for value in scores.values()]
        self.write_row("eval.csv", phase, "stochastic", *shown, self.args.eval_episodes)
        tqdm.write(f"step {self.progress.step}, {phase}: {describe(scores)}")
        sys.stdout.flush()

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
    args = Args(**state["args"])
    bounds = torch.ones(len(state["actor"]["scale"]) // args.chunk)  # the true ones are in the state
    actor = make_actor(args, state["obs_dim"], -bounds, bounds)
    actor.load_state_dict(state["actor"])
    return actor.eval().requires_grad_(False)


def load_policy(path: str) -> Actor:
    """The actor of a policy file, or of a run's folder, frozen: its `act(obs)` returns chunks (B, h D).

    Stops the program (SystemExit) if there is none, or if it is damaged or another script's.
    """
    return build_policy(read_policy(Path(path)))


def play(args: Args, policy: dict) -> None:
    """Play a saved policy and print its returns; --capture-video writes videos."""
    with explained(f"--evaluate {args.evaluate}: it was altered, or there is no memory for it"):
        actor = build_policy(policy).to("cuda" if args.cuda else "cpu")
    env = make_env(args, "rgb_array" if args.capture_video else None)
    path = Path(args.evaluate)
    if args.capture_video:
        first = lambda episode: episode % args.eval_episodes == 0  # noqa: E731  of each kind
        folder, name = (path.parent, path.stem) if path.is_file() else (path, "policy")
        env = record_videos(env, folder, f"evaluation-of-{name}", first)
    if env.observation_space.shape != (actor.obs_dim,) or env.action_space.low.size * args.chunk != actor.action_dim:
        fail(f"--evaluate {path}: it was trained on other observations or actions than {args.env_id} has now")
    env = rescaled(env, actor) if args.rescale_actions else env
    choose = compiled_policy(actor, jit=unchanged, graph=unchanged)
    print(f"{path} at step {policy['step']}, {args.eval_episodes} episodes of each kind", flush=True)
    with explained(f"--evaluate {path}"), env:
        for kind in ("deterministic", "stochastic"):
            seed_random(args.seed)
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


def benchmark_of(env_id: str, dataset: str | None = None) -> str:
    """The package that reads the data: robosuite, ogbench, minari; gymnasium for your own files, pyarrow for LeRobot.

    Stops the program if it is not installed.
    """
    if env_id in ROBOSUITE or env_id.startswith("robosuite/"):
        package = "robosuite"
    elif "-singletask" in env_id:
        package = "ogbench"
    elif not dataset:
        package = "minari"
    else:
        path = Path(os.path.expanduser(dataset))
        own = path.suffix in (".npz", ".hdf5", ".h5") or os.path.isdir(path) and any(path.glob("*.npz"))
        own = own or ":" in env_id or env_id in gym.registry  # a run can be resumed after its data is gone
        package = "pyarrow" if is_lerobot(path) else "gymnasium" if own else "minari"
    warnings.filterwarnings("ignore", module="gymnasium|minari|robosuite")
    logging.getLogger("robosuite_logs").disabled = True  # its notes on missing parts that are not needed
    try:
        __import__(package)
        if package in ("robosuite", "minari") or dataset and dataset.endswith((".hdf5", ".h5")):
            __import__("h5py")
    except ImportError as error:
        install = "pip install -r requirements.txt -r benchmark/demonstrations/requirements.txt"
        fail(f"--env-id {env_id} needs {error.name or package}: {install}")
    return package


def is_lerobot(path: Path) -> bool:
    """Whether a folder holds a LeRobot data set."""
    return os.path.isfile(path / "meta" / "info.json")  # Path.is_file raises on some paths


def has_experts(env_id: str) -> bool:
    """Whether benchmark/demonstrations has a scripted expert for the task."""
    return env_id in ROBOSUITE or "-play-singletask" in env_id


def play_set(env_id: str) -> str:
    """The OGBench data set of a task: cube-single-play-v0 for each of its singletask environments."""
    return re.sub(r"-singletask(-task\d)?", "", env_id)


def robosuite_task(env_id: str) -> tuple[str, int]:
    """robosuite's name for lift, can, square or robosuite/<name>, and the steps after which an episode is truncated."""
    name = env_id.removeprefix("robosuite/")
    return ROBOSUITE.get(env_id, (name, 700 if name in ("ToolHang", "TwoArmTransport") else 400))


def robomimic_kwargs(path: str, env_id: str) -> dict:
    """The environment's arguments as a robomimic file states them; stops the program if they do not work here."""
    import h5py
    import robosuite

    here = robosuite.__version__
    with explained(f"{path} is truncated, corrupted or of another format"), h5py.File(path) as file:
        env_args = json.loads(file["data"].attrs.get("env_args", "{}")) or {}
        kwargs = env_args.get("env_kwargs") or {}
        version = str(env_args.get("env_version") or here)
        controllers = kwargs.get("controller_configs") or {"body_parts": {}}  # robosuite's default for the robot
        controller = controllers[0] if isinstance(controllers, list) else controllers
        kind = controller.get("type")
    name, _ = robosuite_task(env_id)
    remedy = "name another --dataset"
    if name in ("PickPlace", "NutAssembly", "Wipe"):
        fail(f"--env-id {env_id}: its reward does not tell success, as it is paid for parts of the task: name another")
    if env_args.get("env_name", name) != name:
        fail(f"{path} is of {env_args['env_name']}, not of --env-id {env_id}: {remedy}")
    if version.split(".")[:2] != here.split(".")[:2]:
        fail(f"{path} was made with robosuite {version}, but {here} is installed: {remedy}, or install that version")
    if "body_parts" not in controller:
        fail(f"{path} has a controller from before robosuite 1.5 ({kind}), but {here} is installed: {remedy}")
    if kwargs.get("reward_shaping"):
        fail(f"{path} has shaped rewards, none of which marks success: {remedy}")
    return kwargs


class RobosuiteEnv(gym.Env):
    """A robosuite task with robomimic's low-dim observation; reward 0 at success, which terminates, else -1.

    `kwargs` are robosuite's own, as a data file records them.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(
        self, task: str, render_mode: str | None = None, max_episode_steps: int | None = None,
        obs_keys=OBS_KEYS, **kwargs,
    ):  # fmt: skip
        import robosuite

        name, horizon = robosuite_task(task)
        self.horizon = max_episode_steps or horizon
        self.obs_keys = obs_keys
        self.render_mode = render_mode
        headless = dict(has_renderer=False, has_offscreen_renderer=render_mode == "rgb_array", use_camera_obs=False)
        self.env = robosuite.make(name, **{"robots": "Panda", **kwargs, **headless, "ignore_done": True, "seed": 0})
        # robosuite draws all random numbers from this generator and seeds it once; `reset(seed=...)` sets its state.
        self._np_random = self.env.rng
        names = {"object", *self.env._get_observations()}
        if not names.issuperset(obs_keys):
            raise ValueError(f"--obs-keys {' '.join(obs_keys)} must be among {', '.join(sorted(names))}")
        low, high = self.env.action_spec
        self.action_space = gym.spaces.Box(low.astype(np.float32), high.astype(np.float32))
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, self.reset()[0].shape, np.float64)

    def _obs(self, obs: dict) -> np.ndarray:
        return np.concatenate([obs["object-state" if key == "object" else key] for key in self.obs_keys])

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.env.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
        self.t = 0
        self.env.reset()
        # What reset() returns still lacks the object's pose in the gripper's frame.
        return self._obs(self.env._get_observations(force_update=True)), {}

    def step(self, action):
        obs, reward, _, _ = self.env.step(action)
        self.t += 1
        success = reward > 0
        return self._obs(obs), float(success) - 1, success, self.t >= self.horizon, {"success": success}

    def render(self):
        return self.env.sim.render(height=256, width=256, camera_name="agentview")[::-1]

    def close(self):
        self.env.close()


def extent_of(space: gym.spaces.Box) -> np.ndarray:
    """high - low in float32, infinite where that overflows."""
    with np.errstate(over="ignore"):
        return space.high.astype(np.float32) - space.low.astype(np.float32)


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """The task as a gymnasium environment, with one-line errors for those that do not exist or cannot be controlled."""
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform == "linux" and not display:
        os.environ.setdefault("MUJOCO_GL", "egl" if render_mode else "disabled")
    package = benchmark_of(args.env_id, args.dataset)
    kwargs = read_kwargs(args.env_kwargs)
    if package == "robosuite" and not (args.resume or args.evaluate):
        kwargs = robomimic_kwargs(str(find_dataset(args)[0]), args.env_id) | kwargs
        if kwargs.get("reward_shaping"):
            fail("--env-kwargs: no shaped reward says success: drop reward_shaping")
        args.env_kwargs = json.dumps(kwargs)  # kept with the run, which can then do without the file
    kwargs |= {"render_mode": render_mode} if render_mode else {}
    with explained(f"--env-id {args.env_id}"):
        if package == "robosuite":
            env = RobosuiteEnv(args.env_id, obs_keys=args.obs_keys or OBS_KEYS, **kwargs)
        elif package == "ogbench":
            import ogbench

            env = ogbench.make_env_and_datasets(args.env_id, env_only=True, **kwargs)
            if args.sparse:
                env = gym.wrappers.TransformReward(env, lambda reward: -float(reward != 0))
        elif package == "minari":
            env = minari_dataset(args).recover_environment(**{"eval_env": True, **kwargs})  # if it names one
        else:
            env = gym.make(args.env_id, **kwargs)
        endless = package != "robosuite" and env.spec.max_episode_steps is None
        if endless:  # an endless episode would put off checkpoints, too
            env = gym.wrappers.TimeLimit(env, 10_000)
        env = gym.wrappers.RecordEpisodeStatistics(env, stats_key=EPISODE)
        if isinstance(env.observation_space, gym.spaces.Dict):
            env = gym.wrappers.FlattenObservation(env)  # outermost: `data_space` looks for it there
    obs = env.observation_space
    action = env.action_space
    if not isinstance(obs, gym.spaces.Box) or len(obs.shape) != 1:
        fail(f"--env-id {args.env_id}: observations must be a Box of one dimension, not {obs}; wrap the environment")
    if not isinstance(action, gym.spaces.Box) or not np.issubdtype(action.dtype, np.floating):
        fail(f"--env-id {args.env_id}: actions must be a Box of real numbers, not {action}; wrap the environment")
    extent = extent_of(action)
    if not (extent.size and (extent > 0).all()) or not (np.isfinite(extent).all() or args.rescale_actions):
        remedy = "wrap the environment, or use the data's bounds with --rescale-actions"
        fail(f"--env-id {args.env_id}: every action needs finite bounds, low < high, not {action}; {remedy}")
    if env.has_wrapper_attr("obs_rms") or env.has_wrapper_attr("return_rms"):
        fail(f"--env-id {args.env_id}: what NormalizeObservation or NormalizeReward saw is not saved; drop the wrapper")
    if render_mode == "rgb_array":
        with explained("--capture-video needs moviepy (pip install -r benchmark/requirements.txt) and EGL"):
            import moviepy  # noqa: F401

            env.reset(seed=0)
            env.render()
            if package == "ogbench":  # its manipulation tasks leave this None, which RecordVideo would refuse
                env.unwrapped.render_mode = render_mode
    if endless:
        limit = """--env-kwargs '{"max_episode_steps": 1000}'"""
        note(f"{args.env_id} registers no time limit: episodes are truncated at 10 000 steps, or as {limit} says")
    return env


def rescaled(env: gym.Env, actor: Actor) -> gym.Env:
    """`env` with the policy's action bounds: mapped to its own, or unchanged where it has none."""
    space = env.action_space
    bounds = torch.stack([actor.bias - actor.scale, actor.bias + actor.scale])
    bounds = bounds[:, : space.low.size].cpu().numpy()  # of one action of the chunk
    low, high = bounds.reshape(2, *space.shape).astype(space.dtype)
    finite = np.isfinite(extent_of(space))
    box_low = np.where(finite, space.low, low)
    box_high = np.where(finite, space.high, high)
    box = gym.spaces.Box(box_low, box_high, dtype=space.dtype)
    clipped = gym.wrappers.TransformAction(env, lambda action: np.clip(action, box.low, box.high), box)
    return gym.wrappers.RescaleAction(clipped, low, high)


def record_videos(env: gym.Env, folder: Path, prefix: str, episodes=None) -> gym.Env:
    """Write episodes to MP4 files in `folder`/videos: those that `episodes` selects, by default gymnasium's choice."""
    with explained(f"--capture-video: cannot write to {folder / 'videos'}"):
        return gym.wrappers.RecordVideo(env, str(folder / "videos"), episodes, name_prefix=prefix, disable_logger=True)


def collect(args: Args, looked: list[Path], advice: str) -> Path:
    """Collect data into data/, as benchmark/demonstrations does, if --collect or the task's default allows it."""
    episodes = args.collect if args.collect is not None else 100 if args.env_id in ROBOSUITE else 0
    suffix = ".hdf5" if args.env_id in ROBOSUITE else ".npz"
    name = play_set(args.env_id)
    places = ", ".join(map(str, looked))
    experts = ", or --collect 100 episodes" if has_experts(args.env_id) else ""
    path = Path("data") / f"{name}-{episodes}{suffix}"
    if episodes and path.is_file():
        return path
    if not episodes:
        fail(f"no data for --env-id {args.env_id} at {places}: {advice}name it with --dataset{experts}")
    print(f"no data at {places} or {path}: collecting {episodes} scripted episodes", file=sys.stderr)
    program = Path(__file__).parent / "benchmark" / "demonstrations" / "collect.py"
    flags = ["--env-id", name, "--episodes", str(episodes), "--seed", "1", "--out", str(path)]
    try:
        made = program.is_file() and subprocess.run([sys.executable, str(program), *flags]).returncode == 0
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # the collector has said what it keeps
    if not made:
        fail(f"--collect: {program} did not make {path}; run it to see why, or name the data with --dataset")
    return path


def find_dataset(args: Args) -> list[Path]:
    """The files with the task's data (if several, they are used in turn); none for Minari, which finds its own."""
    if benchmark_of(args.env_id, args.dataset) == "minari":
        return []
    if args.dataset:
        path = Path(os.path.expanduser(args.dataset))
        files = [path]
        if os.path.isdir(path) and not is_lerobot(path):
            files = sorted(file for file in path.glob("*.npz") if not file.stem.endswith("-val"))
        if not files or not os.path.exists(files[0]):
            fail(f"--dataset {path}: {'no .npz file in this folder' if not files else 'no such file or folder'}")
        return files
    advice = ""
    if benchmark_of(args.env_id) == "robosuite":
        folder = Path.home() / ".robomimic" / args.env_id
        published = [folder / kind / "low_dim_v15.hdf5" for kind in ("mh", "ph")]
        advice = "download robomimic's low_dim_v15.hdf5 there or "
    else:
        import ogbench

        name = play_set(args.env_id)
        published = [Path.home() / ".ogbench" / "data" / f"{name}.npz"]
        if not published[0].is_file() and not args.collect:
            with contextlib.suppress(OSError):  # no network, or nothing of this name
                ogbench.utils.download_datasets([name])
    found = [path for path in published if path.is_file()]
    return found[:1] or [collect(args, published, advice)]


def minari_dataset(args: Args):
    """The Minari data set, downloaded if need be and possible."""
    import minari

    if not re.search(r"-v\d+$", args.env_id) or "-play-" in args.env_id:
        examples = "cube-double-play-singletask-task2-v0 of OGBench, mujoco/hopper/medium-v0 of Minari"
        own = "and with --dataset FILE.npz or FILE.hdf5 any gymnasium id"
        fail(f"--env-id {args.env_id}: no such task; there are {', '.join(ROBOSUITE)}, {examples} and the like, {own}")
    if args.dataset:
        os.environ["MINARI_DATASETS_PATH"] = os.path.expanduser(args.dataset)
    try:
        return minari.load_dataset(args.env_id, download=True)  # if it is not there
    except Exception as error:
        where = os.environ.get("MINARI_DATASETS_PATH", Path.home() / ".minari" / "datasets")
        make = f"python benchmark/demonstrations/collect.py --env-id {args.env_id} --policy runs/<name>"
        what = f"no such task, nor Minari data set in {where} ({first_line(error)})"
        if args.resume or args.evaluate:
            fail(f"{args.resume or args.evaluate} plays in the environment of its data, {args.env_id}: {what}")
        fail(f"--env-id {args.env_id}: {what}; make one: {make}; or name your own with --dataset FILE.npz or FILE.hdf5")


def joined(episodes: list[dict]) -> dict:
    """The arrays of several episodes end to end, with `last`, True on the last row of each."""
    for episode in episodes:
        steps = len(episode["reward"])
        episode["last"] = np.arange(steps) == steps - 1
    if not episodes:
        return {}
    return {key: np.concatenate([episode[key] for episode in episodes]) for key in COLUMNS}


def read_robomimic(path: str, keys: tuple[str, ...]) -> dict:
    """Arrays of a robomimic low-dim file, see `load_data`."""
    import h5py

    episodes = []
    with h5py.File(path) as file:
        for name in sorted(file["data"], key=lambda name: int(name.removeprefix("demo_"))):  # demo_10 after demo_9
            demo = file["data"][name]
            reward = demo["rewards"][:].astype(np.float32)  # above 0 at success
            arrays = {
                "obs": np.concatenate([demo["obs"][key][:] for key in keys], axis=1),
                "action": demo["actions"][:],
                "reward": np.sign(reward) - 1,
                "terminated": reward > 0,  # `dones` is also 1 at a demonstration's end, which is no termination
                "next_obs": np.concatenate([demo["next_obs"][key][:] for key in keys], axis=1),
            }
            episodes.append(arrays)
    return joined(episodes)


def read_ogbench(path: str, env: gym.Env, args: Args) -> dict:
    """Arrays of an OGBench play file with the rewards of the task, see `load_data`."""
    import ogbench

    with np.load(path) as file:
        if not file["terminals"].any():
            return {}  # the reader below would take the file's end for an episode's
        if not np.isfinite(file["qpos"]).all():
            raise ValueError("qpos has NaN or infinite values")
    data = ogbench.utils.load_dataset(str(path), add_info=True)
    ogbench.relabel_utils.relabel_dataset(args.env_id, env, data)
    reward = -(data["rewards"] != 0).astype(np.float32) if args.sparse else data["rewards"]
    return dict(
        obs=data["observations"], action=data["actions"], reward=reward, terminated=data["masks"] == 0,
        last=data["terminals"] == 1, next_obs=data["next_observations"],
    )  # fmt: skip


def read_minari(dataset, space: gym.Space) -> dict:
    """Arrays of a Minari data set, see `load_data`."""
    episodes = []
    for episode in dataset.iterate_episodes():
        obs = flattened(space, episode.observations)
        arrays = dict(obs=obs[:-1], action=episode.actions, reward=episode.rewards, next_obs=obs[1:])
        episodes.append(arrays | dict(terminated=episode.terminations))
    return joined(episodes)


def data_space(env: gym.Env) -> gym.Space:
    """The space of an environment's observations as the data has them, before `make_env` flattens them."""
    while isinstance(env, gym.wrappers.TransformAction):  # of --rescale-actions
        env = env.env
    return (env.env if isinstance(env, gym.wrappers.FlattenObservation) else env).observation_space


def flattened(space: gym.Space, obs) -> np.ndarray:
    """Observations as (N, .); those of a dict space, given as dicts of arrays, are joined as by FlattenObservation."""
    if not isinstance(space, gym.spaces.Dict):
        return obs
    parts = []
    for key, part in space.items():
        values = flattened(part, obs[key])
        if not isinstance(part, (gym.spaces.Dict, gym.spaces.Box)):
            values = np.stack([gym.spaces.flatten(part, value) for value in values])
        width = math.prod(np.shape(values)[1:])
        parts.append(np.reshape(values, (len(values), width)))
    return np.concatenate(parts, axis=1)


def read_d4rl(path: str, space: gym.Space) -> dict:
    """D4RL's arrays in an .npz or .hdf5 file; the entries of a dict space are named observations/<key>."""
    if path.endswith(".npz"):
        opened = np.load(path)
    else:
        import h5py

        opened = h5py.File(path)
    with opened as file:

        def read(name: str, space: gym.Space | None = None):
            if isinstance(space, gym.spaces.Dict):
                return {key: read(f"{name}/{key}", part) for key, part in space.items()}
            return file[name][:]

        arrays = {name: read(name) for name in ("actions", "rewards", "terminals", "timeouts")}
        arrays["observations"] = flattened(space, read("observations", space))
        if any(name.split("/")[0] == "next_observations" for name in file):
            arrays["next_observations"] = flattened(space, read("next_observations", space))
    return arrays


def read_lerobot(folder: Path, keys: tuple[str, ...]) -> dict:
    """D4RL's arrays of a LeRobot data set, version 3; an episode's end by itself counts as a timeout.

    Terminations are next.success if there is one, else next.done, which many data sets set at every episode's end.
    """
    import pyarrow.dataset

    version = json.loads((folder / "meta" / "info.json").read_text())["codebase_version"]
    if not version.startswith("v3."):
        raise ValueError(f"LeRobot's {version}, not v3")
    stored = pyarrow.dataset.dataset(folder / "data", format="parquet")
    ends = "next.success" if "next.success" in stored.schema.names else "next.done"
    names = [*keys, "action", "next.reward", ends, "episode_index", "index"]  # and no images
    if missing := set(names) - set(stored.schema.names):
        raise KeyError(", ".join(missing))
    table = stored.to_table(columns=names).sort_by("index")
    column = lambda name: np.stack(table[name].to_numpy()).reshape(len(table), -1)  # noqa: E731
    episode = column("episode_index")[:, 0]
    return dict(
        observations=np.concatenate([column(key) for key in keys], axis=1), actions=column("action"),
        rewards=column("next.reward"), terminals=column(ends), timeouts=episode != np.append(episode[1:], -1),
    )  # fmt: skip


def from_d4rl(arrays: dict) -> dict:
    """D4RL's arrays as `load_data` has them; the end of the last episode counts as a timeout.

    Without next_observations, a step that ends in a timeout has no known next observation and is left out.
    """
    lengths = {name: len(values) for name, values in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"its arrays differ in length: {lengths}")
    if not lengths["actions"]:
        raise ValueError("it holds no step")
    terminated = np.asarray(arrays["terminals"], np.float64).reshape(-1)
    timeout = np.asarray(arrays["timeouts"], np.float64).reshape(-1)
    if np.isnan([terminated.sum(), timeout.sum()]).any():
        raise ValueError("its terminals or timeouts have NaN")
    terminated = terminated > 0
    last = terminated | (timeout > 0)
    last[-1] = True
    obs = arrays["observations"]
    data = dict(obs=obs, action=arrays["actions"], reward=arrays["rewards"], terminated=terminated, last=last)
    if "next_observations" in arrays:
        return data | dict(next_obs=arrays["next_observations"])
    known = terminated | ~last
    data["last"] = last | np.append(~known[1:], False)  # the step before one that is left out
    data["next_obs"] = np.roll(obs, -1, axis=0)
    return {key: values[known] for key, values in data.items()}


def load_data(path: str | None, env: gym.Env, args: Args) -> torch.Tensor:
    """One data file as rows of `ReplayBuffer`, float32; stops the program if it is damaged or does not fit `env`.

    `terminated` (in the manipulation tasks, a success) ends the bootstrap; `last` (the end of a recorded trajectory,
    for whatever reason) does not.
    """
    package = benchmark_of(args.env_id, args.dataset)
    is_own = package in ("gymnasium", "pyarrow")
    mend = "mend it (benchmark/README.md, Your own data)" if is_own else "fetch it again"
    mend += ", or name another --dataset"
    try:
        if package == "robosuite":
            robomimic_kwargs(path, args.env_id)
            data = read_robomimic(path, args.obs_keys or OBS_KEYS)
        elif package == "ogbench":
            data = read_ogbench(path, env, args)
        elif package == "gymnasium":
            data = from_d4rl(read_d4rl(path, data_space(env)))
        elif package == "pyarrow":
            data = from_d4rl(read_lerobot(Path(path), args.obs_keys or ("observation.state",)))
        else:
            path = args.env_id
            data = read_minari(minari_dataset(args), data_space(env))
        with np.errstate(over="ignore"):  # what is too large for float32 is refused below
            data = {key: np.asarray(values, np.float32) for key, values in data.items()}
    except KeyError as error:
        fail(f"{path} lacks what a data set for --env-id {args.env_id} has ({error.args[0]}): {mend}")
    except FileNotFoundError as error:
        fail(f"there is no {error.filename or first_line(error)}: put it back")
    except Exception as error:
        fail(f"{path} is truncated, corrupted or of another format ({first_line(error)}): {mend}")
    if not data or not data["last"].any():
        fail(f"{path} has no complete episode: name another --dataset")
    if len({len(values) for values in data.values()}) > 1:
        fail(f"{path}: its arrays differ in length, or its last episode has no end: {mend}")
    shapes = dict(obs=env.observation_space.shape, action=env.action_space.shape, reward=())
    shapes["next_obs"] = shapes["obs"]
    for key, shape in shapes.items():
        if data[key].shape[1:] not in (shape, shape or (1,)):  # rewards may be (N, 1)
            fail(f"{path}: {key} has shape {data[key].shape[1:]}, but --env-id {args.env_id} has {shape}")
    for key, values in data.items():
        if not np.isfinite(values).all():
            fail(f"{path}: {key} has NaN or infinite values: {mend}")
    space = env.action_space
    outside = np.maximum(data["action"] - space.high, space.low - data["action"]).max(0)
    if (outside > 1e-3 * np.minimum(extent_of(space), 1)).any() and not args.rescale_actions:
        unit = "--rescale-actions if they are in another unit, else clip them"
        fail(f"{path}: actions leave the bounds of --env-id {args.env_id} by {outside.max():.3g}: {unit}")
    longest = int(np.diff(np.flatnonzero(data["last"]), prepend=-1).max())
    if args.chunk > longest:
        fail(f"--chunk {args.chunk} is longer than every episode of {path}: at most {longest}")
    if len(data["last"]) > args.buffer_size:
        fail(f"--buffer-size {args.buffer_size} is less than the {len(data['last'])} transitions of {path}: raise it")
    columns = [data[key].reshape(len(data["last"]), -1) for key in COLUMNS]
    return torch.from_numpy(np.concatenate(columns, axis=1))


def find_data(args: Args, env: gym.Env, checkpoint: dict | None):
    """The files of the data, the rows of the first, and the statistics of all, checked before the work begins.

    From a checkpoint, which holds the rows in use, no rows are returned and no file is read.
    """
    if checkpoint:
        return checkpoint["progress"]["files"], None, checkpoint["progress"]["data_statistics"]
    files = [str(path.absolute()) for path in find_dataset(args)]  # not what a link names: its suffix may differ
    used = max(1, math.ceil(args.offline_steps / args.rotate_every))
    if used < len(files):
        note(f"only the first {used} of {len(files)} files will be used: lower --rotate-every to use more")
    parts = []
    for file in reversed(files or [None]):
        data = None  # frees the previous file's rows, which may be many
        data = load_data(file, env, args)
        parts.append(data_statistics(data, env))
    about_data = parts[-1] | dict(
        rows=max(part["rows"] for part in parts),
        low=np.min([part["low"] for part in parts], axis=0).tolist(),
        high=np.max([part["high"] for part in parts], axis=0).tolist(),
    )
    return files, data, about_data


def describe_data(buffer: ReplayBuffer, name: str, chunk: int) -> None:
    """Describe the data in one line, and note what may be a mistake in how they mark the ends of episodes."""
    flags = buffer.rows[: len(buffer), buffer.last - 1 : buffer.last + 1] > 0
    terminated, last = flags.T.cpu().numpy()
    ends = np.flatnonzero(last)
    lengths = np.diff(ends, prepend=-1)
    index = np.arange(len(last))
    left = ends[np.searchsorted(ends, index)] - index + 1  # rows to the end of the episode
    successes = np.flatnonzero(terminated)
    until = np.append(successes, 2 * len(last))[np.searchsorted(successes, index)] - index  # rows to a termination
    share = np.mean((left >= chunk) | (until < left))
    ending = len(set(np.searchsorted(ends, successes)))
    episodes = f"{len(ends)} episodes of {lengths.min()} to {lengths.max()} steps ({ending} terminate)"
    count = f"{len(last)} transitions of {name} in {episodes}"
    print(f"{count}; the critics learn from {share:.0%} of the chunks", file=sys.stderr)
    if len(ends) == 1:
        note(f"{name} is one episode: are its terminals and timeouts right?")
    if share < 0.5:
        note(f"most chunks of {chunk} steps run over the end of an episode: lower --chunk")


def succeeded(info: dict) -> float:
    """1 or 0, or NaN if the task does not report it; gymnasium-robotics has a key of its own for it."""
    success = info.get("success", info.get("is_success"))
    return math.nan if success is None else float(success)


def to_obs(obs) -> np.ndarray:
    """An environment's observation as float32, the type in which it is stored and fed to the networks."""
    with np.errstate(over="ignore"):  # what becomes infinite stops the run
        return np.array(obs, dtype=np.float32)  # a copy: an environment may change its own in place


def to_action(action: np.ndarray, space: gym.spaces.Box) -> np.ndarray:
    """Action (D,) in the space's shape and type, clipped: rounding may cross the bounds by a unit in the last place."""
    action = np.clip(action.reshape(space.shape), space.low, space.high)
    return action.astype(space.dtype)


def success_interval(successes: int, episodes: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a success rate."""
    z = 1.96
    rate = successes / episodes
    weight = 1 / (1 + z**2 / episodes)
    centre = weight * (rate + z**2 / (2 * episodes))
    variance = rate * (1 - rate) / episodes + z**2 / (4 * episodes**2)
    half = weight * z * math.sqrt(variance)
    return max(0.0, centre - half), min(1.0, centre + half)


def evaluate(act, env: gym.Env, episodes: int, seed: int) -> dict[str, float]:
    """Play episodes from starts determined by `seed`; `act` maps obs (obs_dim,) to a chunk (h D,), both numpy.

    Returns the means that SCORES names: success_rate with its 95 % interval (NaN if no episode reports success or
    failure; otherwise an episode that reports neither counts as a failure), return, its standard error, and length.
    """
    returns = []
    lengths = []
    successes = []
    for start in np.random.SeedSequence(seed).generate_state(episodes):
        obs, _ = env.reset(seed=int(start))
        queue = []
        done = False
        while not done:
            if not queue:
                queue = list(act(to_obs(obs)).reshape(-1, env.action_space.low.size))
            action = to_action(queue.pop(0), env.action_space)
            obs, _, terminated, truncated, info = env.step(action)
            done = terminated or truncated
        returns.append(float(info[EPISODE]["r"]))
        lengths.append(info[EPISODE]["l"])
        successes.append(succeeded(info))
    success = [math.nan] * 3
    if not np.isnan(successes).all():  # some environments report nothing but successes
        count = int(np.nansum(successes))
        success = [count / episodes, *success_interval(count, episodes)]
    error = np.std(returns) / math.sqrt(max(episodes - 1, 1))  # np.std divides by n; the sample's deviation by n - 1
    values = [*success, np.mean(returns), error, np.mean(lengths)]
    return dict(zip(SCORES, values, strict=True))


def score(run: Run, choose, eval_env: gym.Env, generators: Generators) -> None:
    """Evaluate `choose`, the averaged actor's, and report it. Neither training nor its clock notices."""
    args = run.args
    with run.paused(), generators.fork(args.seed):
        scores = evaluate(choose, eval_env, args.eval_episodes, args.seed)
    phase = "offline" if run.progress.step <= args.offline_steps else "online"
    run.report(phase, scores)


def log_gradient_norms(run: Run, actor: Actor, critics, buffer: ReplayBuffer, generators, alpha, beta) -> None:
    """Write the `gradient_norms` of a batch, and its mean sigma, to TensorBoard. Training does not notice."""
    args = run.args
    with generators.fork(args.seed + run.progress.step):
        batch = buffer.sample(args.batch_size, args.chunk, args.gamma)
        noise = actor.draw_noise(args.batch_size)
        norms = gradient_norms(actor, critics, batch, noise, alpha, beta)
    run.write_scalars("flow/grad_norm_step_", dict(enumerate(norms.tolist())))
    run.write_scalars("flow/", {"sigma": actor.sigma(batch[0]).mean().item()})


def describe(scores: dict[str, float]) -> str:
    """An evaluation as one line."""
    success = ""
    if not math.isnan(scores["success_rate"]):
        interval = f"[{scores['success_low']:.2f}, {scores['success_high']:.2f}]"
        success = f"success {scores['success_rate']:.2f} {interval}, "
    return f"{success}return {scores['return']:.1f} +- {scores['return_error']:.1f}, length {scores['length']:.0f}"


def compiled_policy(actor: Actor, jit, graph):
    """`actor.act` for one observation, compiled: a function of obs (obs_dim,) to a chunk (h D,), both numpy."""
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
