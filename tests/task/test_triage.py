"""The customers' messages: their files, their gold fields, what reads the answers, and how far keywords get."""

import json
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import chain

import pytest

from rlnb.task import triage as T
from data.triage import make as M

ROWS = {split: T.load(split) for split in T.SPLITS}
ALL = list(chain.from_iterable(ROWS.values()))
MADE = list(M.rows("train"))
GOOD = {"intent": "refund", "order": "48312", "urgency": "high", "product": "kettle", "reply": "Thank you for writing."}


def message(row) -> str:
    return row["prompt"].split("\n", 1)[1]


# --- the files -----------------------------------------------------------------------------------


def test_files_come_out_byte_for_byte_and_are_small(tmp_path):
    M.write_data(tmp_path)
    for split in T.SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (T.DATA / f"{split}.jsonl").read_bytes()
    assert sum(path.stat().st_size for path in T.DATA.glob("*.jsonl")) < 1_500_000
    assert {split: len(rows) for split, rows in ROWS.items()} == {"train": 1200, "validation": 100, "test": 300}


def test_splits_share_no_customer_no_message_and_no_number():
    def numbers(row):
        return set(re.findall(r"\d{5}", message(row)))

    for column in (lambda r: {r["customer"]}, lambda r: {message(r).lower()}, numbers):
        seen = {split: set().union(*map(column, rows)) for split, rows in ROWS.items()}
        assert not seen["train"] & seen["validation"] and not (seen["train"] | seen["validation"]) & seen["test"]
    assert len({message(row) for row in ALL}) == len(ALL)
    assert len({row["id"] for row in ALL}) == len(ALL)


def _new_wordings(words) -> list[str]:
    """The fixed parts of all wordings under a key "new", three words and longer."""
    if isinstance(words, dict):
        return [p for key, value in words.items() for p in (_fixed(value) if key == "new" else _new_wordings(value))]
    return []


def _fixed(words) -> list[str]:
    texts = chain.from_iterable(words.values()) if isinstance(words, dict) else words
    parts = (part.strip(" ,.;:?") for text in texts for part in re.split(r"\{\w+\}", text))
    return [part.lower() for part in parts if part.count(" ") >= 2]


def test_a_third_of_the_test_is_in_wordings_that_no_other_row_has():
    assert all(row["shown"] for split in ("train", "validation") for row in ROWS[split])
    assert Counter(row["shown"] for row in ROWS["test"]) == {True: 200, False: 100}
    new = _new_wordings({name: words for name, words in M.WORDS.items() if name != "policy"})
    assert len(new) > 60
    shown = "\n".join(message(row).lower() for row in ALL if row["shown"])
    assert [part for part in new if part in shown] == []
    unshown = [message(row).lower() for row in ROWS["test"] if not row["shown"]]
    assert sum(any(part in text for part in new) for text in unshown) >= 95  # a typo hides some


def test_there_are_many_wordings_and_rows_of_every_sort():
    for intent in T.INTENTS:
        assert len(M.WORDS["request"][intent]["shown"]) >= 12 and len(M.WORDS["request"][intent]["new"]) >= 5
    for split, rows in ROWS.items():
        assert {row["intent"] for row in rows} == set(T.INTENTS), split
        assert {row["urgency"] for row in rows} == set(T.LEVELS)
        assert {row["product"] for row in rows} == {*T.PRODUCTS, None}
        assert 0.1 < sum(row["order"] is None for row in rows) / len(rows) < 0.3
        several = [row for row in rows if row["order"] and len(set(re.findall(r"\d{5}", message(row)))) > 1]
        assert len(several) / len(rows) > 0.3
    assert max(Counter(row["intent"] for row in ROWS["test"]).values()) / 300 < 0.25  # the majority class
    assert max(Counter(row["urgency"] for row in ROWS["test"]).values()) / 300 < 0.45
    assert max(Counter(row["product"] for row in ROWS["test"]).values()) / 300 < 0.25


