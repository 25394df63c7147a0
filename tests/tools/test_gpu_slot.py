"""The bookkeeping of a slot: parts that pass, fail, hang, have nothing to do, and minutes that are used up."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.gpu import slot

TOYS = {
    "fails": "raise ValueError('the logits differ')",
    "hangs": "import subprocess, time; subprocess.Popen(['sleep', '97531']); print('half', flush=True); time.sleep(60)",
    "nothing": "import sys; print('vLLM is not installed'); sys.exit(77)",
    "passes": "print('words'); print('figures: {\"loss\": 0.5}')",
}


@pytest.fixture
def toys(tmp_path, monkeypatch):
    for name, code in TOYS.items():
        Path(tmp_path, f"toy_{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return {name: slot.Part(name, 2 if name == "hangs" else 20, [f"toy_{name}"]) for name in TOYS}


def test_what_fails_or_hangs_is_kept_and_the_next_part_runs(toys, tmp_path):
    rows = slot.run(list(toys.values()), tmp_path / "out", 60)
    assert [row["outcome"] for row in rows] == [
        "failed with 1: ValueError: the logits differ", "stopped after 2 s: half", "skipped: vLLM is not installed",
        "passed",
    ]  # fmt: skip
    assert rows[3]["figures"] == {"loss": 0.5} and rows[0]["figures"] == {}
    written = [json.loads(line) for line in (tmp_path / "out" / "slot.jsonl").read_text().splitlines()]
    assert written == rows and {"device", "driver", "commit", "versions", "date", "part", "seconds"} <= set(rows[0])
    assert "=== hangs\nhalf\n" in (tmp_path / "out" / "log.txt").read_text()
    assert "sleep 97531" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_when_the_minutes_are_used_up_the_rest_is_not_run(toys, tmp_path, monkeypatch):
    monkeypatch.setattr(slot, "LEAST", 1)
    rows = slot.run([toys["hangs"]._replace(limit=20), toys["passes"]], tmp_path, 3)
    assert [row["outcome"] for row in rows] == ["stopped after 3 s: half", "not run: the minutes are used up"]
    assert slot.run([toys["passes"]], tmp_path, 60)[0]["outcome"] == "passed"  # a second command goes on in the file
    assert len((tmp_path / "slot.jsonl").read_text().splitlines()) == 3
