"""All methods on one model, one task and one held-out measure. Notebook 09 shows what comes out.

    python -m rlnb compare                 # five seeds; about an hour on two cores
    python -m rlnb compare --resume        # go on after an interruption
    python -m rlnb compare --only "SFT, DPO" "SFT, KTO" --seeds 3

One row per run in data/results/methods.csv: strict accuracy of greedy answers on each split, length of
the answers, KL from the SFT model of the same seed, and what it cost. Every run has a process and a
core of its own: its memory is its own, and what it learns is not changed by how many cores add up.
"""

import argparse
import hashlib
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rlnb import files
from rlnb.tools import grid
from rlnb.show import plots
from rlnb.measure import evaluate
from rlnb.train import recipes
from rlnb.model import load as models
from rlnb.data import shapes as datasets
from rlnb.task import problems
from rlnb.record import runs
from rlnb.train import methods as training
from rlnb.model import reward_model as reward_models, sampling
from rlnb.tools.grid import over_seeds

OUT = problems.DATA.parent / "results" / "methods.csv"
SPLITS = {"id": 500, "templates": 250, "larger": 250, "deeper": 250, "rule": 250}  # problems of each
BEST_OF = 8


@dataclass(frozen=True)
class Arm:
    """A way to teach the model. needs: what somebody has to have made before. train: its run of a
    seed; None where nothing is trained. recipe: the name of its settings, where they are the usual.
    """

    needs: str
    train: Callable[[int], runs.Run] | None = None
    recipe: str | None = None
    judged: bool = False  # by the reward model, whose labels it uses


def _from_sft(method: str) -> Callable[[int], runs.Run]:
    return lambda seed: training.METHODS[method](seed, start=training.find_or_train_sft(seed))


def sft_on_all(seed: int) -> runs.Run:
    """SFT on the problems that GRPO asks, solved, and on as many sequences as GRPO samples."""
    grpo, tasks = recipes.recipe("grpo"), problems.load("train")
    steps = grpo.steps * grpo.batch // recipes.recipe("sft").batch
    return training.sft(
        seed, recipes.recipe("sft", steps=steps, demonstrations=len(tasks)),
        data=datasets.prompt_completion(tasks, recipes.system()),
    )  # fmt: skip


def sft_on_chosen(seed: int) -> runs.Run:
    """SFT on the chosen sides of the pairs that ORPO gets, as many steps from the base."""
    recipe = recipes.recipe("orpo")
    pairs = training._some(None, recipe, seed)
    return training.sft(
        seed, recipes.recipe("sft", steps=recipe.steps, demonstrations=len(pairs)),
        data=pairs.remove_columns("rejected").rename_column("chosen", "completion"),
    )  # fmt: skip


BEST = f"SFT, best of {BEST_OF}"
ARMS = {
    "base": Arm("nothing"),
    "SFT": Arm("worked examples", training.find_or_train_sft, "sft"),
    "SFT on all": Arm("worked examples of everything", sft_on_all),
    "SFT on chosen": Arm("good answers", sft_on_chosen),
    "ORPO from base": Arm("pairs of answers", partial(training.orpo, start="base"), "orpo"),
    "SFT, DPO": Arm("pairs of own answers", _from_sft("dpo"), "dpo"),
    "SFT, KTO": Arm("own answers, good or bad", _from_sft("kto"), "kto"),
    BEST: Arm("a reward model, at every answer", judged=True),
    "SFT, PPO": Arm("a reward model", _from_sft("ppo"), "ppo", judged=True),
    "SFT, RLOO": Arm("a reward model", _from_sft("rloo"), "rloo", judged=True),
    "SFT, GRPO": Arm("a checker", _from_sft("grpo"), "grpo"),
    "GRPO from base": Arm("a checker", partial(training.grpo, start="base"), "grpo_from_base"),
}


def made(arm: str, seed: int = 0) -> runs.Run | None:
    """The latest run of the registry that is this arm's, with the usual settings, its adapter and its
    result; None if there is none, or the arm has no settings of its own.
    """
    if not ARMS[arm].recipe:
        return None
    recipe, sft = recipes.recipe(ARMS[arm].recipe), runs.jsonable(recipes.recipe("sft"))
    for run in runs.find(
        method=recipe.method, model=recipes.model_name(), profile=recipes.profile(), seed=seed,
        status="done", config=recipe,
    ):  # fmt: skip
        start = next((r.config for r in runs.find(id=run.parent)), {}) if run.parent else None
        whole = run.adapter.is_dir() and "strict" in run.result
        if whole and start == (sft if arm.startswith("SFT, ") else None):
            return run
    return None


# --- one row -------------------------------------------------------------------------------------


def row(arm: str, seed: int, run: runs.Run | None = None) -> dict[str, Any]:
    """What one arm learnt with one seed. run: measure this one and train none."""
    run = run or (ARMS[arm].train(seed) if ARMS[arm].train else None)
    found: dict[str, Any] = {"arm": arm, "seed": seed, "labels": run.labels if run else 0}
    if ARMS[arm].judged:
        found["labels"] = len(training.gold_pairs(seed=seed, how="all"))
    sft = training.find_or_train_sft(seed)
    adapter = models.LoRA() if arm == "base" else (run or sft).adapter  # a new one changes nothing
    model, tokenizer = models.load_model(recipes.model_name(), lora=adapter)
    best = arm == BEST
    found |= best_of_figures(model, tokenizer, seed) if best else policy_figures(model, tokenizer, sft)
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