def test_prompts_are_short():
    """3.5 characters or more are one token; digits are one each. With the model's tokenizer: mean 112, most 159."""
    lengths = [len(T.SYSTEM + row["prompt"]) for row in ALL]
    assert sum(lengths) / len(lengths) < 500 and max(lengths) < 680
    assert max(len(row["completion"]) for row in ALL) < 190


# --- the gold fields -----------------------------------------------------------------------------


def test_what_is_needed_for_the_answer_stands_in_the_message():
    for row, facts, policy in chain.from_iterable(map(M.rows, T.SPLITS)):
        text, (name, limit, yes, no) = message(row), policy.urgency
        assert not re.search(r"\b1 weeks", text)
        if row["order"]:
            assert row["order"] in text
        for rule, value in (("days", facts.days), ("price", facts.price), ("leaving", facts.leaving)):
            if name == rule and rule != "leaving":
                assert value is not None
            if value is not None:
                assert re.search(rf"\b({value}|{value // 7} weeks)\b", text) and value != limit, row
        rule, value = policy.intent
        assert rule != "late" or facts.intent != "refund" or facts.days not in (None, value)
        assert rule != "cheap" or facts.intent != "repair" or facts.price not in (None, value)
        assert (facts.second is not None) == (policy.intent[0] == "two")
        assert (policy.intent[0] == "shipped" and facts.intent == "cancel") == (facts.shipped is not None)
        assert yes != no and str(policy) == row["prompt"].split("\n")[0]


def test_policy_by_hand():
    facts = M.Facts("refund", None, "kettle", days=40, price=90, gold=None, leaving=None, shipped=None)
    late = M.Policy(("price", 50, "low", "high"), ("late", 30))
    assert M.gold(facts, late) == ("complaint", "low")
    assert M.gold(replace(facts, days=20), late) == ("refund", "low")
    assert M.gold(replace(facts, intent="exchange", price=20), late) == ("exchange", "high")
    two = M.Policy(("gold", None, "high", "normal"), ("two", "last"))
    assert M.gold(replace(facts, second="invoice", gold=True), two) == ("invoice", "high")
    two = replace(two, intent=("two", "first"))
    assert M.gold(replace(facts, second="invoice", gold=False), two) == ("refund", "normal")
    cheap = M.Policy(("leaving", 4, "low", "high"), ("cheap", 100))
    assert M.gold(replace(facts, intent="repair"), cheap) == ("exchange", "high")
    assert M.gold(replace(facts, intent="repair", price=120, leaving=3), cheap) == ("repair", "low")
    shipped = M.Policy(("product", "kettle", "low", "normal"), ("shipped", None))
    assert M.gold(replace(facts, intent="cancel", shipped=True), shipped) == ("refund", "low")
    assert M.gold(replace(facts, intent="cancel", shipped=False), shipped) == ("cancel", "low")
    swap = M.Policy(("intent", "repair", "high", "low"), ("swap", "repair"))
    assert M.gold(replace(facts, intent="exchange"), swap) == ("repair", "high")


def test_the_policy_matters():
    """Another policy flips the intent of a fifth of the rows or more, the urgency of every row (the two levels change
    places), and that of some rows if only the limit changes.
    """
    opposite = {"first": "last", "last": "first", "refund": "repair", "repair": "refund"}
    intents = urgencies = 0
    for row, facts, policy in MADE:
        rule, value = policy.intent
        other = (rule, opposite[value]) if value in opposite else ("", None)
        intents += M.gold(facts, replace(policy, intent=other))[0] != row["intent"]
        name, limit, yes, no = policy.urgency
        assert M.gold(facts, replace(policy, urgency=(name, limit, no, yes)))[1] != row["urgency"]
        moved = {"days": 90 - (limit or 0) if name == "days" else 0, "price": 400, "leaving": 0}.get(name)
        urgencies += M.gold(facts, replace(policy, urgency=(name, moved, yes, no)))[1] != row["urgency"]
    print(f"\nanother rule flips the intent of {intents}, another limit the urgency of {urgencies} of {len(MADE)}")
    assert intents / len(MADE) > 0.2 and urgencies / len(MADE) > 0.1, (intents, urgencies)


# --- demonstrations and bad replies --------------------------------------------------------------


