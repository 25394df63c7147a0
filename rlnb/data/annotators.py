"""Annotators: who compares responses, each with a name and a policy.

    Verifier()  Noisy(rate=0.2)  LengthBiased()  Clarity(detail=0.8)

``preferences.annotate`` asks one about rows of responses.
"""

import math
import random
import re
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from rlnb.task import problems as task

Row = dict[str, Any]  # see rlnb.data.preferences
Comparison = tuple[int, int, int]

_EQUATION = re.compile(r"[0-9]+ ?[-+*/] ?[0-9]+ ?= ?[0-9]+")


class Annotator:
    """Who compares responses. One of your own needs a name and a ``score``, higher for better."""

    name: str

    def score(self, question: str, answer: int, response: str) -> float:
        raise NotImplementedError(f"{type(self).__name__} compares responses but has no scores")

    def scores(self, row: Row) -> list[float]:
        """The score of each response of a row."""
        return [self.score(row["question"], row["answer"], text) for text in row["responses"]]

    def judge(self, row: Row, rng: random.Random) -> tuple[list[Comparison], list[float] | None]:
        """Every pair of the row's responses compared, and the scores where there are any."""
        scores = self.scores(row)
        if any(score is None or math.isnan(score) for score in scores):
            raise ValueError(f"row {row['id']}: {self.name} scores {scores}, which has no order")
        places = combinations(range(len(scores)), 2)
        return [(i, j, (scores[i] > scores[j]) - (scores[i] < scores[j])) for i, j in places], scores


@dataclass(frozen=True)
class Verifier(Annotator):
    """1 for a strictly right response (format, answer and trace), else 0."""

    name: str = "gold"

    def score(self, question: str, answer: int, response: str) -> float:
        return float(task.grade(response, question, answer).strict)


@dataclass(frozen=True)
class Noisy(Annotator):
    """Compares as another annotator does and turns each verdict but ties round with probability ``rate``."""

    rate: float = 0.2
    of: Annotator = field(default_factory=Verifier)
    name: str = "noisy"

    def __post_init__(self) -> None:
        check_rate(self.rate)

    def judge(self, row: Row, rng: random.Random) -> tuple[list[Comparison], None]:
        verdicts, _ = self.of.judge(row, rng)
        return [(i, j, -c if rng.random() < self.rate else c) for i, j, c in verdicts], None


@dataclass(frozen=True)
class LengthBiased(Annotator):
    """Scores as another annotator does and adds ``weight`` points for every ten characters."""

    weight: float = 0.5
    of: Annotator = field(default_factory=Verifier)
    name: str = "length-biased"

    def scores(self, row: Row) -> list[float]:
        lengths = map(len, row["responses"])
        return [score + self.weight * n / 10 for score, n in zip(self.of.scores(row), lengths, strict=True)]


@dataclass(frozen=True)
class Clarity(Annotator):
    """Judges three dimensions from 0 to 1 and takes their mean, weighted by the first three fields.

    correctness: half for the right answer, half for a trace without a mistake.
    clarity: a matter of taste. The share ``detail`` is for shown work (a third for each equation, up to
        three), the rest for brevity (1 for no text, 0 at 200 characters); halved if an equation comes twice.
    format: 1 in the strict format, else an eighth for each of the four tags that comes once.
    """

    correctness: float = 1.0
    clarity: float = 1.0
    format: float = 1.0
    detail: float = 0.5
    name: str = "clarity"

    def __post_init__(self) -> None:
        weights = (self.correctness, self.clarity, self.format)
        if not (min(weights) >= 0 and sum(weights) > 0):  # as NaN is neither
            raise ValueError(f"the weights are {weights}: none below 0, and one above, are needed")
        check_rate(self.detail, "detail")

    def dimensions(self, question: str, answer: int, response: str) -> dict[str, float]:
        """What each dimension gets, from 0 to 1."""
        grade = task.grade(response, question, answer)
        equations = _EQUATION.findall(response)
        shown, brief = min(1.0, len(equations) / 3), max(0.0, 1 - len(response) / 200)
        clarity = self.detail * shown + (1 - self.detail) * brief
        return {
            "correctness": (grade.correct + grade.trace) / 2,
            "clarity": clarity / 2 if len(set(equations)) < len(equations) else clarity,
            "format": 1.0 if grade.format else sum(response.count(t) == 1 for t in task.TAGS) / 8,
        }

    def score(self, question: str, answer: int, response: str) -> float:
        found = self.dimensions(question, answer, response)
        total = sum(getattr(self, name) * value for name, value in found.items())
        return total / (self.correctness + self.clarity + self.format)


def check_rate(rate: float, name: str = "rate") -> None:
    """Raise ValueError for what is no share."""
    if not (isinstance(rate, int | float) and 0 <= rate <= 1):
        raise ValueError(f"{name} is {rate!r}: it must be between 0 and 1")
