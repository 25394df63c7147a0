"""A second task of the real model: a short diff of Python becomes ``{"defect": KIND, "line": N}``.

N counts the lines under the @@ line from 1; of code without a defect it is 0. The rows are in data/review, by
``python -m data.review.make``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlnb import files
from rlnb.task.rewards import Completion
from rlnb.task.rewards import text as text_of
from rlnb.task.triage import read_object

DATA = Path(__file__).parent
SPLITS = ("train", "test")
KINDS = ("off-by-one", "swapped arguments", "wrong operator", "missing return",
         "mutable default", "unclosed file", "wrong variable", "none")  # fmt: skip
SYSTEM = f"Review the diff. Answer in JSON: defect ({', '.join(KINDS)}) and line (its number under @@, 0 for none)."


def load(split: str) -> list[dict[str, Any]]:
    """The rows of a split. Raises ValueError for a split that does not exist and for a row that is no row."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; the splits are {', '.join(SPLITS)}")
    kinds = {"id": str, "prompt": str, "defect": str, "line": int, "completion": str}
    return files.rows(DATA / f"{split}.jsonl", kinds)


def parse(text: str) -> tuple[dict[str, Any] | None, str]:
    """(fields, "") if the text is one JSON object of the schema, else (None, the reason)."""
    found, why = read_object(text)
    if found is None:
        return None, why
    if found.keys() != {"defect", "line"}:
        return None, f"the keys are {', '.join(found) or 'none':.80}"
    if found["defect"] not in KINDS or type(found["line"]) is not int:
        return None, f"defect is {found['defect']!r:.40}, line is {found['line']!r:.40}"
    return found, ""


def score(text: str, row: Mapping[str, Any]) -> float:
    """Half for the kind of the defect, half for its line."""
    found, _ = parse(text)
    return 0.0 if found is None else ((found["defect"] == row["defect"]) + (found["line"] == row["line"])) / 2


def findings(
    completions: Sequence[Completion], defect: Sequence[str], line: Sequence[int], **columns: Any
) -> list[float]:
    """Reward in TRL's form: ``score``. Reads the columns defect and line."""
    rows = ({"defect": kind, "line": number} for kind, number in zip(defect, line, strict=True))
    return [score(text_of(done), row) for done, row in zip(completions, rows, strict=True)]
