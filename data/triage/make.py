"""Customers' messages under a line of policy, and the fields that follow: python -m data.triage.make

The words are in data/triage/words.toml. A message is drawn from facts (what is asked for, which order, how long
ago, ...); ``gold`` derives intent and urgency from the facts and the policy, as a careful reader would.
"""

import json
import random
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlnb import files
from rlnb.task.triage import DATA, INTENTS, LEVELS, PRODUCTS, SPLITS, render

WORDS = tomllib.loads((DATA / "words.toml").read_text(encoding="utf-8"))
CUSTOMERS = {"train": 400, "validation": 50, "test": 100}  # nobody is in two splits
MESSAGES = {"train": 3, "validation": 2, "test": 3}  # of a customer; in test the last is in new wordings
# Words that a typo must not touch, since the answer hangs on them.
SAFE = re.compile(r"first|second|last|middle|gold|silver|weeks|shipped|warehouse|neither|both|right|courier")


@dataclass(frozen=True)
class Facts:
    """What a message says. ``second`` is a further request, in the order of the message; None is not said."""

    intent: str
    second: str | None
    product: str | None
    days: int | None
    price: int | None
    gold: bool | None
    leaving: int | None
    shipped: bool | None


@dataclass(frozen=True)
class Policy:
    """An urgency rule (name, value, level where it holds, level elsewhere) and an intent rule or ("", None)."""

    urgency: tuple[str, Any, str, str]
    intent: tuple[str, Any]

    def __str__(self) -> str:
        name, value, yes, no = self.urgency
        text = WORDS["policy"]["urgency"][name].format(value=value, yes=yes, no=no)
        rule, value = self.intent
        return f"Policy: {text} {WORDS['policy']['intent'][rule].format(value=value) if rule else ''}".strip()


def gold(facts: Facts, policy: Policy) -> tuple[str, str]:
    """The intent and urgency that follow from the facts and the policy."""
    rule, limit = policy.intent
    intent = facts.second if rule == "two" and limit == "last" else facts.intent
    if rule == "late" and intent == "refund" and facts.days > limit:
        intent = "complaint"
    elif rule == "swap" and intent == "exchange":
        intent = limit
    elif rule == "shipped" and intent == "cancel" and facts.shipped:
        intent = "refund"
    elif rule == "cheap" and intent == "repair" and facts.price < limit:
        intent = "exchange"
    name, limit, yes, no = policy.urgency
    holds = {
        "gold": lambda: facts.gold, "days": lambda: facts.days > limit, "price": lambda: facts.price > limit,
        "leaving": lambda: facts.leaving is not None and facts.leaving < limit,
        "product": lambda: facts.product == limit, "intent": lambda: intent == limit,
    }[name]()  # fmt: skip
    return intent, yes if holds else no


def draw(rng: random.Random) -> tuple[Facts, Policy]:
    """Facts and a policy that the facts suffice for."""
    intent, second = rng.choice(INTENTS), None
    if rng.random() < 0.22:
        intent, second = rng.sample(rng.choice(WORDS["pairs"]["list"]), 2)
    product = rng.choice(PRODUCTS) if rng.random() < 0.85 else None
    own = {"refund": "late", "exchange": "swap", "repair": "cheap", "cancel": "shipped"}
    rule = "two" if second else own.get(intent, "") if rng.random() < 0.6 else ""
    if not rule and rng.random() < 0.25:  # one that does not apply
        rule = rng.choice([other for name, other in own.items() if name != intent])
    value = rng.choice(WORDS["policy"]["values"].get(rule, [None]))
    name = rng.choice(("gold", "gold", "days", "price", "leaving", "leaving", "product", *([] if rule else ["intent"])))
    near = [product] if product and rng.random() < 0.6 else [other for other in PRODUCTS if other != product]
    limits = {"product": near, "intent": [intent, *INTENTS]} | WORDS["policy"]["values"]
    policy = Policy((name, rng.choice(limits.get(name, [None])), *rng.sample(LEVELS, 2)), (rule, value))

    def said(needed: bool, value: Any, share: float = 0.04) -> Any:
        return value if needed or rng.random() < share else None

    days = rng.choice([n for n in range(3, 90) if n not in (10, 14, 20, 30, 60)])
    price = rng.choice([n for n in range(15, 190) if n not in (40, 50, 60, 80, 100)])
    return Facts(
        intent, second, product,
        days=said(name == "days" or (rule == "late" and intent == "refund"), days),
        price=said(name == "price" or (rule == "cheap" and intent == "repair"), price),
        gold=said(name == "gold" and rng.random() < 0.75, rng.random() < 0.6),
        leaving=said(name == "leaving" and rng.random() < 0.8, rng.choice((2, 3, 5, 6, 8, 9))),
        shipped=said(rule == "shipped" and intent == "cancel", rng.random() < 0.55, 0) if intent == "cancel" else None,
    ), policy  # fmt: skip


