"""Runs as plot.py and compare.py read them, and the name and colour that an algorithm has in every figure.

Two kinds of folders are read as they are: those of runs, which hold args.json with eval.csv or returns.csv, and those
of benchmark/results/, whose files are named <environment>/<label>_seed<n>[_eval|_returns].csv. Others' evaluations are
read from one CSV file with the columns environment, algorithm, step, seed and return.
"""

import csv
import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn, Optional

import numpy as np

NAMES = {  # part of the name of a file, folder or script -> the algorithm
    "sac_flow_g": "Flow-G",
    "sac_flow_t": "Flow-T",
    "sac_flow_naive": "Plain flow",
    "sac_gaussian": "Gaussian",
    "gated": "Flow-G",
    "decoded": "Flow-T",
    "plain": "Plain flow",
    "ablation": "Ablation",  # of a variant that ABLATION does not name
    "train_sbx": "CrossQ (sbx)",
}
ABLATION = {  # the variants of controls/ablation.py
    "plain": "Plain flow",
    "sigma": "Plain flow, sigma(s, A, t)",
    "renorm": "Plain flow, BatchRenorm(s, A)",
    "time": "Plain flow, BatchRenorm(s, A, t)",
    "authors": "Authors' plain flow",
    "clipped": "Plain flow, backward pass limited",
    "authors-clipped": "Authors' plain flow, backward pass limited",
    "authors-no-time": "Authors' plain flow, t beside BatchRenorm",
    "flow-g": "Flow-G",
    "flow-g-renorm": "Flow-G, BatchRenorm(s, A)",
    "flow-g-time": "Flow-G, BatchRenorm(s, A, t)",
}
SCRIPTS = ("sac_flow_g", "sac_flow_t", "sac_flow_naive", "sac_gaussian", "ablation", "train_sbx")
# The palette of Okabe and Ito, which colour-blind readers can tell apart.
COLORS = {"Flow-G": "#0072B2", "Flow-T": "#D55E00", "Plain flow": "#009E73", "Gaussian": "#4D4D4D"}
OTHER_COLORS = ("#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", ":", "-.")  # of one algorithm with different flags

# Returns that count as 0 and 1 where several environments are aggregated. The first four are D4RL's, of a random policy
# and of a trained SAC. Humanoid-v4: 121 is the mean of 200 episodes of uniformly random actions, 10 000 is quoted for
# SAC Flow after a million steps.
RANGES = {
    "Hopper-v4": (-20.272305, 3234.3),
    "Walker2d-v4": (1.629008, 4592.3),
    "HalfCheetah-v4": (-280.178953, 12135.0),
    "Ant-v4": (-325.6, 3879.7),
    "Humanoid-v4": (121.0, 10_000.0),
}

# Flags in which runs of one group may differ.
NO_VARIANT = set(
    "env_id seed total_timesteps online_steps run_name resume evaluate cuda compile capture_video track save_every"
    " eval_every eval_episodes files velocity versions".split()
)
AVERAGE = "0.995"  # the average to read from files that evaluate several: the default when they were made


@dataclass
class Run:
    """What is known about a run; all arrays are (N,), one entry per evaluation or training episode."""

    path: Path
    """the file"""
    env: str
    """environment"""
    algorithm: str
    """Flow-G and so on; for others the label of their files"""
    variant: list[str]
    """what sets it apart from other runs of this algorithm"""
    seed: int
    steps: np.ndarray
    returns: np.ndarray
    seconds: Optional[np.ndarray] = None
    """time spent training"""
    success: Optional[np.ndarray] = None
    """success rate of each evaluation, in offline-to-online runs"""
    offline: float = 0.0
    """the last step of the offline phase"""
    flags: dict = field(default_factory=dict)
    """those in args.json"""
    root: Path = Path()
    """the given folder that it was found in"""

    @property
    def name(self) -> str:
        """What it is called in figures and tables: runs of one environment and name differ in their seed alone."""
        return " ".join([self.algorithm, *self.variant])

    def until(self, step: float) -> "Run":
        """The run without what came after `step`."""
        inside = self.steps <= step
        columns = {}
        for name in ("steps", "returns", "seconds", "success"):
            values = getattr(self, name)
            columns[name] = None if values is None else values[inside]
        return replace(self, **columns)


