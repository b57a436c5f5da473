"""Learning curves from returns.csv or eval.csv files: the mean over seeds of each script, and each seed thinly.

    python benchmark/plot.py benchmark/results/hopper-v4
    python benchmark/plot.py benchmark/results/lift

draws every <script>_seed<n>.csv of the folder into <folder>.png and prints the table that goes with it. Evaluations
of sac_flow_offline2online.py give success rates, with the 95 % interval over the episodes of all seeds, and returns.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit("plot.py: error: needs matplotlib: pip install -r benchmark/requirements.txt")

WINDOW = 10_000  # steps over which returns are averaged


def smoothed(steps: np.ndarray, returns: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Mean return of the episodes that ended in the WINDOW steps before each step of `grid`; NaN where none did."""
    inside = [(steps > step - WINDOW) & (steps <= step) for step in grid]
    return np.array([returns[mask].mean() if mask.any() else np.nan for mask in inside])


def evaluations(folder: Path, paths: list[Path]) -> None:
    """Success rate and return at each evaluation, left and right of the end of the offline phase."""
    runs = defaultdict(list)  # velocity -> rows of each seed
    for path in paths:
        runs[path.stem.split("_seed")[0]].append(list(csv.DictReader(open(path))))
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    steps = [int(row["step"]) for row in next(iter(runs.values()))[0]]
    offline = max(int(row["step"]) for row in next(iter(runs.values()))[0] if row["phase"] == "offline")
    print("| velocity |" + "".join(f" {step} |" for step in steps) + "\n|" + "---|" * (len(steps) + 1))
    colors = {"gated": "#c44e52", "decoded": "#4c72b0", "plain": "#888888"}
    for name, seeds in runs.items():
        color = colors.get(name)
        rates, returns = (
            np.array([[float(row[column]) for row in rows[: len(steps)]] for rows in seeds])
            for column in ("success_rate", "return")
        )
        n, rate, z = sum(int(rows[0]["episodes"]) for rows in seeds), rates.mean(0), 1.96
        centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)  # Wilson's interval
        half = z / (1 + z**2 / n) * np.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
        axes[0].errorbar(steps, rate, [rate - centre + half, centre + half - rate], color=color, capsize=2, label=name)
        axes[0].plot(steps, rates.T, color=color, alpha=0.3, linewidth=0.8)
        axes[1].plot(steps, returns.mean(0), color=color, label=f"{name} (mean of {len(seeds)} seeds)")
        axes[1].plot(steps, returns.T, color=color, alpha=0.3, linewidth=0.8)
        cells = [f"{100 * r:.0f} % ({value:.1f})" for r, value in zip(rate, returns.mean(0), strict=True)]
        print(f"| {name} | {' | '.join(cells)} |")
    for axis, label in zip(axes, ("success rate", "return"), strict=True):
        axis.axvline(offline, color="black", linewidth=0.8, linestyle=":")
        axis.set(xlabel="offline updates, then environment steps", ylabel=label, title=folder.name)
        axis.grid(alpha=0.3)
    axes[1].legend()
    figure.savefig(folder.with_suffix(".png"), dpi=120)


def main() -> None:
    """Draw the folder named on the command line."""
    folder = Path(sys.argv[1] if len(sys.argv) == 2 else "")
    curves = defaultdict(dict)  # script -> seed -> (steps, returns)
    paths = sorted(folder.glob("*_seed*.csv"))
    if paths and "success_rate" in paths[0].read_text().splitlines()[0]:
        return evaluations(folder, paths)
    for path in paths:
        script, seed = path.stem.split("_seed")
        rows = [row for row in csv.DictReader(open(path)) if row.get("kind", "deterministic") == "deterministic"]
        rows = [(float(row["step"]), float(row["return"])) for row in rows]
        curves[script][int(seed)] = np.array(rows).T
    if not curves:
        sys.exit("plot.py: error: name one folder that holds <script>_seed<n>.csv files")
    last = max(steps[-1] for runs in curves.values() for steps, _ in runs.values())
    grid = np.arange(WINDOW, WINDOW * np.ceil(last / WINDOW) + 1, WINDOW / 4)

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    print(f"| script | {' | '.join(f'seed {seed}' for seed in next(iter(curves.values())))} | mean |")
    for color, (script, runs) in zip(("tab:blue", "tab:orange", "tab:green", "tab:red"), curves.items(), strict=False):
        values = np.array([smoothed(steps, returns, grid) for steps, returns in runs.values()])
        axes.plot(grid, values.T, color=color, alpha=0.3, linewidth=0.8)
        axes.plot(grid, values.mean(0), color=color, linewidth=2, label=f"{script} (mean of {len(runs)} seeds)")
        finals = " | ".join(f"{value:.0f}" for value in values[:, -1])
        print(f"| {script} | {finals} | {values[:, -1].mean():.0f} |")
    axes.set(xlabel="environment steps", ylabel=f"return, mean over {WINDOW} steps", title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
