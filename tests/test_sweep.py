"""Sweeps: what runs and what does not run again, death of workers and processes, Ctrl-C, the table, bad input."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import sweep
import torch
from helpers import ROOT, SMALL, assert_same, checkpoint, command

ENV = "InvertedPendulum-v4"
FLAGS = [*SMALL, "--learning-starts", "100", "--total-timesteps", "400", "--save-every", "50", "--eval-every", "0"]
ENVIRON = {**os.environ, "OMP_NUM_THREADS": "7"}


@pytest.fixture
def begin(tmp_path):
    """Starts a sweep in a fresh folder: `begin(*flags)` returns the running process.

    As nohup and & do, it ignores SIGINT until it asks for it.
    """
    started = []

    def begin(*flags) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
        started.append(
            subprocess.Popen(command("sweep", *flags), cwd=tmp_path, env=ENVIRON, preexec_fn=ignore, **pipes)
        )
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen, code: int) -> str:
    """All that a sweep printed, once it has ended with that exit code."""
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == code, stdout + stderr
    return stdout + stderr


@pytest.fixture
def main(tmp_path, monkeypatch):
    """The program in this process: `main(*flags)` returns its exit code."""
    monkeypatch.chdir(tmp_path)

    def main(*flags):
        monkeypatch.setattr("sys.argv", ["sweep.py", *map(str, flags)])
        try:
            sweep.main()
        except SystemExit as error:
            return error.code

    return main


def starts(run: Path) -> list[str]:
    """The commands of a run, in its log, from the first one on."""
    log = run.with_name(f"{run.name}.log")
    return [line for line in log.read_text().splitlines() if line.startswith("$ ")] if log.exists() else []


def process_of(run: Path) -> tuple[int, int]:
    """Process id of a run and that of its worker; 0, 0 if it has none."""
    for line in subprocess.run(["ps", "-wweo", "pid=,ppid=,args="], capture_output=True, text=True).stdout.splitlines():
        pid, parent, arguments = line.split(None, 2)
        if f"{run.parent.name}/{run.name}" in arguments and "sac_flow" in arguments:
            return int(pid), int(parent)
    return 0, 0


def wait_for(condition, process: subprocess.Popen):
    """The first true value of `condition()`, while a sweep runs."""
    began = time.time()
    while not (value := condition()):
        assert process.poll() is None, process.communicate()
        assert time.time() - began < 300  # beside other work a restart can take minutes
        time.sleep(0.02)
    return value


@pytest.fixture
def uninterrupted(start, tmp_path):
    """The checkpoint of a run that nothing disturbs: `uninterrupted(run)` for the name of one of a sweep."""

    def uninterrupted(run: Path, flags=FLAGS) -> dict:
        _, name, seed = run.name.split("__")
        done = start("--env-id", ENV, "--seed", seed, *flags, "--run-name", "whole", name=name)
        assert done.returncode == 0, done.stderr
        state = checkpoint(tmp_path / "runs" / "whole")
        state["args"]["run_name"] = f"{run.parent.name}/{run.name}"
        return state

    return uninterrupted


def assert_same_run(run: Path, whole: dict) -> None:
    """A run of a sweep, resumed or not, ended as the undisturbed one did."""
    state = checkpoint(run)
    state["args"]["resume"] = None
    assert_same(state, whole)


def test_all_runs_and_none_again(begin, main, tmp_path, capsys):
    """Two scripts x two seeds; the flag set wins over the flags of all; then nothing is left to do."""
    flags = ["--name", "four", "--scripts", "sac_flow_g", "sac_flow_t", "--seeds", 1, 2, "--env-ids", ENV]
    flags += [*FLAGS, "--total-timesteps", 120, "--eval-every", 100, "--flags", "batch-size=8 gamma=0.9"]
    output = end(begin(*flags), 0)
    assert "4 runs: 4 finished" in output and "120 / 120" in output
    names = {f"{ENV}__sac_flow_{kind}__batch-size=8_gamma=0.9__{seed}" for kind in "gt" for seed in (1, 2)}
    folders = {path.name: path for path in (tmp_path / "runs" / "four").iterdir() if path.is_dir()}
    assert set(folders) == names
    for name, folder in folders.items():
        args = checkpoint(folder)["args"]
        assert (args["batch_size"], args["gamma"], args["critic_dim"], args["seed"]) == (8, 0.9, 16, int(name[-1]))
        assert len(starts(folder)) == 1

    before = {path: path.stat().st_mtime for path in tmp_path.rglob("*")}
    for again in (flags, ["--file", "runs/four/sweep.json"]):
        assert main(*again) == 0 and "4 runs: 4 finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime for path in tmp_path.rglob("*")} == before


def test_killed_worker_and_killed_process(begin, tmp_path, uninterrupted):
    """Each is retried, goes on from the checkpoint, and ends with the same weights; a run that fails stops no other."""
    process = begin("--name", "killed", "--env-ids", ENV, "tiny_envs:BadReward-v0", *FLAGS)
    run, broken = (tmp_path / "runs" / "killed" / f"{env}__sac_flow_g__1" for env in (ENV, "tiny_envs_BadReward-v0"))

    wait_for((run / "checkpoint.pt").exists, process)
    pid, worker = process_of(run)
    if Path("/proc").exists():
        environ = Path(f"/proc/{pid}/environ").read_text().split("\0")
        assert {"OMP_NUM_THREADS=1", "CUDA_VISIBLE_DEVICES="} <= set(environ)
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: process_of(run)[0] != pid, process)  # it does not outlive its worker
    assert checkpoint(run)["step"] < 400
    wait_for(lambda: len(starts(run)) == 2, process)
    os.kill(wait_for(lambda: process_of(run)[0], process), signal.SIGKILL)

    output = end(process, 1)
    assert "2 runs: 1 finished, 1 failed" in output
    assert f"{broken.name} failed: sac_flow_g: error: step 60: reward is NaN" in output
    assert len(starts(broken)) == 1  # bad input is not tried again
    assert ["--resume" in line for line in starts(run)] == [False, True, True]
    assert_same_run(run, uninterrupted(run))


def test_ctrl_c_loses_nothing(begin, tmp_path, uninterrupted):
    flags = [*FLAGS, "--total-timesteps", 600]  # so long that none ends before the signal
    process = begin("--name", "stopped", "--env-ids", ENV, "--seeds", 1, 2, 3, *flags)
    runs = [tmp_path / "runs" / "stopped" / f"{ENV}__sac_flow_g__{seed}" for seed in (1, 2, 3)]
    run = wait_for(lambda: next((run for run in runs if (run / "checkpoint.pt").exists()), None), process)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert sum(bool(starts(run)) for run in runs) <= cores
    process.send_signal(signal.SIGINT)
    output = end(process, 130)
    assert "--file runs/stopped/sweep.json" in output and "failed" not in output
    assert f"stopped at step {checkpoint(run)['step']};" in run.with_name(f"{run.name}.log").read_text()
    assert checkpoint(run)["step"] < 600 and not process_of(run)[0]
    assert "3 runs: 3 finished" in end(begin("--file", "runs/stopped/sweep.json"), 0)
    assert_same_run(run, uninterrupted(run, flags))


def test_no_second_writer_and_a_fresh_start_without_a_checkpoint(tmp_path):
    """A process that holds the log is waited for; what a run left before its first checkpoint gives way."""
    folder = tmp_path / "runs" / "some" / "run"
    folder.mkdir(parents=True)
    (folder / "old").write_text("")
    run = sweep.Run(command("sac_flow_g", "--env-id", ENV, *FLAGS, "--total-timesteps", 130)[1:], folder, 130)
    holder = subprocess.Popen(["flock", sweep.log_of(run), "sleep", "100"], start_new_session=True)
    wait_for(lambda: sweep.log_of(run).exists(), holder)
    time.sleep(0.3)
    results = []
    thread = threading.Thread(target=lambda: results.append(sweep.train(run, {})))
    thread.start()
    time.sleep(1)
    assert not starts(folder) and (folder / "old").exists()
    os.killpg(holder.pid, signal.SIGKILL)
    holder.wait()
    thread.join(100)
    assert results == [("finished", "")] and len(starts(folder)) == 1 and not (folder / "old").exists()
    assert sweep.train(run, {}) == ("finished", "") and len(starts(folder)) == 1  # a retry of what has ended


def test_results_without_a_checkpoint_are_kept(tmp_path):
    """Someone removed the checkpoint, which is large: what the run found is moved aside."""
    folder = tmp_path / "runs" / "some" / "run"
    folder.mkdir(parents=True)
    (folder / "policy.pt").write_text("found")
    run = sweep.Run(command("sac_flow_g", "--env-id", ENV, *FLAGS, "--total-timesteps", 130)[1:], folder, 130)
    assert sweep.train(run, {}) == ("finished", "")
    (aside,) = folder.parent.glob("run.*.old")
    assert (aside / "policy.pt").read_text() == "found" and (folder / "checkpoint.pt").exists()


def test_a_finished_run_without_its_checkpoint_is_not_run_again(main, tmp_path, capsys):
    """Checkpoints are large; the policy tells how far the run came."""
    own = [*FLAGS, "--total-timesteps", 130]
    flags = ["--name", "some", "--scripts", "sac_flow_g", "--env-ids", ENV, "--seeds", 1, *own]
    assert not main(*flags, "--dry-run")
    name = capsys.readouterr().out.split("--run-name ")[1].split()[0]
    folder = tmp_path / "runs" / name
    folder.mkdir(parents=True)
    run = sweep.Run(command("sac_flow_g", "--env-id", ENV, *own)[1:], folder, 130)
    for step in (120, 130):
        torch.save({"step": step}, folder / "policy.pt")
        assert sweep.saved_step(folder) == step
        assert not main(*flags, "--dry-run") and bool(capsys.readouterr().out.strip()) == (step < 130)
    assert sweep.train(run, {}) == ("finished", "") and [path.name for path in folder.iterdir()] == ["policy.pt"]


def test_flag_sets_of_one_folder_are_refused(main, capsys):
    flags = ["--name", "x", "--scripts", "sac_flow_offline2online", "--env-ids", ENV, "--seeds", 1, "--dry-run"]
    assert main(*flags, "--flags", "dataset=a/b.npz", "dataset=a_b.npz") == 2
    assert "another flag set has the same folder" in capsys.readouterr().err


def test_flags_beside_a_file_are_added_to_its_own(main, tmp_path, capsys):
    own = {"name": "x", "scripts": ["sac_flow_g"], "env_ids": [ENV], "seeds": [1], "flags": [""]}
    (tmp_path / "sweep.json").write_text(json.dumps(own | {"every_run": "--total-timesteps 7000 --gamma 0.9"}))
    assert not main("--file", "sweep.json", "--name", "y", "--gamma", 0.8, "--dry-run")
    (line,) = capsys.readouterr().out.splitlines()
    assert "--total-timesteps 7000 --gamma 0.9 --gamma 0.8" in line and "y/" in line
    assert not main("--file", "sweep.json", "--total-timesteps", 7000, "--gamma", 0.9, "--dry-run")  # the same again
    assert capsys.readouterr().out.count("--gamma") == 1


@pytest.mark.parametrize("text", ['"x"', "[1]", '{"every_run": "", "seeds": ["1"]}', '{"every_run": 1}', "{"])
def test_files_that_describe_no_sweep(main, tmp_path, capsys, text):
    (tmp_path / "sweep.json").write_text(text)
    assert main("--file", "sweep.json", "--dry-run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--file sweep.json is no sweep.json" in line


def test_the_readmes_ablation_can_start(main, capsys):
    """Its command, as a dry run: each variant's flags are the program's."""
    readme = (ROOT / "benchmark" / "README.md").read_text()
    (block,) = re.findall(r"```sh\n(python benchmark/sweep.py --name ablation.*?)```", readme, re.S)
    words = shlex.split(block.replace("\\\n", " "))[2:]
    assert not main(*words, "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    variants = words[words.index("--flags") + 1 :]
    assert len(variants) > 2 and len(lines) == len(set(lines)) == 2 * len(variants)  # of two seeds


def test_dry_run(main, tmp_path, capsys):
    flags = [
        "--name",
        "dry",
        "--scripts",
        "sac_gaussian",
        "--env-ids",
        ENV,
        "--seeds",
        1,
        2,
        "--flags",
        "",
        "gamma=0.9",
    ]
    assert not main(*flags, "--total-timesteps", 7000, "--dry-run")
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[1:] for line in lines] == [
        command("sac_gaussian", "--env-id", ENV, "--seed", seed, "--total-timesteps", 7000, *own, "--run-name", name)[
            1:
        ]
        for own, label in (([], ""), (["--gamma=0.9"], "gamma=0.9__"))
        for seed in (1, 2)
        for name in [f"dry/{ENV}__sac_gaussian__{label}{seed}"]
    ]
    assert not any(tmp_path.iterdir())


# --- the table ---


def write_rows(run: sweep.Run, rows: list[tuple]) -> None:
    """A returns.csv with these rows of step, return and seconds."""
    run.folder.mkdir()
    with open(run.folder / "returns.csv", "w") as file:
        csv.writer(file).writerows([("step", "return", "length", "seconds"), *((s, r, 100, t) for s, r, t in rows)])


def test_progress_of_a_hand_made_run(tmp_path):
    """Speed and return are those of the last ten episodes, whatever came before; half a line does not count."""
    run = sweep.Run([], tmp_path / "run", 3000, "running")
    assert sweep.progress(run) == {"step": 0, "rate": None, "return": None, "end": None}
    write_rows(run, [(100 * i, -50, i) for i in range(1, 6)] + [(500 + 100 * i, i, 5 + 4 * i) for i in range(1, 11)])
    with open(run.folder / "returns.csv", "a") as file:
        file.write("1600,999")
    os.utime(run.folder / "returns.csv", (10_000, 10_000))
    p = sweep.progress(run)
    assert p == {"step": 1500, "rate": 25.0, "return": 5.5, "end": 10_000 + 1500 / 25}
    run_line = sweep.table([run], 1)[1].split("  ")
    assert [cell.strip() for cell in run_line if cell.strip()][:5] == ["run", "running", "1500 / 3000", "25.0", "5.5"]


def test_estimated_end_of_a_sweep():
    """Two slots: one run has 100 s to go, three of 1 000 steps wait, at 10 steps/s."""
    runs = [sweep.Run([], Path(str(i)), 1000, state) for i, state in enumerate(["running", *3 * ["waiting"]])]
    p = [{"step": 0, "rate": None, "end": None} for _ in runs]
    assert sweep.sweep_end(runs, p, 2, now=50.0) is None
    p[0] = {"step": 0, "rate": 10.0, "end": 150.0}
    assert sweep.sweep_end(runs, p, 2, now=50.0) == 250.0
    p[3] = {"step": 500, "rate": 1.0, "end": None}  # it was stopped halfway, and is slower: it is last
    assert sweep.sweep_end(runs, p, 2, now=50.0) == pytest.approx(50 + 1000 / 5.5 + 500)


# --- bad input ---


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--scripts no_such", "--scripts no_such: there is no such script"),
        ("--scripts benchmark/controls/sac_gaussian", "controls/sac_gaussian: there is no such script"),
        ("--scripts sac_flow_g sac_flow_g", "--scripts must name one or more, each once"),
        ("--env-ids NoSuch-v0", "--env-id NoSuch-v0"),
        ("--env-ids", "--env-ids must name one or more"),
        ("--seeds 1 2 1", "--seeds must name one or more, each once, not '1 2 1'"),
        ("--seeds -1", "--seeds must be 0 or more"),
        ("--seed 3", "--seed is the sweep's to set: use --env-ids and --seeds"),
        ("--flags run_name=x", "--run-name is the sweep's to set"),
        ("--flags no-such-flag", "sac_flow_g: error: Unrecognized options: --no-such-flag"),
        ("--flags batch-size=x", "sac_flow_g: error: Error parsing --batch-size"),
        ("--no-such-flag", "sac_flow_g: error: Unrecognized options: --no-such-flag"),
        ("--critic-lr inf", "sac_flow_g: error: --critic-lr must be above 0 and finite, not inf"),
        ("--cores-per-run x", "sweep: error: Error parsing --cores-per-run"),
        ("--cores-per-run 0", "--cores-per-run must be 1 or more"),
        ("--gpus-per-run 1.5", "--gpus-per-run must be from 0 to 1, or whole, not 1.5"),
        ("--retries -1", "--retries must be 0 or more"),
        ("--name ../elsewhere", "--name must be"),
        ("--file nowhere/sweep.json", "--file nowhere/sweep.json is no sweep.json"),
    ],
)
def test_bad_flags(main, tmp_path, capsys, flags, words):
    assert main(*flags.split()) == 2
    stdout, stderr = capsys.readouterr()
    assert not stdout and len(stderr.splitlines()) == 1 and words in stderr, stdout + stderr
    assert not any(tmp_path.iterdir())  # nothing was created


def test_more_cores_than_there_are(begin):
    output = end(begin("--env-ids", ENV, "--cores-per-run", 1000), 2)
    assert len(output.splitlines()) == 1 and "--cores-per-run 1000" in output and "cores" in output


def test_a_run_that_cannot_start_did_not_die(begin, tmp_path):
    (tmp_path / "runs" / "odd" / f"{ENV}__sac_flow_g__1.log").mkdir(parents=True)  # where its log would be
    output = end(begin("--name", "odd", "--env-ids", ENV, *FLAGS), 1)
    assert "1 runs: 1 failed" in output and "IsADirectoryError" in output and "died" not in output


def test_another_sweep_of_that_name_or_the_same_at_once(main, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = sweep.describe(sweep.Args(name="first", env_ids=(ENV,)), ["--gamma", "0.9"])
    file = sweep.open_description("first", text)
    file.write(text)
    file.flush()
    flags = ["--name", "first", "--env-ids", ENV, "--gamma", 0.9]
    assert main(*flags) == 2
    assert "--name first: this sweep is running" in capsys.readouterr().err
    file.close()
    assert main(*flags, "--seeds", 2) == 2
    assert "describes another sweep" in capsys.readouterr().err
    assert main(*flags, "--seeds", 1, 2, "--tau", 0.1) == 2
    assert "describes another sweep" in capsys.readouterr().err
    more = sweep.describe(sweep.Args(name="first", env_ids=(ENV,), seeds=(1, 2)), ["--gamma", "0.9"])
    with sweep.open_description("first", more) as file:
        assert not file.tell()  # to be replaced
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert main(*flags, "--seeds", 1, 2) == 2
    described = tmp_path / "runs" / "first" / "sweep.json"
    assert described.read_text() == text  # until the runs begin
    monkeypatch.setattr(sweep, "start_ray", lambda args: (None, 1))
    monkeypatch.setattr(sweep, "run_all", lambda *args: 0)
    assert main(*flags, "--seeds", 1, 2) == 0
    assert described.read_text() == more
    (tmp_path / "runs" / "full").write_text("")  # a file where the folder would be
    assert main("--name", "full", "--env-ids", ENV) == 2
    assert "cannot write to runs/full" in capsys.readouterr().err


def test_ray_is_missing(main, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert main("--env-ids", ENV) == 2
    assert capsys.readouterr().err == "sweep: error: needs Ray: pip install -r benchmark/requirements.txt\n"
