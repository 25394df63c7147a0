"""How good preference labels are: do annotators agree, and what is odd about the data.

    ranked = {a.name: annotate(rows, a) for a in (Verifier(), Noisy(), Clarity())}
    agreement(ranked)                     kappa of each two annotators, and of all
    report(ranked | {"pairs": pairs})     a column for each data set

Annotations are rows of ``preferences.annotate``. kappa is the agreement beyond chance: 1 is full, 0
what annotators who label at random with their own habits would reach.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rlnb.task import problems as tasks
from rlnb.measure.evaluate import Proportion
from rlnb.record.values import Table

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 2000
Labels = Sequence[Hashable]
Row = Mapping[str, Any]

# --- kappa ---------------------------------------------------------------------------------------


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
    import numpy as np

    _check_items(first, second, groups)
    labels = list(dict.fromkeys([*first, *second]))
    one, two = ([[x == label for label in labels] for x in side] for side in (first, second))
    tables = np.einsum("ia,ib->iab", np.array(one, float), np.array(two, float))  # one an item

    def shares(table: "np.ndarray") -> tuple["np.ndarray", "np.ndarray"]:
        table = table / table.sum((-2, -1), keepdims=True)
        return table.trace(axis1=-2, axis2=-1), (table.sum(-1) * table.sum(-2)).sum(-1)

    return _kappa(shares, tables, groups, seed)


def fleiss(counts: Sequence[Sequence[int]], groups: Labels | None = None, seed: int = 0) -> Kappa:
    """Fleiss' kappa: counts[i][c] annotators, as many for each item, gave item i the label c.

    As Cohen's, with p the share of equal labels over all pairs of annotators and e from how often
    all together use each label (Fleiss 1971, Psychol. Bull. 76, p. 378). groups: as in ``cohen``.
    Raises ValueError unless each item has the same number of labels, two or more.
    """
    import numpy as np

    _check_items(counts, counts, groups)
    counts = np.asarray(counts, float)
    raters = int(counts[0].sum())
    if raters < 2 or (counts.sum(1) != raters).any():
        odd = int(np.argmax(counts.sum(1) != raters))
        one = f"item {odd} has {counts[odd].sum():.0f} labels and item 0 has {raters}"
        raise ValueError(f"{one}: each needs the same number, two or more")
    agreeing = ((counts**2).sum(1) - raters) / (raters * (raters - 1))

    def shares(sums: "np.ndarray") -> tuple["np.ndarray", "np.ndarray"]:
        labels = sums[..., 1:].sum(-1)
        return sums[..., 0] * raters / labels, ((sums[..., 1:] / labels[..., None]) ** 2).sum(-1)

    return _kappa(shares, np.column_stack([agreeing, counts]), groups, seed)


def _kappa(shares: Callable, parts: "np.ndarray", groups: Labels | None, seed: int) -> Kappa:
    """Kappa of the sum of parts, (items, ...), and its spread when whole groups are drawn.

    shares: from such sums to the share of equal labels and the one that chance would give.
    """
    import numpy as np

    def statistic(sums: "np.ndarray") -> "np.ndarray":
        observed, chance = shares(sums)
        return (observed - chance) / np.where(chance < 1 - 1e-12, 1 - chance, np.nan)

    groups = range(len(parts)) if groups is None else groups
    place = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    sums = np.zeros((len(place), *parts.shape[1:]))
    np.add.at(sums, [place[group] for group in groups], parts)
    drawn = np.random.default_rng(seed).multinomial(
        len(sums), np.full(len(sums), 1 / len(sums)), RESAMPLES
    )  # (resamples, groups): how often each group is in the resample
    found = statistic(np.tensordot(drawn, sums, 1))
    found = found[~np.isnan(found)]
    if len(sums) < 2 or not len(found):
        low = high = math.nan
    else:
        low, high = map(float, np.quantile(found, [0.025, 0.975]))
    return Kappa(float(statistic(parts.sum(0))), low, high, len(parts))


def _check_items(first: Sequence, second: Sequence, groups: Labels | None) -> None:
    sizes = [len(first), len(second), len(first if groups is None else groups)]
    if len(set(sizes)) > 1 or not sizes[0]:
        raise ValueError("{} and {} labels, {} groups: each item needs one of each".format(*sizes))


# --- agreement -----------------------------------------------------------------------------------


def agreement(annotations: Mapping[str, Iterable[Row]], ties: bool = True) -> Table:
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
    found = Table()
    for names in dict.fromkeys([*combinations(labels, 2), tuple(labels)]):
        who = ", ".join(names)
        items, table = shared([labels[name] for name in names], ties)
        if not items:
            raise ValueError(f"{who} have no comparison in common")
        prompts = [item[0] for item in items] * 2
        both = table + [tuple(-c for c in row) for row in table]
        if len(names) == 2:
            kappa = cohen(*zip(*both, strict=True), prompts)
        else:
            kappa = fleiss([[row.count(c) for c in (1, 0, -1)] for row in both], prompts)
        agree = Proportion(sum(len(set(row)) == 1 for row in table), len(table))
        found.append({"annotators": who, "kappa of": "Cohen" if len(names) == 2 else "Fleiss",
                      "comparisons": len(table), "agree": agree,
                      "kappa": replace(kappa, n=len(table))})  # fmt: skip
    return found


def verdicts(rows: Iterable[Row]) -> dict[tuple, int]:
    """(prompt's id, text, other text), the texts in order -> 1, 0 or -1 for the first of them.

    Of a comparison that was made twice the first counts, and equal texts are none.
    """
    found: dict[tuple, int] = {}
    for row in rows:
        for i, j, c in row["comparisons"]:
            one, other = row["responses"][i], row["responses"][j]
            if one != other:
                key = (row["id"], min(one, other), max(one, other))
                found.setdefault(key, c if one < other else -c)
    return found


def shared(labels: Sequence[dict[tuple, int]], ties: bool = True) -> tuple[list, list[tuple]]:
    """The comparisons that are in all of the labels, and what each annotator says of them."""
    items = [item for item in labels[0] if all(item in others for others in labels)]
    items = [i for i in items if ties or all(verdict[i] for verdict in labels)]
    return items, [tuple(verdict[i] for verdict in labels) for i in items]


# --- report --------------------------------------------------------------------------------------


def report(data: Mapping[str, Iterable[Row]]) -> Table:
    """``measure`` of each data set, one column each, under its name."""
    found = {name: measure(rows) for name, rows in data.items()}
    lines = dict.fromkeys(line for column in found.values() for line in column)
    return Table({"": line} | {n: c.get(line) for n, c in found.items()} for line in lines)


def measure(rows: Iterable[Row]) -> dict[str, Any]:
    """What there is to know of annotated rows, pairs, or unpaired labels: counts and proportions.

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
    if {"completion", "label"} <= columns:
        return _measure_labels(rows)
    there = ", ".join(sorted(columns)) or "none"
    raise ValueError(f"columns {there}: comparisons, or chosen and rejected, or label are needed")


def intransitive(rows: Iterable[Row]) -> Proportion | None:
    """Of the triples compared without a tie, how many go round in a circle: a > b > c > a.

    At random a quarter do. None if there is no such triple.
    """
    circles = triples = 0
    for row in rows:
        better = {}
        for i, j, c in row["comparisons"]:
            better[i, j], better[j, i] = c > 0, c < 0
        for a, b, c in combinations(range(len(row["responses"])), 3):
            sides = [(a, b), (b, c), (c, a)]
            if all(better.get(s) or better.get(s[::-1]) for s in sides):
                triples += 1
                circles += len({better[s] for s in sides}) == 1
    return Proportion(circles, triples) if triples else None


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
        "intransitive triples": intransitive(rows),
        "longer wins": _longer((a, b) for _, a, b in wins),
        "longer wins, equally right": _longer(equal),
        **_lengths("chosen", [a for _, a, _ in wins], "rejected", [b for _, _, b in wins]),
    }


