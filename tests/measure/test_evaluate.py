"""Figures against closed forms, exact enumeration and coverage by simulation."""

import itertools
import json
import math
import random

import pytest

from rlnb.measure import evaluate
from rlnb.model import load_model, sampling
from rlnb.task import problems

# --- comparing -----------------------------------------------------------------------------------


def report(strict, first=0):
    """A report with nothing but `strict`."""
    return evaluate.Report([{"id": f"p{first + i}", "strict": x} for i, x in enumerate(strict)])


def test_compare_counts_pairs_in_any_order():
    before = report([True, True, False, False, False])
    after = evaluate.Report(report([True, False, True, True, False]).rows[::-1])
    found = evaluate.compare(before, after)
    assert (found.gained, found.lost, found.n, found.mean) == (2, 1, 5, pytest.approx(0.2))
    # Agresti and Min: (2 - 1) / 7 -+ 1.96 / 7 * sqrt(2 + 1 + 1 - 1 / 7)
    assert found.low == pytest.approx(-0.407, abs=1e-3)
    assert found.high == pytest.approx(0.693, abs=1e-3)
    back = evaluate.compare(after, before)
    assert (back.mean, back.low, back.high) == (-found.mean, -found.high, -found.low)
    assert str(found) == "+20.0 points [-40.7, +69.3]; 2 gained, 1 lost of 5"


def test_compare_wants_the_same_problems():
    with pytest.raises(ValueError, match="in one report only: p0, p2"):
        evaluate.compare(report([True, True]), report([True, True], first=1))


# --- pass@k --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (6, 2, 3), (7, 4, 4), (4, 0, 2), (4, 4, 2)])
def test_pass_at_k_counts_the_draws(n, c, k):
    draws = list(itertools.combinations(range(n), k))
    hits = sum(any(i < c for i in draw) for draw in draws)
    assert evaluate.pass_at_k(n, c, k) == pytest.approx(hits / len(draws))


def test_pass_at_k_is_unbiased():
    p, n, k = 0.15, 12, 5
    mean = sum(
        math.comb(n, c) * p**c * (1 - p) ** (n - c) * evaluate.pass_at_k(n, c, k)
        for c in range(n + 1)
    )
    assert mean == pytest.approx(1 - (1 - p) ** k)


def test_pass_at_k_is_stable_for_many_samples():
    assert evaluate.pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_pass_at_k_out_of_range(n, c, k):
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
        evaluate.pass_at_k(n, c, k)


def test_the_bootstrap_covers_the_mean_over_problems():
    """40 problems of all difficulties, 8 samples each: 95 % of the intervals hold the truth."""
    rng, ks, rounds = random.Random(0), (1, 4), 200
    chances = [rng.betavariate(0.5, 1.0) for _ in range(20_000)]
    truth = {k: sum(1 - (1 - p) ** k for p in chances) / len(chances) for k in ks}
    covered = dict.fromkeys(ks, 0)
    for _ in range(rounds):
        drawn = (rng.betavariate(0.5, 1.0) for _ in range(40))
        counts = [sum(rng.random() < p for _ in range(8)) for p in drawn]
        rows = [{"id": str(i), "n": 8, "strict": c} for i, c in enumerate(counts)]
        found = evaluate.Passes(rows, ks).at("strict", resamples=400)
        for k in ks:
            covered[k] += found[k].low <= truth[k] <= found[k].high
    for k in ks:  # three standard errors below 0.93, what 40 problems can give
        assert covered[k] / rounds > 0.93 - 3 * math.sqrt(0.93 * 0.07 / rounds)
        assert covered[k] / rounds < 0.995


def test_the_bootstrap_of_equal_problems_has_no_width():
    rows = [{"id": str(i), "kind": "a", "n": 4, "strict": 4, "correct": 4} for i in range(7)]
    assert evaluate.Passes(rows, (2,)).strict == {2: evaluate.Estimate(1.0, 1.0, 1.0)}


