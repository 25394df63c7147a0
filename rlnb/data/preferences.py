"""Preference data: responses sampled from a policy, what annotators say of them, TRL's shapes.

    rows = collect(model, tokenizer, problems)        several responses to each prompt
    ranked = annotate(rows, annotators.Verifier())        which is better than which
    data, left_out = pairs(ranked)                    for the reward model, DPO and ORPO
    data, left_out = unpaired(ranked)                 for KTO

A response row is {id, question, answer, kind, prompt, responses}. Annotating adds {annotator,
comparisons, ranks, scores}: comparisons hold (i, j, c) for responses i < j, with c = 1 where i is
better, -1 where j is, 0 for a tie; rank 1 is the best, and equal ranks are a tie.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlnb import files
from rlnb.model import sampling
from rlnb.data import shapes as datasets
from rlnb.task import problems as tasks
from rlnb.data.annotators import Annotator, Comparison, Row, check_rate

if TYPE_CHECKING:
    from datasets import Dataset

FIELDS = {"id": str, "question": str, "answer": int, "kind": str, "responses": list}

# --- responses -----------------------------------------------------------------------------------


def collect(
    model: Any,
    tokenizer: Any,
    problems: Sequence[tasks.Problem],
    n: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
    *,
    system: str | None = None,
    **options: Any,
) -> list[Row]:
    """n responses of the model to each problem, as rows. options: as for ``sampling.sample``."""
    prompts = [tasks.prompt(problem, system) for problem in problems]
    options |= dict(temperature=temperature, seed=seed)
    found = sampling.sample(model, tokenizer, prompts, n, **options)
    return [
        {"id": p.id, "question": p.question, "answer": p.answer, "kind": p.kind, "prompt": prompt,
         "responses": texts}
        for p, prompt, texts in zip(problems, prompts, found.texts, strict=True)
    ]  # fmt: skip


def write(rows: Iterable[Row], path: str | Path) -> None:
    """Write rows, annotated or not, to a JSONL file that appears whole or not at all."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    files.write(Path(path), text)


def read(path: str | Path) -> list[Row]:
    """The rows of a JSONL file. Raises ValueError with the file, the line, the field and its value."""
    rows = []
    for where, row in datasets.lines(Path(path)):
        datasets.check_row(row, "prompts", where)
        for name, kind in FIELDS.items():
            if type(row.get(name)) is not kind:
                raise ValueError(f"{where}, {name}: {row.get(name)!r:.80} is no {kind.__name__}")
        if not row["responses"] or not all(isinstance(text, str) for text in row["responses"]):
            raise ValueError(f"{where}, responses: {row['responses']!r:.80} are no texts")
        rows.append(row)
    return rows


# --- annotations ---------------------------------------------------------------------------------


def annotate(rows: Iterable[Row], annotator: Annotator, seed: int = 0) -> list[Row]:
    """The rows with what an annotator says of them. A row's verdict does not hang on the others."""
    found = []
    for row in rows:
        rng = random.Random(f"{seed}-{annotator.name}-{row['id']}")
        found.append(judged(row, annotator.name, *annotator.judge(row, rng)))
    return found


def judged(
    row: Row, annotator: str, comparisons: Iterable[Comparison], scores: list[float] | None = None
) -> Row:
    """An annotated row: a response row with comparisons, and the ranks that follow from them."""
    comparisons = [list(c) for c in comparisons]  # lists, as JSON gives them back
    ranked = ranks(len(row["responses"]), comparisons)
    return row | {"annotator": annotator, "comparisons": comparisons, "ranks": ranked,
                  "scores": scores}  # fmt: skip


def ranks(n: int, comparisons: Iterable[Comparison]) -> list[int]:
    """Ranks of n responses by comparisons won, a tie counting half to both; 1 is the best."""
    points = [0.0] * n
    for i, j, c in comparisons:
        points[i] += (1 + c) / 2
        points[j] += (1 - c) / 2
    order = sorted(set(points), reverse=True)
    return [order.index(p) + 1 for p in points]


# --- TRL's shapes --------------------------------------------------------------------------------


