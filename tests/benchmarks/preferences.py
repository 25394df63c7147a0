"""What the preference methods learn over seeds, and what it costs.

    python -m tests.benchmarks.preferences               # three seeds, on an idle machine
    python -m tests.benchmarks.preferences --resume      # go on after an interruption

Writes one row per run to data/results/preferences.csv and prints tables. Every run has a process of
its own, so that its peak memory is not that of the run before; the SFT adapter that DPO and KTO
start from is that of the same seed. KL is from this SFT model, in nats per sequence, on samples for
the held-out problems.
"""

from functools import partial

from rlnb import compare, datasets, evaluate, models, problems, recipes, reward_models, runs, training
from tests.benchmarks import learning
from tests.benchmarks.learning import over_seeds

OUT = learning.RESULTS / "preferences.csv"
COLUMNS = ("arm", "seed", "labels", "before", "strict", "n", "kl", "kl_error", "pairs_right",
           "pairs", "auc", "train_seconds", "peak_memory_mb")  # fmt: skip


def sft_on_the_chosen(seed: int) -> runs.Run:
    """SFT on the chosen sides of the pairs that ORPO gets, as many steps from the base."""
    recipe = recipes.recipe("orpo")
    pairs = training.gold_pairs(seed=seed)
    pairs = datasets.subset(pairs, min(recipe.pairs, len(pairs)), seed)
    return training.sft(
        seed, recipes.recipe("sft", steps=recipe.steps, demonstrations=len(pairs)),
        data=pairs.remove_columns("rejected").rename_column("chosen", "completion"),
    )  # fmt: skip


ARMS = {
    "SFT": training.find_or_train_sft,  # the one that the others start from
    "reward model": training.reward_model,
    "DPO": training.dpo,
    "KTO": training.kto,
    "ORPO from base": training.orpo,
    "SFT on the chosen": sft_on_the_chosen,
}


def run_row(arm: str, seed: int) -> dict:
    run = ARMS[arm](seed)
    found = {"arm": arm, "seed": seed, "labels": run.labels,
             "train_seconds": round(run.train_seconds, 1),
             "peak_memory_mb": round(run.peak_memory_mb)}  # fmt: skip
    figures = reward_figures if run.method == "reward_model" else policy_figures
    found |= figures(run, seed)
    return {name: found.get(name, "") for name in COLUMNS}


def reward_figures(run: runs.Run, seed: int) -> dict:
    """How it orders held-out pairs, and how far it tells right answers from wrong ones."""
    model, tokenizer = reward_models.load(recipes.model_name(), run.adapter)
    rows = training.responses(seed, held_out=True)
    answers = [(row, text) for row in rows for text in row["responses"]]
    texts = [row["prompt"] + [{"role": "assistant", "content": text}] for row, text in answers]
    sides = {True: [], False: []}
    for (row, text), score in zip(
        answers, reward_models.score(model, tokenizer, texts), strict=True
    ):
        sides[problems.grade(text, row["question"], row["answer"]).strict].append(score)
    accuracy = run.result["pair_accuracy"]
    return {"pairs_right": accuracy["k"], "pairs": accuracy["n"],
            "auc": round(reward_models.auc(sides[True], sides[False]), 4)}  # fmt: skip


def policy_figures(run: runs.Run, seed: int) -> dict:
    """Strict accuracy of where it started and of what it became, and how far that is from SFT."""
    sft, recipe = training.find_or_train_sft(seed), recipes.recipe("sft")
    model, tokenizer = models.load_model(recipes.model_name(), lora=run.adapter)
    held_out, after = training.held_out(recipe), run.result["strict"]
    asked = dict(system=recipes.system(), max_new_tokens=recipe.max_new_tokens)
    if run.parent:
        before = sft.result["strict"]["k"]
    else:
        with model.disable_adapter():
            before = evaluate.accuracy(model, tokenizer, held_out, **asked).strict.k
    moved = compare.moved_from(sft, model, tokenizer, held_out, seed)
    return {"before": before, "strict": after["k"], "n": after["n"], "kl": round(moved.mean, 3),
            "kl_error": round(moved.error, 3)}  # fmt: skip


def tables(rows: list[dict]) -> str:
    """Means over seeds and their 95 % intervals (Student's t); the slowest and the largest run."""
    lines = ["| | strict before | strict after | gain in points | KL from SFT | labels | training "
             "| memory |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    judges = ["| | held-out pairs in order | AUC | labels | training | memory |",
              "|---|---|---|---|---|---|"]  # fmt: skip
    for arm in dict.fromkeys(r["arm"] for r in rows):
        mine = [r for r in rows if r["arm"] == arm]
        seconds, memory = (max(r[name] for r in mine) for name in COLUMNS[-2:])
        cost = f"{mine[0]['labels']} | {seconds:.0f} s | {memory} MB |"
        if mine[0]["auc"] != "":
            right = over_seeds([100 * r["pairs_right"] / r["pairs"] for r in mine])
            auc = over_seeds([r["auc"] for r in mine], "{:.3f}", "")
            judges.append(f"| {arm} | {right} | {auc} | {cost}")
            continue
        before, after = ([100 * r[name] / r["n"] for r in mine] for name in ("before", "strict"))
        gain = over_seeds([b - a for a, b in zip(before, after, strict=True)], "{:+.1f}", "")
        moved = learning.ends([r["kl"] for r in mine])
        lines.append(
            f"| {arm} | {over_seeds(before)} | {over_seeds(after)} | {gain} | {moved} | {cost}"
        )
    return "\n".join([*lines, "", *judges])


if __name__ == "__main__":
    print(tables(learning.carry_out(__doc__, OUT, ARMS, partial(compare.in_own_process, run_row))))
