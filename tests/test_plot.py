"""plot.py and records.py: what is read, every statistic against numbers computed by hand, and what is drawn."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rliable")

import plot
import records
from helpers import ROOT, command

EVAL = "step,kind,return,return_error,length,episodes,seconds\n"


@pytest.fixture
def main(tmp_path, monkeypatch, capsys):
    """The program in this process, in a fresh folder: `main(*flags)` returns its tables as lists of rows of cells."""
    monkeypatch.chdir(tmp_path)

    def main(*flags):
        monkeypatch.setattr("sys.argv", ["plot.py", *map(str, flags)])
        plot.main()
        tables = capsys.readouterr().out.strip().split("\n\n")
        tables = [[row.strip("| ").split(" | ") for row in table.splitlines()] for table in tables]
        assert all(table[1] == ["|".join(["---"] * len(table[0]))] for table in tables)  # heads line up with rows
        assert all(len(row) == len(table[0]) for table in tables for row in table[2:])
        return [[table[0], *table[2:]] for table in tables]

    return main


@pytest.fixture
def drawn(monkeypatch):
    """What would be saved: file name -> axes, with all their lines."""
    figures = {}

    def save(figure, axes, out, name, caption=""):
        figures[name] = axes

    monkeypatch.setattr(plot, "save", save)
    yield figures
    plot.plt.close("all")


def write(path: Path, points, text=EVAL) -> None:
    """An eval.csv with a deterministic row for each (step, return), at 10 steps/s, or with `text` as its head."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{step},deterministic,{value},1,100,5,{step / 10}" for step, value in points]
    path.write_text(text + "\n".join(rows) + "\n")


def write_run(folder: Path, points, **flags) -> None:
    """A folder of runs/ with these flags and evaluations."""
    write(folder / "eval.csv", points)
    (folder / "args.json").write_text(json.dumps({"env_id": "Hopper-v4", "seed": 1, **flags}))


def curve(axis, label: str) -> tuple[list, list]:
    """x and y of the line with that label."""
    (line,) = (line for line in axis.get_lines() if line.get_label() == label)
    return list(line.get_xdata()), list(line.get_ydata())


# --- statistics by hand ---


