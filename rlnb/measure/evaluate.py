"""What a model can do on held-out problems, always with an interval.

Proportions carry a Wilson interval, pass@k one from a bootstrap over problems, a paired comparison
that of Agresti and Min; all are 95 %.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np

from rlnb.measure.intervals import Difference, Estimate, Proportion, paired
from rlnb.model import sampling
from rlnb.profiles import by
from rlnb.task import problems as task
from rlnb.task.problems import Problem

STYLES = ("strict", "correct")  # format, answer and trace right; or the answer, in whatever style


def held_out(split: str = "id", n: int | None = None) -> list[Problem]:
    """The first n problems of a test split: 500, or 16 in the smoke profile."""
    return task.load(split)[: by(cpu=500, gpu=500, smoke=16) if n is None else n]


def max_new_tokens() -> int:
    """How many tokens an answer may have: 64 are enough for the practice model's, a real model talks more."""
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

    @property
    def mean_tokens(self) -> float:
        return fmean(row["tokens"] for row in self.rows)

    def share(self, what: str) -> Proportion:
        """The share of rows where `what` is true."""
        return Proportion(sum(row[what] for row in self.rows), len(self.rows))

    def by(self, field: str, what: str = "strict") -> dict[Any, Proportion]:
        """`share` for each value of a field, such as "kind" or "steps"."""
        return {value: Report(rows).share(what) for value, rows in _groups(self.rows, field)}

    def summary(self) -> dict[str, Any]:
        """The figures as plain values, for a run's record; a proportion is {"k": ..., "n": ...}."""
        shares = {what: asdict(self.share(what)) for what in ("strict", "correct", "format")}
        return shares | {"mean_tokens": self.mean_tokens}

    def __str__(self) -> str:
        return (
            f"strict {self.strict}, correct {self.correct}, format {self.format}; "
            f"{len(self.rows)} problems, {self.mean_tokens:.1f} tokens each"
        )


def accuracy(
    model: Any, tokenizer: Any, problems: Sequence[Problem], *, max_new_tokens: int | None = None,
    batch_size: int = 256, progress: str | bool | None = None,
) -> Report:
    """Grade the greedy completion of each problem. Raises ValueError without any problem."""
    found = _sample(
        model, tokenizer, problems, temperature=0, max_new_tokens=max_new_tokens, batch_size=batch_size,
        progress=progress,
    )
    rows = []
    for problem, (text,), (ids,) in zip(problems, found.texts, found.ids, strict=True):
        grade = task.grade(text, problem.question, problem.answer)
        rows.append(_head(problem) | {"completion": text, "tokens": len(ids), **vars(grade)})
    return Report(rows)


def compare(before: Report, after: Report, what: str = "strict") -> Difference:
    """The difference in a share over the same problems, in whatever order they come (``paired``).

    Raises ValueError if the reports are not of the same problems.
    """
    first = {row["id"]: row[what] for row in before.rows}
    second = {row["id"]: row[what] for row in after.rows}
    if first.keys() != second.keys() or not len(first) == len(before.rows) == len(after.rows):
        odd = sorted(first.keys() ^ second.keys())
        raise ValueError(
            f"the reports must have the same problems, each once; they have {len(before.rows)} and "
            f"{len(after.rows)}, and in one only are: {', '.join(odd[:3]) or 'none'}"
        )
    gained = sum(second[i] and not first[i] for i in first)
    lost = sum(first[i] and not second[i] for i in first)
    return paired(gained, lost, len(first))


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

    def at(self, style: str = "strict", resamples: int = 2000) -> dict[int, Estimate]:
        """pass@k for each k, with the 95 % percentile bootstrap interval over problems.

        It says what other problems of this sort would give. One problem alone has no such spread.
        """
        if style not in STYLES:
            raise ValueError(f"style {style!r} is none of {', '.join(STYLES)}")
        n = len(self.rows)
        drawn = np.random.default_rng(self.seed).multinomial(n, [1 / n] * n, resamples)
        found = {}  # drawn, (resamples, problems): how often each problem is in the resample
        for k in self.ks:
            values = np.array([pass_at_k(row["n"], row[style], k) for row in self.rows])
            low, high = np.quantile(drawn @ values / n, [0.025, 0.975])
            found[k] = Estimate(float(values.mean()), float(low), float(high))
        return found

    def by(self, field: str, style: str = "strict") -> dict[Any, dict[int, Estimate]]:
        """`at` for each value of a field, such as "kind" or "steps"."""
        return {v: Passes(rows, self.ks, self.seed).at(style) for v, rows in _groups(self.rows, field)}

    def summary(self) -> dict[str, Any]:
        """Both styles as plain values, for a run's record."""
        return {f"pass_{style}": {str(k): asdict(value) for k, value in self.at(style).items()}
                for style in STYLES}  # fmt: skip

    def __str__(self) -> str:
        return "; ".join(
            f"{style}: " + ", ".join(f"pass@{k} {value}" for k, value in self.at(style).items())
            for style in STYLES
        )


def passes(
    model: Any, tokenizer: Any, problems: Sequence[Problem], n: int = 32, ks: Iterable[int] = (1, 8, 32), *,
    max_new_tokens: int | None = None, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0,
    batch_size: int = 256, progress: str | bool | None = None,
) -> Passes:
    """Sample n completions of each problem and count the right ones, for pass@k with k <= n.

    Raises ValueError without any problem, and for a k that is not in 1..n.
    """
    ks = tuple(ks)
    for k in ks:
        pass_at_k(n, 0, k)
    found = _sample(
        model, tokenizer, problems, n, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
        seed=seed, batch_size=batch_size, progress=progress,
    )
    rows = []
    for problem, texts in zip(problems, found.texts, strict=True):
        grades = [task.grade(text, problem.question, problem.answer) for text in texts]
        counts = {style: sum(getattr(grade, style) for grade in grades) for style in STYLES}
        rows.append(_head(problem) | {"n": n} | counts)
    return Passes(rows, ks, seed)


def _sample(model: Any, tokenizer: Any, problems: Sequence[Problem], n: int = 1, **options: Any) -> Any:
    if not len(problems):
        raise ValueError("there are no problems to evaluate on")
    if options["max_new_tokens"] is None:
        options["max_new_tokens"] = max_new_tokens()
    return sampling.sample(model, tokenizer, [task.prompt(p) for p in problems], n, **options)


def _head(problem: Problem) -> dict[str, Any]:
    return {"id": problem.id, "kind": problem.kind, "steps": problem.steps}


def _groups(rows: Sequence[dict[str, Any]], field: str) -> Iterable[tuple[Any, list[dict]]]:
    for value in sorted({row[field] for row in rows}):
        yield value, [row for row in rows if row[field] == value]
