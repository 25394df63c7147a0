"""rlnb.data.agreement: kappa against published tables, circles and biases against hand-made cases."""

import math
import random

import pytest

from rlnb.data import preferences, agreement as quality
from rlnb.data.annotators import Annotator, Clarity, Verifier, LengthBiased, Noisy
from rlnb.measure.evaluate import Proportion
from tests.rows import RIGHT, row

# Fleiss 1971, Psychol. Bull. 76, table 1: 30 patients, 6 psychiatrists, 5 diagnoses. Kappa 0.430.
FLEISS = """
    00060 03003 01401 00006 03030 20400 00402 20310 20040 00006 10050 11040 03300 10050 02031
    00501 30012 51000 02040 10203 00006 01050 02013 20040 10041 05010 40002 02040 10500 00006
"""
COUNTS = [[int(digit) for digit in item] for item in FLEISS.split()]


def annotated(comparisons, *responses, id="a"):
    return preferences.judged(row(*responses, id=id), "me", comparisons)


# --- kappa ---------------------------------------------------------------------------------------


def test_cohen_by_hand():
    # 50 items: 20 both yes, 15 both no, 5 and 10 apart. p = 0.7, e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5.
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    found = quality.cohen(first, second)
    assert found.value == pytest.approx(0.4) and found.n == 50
    assert quality.cohen(second, first).value == pytest.approx(0.4)
    # 3 labels: p = 6 / 9, e = (4 * 3 + 3 * 3 + 2 * 3) / 81 = 1 / 3.
    found = quality.cohen("aaaabbbcc", "aaabbbccc")
    assert found.value == pytest.approx((7 / 9 - 1 / 3) / (1 - 1 / 3))


@pytest.mark.parametrize(
    ("first", "second", "value"),
    [
        ([1, 0, -1, 1], [1, 0, -1, 1], 1.0),
        ([1, 0, 1, 0], [0, 1, 0, 1], -1.0),
        ([1, 1, 0, 0], [1, 0, 1, 0], 0.0),
        ([1, 1, 1, 1], [1, 1, 0, 0], 0.0),
        ([1, 1, 1], [1, 1, 1], math.nan),  # no other label was used: 0 / 0
    ],
)
def test_cohen_at_its_ends(first, second, value):
    found = quality.cohen(first, second)
    assert found.value == pytest.approx(value, nan_ok=True)
    assert math.isnan(value) == math.isnan(found.low) == math.isnan(found.high)


def test_fleiss_on_his_own_table():
    assert [sum(column) for column in zip(*COUNTS, strict=True)] == [
        26,
        26,
        30,
        55,
        43,
    ]  # as he says
    found = quality.fleiss(COUNTS)
    assert found.value == pytest.approx(0.430, abs=5e-4) and found.n == 30
    assert quality.fleiss([[6, 0], [0, 6]]).value == 1
    # Two annotators: each item agrees or not. P = 1/2; both labels have half: e = 1/2.
    assert quality.fleiss([[2, 0], [0, 2], [1, 1], [1, 1]]).value == pytest.approx(0)
    assert math.isnan(quality.fleiss([[3, 0], [3, 0]]).value)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    # Labels are fair coins; the second annotator copies 60 % and tosses a coin else: kappa is 0.6.
    rng, hits = random.Random(1), 0
    for seed in range(200):
        first = rng.choices((0, 1), k=150)
        second = [a if rng.random() < 0.6 else rng.randrange(2) for a in first]
        found = quality.cohen(first, second, seed=seed)
        hits += found.low <= 0.6 <= found.high
    assert hits / 200 == pytest.approx(0.95, abs=0.045)


def test_whole_groups_are_drawn():
    first, second = [0, 1, 0, 1, 0, 0, 1, 1] * 5, [0, 1, 0, 1, 1, 0, 0, 1] * 5
    alone = quality.cohen(first, second)
    copied = quality.cohen(first * 4, second * 4, groups=list(range(40)) * 4)
    assert copied.value == pytest.approx(alone.value)
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high))  # no more is known
    assert quality.cohen(first * 4, second * 4).low > copied.low
    assert math.isnan(quality.cohen(first, second, groups=[0] * 40).low)
    assert str(quality.Kappa(0.4, 0.251, 0.549, 50)) == "0.40 [0.25, 0.55]"


def test_labels_that_do_not_fit_together():
    with pytest.raises(ValueError, match="2 and 1 labels"):
        quality.cohen([1, 0], [1])
    with pytest.raises(ValueError, match="0 and 0 labels"):
        quality.cohen([], [])
    with pytest.raises(ValueError, match="2 and 2 labels, 3 groups"):
        quality.cohen([1, 0], [1, 0], groups=[1, 2, 3])
    with pytest.raises(ValueError, match="item 1 has 3 labels and item 0 has 2"):
        quality.fleiss([[1, 1], [2, 1]])
    with pytest.raises(ValueError, match=r"item 0 has 1 labels .* two or more"):
        quality.fleiss([[1, 0], [0, 1]])


