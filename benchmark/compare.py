"""Did returns or speed fall from A to B? Exit code 1: yes, with confidence; 2: part of A cannot be compared; 0: no.

    python benchmark/compare.py runs/before runs/after

A and B are folders of runs, or of benchmark/results/, with the same environments and algorithms, several seeds of each
and, for the speed, from the same machine, equally idle. A run's return is its mean over the last tenth of the steps
that both have reached, its speed that over their second half, which leaves compilation out. Intervals are Welch's, for
the difference of means: of returns, and of the logarithms of speeds. Only their upper ends decide: with m intervals,
each has confidence 1 - 2 (1 - 0.95) / m, so that the chance of any false alarm is at most one in twenty.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

import numpy as np
import records
import tyro
from records import Run, by_env, fail, note

try:
    from scipy import stats
except ImportError:
    fail("needs scipy: pip install -r benchmark/requirements.txt")


@dataclass
class Args:
    """Flags of the command line."""

    a: Annotated[Path, tyro.conf.Positional]
    """folder of the runs before"""
    b: Annotated[Path, tyro.conf.Positional]
    """folder of the runs after"""
    training: bool = False
    """compare the returns of training episodes in place of evaluations"""
    confidence: float = 0.95
    """confidence that no comparison reports a fall where there is none"""


def welch(a: np.ndarray, b: np.ndarray, confidence: float) -> tuple[float, float, float]:
    """mean(b) - mean(a) of samples (N,) and (M,) of two or more, and the ends of Welch's interval."""
    difference = b.mean() - a.mean()
    var_a = a.var(ddof=1) / len(a)  # of the mean
    var_b = b.var(ddof=1) / len(b)
    var = var_a + var_b
    if not var:
        return difference, difference, difference
    freedom = var**2 / (var_a**2 / (len(a) - 1) + var_b**2 / (len(b) - 1))
    half = stats.t.ppf((1 + confidence) / 2, freedom) * math.sqrt(var)
    return difference, difference - half, difference + half


def speed(run: Run, end: float) -> Optional[float]:
    """Steps per second in the second half of the steps before `end`; None if a run has no times there."""
    inside = (run.steps >= end / 2) & (run.steps <= end)
    if run.seconds is None or inside.sum() < 2:
        return None
    elapsed = np.ptp(run.seconds[inside])
    return np.ptp(run.steps[inside]) / elapsed if elapsed else None


def samples(a: list[Run], b: list[Run]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What is compared between two groups, "return" and "steps/s": values of A and of B, one per seed."""
    end = min(records.end_of({"": runs}) for runs in (a, b))
    returns = tuple(records.scores({"": runs}, end)[""] for runs in (a, b))
    speeds = tuple(np.array([value for run in runs if (value := speed(run, end))]) for runs in (a, b))
    return {"return": returns, "steps/s": speeds}


def main() -> None:
    """Compare the folders of the command line and print a table."""
    args = tyro.cli(Args, description=__doc__)
    if not 0 < args.confidence < 1:
        fail(f"--confidence must be between 0 and 1, not {args.confidence}")
    if args.a.resolve() == args.b.resolve():
        fail(f"{args.a} twice: name the runs before and those after")
    before = by_env(records.read([args.a], args.training))
    after = by_env(records.read([args.b], args.training))
    groups_before = {(env, name) for env in before for name in before[env]}
    groups_after = {(env, name) for env in after for name in after[env]}
    common = groups_before & groups_after
    if not common:
        fail(f"{args.a} and {args.b} have no algorithm on the same environment")
    for env, name in sorted(groups_before ^ groups_after):
        note(f"{name} on {env} is only in {args.a if (env, name) in groups_before else args.b}")
    incomplete = bool(groups_before - groups_after)
    found = {}  # (environment, algorithm, what) -> values of A, values of B
    for env, name in sorted(common):
        for what, (a, b) in samples(before[env][name], after[env][name]).items():
            if min(len(a), len(b)) > 1:
                found[env, name, what] = a, b
                if len(b) < len(a):
                    incomplete = True
                    note(f"{env}, {name}: {what} of {len(b)} seeds in {args.b}, of {len(a)} in {args.a}")
            else:
                incomplete = True
                note(f"{env}, {name}: {what} of {len(a)} and {len(b)} seeds cannot be compared, two of each are needed")
    if not found:
        fail("nothing can be compared: two seeds or more of each are needed")
    fell = False
    print("| environment | algorithm | | A | B | B - A, interval | |\n|---|---|---|---|---|---|---|")
    for (env, name, what), (a, b) in found.items():
        confidence = max(0.0, 1 - 2 * (1 - args.confidence) / len(found))
        if what == "return":
            ends = welch(a, b, confidence)
            shown = "{:.0f} [{:.0f}, {:.0f}]".format(*ends)
        else:
            ends = welch(np.log(a), np.log(b), confidence)
            shown = "{:+.1f} % [{:+.1f}, {:+.1f}]".format(*(100 * math.expm1(end) for end in ends))
        falls = not ends[2] >= 0  # nor is NaN a pass
        fell = fell or falls
        digits = 0 if what == "return" else 1
        means = " | ".join(f"{values.mean():.{digits}f} ({len(values)} seeds)" for values in (a, b))
        print(f"| {env} | {name} | {what} | {means} | {shown} | {'fell' if falls else ''} |")
    raise SystemExit(1 if fell else 2 if incomplete else 0)


if __name__ == "__main__":
    main()