def _measure_pairs(rows: list[Row]) -> dict[str, Any]:
    texts = [tuple(_text(row[side]) for side in ("prompt", "chosen", "rejected")) for row in rows]
    prompts, chosen, rejected = zip(*texts, strict=True)
    made = set(texts)
    return {
        "prompts": len(set(prompts)),
        "pairs": len(rows),
        "duplicates": len(rows) - len(made),
        "contradictions": sum((p, b, a) in made for p, a, b in made) // 2,
        "longer wins": _longer(zip(chosen, rejected, strict=True)),
        **_lengths("chosen", chosen, "rejected", rejected),
    }


def _measure_labels(rows: list[Row]) -> dict[str, Any]:
    texts = [(_text(row["prompt"]), _text(row["completion"]), row["label"]) for row in rows]
    good, bad = ([text for _, text, label in texts if label is side] for side in (True, False))
    return {
        "prompts": len({prompt for prompt, _, _ in texts}),
        "labels": len(rows),
        "good": Proportion(len(good), len(rows)),
        "duplicates": len(rows) - len(set(texts)),
        "contradictions": len(set(texts)) - len({text[:2] for text in texts}),
        **_lengths("good", good, "bad", bad),
    }


def _longer(wins: Iterable[tuple[str, str]]) -> Proportion | None:
    unequal = [len(a) > len(b) for a, b in wins if len(a) != len(b)]
    return Proportion(sum(unequal), len(unequal)) if unequal else None


def _lengths(side: str, texts: list[str], other: str, others: list[str]) -> dict[str, float | None]:
    sides = {side: texts, other: others}.items()
    return {f"{s}, characters": round(fmean(map(len, t)), 1) if t else None for s, t in sides}


def _strict(row: Row, text: str) -> bool:
    return tasks.grade(text, row["question"], row["answer"]).strict


def _text(messages: str | list[Mapping[str, str]]) -> str:
    return messages if isinstance(messages, str) else "\n".join(m["content"] for m in messages)
