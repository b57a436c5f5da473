"""Sweeps: scripts x environments x flag sets x seeds, run side by side by Ray, on one machine or on a cluster.

    python benchmark/sweep.py --name first --scripts sac_flow_g sac_flow_t --env-ids Hopper-v4 Ant-v4 --seeds 1 2 3 \
        --flags "" "batch-size=128 no-crossq" --total-timesteps 100000

Flags that the sweep does not know, here --total-timesteps, go to every run. Each run is an ordinary one of its script,
in the folder runs/<name>/<env>__<script>__<flags>__<seed>; its output is beside it, in <folder>.log. The sweep is
described in runs/<name>/sweep.json: the same command, or --file with that path, continues what is not finished.
"""

import contextlib
import csv
import ctypes
import heapq
import importlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn, Optional
from unittest import mock

try:
    import fcntl
except ImportError:
    sys.exit("sweep: error: it needs Linux or macOS, whose files can be locked")

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = [ROOT, ROOT / "benchmark" / "controls"]
RECENT = 10  # episodes, or evaluations, over which return and speed are averaged


@dataclass
class Args:
    """Flags of the command line. The first five, and those of the runs, are kept in sweep.json."""

    name: str = "sweep"
    """the sweep's folder is runs/<name>"""
    scripts: tuple[str, ...] = ("sac_flow_g",)
    """sac_flow_g, sac_flow_t, sac_flow_offline2online, or controls: sac_flow_naive, sac_gaussian"""
    env_ids: tuple[str, ...] = ("Hopper-v4",)
    """environments, as the scripts' --env-id takes them"""
    seeds: tuple[int, ...] = (1,)
    """seeds"""
    flags: tuple[str, ...] = ("",)
    """flag sets, each in quotes and without the dashes: "" "batch-size=128 no-crossq" """
    file: Optional[str] = None
    """a sweep.json to take the above from; flags given with it take precedence"""
    cores_per_run: int = 1
    """cores, and threads, per run; as many runs go side by side as there are cores for"""
    gpus_per_run: float = 0.0
    """GPUs per run, or a fraction of one: with 0.25, four runs share a GPU; 0: on the CPU"""
    address: str = "local"
    """local: this machine, nothing to set up; auto: the Ray cluster that this machine is part of"""
    retries: int = 10
    """how often a run whose process, worker or node died is started again, from its last checkpoint"""
    dry_run: bool = False
    """print the commands of the runs that are not finished, and run nothing"""


@dataclass
class Run:
    """A run of the sweep and what is known of it."""

    arguments: list[str]
    """script and flags"""
    folder: Path
    """where the script keeps it"""
    total: int
    """steps"""
    state: str = "waiting"
    """waiting, running, finished, failed or stopped"""
    note: str = ""
    """why it failed"""


class Died(Exception):
    """A signal ended a run's process: worth another try."""


def fail(message: str) -> NoReturn:
    """Stop with one line on standard error and exit code 2."""
    print(f"sweep: error: {message}", file=sys.stderr)
    raise SystemExit(2)


# What the sweep is