def test_every_demonstration_is_right_and_in_good_tone():
    for row in ALL:
        found, why = T.parse(row["completion"])
        assert not why and T.score(row["completion"], row) == 1.0 and T.tone(found["reply"], row) == 1.0, row


def test_every_bad_reply_is_worse():
    kinds = Counter()
    for row in chain(ROWS["train"], ROWS["validation"]):
        for kind, reply in row["replies"].items():
            assert T.tone(reply, row) < 0.9, (kind, reply)
            kinds[kind] += 1
    assert set(kinds) == {"curt", "rude", "long", "sorry", "wrong"} and min(kinds.values()) > 200


@pytest.mark.parametrize("differ", ["reply", "fields"])
def test_pairs_differ_in_one_thing(differ):
    for row, pair in zip(ROWS["train"], T.pairs(ROWS["train"], differ), strict=True):
        chosen, rejected = (json.loads(pair[side][0]["content"]) for side in ("chosen", "rejected"))
        changed = {name for name in chosen if chosen[name] != rejected[name]}
        assert changed == ({"reply"} if differ == "reply" else {pair["kind"]})
        assert T.parse(pair["rejected"][0]["content"])[0] and pair["prompt"] == T.prompt(row)
    assert T.pairs(ROWS["train"][:9], differ, seed=1) == T.pairs(ROWS["train"][:9], differ, seed=1)


def test_pairs_of_something_else():
    with pytest.raises(ValueError, match="'reply' or 'fields'"):
        T.pairs([], "tone")
    with pytest.raises(ValueError, match="the splits are train"):
        T.load("dev")


# --- what reads the answers ----------------------------------------------------------------------


def test_order_and_spacing_of_the_json_do_not_matter():
    row = {**GOOD, "product": None}
    text = "\n " + json.dumps(dict(reversed(list(row.items()))), indent=2) + " \n"
    assert T.parse(text) == (row, "") and T.score(text, row) == 1.0
    assert T.by_field(text, GOOD) == {"intent": True, "order": True, "urgency": True, "product": False}


