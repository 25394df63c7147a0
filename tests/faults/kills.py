"""Trainings that are killed at random moments, and go on: python -m tests.faults.kills [--kills 50] [--jobs 2]

Each training is `python -m rlnb train` in a process of its own, on one thread, with a checkpoint a step. It is
killed (SIGKILL, SIGTERM or SIGINT) at a random moment, goes on with `--resume`, and is compared with the same
training that nobody killed: the weights of the adapter have to be equal to the bit. A kill before the first
checkpoint leaves nothing to go on from: that training begins again, and is counted apart. Exits with status 1
if a run is lost or differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("sft", "reward_model", "ppo", "rloo", "dpo", "kto", "orpo", "grpo")
STEPS = 8
SIGNALS = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGINT")


def command(method: str, resume: str | None = None) -> list[str]:
    own = ["--resume", resume] if resume else []
    if not resume:
        settings = (f"max_steps={STEPS}", "save_strategy=steps", "save_steps=1", "per_device_train_batch_size=16")
        own = [word for setting in settings for word in ("--set", setting)]
        own += [] if method in ("sft", "reward_model") else ["--from", "base"]
    return [sys.executable, "-m", "rlnb", "train", method, *own]


def start(folder: Path, *arguments: str | None) -> subprocess.Popen:
    own = {"RLNB_RUNS": str(folder), "RLNB_PROFILE": "smoke", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command(*arguments), cwd=ROOT, env=os.environ | own, **quiet)


def record(folder: Path) -> tuple[str, dict]:
    """Id and record of the newest run of a registry; ("", {}) without one."""
    files = sorted(folder.glob("[!.]*/run.json"))
    return (files[-1].parent.name, json.loads(files[-1].read_text())) if files else ("", {})


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, complete or not; 0 without one."""
    return max((int(place.name[11:]) for place in folder.glob("*/checkpoint-*")), default=0)


def whole(method: str) -> dict:
    """The weights of a training that nobody kills."""
    with tempfile.TemporaryDirectory() as folder:
        process = start(Path(folder), method)
        _, said = process.communicate()
        if process.returncode:
            sys.exit(f"{method} fails by itself:\n{said[-3000:]}")
        return load_file(Path(folder, record(Path(folder))[0], "adapter", "adapter_model.safetensors"))


def killed(method: str, expected: dict, seed: int) -> str:
    """Kills one training and lets it go on. "equal", "began again", or what is wrong."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder, process = Path(name), None
        process = start(folder, method)
        while not record(folder)[0] and process.poll() is None:  # its start is no training yet
            time.sleep(0.05)
        sent, step = rng.choice(SIGNALS), rng.randrange(STEPS)
        while newest(folder) < step and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))  # anywhere in the step, also while a checkpoint is written
        if process.poll() is None:
            process.send_signal(getattr(signal, sent))
        process.communicate()
        id, ended = record(folder)
        steps = [int(file.parent.name[11:]) for file in (folder / id).glob("checkpoint-*/trainer_state.json")]
        done = ended["status"] == "done"  # killed, if at all, after that
        if not done:
            process = start(folder, method, id if steps else None)
            _, said = process.communicate()
            if process.returncode:
                return f"lost after {sent} at step {max(steps, default=0)}: {said.strip()[-300:]}"
        found = load_file(folder / record(folder)[0] / "adapter" / "adapter_model.safetensors")
        equal = found.keys() == expected.keys() and all((found[n] == expected[n]).all() for n in found)
        what = "ended before" if done else f"went on from step {max(steps)}" if steps else "began again"
        return f"{what} after {sent}: {'equal' if equal else 'DIFFERS'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    options = parser.parse_args()
    with ThreadPoolExecutor(options.jobs) as pool:
        known = dict(zip(options.methods, pool.map(whole, options.methods), strict=True))
        tasks = [(method, known[method], seed) for seed in range(options.kills)
                 for method in [options.methods[seed % len(options.methods)]]]  # fmt: skip
        outcomes = []
        for task, outcome in zip(tasks, pool.map(lambda task: killed(*task), tasks), strict=True):
            outcomes.append(outcome)
            print(f"{task[0]:13} {outcome}", flush=True)
    bad = sum("lost" in outcome or "DIFFERS" in outcome for outcome in outcomes)
    went = sum("went on" in outcome for outcome in outcomes)
    again = sum("began again" in outcome for outcome in outcomes)
    print(f"{len(outcomes)} kills: {went} went on, {again} began again, {bad} lost or differ")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
