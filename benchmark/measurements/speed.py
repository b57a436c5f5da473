"""How fast the scripts are, where the time goes, and how near that is to what the machine can do.

Every row is one script, unmodified, training in a process of its own with clocks put into its functions: steps per
second end to end after compilation, milliseconds per step of its parts, start-up, compilation, peak memory. The limit
is what the step's matrix products alone would take: their FLOPs, counted by torch while the same script runs eagerly,
over the rate of a (2 batch, width) x (width, width) product, measured in the same process at the script's precision.

    python benchmark/measurements/speed.py --cores 0 --out speed.csv
    python benchmark/measurements/speed.py --cores 0 1 --suite default
    python benchmark/measurements/speed.py --device cuda --suite paper
"""

import csv
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal, Optional

ROOT = Path(__file__).parents[2]
PAPER = "--critic-dim 1024 --sigma-dim 512 --encoder-dim 0 --batch-size 512"
SUITES = {
    "baseline": {"default": ""},
    "default": {"default": "", "--no-compile": "--no-compile", "--no-crossq": "--no-crossq"},
    "encoder": {"default": "", "the defaults before": "--encoder-dim 0 --entropy path"},
    "paper": {"paper's sizes": PAPER},
    "growth": {
        **{f"K = {k}": f"--flow-steps {k}" for k in (1, 2, 8, 16)},
        **{f"width {w}": f"--critic-dim {w} --sigma-dim {w} --encoder-dim {w}" for w in (512, 1024)},
        "Humanoid-v4": "--env-id Humanoid-v4",
    },
}
PARTS = ("environment", "act", "critic", "actor", "rest")
COLUMNS = (
    "script", "configuration", "device", "cores", "steps_per_s", "limit_steps_per_s", "fraction", "mflop_per_step",
    "gflop_per_s", *(f"{part}_ms" for part in PARTS), "start_s", "compile_s", "peak_mib",
)  # fmt: skip


@dataclass
class Args:
    """Flags of the command line."""

    cores: list[int] = field(default_factory=list)
    """cores to pin each run to, by default the first; as many threads as cores"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where to train"""
    suite: Literal["baseline", "default", "encoder", "paper", "growth", "all"] = "all"
    """which configurations to run; all: those of default, growth and paper"""
    scripts: list[str] = field(default_factory=lambda: ["sac_flow_g", "sac_flow_t"])
    """scripts by name, found beside the README or in benchmark/"""
    root: Path = ROOT
    """folder of the scripts: another checkout's, to compare versions"""
    rounds: int = 1
    """repetitions of everything, in turn"""
    extra: str = ""
    """flags added to every configuration's, in quotes: --extra="--no-compile --gamma 0.9" """
    seconds: float = 8
    """time measured per run, after compilation"""
    out: Optional[Path] = None
    """CSV to append to"""


class Measured(BaseException):
    """Ends the script's training loop once enough has been measured."""


class Clock:
    """Adds up the time that a script's functions take, by part of the step."""

    def __init__(self, job: dict):
        self.seconds = job["seconds"]
        self.warm_up = job["learning_starts"] + job["warm_up"]  # steps
        self.limit = job["steps"]  # or None
        self.spent = dict.fromkeys(PARTS, 0.0)
        self.first_calls = {}
        self.steps = 0
        self.part = None
        self.first_step = None
        self.measured_from = None
        self.cuda = job["device"] == "cuda"

    def timed(self, part, function):
        """`function`, with its time added to `part`; its first call, which may compile, is kept apart."""

        def clocked(*args, **kwargs):
            self.part = part or self.part  # an optimizer's step belongs to the loss before it
            start = time.perf_counter()
            result = function(*args, **kwargs)
            if self.cuda:
                import torch

                torch.cuda.synchronize()
            elapsed = time.perf_counter() - start
            if (self.part, clocked) not in self.first_calls:
                self.first_calls[self.part, clocked] = elapsed
            self.spent[self.part] += elapsed
            return result

        return clocked

    def step(self) -> None:
        """Called before every environment step."""
        now = time.perf_counter()
        self.first_step = self.first_step or now
        if self.steps == self.warm_up:
            self.measured_from = now
            self.spent = dict.fromkeys(PARTS, 0.0)
        elif self.measured_from and (now - self.measured_from > self.seconds or self.steps == self.limit):
            self.elapsed = now - self.measured_from
            raise Measured
        self.steps += 1


