"""All methods on one model, one task and one held-out measure: `python -m rlnb compare`, about an hour on two cores.

One row per run in data/results/methods.csv: strict accuracy of greedy answers on each split, length of
the answers, KL from the SFT model of the same seed, and what it cost. Every run has a process and a
core of its own: its memory is its own, and what it learns is not changed by how many cores add up.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rlnb import files
from rlnb.data import shapes
from rlnb.measure import evaluate
from rlnb.measure.intervals import Estimate, over_seeds
from rlnb.measure.judge import best_of_n_kl
from rlnb.measure.kl import KL, kl
from rlnb.model import LoRA, load_model, reward_model, sampling
from rlnb.profiles import PRACTICE, by, model_name
from rlnb.record import runs
from rlnb.show import plots
from rlnb.task import problems
from rlnb.task.problems import Problem
from rlnb.tools import experiments
from rlnb.train import methods
from rlnb.train.recipes import recipe

OUT = problems.DATA.parent / "results" / "methods.csv"
SPLITS = {"id": 500, "templates": 250, "larger": 250, "deeper": 250, "rule": 250}  # problems of each
BEST_OF = 8
Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """A way to teach the model. needs: what somebody has to have made before. train: its run of a
    seed; None where nothing is trained. recipe: the name of its settings, where they are the usual.
    """

    needs: str
    train: Callable[[int], runs.Run] | None = None
    recipe: str | None = None
    judged: bool = False  # by the reward model, whose labels it uses


def _usual(needs: str, name: str, start: str | None = None, judged: bool = False) -> Method:
    """As rlnb.train has it, after SFT or from the base."""
    method = name.removesuffix("_from_base")
    return Method(needs, lambda seed: methods.train(method, seed, start=start), name, judged)


def _sft_on_all(seed: int) -> runs.Run:
    """SFT on the problems that GRPO asks, solved, and on as many sequences as GRPO samples."""
    data = shapes.prompt_completion(problems.load("train"))
    return methods.train("sft", seed, data=data, max_steps=recipe("grpo")["max_steps"] * 64 // 16)


def _sft_on_chosen(seed: int) -> runs.Run:
    """SFT on the chosen sides of the pairs that ORPO gets, as many steps from the base."""
    pairs = methods.default_data("orpo", seed)
    chosen = pairs.remove_columns("rejected").rename_column("chosen", "completion")
    return methods.train("sft", seed, data=chosen, max_steps=recipe("orpo")["max_steps"])


BEST = f"SFT, best of {BEST_OF}"
METHODS = {
    "base": Method("nothing"),
    "SFT": Method("worked examples", methods.find_or_train_sft, "sft"),
    "SFT on all": Method("worked examples of everything", _sft_on_all),
    "SFT on chosen": Method("good answers", _sft_on_chosen),
    "ORPO from base": _usual("pairs of answers", "orpo"),
    "SFT, DPO": _usual("pairs of own answers", "dpo"),
    "SFT, KTO": _usual("own answers, good or bad", "kto"),
    BEST: Method("a reward model, at every answer", judged=True),
    "SFT, PPO": _usual("a reward model", "ppo", judged=True),
    "SFT, RLOO": _usual("a reward model", "rloo", judged=True),
    "SFT, GRPO": _usual("a checker", "grpo"),
    "GRPO from base": _usual("a checker", "grpo_from_base", start="base"),
}


def find(name: str, seed: int = 0) -> runs.Run | None:
    """The latest run of the registry that is this method's, with the usual settings and data, its adapter
    and its result; None if there is none, or the method has no settings of its own.
    """
    usual = METHODS[name].recipe
    if usual is None:
        return None
    starts = {run.id for run in methods.find_all("sft", seed)} if name.startswith("SFT, ") else {None}
    found = (run for run in methods.find_all(usual, seed) if run.parent in starts)
    return next((run for run in found if "strict" in run.result), None)


# --- one row -------------------------------------------------------------------------------------


def row(name: str, seed: int) -> dict[str, Any]:
    """What one method taught with one seed."""
    method = METHODS[name]
    run = method.train(seed) if method.train else None
    found: dict[str, Any] = {"method": name, "seed": seed, "labels": run.labels if run else 0}
    if method.judged:
        found["labels"] = len(methods.gold_pairs(seed=seed, how="all"))
    sft = methods.find_or_train_sft(seed)
    start = LoRA() if name == "base" else (run or sft).adapter  # a new one changes nothing
    model, tokenizer = load_model(model_name(), start)
    found |= _best_of(model, tokenizer, seed) if name == BEST else _policy(model, tokenizer, sft)
    memory = (run.peak_gpu_memory_mb or run.peak_memory_mb) if run else 0.0
    seconds = run.train_seconds if run else 0.0
    return found | {"train_seconds": round(seconds, 1), "peak_memory_mb": round(memory)}


def tests() -> list[tuple[str, Problem]]:
    """Split and problem, in the order of SPLITS; fewer of them in the smoke profile."""
    return [(split, p) for split, n in SPLITS.items() for p in problems.load(split)[: by(cpu=n, smoke=16)]]


def _policy(model: Any, tokenizer: Any, sft: runs.Run) -> dict[str, Any]:
    """Accuracy of greedy answers on each split, and how far the policy is from its SFT model."""
    splits, tasks = zip(*tests(), strict=True)
    rows = evaluate.accuracy(model, tokenizer, tasks).rows
    found = counts(splits, [one["strict"] for one in rows], [one["tokens"] for one in rows])
    moved = moved_from(sft, model, tokenizer, [p for split, p in tests() if split == "id"])
    return found | {"kl": round(moved.mean, 4), "kl_error": round(moved.error, 4)}


def moved_from(start: runs.Run, model: Any, tokenizer: Any, tasks: Sequence[Problem], seed: int = 0) -> KL:
    """How far the policy is from a run's, on samples for these problems."""
    reference, _ = load_model(model_name(), start.adapter)
    return kl(model, tokenizer, [problems.prompt(p) for p in tasks], reference=reference, seed=seed)


