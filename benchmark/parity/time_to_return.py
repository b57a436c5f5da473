"""Minutes on one core until a run's return reaches a threshold: its steps to there over separately timed steps/s.

    python benchmark/parity/time_to_return.py --runs flow-g=runs/a flow-g=runs/b crossq=runs/c \\
        --timed flow-g=runs/short-1 crossq=runs/short-2 flow-g=runs/short-3 crossq=runs/short-4

A run gets there at the first training episode at which the mean return of the last 10 is at least the threshold (every
program has these) or, with --by evaluation, at the first such evaluation of the frozen policy. One that never gets
there is a lower bound, "> its steps", and counts in the median as later than all that did. Runs are folders with
returns.csv, eval.csv and args.json, or, with --env-id, what CleanRL's SAC printed (*.log).

Steps per second come from short runs, made in turn on one quiet core so that a slow spell hits all: from 1 000 steps
after learning starts to the last episode, the median over the runs of a name. Compilation is not counted; the random
steps at the start are charged as if they were updates.
"""

import csv
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal, NoReturn, Optional

try:
    import tyro
except ImportError:
    sys.exit("time_to_return: error: tyro is missing: pip install -r requirements.txt")

THRESHOLDS = {"Hopper-v4": 2_000.0, "HalfCheetah-v4": 5_000.0, "Walker2d-v4": 2_500.0}
WINDOW = 10  # episodes
WARM_UP = 1_000  # steps after learning starts, within which updates are compiled


@dataclass
class Args:
    """Flags of the command line."""

    runs: list[str]
    """finished runs as name=folder, or name=printed.log; several with the same name are its seeds"""
    timed: list[str] = field(default_factory=list)
    """short runs as name=folder, timed in turn on one quiet core"""
    speed: list[str] = field(default_factory=list)
    """steps per second as name=number, for a program that leaves no returns.csv"""
    by: Literal["training", "evaluation"] = "training"
    """what has to reach the threshold: the mean of 10 training episodes, or an evaluation of the frozen policy"""
    env_id: Optional[str] = None
    """environment of runs without args.json"""
    threshold: Optional[float] = None
    """return to reach; default: that of the environment, for Hopper-v4, HalfCheetah-v4 and Walker2d-v4"""


def fail(message: str) -> NoReturn:
    """Stop with one line on standard error and exit code 2."""
    print(f"time_to_return: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def named(word: str, flag: str) -> tuple[str, str]:
    """name=value -> (name, value)"""
    name, separator, value = word.partition("=")
    if not (name and separator and value):
        fail(f"{flag} {word}: give it as name=value")
    return name, value


def read(path: Path, *columns: str) -> list[tuple[float, ...]]:
    """The columns of a CSV file as numbers, evaluations of the deterministic policy alone; stops if it has none."""
    try:
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("kind", "deterministic") == "deterministic"]
        return [tuple(float(row[column]) for column in columns) for row in rows]
    except (OSError, KeyError, TypeError, ValueError) as error:
        fail(f"{path}: needs numbers in the columns {', '.join(columns)} ({type(error).__name__}: {error})")


def read_args(folder: Path) -> dict:
    """A run's args.json; stops if there is none."""
    try:
        return json.loads((folder / "args.json").read_text())
    except (OSError, ValueError) as error:
        fail(f"{folder / 'args.json'}: cannot be read ({error}); give the run's folder")


def returns_of(path: Path, by: str) -> list[tuple[float, float]]:
    """(step, return) of a run's training episodes or evaluations."""
    if path.suffix != ".log":
        return read(path / ("returns.csv" if by == "training" else "eval.csv"), "step", "return")
    if by == "evaluation":
        fail(f"{path}: a log has no evaluations; use --by training")
    try:
        found = re.findall(r"global_step=(\d+), episodic_return=\[?(-?[\d.]+(?:e[+-]?\d+)?)", path.read_text())
    except OSError as error:
        fail(f"{path}: cannot be read ({error.strerror})")
    return [(float(step), float(value)) for step, value in found]