BAD = {
    "empty": "", "prose": "Sure! " + json.dumps(GOOD), "after": json.dumps(GOOD) + " Done.",
    "two": json.dumps(GOOD) * 2,
    "fenced": f"```json\n{json.dumps(GOOD)}\n```", "list": f"[{json.dumps(GOOD)}]", "text": '"refund"', "null": "null",
    "cut": json.dumps(GOOD)[:-1], "missing": json.dumps({k: v for k, v in GOOD.items() if k != "order"}),
    "more": json.dumps({**GOOD, "note": 1}), "intent": json.dumps({**GOOD, "intent": "Refund"}),
    "unhashable": json.dumps({**GOOD, "intent": ["refund"]}), "null intent": json.dumps({**GOOD, "intent": None}),
    "number": json.dumps({**GOOD, "order": 48312}), "short": json.dumps({**GOOD, "order": "4831"}),
    "other digits": json.dumps({**GOOD, "order": "\uff14\uff18\uff13\uff11\uff12"}),
    "newline": json.dumps({**GOOD, "order": "48312\n"}),
    "true": json.dumps({**GOOD, "product": True}), "NaN": json.dumps(GOOD).replace('"kettle"', "NaN"),
    "infinity": json.dumps(GOOD).replace('"kettle"', "-Infinity"), "blank reply": json.dumps({**GOOD, "reply": " "}),
    "twice": json.dumps(GOOD)[:-1] + ', "intent": "repair"}',
    "surrogate": json.dumps({**GOOD, "reply": "\ud800 thanks"}),
    "raw surrogate": json.dumps(GOOD).replace("Thank", "\udc80"), "nested": "[" * 1999, "nested object": '{"a":' * 399,
    "huge": json.dumps({**GOOD, "reply": "x" * 5_000_000}), "huge number": "9" * 1900,
    "BOM": "\ufeff" + json.dumps(GOOD),
    "nul": "\0" + json.dumps(GOOD), "single quotes": str(GOOD), "nested twice": '{"reply": {"a": 1, "a": 2}}',
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_no_other_text_parses(name):
    found, why = T.parse(BAD[name])
    assert found is None and 0 < len(why) < 200
    assert T.score(BAD[name], GOOD) == 0.0


def test_random_damage_never_raises():
    rng, text = random.Random(0), json.dumps(GOOD)
    for _ in range(3000):
        damaged = list(text)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.choice('{}[]",:\\ué0\ud83d\x00 nN-')
        found, why = T.parse("".join(damaged))
        assert (found is None) == bool(why)


def test_tone_by_hand():
    row = {"order": "48312", "product": "kettle"}
    assert T.tone("Thank you, we are checking order 48312.", row) == 1.0
    assert T.tone("Thank you, we are checking your kettle.", row) == 1.0
    assert T.tone("Thank you, we are checking order 48321.", row) == 0.8
    assert T.tone("Thank you, we are checking orders 48312 and 48321.", row) == 0.8
    assert T.tone("Thank you, we are checking it for you.", row) == 0.8
    assert T.tone("Thank you, we promise to check order 48312.", row) == 0.8
    assert T.tone("We are checking order 48312 for you.", row) == 0.8
    assert T.tone("Thanks. We are checking. Order 48312 is fine.", row) == 0.8
    assert T.tone("", row) == 0.4
    assert T.tone("a. " * 200_000, row) < 0.5
    nothing = {"order": None, "product": None}
    assert T.tone("Thank you, please send us the order number.", nothing) == 1.0
    assert T.tone("Thank you, we are checking order 48312.", nothing) == 0.8


def test_rewards_take_what_trainers_give():
    rows = ROWS["train"][:4]
    columns = {name: [row[name] for row in rows] for name in (*T.FIELDS, "shown")}
    said = [[{"role": "assistant", "content": row["completion"]}] for row in rows[:3]] + ["no"]
    for reward in (T.fields, T.tone_reward):
        values = reward(prompts=[None] * 4, completions=said, completion_ids=[], trainer_state=None, **columns)
        assert values == [1, 1, 1, 0]
    with pytest.raises(ValueError, match="lacks the columns product"):
        T.fields(completions=said, intent=[], order=[], urgency=[])


# --- how far keywords get ------------------------------------------------------------------------

KEYWORDS = {
    "complaint": ("complain", "rude", "badly"), "refund": ("refund", "money back", "return"),
    "cancel": ("cancel", "don't send", "stop the order"),
    "exchange": ("exchange", "swap", "replace"), "repair": ("repair", "fix", "broken", "mend"),
    "invoice": ("invoice", "receipt", "bill"),
    "address": ("address", "street", "deliver it to"), "tracking": ("where is", "when will", "arrive", "waiting"),
}  # fmt: skip
ANGRY = ("!", "fed up", "silly", "upset", "hurry")


def keywords(row) -> dict[str, str | None]:
    """Fields by the first keyword, the first number and the product's own name; the policy is not looked at."""
    text = message(row).lower()
    found = [intent for intent, words in KEYWORDS.items() if any(word in text for word in words)]
    number = re.search(r"\d{5}", text)
    return {
        "intent": found[0] if found else "complaint", "order": number[0] if number else None,
        "urgency": "high" if any(word in text for word in ANGRY) else "normal",
        "product": next((product for product in T.PRODUCTS if product in text), None),
    }  # fmt: skip


def test_keywords_leave_room():
    """The figures that the notebook states: `pytest -s` prints them."""
    for shown in (True, False):
        rows = [row for row in ROWS["test"] if row["shown"] == shown]
        right = [T.by_field(T.render(keywords(row), "Thank you."), row) for row in rows]
        share = {name: sum(fields[name] for fields in right) / len(rows) for name in T.FIELDS}
        most = {name: Counter(row[name] for row in rows).most_common(1)[0][1] / len(rows) for name in T.FIELDS}
        whole = sum(all(fields.values()) for fields in right) / len(rows)
        print(f"\nshown={shown}: keywords {share}, all four {whole}, majority {most}")
        mean = sum(share.values()) / len(share)
        assert (0.4 < mean < 0.8) if shown else (0.2 < mean < 0.6), share
        assert max(share.values()) < 0.9