def test_t_interval():
    """1, 2, 3: standard error 1 / sqrt(3), 97.5 % point of t with 2 degrees of freedom 4.3027, of a printed table."""
    mean, low, high = plot.t_interval(np.array([1.0, 2, 3]))
    assert (mean, low, high) == pytest.approx((2, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    assert np.isnan(plot.t_interval(np.array([1.0]))[1:]).all()


def test_aggregates():
    """Two environments of four runs. Middle half of 0, .1, .2, .3, .4, .6, 1, 2: .2 to .6; means .15 and 1."""
    scores = np.array([[0.0, 0.4], [0.1, 0.6], [0.2, 1.0], [0.3, 2.0]])
    iqm = (0.2 + 0.3 + 0.4 + 0.6) / 4
    gap = (1 + 0.9 + 0.8 + 0.7 + 0.6 + 0.4 + 0 + 0) / 8  # what is above 1 makes up for nothing
    assert plot.aggregates(scores) == pytest.approx([iqm, (0.15 + 1) / 2, gap])


def test_improvement():
    """A: 1, 3 and 5, 5; B: 2, 2, 2 and 5, 6, 7. Wins 3 of 6; ties 2 of 6 as half."""
    a = np.array([[1.0, 5], [3, 5]])
    b = np.array([[2.0, 5], [2, 6], [2, 7]])
    assert plot.improvement(a, b) == pytest.approx([(3 / 6 + 1 / 6) / 2])
    assert plot.improvement(a, b) == pytest.approx([plot.metrics.probability_of_improvement(a, b)])


def test_bootstrap_is_stratified_and_repeats():
    """Of two runs in two environments, each environment's mean takes three values, with chances 1/4, 1/2 and 1/4.

    Drawn for each environment by itself all nine pairs come up; runs drawn as a whole would give three.
    """
    scores = np.array([[0.0, 0], [10, 2]])
    estimate, ends = plot.bootstrap({"a": scores}, lambda x: x.mean(0), 2000)
    assert list(estimate["a"]) == [5, 1] and ends["a"].tolist() == [[0, 0], [10, 2]]
    draws = []
    plot.bootstrap({"a": scores}, lambda x: (draws.append(tuple(x.mean(0))), x.mean(0))[1], 2000)
    shares = {draw: draws[1:].count(draw) / 2000 for draw in draws}
    for i, j in itertools.product((0, 1, 2), repeat=2):
        assert shares[5.0 * i, 1.0 * j] == pytest.approx(math.comb(2, i) * math.comb(2, j) / 16, abs=0.03)
    scores = np.arange(30.0).reshape(10, 3) ** 2
    again = plot.bootstrap({"a": scores}, plot.aggregates, 50), plot.bootstrap({"a": scores}, plot.aggregates, 50)
    assert again[0][1]["a"].tolist() == again[1][1]["a"].tolist()


def test_bootstrap_intervals_are_of_95_percent():
    """Of four seeds 0, 0, 0, 1 the resampled sum is binomial: at most 2 in 94.9 % of the draws, at most 3 in 99.6 %."""
    mean = lambda matrix: np.array([matrix.mean()])  # noqa: E731
    _, ends = plot.bootstrap({"a": np.array([[0.0], [0.0], [0.0], [1.0]])}, mean, reps=5000)
    assert ends["a"][:, 0].tolist() == [0, 0.75]


def test_one_seed_has_no_bootstrap_interval():
    """Its resamples are all itself; of a pair one seed is enough to leave the interval out."""
    values = {"one": np.array([[0.5, 1.0]]), "two": np.array([[0.5, 1.0], [0.7, 0.2]])}
    estimates, ends = plot.bootstrap(values, plot.aggregates, 50)
    assert np.isnan(ends["one"]).all() and not np.isnan(ends["two"]).any() and estimates["one"][0] == 0.75
    pairs = {("one", "two"): list(values.values()), ("two", "two"): [values["two"]] * 2}
    _, ends = plot.bootstrap(pairs, plot.improvement, 50)
    assert np.isnan(ends["one", "two"]).all() and not np.isnan(ends["two", "two"]).any()


def test_profile(drawn):
    """Scores 0.2, 0.4, 0.4, 0.8: the share above 0.1, 0.3, 0.5 and 0.9."""
    runs = [records.Run(Path(), "E", "Flow-G", [], i, *2 * [np.array([1.0])]) for i in range(4)]
    scores = {"Flow-G": np.array([[0.2, 0.4], [0.4, 0.8]])}
    plot.draw_profiles(scores, plot.Style(runs), plot.Args((), reps=20))
    x, y = curve(drawn["profiles"][0], "Flow-G (4 seeds)")
    assert np.interp([0.1, 0.3, 0.5, 0.9], x, y).tolist() == [1, 0.75, 0.25, 0]


def test_every_name_has_a_line_of_its_own():
    """However many there are; and every variant of the ablation has a name."""
    import ablation

    assert set(records.ABLATION) == set(ablation.VARIANTS)
    names = [*records.ABLATION.values(), "Flow-T", "Gaussian", "Theirs", "Mine"]
    runs = [records.Run(Path(), "E", name, [], 1, *2 * [np.array([1.0])]) for name in names]
    runs += [records.Run(Path(), "E", "Flow-G", [f"K={k}"], 1, *2 * [np.array([1.0])]) for k in range(5)]
    style = plot.Style(runs)
    lines = style.lines.values()
    assert len(lines) == len(names) + 5 == len({(line["color"], line["linestyle"]) for line in lines})
    variants = ["Flow-G", "Plain flow, BatchRenorm(s, A)", "Flow-G, BatchRenorm(s, A)"]
    style = plot.Style([records.Run(Path(), "E", name, [], 1, *2 * [np.array([1.0])]) for name in variants])
    colors = [style.color(name) for name in variants]
    assert colors[0] == colors[2] != colors[1]


def test_score_and_its_end():
    """The last tenth of the steps that half or more of each group's runs reached; one that stopped is not counted."""

    def run(name, last, seed):
        steps = np.arange(100.0, last + 1, 100)
        return records.Run(Path(), "E", name, [], seed, steps, steps + seed)

    groups = {"a": [run("a", 3000, 1), run("a", 2000, 2), run("a", 500, 3)], "b": [run("b", 9000, 1)]}
    assert records.end_of(groups) == 2000
    found = records.scores(groups, 2000)
    assert found["a"].tolist() == [1901, 1902] and found["b"].tolist() == [1901]  # 1 800, 1 900, 2 000, + seed


def rank(a, b) -> int:
    """How many of the ways to split the values into groups of these sizes have as large a difference of means."""
    together = [*a, *b]
    parts = itertools.combinations(range(len(together)), len(a))
    sums = [sum(together[i] for i in part) for part in parts]
    return sum(value >= sum(a) - 1e-9 for value in sums)


@pytest.mark.parametrize(
    "a, b, expected_rank, word",
    [
        ((6, 7, 8, 9, 10.5), (1, 2, 3, 4, 5), 1, ">"),
        ((5.1, 6.1, 8, 9, 10.5), (1, 2, 3, 4, 6.6), 3, ">"),
        ((1, 2, 3, 4, 5), (6, 7, 8, 9, 10.5), 252, "<"),
        ((4.2, 7, 8, 9, 10.5), (1, 2, 3, 5.4, 6.2), 4, "needs 10 seeds"),
    ],
)
def test_adastop_by_hand(a, b, expected_rank, word):
    """The first of two looks spends half of 5 %, on two sides: 0.0125 of the 252 splits of ten, the three first ones.

    Without the correction that plot.py makes of the level the last of these would be told apart.
    """
    assert rank(a, b) == expected_rank
    assert plot.adastop({"a": np.array(a), "b": np.array(b)}) == {("a", "b"): word}


def test_adastop_looks_at_the_first_seeds_first():
    """Five seeds decide; what the next five would say is not looked at."""
    better, worse = [10.0, 11.0, 12.0, 13.0, 14.0], [0.0, 1.0, 2.0, 3.0, 4.0]
    scores = {"a": np.array(better + worse), "b": np.array(worse + better)}
    assert plot.adastop(scores) == {("a", "b"): ">"}


def test_adastop_needs_seeds_and_ends():
    scores = {name: np.array([1.0, 2, 3, 4]) for name in "abc"}
    assert plot.adastop(scores) == {pair: "needs 5 seeds" for pair in itertools.combinations("abc", 2)}
    scores |= {"a": np.arange(5.0) + 10, "b": np.arange(6.0)}  # c's four keep neither from being compared
    assert plot.adastop(scores) == {("a", "b"): ">", ("a", "c"): "needs 5 seeds", ("b", "c"): "needs 5 seeds"}
    same = {name: np.arange(12.0) for name in "ab"}
    assert plot.adastop(same) == {("a", "b"): "not told apart"}


def test_adastop_needs_no_scale(main, drawn, tmp_path):
    for seed in range(1, 6):
        write(tmp_path / "own-v0" / f"sac_flow_g_seed{seed}_eval.csv", [(100, 100 + seed)])
        write(tmp_path / "own-v0" / f"sac_flow_t_seed{seed}_eval.csv", [(100, seed)])
    assert main("own-v0", "--figures", "improvement", "--only", "sac_flow_g")  # one algorithm: nothing to compare
    *_, table = main("own-v0", "--figures", "improvement")
    assert table == [["environment", "A", "AdaStop", "B"], ["own-v0", "Flow-G", ">", "Flow-T"]]


def test_scaling_and_what_all_have(capsys):
    """D4RL's ranges. Left out: environments that an algorithm lacks, or without a range; seeds that not all have."""
    assert plot.scaled(np.array([-20.272305, 3234.3]), "Hopper-v4").tolist() == [0, 1]
    found = {
        "Hopper-v4": {"a": np.array([3234.3, -20.272305, 0]), "b": np.array([3234.3])},
        "Ant-v4": {"a": np.array([3879.7, -325.6]), "b": np.array([-325.6])},
        "Walker2d-v4": {"a": np.array([1.0]), "b": np.array([])},
        "Own-v0": {"a": np.array([1.0]), "b": np.array([1.0])},
    }
    values = plot.matrices(found)
    assert values["a"].tolist() == [[1, 1], [0, 0]] and values["b"].tolist() == [[1, 0]]
    notes = capsys.readouterr().err
    assert "without Walker2d-v4, which has no score of b" in notes and "--ranges Own-v0=LOW,HIGH" in notes
    assert "of a with the first 2 seeds" in notes


# --- what was wrong ---


def test_each_file_has_its_own_steps(main, drawn, tmp_path):
    """Evaluations at 100, 200 and 300, and at 150 and 300: the mean is of values at the same step."""
    write(tmp_path / "hopper-v4" / "sac_flow_g_seed1_eval.csv", [(100, 0), (200, 100), (300, 200)])
    write(tmp_path / "hopper-v4" / "sac_flow_g_seed2_eval.csv", [(150, 1000), (300, 2500)])
    main("hopper-v4", "--figures", "curves")
    x, y = curve(drawn["hopper-v4"][0], "Flow-G (2 seeds)")
    assert x == [150, 200, 300] and y == pytest.approx([(50 + 1000) / 2, (100 + 1500) / 2, (200 + 2500) / 2])


def test_success_at_each_file_s_own_steps(main, drawn, tmp_path):
    """Offline to online: one seed was evaluated at other points, and stopped early."""
    for seed, points in ((1, ((100, "offline", 0.8),)), (2, ((100, "offline", 0.4), (200, "online", 0.6)))):
        lines = [f"{step},{phase},{rate},{-step},50,1" for step, phase, rate in points]
        path = tmp_path / "lift" / f"gated_seed{seed}.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_text("step,phase,success_rate,return,episodes,seconds\n" + "\n".join(lines) + "\n")
    (table,) = main("lift", "--figures", "curves")
    # Mean 60 %, standard error 20 %, t with one degree of freedom 12.706: cut to what a share can be.
    assert table[1:] == [
        ["Flow-G", "100", "offline", "2", "60 [0, 100]", "-100 [-100, -100]"],
        ["Flow-G", "200", "online", "1", "60", "-200"],
    ]
    x, y = curve(drawn["lift"][0], "Flow-G (2 seeds)")
    assert x == [100] and y == pytest.approx([60])  # the mean ends with the first seed
    assert [line.get_xdata()[0] for line in drawn["lift"][0].get_lines() if line.get_linestyle() == ":"] == [100]


def test_offline_phases_of_different_length(main, drawn, tmp_path):
    """A step may be offline for one seed and online for another; a mean of no common step is not drawn."""
    for seed, points in ((1, ((100, "offline"), (200, "online"))), (2, ((200, "offline"),)), (3, ((50, "offline"),))):
        lines = [f"{step},{phase},0.5,0,50,1" for step, phase in points]
        path = tmp_path / "lift" / f"gated_seed{seed}.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_text("step,phase,success_rate,return,episodes,seconds\n" + "\n".join(lines) + "\n")
    (table,) = main("lift", "--figures", "curves")
    phases = [row[1:4] for row in table[1:]]
    assert phases == [["50", "offline", "1"], ["100", "offline", "1"], ["200", "offline/online", "2"]]
    assert curve(drawn["lift"][0], "Flow-G (3 seeds)") == ([], [])


def test_five_scripts_are_five_curves(main, drawn, tmp_path):
    """Known ones have their names and colours, others that of their files."""
    labels = ["sac_flow_g", "sac_flow_t", "sac_flow_naive", "sac_gaussian", "crossq", "cleanrl_sac"]
    for label in labels:
        write(tmp_path / "ant-v4" / f"{label}_seed1_eval.csv", [(100, 1), (200, 2)])
    (table,) = main("ant-v4", "--figures", "curves")
    names = ["Flow-G", "Flow-T", "Plain flow", "Gaussian", "cleanrl_sac", "crossq"]
    assert [row[1] for row in table[1:]] == names
    lines = {line.get_label(): line.get_color() for line in drawn["ant-v4"][0].get_lines()}
    colors = [lines[f"{name} (1 seed)"] for name in names]
    assert len(set(colors)) == 6
    assert [plot.matplotlib.colors.to_hex(color).upper() for color in colors[:4]] == list(records.COLORS.values())


def test_a_seed_that_stopped_early(main, drawn, tmp_path, capsys):
    """It is drawn as far as it goes, the mean no further; it is not in the score, and the table says so."""
    for seed in (1, 2, 3):
        last = 300 if seed == 3 else 1000
        points = [(step, step * seed) for step in range(100, last + 1, 100)]
        write(tmp_path / "ant-v4" / f"sac_flow_g_seed{seed}_eval.csv", points)
    main("ant-v4", "--figures", "curves")
    axis = drawn["ant-v4"][0]
    x, y = curve(axis, "Flow-G (3 seeds)")
    assert x == [100, 200, 300] and y == [200, 400, 600]
    assert sorted(line.get_xdata()[-1] for line in axis.get_lines()) == [300, 300, 1000, 1000]
    (table,) = main("ant-v4", "--figures", "time")
    assert table[1][2:] == ["1000", "2 of 3", "1425 [-4610, 7460]", "950, 1900"]  # 1425 +- 12.706 * 475


def test_folders_of_the_same_name_stay_apart(main, tmp_path):
    """before/runs and after/runs, with the same seeds: two groups, not one of twice the seeds."""
    for side, value in (("before", 1), ("after", 2)):
        for seed in (1, 2):
            folder = tmp_path / side / "runs" / f"Hopper-v4__sac_flow_g__{seed}"
            write_run(folder, [(100, value)], seed=seed)
    (table,) = main("before/runs", "after/runs", "--figures", "time")
    assert [row[1:4] for row in table[1:]] == [["Flow-G after/runs", "100", "2"], ["Flow-G before/runs", "100", "2"]]


def test_runs_of_versions_with_different_flags_are_named(tmp_path, capsys):
    write_run(tmp_path / "runs" / "Hopper-v4__sac_flow_g__1", [(100, 1)], seed=1)
    write_run(tmp_path / "runs" / "Hopper-v4__sac_flow_g__2", [(100, 2)], seed=2, new_flag=3)
    assert len(records.read([tmp_path])) == 2
    assert "Flow-G on Hopper-v4: its runs are of versions with different flags" in capsys.readouterr().err


def test_versions_with_different_flags_are_still_told_apart_by_those_they_share(tmp_path):
    write_run(tmp_path / "runs" / "Hopper-v4__sac_flow_g__1", [(100, 1)], seed=1, batch_size=256)
    write_run(tmp_path / "runs" / "Hopper-v4__sac_flow_g__2", [(100, 2)], seed=2, batch_size=128, new_flag=3)
    assert {run.name for run in records.read([tmp_path])} == {"Flow-G batch-size=128", "Flow-G batch-size=256"}


def test_a_flag_of_the_data_sets_runs_apart(main, tmp_path):
    for steps in (2500, 5000):
        folder = tmp_path / "runs" / f"lift__{steps}"
        write_run(folder, [(100, steps)], env_id="lift", velocity="gated", offline_steps=steps)
    (table,) = main("runs", "--figures", "time")
    assert [row[1] for row in table[1:]] == ["Flow-G offline-steps=2500", "Flow-G offline-steps=5000"]


def test_runs_of_the_ablation_and_of_sbx_are_read(main, tmp_path):
    for variant in ("plain", "authors"):
        write_run(tmp_path / "runs" / f"Ant-v4__ablation__variant={variant}__1", [(100, 1)], variant=variant)
    write_run(tmp_path / "runs" / "Hopper-v4__train_sbx__1", [(100, 2)], seed=1)
    (table,) = main("runs", "--figures", "time")
    assert sorted(row[1] for row in table[1:]) == ["Authors' plain flow", "CrossQ (sbx)", "Plain flow"]


def test_growth_of_the_gradients_of_the_ablation_is_drawn(main, drawn, tmp_path, monkeypatch):
    """A_0 over A_K, K = 2, normalised by the batch: 1 / 4 and 8 / 2 of the mean, 3 / 4 and 9 / 3 of the largest."""
    folder = tmp_path / "runs" / "Ant-v4__ablation__variant=flow-g__1"
    write_run(folder, [(100, 1), (200, 2)], env_id="Ant-v4", variant="flow-g")
    write_run(tmp_path / "runs" / "Hopper-v4__sac_flow_g__1", [(100, 1)])  # leaves none
    rows = [
        (100, "batch", (1, 2, 4), (3, 5, 4)),
        (200, "batch", (8, 9, 2), (9, 1, 3)),
        (200, "running", (7, 7, 7), (7, 7, 7)),
    ]
    lines = ["step,statistics,i,grad_norm,median,largest,seconds"]
    for step, kind, means, largest in rows:
        lines += [f"{step},{kind},{i},{means[i]},0,{largest[i]},1" for i in range(3)]
    (folder / "norms.csv").write_text("\n".join(lines) + "\n300,batch,0,5,0,5,1\n300,batch,1,6")  # is being written
    write_run(
        other := tmp_path / "runs" / "Ant-v4__ablation__variant=plain__1", [(100, 1)], env_id="Ant-v4", variant="plain"
    )
    (other / "norms.csv").write_text(lines[0] + "\n")  # none yet
    texts = {"time": "not,norms\n1,2\n", "sigma": f"{lines[0]}\n100,batch,zero,1,1,1,1\n"}
    texts["renorm"] = f"{lines[0]}\n100,batch,0,1,1,large,1\n"  # in one of the two columns that are drawn
    for variant, text in texts.items():
        damaged = tmp_path / "runs" / f"Ant-v4__ablation__variant={variant}__1"
        write_run(damaged, [(100, 1)], env_id="Ant-v4", variant=variant)
        (damaged / "norms.csv").write_text(text)
    notes = []
    monkeypatch.setattr(plot, "note", notes.append)
    main("runs", "--figures", "norms")
    assert len(notes) == 3 and all(note.startswith("left out, ") for note in notes)
    assert set(drawn) == {"ant-v4-norms"}
    of_mean, of_largest = drawn["ant-v4-norms"]
    assert curve(of_mean, "Flow-G (1 seed)") == ([100, 200], pytest.approx([0.25, 4]))
    assert curve(of_largest, "Flow-G (1 seed)") == ([100, 200], pytest.approx([0.75, 3]))


def test_short_training_runs_are_drawn(main, drawn, tmp_path):
    """Two episodes in 300 steps; bins of 1/50 of the run: each is a point of its own."""
    path = tmp_path / "ant-v4" / "sac_flow_g_seed1.csv"
    path.parent.mkdir()
    path.write_text("step,return,length,seconds\n95,10,95,60\n299,20,204,120\n300,40,1,180\n")
    main("ant-v4", "--training", "--figures", "curves", "time")
    assert curve(drawn["ant-v4"][0], "Flow-G (1 seed)") == ([96, 300], [10, 30])
    assert curve(drawn["ant-v4-time"][0], "Flow-G (1 seed)") == ([1, 3], [10, 30])
    path.write_text("step,return\n95,10\n299,20\n300,40\n")
    main("ant-v4", "--training", "--figures", "curves")
    assert curve(drawn["ant-v4"][0], "Flow-G (1 seed)") == ([96, 300], [10, 30])


def test_figures_and_help(tmp_path):
    """The program as a user starts it; the files are there, and the same the second time."""
    done = subprocess.run(command("plot", "--help"), text=True, capture_output=True)
    assert done.returncode == 0 and "--training" in done.stdout
    for script, env, seed in itertools.product(("sac_flow_g", "sac_gaussian"), ("ant-v4", "hopper-v4"), (1, 2)):
        value = 1000 * seed + (500 if "flow" in script else 0)
        write(tmp_path / "in" / env / f"{script}_seed{seed}_eval.csv", [(100, 0), (200, value)])
    outputs = []
    for out, figures in (("all", plot.FIGURES), ("again", ("statistics", "profiles", "improvement"))):
        flags = ["in", "--out", out, "--reps", "50", "--figures", *figures]
        done = subprocess.run(command("plot", *flags), cwd=tmp_path, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    names = "all all-time ant-v4 ant-v4-time hopper-v4 hopper-v4-time statistics profiles improvement".split()
    first = {path.name: path.read_bytes() for path in (tmp_path / "all").iterdir()}
    assert set(first) == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    assert {path.name: first[path.name] == path.read_bytes() for path in (tmp_path / "again").iterdir()} == {
        f"{name}.{kind}": True for name in names[6:] for kind in ("svg", "png")
    }
    assert outputs[0] == outputs[1] and "| Flow-G better than Gaussian | 0.75 [" in outputs[0]


# --- what is read ---


def test_runs_and_what_tells_them_apart(tmp_path):
    """Names from folders, flags that differ, nothing for those that do not; deterministic rows alone."""
    for flags, seed in itertools.product((128, 256), (1, 2)):
        name = f"Hopper-v4__sac_flow_g__batch-size={flags}__{seed}"
        write_run(tmp_path / "runs" / "sweep" / name, [(100, seed)], seed=seed, batch_size=flags, total_timesteps=seed)
    write_run(tmp_path / "runs" / "sweep" / "Hopper-v4__sac_flow_t__1", [(100, 7)], batch_size=128, velocity_dim=64)
    path = tmp_path / "runs" / "sweep" / "Hopper-v4__sac_flow_t__1" / "eval.csv"
    path.write_text(path.read_text() + "100,stochastic,99,1,100,5,10\n200,deterministic,9")  # half a line
    write_run(tmp_path / "runs" / "o2o", [(100, 1)], velocity="decoded", env_id="lift")
    runs = records.read([tmp_path / "runs"])
    names = ["Flow-G batch-size=128", "Flow-G batch-size=256"]
    assert [(run.env, run.name, run.seed) for run in runs] == [
        *(("Hopper-v4", name, seed) for name in names for seed in (1, 2)),
        ("Hopper-v4", "Flow-T", 1),
        ("lift", "Flow-T", 1),
    ]
    assert runs[4].returns.tolist() == [7]


def test_environments_in_the_names_of_files(tmp_path):
    """As in benchmark/results/stability/five-evaluations, whose folder has those of two."""
    for name in ("Hopper-v4_sac_flow_g_decay-0.9", "Walker2d-v4_sac_flow_t", "ant-v4_own"):
        write(tmp_path / "five" / f"{name}_seed1_eval.csv", [(100, 1)])
    runs = records.read([tmp_path])
    assert [(run.env, run.name) for run in runs] == [
        ("Hopper-v4", "Flow-G decay-0.9"),
        ("Walker2d-v4", "Flow-T"),
        ("Ant-v4", "own"),
    ]


def test_same_runs_of_two_folders(tmp_path, capsys):
    """The folders tell them apart; of two equal ones in one folder the longer is kept."""
    for folder, value in (("before", 1), ("after", 2)):
        write_run(tmp_path / folder / "sac_flow_g__1", [(100, value)])
    write_run(tmp_path / "after" / "sac_flow_g__2", [(100, 3), (200, 4)])
    runs = records.read([tmp_path / "before", tmp_path / "after"])
    assert {run.name: run.returns.tolist() for run in runs} == {"Flow-G before": [1], "Flow-G after": [3, 4]}
    assert "sac_flow_g__1/eval.csv left out" in capsys.readouterr().err


def test_a_seed_in_two_of_many_named_folders_is_said(tmp_path, capsys):
    """As a shell's runs/* names them."""
    folders = [tmp_path / f"run{i}" for i in range(3)]
    for folder, seed in zip(folders, (1, 2, 2), strict=True):
        write_run(folder / "sac_flow_g__1", [(100, 1)], seed=seed)
    records.read(folders)
    assert "seed 2 of Flow-G on Hopper-v4 is in several of the named folders" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["policy.pt", "policy_best.pt", "checkpoint.pt"])
def test_script_from_the_policy(tmp_path, file):
    """A run whose name is the user's own; before its first checkpoint it has the best policy alone."""
    import torch

    write_run(tmp_path / "mine", [(100, 1)])
    torch.save({"script": "sac_gaussian"}, tmp_path / "mine" / file)
    (run,) = records.read([tmp_path])
    assert run.algorithm == "Gaussian"


@pytest.mark.parametrize("name", ["encoder-ablation", "Hopper-v4__sac_flow_g2__1__170", "my_sac_flow_t"])
def test_a_scripts_name_within_a_word_is_no_name(tmp_path, name):
    import torch

    write_run(tmp_path / name, [(100, 1)])
    torch.save({"script": "sac_gaussian"}, tmp_path / name / "policy.pt")
    (run,) = records.read([tmp_path])
    assert run.algorithm == "Gaussian"


def test_scores_side_by_side(main, tmp_path):
    """Environments in the order of RANGES. Of 1, 2, 3 the interval is as in `test_t_interval`."""
    for env, values in (("Ant-v4", [7]), ("Mine-v0", [1, 2]), ("Hopper-v4", [1, 2, 3])):
        for seed, value in enumerate(values):
            folder = tmp_path / "runs" / f"{env}__sac_flow_g__{seed}"
            folder.mkdir(parents=True)
            write_run(folder, [(90, value - 0.25), (100, value + 0.25)], env_id=env, seed=seed)
    folder = tmp_path / "runs" / "Ant-v4__sac_flow_t__1"
    folder.mkdir()
    write_run(folder, [(100, 8)], env_id="Ant-v4")
    *_, table = main("runs", "--figures", "curves")
    assert [run.env for run in records.read([tmp_path / "runs"])][::3] == ["Hopper-v4", "Ant-v4", "Mine-v0"]
    assert table == [
        ["algorithm", "Hopper-v4", "Ant-v4", "Mine-v0"],
        ["Flow-G", "2 [-0, 4]", "7", "2 (1, 2)"],
        ["Flow-T", "-", "8", "-"],
    ]


def test_others_evaluations_from_one_file(main, drawn, tmp_path):
    """Beside a run of ours: 2 of them, whose rows are not in order; --steps ends curves and scores."""
    write_run(tmp_path / "runs" / "Hopper-v4__sac_flow_g__1", [(90, 3), (100, 5), (200, 9)])
    rows = ["Hopper-v4,Theirs,100,7,20", "Hopper-v4,Theirs,50,7,10", "Hopper-v4,Theirs,200,7,90"]
    rows += ["Hopper-v4,Theirs,50,8,0", "Hopper-v4,Theirs,96,8,4", "Hopper-v4,Theirs,300,8,90"]
    (tmp_path / "theirs.csv").write_text("\n".join(["environment,algorithm,step,seed,return", *rows]) + "\n")
    table, *_ = main("runs", "theirs.csv", "--steps", 100, "--figures", "curves")
    assert [row[:4] + row[5:] for row in table[1:]] == [
        ["Hopper-v4", "Flow-G", "100", "1", "4"],
        ["Hopper-v4", "Theirs", "100", "2", "20, 4"],
    ]
    (axis,) = drawn["hopper-v4"]
    assert curve(axis, "Flow-G (1 seed)") == ([90, 100], [3, 5])
    x, y = curve(axis, "Theirs (2 seeds)")
    assert x == [50, 96] and y == pytest.approx([5, (19.2 + 4) / 2])
    (tmp_path / "theirs.csv").write_text(f"environment,algorithm,step,seed,return\n{rows[0].replace('7', 'x')}\n")
    with pytest.raises(SystemExit):
        main("theirs.csv")
    with pytest.raises(SystemExit):
        main("theirs.csv", "--training")


def test_readme_has_the_published_scores(main):
    results = ROOT / "benchmark" / "results"
    *_, table = main(results / "mujoco", results / "published.csv", "--steps", 100_000, "--figures", "curves")
    readme = (ROOT / "README.md").read_text()
    for row in table[1:]:
        assert f"| {' | '.join(row)} |" in readme


def test_published_results_are_read_as_they_are(capsys):
    """Every folder of benchmark/results that has curves; the study's files by the default's average."""
    folder = ROOT / "benchmark" / "results"
    runs = records.read([folder / "stability" / "hopper-v4"], only=["schedule"])
    assert [(run.env, run.name, run.seed) for run in runs] == [("Hopper-v4", "Flow-G", seed) for seed in (1, 2, 3)]
    assert records.scores({"": runs})[""] == pytest.approx([3141, 3179, 2102], abs=1)  # the README's
    capsys.readouterr()
    runs = records.read([folder / "stability"])
    names = {run.name for run in runs if run.env == "Walker2d-v4"}
    assert {"Flow-G K4 schedule", "Flow-T K16 schedule", "Flow-G X lr3e-4 K4 schedule"} <= names
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("note: left out, ")
    lift = records.read([folder / "lift"])
    assert {run.name for run in lift} == {"Flow-G", "Flow-T", "Plain flow"} and lift[0].success.tolist()[0] == 0.76
    before = {run.name for run in records.read([folder / "stability" / "ant-v4"], training=True)}
    assert "Flow-G K16 euler before" in before
    for path in folder.iterdir():
        if path.is_dir() and path.name not in ("speed", "tuning"):  # the latter's files have no seed
            for training in (False, True):
                try:
                    records.read([path], training)
                except SystemExit:
                    assert path.name.startswith(("hopper-v4", "gradients", "bandit", "cube-", "lift", "offline-"))


# --- bad input ---


@pytest.mark.parametrize(
    "flags, words",
    [
        ("", "name one or more folders"),
        ("nowhere", "there is no nowhere: name folders of runs/ or of benchmark/results/"),
        ("empty", "no evaluations in empty: try --training"),
        ("good --training", "no training episodes in good: drop --training"),
        ("good --only nothing", "no evaluations whose path has nothing (--only) in good"),
        ("good --steps 0", "--steps must be 1 or more, not 0"),
        ("good --reps 0", "--reps must be 1 or more, not 0"),
        ("good --ranges Own-v0=5,1", "--ranges Own-v0=5,1: an environment and two returns, low < high"),
        ("good --ranges 5,1", "--ranges 5,1: an environment"),
        ("good --ranges Own-v0=0,inf", "--ranges Own-v0=0,inf: an environment and two returns"),
        ("good --out good/ant-v4/sac_flow_g_seed1_eval.csv", "cannot write there"),
    ],
)
def test_bad_input(main, tmp_path, capsys, flags, words):
    write(tmp_path / "good" / "ant-v4" / "sac_flow_g_seed1_eval.csv", [(100, 1)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stopped:
        main(*flags.split())
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and error.startswith("plot: error: ") and words in error


def test_damaged_files_are_left_out_in_a_line(tmp_path, capsys):
    write(tmp_path / "ant-v4" / "sac_flow_g_seed1_eval.csv", [(100, 1)])
    write(tmp_path / "ant-v4" / "sac_flow_g_seed2_eval.csv", [(100, "x")])
    (tmp_path / "ant-v4" / "sac_flow_g_seed3_eval.csv").write_text(EVAL)
    (tmp_path / "ant-v4" / "sac_flow_g_seed4_eval.csv").write_text("")
    write(tmp_path / "ant-v4" / "noseed_eval.csv", [(100, 1)])
    write(tmp_path / "ant-v4" / "sac_flow_g_seed5_eval.csv", [(100, 1), (100, 2)])
    write(tmp_path / "ant-v4" / "sac_flow_g_seed6_eval.csv", [(float("nan"), 1)])
    (tmp_path / "ant-v4" / "folder.csv").mkdir()
    write(tmp_path / "run" / "eval.csv", [(100, 1)])
    (tmp_path / "run" / "args.json").write_text("{")
    assert [run.seed for run in records.read([tmp_path])] == [1]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6 and sum("1 file such as" in line for line in lines) == 5, lines
    assert "note: left out, with entries that are no numbers: 2 files such as sac_flow_g_seed2_eval.csv" in lines
    assert "note: left out, with several rows of one step: 1 file such as sac_flow_g_seed5_eval.csv" in lines
    for text in ("[]", '{"env_id": "lift", "seed": 1, "velocity": "another"}'):
        (tmp_path / "run" / "args.json").write_text(text)
        assert len(records.read([tmp_path])) == 1
        assert "args.json is not one of" in capsys.readouterr().err


def test_missing_packages(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rliable", None)
    monkeypatch.delitem(sys.modules, "plot")
    monkeypatch.setattr("sys.argv", ["plot.py"])
    with pytest.raises(SystemExit) as stopped:
        __import__("plot")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "plot: error: needs rliable: pip install -r benchmark/requirements.txt\n"
