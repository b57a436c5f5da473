"""benchmark/parity: steps and minutes to a return, and one line where packages or files are missing."""

import json
import subprocess
import sys
from dataclasses import fields

import pytest
import time_to_return
from helpers import command, path_of
from sac_gaussian import Args as GaussianArgs


def make_run(folder, returns=(), evaluations=(), env_id="Hopper-v4", seconds=0.1):
    """A run's folder whose episodes are 1 000 steps long, `seconds` per step after its 5 000 random ones."""
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps({"env_id": env_id, "learning_starts": 5000}))
    rows = ["step,return,length,seconds"]
    for i, value in enumerate(returns, start=1):
        rows.append(
            f"{1000 * i},{value},1000,{max(0, 1000 * i - 5000) * seconds + 40 * (i > 5)}"
        )  # 40 s of compilation
    (folder / "returns.csv").write_text("\n".join(rows) + "\n")
    rows = ["step,kind,return,return_error,length,episodes,seconds"]
    rows += [f"{step},{kind},{value},1,1000,5,9" for step, kind, value in evaluations]
    (folder / "eval.csv").write_text("\n".join(rows) + "\n")
    return folder


def run(capsys, monkeypatch, *words) -> str:
    """What the program prints."""
    monkeypatch.setattr("sys.argv", ["time_to_return", *map(str, words)])
    time_to_return.main()
    return capsys.readouterr().out


def error_of(capsys, monkeypatch, *words) -> str:
    """The one line with which the program stops."""
    with pytest.raises(SystemExit) as stopped:
        run(capsys, monkeypatch, *words)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_steps_to_a_mean_of_ten_episodes():
    returns = [(100.0 * i, 0.0) for i in range(1, 10)] + [(1000.0, 5000.0), (1100.0, 4000.0), (1200.0, 6000.0)]
    assert time_to_return.steps_to(500, returns, 10) == 1000  # exactly 500, at the tenth episode
    assert time_to_return.steps_to(501, returns, 10) == 1100
    assert time_to_return.steps_to(1500, returns, 10) == 1200
    assert time_to_return.steps_to(1501, returns, 10) is None
    assert time_to_return.steps_to(500, returns[9:], 10) is None  # three episodes are not ten


def test_minutes_of_training(tmp_path, capsys, monkeypatch):
    """Hand-made runs of 20 000 steps at 10 steps per second: 2 000 is reached at 10 000, at 15 000 and never."""
    runs = [
        make_run(tmp_path / "a", [2000] * 20),
        make_run(tmp_path / "b", [0] * 5 + [2000] * 15),
        make_run(tmp_path / "c", [1999] * 20),
    ]
    words = [f"ours={path}" for path in runs]
    out = run(capsys, monkeypatch, "--runs", *words, "--timed", f"ours={runs[0]}")
    assert out.startswith("Hopper-v4, 2000 by training:")
    row = "| ours | 10.0 | 10000, 15000, > 20000 | 16.7, 25.0, > 33.3 | 25.0 |"
    assert out.splitlines()[-1] == row
    out = run(capsys, monkeypatch, "--runs", *words[1:], "--speed", "ours=100")
    assert out.splitlines()[-1] == "| ours | 100.0 | 15000, > 20000 | 2.5, > 3.3 | > 2.5 |"
    out = run(capsys, monkeypatch, "--runs", *words[:2], "--speed", "ours=100")
    assert out.splitlines()[-1] == "| ours | 100.0 | 10000, 15000 | 1.7, 2.5 | 2.1 |"
    out = run(capsys, monkeypatch, "--runs", words[2], "--speed", "ours=100", "--threshold", "1999")
    assert out.splitlines()[-1] == "| ours | 100.0 | 10000 | 1.7 | 1.7 |"


def test_a_run_too_short_for_a_median_is_refused(tmp_path, capsys, monkeypatch):
    """It stopped at 12 000 below the threshold, and could have been there before 15 000."""
    late = make_run(tmp_path / "late", [0] * 5 + [2000] * 15)
    short = make_run(tmp_path / "short", [1999] * 12)
    line = error_of(capsys, monkeypatch, "--runs", f"ours={late}", f"ours={short}", "--speed", "ours=100")
    assert "ours" in line and "12000" in line and "15000" in line
    words = "--runs", f"ours={late}", f"other={short}", "--speed", "ours=100", "other=100"
    assert "| other | 100.0 | > 12000 |" in run(capsys, monkeypatch, *words)


def test_speed_is_the_median_and_leaves_out_compilation(tmp_path):
    fast, slow = (make_run(tmp_path / str(n), [0] * 20, seconds=1 / n) for n in (50, 20))
    assert time_to_return.speed_of(fast) == pytest.approx(50)
    assert time_to_return.speed_of(slow) == pytest.approx(20)


