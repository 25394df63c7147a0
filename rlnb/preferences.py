"""Preference data: responses sampled from a policy, annotators that compare them, TRL's shapes.

    rows = collect(model, tokenizer, problems)        several responses to each prompt
    ranked = annotate(rows, Gold())                   which is better than which
    data, left_out = pairs(ranked)                    for the reward model, DPO and ORPO
    data, left_out = unpaired(ranked)                 for KTO

A response row is {id, question, answer, kind, prompt, responses}. Annotating adds {annotator,
comparisons, ranks, scores}: comparisons hold (i, j, c) for responses i < j, with c = 1 where i is
better, -1 where j is, 0 for a tie; rank 1 is the best, and equal ranks are a tie.
"""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlnb import datasets, files, sampling
from rlnb import problems as tasks

if TYPE_CHECKING:
    from datasets import Dataset

FIELDS = {"id": str, "question": str, "answer": int, "kind": str, "responses": list}
_EQUATION = re.compile(r"[0-9]+ ?[-+*/] ?[0-9]+ ?= ?[0-9]+")

Row = dict[str, Any]
Comparison = tuple[int, int, int]


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


# --- annotators ----------------------------------------------------------------------------------


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
        if any(map(math.isnan, scores)):
            raise ValueError(f"row {row['id']}: {self.name} scores {scores}, which has no order")
        return compared(scores), scores


@dataclass(frozen=True)
class Gold(Annotator):
    """The verifier: 1 for a strictly right response (format, answer and trace), else 0."""

    name: str = "gold"

    def score(self, question: str, answer: int, response: str) -> float:
        return float(tasks.grade(response, question, answer).strict)


@dataclass(frozen=True)
class Noisy(Annotator):
    """Compares as another annotator does and turns each verdict round with probability ``rate``.

    Its ties stay. The verdicts need not be transitive; ranks go by the number of comparisons won.
    """

    rate: float = 0.2
    of: Annotator = field(default_factory=Gold)
    name: str = "noisy"

    def __post_init__(self) -> None:
        _check_rate(self.rate)

    def judge(self, row: Row, rng: random.Random) -> tuple[list[Comparison], None]:
        verdicts, _ = self.of.judge(row, rng)
        return [(i, j, -c if rng.random() < self.rate else c) for i, j, c in verdicts], None


@dataclass(frozen=True)
class LengthBiased(Annotator):
    """Scores as another annotator does and adds ``weight`` points for every ten characters.

    With the verifier and weight 0.5, 20 characters more (one to two equations) outweigh being wrong.
    """

    weight: float = 0.5
    of: Annotator = field(default_factory=Gold)
    name: str = "length-biased"

    def score(self, question: str, answer: int, response: str) -> float:
        return self.of.score(question, answer, response) + self.weight * len(response) / 10


@dataclass(frozen=True)
class Clarity(Annotator):
    """Judges three dimensions from 0 to 1 and takes their mean, weighted by the first three fields.

    correctness: half for the right answer, half for a trace without a mistake.
    clarity: a matter of taste. The share ``detail`` is for shown work (a third for each equation, up
        to three), the rest for brevity (1 for no text, falling to 0 at 200 characters); halved if an
        equation comes twice.
    format: 1 in the strict format, else an eighth for each of the four tags that comes once.
    """

    correctness: float = 1.0
    clarity: float = 1.0
    format: float = 1.0
    detail: float = 0.5
    name: str = "clarity"

    def __post_init__(self) -> None:
        weights = (self.correctness, self.clarity, self.format)
        if min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"the weights are {weights}: none below 0, and one above, are needed")
        _check_rate(self.detail, "detail")

    def dimensions(self, question: str, answer: int, response: str) -> dict[str, float]:
        """What each dimension gets, from 0 to 1."""
        grade = tasks.grade(response, question, answer)
        equations = _EQUATION.findall(response)
        shown, brief = min(1.0, len(equations) / 3), max(0.0, 1 - len(response) / 200)
        clarity = self.detail * shown + (1 - self.detail) * brief
        return {
            "correctness": (grade.correct + grade.trace) / 2,
            "clarity": clarity / 2 if len(set(equations)) < len(equations) else clarity,
            "format": 1.0 if grade.format else sum(response.count(t) == 1 for t in tasks.TAGS) / 8,
        }

    def score(self, question: str, answer: int, response: str) -> float:
        found = self.dimensions(question, answer, response)
        total = sum(getattr(self, name) * value for name, value in found.items())
        return total / (self.correctness + self.clarity + self.format)


@dataclass(frozen=True, eq=False)
class AI(Annotator):
    """A model as the annotator, which sees the prompt and the response and no answer (RLAIF).

    A reward model (a sequence classifier with one output) gives its reward; a causal model the mean
    log-probability of the response's tokens, in nats. On a GPU untested until tests/gpu has run on one.
    """

    model: Any
    tokenizer: Any
    name: str = "ai"

    def score(self, question: str, answer: int, response: str) -> float:
        prompt = [{"role": "user", "content": question}]
        return self.scores({"prompt": prompt, "responses": [response]})[0]

    def scores(self, row: Row) -> list[float]:
        texts = list(dict.fromkeys(row["responses"]))  # equal texts must get equal scores
        found = dict(zip(texts, self._score_all(row["prompt"], texts), strict=True))
        return [found[text] for text in row["responses"]]

    def _score_all(self, prompt: list[dict], texts: list[str]) -> list[float]:
        from rlnb.decoding import left_pad

        says = [[*prompt, {"role": "assistant", "content": text}] for text in texts]
        ids = self.tokenizer.apply_chat_template(says, tokenize=True, return_dict=True)["input_ids"]
        padded = left_pad(ids, self.tokenizer.pad_token_id or 0)
        tokens, mask = (x.to(self.model.device) for x in padded)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with sampling.inference(self.model) as model:
            logits = model(
                input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
            ).logits.float()
        if logits.dim() == 2:  # (rows, outputs), from a classifier
            if logits.shape[1] != 1:
                raise ValueError(f"a reward model has 1 output, and this one {logits.shape[1]}")
            return logits[:, 0].tolist()
        (head,) = sampling.tokenize(self.tokenizer, [prompt])
        logps = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
        return [
            own[len(own) - len(row) + len(head) :].mean().item()
            for own, row in zip(logps, ids, strict=True)
        ]


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


def compared(scores: Sequence[float]) -> list[Comparison]:
    """Every pair of responses compared by score; for a list of ranks, pass their negatives."""
    places = combinations(range(len(scores)), 2)
    return [(i, j, (scores[i] > scores[j]) - (scores[i] < scores[j])) for i, j in places]


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
    _check_rate(rate)
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


def _check_rate(rate: float, name: str = "rate") -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"{name} is {rate!r}: it must be between 0 and 1")
