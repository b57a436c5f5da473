"""Figures and tables of runs: learning curves, returns against time, and statistics over environments, with intervals.

    python benchmark/plot.py runs/first --out figures
    python benchmark/plot.py benchmark/results/hopper-v4 --training
    python benchmark/plot.py benchmark/results/lift
    python benchmark/plot.py runs benchmark/results/published.csv --steps 100000

Reads folders of runs, and those of benchmark/results/, as they are. A curve is the mean over seeds with its 95 %
bootstrap interval, which for two or three seeds is their range; tables have t-intervals, which for so few are wider and
have the coverage they claim. The score of a run is its mean return over the last tenth of the steps. Over environments,
scores are scaled to 0 and 1 (`RANGES` in records.py). Interquartile mean, median, optimality gap, performance profiles
and probability of improvement have 95 % stratified bootstrap intervals over seeds. They come from rliable, the package
of the paper that introduced them (Agarwal et al., 2021, arXiv 2108.13264). AdaStop (Mathieu et al., 2023, arXiv
2306.10882) says which algorithms differ, and where more seeds are needed. Tables go to standard output, as Markdown.
"""

import csv
import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Optional, get_args

import numpy as np
import records
import tyro
from records import Run, by_env, fail, file_name, note

try:
    import matplotlib
    from adastop import MultipleAgentsComparator
    from rliable import library, metrics
    from scipy import stats

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError as error:
    fail(f"needs {error.name}: pip install -r benchmark/requirements.txt")

LEVEL = 0.95  # of every interval
SEEDS_PER_LOOK = 5  # AdaStop looks after 5 seeds, and after 10
LOOKS = 2
STATISTICS = ("interquartile mean", "median", "optimality gap")
Figure = Literal["curves", "time", "norms", "statistics", "profiles", "improvement"]
FIGURES: tuple[Figure, ...] = get_args(Figure)


@dataclass
class Args:
    """Flags of the command line."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """folders of runs, or of benchmark/results/, with all that is below them, or a CSV file of others' evaluations"""
    out: Path = Path("figures")
    """folder of the figures, each as SVG and PNG"""
    training: bool = False
    """draw the returns of training episodes in place of evaluations"""
    only: tuple[str, ...] = ()
    """read only files whose path contains one of these texts"""
    figures: tuple[Figure, ...] = FIGURES
    """which figures; norms: for runs with a norms.csv; statistics and improvement print tables, too"""
    steps: Optional[int] = None
    """step at which runs are scored and curves end; default: for scores, what at least half of each group's runs have
    reached; for curves, their own ends"""
    ranges: tuple[str, ...] = ()
    """returns that count as 0 and 1 in an environment that records.py does not know: Swimmer-v4=0,100"""
    reps: int = 2000
    """bootstrap resamples"""


def parse_args() -> Args:
    """Flags, checked; `ranges` are added to the known ones."""
    args = tyro.cli(Args, description=__doc__)
    if not args.folders:
        fail("name one or more folders of runs/ or of benchmark/results/")
    if args.steps is not None and args.steps < 1:
        fail(f"--steps must be 1 or more, not {args.steps}")
    if args.reps < 1:
        fail(f"--reps must be 1 or more, not {args.reps}")
    for text in args.ranges:
        env, _, numbers = text.rpartition("=")
        try:
            low, high = map(float, numbers.split(","))
        except ValueError:
            low = high = math.nan
        if not env or not -math.inf < low < high < math.inf:
            fail(f"--ranges {text}: an environment and two returns, low < high, such as Swimmer-v4=0,100")
        records.RANGES[env] = low, high
    return args


# Numbers


