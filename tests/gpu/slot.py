"""One command for half an hour of a GPU: runs the parts in order, each in its own process with its own limit.

    python -m tests.gpu.slot --out FOLDER [--minutes 28] [--from PART]     # --dry: the same, tiny, on a CPU

FOLDER/slot.jsonl gets a line when a part ends, FOLDER/log.txt what it printed. A part that fails or hangs is kept,
and the next one starts. When the minutes are used up, the rest is written down as not run.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from rlnb import machine
from tests.gpu import parts  # both of the standard library alone at their top, as this file

ROOT = Path(__file__).resolve().parents[2]
LEAST = 15  # seconds: with less left no part is started
OUTCOMES = {0: "passed", 77: "skipped"}  # by exit status
FIGURES = "figures: "  # what the line with a part's figures, in JSON, begins with


class Part(NamedTuple):
    """python -m words. limit: seconds on a device; five times as much in a dry run, on a CPU that others may use."""

    name: str
    limit: int
    words: Sequence[str]


PARTS = (
    Part("doctor", 90, ("rlnb", "doctor")),
    *(Part(name, limit, ("tests.gpu.parts", name)) for name, (limit, _) in parts.PARTS.items()),
    *(Part(name, 120, ("rlnb", "run", name, "--out", "WORK/html")) for name in ("00_start", "08_grpo")),
)


def run(todo: Sequence[Part], out: Path, seconds: float, dry: bool = False) -> list[dict[str, Any]]:
    """Runs the parts one after the other and returns the lines that it has written to out/slot.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    where, rows, until = facts() | {"dry": dry}, [], time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="rlnb-slot-") as work:
        own = {"RLNB_PROFILE": "smoke", "RLNB_RUNS": f"{work}/runs", "HF_HUB_OFFLINE": "1", "SLOT_DRY": "1" * dry,
               "UNSLOTH_COMPILE_LOCATION": f"{work}/unsloth", "PYTHONUNBUFFERED": "1",
               "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}  # fmt: skip
        for part in todo:
            began, left = time.monotonic(), until - time.monotonic()
            row: dict[str, Any] = {"part": part.name, "outcome": "not run: the minutes are used up"}
            if left > LEAST:
                limit = min(part.limit * (5 if dry else 1), left)
                row |= _carry_out(part, limit, out / "log.txt", work, os.environ | own)
                row["seconds"] = round(time.monotonic() - began, 1)
            rows.append(where | {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"} | row)
            with (out / "slot.jsonl").open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(f"{part.name:20} {row.get('seconds', 0):6.1f} s  {row['outcome']}", flush=True)
    return rows


def _carry_out(part: Part, limit: float, log: Path, work: str, environment: dict[str, str]) -> dict[str, Any]:
    """How a part's process ended, and the figures that it printed."""
    command, late = [sys.executable, "-m", *(word.replace("WORK", work) for word in part.words)], ""
    with log.open("a+") as file:
        print(f"\n=== {part.name}", file=file, flush=True)
        start = file.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            late = f"stopped after {limit:.0f} s"
        finally:  # Ctrl-C too: whatever the part has started ends with it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        file.seek(start)
        lines = [line.rstrip() for line in file if line.strip()]
    found = next((line for line in reversed(lines) if line.startswith(FIGURES)), FIGURES + "{}")
    outcome = late or OUTCOMES.get(process.returncode, f"failed with {process.returncode}")
    last = f": {lines[-1][:300]}" if lines and outcome != "passed" else ""
    return {"outcome": outcome + last, "figures": json.loads(found.removeprefix(FIGURES))}


def facts() -> dict[str, Any]:
    """What every line says of where it comes from. The device is "cpu" where nvidia-smi shows none."""

    def says(*command: str) -> str:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            return subprocess.check_output(command, cwd=ROOT, stderr=subprocess.DEVNULL, text=True, timeout=30).strip()
        return ""

    card = says("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").partition("\n")[0]
    device, _, driver = card.partition(", ")
    commit = os.environ.get("SLOT_COMMIT") or says("git", "rev-parse", "--short", "HEAD")
    return {"device": device or "cpu", "driver": driver, "commit": commit, "versions": machine.versions()}


def main() -> int:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=28)
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--from", dest="first", choices=names, default=names[0], help="the part to begin with")
    given = parser.parse_args()
    if not given.dry and facts()["device"] == "cpu":
        parser.error("nvidia-smi shows no device here: take --dry")
    rows = run(PARTS[names.index(given.first) :], given.out.absolute(), 60 * given.minutes, given.dry)
    good = sum(row["outcome"].startswith(tuple(OUTCOMES.values())) for row in rows)
    print(f"{good} of {len(rows)} parts passed or had nothing to do: {given.out / 'slot.jsonl'}")
    return int(good < len(rows))


if __name__ == "__main__":
    sys.exit(main())
