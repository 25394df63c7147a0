"""How much is learnt, how fast, over seeds: the figures that the README and the notebooks quote.

    python -m tests.benchmarks.learning               # three seeds, about 14 minutes on two cores
    python -m tests.benchmarks.learning --resume      # go on after an interruption

Writes one row per run to data/results/foundation.csv and prints the README's table.
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


def table(rows: list[dict]) -> str:
    """The table of the README: mean over seeds and its 95 % interval (Student's t), slowest run."""
    rows = sorted(rows, key=lambda row: ["base", *ARMS].index(row["arm"]))
    lines = ["| | strict accuracy, held out | seeds | training |", "|---|---|---|---|"]
    for arm in dict.fromkeys(r["arm"] for r in rows):
        values = [100 * r["strict"] / r["n"] for r in rows if r["arm"] == arm]
        spread = ""
        if len(values) > 1:
            half = T_95[len(values)] * stdev(values) / len(values) ** 0.5
            spread = f" [{mean(values) - half:.1f}, {mean(values) + half:.1f}]"
        seconds = max(r["train_seconds"] for r in rows if r["arm"] == arm)
        lines.append(f"| {arm} | {mean(values):.1f} %{spread} | {len(values)} | {seconds:.0f} s |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    arguments = parser.parse_args()
    os.environ["RLNB_PROFILE"] = "cpu"
    rows = read() if arguments.resume and OUT.is_file() else []
    rows = rows or [base_row()]
    for seed in range(arguments.seeds):
        for arm, train in ARMS.items():
            if not any(r["arm"] == arm and r["seed"] == seed for r in rows):
                rows.append(run_row(arm, seed, train(seed)))
                write(rows)
    print(table(rows))


ARMS = {
    "SFT": training.sft,
    "SFT, GRPO": lambda seed: training.grpo(seed, start=training.find_or_train_sft(seed)),
    "GRPO from base": lambda seed: training.grpo(seed, start="base"),
}


def read() -> list[dict]:
    numbers = {"seed": int, "strict": int, "n": int, "correct": int, "train_seconds": float}
    with OUT.open(newline="", encoding="utf-8") as file:
        return [r | {k: to(r[k]) for k, to in numbers.items()} for r in csv.DictReader(file)]


def write(rows: list[dict]) -> None:
    OUT.parent.mkdir(parents=True, exist_ok=True)
    with OUT.with_suffix(".tmp").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    OUT.with_suffix(".tmp").replace(OUT)


if __name__ == "__main__":
    main()
