"""Learning curves from returns.csv files: the mean over seeds of each script, and each seed thinly.

    python benchmark/plot.py benchmark/results/hopper-v4

draws every <script>_seed<n>.csv of the folder into <folder>.png and prints the table that goes with it.
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


def main() -> None:
    """Draw the folder named on the command line."""
    folder = Path(sys.argv[1] if len(sys.argv) == 2 else "")
    curves = defaultdict(dict)  # script -> seed -> (steps, returns)
    for path in sorted(folder.glob("*_seed*.csv")):
        script, seed = path.stem.split("_seed")
        rows = [(float(row["step"]), float(row["return"])) for row in csv.DictReader(open(path))]
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
