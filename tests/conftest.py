"""Fixtures: the scripts as modules, and a way to run them as a user does."""

import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
from ctypes.util import find_library
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side
os.environ["HF_HUB_OFFLINE"] = "1"  # Minari looks there for what it does not find on the disk
if find_library("EGL"):
    os.environ.setdefault("MUJOCO_GL", "egl")  # without it mujoco would not even import

import pytest
import torch

pytest.register_assert_rewrite("helpers")

from helpers import FLOWS, FOLDERS, ROOT, SCRIPTS, command  # noqa: E402

sys.path[:0] = [*map(str, FOLDERS), str(ROOT / "tests")]
# For the scripts that tests start: tiny_envs is found, and what was found before still is.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(params=SCRIPTS)
def name(request) -> str:
    """The name of each script in turn."""
    return request.param


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same, and sees the same notes, whatever ran before it."""
    torch.manual_seed(0)
    for name in (*FLOWS, "sac_gaussian", "sac_flow_offline2online"):
        if name in sys.modules:
            sys.modules[name].note.cache_clear()  # a note is said once in a process


@pytest.fixture(params=FLOWS)
def script(request):
    """Each script in turn, the control included, imported."""
    return importlib.import_module(request.param)


@pytest.fixture
def refused(capsys):
    """`refused(function, *texts)`: it stops with exit code 2 and one line that holds every text."""

    def refused(function, *texts):
        capsys.readouterr()
        with pytest.raises(SystemExit) as error:
            function()
        lines = capsys.readouterr().err.splitlines()
        assert error.value.code == 2 and len(lines) == 1, lines
        for text in texts:
            assert text in lines[0], lines

    return refused


@pytest.fixture
def shared():
    """sac_flow_g.py alone, for tests of text that the scripts share (test_project.py) and that no velocity affects."""
    return importlib.import_module("sac_flow_g")


# Half of a short run is the import of torch and its compiler. A server that has imported them forks a process for each.
forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(["torch._dynamo", "torch.utils.tensorboard", "gymnasium", "mujoco", "tyro"])


def as_main(arguments: list[str], folder: Path, environ: dict, streams: list[Path]) -> None:
    """What `python *arguments` does in a folder, in this process; its output goes to two files."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv[:] = arguments
    own = {*map(str, FOLDERS), str(ROOT / "tests")}
    added = [str(Path(arguments[0]).parent), *environ["PYTHONPATH"].split(os.pathsep)]
    sys.path[:] = [*added, *(path for path in sys.path if path not in own)]
    runpy.run_path(arguments[0], run_name="__main__")


@pytest.fixture
def start(tmp_path, tmp_path_factory):
    """Runs a script in a fresh folder: `start(*flags, name=...)` returns the finished process.

    With `env` or an argument of subprocess.run it is an interpreter of its own.
    """

    def start(*flags: str, name: str, env=None, **kwargs) -> subprocess.CompletedProcess:
        arguments = command(name, *flags)
        environ = {**os.environ, **(env or {})}
        if "--no-cuda" in flags and "--cuda" not in flags:
            environ["CUDA_VISIBLE_DEVICES"] = ""  # else Adam and the compiler open the GPU all the same
        for display in ("DISPLAY", "WAYLAND_DISPLAY"):
            environ.pop(display, None)
        if env or kwargs:
            return subprocess.run(
                arguments, cwd=tmp_path, env=environ, text=True, capture_output=True, timeout=500, **kwargs
            )
        streams = [tmp_path_factory.mktemp("output") / stream for stream in ("stdout", "stderr")]
        process = forked.Process(target=as_main, args=(arguments[1:], tmp_path, environ, streams))
        process.start()
        process.join(500)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(arguments, 500)
        return subprocess.CompletedProcess(arguments, process.exitcode, *(path.read_text() for path in streams))

    return start


@pytest.fixture
def run(name, start):
    """Runs each script in turn in a fresh folder: `run(*flags)` returns the finished process."""
    return partial(start, name=name)
