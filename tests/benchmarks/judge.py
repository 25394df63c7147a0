"""How well reward models judge, over seeds, and what they cost.

    python -m tests.benchmarks.judge               # three seeds
    python -m tests.benchmarks.judge --resume      # go on after an interruption

Writes one row per run to data/results/judge.csv and prints a table. Pairs are of held-out prompts,
compared by the checker. AUC: how often a right answer scores above a wrong one, whatever the prompt.
Every run has a process and a core of its own.
"""

from rlnb.measure.judge import auc
from rlnb.model import reward_model
from rlnb.profiles import model_name
from rlnb.task import problems
from rlnb.train import methods
from tests.benchmarks.over_seeds import RESULTS, figure, rows_over_seeds

OUT = RESULTS / "judge.csv"


def row(method: str, seed: int) -> dict:
    """Trains a reward model and has it judge the responses to held-out prompts."""
    run = methods.train("reward_model", seed)
    model, tokenizer = reward_model.load(model_name(), run.adapter)
    rows = methods.responses(seed, held_out=True)
    answers = [(row, text) for row in rows for text in row["responses"]]
    texts = [row["prompt"] + [{"role": "assistant", "content": text}] for row, text in answers]
    sides = {True: [], False: []}
    for (row, text), score in zip(answers, reward_model.score(model, tokenizer, texts), strict=True):
        sides[problems.grade(text, row["question"], row["answer"]).strict].append(score)
    accuracy = run.result["pair_accuracy"]
    return {"method": method, "seed": seed, "labels": run.labels, "pairs_right": accuracy["k"],
            "pairs": accuracy["n"], "auc": round(auc(sides[True], sides[False]), 4),
            "train_seconds": round(run.train_seconds, 1),
            "peak_memory_mb": round(run.peak_memory_mb)}  # fmt: skip


def tables(rows: list[dict]) -> str:
    """Means over seeds and their 95 % intervals (Student's t); the slowest and the largest run."""
    right = figure([100 * r["pairs_right"] / r["pairs"] for r in rows])
    area = figure([r["auc"] for r in rows], "{:.3f}", "")
    seconds, memory = (max(r[name] for r in rows) for name in ("train_seconds", "peak_memory_mb"))
    cost = f"{rows[0]['labels']:,} | {seconds:.0f} s | {memory:,} MB"
    return (
        "| | held-out pairs in order | AUC | labels | training | memory |\n|---|---|---|---|---|---|\n"
        f"| reward model | {right} | {area} | {cost} |"
    )


if __name__ == "__main__":
    print(tables(rows_over_seeds(__doc__, OUT, ["reward model"], row)))
