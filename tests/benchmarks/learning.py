"""How much is learnt, how fast, over seeds: the figures that the README and the notebooks quote.

    python tests/benchmarks/learning.py            # three seeds, about 15 minutes on two cores
    python tests/benchmarks/learning.py --seeds 1

Writes one row per run to data/results/foundation.csv and prints means with intervals.
"""

import argparse
import csv
import os
from pathlib import Path
from statistics import mean, stdev

from rlnb import evaluate, models, recipes, runs, training

OUT = Path(__file__).parents[2] / "data" / "results" / "foundation.csv"
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 8: 2.36, 10: 2.26}  # Student's t, two-sided, n - 1


def base_row() -> dict:
    """The base model, before any training."""
    recipe = recipes.recipe("sft")
    model, tokenizer = models.load_model(recipes.model_name())
    report = evaluate.accuracy(
        model, tokenizer, training.held_out(recipe), system=recipes.system(),
        max_new_tokens=recipe.max_new_tokens,
    )  # fmt: skip
    return row("base", 0, 0.0, report.summary())


def row(arm: str, seed: int, seconds: float, result: dict) -> dict:
    found = result["strict"]
    return {"arm": arm, "seed": seed, "strict": found["k"], "n": found["n"],
            "correct": result["correct"]["k"], "train_seconds": round(seconds, 1)}  # fmt: skip


def run_row(arm: str, seed: int, run: runs.Run) -> dict:
    return row(arm, seed, run.train_seconds, run.result)


def summary(rows: list[dict]) -> None:
    for arm in dict.fromkeys(r["arm"] for r in rows):
        values = [100 * r["strict"] / r["n"] for r in rows if r["arm"] == arm]
        spread = (
            T_95.get(len(values), 0) * stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0
        )
        seconds = max(r["train_seconds"] for r in rows if r["arm"] == arm)
        print(f"{arm:16} strict {mean(values):5.1f} % +- {spread:4.1f} "
              f"({len(values)} seeds)  slowest run {seconds:.0f} s")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    os.environ["RLNB_PROFILE"] = "cpu"
    rows = [base_row()]
    for seed in seeds:
        sft = training.sft(seed)
        rows.append(run_row("SFT", seed, sft))
        rows.append(run_row("SFT, GRPO", seed, training.grpo(seed, start=sft)))
        rows.append(run_row("GRPO from base", seed, training.grpo(seed, start="base")))
        OUT.parent.mkdir(parents=True, exist_ok=True)
        with OUT.with_suffix(".tmp").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        OUT.with_suffix(".tmp").replace(OUT)
        summary(rows)


if __name__ == "__main__":
    main()