def folders(root: Path) -> list[Path]:
    """Where a version of the project, present or older, may have its scripts."""
    return [root, root / "benchmark", root / "benchmark" / "controls"]


def value_of(flags: list[str], name: str) -> Optional[str]:
    """The value of a flag, as two words or as one with "="; the last one counts. None if it is not given."""
    words = [part for word in flags for part in word.split("=", 1)]
    return next((value for flag, value in reversed(list(pairwise(words))) if flag == name), None)


def run_script(job: dict, flags: list[str], clock: Clock) -> None:
    """Train with the script `job` names, its functions clocked, until the clock has seen enough."""
    sys.path[:0] = map(str, folders(Path(job["root"])))
    script = importlib.reload(importlib.import_module(job["script"]))
    if hasattr(script.Args, "eval_every"):  # older versions have none
        flags = [*flags, "--eval-every", "0"]
    learning_starts = "--learning-starts" if hasattr(script.Args, "learning_starts") else "--random-steps"
    flags = [*flags, learning_starts, str(job["learning_starts"])]
    make_env = script.make_env
    find_compiler = script.find_compiler
    kind = "gradients" if hasattr(script, "critic_gradients") else "loss"  # the oldest versions: the forward pass alone
    losses = {f"{part}_{kind}": part for part in ("critic", "actor")}
    step = "apply_gradients" if hasattr(script, "apply_gradients") else "descend"

    def clocked_env(*args):
        env = make_env(*args)
        step = clock.timed("environment", env.step)

        def counted_step(action):
            clock.step()
            return step(action)

        env.step = counted_step
        return env

    def clocked_compiler(device):
        compile = find_compiler(device)
        return lambda function: clock.timed(losses.get(function.__name__, "act"), compile(function))

    script.make_env = clocked_env
    script.find_compiler = clocked_compiler
    if "--no-compile" in flags and hasattr(script, "with_gradients"):  # a rollout of one is then part of the rest
        with_gradients = script.with_gradients
        script.with_gradients = lambda loss, network: clock.timed(losses[loss.__name__], with_gradients(loss, network))
    elif "--no-compile" in flags:
        for name, part in losses.items():
            setattr(script, name, clock.timed(part, getattr(script, name)))
    if not clock.cuda or "--no-compile" in flags:
        setattr(script, step, clock.timed(None, getattr(script, step)))
    else:  # with graphs, each part is one, whose functions run only to be recorded

        class Graph(script.CudaGraph):
            def __init__(self, function):
                super().__init__(function)
                name = {"update_critic": "critic", "update_actor": "actor"}.get(function.__name__, "act")
                self.replay = clock.timed(name, super().__call__)

            def __call__(self):
                self.replay()

        script.find_compiler = find_compiler
        script.CudaGraph = Graph
    sys.argv = [job["script"], *flags]
    try:
        script.main()
    except Measured:
        pass