def parse_args() -> tuple[Args, list[str]]:
    """Flags of the sweep, and those of every run."""
    sys.path[:0] = map(str, FOLDERS)
    from sac_flow_g import read_flags  # here, because it imports torch, which workers do without

    args, common = read_flags(Args, __doc__, return_unknown_args=True)
    if args.file:
        try:
            described = json.loads(Path(args.file).read_text())
            common_of_file = shlex.split(described.pop("every_run"))
            values = {name: tuple(v) if isinstance(v, list) else v for name, v in described.items()}
            default = Args(**values)
            if not all(isinstance(seed, int) for seed in default.seeds):
                raise ValueError("its seeds are no numbers")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            fail(f"--file {args.file} is no sweep.json ({error}): name the one in a sweep's folder")
        args, common = read_flags(Args, __doc__, default=default, return_unknown_args=True)
        if common != common_of_file:
            common = [*common_of_file, *common]  # if a flag is given twice, the last one counts
    for name in ("scripts", "env_ids", "seeds", "flags"):
        values = getattr(args, name)
        if not values or len(set(values)) < len(values):
            fail(f"--{name.replace('_', '-')} must name one or more, each once, not {' '.join(map(str, values))!r}")
    rules = [
        ("name", bool(re.fullmatch(r"[\w.-]+", args.name)), "letters, digits, and . _ - between them"),
        ("seeds", all(0 <= seed < 2**32 for seed in args.seeds), "0 or more, and below 2^32"),
        ("cores_per_run", args.cores_per_run >= 1, "1 or more"),
        ("gpus_per_run", 0 <= args.gpus_per_run <= 1 or args.gpus_per_run.is_integer(), "from 0 to 1, or whole"),
        ("retries", args.retries >= 0, "0 or more"),
    ]
    for name, holds, requirement in rules:
        if not holds:
            fail(f"--{name.replace('_', '-')} must be {requirement}, not {getattr(args, name)}")
    for token in [*common, *(f"--{token}" for flags in args.flags for token in flags.split())]:
        name = token.split("=")[0].replace("_", "-")
        if name in ("--env-id", "--seed", "--run-name", "--resume", "--evaluate"):
            fail(f"{name} is the sweep's to set: use --env-ids and --seeds, and the same --name to resume")
    return args, common


def make_runs(args: Args, common: list[str]) -> list[Run]:
    """All runs; stops the program if a run's script refuses its flags or its environment."""
    runs = []
    known = set()
    for script, env_id, flags, seed in itertools.product(args.scripts, args.env_ids, args.flags, args.seeds):
        paths = [folder / f"{script}.py" for folder in FOLDERS if (folder / f"{script}.py").is_file()]
        if not paths or not script.isidentifier() or not hasattr(module := importlib.import_module(script), "Args"):
            fail(f"--scripts {script}: there is no such script; sac_flow_g is one")
        own = [*common, *(f"--{token}" for token in flags.split())]
        arguments = ["--env-id", env_id, "--seed", str(seed), *own]
        with mock.patch("sys.argv", [str(paths[0]), *arguments, "--no-cuda"]):  # another machine may have the GPU
            parsed, _ = module.parse_args()
        if env_id not in known and script != "sac_flow_offline2online":  # which checks it once it has its data
            module.make_env(env_id).close()
            known.add(env_id)
        total = sum(getattr(parsed, name, 0) for name in ("total_timesteps", "offline_steps", "online_steps"))
        name = "__".join(filter(None, [env_id, script, "_".join(flags.split()), str(seed)]))
        folder = Path("runs", args.name, re.sub(r"[^\w.=-]+", "_", name)).absolute()
        if len(folder.name) > 200:
            fail(f"--flags {flags!r}: too long to be part of a folder's name, {folder.name}")
        if any(run.folder == folder for run in runs):
            fail(f"--flags {flags!r}: another flag set has the same folder, {folder.name}")
        runs.append(Run([str(paths[0]), *arguments], folder, total))
    return runs


def describe(args: Args, common: list[str]) -> str:
    """The text of sweep.json."""
    kept = {name: asdict(args)[name] for name in ("name", "scripts", "env_ids", "seeds", "flags")}
    return json.dumps(kept | {"every_run": shlex.join(common)}, indent=2) + "\n"