def _best_of(model: Any, tokenizer: Any, seed: int) -> dict[str, Any]:
    """The same of the sample that the reward model likes best. Its KL is an upper bound."""
    splits, tasks = zip(*tests(), strict=True)
    prompts = [problems.prompt(p) for p in tasks]
    drawn = sampling.sample(model, tokenizer, prompts, n=BEST_OF, seed=seed)
    answers = ([{"role": "assistant", "content": text}] for group in drawn.texts for text in group)
    texts = [prompt + next(answers) for prompt in prompts for _ in range(BEST_OF)]
    scores = reward_model.score(*reward_model.load(model_name(), methods.judge(seed)), texts)
    strict, tokens = [], []
    for i, (problem, group, ids) in enumerate(zip(tasks, drawn.texts, drawn.ids, strict=True)):
        likes = scores[BEST_OF * i :][:BEST_OF]
        best = likes.index(max(likes))
        strict.append(problems.grade(group[best], problem.question, problem.answer).strict)
        tokens.append(len(ids[best]))
    return counts(splits, strict, tokens) | {"kl": round(best_of_n_kl(BEST_OF), 4), "kl_error": 0.0}


def counts(splits: Sequence[str], strict: Sequence[bool], tokens: Sequence[int]) -> dict[str, Any]:
    """How many of how many are right, for each split, and the mean length of the answers to "id"."""
    found: dict[str, Any] = {}
    for split in SPLITS:
        mine = [right for s, right in zip(splits, strict, strict=True) if s == split]
        found |= {split: sum(mine), f"{split}_n": len(mine)}
    lengths = [n for s, n in zip(splits, tokens, strict=True) if s == "id"]
    return found | {"tokens": round(fmean(lengths), 2)}


# --- what the rows say ---------------------------------------------------------------------------


read = partial(experiments.read, OUT)  # the rows that ship


def shares(rows: Rows, name: str, split: str = "id") -> dict[int, float]:
    """Percent of a split that a method gets right, by seed."""
    return {r["seed"]: 100 * r[split] / r[f"{split}_n"] for r in rows if r["method"] == name}


def strict(rows: Rows, name: str, split: str = "id", widen: float = 1.0) -> Estimate:
    """Strict accuracy of a method on a split, as a share."""
    mean, low, _ = (x / 100 for x in over_seeds([*shares(rows, name, split).values()]))
    half = (mean - low) * widen
    return Estimate(mean, max(0.0, mean - half), min(1.0, mean + half))


