"""What a model can do on held-out problems, always with an interval.

Proportions carry a Wilson interval, pass@k one from a bootstrap over problems, a paired comparison
that of Agresti and Min; all are 95 % unless asked for otherwise.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean
from typing import Any

from rlnb.task import problems as task
from rlnb.model import sampling
from rlnb.measure.kl import KL, kl
from rlnb.task.problems import Problem

__all__ = [
    "KL",
    "Difference",
    "Estimate",
    "Passes",
    "Proportion",
    "Report",
    "accuracy",
    "compare",
    "kl",
    "pass_at_k",
    "passes",
    "wilson",
]
STYLES = ("strict", "correct")  # format, answer and trace right; or the answer, in whatever style


# --- intervals -----------------------------------------------------------------------------------


def wilson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of k successes in n trials (Wilson 1927, JASA 22, p. 209)."""
    if not 0 <= k <= n or n < 1:
        raise ValueError(f"{k} successes in {n} trials: need 0 <= k <= n and n >= 1")
    z = _z(level)
    middle = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    # At the ends the bound is exact, and rounding must not move it past 0 or 1.
    return 0.0 if k == 0 else middle - half, 1.0 if k == n else middle + half


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of them right, hold a right one: 1 - C(n-c, k) / C(n, k).

    Unbiased for pass@k when the n are independent (arXiv 2107.03374, eq. 1).
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"n={n}, c={c}, k={k}: need 0 <= c <= n and 1 <= k <= n")
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


@dataclass(frozen=True)
class Estimate:
    """A value between 0 and 1 and its interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return _percent(self.mean, self.low, self.high)


@dataclass(frozen=True)
class Proportion:
    """k of n, with the Wilson 95 % interval."""

    k: int
    n: int

    def __post_init__(self) -> None:
        wilson(self.k, self.n)  # raises for what is no proportion

    @property
    def mean(self) -> float:
        return self.k / self.n

    @property
    def low(self) -> float:
        return wilson(self.k, self.n)[0]

    @property
    def high(self) -> float:
        return wilson(self.k, self.n)[1]

    def __str__(self) -> str:
        return _percent(self.mean, self.low, self.high)


# --- accuracy ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """A row per problem: its id, kind and steps, the completion, what the grader says of it
    (format, correct, trace, strict), and its length in tokens.
    """

    rows: list[dict[str, Any]]

    @property
    def strict(self) -> Proportion:
        return self.share("strict")

    @property
    def correct(self) -> Proportion:
        return self.share("correct")

    @property
    def format(self) -> Proportion:
        return self.share("format")

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
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    system: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 256,
    progress: str | bool | None = None,
) -> Report:
    """Grade the greedy completion of each problem. Raises ValueError without any problem."""
    _check_problems(problems)
    found = sampling.sample(
        model, tokenizer, [task.prompt(p, system) for p in problems], temperature=0,
        max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress,
    )  # fmt: skip
    rows = []
    for problem, (text,), (ids,) in zip(problems, found.texts, found.ids, strict=True):
        grade = task.grade(text, problem.question, problem.answer)
        rows.append(
            {"id": problem.id, "kind": problem.kind, "steps": problem.steps, "completion": text,
             "format": grade.format, "correct": grade.correct, "trace": grade.trace,
             "strict": grade.strict, "tokens": len(ids)}
        )  # fmt: skip
    return Report(rows)


@dataclass(frozen=True)
class Difference:
    """How much higher the second share is than the first, on the same problems."""

    mean: float
    low: float
    high: float
    gained: int  # problems that only the second solves
    lost: int  # problems that only the first solves
    n: int

    def __str__(self) -> str:
        points = (f"{100 * x:+.1f}" for x in (self.mean, self.low, self.high))
        text = "{} points [{}, {}]".format(*points)
        return f"{text}; {self.gained} gained, {self.lost} lost of {self.n}"


def compare(before: Report, after: Report, what: str = "strict", level: float = 0.95) -> Difference:
    """The difference in a share over the same problems, in whatever order they come.

    Problems that both solve or both miss say nothing on the difference; pairing leaves them out, so
    that the interval is narrower than from two separate proportions. It is the adjusted Wald
    interval of Agresti and Min (2005, Statistics in Medicine 24, p. 729): half an observation is
    added to each cell of the two-by-two table, so that it holds its level for small counts too.

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
    n = len(first)
    gained = sum(second[i] and not first[i] for i in first)
    lost = sum(first[i] and not second[i] for i in first)
    middle = (gained - lost) / (n + 2)
    half = _z(level) * math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / (n + 2)) / (n + 2)
    low, high = max(-1.0, middle - half), min(1.0, middle + half)
    return Difference((gained - lost) / n, low, high, gained, lost, n)