def child(job: dict) -> None:
    """One run in this process; prints one JSON line."""
    os.sched_setaffinity(0, job["cores"])
    started = time.perf_counter()
    import torch

    torch.set_num_threads(len(job["cores"]))
    flags = ["--env-id", "Hopper-v4", *job["flags"].split()]
    flags += ["--cuda" if job["device"] == "cuda" else "--no-cuda"]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        clock = Clock(job)
        run_script(job, flags, clock)
        rest = clock.elapsed - sum(clock.spent.values())
        steps = clock.steps - clock.warm_up
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if clock.cuda:
            peak = torch.cuda.max_memory_allocated() / 2**20

        # FLOPs of six steps (two of the actor's updates at the default delay), counted in eager mode on the CPU.
        from torch.utils.flop_counter import FlopCounterMode

        count = Clock({**job, "seconds": 1e9, "warm_up": 1, "steps": job["learning_starts"] + 7, "device": "cpu"})
        counter = FlopCounterMode(display=False)
        begin = count.step
        totals = []

        def step():
            if count.steps in (count.warm_up, count.limit):
                totals.append(counter.get_total_flops())
            begin()

        count.step = step
        with counter:
            run_script(job, [*flags, "--no-compile", "--no-cuda"], count)
        flop = (totals[1] - totals[0]) / 6

    width = int(value_of(flags, "--critic-dim") or 256)
    batch = int(value_of(flags, "--batch-size") or 256)
    if precision := getattr(sys.modules[job["script"]], "matmul_precision", None):  # of older versions
        bf16 = ["--bf16" in flags][: precision.__code__.co_argcount - 1]  # a flag of older versions
        torch.set_float32_matmul_precision(precision(torch.device(job["device"]), *bf16))
    x = torch.randn(2 * batch, width, device=job["device"])
    w = torch.randn(width, width, device=job["device"])
    best = float("inf")
    for _ in range(30):
        start = time.perf_counter()
        for _ in range(20):
            torch.mm(x, w)
        if clock.cuda:
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / 20)
    rate = 2 * x.numel() * width / best

    sps = steps / clock.elapsed
    row = dict(
        script=job["script"],
        configuration=job["name"],
        device=job["device"],
        cores=len(job["cores"]),
        steps_per_s=round(sps, 1),
        limit_steps_per_s=round(rate / flop, 1),
        fraction=round(sps * flop / rate, 2),
        mflop_per_step=round(flop / 1e6),
        gflop_per_s=round(rate / 1e9),
        start_s=round(clock.first_step - started, 1),
        compile_s=round(sum(clock.first_calls.values()), 1),
        peak_mib=round(peak),
    )
    for part, spent in {**clock.spent, "rest": rest}.items():
        row[f"{part}_ms"] = round(1000 * spent / steps, 2)
    print(json.dumps(row))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(json.loads(sys.argv[2]))
    sys.path[:0] = [str(ROOT)]
    from sac_flow_g import explained, fail, read_flags  # here, because children measure how long imports take

    args = read_flags(Args, __doc__)
    if args.rounds < 1:
        fail(f"--rounds must be 1 or more, not {args.rounds}")
    if not 0 < args.seconds < float("inf"):
        fail(f"--seconds must be above 0 and finite, not {args.seconds:g}")
    suites = ["default", "growth", "paper"] if args.suite == "all" else [args.suite]
    jobs = [(name, f"{flags} {args.extra}") for suite in suites for name, flags in SUITES[suite].items()]
    for script in args.scripts:
        if not any((folder / f"{script}.py").is_file() for folder in folders(args.root)):
            fail(f"--scripts {script}: no {script}.py in {args.root} or its benchmark/")
    if not hasattr(os, "sched_setaffinity"):
        fail("only Linux pins processes to cores")
    available = os.sched_getaffinity(0)
    args.cores = args.cores or [min(available)]
    if not set(args.cores) <= available:
        fail(f"--cores {' '.join(map(str, args.cores))}: this machine has {' '.join(map(str, sorted(available)))}")
    if args.out:
        with explained(f"--out {args.out} cannot be written to"):
            open(args.out, "a").close()
    rows = []
    for _ in range(args.rounds):
        for name, flags in jobs:
            for script in args.scripts:
                job = dict(
                    script=script, name=name, flags=flags, device=args.device, cores=args.cores, seconds=args.seconds,
                    learning_starts=1000, warm_up=40, steps=None, root=str(args.root.resolve()),
                )  # fmt: skip
                done = subprocess.run(
                    [sys.executable, __file__, "--child", json.dumps(job)], capture_output=True, text=True
                )
                if done.returncode < 0:
                    fail(f"{script} with {flags.strip() or 'its defaults'}: killed by signal {-done.returncode}")
                if done.returncode:
                    fail(f"{script} with {flags.strip() or 'its defaults'}: {done.stderr.strip().splitlines()[-1]}")
                rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
                if len(rows) == 1:
                    print("|" + "|".join(COLUMNS) + "|\n|" + "-|" * len(COLUMNS))
                print("|" + "|".join(str(rows[-1][column]) for column in COLUMNS) + "|", flush=True)
                if args.out:
                    new = args.out.stat().st_size == 0
                    with open(args.out, "a", newline="") as file:
                        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                        if new:
                            writer.writeheader()
                        writer.writerow(rows[-1])


if __name__ == "__main__":
    main()
