"""How good preference labels are: do annotators agree, and what is odd about the data.

    ranked = {a.name: annotate(rows, a) for a in (Verifier(), Noisy(), Clarity())}
    agreement(ranked)                     kappa of each two annotators
    report(ranked | {"pairs": pairs})     a column for each data set
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from rlnb.measure.intervals import Proportion
from rlnb.task import problems as task

Row = Mapping[str, Any]  # annotated: see rlnb.data.preferences


@dataclass(frozen=True)
class Kappa:
    """Agreement beyond chance and its 95 % percentile bootstrap interval; NaN where there is one prompt alone."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def kappa(equal: Sequence[bool], prompts: Sequence[Hashable], seed: int = 0) -> Kappa:
    """Cohen's kappa (1960, Educ. Psychol. Meas. 20, p. 37) of comparisons, from whether the two verdicts are equal.

    (p - e) / (1 - e), with p the share of equal verdicts and e what p would be by chance. Neither text is the first
    by nature, so both orders count, and e is a half. prompts: of each comparison; the bootstrap draws whole ones.
    """
    place, there = pd.factorize(pd.Series(prompts, dtype=object))
    n = len(there)
    counts = np.stack([np.bincount(place, equal), np.bincount(place)], 1)  # of each prompt: equal ones, all
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), 2000)  # how often each prompt is drawn
    low, high = np.quantile(_kappa(drawn @ counts), [0.025, 0.975]) if n > 1 else (math.nan, math.nan)
    return Kappa(float(_kappa(counts.sum(0))), float(low), float(high))


def _kappa(counts: np.ndarray) -> np.ndarray:
    return 2 * counts[..., 0] / counts[..., 1] - 1


def agreement(annotations: Mapping[str, Iterable[Row]]) -> pd.DataFrame:
    """How each two annotators agree on the comparisons that both made of the same texts, without ties.

    annotations: annotated rows by the annotator's name. Columns: annotators, comparisons, agree (the share
    of equal verdicts) and kappa, whose interval draws whole prompts.
    Raises ValueError for less than two annotators, and for two with no comparison in common.
    """
    if len(annotations) < 2:
        raise ValueError(f"agreement needs two annotations or more, not {len(annotations)}")
    said = {name: verdicts(rows) for name, rows in annotations.items()}
    found = []
    for one, other in combinations(said, 2):
        items, both = shared(said[one], said[other])
        if not items:
            raise ValueError(f"{one}, {other} have no comparison in common")
        equal = [a == b for a, b in both]
        found.append({
            "annotators": f"{one}, {other}", "comparisons": len(both), "agree": Proportion(sum(equal), len(both)),
            "kappa": kappa(equal, [prompt for prompt, *_ in items]),
        })  # fmt: skip
    return pd.DataFrame(found)


def verdicts(rows: Iterable[Row]) -> dict[tuple, int]:
    """(prompt's id, text, other text), the texts in order -> 1, 0 or -1 for the first of them.

    Of a comparison that was made twice the first counts, and equal texts are none.
    """
    found: dict[tuple, int] = {}
    for row in rows:
        for i, j, c in row["comparisons"]:
            one, other = row["responses"][i], row["responses"][j]
            if one != other:
                found.setdefault((row["id"], min(one, other), max(one, other)), c if one < other else -c)
    return found


def shared(first: dict[tuple, int], second: dict[tuple, int]) -> tuple[list, list[tuple]]:
    """The comparisons that are in both of ``verdicts`` and no tie in either, and what the two say of each."""
    items = [i for i in first if i in second and first[i] and second[i]]
    return items, [(first[i], second[i]) for i in items]


def report(data: Mapping[str, Iterable[Row]]) -> pd.DataFrame:
    """``measure`` of each data set, a column each, under its name; empty where it says nothing."""
    table = pd.DataFrame({name: measure(rows) for name, rows in data.items()}, dtype=object)
    return table.where(table.notna(), "")


def measure(rows: Iterable[Row]) -> dict[str, Any]:
    """What there is to know of annotated rows, or of pairs: counts and proportions.

    Lengths are in characters. "longer wins" is the share of comparisons of unequal length that the longer
    text wins: far from a half is a bias, unless the better answers are longer. "longer wins, equally right"
    has only those where both are strictly right or both are not. Raises ValueError for rows of another kind.
    """
    rows = list(rows)
    if rows and "comparisons" in rows[0]:
        return _measure_annotations(rows)
    columns = set(rows[0]) if rows else set()
    if not {"chosen", "rejected"} <= columns:
        raise ValueError(f"columns {columns or 'none'}: comparisons, or chosen and rejected are needed")
    sides = ("prompt", "chosen", "rejected")
    texts = [tuple("\n".join(m["content"] for m in row[side]) for side in sides) for row in rows]
    pairs = set(texts)
    return {
        "prompts": len({prompt for prompt, _, _ in pairs}), "pairs": len(rows),
        "duplicates": len(rows) - len(pairs), "contradictions": sum((p, b, a) in pairs for p, a, b in pairs) // 2,
        **_lengths([(a, b) for _, a, b in texts]),
    }  # fmt: skip


def _measure_annotations(rows: list[Row]) -> dict[str, Any]:
    wins, equal, ties, same = [], [], 0, 0
    for row in rows:
        right = [task.grade(text, row["question"], row["answer"]).strict for text in row["responses"]]
        for i, j, c in row["comparisons"]:
            one, other = row["responses"][i], row["responses"][j]
            ties, same = ties + (c == 0), same + (one == other)
            if c:
                wins.append((one, other) if c > 0 else (other, one))
                equal += [wins[-1]] * (right[i] == right[j])
    n = len(wins) + ties
    return {
        "prompts": len({row["id"] for row in rows}), "comparisons": n, "of equal texts": same,
        "ties": Proportion(ties, n), **_lengths(wins), "longer wins, equally right": _longer(equal),
    }  # fmt: skip


def _lengths(wins: list[tuple[str, str]]) -> dict[str, Any]:
    means = [round(fmean(map(len, side)), 1) for side in zip(*wins, strict=True)] or [None, None]
    return {"longer wins": _longer(wins), "chosen, characters": means[0], "rejected, characters": means[1]}


def _longer(wins: list[tuple[str, str]]) -> Proportion | None:
    unequal = [len(a) > len(b) for a, b in wins if len(a) != len(b)]
    return Proportion(sum(unequal), len(unequal)) if unequal else None
