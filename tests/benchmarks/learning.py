"""How much is learnt, how fast, over seeds: the figures that the README and the notebooks quote.

    python -m tests.benchmarks.learning               # three seeds, about 14 minutes on two cores
    python -m tests.benchmarks.learning --resume      # go on after an interruption

Writes one row per run to data/results/foundation.csv and prints the README's table.
"""

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean

from rlnb import compare, evaluate, files, models, recipes, runs, training

RESULTS = compare.OUT.parent
OUT = RESULTS / "foundation.csv"


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


def run_row(arm: str, seed: int) -> dict:
    run: runs.Run = ARMS[arm](seed)
    return row(arm, seed, run.train_seconds, run.result)


def table(rows: list[dict]) -> str:
    """The table of the README: mean over seeds and its 95 % interval (Student's t), slowest run."""
    rows = sorted(rows, key=lambda row: ["base", *ARMS].index(row["arm"]))
    lines = ["| | strict accuracy, held out | seeds | training |", "|---|---|---|---|"]
    for arm in dict.fromkeys(r["arm"] for r in rows):
        values = [100 * r["strict"] / r["n"] for r in rows if r["arm"] == arm]
        seconds = max(r["train_seconds"] for r in rows if r["arm"] == arm)
        lines.append(f"| {arm} | {over_seeds(values)} | {len(values)} | {seconds:.0f} s |")
    return "\n".join(lines)


def over_seeds(values: list[float], shown: str = "{:.1f}", unit: str = " %") -> str:
    """The mean, and for two seeds or more its 95 % interval (Student's t)."""
    middle, *ends = (shown.format(x) for x in compare.over_seeds(values))
    return middle + unit + (f" [{', '.join(ends)}]" if len(values) > 1 else "")


def ends(values: list[float]) -> str:
    """The mean, and the least and the largest value: for what is never negative."""
    return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def carry_out(
    doc: str, out: Path, arms: Iterable[str], measure: Callable[[str, int], dict | list[dict]],
    first: Callable[[], list[dict]] = list,
) -> list[dict]:  # fmt: skip
    """Measures each arm with each seed, in the cpu profile; ``out`` has every row as soon as it is
    there. measure: gives one row or several. first: rows that need no seed.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    arguments = parser.parse_args()
    os.environ["RLNB_PROFILE"] = "cpu"
    rows = compare.read(out) if arguments.resume and out.is_file() else []
    rows = rows or first()
    for seed in range(arguments.seeds):
        for arm in arms:
            if not any(r["arm"] == arm and r["seed"] == seed for r in rows):
                found = measure(arm, seed)
                rows += found if isinstance(found, list) else [found]
                files.write(out, compare.text(rows))
    return rows


ARMS = {
    "SFT": training.sft,
    "SFT, GRPO": lambda seed: training.grpo(seed, start=training.find_or_train_sft(seed)),
    "GRPO from base": lambda seed: training.grpo(seed, start="base"),
}


if __name__ == "__main__":
    print(table(carry_out(__doc__, OUT, ARMS, run_row, lambda: [base_row()])))