# --- agreement -----------------------------------------------------------------------------------


def both(first, second):
    return quality.agreement({"one": first, "other": second})


def test_agreement_of_two_and_of_all():
    rows = [row(RIGHT, f"{i} + 1 = 17", f"It is {i}", id=str(i)) for i in range(60)]
    gold, noisy, other = (
        preferences.annotate(rows, a) for a in (Verifier(), Noisy(0.2), Noisy(0.2, name="other"))
    )
    table = quality.agreement({"gold": gold, "noisy": noisy, "other": other})
    assert [line["annotators"] for line in table] == [
        "gold, noisy", "gold, other", "noisy, other", "gold, noisy, other",
    ]  # fmt: skip
    assert [line["kappa of"] for line in table] == ["Cohen"] * 3 + ["Fleiss"]
    flips = sum(a != b for x, y in zip(gold, noisy, strict=True)
                for a, b in zip(x["comparisons"], y["comparisons"], strict=True))  # fmt: skip
    assert table[0]["agree"] == Proportion(180 - flips, 180)
    assert table[0]["kappa"].low < table[0]["kappa"].value < table[0]["kappa"].high < 1
    assert quality.agreement({"gold": gold, "again": gold})[0]["kappa"].value == 1
    decided = quality.agreement({"gold": gold, "noisy": noisy}, ties=False)[0]
    assert decided["agree"] == Proportion(120 - flips, 120)
    for text in (str(table), table._repr_html_()):
        assert "gold, noisy, other" in text and str(table[0]["agree"]) in text


def test_agreement_is_on_the_same_texts_wherever_they_stand():
    mine = [annotated([(0, 1, 1)], "x", "y"), annotated([(0, 1, 0)], "x", "z", id="b")]
    theirs = [annotated([(0, 1, 1), (0, 2, -1), (1, 2, -1)], "z", "y", "x")]
    (line,) = quality.agreement({"me": mine, "you": theirs})
    assert line["comparisons"] == 1 and line["agree"] == Proportion(1, 1)
    with pytest.raises(ValueError, match="me, you have no comparison in common"):
        quality.agreement({"me": mine[1:], "you": theirs})
    with pytest.raises(ValueError, match="two annotations or more, not 1"):
        quality.agreement({"me": mine})


def test_kappa_does_not_depend_on_which_text_comes_first():
    turned = [3, 17, 18, 20, 44]  # in these, the second annotator disagrees
    first, second, mixed = [], [], []
    for i in range(60):
        won, said = [(0, 1, 1)], [(0, 1, -1 if i in turned else 1)]
        first.append(annotated(won, "x", "y", id=str(i)))
        second.append(annotated(said, "x", "y", id=str(i)))
        swapped = annotated([(0, 1, -1)], "y", "x", id=str(i))
        mixed.append(swapped if i % 2 else first[-1])
    (line,), (other,) = both(first, second), both(mixed, second)
    assert line["kappa"] == other["kappa"] and line["kappa"].n == 60
    assert line["kappa"].value == pytest.approx(2 * 55 / 60 - 1)  # as chance is a half
    assert line["kappa"].low < 2 * 55 / 60 - 1 < line["kappa"].high
    assert both(first, mixed)[0]["kappa"].value == 1
    tied = [annotated([(0, 1, 0)], "x", "y", id=str(i)) for i in range(60)]
    assert math.isnan(both(tied, tied)[0]["kappa"].value)


def test_subjective_dimensions_agree_less():
    rng, rows = random.Random(2), []
    for i in range(80):
        texts = [RIGHT, f"It is {rng.choice([17, 7])}", f"12 + 5 = 17{' so' * rng.randrange(9)}"]
        rows.append(row(*texts, f"12 - 5 = 7; 7 + 0 = {rng.choice([7, 17])}", id=str(i)))
    kappa = {}
    for name in ("correctness", "clarity", "format"):
        only = {n: float(n == name) for n in ("correctness", "clarity", "format")}
        brief, thorough = (Clarity(**only, detail=d, name=str(d)) for d in (0.2, 0.8))
        (line,) = both(*(preferences.annotate(rows, a) for a in (brief, thorough)))
        kappa[name] = line["kappa"]
    assert kappa["correctness"].value == kappa["format"].value == 1
    assert kappa["clarity"].high < 0.8


# --- reports -------------------------------------------------------------------------------------