def test_evaluations_are_those_of_the_deterministic_policy(tmp_path, capsys, monkeypatch):
    evaluations = [(5000, "deterministic", 10), (5000, "stochastic", 9999), (10000, "deterministic", 5000)]
    folder = make_run(tmp_path / "a", [0] * 20, evaluations, "HalfCheetah-v4")
    out = run(capsys, monkeypatch, "--runs", f"x={folder}", "--speed", "x=100", "--by", "evaluation")
    assert out.startswith("HalfCheetah-v4, 5000 by evaluation:")
    assert out.splitlines()[-1] == "| x | 100.0 | 10000 | 1.7 | 1.7 |"


def test_reads_what_cleanrl_prints(tmp_path, capsys, monkeypatch):
    log = tmp_path / "cleanrl.log"
    log.write_text(
        "SPS: 70\n" + "".join(f"global_step={100 * i}, episodic_return=[{250.5 * i}]\n" for i in range(1, 21))
    )
    words = ["--runs", f"cleanrl={log}", "--speed", "cleanrl=10"]
    out = run(capsys, monkeypatch, *words, "--env-id", "Walker2d-v4")
    assert out.splitlines()[-1] == "| cleanrl | 10.0 | 1500 | 2.5 | 2.5 |"  # mean of episodes 6 to 15: 2 630
    assert "--env-id" in error_of(capsys, monkeypatch, *words)


@pytest.mark.parametrize("printed", ["[-280.5]", "-280.5", "[-2.805e+02]"])
def test_cleanrls_negative_returns_keep_their_sign(tmp_path, printed):
    (tmp_path / "x.log").write_text(f"global_step=7, episodic_return={printed}\nglobal_step=8, episodic_return=[nan]\n")
    assert time_to_return.returns_of(tmp_path / "x.log", "training") == [(7, -280.5)]


def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch):
    hopper = make_run(tmp_path / "hopper", [0] * 20)
    walker = make_run(tmp_path / "walker", [0] * 20, env_id="Walker2d-v4")
    ant = make_run(tmp_path / "ant", [0] * 20, env_id="Ant-v4")
    short = make_run(tmp_path / "short", [0] * 6)
    empty = make_run(tmp_path / "empty")
    cases = [
        (["--runs"], "--runs must name"),
        (["--runs", hopper], "name=value"),
        (["--runs", f"a={hopper}"], "--timed a="),
        (["--runs", f"a={tmp_path}", "--speed", "a=1"], "args.json"),
        (["--runs", f"a={hopper}", f"b={walker}", "--speed", "a=1", "b=1"], "several environments"),
        (["--runs", f"a={ant}", "--speed", "a=1"], "--threshold"),
        (["--runs", f"a={hopper}", "--timed", f"a={short}"], "too short"),
        (["--runs", f"a={empty}", "--speed", "a=1"], "no training returns"),
        (["--runs", f"a={hopper}", "--speed", "a=fast"], "not a number"),
        (["--runs", f"a={hopper}", "--speed", "a=0"], "above 0"),
    ]
    for words, expected in cases:
        assert expected in error_of(capsys, monkeypatch, *words), words
    (hopper / "returns.csv").write_text("step,return\n1000,many\n")
    assert "returns.csv" in error_of(capsys, monkeypatch, "--runs", f"a={hopper}", "--speed", "a=1")


def test_missing_packages_are_named_in_one_line(tmp_path):
    """Without sbx, whether or not it is installed, train_sbx.py says what to install, before it does anything."""
    (tmp_path / "sbx.py").write_text("raise ModuleNotFoundError(\"No module named 'sbx'\", name='sbx')\n")
    code = f"import sys, runpy\nsys.path.insert(0, {str(tmp_path)!r})\nimport types\n"
    for package in ("jax", "optax", "tyro", "mujoco", "torch", "gymnasium"):
        code += f"sys.modules[{package!r}] = types.ModuleType({package!r})\n"
    code += f"runpy.run_path({str(path_of('train_sbx'))!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert "sbx cannot be imported" in line and "pip install -r benchmark/parity/requirements.txt" in line
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("sbx.py", "__pycache__")] == []


def test_the_flags_of_train_sbx_default_to_those_of_the_control():
    """Read from its text, since sbx is not installed here."""
    body = path_of("train_sbx").read_text().split("class Args:")[1].split("\n\n\n")[0]
    names = {field.name: field.default for field in fields(GaussianArgs)}
    found = [
        line.strip().split(" = ") for line in body.splitlines() if " = " in line and not line.strip().startswith('"')
    ]
    assert len(found) >= 18
    for declared, value in found:
        assert eval(value) == names[declared.split(":")[0]], declared


def test_help(tmp_path):
    done = subprocess.run(command("time_to_return", "--help"), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "--timed" in done.stdout
