"""RLHF over seeds: PPO and RLOO against the reward model that ships, accuracy along the way by KL.

    python -m tests.benchmarks.rlhf               # three seeds
    python -m tests.benchmarks.rlhf --resume      # go on after an interruption

Writes one row per point of a run to data/results/rlhf.csv and prints tables. A run is measured at
its start, the SFT model of the same seed, and after every tenth step: greedy strict accuracy on the
held-out problems, and KL from the start in nats per sequence, on samples at temperature 1. "At
matched KL": both methods' accuracies are read off, on straight lines between the points, where the
one that moved less ended. Every run has a process and a core of its own.
"""

from itertools import pairwise
from statistics import mean
from typing import Any

from rlnb.model import load_model, save_adapter  # isort: skip
from transformers import TrainerCallback

from rlnb.measure import evaluate
from rlnb.profiles import model_name
from rlnb.tools import compare
from rlnb.train import methods
from tests.benchmarks.over_seeds import RESULTS, figure, rows_over_seeds

OUT = RESULTS / "rlhf.csv"
METHODS = {"PPO": "ppo", "RLOO": "rloo"}
EVERY = 10  # steps between two points


def run_rows(method: str, seed: int) -> list[dict]:
    """One row per point, from the start on."""
    start = methods.find_or_train_sft(seed)
    adapters = {0: start.adapter}

    class Save(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step % EVERY == 0:
                folder = start.folder / f"{method}-{state.global_step}"
                adapters[state.global_step] = save_adapter(rest["model"], folder)

    methods.train(METHODS[method], seed, start=start, callbacks=[Save()])
    return [point(method, seed, step, folder, start) for step, folder in adapters.items()]


def point(method: str, seed: int, step: int, adapter: Any, start: Any) -> dict:
    """Accuracy of one adapter on the held-out problems, and how far it is from the start."""
    model, tokenizer = load_model(model_name(), lora=adapter)
    held_out = evaluate.held_out()
    strict = evaluate.accuracy(model, tokenizer, held_out, progress=False).strict
    found = {"method": method, "seed": seed, "step": step, "strict": strict.k, "n": strict.n}
    if step == 0:
        return found | {"kl": 0.0, "kl_error": 0.0}
    moved = compare.moved_from(start, model, tokenizer, held_out, seed)
    return found | {"kl": round(moved.mean, 4), "kl_error": round(moved.error, 4)}


def at_kl(points: list[dict], kl: float) -> float:
    """Strict accuracy in percent at this KL, on straight lines between the points of one run."""
    points = sorted(points, key=lambda row: row["kl"])
    for low, high in pairwise(points):
        if low["kl"] <= kl <= high["kl"]:
            share = (kl - low["kl"]) / ((high["kl"] - low["kl"]) or 1)
            return 100 * (low["strict"] + share * (high["strict"] - low["strict"])) / low["n"]
    raise ValueError(f"KL {kl} is outside of what was measured, {points[0]['kl']} to {points[-1]['kl']}")


def tables(rows: list[dict]) -> str:
    """The difference at matched KL, and accuracy along the way."""
    runs: dict[str, dict[int, list[dict]]] = {}
    for row in rows:
        runs.setdefault(row["method"], {}).setdefault(row["seed"], []).append(row)
    seeds = sorted(set.intersection(*(set(of) for of in runs.values())))
    common = {seed: min(max(p["kl"] for p in of[seed]) for of in runs.values()) for seed in seeds}
    matched = {method: [at_kl(of[s], common[s]) for s in seeds] for method, of in runs.items()}
    lines = []
    if len(matched) == 2:
        (one, a), (other, b) = matched.items()
        gap = figure([x - y for x, y in zip(a, b, strict=True)], "{:+.1f}", " points")
        lines = [f"At matched KL (mean {mean(common.values()):.2f} nats): {one} less {other} {gap}.", ""]
    return "\n".join([*lines, along_the_way(runs)])


def along_the_way(runs: dict[str, dict[int, list[dict]]]) -> str:
    """Strict accuracy after each of the steps that were measured, mean over the seeds."""
    steps = [row["step"] for row in next(iter(next(iter(runs.values())).values()))]
    lines = ["| strict after steps | " + " | ".join(map(str, steps)) + " |",
             "|---" * (len(steps) + 1) + "|"]  # fmt: skip
    for method, of in runs.items():
        shares = [mean(100 * points[i]["strict"] / points[i]["n"] for points in of.values())
                  for i in range(len(steps))]  # fmt: skip
        lines.append(f"| {method} | " + " | ".join(f"{x:.1f} %" for x in shares) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables(rows_over_seeds(__doc__, OUT, list(METHODS), run_rows)))