# --- what the rows say ---------------------------------------------------------------------------


def read(path: Path = OUT) -> list[dict[str, Any]]:
    """The rows that ship, or others."""
    return grid.read(path)


def _arms(rows: Sequence[dict]) -> list[str]:
    """Those that have rows, in their order."""
    return [arm for arm in ARMS if any(r["arm"] == arm for r in rows)]


def share(row: dict, split: str = "id") -> float:
    return row[split] / row[f"{split}_n"]


def strict(rows: Sequence[dict], arm: str, split: str = "id") -> evaluate.Estimate:
    """Strict accuracy of an arm on a split."""
    mean, low, high = over_seeds([share(r, split) for r in rows if r["arm"] == arm])
    return evaluate.Estimate(mean, max(0.0, low), min(1.0, high))


def expected(rows: Sequence[dict], arm: str, split: str = "id") -> evaluate.Estimate:
    """Where one more seed falls, 95 times of 100: wider than the interval of the mean."""
    shares = [share(r, split) for r in rows if r["arm"] == arm]
    mean, low, high = over_seeds(shares)
    wider = (len(shares) + 1) ** 0.5
    return evaluate.Estimate(
        mean, max(0.0, mean - (mean - low) * wider), min(1.0, mean + (high - mean) * wider)
    )


def points(rows: Sequence[dict], column: str) -> dict[str, tuple[float | None, evaluate.Estimate]]:
    """Of each arm but the base the median of a column, and strict accuracy in percent: for
    ``plots.frontier``. None for those that have 0 there where others have seconds or labels.
    """
    found = {}
    for arm in (arm for arm in _arms(rows) if arm != "base"):
        x = median(r[column] for r in rows if r["arm"] == arm)
        y = over_seeds([100 * share(r) for r in rows if r["arm"] == arm])
        found[arm] = (x if x or column == "kl" else None, evaluate.Estimate(*y))
    return found


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
    mine, theirs = (
        {r["seed"]: share(r, split) for r in rows if r["arm"] == name} for name in (arm, over)
    )
    both = sorted(mine.keys() & theirs.keys())
    return Gain(*over_seeds([100 * (mine[seed] - theirs[seed]) for seed in both]))


def table(rows: Sequence[dict]) -> str:
    """The table of the README: means over seeds with their intervals, KL and seconds of the middle run."""
    lines = ["| | strict, held out | gain over SFT | KL from SFT | labels | training | needs |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for arm in _arms(rows):
        mine = [r for r in rows if r["arm"] == arm]
        above = "" if arm == "SFT" else gain(rows, arm)
        seconds = median(r["train_seconds"] for r in mine)
        moved = median(r["kl"] for r in mine)  # one seed of five may go far away
        lines.append(
            f"| {arm} | {strict(rows, arm)} | {above} | {moved:.2f} | {mine[0]['labels']:,} "
            f"| {seconds:.0f} s | {ARMS[arm].needs} |"
        )
    return "\n".join(lines)


def by_split(rows: Sequence[dict]) -> str:
    """A table of strict accuracy on each of the held-out sets, as mean and half of its interval."""
    lines = ["| | " + " | ".join(f"`{split}`" for split in SPLITS) + " |", "|---|" + "---|" * len(SPLITS)]
    for arm in _arms(rows):
        means = [over_seeds([100 * share(r, s) for r in rows if r["arm"] == arm]) for s in SPLITS]
        cells = " | ".join(f"{mean:.1f} ± {high - mean:.1f}" for mean, _, high in means)
        lines.append(f"| {arm} | {cells} |")
    return "\n".join(lines)


def draw(rows: Sequence[dict], file: Path) -> None:
    """The picture of the README; it carries the digest of its rows, which a test compares."""
    figure = plots.frontier(
        points(rows, "kl"), xlabel="KL from the SFT model (nats per completion)",
        ylabel="strict accuracy on held-out problems (%)",
    )  # fmt: skip
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, bbox_inches="tight", metadata={"Comment": digest(rows)})
    files.write(file, picture.getvalue())


def digest(rows: Sequence[dict]) -> str:
    return hashlib.sha256(grid.text(rows).encode()).hexdigest()


def main(arguments: argparse.Namespace) -> int:
    """python -m rlnb compare"""
    if unknown := [arm for arm in arguments.only or [] if arm not in ARMS]:
        raise SystemExit(f"no method {unknown[0]!r}; there are {', '.join(map(repr, ARMS))}.")
    os.environ["RLNB_PROFILE"] = "cpu"
    rows = grid.carry_out(
        row, arguments.only or ARMS, arguments.seeds, OUT, resume=arguments.resume,
        jobs=arguments.jobs, first="SFT", say=lambda r: f"seed {r['seed']}, {r['arm']}, {strict([r], r['arm'])}",
    )  # fmt: skip
    draw(rows, OUT.with_suffix(".png"))
    print(f"{table(rows)}\n\n{by_split(rows)}")
    return 0