def has_more_seeds(known: str, text: str) -> bool:
    """Whether the second sweep.json is the first with further seeds."""
    try:
        old = json.loads(known)
        new = json.loads(text)
        return set(old.pop("seeds")) < set(new.pop("seeds")) and old == new
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def open_description(name: str, text: str):
    """The sweep's sweep.json, open, locked against a second sweep, and at its start if `text` is to replace it.

    That is the case if it is new or has fewer seeds. Stops the program if it describes another sweep than `text`.
    """
    path = Path("runs", name, "sweep.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"--name {name}: this sweep is running; wait for it to end, or choose another name")
    except OSError as error:
        fail(f"--name {name}: cannot write to {path.parent} ({error})")
    file.seek(0)
    known = file.read()
    if has_more_seeds(known, text):
        file.seek(0)
    elif known not in ("", text):
        fail(f"--name {name}: {path} describes another sweep; choose another name, or continue it with --file {path}")
    return file


# One run


def saved_step(folder: Path) -> Optional[int]:
    """Step of a run's checkpoint, or, if that was removed, of its policy; None without one, 0 if it cannot be read."""
    paths = [folder / name for name in ("checkpoint.pt", "policy.pt") if (folder / name).exists()]
    if not paths:
        return None
    import torch  # here, because most workers never need it

    try:
        state = torch.load(paths[0], map_location="cpu", weights_only=True, mmap=True)
        return state["progress"]["step"] if "progress" in state else state["step"]
    except Exception:
        return 0


def command_of(run: Run) -> list[str]:
    """The command that starts or resumes a run."""
    name = f"{run.folder.parent.name}/{run.folder.name}"
    where = ["--resume", f"runs/{name}"] if (run.folder / "checkpoint.pt").exists() else ["--run-name", name]
    return [sys.executable, *run.arguments, *where]


def log_of(run: Run) -> Path:
    """The file that a run's process prints to."""
    return run.folder.with_name(f"{run.folder.name}.log")


def train(run: Run, environ: dict[str, str]) -> tuple[str, str]:
    """Start or resume a run in a process of its own and wait for its end: the Ray task.

    Returns its state, finished, failed or stopped, and why it failed. A KeyboardInterrupt is a request to stop. Raises
    Died.
    """
    with contextlib.suppress(ValueError):  # outside the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)  # under nohup and & it is ignored, even ray.cancel's
    with open(log_of(run), "a") as log:
        # The process inherits the log, and with it the lock: a retry waits until the last writer of the run is gone.
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.2)
        if (saved_step(run.folder) or 0) >= run.total:
            return "finished", ""
        if not (run.folder / "checkpoint.pt").exists():
            if (run.folder / "policy.pt").exists():  # results whose checkpoint was removed
                run.folder.rename(run.folder.with_name(f"{run.folder.name}.{time.time_ns()}.old"))
            shutil.rmtree(run.folder, ignore_errors=True)  # it died before its first checkpoint
        command = command_of(run)
        print("$", shlex.join(command), file=log, flush=True)
        # It dies with this worker on Linux; elsewhere the retry waits for its end.
        die_with_parent = partial(ctypes.CDLL(None).prctl, 1, signal.SIGKILL) if sys.platform == "linux" else None
        process = subprocess.Popen(
            command, cwd=run.folder.parents[2], env={**os.environ, **environ}, stdin=subprocess.DEVNULL,
            stdout=log, stderr=log, start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip
        stopped = False
        code = None
        while code is None:
            try:
                time.sleep(0.2)
                code = process.poll()
            except KeyboardInterrupt:
                stopped = True
                process.terminate()  # to a script the same as Ctrl-C, which Ray's workers block
    if code == 0:
        return "finished", ""
    if stopped:
        return "stopped", ""
    lines = log_of(run).read_text(errors="replace").splitlines()
    last = [line for line in lines if line.strip()][-1]
    if code < 0 or code > 128:
        number = -code if code < 0 else code - 128
        raise Died(f"signal {number}; {last}")
    return "failed", last


# How far they are


def progress(run: Run) -> dict:
    """Step, steps per second, mean return of the last episodes and time of the end (s since 1970); None: unknown."""
    points = [(0, 0.0)]  # step, seconds of training
    returns = []
    written = 0.0
    for name in ("returns.csv", "eval.csv"):
        path = run.folder / name
        if path.exists():
            head, *rows = path.read_text().rpartition("\n")[0].splitlines() or [""]  # without a half-written line
            rows = list(csv.DictReader([head, *rows[-RECENT - 1 :]]))
            points += [(int(row["step"]), float(row["seconds"])) for row in rows]
            returns = returns or [float(row["return"]) for row in rows[-RECENT:]]
            written = max(written, path.stat().st_mtime)
    points = sorted(points)[-RECENT - 1 :]
    first, begin = points[0]
    step, end = points[-1]
    rate = (step - first) / (end - begin) if end > begin else None
    return {
        "step": step,
        "rate": rate,
        "return": sum(returns) / len(returns) if returns else None,
        "end": written + (run.total - step) / rate if rate else None,
    }


def sweep_end(runs: list[Run], all_progress: list[dict], slots: int, now: float) -> Optional[float]:
    """When the last run ends, if `slots` run side by side and those without a speed of their own run at the mean.

    None if nothing runs, or no speed is known.
    """
    pairs = list(zip(runs, all_progress, strict=True))
    rates = [p["rate"] for p in all_progress if p["rate"]]
    ends = [max(now, p["end"] or now) for run, p in pairs if run.state == "running"]
    if not rates or not ends:
        return None
    free = ends + [now] * (slots - len(ends))  # when each slot is free
    heapq.heapify(free)
    mean = sum(rates) / len(rates)
    for run, p in pairs:
        if run.state == "waiting":
            seconds = (run.total - p["step"]) / (p["rate"] or mean)
            heapq.heapreplace(free, free[0] + seconds)  # the first that is free takes it
    return max(free)


def clock(seconds: Optional[float]) -> str:
    """Date and time, or a dash."""
    return time.strftime("%m-%d %H:%M", time.localtime(seconds)) if seconds else "-"


def table(runs: list[Run], slots: int) -> list[str]:
    """The runs, and in the last line the sweep."""
    all_progress = [progress(run) for run in runs]
    width = max(len(run.folder.name) for run in runs)
    lines = [f"{'run':{width}}  {'state':8}  {'step':>17}  {'steps/s':>7}  {'return':>8}  end"]
    for run, p in zip(runs, all_progress, strict=True):
        rate = f"{p['rate']:.1f}" if p["rate"] else "-"
        shown = f"{p['return']:.1f}" if p["return"] is not None else "-"
        end = clock(p["end"]) if run.state == "running" else "-"
        step = f"{p['step']} / {run.total}"
        lines.append(f"{run.folder.name:{width}}  {run.state:8}  {step:>17}  {rate:>7}  {shown:>8}  {end}")
    count = Counter(run.state for run in runs)
    states = ", ".join(f"{n} {state}" for state, n in count.items())
    rates = [p["rate"] or 0 for run, p in zip(runs, all_progress, strict=True) if run.state == "running"]
    end = clock(sweep_end(runs, all_progress, slots, time.time()))
    lines.append(f"{time.strftime('%H:%M:%S')}  {len(runs)} runs: {states}; {sum(rates):.1f} steps/s, end {end}")
    return lines


class Screen:
    """Standard output: a table that is redrawn in a terminal, else a line a minute, and the whole table at the end."""

    def __init__(self):
        self.live = sys.stdout.isatty()
        self.drawn = 0  # lines
        self.shown = 0.0  # when

    def show(self, runs: list[Run], slots: int) -> None:
        """Show a table, if it is due."""
        if time.time() - self.shown < (2 if self.live else 60):
            return
        *lines, last = table(runs, slots)
        columns, rows = shutil.get_terminal_size()
        shown = lines[: rows - 2] if self.live else []
        self.print([line[: columns - 1] for line in [*shown, last]])

    def print(self, lines: list[str]) -> None:
        """Print lines over those that were drawn before."""
        self.shown = time.time()
        back = f"\033[{self.drawn}F\033[J" if self.drawn else ""  # up over them, and clear what is below
        print(back + "\n".join(lines), flush=True)
        self.drawn = len(lines) if self.live else 0


# The sweep


def start_ray(args: Args):
    """Ray, connected, and how many runs fit side by side; stops the program if not even one does."""
    os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"})  # it is quiet then
    try:
        import ray
    except ImportError:
        fail("needs Ray: pip install -r benchmark/requirements.txt")
    own = {}
    if args.address == "local":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        own = {"num_cpus": cores, "include_dashboard": False, "object_store_memory": 100 * 2**20}
    try:
        ray.init(args.address, log_to_driver=False, logging_level="error", **own)
    except (ConnectionError, ValueError) as error:
        fail(f"--address {args.address}: {str(error).splitlines()[0]} (benchmark/README.md, Sweeps)")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = [node.get("CPU", 0) for node in nodes]
    gpus = [node.get("GPU", 0) for node in nodes]
    slots = 0
    for n, g in zip(cores, gpus, strict=True):
        by_gpu = (g + 1e-6) / args.gpus_per_run if args.gpus_per_run else math.inf
        slots += int(min(n // args.cores_per_run, by_gpu))
    if not slots:
        has = f"no machine has more than {max(cores):.0f} cores and {max(gpus):.0f} GPUs"
        fail(f"--cores-per-run {args.cores_per_run} --gpus-per-run {args.gpus_per_run:g}: {has} here")
    return ray, slots


def run_all(args: Args, runs: list[Run], screen: Screen, ray, slots: int) -> int:
    """Run all that wait, until they end or are stopped. Returns the number of the signal that stopped them, or 0."""
    environ = {name: str(args.cores_per_run) for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")}
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    environ["PYTHONPATH"] = os.pathsep.join(paths)  # a user's environments lie beside the scripts, not the controls
    if not args.gpus_per_run:
        environ["CUDA_VISIBLE_DEVICES"] = ""
    task = ray.remote(train).options(
        num_cpus=args.cores_per_run, num_gpus=args.gpus_per_run, max_retries=args.retries, retry_exceptions=[Died]
    )
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    began = time.time()
    pending = {task.remote(run, environ): run for run in runs if run.state == "waiting"}
    heard = 0  # signals
    while pending and heard < 2:
        if len(signals) > heard:
            heard = min(len(signals), 2)
            print("\nstopping at the end of each episode; a second Ctrl-C stops at once", file=sys.stderr)
            screen.drawn = 0
            for task_id in pending:
                ray.cancel(task_id, force=heard == 2)
        ended, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0.5)
        for task_id in ended:
            run = pending.pop(task_id)
            try:
                run.state, run.note = ray.get(task_id)
            except ray.exceptions.TaskCancelledError:
                run.state = "stopped"
            except ray.exceptions.RayError as error:
                run.state = "failed"
                own = isinstance(error, ray.exceptions.RayTaskError) and not isinstance(error, Died)
                tries = "" if own else f"died {args.retries + 1} times; "  # an error of `train` itself is not retried
                run.note = tries + str(error).splitlines()[-1]
        for run in pending.values():
            log = log_of(run)
            run.state = "running" if log.exists() and log.stat().st_mtime >= began else "waiting"
        screen.show(runs, slots)
    for run in pending.values():
        run.state = "stopped"
    ray.shutdown()
    return signals[0] if signals else 0


def main() -> None:
    """Run what is not finished."""
    args, common = parse_args()
    runs = make_runs(args, common)
    for run in runs:
        run.state = "finished" if (saved_step(run.folder) or 0) >= run.total else "waiting"
    waiting = [run for run in runs if run.state == "waiting"]
    if args.dry_run:
        print("\n".join(shlex.join(command_of(run)) for run in waiting))
        return
    screen = Screen()
    stopped = 0
    text = describe(args, common)
    with open_description(args.name, text) as file:
        if waiting:
            ray, slots = start_ray(args)
            if not file.tell():
                file.truncate()
                file.write(text)
                file.flush()
            stopped = run_all(args, runs, screen, ray, slots)
    screen.print(table(runs, slots=1))
    failed = [run for run in runs if run.state == "failed"]
    for run in failed:
        print(f"{run.folder.name} failed: {run.note} ({log_of(run)})", file=sys.stderr)
    if stopped:
        names = "cores_per_run gpus_per_run address retries".split()
        changed = [name for name in names if getattr(args, name) != getattr(Args, name)]
        own = [f"--{name.replace('_', '-')} {getattr(args, name)}" for name in changed]
        again = f"python {sys.argv[0]} --file runs/{args.name}/sweep.json"
        print("stopped; resume with the same command, or:", again, *own)
    raise SystemExit(128 + stopped if stopped else 1 if failed else 0)


if __name__ == "__main__":
    main()
