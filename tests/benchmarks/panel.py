"""The training panel, measured: python -m tests.benchmarks.panel [--methods sft dpo ...]

For each method, in a process of its own: how long a move of a slider takes, when the first point of
the curve comes after Run, and the seconds and the peak of memory that were predicted, from a trial
of some steps alone, beside those of the run. Exits with status 1 if a move takes 50 ms, the first
point 3 s, the time is off by more than 30 % or the memory by more than 25 %. It wants an idle
machine, and minutes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

LIMITS = {"move": 0.05, "first": 3.0, "time": 0.30, "memory": 0.25}


def measure(method: str, **changes: float) -> dict[str, float]:
    """One run through a panel; seconds and MB."""
    from rlnb.show import forecast
    from rlnb.record import runs
    from rlnb.train import methods as training
    from rlnb.model import memory
    from rlnb.show.panel import Panel

    training.find_or_train_sft(0)
    for run in runs.find(method=method):  # what is predicted shall come from a trial alone
        runs.delete(run)
    panel = Panel(method)
    panel.set(**changes)
    moves = []
    for rank in (8, 32, 64, 16) * 3:
        began = time.perf_counter()
        panel.set(rank=rank)
        moves.append(time.perf_counter() - began)
    while forecast.forecast(panel.recipe).seconds is None or panel.trial.timer.is_alive():
        time.sleep(0.1)
    said = forecast.forecast(panel.recipe)
    began = time.perf_counter()
    panel.run()
    while not panel.rows and not panel.ended.is_set():
        time.sleep(0.01)
    first = time.perf_counter() - began
    panel.wait()
    run = panel.last
    return {
        "move": statistics.median(moves), "longest": max(moves), "first": first,
        "said_seconds": said.seconds, "seconds": run.seconds,
        "said_mb": said.peak / memory.MB, "mb": run.peak_gpu_memory_mb or run.peak_memory_mb,
        "training_mb": said.memory / memory.MB,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="*", default=["sft", "dpo", "kto", "orpo", "grpo"])
    parser.add_argument("--steps", type=int, help="default: the method's")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    changes = {"steps": options.steps} if options.steps else {}
    if options.one:
        print(json.dumps(measure(options.one, **changes)))
        return
    bad = False
    print("          move  first      seconds              MB at the peak")
    print("            ms      s  said    was          said    was")
    with tempfile.TemporaryDirectory() as folder:
        for method in options.methods:
            steps = ["--steps", str(options.steps)] if options.steps else []
            command = [sys.executable, "-m", "tests.benchmarks.panel", "--one", method, *steps]
            environment = {**os.environ, "RLNB_RUNS": folder, "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            r = json.loads(done.stdout.splitlines()[-1])
            off = {"time": r["said_seconds"] / r["seconds"], "memory": r["said_mb"] / r["mb"]}
            found = {"move": r["move"], "first": r["first"]} | {k: abs(v - 1) for k, v in off.items()}
            bad |= any(found[name] > limit for name, limit in LIMITS.items())
            print(
                f"{method:8}{1000 * r['move']:6.0f}{r['first']:7.1f}{r['said_seconds']:6.0f}"
                f"{r['seconds']:7.0f} x{off['time']:.2f}{r['said_mb']:9.0f}{r['mb']:7.0f} "
                f"x{off['memory']:.2f}",
                flush=True,
            )
    sys.exit(bad)


if __name__ == "__main__":
    main()
