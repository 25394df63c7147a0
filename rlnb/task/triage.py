"""The task of the real model: a customer's message and a line of policy become one JSON object.

    {"intent":"refund","order":"48312","urgency":"high","product":"grinder","reply":"Thank you, we ..."}

The first four fields are right or wrong, and the policy decides some of them; the reply has a tone, which
``tone`` grades. The rows are in data/triage, by ``python -m data.triage.make``.
"""

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlnb import files
from rlnb.task.rewards import Completion
from rlnb.task.rewards import text as text_of

DATA = Path(__file__).parents[2] / "data" / "triage"
SPLITS = ("train", "validation", "test")
INTENTS = ("refund", "exchange", "repair", "cancel", "tracking", "address", "invoice", "complaint")
LEVELS = ("low", "normal", "high")
PRODUCTS = ("kettle", "grinder", "lamp", "heater", "toaster", "blender",
            "tent", "backpack", "watch", "printer", "keyboard", "speaker")  # fmt: skip
FIELDS = ("intent", "order", "urgency", "product")
SYSTEM = "Answer in JSON: intent, order, urgency, product and one polite reply."
MAX_CHARS = 2000  # a longer answer is wrong by definition
WORDS = range(5, 16)  # in a good reply

_ORDER = re.compile(r"[0-9]{5}")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_POLITE = re.compile(r"\b(?:thanks?|please|sorry|happy|glad|kindly|welcome)\b", re.IGNORECASE)
_BANNED = re.compile(
    r"!|\b(?:promise|guarantee|immediately|today|tomorrow|definitely|for free|fault|whining|bother"
    r"|not our problem|obviously|should have|stupid|apologise|terrible)\b",
    re.IGNORECASE,
)


def load(split: str) -> list[dict[str, Any]]:
    """The rows of a split. Raises ValueError for a split that does not exist and for a row that is no row."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; the splits are {', '.join(SPLITS)}")
    return files.rows(DATA / f"{split}.jsonl", {"id": str, "prompt": str, "completion": str, "shown": bool})


def prompt(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The row's policy and message as chat messages, with SYSTEM before them."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["prompt"]}]


def render(fields: Mapping[str, Any], reply: str) -> str:
    """The compact JSON of the demonstrations."""
    answer = {name: fields[name] for name in FIELDS} | {"reply": reply}
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":"))


def read_object(text: str) -> tuple[dict[str, Any] | None, str]:
    """(object, "") if the text is exactly one JSON object, else (None, the reason).

    A key that comes twice, NaN, infinities and halves of surrogate pairs are refused.
    """
    if len(text) > MAX_CHARS:
        return None, f"{len(text)} characters, more than {MAX_CHARS}"
    try:
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
        json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        return None, "nested too deeply"
    except UnicodeEncodeError:
        return None, "holds half a character"
    except ValueError as error:
        return None, f"no JSON: {error}"
    return (found, "") if isinstance(found, dict) else (None, "no JSON object")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse(text: str) -> tuple[dict[str, Any] | None, str]:
    """(fields, "") if the text is one JSON object of the schema, in any key order and spacing, else (None, why)."""
    found, why = read_object(text)
    if found is None:
        return None, why
    if found.keys() != {*FIELDS, "reply"}:
        return None, f"the keys are {', '.join(found) or 'none':.80}"
    for name, known in (("intent", INTENTS), ("urgency", LEVELS), ("product", (*PRODUCTS, None))):
        if not (found[name] is None or isinstance(found[name], str)) or found[name] not in known:
            return None, f"{name} is {found[name]!r:.40}"
    order = found["order"]
    if order is not None and not (isinstance(order, str) and _ORDER.fullmatch(order)):
        return None, f"order is {order!r:.40}, not five digits or null"
    if not isinstance(found["reply"], str) or not found["reply"].strip():
        return None, f"reply is {found['reply']!r:.40}, not a sentence"
    return found, ""


def by_field(text: str, row: Mapping[str, Any]) -> dict[str, bool]:
    """For each of the four fields whether it is right; none is where the text does not parse."""
    found, _ = parse(text)
    return {name: found is not None and found[name] == row[name] for name in FIELDS}


def score(text: str, row: Mapping[str, Any]) -> float:
    """The share of the four fields that are right."""
    return sum(by_field(text, row).values()) / len(FIELDS)


def tone(reply: str, row: Mapping[str, Any]) -> float:
    """The share of five marks of a good reply: one sentence, 5 to 15 words, a polite word, the right name and no
    wrong number, no banned phrase. The name is the order number or the product; a row without both asks for the
    order number.
    """
    numbers = set(re.findall(r"[0-9]+", reply))
    named = bool(numbers) or bool(row["product"] and row["product"] in reply.lower())
    if not row["order"] and not row["product"]:
        named = "order number" in reply.lower()
    marks = (
        len(_SENTENCE_END.findall(reply)) <= 1,
        len(reply.split()) in WORDS,
        bool(_POLITE.search(reply)),
        named and numbers <= {row["order"]},
        not _BANNED.search(reply),
    )
    return sum(marks) / len(marks)


def fields(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """Reward: ``score``. Reads the columns intent, order, urgency and product."""
    return [score(text_of(done), row) for done, row in zip(completions, _rows(columns), strict=True)]


def tone_reward(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """Reward: ``tone`` of the reply, 0.0 where the answer does not parse. Reads the columns order and product."""
    found = [parse(text_of(completion))[0] for completion in completions]
    return [tone(done["reply"], row) if done else 0.0 for done, row in zip(found, _rows(columns), strict=True)]


def _rows(columns: Mapping[str, Sequence]) -> list[dict[str, Any]]:
    if missing := set(FIELDS) - set(columns):
        raise ValueError(f"the data set lacks the columns {', '.join(sorted(missing))}: triage.load has them")
    return [dict(zip(FIELDS, values, strict=True)) for values in zip(*(columns[n] for n in FIELDS), strict=True)]


def pairs(rows: Iterable[Mapping[str, Any]], differ: str, seed: int = 0) -> list[dict[str, Any]]:
    """One preference pair a row: prompt, chosen, rejected, and `kind`, what is wrong with the rejected.

    differ: "reply" (the same fields, a worse reply) or "fields" (the same reply, one likely wrong field).
    """
    column = {"reply": "replies", "fields": "near"}.get(differ)
    if column is None:
        raise ValueError(f"differ is {differ!r}: it is 'reply' or 'fields'")
    made = []
    for row in rows:
        kind, value = random.Random(f"{row['id']}-{seed}").choice(list(row[column].items()))
        good = json.loads(row["completion"])["reply"]
        worse = render(row, value) if differ == "reply" else render({**row, kind: value}, good)
        answers = {"chosen": row["completion"], "rejected": worse}
        made.append({name: [{"role": "assistant", "content": text}] for name, text in answers.items()})
        made[-1] |= {"prompt": prompt(row), "kind": kind}
    return made
