"""The training panel, measured: python -m tests.benchmarks.panel [--methods sft dpo ...]

For each method, in a process of its own: how long a move of a slider takes, when the first point of the curve
comes after Run, and the seconds and the peak of memory that were predicted, from a first run of half the steps,
beside those of the run. Exits with status 1 if a move takes 50 ms, the first point 3 s, or a prediction is off
by more than a factor of 1.5. It wants an idle machine, and minutes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

LIMITS = {"move": 0.05, "first": 3.0, "seconds": 1.5, "memory": 1.5}


def measure(method: str) -> dict[str, float]:
    """One run through a panel; seconds and bytes."""
    import psutil

    from rlnb.model import memory
    from rlnb.profiles import has_cuda, model_name
    from rlnb.show import forecast
    from rlnb.show.panel import panel
    from rlnb.train import find_or_train_sft

    import torch

    find_or_train_sft(0)
    it = panel(method)
    it.set(max_steps=max(2, it.settings["max_steps"] // 2))
    it.run(wait=True)
    it.reset()
    moves = []
    for rank in (8, 32, 64, 16) * 3:
        began = time.perf_counter()
        it.set(rank=rank)
        moves.append(time.perf_counter() - began)
    it.reset()
    rows, new = it.settings["per_device_train_batch_size"], it.settings.get("max_completion_length")
    _, takes = forecast.training(method, model_name(), it.adapter.rank, rows, new)
    said = {"seconds": forecast.seconds(it.earlier, it.settings)[1], "memory": takes}
    held = torch.cuda.memory_allocated() if has_cuda() else psutil.Process().memory_info().rss
    began = time.perf_counter()
    it.run()
    while not it.rows and not it.ended.is_set():
        time.sleep(0.01)
    first = time.perf_counter() - began
    it.wait()
    peak = (it.runs[0].peak_gpu_memory_mb or it.runs[0].peak_memory_mb) * memory.MB
    was = {"seconds": it.runs[0].seconds, "memory": peak - held}
    return {"move": statistics.median(moves), "first": first, "said": said, "was": was}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="*", default=["sft", "dpo", "kto", "orpo", "grpo"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    bad = False
    print("          move  first      seconds              MB at the peak")
    print("            ms      s  said    was          said    was")
    with tempfile.TemporaryDirectory() as folder:
        for method in options.methods:
            command = [sys.executable, "-m", "tests.benchmarks.panel", "--one", method]
            environment = {**os.environ, "RLNB_RUNS": folder, "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            r = json.loads(done.stdout.splitlines()[-1])
            said, was = r["said"], r["was"]
            off = {name: said[name] / was[name] for name in said}
            found = {"move": r["move"], "first": r["first"]} | {k: max(v, 1 / v) for k, v in off.items()}
            bad |= any(found[name] > limit for name, limit in LIMITS.items())
            print(
                f"{method:8}{1000 * r['move']:6.0f}{r['first']:7.1f}{said['seconds']:6.0f}{was['seconds']:7.0f} "
                f"x{off['seconds']:.2f}{said['memory'] / 2**20:9.0f}{was['memory'] / 2**20:7.0f} x{off['memory']:.2f}",
                flush=True,
            )
    sys.exit(bad)


if __name__ == "__main__":
    main()
