"""rlnb.measure.agreement: kappa against published tables, circles and biases against hand-made cases."""

import math
import random

import pytest

from rlnb.data import preferences
from rlnb.data.annotators import Clarity, LengthBiased, Noisy, Verifier
from rlnb.measure import agreement
from rlnb.measure.intervals import Proportion
from tests.rows import RIGHT, row

def annotated(comparisons, *responses, id="a"):
    return preferences.judged(row(*responses, id=id), "me", comparisons)


# --- kappa ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("equal", "value"), [([1, 1, 1], 1.0), ([0, 0], -1.0), ([1, 0], 0.0), ([1, 1, 1, 0], 0.5)])
def test_kappa_is_that_of_statsmodels_with_both_orders_counted(equal, value):
    from statsmodels.stats.inter_rater import cohens_kappa

    same, other = sum(equal), len(equal) - sum(equal)
    found = agreement.kappa(equal, range(len(equal)))
    assert found.value == pytest.approx(value)
    assert found.value == pytest.approx(cohens_kappa([[same, other], [other, same]], return_results=False))


def test_the_interval_holds_the_truth_as_often_as_it_says():
    # Verdicts are fair coins; the second annotator copies 60 % and tosses a coin else: kappa is 0.6.
    rng, hits = random.Random(1), 0
    for seed in range(200):
        equal = [rng.random() < 0.6 or rng.random() < 0.5 for _ in range(150)]
        found = agreement.kappa(equal, range(150), seed=seed)
        hits += found.low <= 0.6 <= found.high
    assert hits / 200 == pytest.approx(0.95, abs=0.045)


def test_whole_prompts_are_drawn():
    equal = [1, 1, 1, 1, 0, 1, 0, 1] * 5
    alone = agreement.kappa(equal, range(40))
    copied = agreement.kappa(equal * 4, list(range(40)) * 4)
    assert copied.value == pytest.approx(alone.value)
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high))  # no more is known
    assert agreement.kappa(equal * 4, range(160)).low > copied.low
    assert math.isnan(agreement.kappa(equal, [0] * 40).low)
    assert str(agreement.Kappa(0.4, 0.251, 0.549)) == "0.40 [0.25, 0.55]"


# --- agreement -----------------------------------------------------------------------------------


def both(first, second):
    return agreement.agreement({"one": first, "other": second}).loc[0]


def test_agreement_of_each_two():
    rows = [row(RIGHT, f"{i} + 1 = 17", f"It is {i}", id=str(i)) for i in range(60)]
    gold, noisy, other = (
        preferences.annotate(rows, a) for a in (Verifier(), Noisy(0.2), Noisy(0.2, name="other"))
    )
    table = agreement.agreement({"gold": gold, "noisy": noisy, "other": other})
    assert list(table.columns) == ["annotators", "comparisons", "agree", "kappa"]
    assert list(table["annotators"]) == ["gold, noisy", "gold, other", "noisy, other"]
    flips = sum(a != b for x, y in zip(gold, noisy, strict=True)
                for a, b in zip(x["comparisons"], y["comparisons"], strict=True))  # fmt: skip
    first = table.loc[0]
    assert first["agree"] == Proportion(120 - flips, 120) and first["comparisons"] == 120
    assert first["kappa"].low < first["kappa"].value < first["kappa"].high < 1
    assert agreement.agreement({"gold": gold, "again": gold})["kappa"][0].value == 1
    for text in (table.to_string(), table._repr_html_()):
        assert str(first["agree"]) in text and str(first["kappa"]) in text


def test_agreement_is_on_the_same_texts_wherever_they_stand():
    mine = [annotated([(0, 1, 1)], "x", "y"), annotated([(0, 1, 1)], "x", "z", id="b")]
    theirs = [annotated([(0, 1, 1), (0, 2, -1), (1, 2, -1)], "z", "y", "x")]
    line = agreement.agreement({"me": mine, "you": theirs}).loc[0]
    assert line["comparisons"] == 1 and line["agree"] == Proportion(1, 1)
    with pytest.raises(ValueError, match="me, you have no comparison in common"):
        agreement.agreement({"me": mine[1:], "you": theirs})
    with pytest.raises(ValueError, match="two annotations or more, not 1"):
        agreement.agreement({"me": mine})