def test_circles_by_hand():
    circle = annotated([(0, 1, 1), (1, 2, 1), (0, 2, -1)], "x", "y", "z")
    order = annotated([(0, 1, 1), (1, 2, 1), (0, 2, 1)], "x", "y", "z", id="b")
    tied = annotated([(0, 1, 1), (1, 2, 0), (0, 2, -1)], "x", "y", "z", id="c")
    assert quality.intransitive([circle, order, tied]) == Proportion(1, 2)
    assert quality.intransitive([tied]) is None
    # In a four-cycle with its chords 0 > 2 and 1 > 3, triples 013 and 023 are circles.
    four = [(0, 1, 1), (1, 2, 1), (2, 3, 1), (0, 3, -1), (0, 2, 1), (1, 3, 1)]
    assert quality.intransitive([annotated(four, *"wxyz")]) == Proportion(2, 4)


def test_a_quarter_of_random_triples_are_circles():
    class Ordered(Annotator):
        name = "ordered"

        def score(self, question, answer, response):
            return float(response)

    rows = [row(*"12345", id=str(i)) for i in range(300)]
    found = quality.intransitive(preferences.annotate(rows, Noisy(0.5, of=Ordered())))
    assert found.n == 3000 and abs(found.mean - 0.25) < 0.04
    assert quality.intransitive(preferences.annotate(rows, Ordered())).k == 0


def test_a_report_on_annotations():
    rows = [
        annotated([(0, 1, 1), (0, 2, 0), (1, 2, 1)], RIGHT, "17", "17"),
        annotated([(0, 1, -1)], "no", "long, and no", id="b"),
        annotated([(0, 1, 1)], "yes", "maybe", id="c"),
    ]
    found = quality.measure(rows)
    assert found["prompts"] == 3 and found["comparisons"] == 5 and found["of equal texts"] == 1
    assert found["ties"] == Proportion(1, 5)
    assert found["longer wins"] == Proportion(2, 3)  # the two "17" are of one length
    assert found["longer wins, equally right"] == Proportion(1, 2)
    assert found["chosen, characters"] == pytest.approx((len(RIGHT) + 2 + 12 + 3) / 4, abs=0.05)
    assert found["rejected, characters"] == pytest.approx((2 + 2 + 2 + 5) / 4, abs=0.05)


def test_a_length_bias_shows():
    rng = random.Random(4)
    rows = [row("x" * rng.randint(1, 40), "y" * rng.randint(1, 40), RIGHT, id=str(i))
            for i in range(200)]  # fmt: skip
    gold, biased = (preferences.annotate(rows, a) for a in (Verifier(), LengthBiased(0.5)))
    table = quality.report({"gold": gold, "length-biased": biased})
    lines = {line[""]: line for line in table}
    assert lines["longer wins, equally right"]["gold"] is None  # all of those are ties
    assert lines["longer wins, equally right"]["length-biased"].low > 0.95
    assert lines["ties"]["gold"] == Proportion(200, 600)
    for text in (str(table), table._repr_html_()):
        assert "length-biased" in text and str(lines["ties"]["gold"]) in text


def test_a_report_on_pairs():
    def pair(prompt, chosen, rejected):
        says = {"prompt": ("user", prompt), "chosen": ("assistant", chosen),
                "rejected": ("assistant", rejected)}  # fmt: skip
        return {column: [{"role": r, "content": c}] for column, (r, c) in says.items()}

    rows = [
        pair("p", "aaa", "b"),
        pair("p", "aaa", "b"),
        pair("p", "b", "aaa"),
        pair("q", "a", "b"),
    ]
    assert quality.measure(rows) == {
        "prompts": 2, "pairs": 4, "duplicates": 1, "contradictions": 1,
        "longer wins": Proportion(2, 3), "chosen, characters": 2.0, "rejected, characters": 1.5,
    }  # fmt: skip


def test_a_report_on_labels():
    def label(prompt, text, good):
        return {"prompt": [{"role": "user", "content": prompt}], "label": good,
                "completion": [{"role": "assistant", "content": text}]}  # fmt: skip

    rows = [label("p", "aaa", True), label("p", "aaa", True), label("p", "aaa", False),
            label("q", "a", True)]  # fmt: skip
    assert quality.measure(rows) == {
        "prompts": 2, "labels": 4, "good": Proportion(3, 4), "duplicates": 1, "contradictions": 1,
        "good, characters": 2.3, "bad, characters": 3.0,
    }  # fmt: skip


def test_a_report_on_what_trainers_get():
    ranked = preferences.annotate([row(RIGHT, "17", id=str(i)) for i in range(3)], Verifier())
    pairs, _ = preferences.pairs(ranked)
    table = quality.report({"pairs": pairs, "labels": preferences.unpair(pairs)})
    values = {line[""]: (line["pairs"], line["labels"]) for line in table}
    assert values["pairs"] == (3, None) and values["good"] == (None, Proportion(3, 6))


def test_a_report_on_something_else():
    with pytest.raises(ValueError, match="columns prompt: comparisons, or chosen and rejected"):
        quality.measure([{"prompt": []}])
    with pytest.raises(ValueError, match="columns none"):
        quality.measure([])
    with pytest.raises(ValueError, match="none of the 1 rows has a comparison"):
        quality.measure([annotated([], "x")])
