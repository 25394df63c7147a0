"""All methods on one model, one task and one held-out measure. Notebook 09 shows what comes out.

    python -m rlnb compare                 # five seeds; about an hour and a half on two cores
    python -m rlnb compare --resume        # go on after an interruption
    python -m rlnb compare --only DPO KTO --seeds 3

One row per run in data/results/methods.csv: strict accuracy of greedy answers on each split, length of
the answers, KL from the SFT model of the same seed, and what it cost. Every run has a process of its
own, so that its peak of memory is its own.
"""

import argparse
import csv
import io
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rlnb import evaluate, files, models, problems, recipes, reward_models, runs, sampling, training

OUT = problems.DATA.parent / "results" / "methods.csv"
SPLITS = {"id": 500, "templates": 250, "larger": 250, "deeper": 250, "rule": 250}  # problems of each
BEST_OF = 8
# Student's t, two-sided 95 %, by the number of values.
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


@dataclass(frozen=True)
class Arm:
    """A way to teach the model. needs: what somebody has to have made before. train: its run of a
    seed; None where nothing is trained (best of n).
    """

    needs: str
    train: Callable[[int], runs.Run] | None = None
    judged: bool = False  # by the reward model, whose labels it uses


def _from_sft(method: str) -> Callable[[int], runs.Run]:
    return lambda seed: training.METHODS[method](seed, start=training.find_or_train_sft(seed))


ARMS = {
    "SFT": Arm("worked examples", training.find_or_train_sft),
    f"SFT, best of {BEST_OF}": Arm("a reward model, at every answer", judged=True),
    "SFT, PPO": Arm("a reward model", _from_sft("ppo"), judged=True),
    "SFT, RLOO": Arm("a reward model", _from_sft("rloo"), judged=True),
    "SFT, DPO": Arm("pairs of own answers", _from_sft("dpo")),
    "SFT, KTO": Arm("own answers, good or bad", _from_sft("kto")),
    "ORPO from base": Arm("pairs of answers", partial(training.orpo, start="base")),
    "SFT, GRPO": Arm("a checker", _from_sft("grpo")),
    "GRPO from base": Arm("a checker", partial(training.grpo, start="base")),
}


# --- one row -------------------------------------------------------------------------------------


def row(arm: str, seed: int, run: runs.Run | None = None) -> dict[str, Any]:
    """What one arm learnt with one seed. run: measure this one and train none."""
    run = run or (ARMS[arm].train(seed) if ARMS[arm].train else None)
    found: dict[str, Any] = {"arm": arm, "seed": seed, "labels": run.labels if run else 0}
    if ARMS[arm].judged:
        found["labels"] = len(training.gold_pairs(seed=seed, how="all"))
    sft = training.find_or_train_sft(seed)
    model, tokenizer = models.load_model(recipes.model_name(), lora=(run or sft).adapter)
    found |= policy_figures(model, tokenizer, sft) if run else best_of_figures(model, tokenizer, seed)
    seconds = run.train_seconds if run else 0.0
    memory = run.peak_gpu_memory_mb or run.peak_memory_mb if run else 0.0
    return found | {"train_seconds": round(seconds, 1), "peak_memory_mb": round(memory)}


def tests() -> list[tuple[str, problems.Problem]]:
    """Split and problem, in the order of SPLITS; fewer of them in the smoke profile."""
    most = recipes.recipe("sft").test_problems
    return [(split, p) for split, n in SPLITS.items() for p in problems.load(split)[: min(n, most)]]


def policy_figures(model: Any, tokenizer: Any, sft: runs.Run) -> dict[str, Any]:
    """Accuracy of greedy answers on each split, and how far the policy is from its SFT model."""
    asked, longest = tests(), recipes.recipe("sft").max_new_tokens
    report = evaluate.accuracy(
        model, tokenizer, [p for _, p in asked], system=recipes.system(), max_new_tokens=longest
    )
    strict = [one["strict"] for one in report.rows]
    found = counts([split for split, _ in asked], strict)
    found["tokens"] = round(fmean(r["tokens"] for (s, _), r in zip(asked, report.rows, strict=True)
                                  if s == "id"), 2)  # fmt: skip
    moved = moved_from(sft, model, tokenizer, [p for split, p in asked if split == "id"])
    return found | {"kl": round(moved.mean, 4), "kl_error": round(moved.error, 4)}


def moved_from(
    start: runs.Run, model: Any, tokenizer: Any, asked: Sequence[problems.Problem], seed: int = 0
) -> evaluate.KL:
    """How far the policy is from a run's, on samples for these problems."""
    reference, _ = models.load_model(recipes.model_name(), lora=start.adapter)
    prompts = [problems.prompt(p, recipes.system()) for p in asked]
    longest = recipes.recipe("sft").max_new_tokens
    return evaluate.kl(
        model, tokenizer, prompts, reference=reference, max_new_tokens=longest, seed=seed
    )