def pairs(ranked: Iterable[Row], how: str = "all", seed: int = 0) -> "tuple[Dataset, Counter]":
    """Annotated rows as pairs: columns prompt, chosen, rejected and id.

    how: "all" comparisons, one "random" comparison of each prompt, or "best-worst" by rank.
    Returns also how many were left out: ties (of a prompt, unless how is "all"), duplicates (the
    same texts again) and empty (one side has no text). Raises ValueError if nothing is left.
    """
    rows, left_out = [], Counter(ties=0, duplicates=0, empty=0)
    for row in ranked:
        rng, seen = random.Random(f"{seed}-{row['id']}"), set()
        decided = [(i, j) if c > 0 else (j, i) for i, j, c in row["comparisons"] if c]
        if how == "all":
            left_out["ties"] += len(row["comparisons"]) - len(decided)
        elif how == "random":
            decided = rng.sample(decided, min(1, len(decided)))
        elif how == "best-worst":
            decided = _best_worst(row["ranks"], rng)
        else:
            raise ValueError(f"how is {how!r}: it can be 'all', 'random' or 'best-worst'")
        left_out["ties"] += how != "all" and not decided
        for i, j in decided:
            chosen, rejected = row["responses"][i], row["responses"][j]
            if reason := _unfit((chosen, rejected), seen):
                left_out[reason] += 1
            else:
                rows.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected,
                             "id": row["id"]})  # fmt: skip
    if not rows:
        raise ValueError(f"no pair is left; left out are {dict(left_out)}")
    return datasets.preference(rows), left_out


def unpaired(
    ranked: Iterable[Row], threshold: float | None = None, seed: int = 0
) -> "tuple[Dataset, Counter]":
    """Annotated rows as single responses, good or bad: columns prompt, completion, label and id.

    threshold: good is a score of this or more, bad one below; None: good are the responses of the
    best rank of a prompt and bad those of the last, and a prompt with one rank counts as a tie.
    In random order: KTOTrainer keeps to the order, and a batch with one label teaches little.
    Returns also how many were left out: ties, middle (ranks between), duplicates, empty.
    """
    rows, left_out = [], Counter(ties=0, middle=0, duplicates=0, empty=0)
    for row in ranked:
        if threshold is not None and row["scores"] is None:
            raise ValueError(f"row {row['id']}: {row['annotator']} gives no scores for a threshold")
        last, seen = max(row["ranks"]), set()
        if threshold is None and last == 1:
            left_out["ties"] += 1
            continue
        for place, text in enumerate(row["responses"]):
            rank = row["ranks"][place]
            label = rank == 1 if threshold is None else row["scores"][place] >= threshold
            if threshold is None and 1 < rank < last:
                left_out["middle"] += 1
            elif reason := _unfit((text, label), seen):
                left_out[reason] += 1
            else:
                rows.append({"prompt": row["prompt"], "completion": text, "label": label,
                             "id": row["id"]})  # fmt: skip
    random.Random(seed).shuffle(rows)
    return datasets.unpaired(rows), left_out


def unpair(pairs: "Dataset", seed: int = 0) -> "Dataset":
    """Each pair as a good and a bad completion, in random order.

    The rows of TRL's unpair_preference_dataset, which come all good, then all bad. A response that
    won one comparison and lost another has both labels: ``quality.measure`` counts these.
    """
    rows = []
    for row in pairs:
        rest = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
        rows.append({**rest, "completion": row["chosen"], "label": True})
        rows.append({**rest, "completion": row["rejected"], "label": False})
    random.Random(seed).shuffle(rows)
    return datasets.unpaired(rows)


def noise(data: "Dataset", rate: float, seed: int = 0) -> "Dataset":
    """Turn round a share of the pairs, or of the labels of an unpaired data set.

    A column ``flipped`` tells which. Under one seed a higher rate flips the same ones and more.
    """
    check_rate(rate)
    order = random.Random(seed).sample(range(len(data)), len(data))
    flipped, rows = set(order[: round(rate * len(data))]), []
    for i, row in enumerate(data):
        if i in flipped and "label" in row:
            row = {**row, "label": not row["label"]}
        elif i in flipped:
            row = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
        rows.append({**row, "flipped": i in flipped})
    return (datasets.unpaired if "label" in data.column_names else datasets.preference)(rows)


def _best_worst(ranks: list[int], rng: random.Random) -> list[tuple[int, int]]:
    if max(ranks) == 1:
        return []
    ends = [[i for i, rank in enumerate(ranks) if rank == end] for end in (1, max(ranks))]
    return [(rng.choice(ends[0]), rng.choice(ends[1]))]


def _unfit(key: tuple, seen: set) -> str | None:
    """Why a pair, or a text with its label, is left out; None if it is not. Remembers it."""
    if any(isinstance(part, str) and not part.strip() for part in key):
        return "empty"
    if key in seen or key[0] == key[1]:
        return "duplicates"
    seen.add(key)
    return None
