"""Promises of the project's texts: the diff is the paper, one list of requirements, a README that works."""

import difflib
import importlib
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from copy_shared import GAUSSIAN, NAIVE, OFFLINE, OWN, G, T, split, with_shared
from helpers import ROOT, SMALL, the_run


@pytest.mark.parametrize("other", [T, NAIVE], ids=lambda path: path.stem)
def test_the_diff_is_the_paper(other):
    """Docstring, the velocity's Args fields and the velocity network differ, and nothing else."""
    parts = [split(path.read_text()) for path in (G, other)]
    names = [name for name, _ in parts[0]]
    assert names == [name for name, _ in parts[1]] and set(OWN) < set(names)
    differing = [name for (name, g), (_, t) in zip(*parts, strict=True) if g != t]
    assert differing == [name for name in names if name in OWN]


def test_docstrings_of_the_pair_differ_in_name_cure_and_command():
    """Five lines of each: the title, two that say how the gradients are tamed, the usage, the paper's flags."""
    g, t = (dict(split(path.read_text()))["docstring"].splitlines() for path in (G, T))
    assert [i for i, (a, b) in enumerate(zip(g, t, strict=True)) if a != b] == [0, 4, 5, 8, 10]
    assert t[0] == g[0].replace("Flow-G", "Flow-T") and t[8] == g[8].replace("flow_g", "flow_t")
    assert t[10] == f"{g[10]} --no-velocity-contractive"


@pytest.mark.parametrize("other", [T, NAIVE, GAUSSIAN, OFFLINE], ids=lambda path: path.stem)
def test_what_is_shared_is_the_same_text(other):
    """`python tests/copy_shared.py` would change nothing."""
    text, expected = other.read_text().splitlines(), with_shared(G.read_text(), other).splitlines()
    assert text == expected, "\n".join(difflib.unified_diff(text, expected, lineterm=""))


def test_script_metadata_equals_requirements():
    core = (ROOT / "requirements.txt").read_text().split("\n")[:-1]
    tasks = (ROOT / "benchmark" / "demonstrations" / "requirements.txt").read_text().split("\n")[:-1]
    for path in (G, T, NAIVE, GAUSSIAN, OFFLINE):
        requirements = core
        if path == OFFLINE:  # the tasks' numpy is the narrower one
            requirements = [line for line in core if "numpy" not in line]
            requirements += [line for line in tasks if line not in core]
        block = re.search(r"^# /// script\n(.*?)^# ///\n", path.read_text(), re.M | re.S)[1]
        assert re.findall(r'^#     "(.*)",$', block, re.M) == requirements
        assert f'# requires-python = ">=3.10{",<3.13" if path == OFFLINE else ""}"\n' in block


def test_every_flag_is_documented():
    for path in (G, T, NAIVE, GAUSSIAN, OFFLINE):
        body = path.read_text().split("class Args:")[1].split("\n\n\n")[0]
        fields = re.findall(r"^    (\w+): .*\n(.*)", body, re.M)
        assert len(fields) > 25 and all(line.startswith('    """') for _, line in fields)


def test_readme_example_works_when_pasted(monkeypatch):
    """The lines that reuse the actor, run as they stand."""
    readme = (ROOT / "README.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "import Actor" in block]
    assert len(code.strip().splitlines()) <= 10
    names = {}
    exec(code, names)
    assert isinstance(names["loss"], torch.Tensor) and names["actor"].velocity_net.from_obs.weight.grad is not None


def test_readme_loads_a_policy(monkeypatch, tmp_path):
    """The lines that load one, run as they stand but for the run's name."""
    import sac_flow_g as script

    flags = "--total-timesteps 40 --learning-starts 20 --eval-every 0".split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["script", *flags, *SMALL])
    script.main()
    readme = (ROOT / "README.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "load_policy" in block]
    assert len(code.strip().splitlines()) == 3
    names = {}
    exec(code.replace("runs/<name>", str(the_run(tmp_path))), names)
    assert names["action"].shape == (3,) and abs(names["action"]).max() <= 1


def test_a_policy_acts_without_the_compiler():
    """Its import takes seconds (3 of 7 at the start): neither a wrong flag nor a saved policy waits for it."""
    code = """import sys
import torch
import sac_flow_offline2online
from sac_flow_g import load_policy
load_policy("benchmark/policies/Hopper-v4__sac_flow_g.pt").act(torch.zeros(1, 11))
sys.exit("torch._dynamo" in sys.modules)"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_readme_flags_exist():
    """Every --flag that the README names is one of the programs'."""
    programs = "sac_flow_g sac_flow_t sac_flow_offline2online gradient_norms frozen_critic collect".split()
    names = {field.name for program in programs for field in fields(importlib.import_module(program).Args)}
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]+)", (ROOT / "README.md").read_text()))
    known = {flag for name in names for flag in (name.replace("_", "-"), "no-" + name.replace("_", "-"))}
    assert named - known <= {"logdir", "help"}, named - known


def test_links_lead_somewhere():
    """Every relative link of the texts names a file that is there, and a heading in it if it has a #."""
    texts = [ROOT / "README.md", *(ROOT / "benchmark").rglob("*.md"), ROOT / "benchmark" / "rnn_equivalence.ipynb"]
    links = 0
    for text in texts:
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text.read_text()):
            name, _, heading = link.partition("#")
            target = (text.parent / name) if name else text
            assert target.exists(), f"{text}: {link}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
                anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
                assert heading in anchors, f"{text}: {link}"
            links += 1
    assert links > 40
