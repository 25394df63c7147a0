"""Preference data: responses sampled from a policy, what annotators say of them, TRL's shapes.

    responses = rows(problems, sample(model, tokenizer, prompts, n=4).texts)
    ranked = annotate(responses, annotators.Verifier())      which is better than which
    data, left_out = pairs(ranked)                           for the reward model, DPO and ORPO
    labels = unpair(data)                                    for KTO

A response row is {id, question, answer, kind, prompt, responses}. Annotating adds {annotator,
comparisons, ranks, scores}: comparisons hold (i, j, c) for responses i < j, with c = 1 where i is
better, -1 where j is, 0 for a tie; rank 1 is the best, and equal ranks are a tie.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlnb import files
from rlnb.data import shapes
from rlnb.data.annotators import Annotator, Comparison, Row, check_rate
from rlnb.task import problems as task

if TYPE_CHECKING:
    from datasets import Dataset


def rows(problems: Sequence[task.Problem], texts: Sequence[Sequence[str]]) -> list[Row]:
    """Response rows of problems: texts[i] are the responses that were sampled to problems[i]."""
    return [{"id": p.id, "question": p.question, "answer": p.answer, "kind": p.kind,
             "prompt": task.prompt(p), "responses": list(responses)}
            for p, responses in zip(problems, texts, strict=True)]  # fmt: skip


def write(rows: Iterable[Row], path: str | Path) -> None:
    """Write rows, annotated or not, to a JSONL file that appears whole or not at all."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    files.write(Path(path), text)


def read(path: str | Path) -> list[Row]:
    """The rows of a JSONL file. Raises ValueError with the file, the line, the field and its value."""
    kinds, found = {"id": str, "question": str, "answer": int, "kind": str, "responses": list}, []
    for where, row in files.lines(Path(path)):
        shapes.check_row(row, "prompts", where)
        files.check_fields(row, kinds, where)
        found.append(row)
    return found


def annotate(rows: Iterable[Row], annotator: Annotator, seed: int = 0) -> list[Row]:
    """The rows with what an annotator says of them. A row's verdict does not hang on the others."""
    found = []
    for i, row in enumerate(rows):
        files.check_fields(row, {"id": str, "responses": list}, f"row {i}")
        rng = random.Random(f"{seed}-{annotator.name}-{row['id']}")
        found.append(judged(row, annotator.name, *annotator.judge(row, rng)))
    return found


def judged(
    row: Row, annotator: str, comparisons: Iterable[Comparison], scores: list[float] | None = None
) -> Row:
    """An annotated row: a response row with comparisons, and the ranks that follow from them."""
    comparisons = [list(c) for c in comparisons]  # lists, as JSON gives them back
    ranked = ranks(len(row["responses"]), comparisons)
    return row | {"annotator": annotator, "comparisons": comparisons, "ranks": ranked, "scores": scores}


def ranks(n: int, comparisons: Iterable[Comparison]) -> list[int]:
    """Ranks of n responses by comparisons won, a tie counting half to both; 1 is the best."""
    points = [0.0] * n
    for i, j, c in comparisons:
        points[i] += (1 + c) / 2
        points[j] += (1 - c) / 2
    order = sorted(set(points), reverse=True)
    return [order.index(p) + 1 for p in points]


def pairs(ranked: Iterable[Row], how: str = "all", seed: int = 0) -> "tuple[Dataset, Counter]":
    """Annotated rows as pairs: columns prompt, chosen, rejected and id.

    how: "all" comparisons, or one "random" comparison of each prompt.
    Returns also how many were left out: ties (of comparisons, or of prompts if how is "random"),
    duplicates (the same texts again) and empty (one side has no text). Raises ValueError if nothing is left.
    """
    if how not in ("all", "random"):
        raise ValueError(f"how is {how!r}: it can be 'all' or 'random'")
    found, left_out = [], Counter(ties=0, duplicates=0, empty=0)
    for i, row in enumerate(ranked):
        files.check_fields(row, {"comparisons": list, "responses": list}, f"row {i}, which annotate makes")
        decided = [(i, j) if c > 0 else (j, i) for i, j, c in row["comparisons"] if c]
        if how == "all":
            left_out["ties"] += len(row["comparisons"]) - len(decided)
        else:
            left_out["ties"] += not decided
            decided = random.Random(f"{seed}-{row['id']}").sample(decided, min(1, len(decided)))
        seen: set[tuple] = set()
        for i, j in decided:
            chosen, rejected = pair = row["responses"][i], row["responses"][j]
            if not chosen.strip() or not rejected.strip():
                left_out["empty"] += 1
            elif pair in seen or chosen == rejected:
                left_out["duplicates"] += 1
            else:
                seen.add(pair)
                found.append(dict(prompt=row["prompt"], chosen=chosen, rejected=rejected, id=row["id"]))
    if not found:
        raise ValueError(f"no pair is left; left out are {dict(left_out)}")
    return shapes.preference(found), left_out


def unpair(pairs: "Dataset", seed: int = 0) -> "Dataset":
    """Each pair as a good and a bad completion: columns prompt, completion, label and the rest.

    The rows of TRL's unpair_preference_dataset, which come all good, then all bad; here in random order, as
    KTOTrainer keeps to it and a batch with one label teaches little.
    """
    found = []
    for row in shapes.preference(pairs):
        rest = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
        found += [rest | {"completion": row["chosen"], "label": True},
                  rest | {"completion": row["rejected"], "label": False}]  # fmt: skip
    random.Random(seed).shuffle(found)
    return shapes.unpaired(found)


def noise(pairs: "Dataset", rate: float, seed: int = 0) -> "Dataset":
    """Turn round a share of the pairs; a column ``flipped`` tells which. A higher rate flips the same and more."""
    check_rate(rate)
    order = random.Random(seed).sample(range(len(pairs)), len(pairs))
    flipped = set(order[: round(rate * len(pairs))])
    rows = [{**row, "flipped": i in flipped} for i, row in enumerate(shapes.preference(pairs))]
    return shapes.preference(
        row | {"chosen": row["rejected"], "rejected": row["chosen"]} if row["flipped"] else row for row in rows
    )
