"""How good preference labels are: do annotators agree, and what is odd about the data.

    ranked = {a.name: annotate(rows, a) for a in (Verifier(), Noisy(), Clarity())}
    agreement(ranked)                     kappa of each two annotators, and of all
    report(ranked | {"pairs": pairs})     a column for each data set

Annotations are rows of ``preferences.annotate``. kappa is the agreement beyond chance: 1 is full, 0
what annotators who label at random with their own habits would reach.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from rlnb.measure.intervals import Proportion
from rlnb.task import problems as task

RESAMPLES = 2000
Labels = Sequence[Hashable]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Kappa:
    """Agreement beyond chance on n items, with the 95 % percentile bootstrap interval.

    NaN where it is not defined: everybody gave every item the same label.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def cohen(first: Labels, second: Labels, groups: Labels | None = None, seed: int = 0) -> Kappa:
    """Cohen's kappa of two annotators' labels of the same items, in the same order.

    (p - e) / (1 - e), with p the share of items with equal labels and e what p would be by chance,
    given how often each annotator uses each label (Cohen 1960, Educ. Psychol. Meas. 20, p. 37).
    groups: what each item belongs to, such as its prompt: the bootstrap draws whole groups, since
    the items of one are not independent. Raises ValueError for lists of unequal length or none.
    """
    one, other = _indicators([first, second], groups)
    return _kappa(np.einsum("ia,ib->iab", one, other), groups, seed)


def fleiss(labels: Sequence[Labels], groups: Labels | None = None, seed: int = 0) -> Kappa:
    """Fleiss' kappa of two or more annotators' labels of the same items.

    As Cohen's, with p the share of equal labels over all pairs of annotators and e from how often
    all together use each label (Fleiss 1971, Psychol. Bull. 76, p. 378). groups: as in ``cohen``.
    """
    found = _indicators(labels, groups)
    counts = sum(found)  # (items, labels): how many annotators gave an item a label
    with_themselves = sum(np.einsum("ia,ib->iab", one, one) for one in found)
    return _kappa(np.einsum("ia,ib->iab", counts, counts) - with_themselves, groups, seed)


def _indicators(labels: Sequence[Labels], groups: Labels | None) -> list[np.ndarray]:
    """(items, labels) for each annotator: 1 at the label that an item got."""
    sizes = [*map(len, labels), len(labels[0] if groups is None else groups)]
    if len(labels) < 2 or len(set(sizes)) > 1 or not sizes[0]:
        raise ValueError(f"{sizes[:-1]} labels, {sizes[-1]} groups: each item needs one of each")
    names = list(dict.fromkeys(label for own in labels for label in own))
    return [np.array([[label == name for name in names] for label in own], float) for own in labels]


def _kappa(tables: np.ndarray, groups: Labels | None, seed: int) -> Kappa:
    """tables: (items, labels, labels), the pairs of labels that an item got from two annotators."""

    def statistic(table: np.ndarray) -> np.ndarray:
        table = table / table.sum((-2, -1), keepdims=True)
        agree, chance = table.trace(axis1=-2, axis2=-1), (table.sum(-1) * table.sum(-2)).sum(-1)
        return (agree - chance) / np.where(chance < 1 - 1e-12, 1 - chance, np.nan)

    place, there = pd.factorize(pd.Series(range(len(tables)) if groups is None else groups, dtype=object))
    n = len(there)
    sums = np.zeros((n, *tables.shape[1:]))
    np.add.at(sums, place, tables)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    found = statistic(np.tensordot(drawn, sums, 1))  # drawn, (resamples, groups): how often each is in it
    found = found[~np.isnan(found)]
    low, high = np.quantile(found, [0.025, 0.975]) if n > 1 and len(found) else (math.nan, math.nan)
    return Kappa(float(statistic(tables.sum(0))), float(low), float(high), len(tables))


