"""rlnb.data.annotators: each against its closed form or its rate."""

import random
from collections import Counter

import pytest

from rlnb.data import preferences
from rlnb.data.annotators import Clarity, LengthBiased, Noisy, Verifier
from tests.rows import ANSWER, LOOSE, QUESTION, RIGHT, WRONG, Fixed, row


def judged(*responses, annotator=None, id="a"):
    return preferences.annotate([row(*responses, id=id)], annotator or Verifier())


def test_the_verifier_ranks_by_what_is_strictly_right():
    (found,) = judged(WRONG, RIGHT, LOOSE, RIGHT)
    assert found["scores"] == [0, 1, 0, 1]
    assert found["ranks"] == [2, 1, 2, 1]
    assert found["comparisons"] == [
        [0, 1, -1], [0, 2, 0], [0, 3, -1], [1, 2, 1], [1, 3, 0], [2, 3, -1],
    ]  # fmt: skip
    assert found["annotator"] == "gold" and found["responses"] == [WRONG, RIGHT, LOOSE, RIGHT]


def test_ranks_follow_the_scores_whatever_they_are():
    scores = [0.5, -3.0, 2.0, 0.5, 7.0]
    (found,) = judged(*"abcde", annotator=Fixed(**dict(zip("abcde", scores, strict=True))))
    assert found["ranks"] == [3, 4, 2, 3, 1]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 1.0])
def test_the_noisy_one_flips_at_its_rate_and_keeps_ties(rate):
    rows = [row(RIGHT, WRONG, LOOSE, id=str(i)) for i in range(1000)]
    flips = Counter()
    for found in preferences.annotate(rows, Noisy(rate), seed=3):
        verdicts = {(i, j): c for i, j, c in found["comparisons"]}
        assert verdicts[1, 2] == 0
        flips.update([verdicts[0, 1] == -1, verdicts[0, 2] == -1])
        assert found["scores"] is None
    spread = (2000 * rate * (1 - rate)) ** 0.5
    assert abs(flips[True] - 2000 * rate) <= 4 * spread


def test_verdicts_depend_on_the_seed_and_the_row_only():
    rows = [row(RIGHT, WRONG, id=str(i)) for i in range(64)]
    noisy = Noisy(0.5)
    found = preferences.annotate(rows, noisy, seed=1)
    assert preferences.annotate(rows[::-1], noisy, seed=1) == found[::-1]
    assert preferences.annotate(rows, noisy, seed=2) != found
    assert preferences.annotate(rows, Noisy(0.5, name="other"), seed=1) != found


def test_length_outweighs_being_wrong_at_the_weight_that_it_says():
    long = WRONG.replace("12 - 5 = 7", "12 - 5 = 7; 7 - 0 = 7")
    gap = (len(long) - len(RIGHT)) / 10  # in tens of characters
    for weight, better in ((0.9 / gap, 0), (1.1 / gap, 1)):
        (found,) = judged(RIGHT, long, annotator=LengthBiased(weight))
        assert found["ranks"][better] == 1 and found["ranks"][1 - better] == 2
    (found,) = judged("a" * 10, "a" * 30, annotator=LengthBiased(0.5))
    assert found["scores"] == [0.5, 1.5]


def test_clarity_by_its_rubric():
    judge = Clarity(correctness=2, clarity=1, format=1, detail=0.25)
    found = judge.dimensions(QUESTION, ANSWER, RIGHT)
    clarity = 0.25 / 3 + 0.75 * (1 - len(RIGHT) / 200)
    assert found == pytest.approx({"correctness": 1, "clarity": clarity, "format": 1})
    assert judge.score(QUESTION, ANSWER, RIGHT) == pytest.approx((2 + clarity + 1) / 4)
    twice = LOOSE + "; " + LOOSE
    found = judge.dimensions(QUESTION, ANSWER, twice + "<answer>")
    clarity = (0.25 * 2 / 3 + 0.75 * (1 - len(twice + "<answer>") / 200)) / 2
    assert found["clarity"] == pytest.approx(clarity) and found["format"] == 1 / 8
    found = judge.dimensions(QUESTION, ANSWER, "x" * 300)
    assert found == {"correctness": 0, "clarity": 0, "format": 0}
    assert judge.dimensions(QUESTION, ANSWER, "It is 17.")["correctness"] == 0.5


def test_one_dimension_alone_and_tastes_that_differ():
    short, long = LOOSE, RIGHT + " I added 12 and 5, so 12 + 5 = 17 and 17 - 5 = 12."
    brief, thorough = (Clarity(0, 1, 0, detail=detail) for detail in (0, 1))
    assert judged(short, long, annotator=brief)[0]["ranks"] == [1, 2]
    assert judged(short, long, annotator=thorough)[0]["ranks"] == [2, 1]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Noisy(1.1), "rate is 1.1: it must be between 0 and 1"),
        (lambda: Noisy(float("nan")), "rate is nan"),
        (lambda: Clarity(0, 0, 0), r"the weights are \(0, 0, 0\)"),
        (lambda: Clarity(-1), "none below 0"),
        (lambda: Clarity(detail=2), "detail is 2"),
        (lambda: judged(RIGHT, annotator=LengthBiased(of=Noisy())), "Noisy .* has no scores"),
        (lambda: judged("a", annotator=Fixed(a=float("nan"))), r"row a: fixed scores \[nan\]"),
    ],
)
def test_an_annotator_that_cannot_work(make, says):
    with pytest.raises((ValueError, NotImplementedError), match=says):
        make()


def test_an_annotator_of_ones_own_needs_a_score_only():
    assert Fixed(a=1, b=2).judge(row("a", "b"), random.Random(0)) == ([(0, 1, -1)], [1, 2])
