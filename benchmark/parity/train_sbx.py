"""CrossQ of sbx (Stable Baselines in JAX), with the sizes of benchmark/controls/sac_gaussian.py: an independent check.

    pip install -r benchmark/parity/requirements.txt    # in an environment of its own
    python benchmark/parity/train_sbx.py --env-id Hopper-v4

Writes args.json, returns.csv and eval.csv as the scripts do. Evaluations are of an average of the actor, as theirs are;
rows of kind `last` are of the actor as it is. One thread. What still differs from sac_gaussian.py, according to the
source of sbx 0.28.0:

- The actor has BatchRenorm before each layer, whose running statistics are averaged with the weights; ours normalises
  its observation alone, by the statistics of the moment.
- The actor is updated at the third, sixth, ... update of the critics; ours at the first, fourth, ...
- Running statistics of BatchRenorm are a moving average from mean 0, variance 1; ours start as the mean of all batches.
- log sigma is clipped to [-20, 2]; ours is squashed to [-5, 2] by a tanh.
- The entropy coefficient's loss is linear in log alpha, its Adam has beta1 0.9; ours is linear in alpha, beta1 0.5.
- The actor learns from the critic's batch; ours draws another one.
- Weights start from LeCun's normal distribution, biases from 0; ours from PyTorch's uniform one.
- An evaluation at step n comes before that step's update; ours comes after it.
- Actions are stored scaled to [-1, 1]; ours are stored in the environment's units.
"""

import csv
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn, Optional

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC"):  # NPROC is XLA's; all are read on import
    os.environ[variable] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"


def fail(message: str) -> NoReturn:
    """Stop with one line on standard error and exit code 2."""
    print(f"train_sbx: error: {message}", file=sys.stderr)
    raise SystemExit(2)


try:
    import gymnasium as gym
    import jax
    import mujoco  # noqa: F401
    import numpy as np
    import optax
    import torch
    import tyro
    from sbx import CrossQ
    from stable_baselines3.common.callbacks import BaseCallback
except ImportError as error:
    remedy = "pip install -r benchmark/parity/requirements.txt in an environment of its own"
    fail(f"{error.name or error} cannot be imported: {remedy}")

PACKAGES = ("sbx-rl", "stable-baselines3", "jax", "jaxlib", "flax", "optax", "gymnasium", "mujoco", "numpy")
NEVER = 2**31 - 1  # of the batches that sbx counts, in an int32


@dataclass
class Args:
    """Flags of the command line; the defaults are those of sac_gaussian.py."""

    env_id: str = "Hopper-v4"
    """Gymnasium id with 1-D Box observations and bounded Box actions"""
    seed: int = 1
    """seed of every random generator"""
    total_timesteps: int = 1_000_000
    """environment steps of the whole run"""
    eval_every: int = 10_000
    """steps between evaluations; 0: none, not even at the end"""
    eval_episodes: int = 5
    """episodes per evaluation"""
    run_name: Optional[str] = None
    """the run's folder is runs/<run-name>; default: <env>__train_sbx__<seed>__<time>"""
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
    actor_lr: float = 1e-3
    """learning rate of the actor and of the entropy coefficient"""
    adam_b1: float = 0.5
    """beta1 of the Adam optimizers of actor and critics"""
    critic_dim: int = 256
    """width of the two hidden layers of each critic"""
    policy_dim: int = 256
    """width of the two hidden layers of the actor"""
    actor_delay: int = 3
    """critic updates per update of actor and entropy coefficient"""
    actor_average: float = 0.999
    """decay per actor update of the averaged weights, which are evaluated; 0: the last weights"""
    alpha: float = 0.02
    """start of the entropy coefficient"""
    renorm_warmup: Optional[int] = None
    """training batches after which BatchRenorm switches to its running statistics (sbx's own default: 100 000);
    default: never, as in sac_gaussian.py"""


class AveragedCrossQ(CrossQ):
    """CrossQ with a moving average of the actor, which does not affect training."""

    average = None  # before the first update; then like `weights_of`
    decay = 0.0

    def train(self, gradient_steps: int, batch_size: int) -> None:
        """One update as in CrossQ; the average moves whenever the actor does."""
        if self.average is None:
            self.average = weights_of(self.policy.actor_state)
        actor_moves = (self._n_updates + 1) % self.policy_delay == 0
        super().train(gradient_steps, batch_size)
        if actor_moves:
            self.average = move_average(weights_of(self.policy.actor_state), self.average, 1 - self.decay)

    def choose(self, obs, kind: str):
        """Action (D,) for obs (obs_dim,), in the environment's units; of the averaged actor unless `kind` is last."""
        state = self.policy.actor_state
        if kind != "last" and self.average is not None:
            state = state.replace(**self.average)
        if kind != "stochastic":
            action = self.policy.select_action(state, obs[None])
        else:
            self.key, key = jax.random.split(self.key)
            action = self.policy.sample_action(state, obs[None], key)
        return self.policy.unscale_action(np.clip(np.asarray(action)[0], -1, 1))


def weights_of(actor_state) -> dict:
    """What an average is taken of: BatchRenorm's running statistics belong to the weights of the layers before it."""
    return {"params": actor_state.params, "batch_stats": actor_state.batch_stats}


move_average = jax.jit(optax.incremental_update)