def t_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the first axis, the seeds, and the ends of its 95 % t-interval, which are NaN with one seed."""
    n = len(values)
    mean = values.mean(0)
    if n == 1:
        return mean, mean * math.nan, mean * math.nan
    half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * values.std(0, ddof=1) / math.sqrt(n)
    return mean, mean - half, mean + half


def binned(run: Run, width: float) -> tuple[np.ndarray, np.ndarray, Optional[np.ndarray]]:
    """Training episodes in bins of `width` steps, as (steps, returns, seconds): end, mean, and time of the last one.

    Seconds are None where the file has none.
    """
    index = np.ceil(run.steps / width)
    bins = np.unique(index)
    ends = np.minimum(bins * width, run.steps[-1])
    returns = np.array([run.returns[index == i].mean() for i in bins])
    seconds = None
    if run.seconds is not None:
        seconds = np.array([run.seconds[index == i][-1] for i in bins])
    return ends, returns, seconds


def common_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Curves (x, y) of several seeds, interpolated at every x at which any of them has a point.

    Only as far as all seeds reach, so that no seed drops out of a mean halfway. Returns x (N,) and y (seeds, N).
    """
    first = max(x[0] for x, _ in curves)
    last = min(x[-1] for x, _ in curves)
    grid = np.unique(np.concatenate([x for x, _ in curves]))
    grid = grid[(grid >= first) & (grid <= last)]
    return grid, np.array([np.interp(grid, x, y) for x, y in curves])


def at_points(runs: list[Run], column: str) -> dict[float, np.ndarray]:
    """At each step at which any run was evaluated, a column's values (seeds,) of the runs evaluated there."""
    values = {}
    for step in sorted({step for run in runs for step in run.steps}):
        values[step] = np.concatenate([getattr(run, column)[run.steps == step] for run in runs])
    return values


def scaled(score: np.ndarray, env: str) -> np.ndarray:
    """Scores, scaled so that the two returns in records.RANGES become 0 and 1."""
    low, high = records.RANGES[env]
    return (score - low) / (high - low)


