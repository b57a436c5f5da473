"""compare.py: what counts as a fall, checked by hand."""

import json
import math

import compare
import numpy as np
import pytest


@pytest.fixture
def main(monkeypatch):
    """The program in this process: `main(*arguments)` returns its exit code."""

    def main(*arguments):
        monkeypatch.setattr("sys.argv", ["compare.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            compare.main()
        return stopped.value.code

    return main


def write(folder, returns, rates, env="Hopper-v4", **flags):
    """A run of each return and speed in steps/s: evaluations every 100 steps to 1 000, the first 500 at 1 step/s."""
    for seed, (value, rate) in enumerate(zip(returns, rates, strict=True)):
        run = folder / f"{env}__sac_flow_g__{seed}"
        run.mkdir(parents=True)
        (run / "args.json").write_text(json.dumps({"env_id": env, "seed": seed, **flags}))
        lines = ["step,kind,return,seconds"]
        for step in range(100, 1001, 100):
            seconds = min(step, 500) + max(step - 500, 0) / rate
            lines.append(f"{step},deterministic,{value if step >= 900 else 0},{seconds}")
        (run / "eval.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "a, b, difference, t, error",
    [
        ((1.0, 2, 3), (4.0, 5, 6), 3, 2.7764, math.sqrt(2 / 3)),  # variances 1 and 1: 4 degrees of freedom
        ((2.0, 2, 2), (1.0, 0, -1), -2, 4.3027, math.sqrt(1 / 3)),  # 0 and 1: 2 degrees, those of the second alone
        ((2.0, 2), (1.0, 1), -1, 0, 0),
    ],
)
def test_welch_by_hand(a, b, difference, t, error):
    """With the 97.5 % points of a printed table of t."""
    ends = compare.welch(np.array(a), np.array(b), 0.95)
    assert ends == pytest.approx((difference, difference - t * error, difference + t * error), abs=1e-4)


def test_speed_is_that_of_the_second_half(tmp_path):
    """500 steps at 1 step/s, then 500 at 20; from 400 to 800 that is 400 steps in 100 + 15 s."""
    write(tmp_path, [1], [20])
    (run,) = compare.records.read([tmp_path])
    assert compare.speed(run, 1000) == pytest.approx(20)
    assert compare.speed(run, 800) == pytest.approx(400 / 115)
    assert compare.speed(run, 150) is None  # one evaluation
    run.seconds = None
    assert compare.speed(run, 1000) is None


@pytest.mark.parametrize(
    "returns, rates, code, fell",
    [
        ((1000, 1010, 990), (100, 101, 99), 0, []),
        ((1200, 1210, 1190), (200, 201, 199), 0, []),  # better is no fall
        ((800, 810, 790), (100, 101, 99), 1, ["return"]),
        ((1000, 1010, 990), (80, 81, 79), 1, ["steps/s"]),
        ((400, 1200, 900), (40, 160, 90), 0, []),  # lower on average, not with confidence
    ],
)
def test_falls(main, tmp_path, capsys, returns, rates, code, fell):
    write(tmp_path / "a", (1000, 1005, 995), (100, 100.5, 99.5), batch_size=256)
    write(tmp_path / "b", returns, rates, batch_size=128)  # another flag is what may have made it fall
    assert main(tmp_path / "a", tmp_path / "b") == code
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[2] for row in rows] == ["return", "steps/s"]
    assert [row[2] for row in rows if "fell" in row[6]] == fell
    assert f"{np.mean(returns):.0f} (3 seeds)" == rows[0][4] and f"{np.mean(rates):.1f} (3 seeds)" == rows[1][4]
    assert rows[0][5].startswith(f"{np.mean(returns) - 1000:.0f} [")


def test_more_comparisons_need_more(main, tmp_path):
    """The fall of one of four is seen with one environment, and no longer with twelve, of equal runs."""
    for side, first in (("a", (1000, 1030, 970)), ("b", (900, 930, 870))):
        write(tmp_path / "one" / side, first, (100, 101, 99))
        write(tmp_path / "many" / side, first, (100, 101, 99))
        for i in range(11):
            write(tmp_path / "many" / side, (1000, 1030, 970), (100, 101, 99), env=f"Other{i}-v0")
    assert main(tmp_path / "one" / "a", tmp_path / "one" / "b") == 1
    assert main(tmp_path / "many" / "a", tmp_path / "many" / "b") == 0
    assert main(tmp_path / "one" / "a", tmp_path / "one" / "b", "--confidence", 0.9999) == 0


def test_the_upper_end_alone_decides(main, tmp_path):
    """Two comparisons at 0.95: each interval has 90 %. With 4 degrees of freedom t is 2.1318 (at 95 % 2.7764)."""
    error = math.sqrt(2 / 3)
    for fall, code in ((2.2 * error, 1), (2.05 * error, 0)):
        folder = tmp_path / str(code)
        write(folder / "a", (99, 100, 101), (100, 101, 99))
        write(folder / "b", (99 - fall, 100 - fall, 101 - fall), (100, 101, 99))
        assert main(folder / "a", folder / "b", "--confidence", 0.9) == code


def test_compared_where_both_have_been(main, tmp_path, capsys):
    """B stopped at step 600: A's return and speed there are what counts."""
    write(tmp_path / "a", (1000, 1000), (100, 101))
    write(tmp_path / "b", (5, 5), (100, 101))
    for path in tmp_path.glob("b/*/eval.csv"):
        path.write_text("\n".join(path.read_text().splitlines()[:7]) + "\n")
    assert main(tmp_path / "a", tmp_path / "b") == 0
    assert "| 0 (2 seeds) | 0 (2 seeds) |" in capsys.readouterr().out


def test_one_seed_decides_nothing(main, tmp_path, capsys):
    write(tmp_path / "a", (1000, 1001), (100, 101))
    write(tmp_path / "b", (1,), (1,))
    assert main(tmp_path / "a", tmp_path / "b") == 2
    captured = capsys.readouterr()
    assert "return of 2 and 1 seeds cannot be compared" in captured.err and "fell" not in captured.out
    assert "error: nothing can be compared" in captured.err


def test_what_b_lacks_is_no_pass(main, tmp_path, capsys):
    """An algorithm's runs on one task are gone, or all but one seed's; what B has beside A's does not matter."""
    for env in ("Hopper-v4", "Ant-v4"):
        write(tmp_path / "a", (1000, 1001), (100, 101), env=env)
    write(tmp_path / "b", (1000, 1001), (100, 101))
    assert main(tmp_path / "a", tmp_path / "b") == 2 and "Ant-v4 is only in" in capsys.readouterr().err
    assert main(tmp_path / "b", tmp_path / "a") == 0
    write(tmp_path / "b", (1000,), (100,), env="Ant-v4")
    assert main(tmp_path / "a", tmp_path / "b") == 2


def test_a_seed_that_b_lacks_is_no_pass(main, tmp_path, capsys):
    """It is gone, or died halfway; the others' comparison is still shown."""
    write(tmp_path / "a", (1000, 1001, 1002), (100, 101, 102))
    write(tmp_path / "b", (1000, 1001, 1002), (100, 101, 102))
    assert main(tmp_path / "a", tmp_path / "b") == 0
    path = tmp_path / "b" / "Hopper-v4__sac_flow_g__1" / "eval.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:7]) + "\n")
    capsys.readouterr()
    assert main(tmp_path / "a", tmp_path / "b") == 2
    captured = capsys.readouterr()
    assert "return of 2 seeds in" in captured.err and "1001 (3 seeds) | 1001 (2 seeds)" in captured.out
    path.unlink()
    assert main(tmp_path / "a", tmp_path / "b") == 2


def test_nan_is_no_pass(main, tmp_path, capsys):
    write(tmp_path / "a", (1000, 1001), (100, 101))
    write(tmp_path / "b", (1000, math.nan), (100, 101))
    assert main(tmp_path / "a", tmp_path / "b") == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["a", "nowhere"], "there is no nowhere"),
        (["a", "a"], "a twice"),
        (["a", "c"], "have no algorithm on the same environment"),
        (["a", "b", "--confidence", "1.5"], "--confidence must be between 0 and 1, not 1.5"),
        (["a", "empty"], "no evaluations in empty"),
    ],
)
def test_bad_input(main, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", (1, 2), (1, 2))
    write(tmp_path / "b", (1, 2), (1, 2))
    write(tmp_path / "c", (1, 2), (1, 2), env="Ant-v4")
    (tmp_path / "empty").mkdir()
    assert main(*arguments) == 2
    stderr = capsys.readouterr().err
    assert len(stderr.splitlines()) == 1 and words in stderr, stderr