class Recorder(BaseCallback):
    """Writes the run's CSV files; its clock stands still during evaluations."""

    def __init__(self, args: Args, folder: Path, eval_env: gym.Env):
        super().__init__()
        self.args = args
        self.folder = folder
        self.eval_env = eval_env
        self.write("returns.csv", "step", "return", "length", "seconds")
        self.write("eval.csv", "step", "kind", "return", "return_error", "length", "episodes", "seconds")
        self.clock = time.time()

    def write(self, name: str, *row) -> None:
        """Append a row to a CSV file of the run."""
        with open(self.folder / name, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)

    def seconds(self) -> float:
        """Time spent training."""
        return round(time.time() - self.clock, 2)

    def _on_step(self) -> bool:
        episode = self.locals["infos"][0].get("episode")
        if episode:
            self.write("returns.csv", self.num_timesteps, float(episode["r"]), int(episode["l"]), self.seconds())
        if self.args.eval_every and self.num_timesteps % self.args.eval_every == 0:
            self.evaluate("deterministic")
            self.evaluate("last")
        return True

    def evaluate(self, kind: str) -> None:
        """Play from starts determined by the seed, and record the mean."""
        began = time.time()
        key = self.model.key
        returns = []
        lengths = []
        for start in np.random.SeedSequence(self.args.seed).generate_state(self.args.eval_episodes):
            obs, info = self.eval_env.reset(seed=int(start))
            while "episode" not in info:  # until it is over
                action = self.model.choose(obs.astype(np.float32), kind)
                obs, _, _, _, info = self.eval_env.step(action)
            returns.append(float(info["episode"]["r"]))
            lengths.append(info["episode"]["l"])
        self.model.key = key
        self.clock += time.time() - began
        error = np.std(returns) / math.sqrt(max(len(returns) - 1, 1))
        scores = [f"{value:.5g}" for value in (np.mean(returns), error, np.mean(lengths))]
        self.write("eval.csv", self.num_timesteps, kind, *scores, len(returns), self.seconds())
        print(f"step {self.num_timesteps}, {kind}: return {scores[0]} +- {scores[1]}, length {scores[2]}", flush=True)


def make_env(env_id: str) -> gym.Env:
    """An environment whose last info of an episode has its return and length; stops the program if there is none."""
    try:
        env = gym.wrappers.RecordEpisodeStatistics(gym.make(env_id))
    except Exception as error:  # an environment may raise anything
        fail(f"--env-id {env_id}: {(str(error) or type(error).__name__).splitlines()[0]}")
    if not all(isinstance(space, gym.spaces.Box) for space in (env.observation_space, env.action_space)):
        fail(f"--env-id {env_id}: observations and actions must be a Box")
    return env


def check(args: Args) -> None:
    """Stop the program if a flag's value makes no sense."""
    rules = [
        ("seed|eval_every|learning_starts", lambda n: 0 <= n < 2**32, "0 or more, and below 2^32"),
        ("renorm_warmup", lambda n: n is None or 0 <= n <= NEVER, f"from 0 to {NEVER}"),
        (".*_(size|dim|delay|episodes)", lambda n: n >= 1, "1 or more"),
        ("total_timesteps", lambda n: n > args.learning_starts, f"above --learning-starts {args.learning_starts}"),
        (".*_lr|alpha", lambda x: 0 < x < math.inf, "above 0 and finite"),
        ("gamma", lambda x: 0 <= x <= 1, "in [0, 1]"),
        ("adam_b1|actor_average", lambda x: 0 <= x < 1, "in [0, 1)"),
    ]
    for names, holds, requirement in rules:
        for name, value in asdict(args).items():
            if re.fullmatch(names, name) and not holds(value):
                fail(f"--{name.replace('_', '-')} must be {requirement}, not {value}")


def main() -> None:
    """Train as the flags say."""
    args = tyro.cli(Args, description=__doc__)
    check(args)
    env = make_env(args.env_id)
    eval_env = make_env(args.env_id)
    name = f"{re.sub(r'[^A-Za-z0-9.-]+', '_', args.env_id)}__train_sbx__{args.seed}__{int(time.time())}"
    folder = Path("runs") / (args.run_name or name)
    if folder.exists():
        fail(f"{folder} exists: choose another --run-name")
    torch.set_num_threads(1)
    model = AveragedCrossQ(
        "MlpPolicy",
        env,
        learning_rate=args.actor_lr,
        qf_learning_rate=args.critic_lr,
        buffer_size=args.buffer_size,
        learning_starts=args.learning_starts,
        batch_size=args.batch_size,
        gamma=args.gamma,
        policy_delay=args.actor_delay,
        ent_coef=f"auto_{args.alpha}",
        seed=args.seed,
        policy_kwargs={
            "net_arch": {"pi": [args.policy_dim] * 2, "qf": [args.critic_dim] * 2},
            "optimizer_kwargs": {"b1": args.adam_b1},
            "renorm_warmup_steps": NEVER if args.renorm_warmup is None else args.renorm_warmup,
        },
    )
    model.decay = args.actor_average
    folder.mkdir(parents=True)
    versions = {package: version(package) for package in PACKAGES}
    (folder / "args.json").write_text(json.dumps(asdict(args) | {"versions": versions}, indent=2) + "\n")
    print(f"run: {folder}", flush=True)
    recorder = Recorder(args, folder, eval_env)
    model.learn(args.total_timesteps, callback=recorder)
    if args.eval_every:
        if args.total_timesteps % args.eval_every:
            recorder.evaluate("deterministic")
            recorder.evaluate("last")
        recorder.evaluate("stochastic")
    print(f"{args.total_timesteps} steps in {recorder.seconds():.0f} s of training", flush=True)


if __name__ == "__main__":
    main()
