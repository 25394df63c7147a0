"""What a model can do on held-out problems, always with a 95 % interval."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np

from rlnb.measure.intervals import Difference, Estimate, Proportion
from rlnb.model import sampling
from rlnb.model.lora import check_positive_int
from rlnb.profiles import by
from rlnb.task import problems as task
from rlnb.task.problems import Problem


def held_out(split: str = "id", n: int | None = None) -> list[Problem]:
    """The first n problems of a test split: 500, or 16 in the smoke profile."""
    if n is not None:
        check_positive_int("n", n)
    return task.load(split)[: n or by(cpu=500, gpu=500, smoke=16)]


def max_new_tokens() -> int:
    """How many tokens an answer may have: 64 are enough for the practice model, a real one talks more."""
    return by(cpu=64, gpu=256, smoke=32)


@dataclass(frozen=True)
class Report:
    """A row per problem: its id, kind and steps, the completion and its length in tokens, and what the
    grader says of it (format, answer, correct, trace, strict).
    """

    rows: list[dict[str, Any]]

    strict = property(lambda self: self.share("strict"))
    correct = property(lambda self: self.share("correct"))
    format = property(lambda self: self.share("format"))
    mean_tokens = property(lambda self: fmean(row["tokens"] for row in self.rows))

    def share(self, what: str) -> Proportion:
        """The share of rows where `what` is true."""
        return Proportion(sum(row[what] for row in self.rows), len(self.rows))

    def by(self, field: str, what: str = "strict") -> dict[Any, Proportion]:
        """`share` for each value of a field, such as "kind" or "steps"."""
        values = sorted({row[field] for row in self.rows})
        return {v: Report([row for row in self.rows if row[field] == v]).share(what) for v in values}

    def summary(self) -> dict[str, Any]:
        """The figures as plain values, for a run's record; a proportion is {"k": ..., "n": ...}."""
        shares = {what: asdict(self.share(what)) for what in ("strict", "correct", "format")}
        return shares | {"mean_tokens": self.mean_tokens}

    def __str__(self) -> str:
        shares = f"strict {self.strict}, correct {self.correct}, format {self.format}"
        return f"{shares}; {len(self.rows)} problems, {self.mean_tokens:.1f} tokens each"


def accuracy(
    model: Any, tokenizer: Any, problems: Sequence[Problem], *, max_new_tokens: int | None = None,
    progress: str | bool | None = None,
) -> Report:
    """Grade the greedy completion of each problem. Raises ValueError without any problem."""
    found = _sample(model, tokenizer, problems, 1, max_new_tokens, temperature=0, progress=progress)
    rows = []
    for problem, (text,), (ids,) in zip(problems, found.texts, found.ids, strict=True):
        grade = task.grade(text, problem.question, problem.answer)
        rows.append({"id": problem.id, "kind": problem.kind, "steps": problem.steps, "completion": text,
                     "tokens": len(ids), **vars(grade)})  # fmt: skip
    return Report(rows)


def compare(before: Report, after: Report, what: str = "strict") -> Difference:
    """The difference in a share over the same problems, in whatever order they come.

    Raises ValueError if the reports are not of the same problems.
    """
    first = {row["id"]: row[what] for row in before.rows}
    second = {row["id"]: row[what] for row in after.rows}
    if first.keys() != second.keys():
        odd = ", ".join(sorted(first.keys() ^ second.keys())[:3])
        raise ValueError(f"{len(first)} and {len(second)} problems are not the same; in one report only: {odd}")
    gained = sum(second[i] and not first[i] for i in first)
    lost = sum(first[i] and not second[i] for i in first)
    return Difference(gained, lost, len(first))


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of them right, hold a right one: 1 - C(n-c, k) / C(n, k).

    Unbiased for pass@k when the n are independent (arXiv 2107.03374, eq. 1).
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"n={n}, c={c}, k={k}: need 0 <= c <= n and 1 <= k <= n")
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


@dataclass(frozen=True)
class Passes:
    """A row per problem: its id, kind and steps, n samples, and how many are strict and correct."""

    rows: list[dict[str, Any]]
    ks: tuple[int, ...]
    seed: int = 0

    strict = property(lambda self: self.at("strict"))
    correct = property(lambda self: self.at("correct"))

    def at(self, what: str, resamples: int = 2000) -> dict[int, Estimate]:
        """pass@k for each k, with the 95 % percentile bootstrap interval over problems.

        It says what other problems of this sort would give. One problem alone has no such spread.
        """
        n = len(self.rows)
        drawn = np.random.default_rng(self.seed).multinomial(n, [1 / n] * n, resamples)
        found = {}  # drawn, (resamples, problems): how often each problem is in the resample
        for k in self.ks:
            values = np.array([pass_at_k(row["n"], row[what], k) for row in self.rows])
            low, high = np.quantile(drawn @ values / n, [0.025, 0.975])
            found[k] = Estimate(float(values.mean()), float(low), float(high))
        return found

    def __str__(self) -> str:
        shown = {what: [f"pass@{k} {share}" for k, share in self.at(what).items()] for what in ("strict", "correct")}
        return "; ".join(f"{what}: {', '.join(shares)}" for what, shares in shown.items())


def passes(
    model: Any, tokenizer: Any, problems: Sequence[Problem], n: int = 32, ks: Iterable[int] = (1, 8, 32), *,
    max_new_tokens: int | None = None, **settings: Any,
) -> Passes:
    """Sample n completions of each problem and count the right ones, for pass@k with k <= n.

    settings: temperature, seed, batch_size and progress of ``sampling.sample``. Raises ValueError
    without any problem, and for a k that is not in 1..n.
    """
    ks = tuple(ks)
    for k in ks:
        pass_at_k(n, 0, k)
    found = _sample(model, tokenizer, problems, n, max_new_tokens, **settings)
    rows = []
    for problem, texts in zip(problems, found.texts, strict=True):
        grades = [task.grade(text, problem.question, problem.answer) for text in texts]
        counts = {what: sum(getattr(grade, what) for grade in grades) for what in ("strict", "correct")}
        rows.append({"id": problem.id, "kind": problem.kind, "steps": problem.steps, "n": n, **counts})
    return Passes(rows, ks, settings.get("seed", 0))


def _sample(model: Any, tokenizer: Any, problems: Sequence[Problem], n: int, limit: int | None, **settings) -> Any:
    if not len(problems):
        raise ValueError("there are no problems to evaluate on")
    prompts = [task.prompt(p) for p in problems]
    limit = max_new_tokens() if limit is None else limit
    return sampling.sample(model, tokenizer, prompts, n, max_new_tokens=limit, **settings)
