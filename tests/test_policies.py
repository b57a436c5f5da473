"""The trained policies of benchmark/policies: each plays, and as well as it is said to."""

import csv
import re

import pytest
from helpers import ROOT

FOLDER = ROOT / "benchmark" / "policies"
ROWS = list(csv.DictReader(open(FOLDER / "returns.csv")))


def test_every_policy_is_listed():
    assert {row["file"] for row in ROWS} == {path.name for path in FOLDER.glob("*.pt")}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["file"])
def test_policy_returns_what_it_is_said_to(start, row):
    """One deterministic episode; the bound leaves room for other versions of MuJoCo and other processors."""
    done = start("--evaluate", FOLDER / row["file"], "--eval-episodes", 1, "--no-cuda", name=row["script"])
    assert done.returncode == 0, done.stderr
    returned = float(re.search(r"^deterministic: return (\S+)", done.stdout, re.M)[1])
    assert returned > 0.8 * float(row["return"])
