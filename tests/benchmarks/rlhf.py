"""RLHF over seeds: PPO and RLOO against the reward model that ships, accuracy along the way by KL.

    python -m tests.benchmarks.rlhf               # three seeds, on an idle machine
    python -m tests.benchmarks.rlhf --resume      # go on after an interruption

Writes one row per point of a run to data/results/rlhf.csv and prints tables. A run is measured at
its start, the SFT model of the same seed, and after every tenth step: greedy strict accuracy on the
held-out problems, and KL from the start in nats per sequence, on samples at temperature 1. "At
matched KL": both methods' accuracies are read off, on straight lines between the points, where the
one that moved less ended. Every run has a process of its own, so that its peak memory is its own.
"""

from functools import partial
from itertools import pairwise
from statistics import mean
from typing import Any

from rlnb import compare, evaluate, models, recipes, training
from tests.benchmarks import learning
from tests.benchmarks.learning import over_seeds

OUT = learning.RESULTS / "rlhf.csv"
ARMS = {"PPO": training.ppo, "RLOO": training.rloo}
EVERY = 10  # steps between two points


def run_rows(arm: str, seed: int) -> list[dict]:
    """One row per point, from the start on; the cost of the whole run in each."""
    models.backend()
    from transformers import TrainerCallback

    start = training.find_or_train_sft(seed)
    adapters = {0: start.adapter}

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step % EVERY == 0:
                folder = start.folder / f"{arm}-{state.global_step}"
                adapters[state.global_step] = models.save_adapter(rest["model"], folder)

    run = ARMS[arm](seed, start=start, callbacks=[Keep()])
    cost = {"train_seconds": round(run.train_seconds, 1), "peak_memory_mb": round(run.peak_memory_mb)}
    return [point(arm, seed, step, folder, start) | cost for step, folder in adapters.items()]


def point(arm: str, seed: int, step: int, adapter: Any, start: Any) -> dict:
    """Accuracy of one adapter on the held-out problems, and how far it is from the start."""
    recipe = recipes.recipe("ppo")
    model, tokenizer = models.load_model(recipes.model_name(), lora=adapter)
    held_out = training.held_out(recipe)
    asked = dict(system=recipes.system(), max_new_tokens=recipe.max_new_tokens, progress=False)
    strict = evaluate.accuracy(model, tokenizer, held_out, **asked).strict
    found = {"arm": arm, "seed": seed, "step": step, "strict": strict.k, "n": strict.n}
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
    """Means over seeds and their 95 % intervals (Student's t); the slowest and the largest run."""
    runs: dict[str, dict[int, list[dict]]] = {}
    for row in rows:
        runs.setdefault(row["arm"], {}).setdefault(row["seed"], []).append(row)
    seeds = sorted(set.intersection(*(set(of) for of in runs.values())))
    common = {seed: min(max(p["kl"] for p in of[seed]) for of in runs.values()) for seed in seeds}
    lines = ["| | strict before | strict after | gain in points | KL from SFT | at matched KL "
             "| training | memory |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    matched = {}
    for arm, of in runs.items():
        first, last = [[100 * of[s][end]["strict"] / of[s][end]["n"] for s in seeds] for end in (0, -1)]
        gain = over_seeds([b - a for a, b in zip(first, last, strict=True)], "{:+.1f}", "")
        moved = learning.ends([of[s][-1]["kl"] for s in seeds])
        matched[arm] = [at_kl(of[s], common[s]) for s in seeds]
        seconds, memory = (max(of[s][0][name] for s in seeds)
                           for name in ("train_seconds", "peak_memory_mb"))  # fmt: skip
        lines.append(f"| {arm} | {over_seeds(first)} | {over_seeds(last)} | {gain} | {moved} "
                     f"| {over_seeds(matched[arm])} | {seconds:.0f} s | {memory} MB |")  # fmt: skip
    if len(matched) == 2:
        (one, a), (other, b) = matched.items()
        apart = over_seeds([x - y for x, y in zip(a, b, strict=True)], "{:+.1f}", " points")
        lines += ["", f"At matched KL (mean {mean(common.values()):.2f} nats): {one} less {other} {apart}."]
    return "\n".join([*lines, "", along_the_way(runs)])


def along_the_way(runs: dict[str, dict[int, list[dict]]]) -> str:
    """Strict accuracy after each of the steps that were measured, mean over the seeds."""
    steps = [row["step"] for row in next(iter(next(iter(runs.values())).values()))]
    lines = ["| strict after steps | " + " | ".join(map(str, steps)) + " |",
             "|---" * (len(steps) + 1) + "|"]  # fmt: skip
    for arm, of in runs.items():
        shares = [mean(100 * points[i]["strict"] / points[i]["n"] for points in of.values())
                  for i in range(len(steps))]  # fmt: skip
        lines.append(f"| {arm} | " + " | ".join(f"{x:.1f} %" for x in shares) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables(learning.carry_out(__doc__, OUT, ARMS, partial(compare.in_own_process, run_rows))))
