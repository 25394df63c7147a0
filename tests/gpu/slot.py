"""One command for half an hour of a GPU: runs the parts in order, each in its own process with its own limit.

    python -m tests.gpu.slot --out FOLDER                     # needs CUDA
    python -m tests.gpu.slot --out FOLDER --dry               # the same parts, tiny, on a CPU
    python -m tests.gpu.slot --out FOLDER --from sft --minutes 9

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

from tests.gpu import parts  # of the standard library alone at its top, as this file

ROOT = Path(__file__).resolve().parents[2]
LEAST = 15  # seconds: with less left no part is started
SKIPPED = 77  # a part's exit status where it has nothing to do on this machine
FIGURES = "figures: "  # what the line with a part's figures, in JSON, begins with


class Part(NamedTuple):
    """A process. limit: seconds on a device; five times as much in a dry run, on a CPU that others may use."""

    name: str
    limit: int
    command: Sequence[str]


def _module(name: str, limit: int, *words: str) -> Part:
    return Part(name, limit, (sys.executable, "-m", *words))


RESUME = ("pytest", "-q", "tests/train/test_resume.py", "-k", "broken_run and (sft or dpo or grpo)")
PARTS = (
    _module("doctor", 90, "rlnb", "doctor"),
    *(_module(name, limit, "tests.gpu.parts", name) for name, (limit, _) in parts.PARTS.items() if "speed" not in name),
    _module("resume", 120, *RESUME),
    *(_module(name, limit, "tests.gpu.parts", name) for name, (limit, _) in parts.PARTS.items() if "speed" in name),
    *(_module(name, 120, "rlnb", "run", name, "--profile", "smoke", "--out", "WORK/html")
      for name in ("00_start", "08_grpo")),
)  # fmt: skip


def run(todo: Sequence[Part], out: Path, seconds: float, dry: bool = False) -> list[dict[str, Any]]:
    """Runs the parts one after the other and returns the lines that it has written to out/slot.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    machine, rows, until = facts() | {"dry": dry}, [], time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="rlnb-slot-") as work:
        own = {"RLNB_PROFILE": "smoke", "RLNB_RUNS": f"{work}/runs", "HF_HUB_OFFLINE": "1", "SLOT_DRY": "1" * dry,
               "UNSLOTH_COMPILE_LOCATION": f"{work}/unsloth", "PYTHONUNBUFFERED": "1",
               "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}  # fmt: skip
        for part in todo:
            began, left = time.monotonic(), until - time.monotonic()
            row: dict[str, Any] = {"part": part.name, "outcome": "not run: the minutes are used up"}
            if left > LEAST or left > part.limit:
                limit = min(part.limit * (5 if dry else 1), left)
                row |= _carry_out(part, limit, out / "log.txt", work, os.environ | own)
                row["seconds"] = round(time.monotonic() - began, 1)
            rows.append(machine | {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"} | row)
            with (out / "slot.jsonl").open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(f"{part.name:20} {row.get('seconds', 0):6.1f} s  {row['outcome']}", flush=True)
    return rows


def _carry_out(part: Part, limit: float, log: Path, work: str, environment: dict[str, str]) -> dict[str, Any]:
    """How a part's process ended, and the figures that it printed."""
    with log.open("a+") as file:
        file.write(f"\n=== {part.name}\n")
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            [word.replace("WORK", work) for word in part.command], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        outcome = None
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit:.0f} s"
        finally:  # Ctrl-C too: what a part has started ends with it
            _end(process)
        file.seek(start)
        lines = [line.rstrip() for line in file if line.strip()]
    found = next((line for line in reversed(lines) if line.startswith(FIGURES)), FIGURES + "{}")
    last = lines[-1][:300] if lines else ""
    if outcome is None:
        ended = {0: "passed", SKIPPED: f"skipped: {last}"}
        outcome = ended.get(process.returncode, f"failed with {process.returncode}: {last}")
    return {"outcome": outcome, "figures": json.loads(found.removeprefix(FIGURES))}


def _end(process: subprocess.Popen) -> None:
    """End the process's whole group, which a part that has ended may still have children in."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def facts() -> dict[str, Any]:
    """What every line says of where it comes from."""
    from rlnb import machine  # light: it imports nothing but the standard library

    card = _says("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").split(", ")
    device, driver = card if len(card) == 2 else ("cpu", "none")
    commit = os.environ.get("SLOT_COMMIT") or _says("git", "rev-parse", "--short", "HEAD") or "unknown"
    return {"device": device, "driver": driver, "commit": commit, "versions": machine.versions()}


def _says(*command: str) -> str:
    """The first line that a command prints; "" where it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""


def main() -> int:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=28)
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--from", dest="first", choices=names, default=names[0], help="the part to begin with")
    options = parser.parse_args()
    if not options.dry and facts()["device"] == "cpu":
        parser.error("nvidia-smi shows no device here: take --dry")
    rows = run(PARTS[names.index(options.first) :], options.out.absolute(), 60 * options.minutes, options.dry)
    good = sum(row["outcome"].startswith(("passed", "skipped")) for row in rows)
    print(f"{good} of {len(rows)} parts passed or had nothing to do; see {options.out / 'slot.jsonl'}")
    return int(good < len(rows))


if __name__ == "__main__":
    sys.exit(main())
