"""How noisy are a flow policy's actions, and where does the noise come from?

A policy plays 1 000 steps, sampling its actions; in every twentieth state 200 actions are drawn. For each policy:

saturated   share of the actions' coordinates beyond 97 % of their bounds
deviation   standard deviation of a coordinate, median over states and coordinates, in units of half its range
start       mean deviation if only A_0 differs from sample to sample: what the rollout has not forgotten
early       mean deviation if all noise but the last step's differs
sigma       mean over states and coordinates
entropy     mean of -log_prob, for whichever entropy the policy regularises, in nats

    python benchmark/measurements/action_noise.py --policies benchmark/policies/*.pt --out noise

Writes <out>/action_noise.csv.
"""

from dataclasses import dataclass, field
from pathlib import Path

import gradient_norms
import torch

STATES = 50
SAMPLES = 200


@dataclass
class Args:
    """Flags of the command line."""

    policies: list[Path] = field(default_factory=list)
    """policy files of sac_flow_naive.py, sac_flow_g.py or sac_flow_t.py, or the folders of their runs"""
    out: Path = Path("noise")
    """folder for the CSV"""


def states_of(actor, env, seed: int = 1) -> torch.Tensor:
    """Every twentieth of the states that sampled actions visit: (STATES, obs_dim)."""
    torch.manual_seed(seed)
    states = []
    obs, _ = env.reset(seed=seed)
    for _ in range(20 * STATES):
        states.append(torch.tensor(obs, dtype=torch.float32))  # a copy
        action = actor.act(states[-1]).numpy().reshape(env.action_space.shape)
        obs, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            obs, _ = env.reset()
    return torch.stack(states[::20])


def measure(actor, states) -> dict[str, float]:
    """The columns of the table, of one frozen actor in `states` (B, obs_dim)."""
    obs = states.repeat_interleave(SAMPLES, 0)
    sigmas = []
    step = actor.step

    def recorded(i, a, v, sigma):
        sigmas.append(sigma)
        return step(i, a, v, sigma)

    def actions(varying: slice):
        """(B, SAMPLES, D) in units of half the range, and log_prob; within a state, only `varying` noise differs."""
        noise = actor.draw_noise(len(obs)).unflatten(1, (len(states), SAMPLES))
        fixed = noise[:, :, :1].expand_as(noise).clone()
        fixed[varying] = noise[varying]
        action, log_prob, _ = actor.rollout(obs, fixed.flatten(1, 2))
        in_bounds = (action - actor.bias) / actor.scale  # in [-1, 1]
        return in_bounds.unflatten(0, (len(states), SAMPLES)), log_prob

    torch.manual_seed(0)
    actor.step = recorded
    with torch.no_grad():
        action, log_prob = actions(slice(None))
        start, _ = actions(slice(0, 1))
        early, _ = actions(slice(0, -1))
    del actor.step  # restores the method
    return dict(
        saturated=(action.abs() > 0.97).float().mean().item(),
        deviation=action.std(1).median().item(),
        start=start.std(1).mean().item(),
        early=early.std(1).mean().item(),
        sigma=sigmas[0].mean().item(),
        entropy=-log_prob.mean().item(),
    )


def main() -> None:
    args = gradient_norms.parse_args(Args, __doc__)
    if not args.policies:
        gradient_norms.fail("--policies must name one or more policy files, or folders of runs")
    torch.set_num_threads(1)  # the networks are small
    rows = []
    for path in args.policies:
        known = gradient_norms.described(path)
        _, actor, env = gradient_norms.policy_and_env(path)
        with env:
            rows.append(dict(policy=path.name, **known, **measure(actor, states_of(actor, env))))
    gradient_norms.write(args.out / "action_noise.csv", rows)


if __name__ == "__main__":
    main()