def steps_to(threshold: float, returns: list[tuple[float, float]], window: int) -> Optional[float]:
    """The step at which the mean of the last `window` returns is first at least the threshold; None: never."""
    for end in range(window, len(returns) + 1):
        recent = [value for _, value in returns[end - window : end]]
        if sum(recent) / window >= threshold:
            return returns[end - 1][0]
    return None


def speed_of(folder: Path) -> float:
    """Steps per second of a short run, after its updates were compiled; stops if it is too short to tell."""
    start = read_args(folder).get("learning_starts", 0) + WARM_UP
    rows = [row for row in read(folder / "returns.csv", "step", "seconds") if row[0] >= start]
    if len(rows) < 2 or rows[-1][1] <= rows[0][1]:
        fail(f"{folder}: too short to time: it needs episodes well after step {start}")
    steps = rows[-1][0] - rows[0][0]
    seconds = rows[-1][1] - rows[0][1]
    return steps / seconds


def table(runs: dict[str, list[tuple[Optional[float], float]]], speeds: dict[str, float]) -> str:
    """A Markdown table. `runs` holds, by name, each seed's step at the threshold, or None, and its length in steps."""
    lines = ["| | steps/s | steps of each seed | minutes of each seed | median minutes |", "|---|---|---|---|---|"]
    for name, seeds in runs.items():
        ordered = sorted((reached is None, reached or length) for reached, length in seeds)
        steps = [f"{'> ' if never else ''}{step:.0f}" for never, step in ordered]
        minutes = [f"{'> ' if never else ''}{step / speeds[name] / 60:.1f}" for never, step in ordered]
        _, low = ordered[(len(ordered) - 1) // 2]
        never, high = ordered[len(ordered) // 2]
        middle = f"> {low / speeds[name] / 60:.1f}" if never else f"{(low + high) / 2 / speeds[name] / 60:.1f}"
        lines.append(f"| {name} | {speeds[name]:.1f} | {', '.join(steps)} | {', '.join(minutes)} | {middle} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    args = tyro.cli(Args, description=__doc__)
    if not args.runs:
        fail("--runs must name one or more")
    runs = {}
    environments = set()
    for word in args.runs:
        name, value = named(word, "--runs")
        path = Path(value)
        environment = args.env_id if path.suffix == ".log" else read_args(path).get("env_id")
        if environment is None:
            fail(f"{path}: of which environment? Give --env-id")
        environments.add(environment)
        runs.setdefault(name, []).append(path)
    if len(environments) > 1:
        fail(f"--runs are of several environments, {', '.join(sorted(environments))}: give one table's")
    (environment,) = environments
    threshold = THRESHOLDS.get(environment) if args.threshold is None else args.threshold
    if threshold is None:
        fail(f"{environment} has no threshold of its own: give --threshold")

    timed = {}
    for word in args.timed:
        name, value = named(word, "--timed")
        timed.setdefault(name, []).append(speed_of(Path(value)))
    speeds = {name: median(values) for name, values in timed.items()}
    for word in args.speed:
        name, value = named(word, "--speed")
        try:
            speeds[name] = float(value)
        except ValueError:
            fail(f"--speed {word}: {value} is not a number")
        if not speeds[name] > 0:
            fail(f"--speed {word}: must be above 0")
    for name in runs:
        if name not in speeds:
            fail(f"{name} was not timed: give --timed {name}=<folder>, or --speed {name}=<steps per second>")

    seeds = {}
    for name, paths in runs.items():
        for path in paths:
            returns = returns_of(path, args.by)
            if not returns:
                fail(f"{path}: no {args.by} returns in it")
            reached = steps_to(threshold, returns, WINDOW if args.by == "training" else 1)
            seeds.setdefault(name, []).append((reached, returns[-1][0]))
    for name, of_name in seeds.items():
        latest = max((step for step, _ in of_name if step is not None), default=0)
        shortest = min((length for step, length in of_name if step is None), default=latest)
        if shortest < latest:
            fail(f"{name}: a run that never got there has {shortest:.0f} steps, another took {latest:.0f}: continue it")
    print(f"{environment}, {threshold:g} by {args.by}:\n\n{table(seeds, speeds)}")


if __name__ == "__main__":
    main()