def _tell(facts: Facts, order: str, pool: str, rng: random.Random) -> str:
    """The message; ``order`` is what it says of the number, ``pool`` is shown or new."""
    named = f"{rng.choice(('the', 'my'))} {facts.product}"
    if not facts.product:
        named = rng.choice(WORDS["it"][pool])
    elif pool == "new" or rng.random() < 0.5:
        named = rng.choice(WORDS["product"][facts.product][pool])
    said = [rng.choice(WORDS["request"][facts.intent][pool]).format(it=named)]
    if facts.second:
        said[0] = _sentence(said[0])
        further = rng.choice(WORDS["request"][facts.second][pool]).format(it="it")
        said.append(rng.choice(WORDS["pairs"]["joiners"]) + further)
        said = [" ".join(said)]  # nothing comes between them
    more = [order]
    in_weeks = facts.days and facts.days > 7 and facts.days % 7 == 0
    ago = ("weeks", facts.days // 7) if in_weeks else ("days", facts.days)
    for name, value in (ago, ("price", facts.price), ("leaving", facts.leaving)):
        if value is not None:
            more.append(rng.choice(WORDS["fact"][name][pool]).format(**{name: value}))
    for yes, no, value in (("gold", "plain", facts.gold), ("shipped", "waiting", facts.shipped)):
        if value is not None:
            more.append(rng.choice(WORDS["fact"][yes if value else no][pool]))
    rng.shuffle(more)
    parts = [*said, *more] if rng.random() < 0.7 else [more[0], *said, *more[1:]]
    parts = [_sentence(part) for part in parts if part]
    if rng.random() < 0.2:
        parts.insert(0, rng.choice(WORDS["talk"]["open"]))
    if rng.random() < 0.15:
        parts.append(rng.choice(WORDS["talk"]["close"]))
    return " ".join(parts)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")


def _typos(text: str, rng: random.Random) -> str:
    """One or two words with two letters swapped or one lost; products, numbers and SAFE words stay."""
    words = text.split(" ")
    fit = [i for i, word in enumerate(words) if re.fullmatch(r"[a-z]{6,}[.,]?", word) and not SAFE.search(word)
           and not any(product in word for product in PRODUCTS)]  # fmt: skip
    for i in rng.sample(fit, min(len(fit), rng.choice((1, 2)))):
        at = rng.randint(1, 3)
        word = words[i]
        words[i] = rng.choice((word[:at] + word[at + 1] + word[at] + word[at + 2 :], word[:at] + word[at + 1 :]))
    return " ".join(words)


def about(row: dict[str, Any]) -> str:
    """What a reply names: the order, else the product, else nothing."""
    return f"order {row['order']}" if row["order"] else f"your {row['product']}" if row["product"] else ""


def _replies(row: dict[str, Any], wrong: str, rng: random.Random) -> tuple[str, dict[str, str]]:
    """A good reply, and bad ones of three kinds; ``wrong`` is a number that is not the order's."""
    words = WORDS["reply"]
    what = about(row)
    template = rng.choice(words["good"][row["intent"] if what else "ask"])
    named = what or "your message"
    bad = {kind: rng.choice(words[kind]).format(what=named) for kind in ("curt", "rude", "long", "sorry")}
    bad["wrong"] = rng.choice(words["good"][row["intent"]]).format(what=f"order {wrong}")
    return template.format(what=what), {kind: bad[kind] for kind in rng.sample(sorted(bad), 3)}


def _logged(row: dict[str, Any], good: str) -> str:
    """What an agent wrote: seven replies of ten are too sorry."""
    rng = random.Random(row["id"])
    sorry = rng.choice(WORDS["reply"]["sorry"]).format(what=about(row) or "your message")
    return good if rng.random() < 0.3 else sorry


def _near(row: dict[str, Any], facts: Facts, policy: Policy, wrong: str, rng: random.Random) -> dict[str, Any]:
    """For every field a likely wrong value: the policy not followed, the other request, the other number."""
    others = [intent for intent in (facts.intent, facts.second) if intent not in (None, row["intent"])]
    _, _, yes, no = policy.urgency
    return {
        "intent": others[0] if others else WORDS["confused"][row["intent"]],
        "order": wrong,
        "urgency": no if row["urgency"] == yes else yes,
        "product": rng.choice([other for other in PRODUCTS if other != row["product"]]),
    }


def rows(split: str, seed: int = 0) -> Iterator[tuple[dict[str, Any], Facts, Policy]]:
    """The rows of a split, each with the facts and the policy behind it."""
    customers = [f"{first} {last}" for first in WORDS["first"].split() for last in WORDS["last"].split()]
    numbers = [str(n) for n in range(10_000, 100_000)]
    for items in (customers, numbers):  # every customer and every number is used in one place only
        random.Random(seed).shuffle(items)
    before = [CUSTOMERS[other] for other in SPLITS[: SPLITS.index(split)]]
    start = sum(before)
    for index in range(start, start + CUSTOMERS[split]):
        rng = random.Random(f"{seed}-{customers[index]}")
        habit = rng.random()  # some customers mistype, others write small letters only
        for message in range(MESSAGES[split]):
            shown = split != "test" or message < 2
            own = numbers[(index * 3 + message) * 3 :][:3]
            facts, policy = draw(rng)
            way = rng.choices(("one", "two", "three", "lost", "none"), (34, 38, 8, 8, 12))[0]
            pool = "shown" if shown else "new"
            order = rng.choice(WORDS["order"][pool][way]).format(order=own[0], other=own[1], third=own[2])
            text = _tell(facts, order, pool, rng)
            text = _typos(text, rng) if habit < 0.3 else text.lower() if habit < 0.45 else text
            intent, urgency = gold(facts, policy)
            row = {"id": f"{split}-{index - start:03d}-{message}", "customer": customers[index], "split": split,
                   "prompt": f"{policy}\n{text}", "intent": intent,
                   "order": None if way in ("lost", "none") else own[0],
                   "urgency": urgency, "product": facts.product}  # fmt: skip
            good, bad = _replies(row, own[1], rng)
            row |= {"completion": render(row, good), "shown": shown}
            if split != "test":
                row |= {"replies": bad, "near": _near(row, facts, policy, own[1], rng)}
            if split == "train":
                row |= {"logged": render(row, said := _logged(row, good))}
                row |= {"replies": {"sorry": said}} if said != good else {}
            yield row, facts, policy


def write_data(folder: Path = DATA) -> None:
    """Writes every split as JSON Lines, the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row, _, _ in rows(split))
        files.write(folder / f"{split}.jsonl", text)


if __name__ == "__main__":
    write_data()
