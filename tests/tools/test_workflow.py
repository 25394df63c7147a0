"""The workflow of GitHub runs what it should, on all the Pythons, and nothing that somebody else can change."""

import re
import shutil
import subprocess

import pytest
import yaml

from rlnb.tools.setup import PYTHONS, ROOT

FILE = ROOT / ".github" / "workflows" / "checks.yml"
TEXT = FILE.read_text(encoding="utf-8")
WORKFLOW = yaml.safe_load(TEXT)
JOBS = WORKFLOW["jobs"]


def test_every_python_is_tested_and_one_of_them_with_everything():
    whole = re.findall(r'python-version: "(.+)"', TEXT)
    assert [*whole, *JOBS["pythons"]["strategy"]["matrix"]["python"]] == [*PYTHONS]
    assert {"run": "bash .ci/run"} in JOBS["everything"]["steps"]
    steps = " ".join(step.get("run", "") for step in JOBS["pythons"]["steps"])
    assert "rlnb test unit" in steps and "--nbval-lax" in steps
    notebooks = re.findall(r"notebooks/\w+\.ipynb", steps)
    assert len(notebooks) == 2 and all((ROOT / name).is_file() for name in notebooks)


def test_it_may_only_read_and_every_job_ends():
    assert WORKFLOW["permissions"] == {"contents": "read"} and WORKFLOW["concurrency"]["cancel-in-progress"]
    assert all(job["timeout-minutes"] <= 150 and "permissions" not in job for job in JOBS.values())


def test_an_action_is_a_commit_not_a_tag_that_can_move():
    used = [step["uses"] for job in JOBS.values() for step in job["steps"] if "uses" in step]
    assert used and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", name) for name in used)


@pytest.mark.skipif(not shutil.which("actionlint"), reason="actionlint is not installed; the workflow runs it")
def test_actionlint_finds_nothing():
    done = subprocess.run(["actionlint", str(FILE)], stdout=-1, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
