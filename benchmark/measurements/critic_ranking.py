"""Can the critics of an offline-to-online run tell one chunk from another in the same state?

In 300 states of the run's data, and in 300 of its online experience, 32 chunks are sampled from its policy. For both:

value       Q, mean over states, chunks and the two critics
between     standard deviation over states of their mean Q
within      standard deviation of Q over the chunks of a state
apart       |Q_1 - Q_2|
agreement   correlation of Q_1 and Q_2 over the chunks of a state: 1 if they rank them alike, 0 if by chance
noise       standard deviation of a coordinate over the chunks of a state, in units of half its range

Q is the mean of both critics in `between` and `within`; what a state gives is averaged over states. With `--best-of`,
also: the success of a policy that plays the chunk of largest Q among N samples; N = 1 is the policy itself. With
`--further-updates`, the critics are first trained on, with the run's buffer and its policy frozen, to see whether they
lack updates.

    python benchmark/measurements/critic_ranking.py --runs runs/<name> --best-of 1 8 --out ranking

Writes <out>/critic_ranking.csv and best_of.csv.
"""

import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import gradient_norms
import torch

import sac_flow_offline2online as script

STATES = 300
SAMPLES = 32


@dataclass
class Args:
    """Flags of the command line."""

    runs: list[Path] = field(default_factory=list)
    """folders of runs of sac_flow_offline2online.py"""
    further_updates: int = 0
    """updates of the critics before all of this"""
    best_of: list[int] = field(default_factory=list)
    """N, one or more; none: play nothing"""
    episodes: int = 100
    """episodes for each N, from the same starts"""
    seed: int = 1000
    """seed of the starts, other than the runs' own, whose evaluations used them"""
    out: Path = Path("ranking")
    """folder for the CSVs"""


def load(run: Path):
    """Flags, policy (its policy.pt, frozen), critics and checkpoint of a run."""
    state = script.load(run / "checkpoint.pt", "progress")
    actor = script.build_policy(script.load(run / "policy.pt", "obs_dim"))
    args = script.Args(**state["args"] | dict(evaluate=str(run)))
    sizes = actor.obs_dim, actor.action_dim, args.critic_dim, args.critic_layers
    critics = torch.nn.ModuleList(script.Critic(*sizes) for _ in range(2))
    critics.load_state_dict(state["critics"])
    return args, actor, critics.eval().requires_grad_(False), state


def train_critics(args, actor, critics, state, updates: int) -> None:
    """Go on with the critics of `load`, on the run's own buffer; the policy and alpha stay as they are."""
    rows = state["buffer"]["rows"]
    buffer = script.ReplayBuffer(len(rows), actor.obs_dim, actor.action_dim // args.chunk, rows.device)
    buffer.load_state_dict(state["buffer"])
    targets = copy.deepcopy(critics)
    targets.load_state_dict(state["targets"])
    alpha = state["scalars"]["log_alpha"].exp()
    discount = args.gamma**args.chunk
    fraction = args.online_fraction if len(rows) > buffer.data_size else "uniform"
    optimizer = torch.optim.Adam(critics.requires_grad_(True).parameters())
    optimizer.load_state_dict(state["critic_optimizer"])  # its learning rate, too
    gradients_of = script.with_gradients(script.critic_loss, critics)
    for _ in range(updates):
        batch = buffer.sample(args.batch_size, args.chunk, args.gamma, fraction)
        noise = actor.draw_noise(args.batch_size)
        *_, gradients = gradients_of(actor, critics, targets, batch, noise, alpha, discount)
        script.apply_gradients(optimizer, gradients)
        script.move_average(targets, critics, args.tau)
    critics.requires_grad_(False)


def chunks_and_values(actor, critics, obs, samples: int):
    """For obs (B, obs_dim): sampled chunks (B, samples, h D) in the environment's units, and Q (2, B, samples)."""
    repeated = obs.repeat_interleave(samples, 0)
    with torch.no_grad():
        chunks, *_ = actor.rollout(repeated, actor.draw_noise(len(repeated)))
        q = torch.stack([critic(repeated, actor.normalized(chunks)) for critic in critics])
    shape = len(obs), samples
    return chunks.unflatten(0, shape), q.unflatten(1, shape)


def measure(actor, critics, obs) -> dict[str, float]:
    """The columns of the table, in states `obs` (B, obs_dim)."""
    chunks, q = chunks_and_values(actor, critics, obs, SAMPLES)
    mean = q.mean(0)
    centred = q - q.mean(2, keepdim=True)
    agreement = torch.cosine_similarity(*centred, dim=1)
    return dict(
        value=mean.mean().item(),
        between=mean.mean(1).std().item(),
        within=mean.std(1).mean().item(),
        apart=(q[0] - q[1]).abs().mean().item(),
        agreement=agreement.mean().item(),
        noise=(chunks / actor.scale).std(1).mean().item(),
    )


def best_chunk(actor, critics, samples: int, obs):
    """For one observation (obs_dim,), the chunk (h D,) of largest mean Q among `samples`; both numpy."""
    chunks, q = chunks_and_values(actor, critics, torch.from_numpy(obs)[None], samples)
    return chunks[0, q.mean(0)[0].argmax()].numpy()


def main() -> None:
    args = gradient_norms.parse_args(Args, __doc__)
    if not args.runs:
        gradient_norms.fail("--runs must name one or more folders of runs")
    if args.further_updates < 0:
        gradient_norms.fail(f"--further-updates must be 0 or more, not {args.further_updates}")
    if min(args.best_of, default=1) < 1:
        gradient_norms.fail(f"--best-of must be 1 or more, not {min(args.best_of)}")
    torch.set_num_threads(1)  # the networks are small
    runs = {run: load(run) for run in args.runs}
    ranking = []
    played = []
    for run, (flags, actor, critics, state) in runs.items():
        torch.manual_seed(0)
        known = dict(run=run.name, step=state["progress"]["step"], further_updates=args.further_updates)
        rows = state["buffer"]["rows"][:, : actor.obs_dim]
        data_size = state["buffer"]["data_size"]
        train_critics(flags, actor, critics, state, args.further_updates)
        for states, obs in (("data", rows[:data_size]), ("online", rows[data_size:])):
            if len(obs):
                obs = obs[torch.randperm(len(obs))[:STATES]]
                ranking.append(dict(**known, states=states, **measure(actor, critics, obs)))
        if args.best_of:
            env = script.make_env(flags)
            env = script.rescaled(env, actor) if flags.rescale_actions else env
            with env:
                for n in args.best_of:
                    script.seed_random(args.seed)
                    act = partial(best_chunk, actor, critics, n)
                    scores = script.evaluate(act, env, args.episodes, args.seed)
                    played.append(dict(**known, best_of=n, episodes=args.episodes, **scores))
    gradient_norms.write(args.out / "critic_ranking.csv", ranking)
    if played:
        gradient_norms.write(args.out / "best_of.csv", played)


if __name__ == "__main__":
    main()