def test_kappa_does_not_depend_on_which_text_comes_first():
    turned = [3, 17, 18, 20, 44]  # in these, the second annotator disagrees
    first, second, mixed = [], [], []
    for i in range(60):
        won, said = [(0, 1, 1)], [(0, 1, -1 if i in turned else 1)]
        first.append(annotated(won, "x", "y", id=str(i)))
        second.append(annotated(said, "x", "y", id=str(i)))
        swapped = annotated([(0, 1, -1)], "y", "x", id=str(i))
        mixed.append(swapped if i % 2 else first[-1])
    line, other = both(first, second), both(mixed, second)
    assert line["kappa"] == other["kappa"] and line["comparisons"] == 60
    assert line["kappa"].value == pytest.approx(2 * 55 / 60 - 1)  # as chance is a half
    assert line["kappa"].low < 2 * 55 / 60 - 1 < line["kappa"].high
    assert both(first, mixed)["kappa"].value == 1
    tied = [annotated([(0, 1, 0)], "x", "y", id=str(i)) for i in range(60)]
    with pytest.raises(ValueError, match="no comparison in common"):
        both(tied, tied)


def test_subjective_dimensions_agree_less():
    rng, rows = random.Random(2), []
    for i in range(80):
        texts = [RIGHT, f"It is {rng.choice([17, 7])}", f"12 + 5 = 17{' so' * rng.randrange(9)}"]
        rows.append(row(*texts, f"12 - 5 = 7; 7 + 0 = {rng.choice([7, 17])}", id=str(i)))
    kappa = {}
    for name in ("correctness", "clarity", "format"):
        only = {n: float(n == name) for n in ("correctness", "clarity", "format")}
        brief, thorough = (Clarity(**only, detail=d, name=str(d)) for d in (0.2, 0.8))
        line = both(*(preferences.annotate(rows, a) for a in (brief, thorough)))
        kappa[name] = line["kappa"]
    assert kappa["correctness"].value == kappa["format"].value == 1
    assert kappa["clarity"].high < 0.8


# --- reports -------------------------------------------------------------------------------------


def test_a_report_on_annotations():
    rows = [
        annotated([(0, 1, 1), (0, 2, 0), (1, 2, 1)], RIGHT, "17", "17"),
        annotated([(0, 1, -1)], "no", "long, and no", id="b"),
        annotated([(0, 1, 1)], "yes", "maybe", id="c"),
    ]
    found = agreement.measure(rows)
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
    table = agreement.report({"gold": gold, "length-biased": biased})
    assert table.loc["longer wins, equally right", "gold"] == ""  # all of those are ties
    assert table.loc["longer wins, equally right", "length-biased"].low > 0.95
    assert table.loc["ties", "gold"] == Proportion(200, 600)
    for text in (table.to_string(), table._repr_html_()):
        assert "length-biased" in text and "33.3 % [29.7, 37.2]" in text


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
    assert agreement.measure(rows) == {
        "prompts": 2, "pairs": 4, "duplicates": 1, "contradictions": 1,
        "longer wins": Proportion(2, 3), "chosen, characters": 2.0, "rejected, characters": 1.5,
    }  # fmt: skip


def test_a_report_on_what_trainers_get():
    ranked = preferences.annotate([row(RIGHT, "17", id=str(i)) for i in range(3)], Verifier())
    table = agreement.report({"annotations": ranked, "pairs": preferences.pairs(ranked)[0]})
    assert list(table.loc["pairs"]) == ["", 3] and list(table.loc["ties"]) == [Proportion(0, 3), ""]


def test_a_report_on_something_else():
    with pytest.raises(ValueError, match=r"columns {'prompt'}: comparisons, or chosen and rejected are"):
        agreement.measure([{"prompt": []}])
    with pytest.raises(ValueError, match="columns none"):
        agreement.measure([])
    with pytest.raises(ValueError, match="0 successes in 0 trials"):
        agreement.measure([annotated([], "x")])