def matrices(all_scores: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Scaled scores (seeds, environments) of each name, in the environments that all names share and that have a range.

    `all_scores` is environment -> name -> scores. rliable needs as many seeds in each environment: the first are taken.
    """
    names = list(dict.fromkeys(name for groups in all_scores.values() for name in groups))
    envs = []
    for env, groups in all_scores.items():
        lacking = [name for name in names if not len(groups.get(name, []))]
        if lacking:
            note(f"statistics without {env}, which has no score of {', '.join(lacking)}")
        elif env not in records.RANGES:
            note(f"statistics without {env}, whose range of returns is not known: give --ranges {env}=LOW,HIGH")
        else:
            envs.append(env)
    if not envs:
        return {}
    result = {}
    for name in names:
        counts = {len(all_scores[env][name]) for env in envs}
        seeds = min(counts)
        if len(counts) > 1:
            note(f"statistics of {name} with the first {seeds} seeds of each environment, which all have")
        columns = [scaled(all_scores[env][name][:seeds], env) for env in envs]
        result[name] = np.stack(columns, axis=1)
    return result


def bootstrap(values: dict, function, reps: int) -> tuple[dict, dict]:
    """Estimates of `function` and the ends of their intervals, (2, ...), for each name; the same at every call.

    The ends are NaN where there is only one seed (in a pair: of either), since resampling it says nothing.
    """
    np.random.seed(0)  # rliable draws from numpy's global generator, whatever generator it is given
    estimates, ends = library.get_interval_estimates(values, function, reps=reps, confidence_interval_size=LEVEL)
    for name, scores in values.items():
        matrices_of_name = scores if isinstance(scores, list) else [scores]
        if min(len(matrix) for matrix in matrices_of_name) == 1:
            ends[name] = ends[name] * math.nan
    return estimates, ends


def aggregates(matrix: np.ndarray) -> np.ndarray:
    """The STATISTICS of scores (seeds, environments)."""
    functions = (metrics.aggregate_iqm, metrics.aggregate_median, metrics.aggregate_optimality_gap)
    return np.array([function(matrix) for function in functions])


def improvement(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """P(a run of A is better than one of B), ties counting half, mean over environments; scores (seeds, environments).

    rliable's `probability_of_improvement`, which uses a Mann-Whitney test whose p-value is not needed here, takes forty
    times as long in a bootstrap.
    """
    signs = np.sign(a[:, None] - b[None])  # (seeds of A, seeds of B, environments)
    return np.array([(signs + 1).mean() / 2])


def adastop(scores: dict[str, np.ndarray]) -> dict[tuple[str, str], str]:
    """AdaStop's decision on each pair of names, from their scores in the order of seeds, at a family-wise level of 5 %.

    It looks at most LOOKS times, after each SEEDS_PER_LOOK further seeds, as far as all names have them; names with
    fewer than SEEDS_PER_LOOK are left out. Decisions are ">", "<", "not told apart", or "needs ... seeds". adastop
    0.1.3 compares an absolute difference with a one-sided quantile, so that it tells twice as many equal algorithms
    apart as its level says (55 of 600 at 0.05 with one look): it is given half the level.
    """
    decided = {pair: f"needs {SEEDS_PER_LOOK} seeds" for pair in itertools.combinations(scores, 2)}
    names = [name for name, values in scores.items() if len(values) >= SEEDS_PER_LOOK]
    if len(names) < 2:
        return decided
    seeds = min(len(scores[name]) for name in names)
    looks = min(LOOKS, seeds // SEEDS_PER_LOOK)
    test = MultipleAgentsComparator(n=SEEDS_PER_LOOK, K=LOOKS, alpha=(1 - LEVEL) / 2, seed=0)
    for look in range(1, looks + 1):
        if not test.is_finished:
            seen = {name: scores[name][: look * SEEDS_PER_LOOK] for name in names}
            test.partial_compare(seen, verbose=False)
    words = {
        "larger": ">",
        "smaller": "<",
        "equal": "not told apart",
        "continue": f"needs {(looks + 1) * SEEDS_PER_LOOK} seeds",
    }
    for i, j in itertools.combinations(range(len(names)), 2):
        decision = test.decisions[str(np.array([i, j]))]  # adastop's way to name a pair
        decided[names[i], names[j]] = words[decision]
    return decided


# Figures


class Style:
    """Colour, dashes and label of each name, the same in all figures."""

    def __init__(self, runs: list[Run]):
        self.lines = {}  # name -> arguments of plot
        colors = {algorithm: (color, 0) for algorithm, color in records.COLORS.items()}
        others = sorted({self.family(run) for run in runs} - set(records.COLORS))
        for i, algorithm in enumerate(others):
            used_up, color = divmod(i, len(records.OTHER_COLORS))  # then the same colours again, in other dashes
            colors[algorithm] = records.OTHER_COLORS[color], used_up
        for algorithm, (color, first) in colors.items():
            names = sorted({run.name for run in runs if self.family(run) == algorithm})
            for i, name in enumerate(names, first):
                shade, dashes = divmod(i, len(records.DASHES))
                weight = 0.6**shade  # of the colour; the rest is white
                mixed = weight * np.array(matplotlib.colors.to_rgb(color)) + (1 - weight)
                self.lines[name] = {
                    "color": tuple(mixed),
                    "linestyle": records.DASHES[dashes],
                    "label": f"{name} ({self.seeds(name, runs)})",
                }

    @staticmethod
    def family(run: Run) -> str:
        """The name whose colour a run shares: for "Flow-G, BatchRenorm(s, A)" it is Flow-G."""
        start = run.algorithm.partition(",")[0]
        return start if start in records.COLORS else run.algorithm

    @staticmethod
    def seeds(name: str, runs: list[Run]) -> str:
        """How many seeds a name has in the environments, in words."""
        envs = by_env([run for run in runs if run.name == name])
        counts = {len(groups[name]) for groups in envs.values()}
        if counts == {1}:
            return "1 seed"
        ends = sorted({min(counts), max(counts)})
        return " to ".join(map(str, ends)) + " seeds"

    def color(self, name: str) -> tuple:
        """Its colour."""
        return self.lines[name]["color"]

    def draw(self, axis, name: str, x, mean, low, high, seeds: Sequence[tuple]) -> None:
        """A curve with its band, and the curves (x, y) of the seeds thinly."""
        color = self.color(name)
        for xs, ys in seeds:
            dot = "." if len(xs) == 1 else None
            axis.plot(xs, ys, color=color, alpha=0.35, linewidth=0.7, marker=dot)
        dots = "o" if len(x) < 5 else None
        axis.plot(x, mean, linewidth=2, marker=dots, **self.lines[name])
        axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def panels(count: int, width: float = 4.4, height: float = 3.4) -> tuple:
    """A figure with `count` panels, at most three in a row."""
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    size = width * columns, height * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.use_sticky_edges = False
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, list(axes.flat[:count])


def save(figure, axes: list, out: Path, name: str, caption: str = "") -> None:
    """Write a figure with its legend below the panels, as SVG and PNG; the same data give the same files."""
    found = {}  # label -> line
    for axis in axes:
        lines, labels = axis.get_legend_handles_labels()
        found |= zip(labels, lines, strict=True)
    if found:
        longest = max(len(label) for label in found)
        inches = 0.7 + 0.09 * longest
        columns = max(1, int(figure.get_figwidth() / inches))
        legend = figure.legend(found.values(), found, loc="outside lower center", ncols=columns, frameon=False)
        legend.set_title(caption, {"size": "small"})
    try:
        out.mkdir(parents=True, exist_ok=True)
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})
        figure.savefig(out / f"{name}.png", dpi=150)
    except OSError as error:
        fail(f"--out {out}: cannot write there ({error.strerror})")
    plt.close(figure)


def with_spaces(*axes) -> None:
    """100 000 in place of 100000 along these axes."""

    def shown(value: float, _) -> str:
        return f"{value:,.10g}".replace(",", "\xa0").replace("-", "\u2212")

    for axis in axes:
        axis.set_major_formatter(shown)
        axis.set_major_locator(matplotlib.ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))


def draw_curves(groups: dict[str, list[Run]], axis, style: Style, args: Args, time: bool) -> None:
    """Mean return of each group over seeds with its interval, and each seed thinly, against steps or minutes."""
    width = max(run.steps[-1] for runs in groups.values() for run in runs) / 50
    drawn = [0.0]
    for name, runs in groups.items():
        curves = []
        for run in runs:
            steps, returns, seconds = binned(run, width) if args.training else (run.steps, run.returns, run.seconds)
            curves.append((seconds / 60 if time else steps, returns))
            drawn.extend(returns)
        x, y = common_curve(curves)
        low = y.min(0)
        high = y.max(0)
        if len(runs) > 1 and len(x):
            _, ends = bootstrap({name: y}, lambda values: values.mean(0), args.reps)
            low, high = ends[name]
        style.draw(axis, name, x, y.mean(0), low, high, curves)
    lowest = min(drawn)
    highest = max(drawn[1:])
    margin = 0.05 * (highest - lowest) or 1.0
    below = margin if lowest < 0 else 0
    axis.set_ylim(lowest - below, highest + margin)
    axis.set_xlim(0, None)
    axis.set_xlabel("minutes of training" if time else "environment steps")
    axis.set_ylabel("training return" if args.training else "evaluation return")
    with_spaces(axis.xaxis, axis.yaxis)


def draw_all_curves(envs: dict[str, dict[str, list[Run]]], style: Style, args: Args, time: bool) -> None:
    """A figure of each environment and, if there are several, one of all."""
    caption = "mean over seeds, each seed thinly; band: 95 % bootstrap interval (2 or 3 seeds: their range)"
    suffix = ""
    if time:
        suffix = "-time"
        without = [env for env, groups in envs.items() if not have_seconds(groups)]
        if without:
            note(f"no figure against time of {', '.join(without)}: files without seconds")
        envs = {env: groups for env, groups in envs.items() if env not in without}
    for env, groups in envs.items():
        figure, axes = panels(1, width=6, height=4.2)
        draw_curves(groups, axes[0], style, args, time)
        axes[0].set_title(env)
        save(figure, axes, args.out, file_name(env) + suffix, caption)
    if len(envs) > 1:
        figure, axes = panels(len(envs))
        for axis, (env, groups) in zip(axes, envs.items(), strict=True):
            draw_curves(groups, axis, style, args, time)
            axis.set_title(env)
        save(figure, axes, args.out, "all" + suffix, caption)


def have_seconds(groups: dict[str, list[Run]]) -> bool:
    """Whether every run has times."""
    return all(run.seconds is not None for runs in groups.values() for run in runs)


def growth(run: Run, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and |dL/dA_0| / |dL/dA_K|, as the update saw them, from the `norms.csv` beside a run: mean or largest.

    Of a file that is not as `ablation.py` writes it, nothing, with a note.
    """
    norms = defaultdict(dict)  # step -> i -> |dL/dA_i|
    path = run.path.with_name("norms.csv")
    try:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                if row["statistics"] == "batch" and None not in row.values():  # the last row may be half written
                    norms[int(row["step"])][int(row["i"])] = float(row[column])
    except (KeyError, ValueError, csv.Error) as error:
        note(f"left out, {path}: {type(error).__name__} {error}")
        return np.array([]), np.array([])
    last = max((i for of_step in norms.values() for i in of_step), default=0)
    ratios = {step: of_step[0] / of_step[last] for step, of_step in norms.items() if {0, last} <= of_step.keys()}
    return np.array(list(ratios)), np.array(list(ratios.values()))


def draw_norms(env: str, groups: dict[str, list[Run]], style: Style, out: Path) -> None:
    """How gradients grow on their way back through the rollout, along training: geometric means over seeds."""
    columns = {"grad_norm": "mean of a batch's norms", "largest": "largest of a batch's norms"}
    with_norms = {}
    for name, runs in groups.items():
        left = [run for run in runs if run.path.with_name("norms.csv").exists()]
        left = [run for run in left if all(len(growth(run, column)[0]) for column in columns)]
        if left:
            with_norms[name] = left
    if not with_norms:
        return
    figure, axes = panels(2)
    for axis, (column, title) in zip(axes, columns.items(), strict=True):
        axis.axhline(1, color="0.6", linewidth=0.8)
        for name, runs in with_norms.items():
            curves = [growth(run, column) for run in runs]
            x, logs = common_curve([(steps, np.log(ratio)) for steps, ratio in curves])
            middle, low, high = np.exp([logs.mean(0), logs.min(0), logs.max(0)])
            style.draw(axis, name, x, middle, low, high, curves)
        axis.set(title=title, xlabel="environment steps", ylabel=r"$|dL/dA_0|\,/\,|dL/dA_K|$", yscale="log")
        with_spaces(axis.xaxis)
    save(figure, axes, out, f"{file_name(env)}-norms", f"{env}; band: the range of the seeds")


def draw_evaluations(env: str, groups: dict[str, list[Run]], style: Style, out: Path) -> None:
    """Success rate and return at each evaluation, offline to online, with t-intervals."""
    figure, axes = panels(2)
    offline = max(run.offline for runs in groups.values() for run in runs)
    for name, runs in groups.items():
        for axis, column, factor in zip(axes, ("success", "returns"), (100, 1), strict=True):
            points = at_points(runs, column)
            points = {step: values for step, values in points.items() if len(values) == len(runs)}  # of all seeds
            intervals = [t_interval(factor * values) for values in points.values()]
            mean, low, high = np.reshape(intervals, (-1, 3)).T
            if column == "success":
                low = low.clip(0, 100)
                high = high.clip(0, 100)
            seeds = [(run.steps, factor * getattr(run, column)) for run in runs]
            style.draw(axis, name, list(points), mean, low, high, seeds)
    for axis, label in zip(axes, ("success rate in %", "return"), strict=True):
        axis.axvline(offline, color="black", linewidth=0.8, linestyle=":")
        axis.set(xlabel="offline updates, then environment steps", ylabel=label)
        with_spaces(axis.xaxis, axis.yaxis)
    figure.suptitle(env)
    caption = "mean over seeds, 95 % t-interval, each seed thinly; dotted: online from here"
    save(figure, axes, out, file_name(env), caption)


def draw_intervals(statistics: dict[str, dict[str, tuple]], out: Path, file: str, colors: dict[str, tuple]) -> None:
    """A panel for each statistic, with a row for each name: estimate, low and high end."""
    count = len(colors)
    figure, axes = panels(len(statistics), height=1.2 + 0.35 * count)
    for axis, (title, rows) in zip(axes, statistics.items(), strict=True):
        for i, (name, (value, low, high)) in enumerate(rows.items()):
            axis.barh(i, high - low, left=low, height=0.6, color=colors[name], alpha=0.35)
            axis.plot([value, value], [i - 0.3, i + 0.3], color=colors[name], linewidth=2)
        labels = rows if axis is axes[0] else [""] * count
        axis.set(xlabel=title, yticks=range(count), yticklabels=labels)
        axis.invert_yaxis()
    save(figure, axes, out, file)


def draw_profiles(values: dict[str, np.ndarray], style: Style, args: Args) -> None:
    """Share of runs above each score."""
    every = np.concatenate([matrix.ravel() for matrix in values.values()])
    thresholds = np.linspace(min(0, every.min()), max(1, every.max()), 201)
    estimates, bands = bootstrap(values, lambda matrix: library.score_distributions(matrix, thresholds), args.reps)
    figure, axes = panels(1, width=6)
    for name in values:
        style.draw(axes[0], name, thresholds, estimates[name], *bands[name], [])
    axes[0].set(xlabel="score (0: random, 1: reference)", ylabel="share of runs above it", ylim=(-0.02, 1.02))
    save(figure, axes, args.out, "profiles", "95 % bootstrap interval")


# Tables


def markdown(*rows: Sequence[str]) -> None:
    """Print a table whose first row is its header. Raises ValueError unless all rows have equally many cells."""
    for row in rows:
        if len(row) != len(rows[0]):
            raise ValueError(f"{len(rows[0])} columns, but {row}")
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    print("\n".join(lines) + "\n")


def cell(value: float, low: float, high: float, digits: int = 0) -> str:
    """An estimate with its interval, if it has one."""
    estimate = f"{value:.{digits}f}"
    if math.isnan(low):
        return estimate
    return f"{estimate} [{low:.{digits}f}, {high:.{digits}f}]"


def listed(values: np.ndarray) -> str:
    """Each value, or a dash if there is none."""
    return ", ".join(f"{value:.0f}" for value in values) or "-"


def print_scores(envs: dict[str, dict[str, list[Run]]], found: dict[str, dict[str, np.ndarray]], ends: dict) -> None:
    """Score of each group: environment, name, step, seeds, mean with its t-interval, and each seed's."""
    rows = [("environment", "algorithm", "steps", "seeds", "return [95 %]", "each seed")]
    for env, names in found.items():
        for name, values in names.items():
            counted = str(len(values))
            total = len(envs[env][name])
            if len(values) < total:
                counted += f" of {total}"
            mean = cell(*t_interval(values)) if len(values) else "-"
            rows.append((env, name, f"{ends[env]:.0f}", counted, mean, listed(values)))
    markdown(*rows)


def print_side_by_side(found: dict[str, dict[str, np.ndarray]]) -> None:
    """Score of each group, a column for each environment: mean with its t-interval; of fewer than three seeds, each."""
    rows = [("algorithm", *found)]
    for name in dict.fromkeys(name for groups in found.values() for name in groups):
        cells = []
        for groups in found.values():
            values = groups.get(name, np.array([]))
            if len(values) > 2:
                cells.append(cell(*t_interval(values)))
            elif len(values) == 2:
                cells.append(f"{values.mean():.0f} ({listed(values)})")
            else:
                cells.append(listed(values))
        rows.append((name, *cells))
    markdown(*rows)


def print_evaluations(env: str, groups: dict[str, list[Run]]) -> None:
    """Success in % and return at each evaluation, with t-intervals over seeds."""
    rows = [(env, "step", "phase", "seeds", "success % [95 %]", "return [95 %]")]
    for name, runs in groups.items():
        returns = at_points(runs, "returns")
        for step, success in at_points(runs, "success").items():
            phases = {"offline" if step <= run.offline else "online" for run in runs if step in run.steps}
            mean, *ends = t_interval(100 * success)
            rate = cell(mean, *np.clip(ends, 0, 100))
            score = cell(*t_interval(returns[step]))
            rows.append((name, f"{step:.0f}", "/".join(sorted(phases)), str(len(success)), rate, score))
    markdown(*rows)


def print_adastop(found: dict[str, dict[str, np.ndarray]]) -> None:
    """AdaStop's decisions, environment by environment."""
    rows = [("environment", "A", "AdaStop", "B")]
    for env, groups in found.items():
        for (a, b), word in adastop(groups).items():
            rows.append((env, a, word, b))
    if len(rows) > 1:
        markdown(*rows)


def show_aggregates(values: dict[str, np.ndarray], style: Style, args: Args) -> None:
    """Figure and table of the STATISTICS; `values` is name -> scaled scores (seeds, environments)."""
    estimates, ends = bootstrap(values, aggregates, args.reps)
    shown = {}  # statistic -> name -> estimate, low and high end
    for i, title in enumerate(STATISTICS):
        shown[title] = {name: (estimates[name][i], *ends[name][:, i]) for name in values}
    colors = {name: style.color(name) for name in values}
    draw_intervals(shown, args.out, "statistics", colors)
    rows = [("algorithm", *STATISTICS)]
    for name in values:
        rows.append((name, *(cell(*shown[title][name], 2) for title in STATISTICS)))
    markdown(*rows)


def show_improvement(values: dict[str, np.ndarray], style: Style, args: Args) -> None:
    """Figure and table of the probability that a run of one name is better than one of another."""
    pairs = {(a, b): [values[a], values[b]] for a, b in itertools.combinations(values, 2)}
    estimates, ends = bootstrap(pairs, improvement, args.reps)
    shown = {}  # pair in words -> estimate, low and high end
    colors = {}
    for a, b in pairs:
        words = f"{a} better than {b}"
        shown[words] = (estimates[a, b][0], *ends[a, b][:, 0])
        colors[words] = style.color(a)
    draw_intervals({"probability of improvement": shown}, args.out, "improvement", colors)
    rows = [(words, cell(*interval, 2)) for words, interval in shown.items()]
    markdown(("", "probability [95 %]"), *rows)


def show_statistics(found: dict[str, dict[str, np.ndarray]], style: Style, args: Args) -> None:
    """Figures and tables over environments; `found` is environment -> name -> scores."""
    if "improvement" in args.figures:
        print_adastop(found)  # within an environment: it needs no scale
    values = matrices(found)
    if not values:
        return
    if "statistics" in args.figures:
        show_aggregates(values, style, args)
    if "profiles" in args.figures:
        draw_profiles(values, style, args)
    if "improvement" in args.figures and len(values) > 1:
        show_improvement(values, style, args)


def main() -> None:
    """Draw what the command line names and print the tables."""
    args = parse_args()
    plt.rcParams.update({"svg.hashsalt": "sac-flow"})
    runs = records.read(args.folders, args.training, args.only)
    style = Style(runs)
    tasks = by_env([run for run in runs if run.success is not None])
    for env, groups in tasks.items():
        if "curves" in args.figures:
            draw_evaluations(env, groups, style, args.out)
        print_evaluations(env, groups)
    runs = [run for run in runs if run.success is None]
    envs = by_env(runs)
    last = args.steps or math.inf
    shown = by_env([run.until(last) for run in runs if run.steps[0] <= last])
    for kind in ("curves", "time"):
        if kind in args.figures:
            draw_all_curves(shown, style, args, kind == "time")
    if "norms" in args.figures:
        for env, groups in shown.items():
            draw_norms(env, groups, style, args.out)
    ends = {env: args.steps or records.end_of(groups) for env, groups in envs.items()}
    found = {env: records.scores(groups, ends[env]) for env, groups in envs.items()}
    if found:
        print_scores(envs, found, ends)
        if len(found) > 1:
            print_side_by_side(found)
    if {"statistics", "profiles", "improvement"} & set(args.figures):
        show_statistics(found, style, args)


if __name__ == "__main__":
    main()
