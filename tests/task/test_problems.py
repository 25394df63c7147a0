"""The task: its splits do not overlap, its files come out byte for byte, its solutions are right."""

import random

import pytest

from rlnb.task import problems as P

# --- the splits ----------------------------------------------------------------------------------


def test_no_problem_is_in_two_splits():
    seen = {}
    for split in P.SIZES:
        for problem in P.load(split):
            assert problem.key not in seen, f"{problem.id} repeats {seen[problem.key]}"
            seen[problem.key] = problem.id
    questions = {problem.question for split in P.SIZES for problem in P.load(split)}
    assert len(questions) == len(seen)


def test_new_names_and_wording_are_new():
    train = " ".join(p.question for split in ("train", "demonstrations") for p in P.load(split))
    for name in P._TEXT["people_new"].split():
        assert name.split(":")[0] not in train
    for word in ("apiece", "What number of", "What is the total", *P._TEXT["things_new"].split()):
        assert word not in train


def test_files_come_out_byte_for_byte(tmp_path):
    P.write_data(tmp_path)
    for split in P.SIZES:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (
            P.DATA / f"{split}.jsonl"
        ).read_bytes()


def test_sizes_steps_and_answers():
    assert {s: len(P.load(s)) for s in P.SIZES} == P.SIZES
    train = P.load("train")
    assert {p.steps for p in train} == {1, 2, 3}
    assert {p.steps for p in P.load("deeper")} == {4, 5}
    rng = random.Random(0)
    drawn = {P.draw(rng.choice(P.ID_KINDS), rng).answer for _ in range(20_000)}
    assert len(drawn) >= 1000  # so that guessing does not pay
    assert {p.kind for p in P.load("demonstrations")} == set(P.DEMONSTRATED)


def test_larger_numbers_are_larger_and_the_rule_is_changed():
    largest = {}
    for p in P.load("train"):
        largest[p.kind] = max(largest.get(p.kind, 0), *p.numbers.values())
    assert all(
        max(p.numbers.values()) > largest[p.kind] for p in P.load("larger") if p.kind != "dozen"
    )
    for p in P.load("rule"):
        unit = P.KINDS[p.kind]["unit"]
        assert p.numbers["U"] != P.UNITS[unit]
        assert f"a {unit}" in p.question and str(p.numbers["U"]) in p.question


def test_same_seed_same_problems():
    assert P.generate("train", 50, seed=3) == P.generate("train", 50, seed=3)
    assert P.generate("train", 50, seed=3) != P.generate("train", 50, seed=4)


def test_unknown_split_kind_and_too_many_are_named():
    with pytest.raises(ValueError, match=r"split is 'tset'; the splits are id, "):
        P.generate("tset", 1)
    with pytest.raises(ValueError, match=r"kinds is \('gian',\): there is no kind of problem but gain, loss"):
        P.generate("train", 1, kinds=["gian"])
    with pytest.raises(ValueError, match=r"of 5000 different problems"):
        P.generate("train", 5000, kinds=["groups"])


def test_a_split_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match=r"no split 'tset'.*there are id, templates"):
        P.load("tset")


def test_models_that_know_no_format_are_told_it(monkeypatch):
    problem = P.load("train")[0]
    user = {"role": "user", "content": problem.question}
    monkeypatch.setenv("RLNB_MODEL", "abacus-3m")
    assert P.prompt(problem) == [user]
    monkeypatch.setenv("RLNB_MODEL", "some/model")
    assert P.prompt(problem) == [{"role": "system", "content": P.SYSTEM}, user]
    assert P.prompt(problem, "") == [user]
    assert P.prompt(problem, "Be brief.")[0] == {"role": "system", "content": "Be brief."}


# --- gold and careless ---------------------------------------------------------------------------


@pytest.mark.parametrize("split", P.SIZES)
def test_gold_is_right_and_careless_is_wrong(split):
    for p in P.load(split):
        assert P.grade(P.solution(p), p.question, p.answer) == P.Grade(
            True, p.answer, True, True, True
        )
        wrong = P.careless(p)
        grade = P.grade(P.render(wrong, int(wrong[-1].split()[-1])), p.question, p.answer)
        assert grade.format and not grade.correct and not grade.strict