def best_of_figures(model: Any, tokenizer: Any, seed: int) -> dict[str, Any]:
    """The same of the sample that the reward model likes best. Its KL is an upper bound."""
    asked = tests()
    prompts = [problems.prompt(p, recipes.system()) for _, p in asked]
    drawn = sampling.sample(
        model, tokenizer, prompts, n=BEST_OF, seed=seed,
        max_new_tokens=recipes.recipe("sft").max_new_tokens,
    )  # fmt: skip
    judge, reader = reward_models.load(recipes.model_name(), training.judge(seed))
    texts = [
        [*prompt, {"role": "assistant", "content": text}]
        for prompt, group in zip(prompts, drawn.texts, strict=True) for text in group
    ]  # fmt: skip
    scores = iter(reward_models.score(judge, reader, texts))
    strict, tokens = [], []
    for (split, p), group, ids in zip(asked, drawn.texts, drawn.ids, strict=True):
        likes = [next(scores) for _ in group]
        best = likes.index(max(likes))
        strict.append(problems.grade(group[best], p.question, p.answer).strict)
        tokens += [len(ids[best])] if split == "id" else []
    found = counts([split for split, _ in asked], strict) | {"tokens": round(fmean(tokens), 2)}
    return found | {"kl": round(reward_models.best_of_n_kl(BEST_OF), 4), "kl_error": 0.0}


def counts(splits: Sequence[str], strict: Sequence[bool]) -> dict[str, int]:
    """How many of how many are right, for each split."""
    found = {}
    for split in SPLITS:
        mine = [right for s, right in zip(splits, strict, strict=True) if s == split]
        found |= {split: sum(mine), f"{split}_n": len(mine)}
    return found


# --- all rows ------------------------------------------------------------------------------------


def carry_out(seeds: int, arms: Iterable[str], out: Path = OUT, resume: bool = False) -> list[dict]:
    """A row for each arm and seed; ``out`` has every row as soon as it is there."""
    rows = read(out) if resume and out.is_file() else []
    there = {(r["arm"], r["seed"]) for r in rows}
    for seed in range(seeds):
        for arm in (arm for arm in arms if (arm, seed) not in there):
            rows.append(in_own_process(row, arm, seed))
            files.write(out, text(rows))
            print(f"seed {seed}  {arm:16} strict {100 * share(rows[-1]):.1f} %", flush=True)
    return rows


def in_own_process(measure: Callable[[str, int], Any], arm: str, seed: int) -> Any:
    """What `measure` returns in a new process, whose peak of memory is that of this run alone."""
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        return pool.submit(measure, arm, seed).result()


def text(rows: Sequence[dict]) -> str:
    """The rows as CSV."""
    found = io.StringIO()
    writer = csv.DictWriter(found, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return found.getvalue()


def read(path: Path = OUT) -> list[dict[str, Any]]:
    """The rows of a table, its numbers as numbers."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: _value(cell) for name, cell in r.items()} for r in csv.DictReader(file)]


def _value(cell: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell


# --- what the rows say ---------------------------------------------------------------------------


def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean and its 95 % interval (Student's t), which a single seed does not have.

    Raises KeyError for more than ten values.
    """
    middle = fmean(values)
    half = T_95[len(values)] * stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return middle, middle - half, middle + half


def share(row: dict, split: str = "id") -> float:
    return row[split] / row[f"{split}_n"]


def strict(rows: Sequence[dict], arm: str, split: str = "id") -> evaluate.Estimate:
    """Strict accuracy of an arm on a split."""
    mean, low, high = over_seeds([share(r, split) for r in rows if r["arm"] == arm])
    return evaluate.Estimate(mean, max(0.0, low), min(1.0, high))


@dataclass(frozen=True)
class Gain:
    """A difference in points, and what its interval allows to say."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if self.low == self.high:
            return "one seed"
        return "above" if self.low > 0 else "below" if self.high < 0 else "no difference shown"

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.mean:+.1f}"
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def gain(rows: Sequence[dict], arm: str, over: str = "SFT", split: str = "id") -> Gain:
    """How far an arm is above another one, seed by seed."""
    two = ({r["seed"]: share(r, split) for r in rows if r["arm"] == name} for name in (arm, over))
    mine, theirs = two
    both = sorted(mine.keys() & theirs.keys())
    return Gain(*over_seeds([100 * (mine[seed] - theirs[seed]) for seed in both]))


def table(rows: Sequence[dict]) -> str:
    """The table of the README: means over seeds with their intervals, the slowest run's seconds."""
    lines = ["| | strict, held out | gain over SFT | KL from SFT | labels | training | needs |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for arm in (arm for arm in ARMS if any(r["arm"] == arm for r in rows)):
        mine = [r for r in rows if r["arm"] == arm]
        above = "" if arm == "SFT" else gain(rows, arm)
        seconds = max(r["train_seconds"] for r in mine)
        moved = fmean(r["kl"] for r in mine)
        lines.append(
            f"| {arm} | {strict(rows, arm)} | {above} | {moved:.2f} | {mine[0]['labels']:,} "
            f"| {seconds:.0f} s | {ARMS[arm].needs} |"
        )
    return "\n".join(lines)


def main(arguments: argparse.Namespace) -> int:
    """python -m rlnb compare"""
    if unknown := [arm for arm in arguments.only or [] if arm not in ARMS]:
        raise SystemExit(f"no method {unknown[0]!r}; there are {', '.join(ARMS)}.")
    os.environ["RLNB_PROFILE"] = "cpu"
    rows = carry_out(arguments.seeds, arguments.only or ARMS, resume=arguments.resume)
    print(table(rows))
    return 0
