"""The bookkeeping of a slot: parts that pass, fail, hang, have nothing to do, and minutes that are used up."""

import json
import subprocess
import sys
import time

from tests.gpu import slot


def part(name, code, limit=20):
    return slot.Part(name, limit, (sys.executable, "-c", code))


def test_what_fails_or_hangs_is_kept_and_the_next_part_runs(tmp_path):
    child = "import subprocess, time; subprocess.Popen(['sleep', '97531']); print('half', flush=True); time.sleep(60)"
    parts = [
        part("fails", "raise ValueError('the logits differ')"),
        part("hangs", child, limit=2),
        part("nothing", "import sys; print('vLLM is not installed'); sys.exit(77)"),
        part("passes", "print('words'); print('figures: {\"loss\": 0.5}')"),
    ]
    began = time.monotonic()
    rows = slot.run(parts, tmp_path / "out", 60)
    assert time.monotonic() - began < 30
    assert [row["outcome"] for row in rows] == [
        "failed with 1: ValueError: the logits differ", "stopped after 2 s", "skipped: vLLM is not installed", "passed",
    ]  # fmt: skip
    assert rows[3]["figures"] == {"loss": 0.5} and rows[0]["figures"] == {}
    written = [json.loads(line) for line in (tmp_path / "out" / "slot.jsonl").read_text().splitlines()]
    assert written == rows and {"device", "driver", "commit", "versions", "date", "part", "seconds"} <= set(rows[0])
    assert "=== hangs\nhalf\n" in (tmp_path / "out" / "log.txt").read_text()
    assert "sleep 97531" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_when_the_minutes_are_used_up_the_rest_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(slot, "LEAST", 1)
    rows = slot.run([part("long", "import time; time.sleep(60)"), part("next", "print(1)")], tmp_path, 3)
    assert [row["outcome"] for row in rows] == ["stopped after 3 s", "not run: the minutes are used up"]
    more = slot.run([part("later", "print(1)")], tmp_path, 60)  # a second command goes on in the same file
    assert more[0]["outcome"] == "passed" and len((tmp_path / "slot.jsonl").read_text().splitlines()) == 3