def fail(message: str) -> NoReturn:
    """Stop with one line on standard error and exit code 2."""
    print(f"{Path(sys.argv[0]).stem}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def note(message: str) -> None:
    """A line on standard error."""
    print(f"note: {message}", file=sys.stderr)


def read(folders: Sequence[Path], training: bool = False, only: Sequence[str] = ()) -> list[Run]:
    """All runs below the folders, sorted by environment (in the order of RANGES), algorithm, variant and seed.

    Evaluations or, with `training`, training episodes; with `only`, the files whose path contains one of its texts.
    What cannot be read is noted in one line. Stops the program if nothing is left.
    """
    runs = []
    left_out = defaultdict(list)  # why -> files
    for folder in folders:
        if not folder.exists():
            fail(f"there is no {folder}: name folders of runs/ or of benchmark/results/")
        for path in [folder] if folder.is_file() else sorted(folder.resolve().rglob("*.csv")):
            if path.is_dir():
                continue
            if only and not any(text in str(path) for text in only):
                continue
            try:
                found = read_file(path, training)
            except ValueError as error:
                left_out[str(error)].append(path)
                continue
            for run in found:
                run.root = folder
            runs.extend(found)
    for why, paths in left_out.items():
        note(f"left out, {why}: {len(paths)} file{'s' * (len(paths) > 1)} such as {paths[0].name}")
    if not runs:
        missing, instead = ("training episodes", "drop --training") if training else ("evaluations", "try --training")
        matching = f" whose path has {' or '.join(only)} (--only)" if only else ""
        fail(f"no {missing}{matching} in {' '.join(map(str, folders))}: {instead}, or name other folders")
    set_variants(runs)
    runs = unique(runs)
    envs = [*RANGES, *sorted({run.env for run in runs} - set(RANGES))]
    order = [*COLORS, *sorted({run.algorithm for run in runs} - set(COLORS))]

    def place(run: Run) -> tuple:
        return envs.index(run.env), order.index(run.algorithm), run.name, run.seed

    return sorted(runs, key=place)


def read_file(path: Path, training: bool) -> list[Run]:
    """The runs in a CSV file. Raises ValueError, with the reason, for one that is not to be read."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        columns = set(reader.fieldnames or [])
        rows = [row for row in reader if None not in row.values()]  # a run in progress may have written half a line
    if not {"step", "return"} <= columns:
        raise ValueError("without the columns step and return")
    of_others = {"environment", "algorithm", "seed"} <= columns
    if training == bool(of_others or {"kind", "weights", "success_rate"} & columns):
        raise ValueError("evaluations" if training else "training episodes (draw them with --training)")
    if not of_others:
        return [fill(identify(path), rows, columns)]
    groups = defaultdict(list)
    for row in rows:
        groups[row["environment"], row["algorithm"], row["seed"]].append(row)
    none = np.array([])
    runs = []
    for (env, algorithm, seed), of_run in groups.items():
        if not seed.isdigit():
            raise ValueError("with a seed that is no number")
        run = Run(path, env, algorithm, [], int(seed), none, none)
        runs.append(fill(run, of_run, columns))
    return runs


def fill(run: Run, rows: list[dict], columns: set[str]) -> Run:
    """`run` with its rows of a CSV file, sorted by step. Raises ValueError, with the reason, if they are unusable."""
    if "weights" in columns:
        rows = [row for row in rows if row["weights"] == AVERAGE]
    deterministic = [row for row in rows if row.get("kind") == "deterministic"]
    rows = deterministic or rows
    if not rows:
        raise ValueError("without a row")
    wanted = {"step", "return", "seconds", "success_rate"} & columns
    try:
        table = {name: np.array([float(row[name]) for row in rows]) for name in wanted}
    except ValueError:
        raise ValueError("with entries that are no numbers") from None
    if not np.isfinite(table["step"]).all():
        raise ValueError("with entries that are no numbers")
    if len(np.unique(table["step"])) < len(rows):
        raise ValueError("with several rows of one step")
    order = np.argsort(table["step"], kind="stable")
    table = {name: values[order] for name, values in table.items()}
    run.steps = table["step"]
    run.returns = table["return"]
    run.seconds = table.get("seconds")
    run.success = table.get("success_rate")
    offline = [float(row["step"]) for row in rows if row.get("phase") == "offline"]
    run.offline = max(offline, default=0.0)
    return run


def identify(path: Path) -> Run:
    """Environment, algorithm, variant and seed of a file, without its rows. Raises ValueError for an unknown one."""
    none = np.array([])
    if (path.parent / "args.json").exists():
        try:
            flags = json.loads((path.parent / "args.json").read_text())
            env = flags["env_id"]
            seed = flags["seed"]
            algorithm = NAMES[flags["velocity"]] if "velocity" in flags else ABLATION.get(flags.get("variant"))
        except (ValueError, LookupError, TypeError):
            raise ValueError("whose args.json is not one of this project's") from None
        return Run(path, env, algorithm or NAMES[script_of(path.parent)], [], seed, none, none, flags=flags)
    match = re.fullmatch(r"(.+)_seed(\d+)(_.+?)??(?:_eval|_returns)?", path.stem)
    if not match:
        raise ValueError("without a seed in the name")
    label = match[1] + (match[3] or "")
    ranged = {name.lower(): name for name in RANGES}
    env = ranged.get(path.parent.name, path.parent.name)
    first, _, others = label.partition("_")
    if others and first.lower() in ranged:
        env = ranged[first.lower()]
        label = others
    known = re.search(rf"(?:^|_)({'|'.join(NAMES)})(?=_|$)", label)
    algorithm = NAMES[known[1]] if known else label
    rest = label[: known.start()] + label[known.end() :] if known else ""
    variant = [part for part in rest.split("_") if part]
    return Run(path, env, algorithm, variant, int(match[2]), none, none)


def script_of(folder: Path) -> str:
    """The script behind a run's folder: from its name, or a policy or checkpoint in it. Raises ValueError."""
    if match := re.search(rf"(?:^|__)({'|'.join(SCRIPTS)})(?:__|$)", folder.name):
        return match[1]
    for path in (folder / "policy.pt", folder / "policy_best.pt", folder / "checkpoint.pt"):
        if path.exists():
            import torch  # here, because few folders need it

            script = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("script")
            if script in NAMES:
                return script
    raise ValueError("whose script neither the folder's name nor a checkpoint tells")


def set_variants(runs: list[Run]) -> None:
    """Set `variant` to what tells groups apart: flags that differ, and parts of file names that not all runs have.

    Also the folder, if the same run is in two of them.
    """
    kinds = defaultdict(list)
    for run in runs:
        if run.flags:
            kinds[run.algorithm, run.success is None].append(run)
    for alike in kinds.values():
        known = set.intersection(*(set(run.flags) for run in alike))  # versions may differ in their flags
        for key in sorted(known - NO_VARIANT):
            if len({json.dumps(run.flags[key]) for run in alike}) > 1:
                for run in alike:
                    run.variant.append(f"{key.replace('_', '-')}={run.flags[key]}")
    shared = set.intersection(*(set(run.variant) for run in runs))
    for run in runs:
        run.variant = [part for part in run.variant if part not in shared]
    keys = defaultdict(set)
    for run in runs:
        keys[run.env, run.name, run.seed].add(run.root)
    repeated = [key for key, roots in keys.items() if len(roots) > 1]
    if repeated:
        env, name, seed = repeated[0]
        note(f"seed {seed} of {name} on {env} is in several of the named folders: each folder is a group of its own")
        roots = {run.root for run in runs}
        distinct = len({root.resolve().name for root in roots}) == len(roots)
        for run in runs:
            run.variant.append(run.root.resolve().name if distinct else str(run.root))
    versions = defaultdict(set)
    for run in runs:
        if run.flags:  # those of files without args.json are not known
            versions[run.env, run.name].add(frozenset(run.flags))
    for (env, name), known in versions.items():
        if len(known) > 1:
            differing = ", ".join(sorted(frozenset.union(*known) - frozenset.intersection(*known)))
            note(f"{name} on {env}: its runs are of versions with different flags ({differing}), and count as one")


def unique(runs: list[Run]) -> list[Run]:
    """One run of each environment, name, seed and folder, the longest; the others are noted."""
    longest = {}
    for run in sorted(runs, key=lambda run: run.steps[-1]):
        key = run.env, run.name, run.seed, run.root
        if key in longest:
            kept = f"{run.path.parent.name}/{run.path.name}"
            left_out = f"{longest[key].path.parent.name}/{longest[key].path.name}"
            note(f"{left_out} left out: {kept} has the same flags and seed, and is at least as long")
        longest[key] = run
    return list(longest.values())


def by_env(runs: list[Run]) -> dict[str, dict[str, list[Run]]]:
    """Runs grouped by environment and name, in their order."""
    envs = {}
    for run in runs:
        envs.setdefault(run.env, {}).setdefault(run.name, []).append(run)
    return envs


def file_name(env: str) -> str:
    """An environment's name as a file name."""
    return re.sub(r"[^\w.-]+", "_", env.lower())


def end_of(groups: dict[str, list[Run]]) -> float:
    """The step at which runs of one environment are compared: half or more of each group's runs have reached it."""
    reached = []
    for runs in groups.values():
        ends = sorted(run.steps[-1] for run in runs)
        reached.append(ends[(len(ends) - 1) // 2])
    return min(reached)


def score(run: Run, end: float) -> Optional[float]:
    """Mean return over the last tenth of the steps before `end`; None, with a note, if the run stopped before that."""
    inside = (run.steps >= 0.9 * end) & (run.steps <= end)
    if inside.any():
        return float(run.returns[inside].mean())
    where = f"{run.name}, seed {run.seed}, {run.env}"
    note(f"{where} has nothing from step {0.9 * end:.0f} to {end:.0f} (its last is {run.steps[-1]:.0f}): not counted")
    return None


def scores(groups: dict[str, list[Run]], end: Optional[float] = None) -> dict[str, np.ndarray]:
    """Scores (N,) of each group's runs of one environment, in the order of their seeds, without those that stopped."""
    end = end or end_of(groups)
    found = {}
    for name, runs in groups.items():
        values = [score(run, end) for run in runs]
        found[name] = np.array([value for value in values if value is not None])
    return found