def expected(rows: Rows, name: str, split: str = "id") -> Estimate:
    """Where one more seed falls, 95 times of 100: wider than the interval of the mean."""
    return strict(rows, name, split, widen=(len(shares(rows, name)) + 1) ** 0.5)


def points(rows: Rows, column: str) -> dict[str, tuple[float | None, Estimate]]:
    """Of each method but the base the median of a column, and strict accuracy in percent: for
    ``plots.frontier``. None for those that have 0 there where others have seconds or labels.
    """
    found = {}
    for name in (name for name in _names(rows) if name != "base"):
        x = _median(rows, name, column)
        found[name] = (x if x or column == "kl" else None, over_seeds([*shares(rows, name).values()]))
    return found


def _names(rows: Rows) -> list[str]:
    """The methods that have rows, in their order."""
    return [name for name in METHODS if shares(rows, name)]


def _median(rows: Rows, name: str, column: str) -> float:
    return median(r[column] for r in rows if r["method"] == name)


class Gain(Estimate):
    """A difference in points, and what its interval allows to say."""

    @property
    def verdict(self) -> str:
        if self.low == self.high:
            return "one seed"
        return "above" if self.low > 0 else "below" if self.high < 0 else "no difference shown"

    def __str__(self) -> str:
        ends = "" if self.low == self.high else f" [{self.low:+.1f}, {self.high:+.1f}]"
        return f"{self.mean:+.1f}{ends}"


def gain(rows: Rows, name: str, over: str = "SFT", split: str = "id") -> Gain:
    """How far a method is above another one, seed by seed."""
    mine, theirs = shares(rows, name, split), shares(rows, over, split)
    return Gain(*over_seeds([mine[seed] - theirs[seed] for seed in mine if seed in theirs]))


def table(rows: Rows) -> str:
    """The table of the README: means over seeds with their intervals, KL and seconds of the middle run."""
    lines = ["| | strict, held out | gain over SFT | KL from SFT | labels | training | needs |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name in _names(rows):
        above = "" if name == "SFT" else gain(rows, name)
        labels = next(r["labels"] for r in rows if r["method"] == name)
        moved, seconds = _median(rows, name, "kl"), _median(rows, name, "train_seconds")
        lines.append(f"| {name} | {strict(rows, name)} | {above} | {moved:.2f} | {labels:,} "
                     f"| {seconds:.0f} s | {METHODS[name].needs} |")  # fmt: skip
    return "\n".join(lines)


def by_split(rows: Rows) -> str:
    """A table of strict accuracy on each of the held-out sets, as mean and half of its interval."""
    lines = ["| | " + " | ".join(f"`{split}`" for split in SPLITS) + " |", "|---|" + "---|" * len(SPLITS)]
    for name in _names(rows):
        means = [over_seeds([*shares(rows, name, split).values()]) for split in SPLITS]
        lines.append(f"| {name} | " + " | ".join(f"{m.mean:.1f} ± {m.high - m.mean:.1f}" for m in means) + " |")
    return "\n".join(lines)


def draw(rows: Rows, file: Path) -> None:
    """The picture of the README."""
    labels = {"xlabel": "KL from the SFT model (nats per completion)",
              "ylabel": "strict accuracy on held-out problems (%)"}  # fmt: skip
    files.write(file, plots.frontier(points(rows, "kl"), **labels)._repr_png_(dpi=150))


def main(arguments: Any, rest: Sequence[str] = ()) -> int:
    """python -m rlnb compare. Of another model than the practice model the table goes to the registry."""
    if unknown := [name for name in arguments.only or [] if name not in METHODS]:
        raise ValueError(f"no method {unknown[0]!r}; there are {', '.join(map(repr, METHODS))}.")
    if bad := [f"{name} is {n}" for name, n in (("seeds", arguments.seeds), ("jobs", arguments.jobs)) if n < 1]:
        raise ValueError(f"{bad[0]}: it must be at least 1")
    os.environ["RLNB_PROFILE"] = "cpu"
    out = OUT if model_name() == PRACTICE else runs.root() / f"methods-{Path(model_name()).name}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    wanted, options = arguments.only or METHODS, {"resume": arguments.resume, "jobs": arguments.jobs}
    rows = experiments.run_grid(row, wanted, arguments.seeds, out, first="SFT", **options)
    draw(rows, out.with_suffix(".png"))
    print(f"{table(rows)}\n\n{by_split(rows)}")
    return 0
