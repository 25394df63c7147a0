"""The workbook on SmolLM2-135M: the notebooks in the smoke profile, and a row of the comparison.

    python -m rlnb fetch smollm2-135m
    pytest tests/workbook
"""

import os
import subprocess
import sys

import pytest

from rlnb.tools import compare
from rlnb.tools.setup import ROOT

NAME = "smollm2-135m"
NOTEBOOKS = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb")) if path.stem != "16_real_model"]


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """One for all: what a notebook has trained the next one finds, as a reader's does."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_notebook_runs_on_the_real_model(notebook, registry, tmp_path):
    own = {"RLNB_MODEL": NAME, "RLNB_PROFILE": "smoke", "RLNB_RUNS": str(registry), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "rlnb", "run", notebook, "--out", str(tmp_path)]
    done = subprocess.run(command, env=os.environ | own, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_row_of_the_comparison(registry, monkeypatch):
    monkeypatch.setenv("RLNB_MODEL", NAME)
    monkeypatch.setenv("RLNB_RUNS", str(registry))
    row = compare.row("SFT", 0)
    assert row["id_n"] == 16 and row["kl"] == 0 and row["train_seconds"] > 0 and row["tokens"] > 0