def agreement(annotations: Mapping[str, Iterable[Row]], ties: bool = True) -> pd.DataFrame:
    """How two or more annotators agree on the comparisons that they all made of the same texts.

    annotations: annotated rows by the annotator's name.
    A row for each two (share of equal labels, Cohen's kappa) and, from three on, one for all (share
    on which all agree, Fleiss' kappa). Labels are: the one is better, the other is, a tie.
    ties=False leaves out comparisons that one of those in the row calls a tie. As neither text is
    the first by nature, kappa takes each comparison both ways round; without ties that makes chance
    a half. NaN where all is a tie.
    Intervals of kappa draw whole prompts; the share's takes comparisons as independent.

    Raises ValueError with less than two annotations or where two have no comparison in common.
    """
    if len(annotations) < 2:
        raise ValueError(f"agreement needs two annotations or more, not {len(annotations)}")
    labels = {name: verdicts(rows) for name, rows in annotations.items()}
    found = []
    for names in dict.fromkeys([*combinations(labels, 2), tuple(labels)]):
        items, said = shared([labels[name] for name in names], ties)
        if not items:
            raise ValueError(f"{', '.join(names)} have no comparison in common")
        prompts = [item[0] for item in items] * 2
        both = [[*own, *(-c for c in own)] for own in zip(*said, strict=True)]
        kappa = cohen(*both, prompts) if len(names) == 2 else fleiss(both, prompts)
        agree = Proportion(sum(len(set(row)) == 1 for row in said), len(said))
        found.append({"annotators": ", ".join(names), "comparisons": len(said), "agree": agree,
                      "kappa": replace(kappa, n=len(said))})  # fmt: skip
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


def shared(labels: Sequence[dict[tuple, int]], ties: bool = True) -> tuple[list, list[tuple]]:
    """The comparisons that are in all of the labels, and what each annotator says of them."""
    items = [i for i in labels[0] if all(i in own and (ties or own[i]) for own in labels)]
    return items, [tuple(own[i] for own in labels) for i in items]


def report(data: Mapping[str, Iterable[Row]]) -> pd.DataFrame:
    """``measure`` of each data set, a column each, under its name; empty where it says nothing."""
    found = {name: measure(rows) for name, rows in data.items()}
    lines = dict.fromkeys(line for column in found.values() for line in column)
    cells = [["" if (value := c.get(line)) is None else value for c in found.values()] for line in lines]
    return pd.DataFrame(cells, index=list(lines), columns=list(found), dtype=object)


def measure(rows: Iterable[Row]) -> dict[str, Any]:
    """What there is to know of annotated rows, or of pairs: counts and proportions.

    Lengths are in characters. "longer wins" is the share of comparisons of unequal length that the
    longer text wins: far from a half is a bias, unless the better answers are longer. "longer wins,
    equally right" has only those where both are strictly right or both are not. Proportions take
    comparisons as independent. Raises ValueError for rows of another kind, and for none.
    """
    rows = list(rows)
    columns = set(rows[0]) if rows else set()
    if "comparisons" in columns:
        return _measure_annotations(rows)
    if {"chosen", "rejected"} <= columns:
        return _measure_pairs(rows)
    there = ", ".join(sorted(columns)) or "none"
    raise ValueError(f"columns {there}: comparisons, or chosen and rejected are needed")


def _measure_annotations(rows: list[Row]) -> dict[str, Any]:
    made = [(row, row["responses"][i], row["responses"][j], c)
            for row in rows for i, j, c in row["comparisons"]]  # fmt: skip
    if not made:
        raise ValueError(f"none of the {len(rows)} rows has a comparison")
    wins = [(row, a, b) if c > 0 else (row, b, a) for row, a, b, c in made if c]
    equal = [(a, b) for row, a, b in wins if "answer" in row and _strict(row, a) == _strict(row, b)]
    return {
        "prompts": len({row["id"] for row in rows}),
        "comparisons": len(made),
        "of equal texts": sum(a == b for _, a, b, _ in made),
        "ties": Proportion(len(made) - len(wins), len(made)),
        **_lengths([(a, b) for _, a, b in wins]),
        "longer wins, equally right": _longer(equal),
    }


def _measure_pairs(rows: list[Row]) -> dict[str, Any]:
    texts = [tuple(_text(row[side]) for side in ("prompt", "chosen", "rejected")) for row in rows]
    made = set(texts)
    return {
        "prompts": len({prompt for prompt, _, _ in texts}),
        "pairs": len(rows),
        "duplicates": len(rows) - len(made),
        "contradictions": sum((p, b, a) in made for p, a, b in made) // 2,
        **_lengths([(a, b) for _, a, b in texts]),
    }


def _lengths(wins: list[tuple[str, str]]) -> dict[str, Any]:
    means = [round(fmean(map(len, side)), 1) for side in zip(*wins, strict=True)] or [None, None]
    return {"longer wins": _longer(wins), "chosen, characters": means[0], "rejected, characters": means[1]}


def _longer(wins: list[tuple[str, str]]) -> Proportion | None:
    unequal = [len(a) > len(b) for a, b in wins if len(a) != len(b)]
    return Proportion(sum(unequal), len(unequal)) if unequal else None


def _strict(row: Row, text: str) -> bool:
    return task.grade(text, row["question"], row["answer"]).strict


def _text(messages: str | list[Mapping[str, str]]) -> str:
    return messages if isinstance(messages, str) else "\n".join(m["content"] for m in messages)