# --- pass@k --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passes:
    """A row per problem: its id, kind and steps, n samples, and how many are strict and correct."""

    rows: list[dict[str, Any]]
    ks: tuple[int, ...]
    seed: int = 0

    @property
    def strict(self) -> dict[int, Estimate]:
        return self.at("strict")

    @property
    def correct(self) -> dict[int, Estimate]:
        return self.at("correct")

    def at(self, style: str = "strict", resamples: int = 2000) -> dict[int, Estimate]:
        """pass@k for each k, with the 95 % percentile bootstrap interval over problems.

        It says what other problems of this sort would give. One problem alone has no such spread.
        """
        import numpy as np

        if style not in STYLES:
            raise ValueError(f"style {style!r} is none of {', '.join(STYLES)}")
        drawn = np.random.default_rng(self.seed).multinomial(
            len(self.rows), [1 / len(self.rows)] * len(self.rows), resamples
        )  # (resamples, problems): how often each problem is in the resample
        found = {}
        for k in self.ks:
            values = np.array([pass_at_k(row["n"], row[style], k) for row in self.rows])
            low, high = np.quantile(drawn @ values / len(values), [0.025, 0.975])
            found[k] = Estimate(float(values.mean()), float(low), float(high))
        return found

    def by(self, field: str, style: str = "strict") -> dict[Any, dict[int, Estimate]]:
        """`at` for each value of a field, such as "kind" or "steps"."""
        return {
            value: Passes(rows, self.ks, self.seed).at(style)
            for value, rows in _groups(self.rows, field)
        }

    def summary(self) -> dict[str, Any]:
        """Both styles as plain values, for a run's record."""
        return {
            f"pass_{style}": {str(k): asdict(value) for k, value in self.at(style).items()}
            for style in STYLES
        }

    def __str__(self) -> str:
        styles = (
            f"{style}: " + ", ".join(f"pass@{k} {value}" for k, value in self.at(style).items())
            for style in STYLES
        )
        return "; ".join(styles)


def passes(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    n: int = 32,
    ks: Iterable[int] = (1, 8, 32),
    *,
    system: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
    progress: str | bool | None = None,
) -> Passes:
    """Sample n completions of each problem and count the right ones, for pass@k with k <= n.

    Raises ValueError without any problem, and for a k that is not in 1..n.
    """
    _check_problems(problems)
    ks = tuple(ks)
    for k in ks:
        pass_at_k(n, 0, k)
    found = sampling.sample(
        model, tokenizer, [task.prompt(p, system) for p in problems], n, seed=seed, top_p=top_p,
        temperature=temperature, max_new_tokens=max_new_tokens, batch_size=batch_size,
        progress=progress,
    )  # fmt: skip
    rows = []
    for problem, texts in zip(problems, found.texts, strict=True):
        grades = [task.grade(text, problem.question, problem.answer) for text in texts]
        counts = {style: sum(getattr(grade, style) for grade in grades) for style in STYLES}
        row = {"id": problem.id, "kind": problem.kind, "steps": problem.steps, "n": n}
        rows.append(row | counts)
    return Passes(rows, ks, seed)


# --- helpers -------------------------------------------------------------------------------------


def _z(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"the level must be between 0 and 1, not {level}")
    return NormalDist().inv_cdf((1 + level) / 2)


def _percent(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _groups(rows: Sequence[dict[str, Any]], field: str) -> Iterable[tuple[Any, list[dict]]]:
    groups: dict[Any, list[dict]] = {}
    for row in rows:
        groups.setdefault(row[field], []).append(row)
    return sorted(groups.items())


def _check_problems(problems: Sequence[Problem]) -> None:
    if not len(problems):
        raise ValueError("there are no problems to evaluate on")