# --- on the practice model -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def practice():
    return load_model("abacus-3m")


SOME = problems.load("validation")[:12]


def test_accuracy_grades_each_problem_by_its_own_completion(practice):
    model, tokens = practice
    found = evaluate.accuracy(model, tokens, SOME, progress=False)
    assert [row["id"] for row in found.rows] == [problem.id for problem in SOME]
    for problem, row in zip(SOME, found.rows, strict=True):
        grade = problems.grade(row["completion"], problem.question, problem.answer)
        assert [row[what] for what in ("format", "correct", "trace", "strict")] == [
            grade.format, grade.correct, grade.trace, grade.strict
        ]  # fmt: skip
    alone = sampling.sample(
        model, tokens, [problems.prompt(SOME[7])], temperature=0, max_new_tokens=evaluate.max_new_tokens()
    )
    assert found.rows[7]["completion"] == alone.texts[0][0]
    assert found.rows[7]["tokens"] == len(alone.ids[0][0])


def test_a_report_adds_up(practice):
    rows = [
        {"kind": kind, "steps": steps, "strict": s, "correct": c, "format": f, "tokens": t}
        for kind, steps, s, c, f, t in [
            ("b", 1, True, True, True, 10),
            ("a", 2, False, True, False, 20),
            ("b", 2, False, False, True, 60),
        ]
    ]
    found = evaluate.Report(rows)
    assert (found.strict.k, found.correct.k, found.format.k, found.mean_tokens) == (1, 2, 2, 30)
    assert list(found.by("kind")) == ["a", "b"]
    assert found.by("kind")["b"] == evaluate.Proportion(1, 2)
    assert found.by("steps", "correct") == {
        1: evaluate.Proportion(1, 1), 2: evaluate.Proportion(1, 2)
    }  # fmt: skip
    assert json.loads(json.dumps(found.summary())) == {
        "strict": {"k": 1, "n": 3},
        "correct": {"k": 2, "n": 3},
        "format": {"k": 2, "n": 3},
        "mean_tokens": 30.0,
    }
    assert str(found).startswith("strict 33.3 % [6.1, 79.2], correct 66.7 %")


def test_passes_counts_right_samples(practice):
    model, tokens = practice
    settings = {"seed": 4, "temperature": 0.8, "max_new_tokens": 64, "progress": False}
    found = evaluate.passes(model, tokens, SOME, 8, (1, 4, 8), **settings)
    texts = sampling.sample(model, tokens, [problems.prompt(p) for p in SOME], 8, **settings).texts
    for problem, row, group in zip(SOME, found.rows, texts, strict=True):
        grades = [problems.grade(text, problem.question, problem.answer) for text in group]
        assert row["strict"] == sum(grade.strict for grade in grades)
        assert row["correct"] == sum(grade.correct for grade in grades)
    rates = [found.correct[k].mean for k in (1, 4, 8)]
    assert rates == sorted(rates) and rates[-1] > rates[0]
    assert rates[0] == pytest.approx(sum(row["correct"] for row in found.rows) / (8 * len(SOME)))
    assert all(e.low <= e.mean <= e.high for e in found.correct.values())
    assert found.correct == found.at("correct")  # the bootstrap has a seed


def test_sizes_follow_the_profile(monkeypatch):
    for profile, problems_, tokens in (("cpu", 500, 64), ("gpu", 500, 256), ("smoke", 16, 32)):
        monkeypatch.setenv("RLNB_PROFILE", profile)
        assert len(evaluate.held_out()) == problems_ and evaluate.max_new_tokens() == tokens
    assert evaluate.held_out("larger", 7) == problems.load("larger")[:7]


def test_nothing_to_evaluate(practice):
    for function in (evaluate.accuracy, evaluate.passes):
        with pytest.raises(ValueError, match="no problems"):
            function(*practice, [])
    with pytest.raises(ValueError, match="n=4, c=0, k=8"):
        evaluate.passes(*practice, SOME, 4, (1, 8))
