"""The task: its splits do not overlap, its files come out byte for byte, its grader holds against hostile text."""

import random
import time

import pytest

from rlnb.task import problems as P

QUESTION = (
    "Mia has 12 apples. She gets 30 more and gives 5 to Leo. How many apples does she have left?"
)
GOLD = "<reasoning>12 + 30 = 42; 42 - 5 = 37</reasoning><answer>37</answer>"


def strict(text: str) -> bool:
    return P.grade(text, QUESTION, 37).strict


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
    with pytest.raises(ValueError, match=r"no kind of problem \['gian'\]"):
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


# --- the grader ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        GOLD,
        f"  {GOLD}\n",
        "<reasoning>\n12 + 30 = 42\n42 - 5 = 37\n</reasoning>\n<answer>\n37\n</answer>",
        "<reasoning>First she has 12 + 30 = 42 apples. Then 42-5=37.</reasoning><answer>37</answer>",
        "<reasoning>30 + 12 = 42; 42 - 5 = 37</reasoning><answer>37</answer>",
        "<reasoning>12 - 5 = 7; 7 + 30 = 37</reasoning><answer>37</answer>",  # another sound way
    ],
)
def test_strict_accepts(text):
    assert strict(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "37",
        "<answer>37</answer>",
        "<reasoning></reasoning><answer>37</answer>",  # no trace
        "<reasoning>I just know.</reasoning><answer>37</answer>",
        "<reasoning>12 + 30 = 42</reasoning><answer>37</answer>",  # the trace ends elsewhere
        "<reasoning>12 + 30 = 43; 43 - 6 = 37</reasoning><answer>37</answer>",  # false, made-up 6
        "<reasoning>12 + 30 = 41; 42 - 5 = 37</reasoning><answer>37</answer>",  # false equation
        "<reasoning>36 + 1 = 37</reasoning><answer>37</answer>",  # numbers from nowhere
        GOLD + "<answer>38</answer>",  # two answers
        GOLD + GOLD,
        GOLD.replace("37</answer>", "37 or 38</answer>"),
        GOLD.replace("</answer>", ""),  # unclosed
        GOLD.replace("<answer>", "<answer><answer>"),  # nested
        "<answer>37</answer><reasoning>12 + 30 = 42; 42 - 5 = 37</reasoning>",  # wrong order
        "<reasoning>12 + 30 = 42; <answer>37</answer> 42 - 5 = 37</reasoning><answer>37</answer>",
        "<reasoning>12 + 30 = 42; 42 - 5 = 37<answer>37</answer></reasoning>",  # tags in the trace
        "Sure! " + GOLD,
        GOLD + " apples",
        GOLD.upper(),
        GOLD.replace(">37<", ">037<"),
        GOLD.replace(">37<", ">37.0<"),
        GOLD.replace(">37<", ">+37<"),
        GOLD.replace(">37<", ">３７<"),  # full-width digits  # noqa: RUF001
        GOLD.replace(">37<", ">٣٧<"),
        GOLD.replace(">37<", ">thirty-seven<"),
        GOLD.replace("42 - 5", "4２ - 5"),  # noqa: RUF001
    ],
)
def test_strict_refuses(text):
    assert not strict(text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So the answer is 37.", 37),
        ("12 + 30 = 42, so 42 - 5 = 37 #### 37", 37),
        ("37", 37),
        ("It is 1,000 in all", 1000),
        ("That makes 1,234,567.", 1234567),
        ("7.0", 7),
        ("007", 7),
        ("-4", -4),
        ("<answer>37</answer> or was it 38?", 37),
        ("<answer> 37 apples </answer>", 37),
        ("<answer>37</answer><answer>37</answer>", 37),
        ("<answer>37</answer><answer>38</answer>", None),  # hedging
        ("<answer>37 or 38</answer>", None),
        ("<answer>none</answer> 37", None),
        ("7.5", None),
        ("1,00", None),
        ("no number", None),
        ("٣٧", None),
        ("", None),
    ],
)
def test_answer_in_any_style(text, answer):
    assert P.parse_answer(text) == answer


def test_canonical_answers_only_in_strict_format():
    question, trace = (
        "A box holds 9 nuts. He eats 2. How many are left?",
        "<reasoning>9 - 2 = 7</reasoning>",
    )
    assert P.grade(f"{trace}<answer>7</answer>", question, 7).strict
    for given in ("007", "7.0", "7,", "+7", "7 nuts"):
        grade = P.grade(f"{trace}<answer>{given}</answer>", question, 7)
        assert not grade.format and not grade.strict


def test_units_are_known_numbers():
    question = "Leo has 4 dozen eggs and 5 loose eggs. How many eggs does he have in all?"
    assert P.grade(
        "<reasoning>4 * 12 = 48; 48 + 5 = 53</reasoning><answer>53</answer>", question, 53
    ).strict
    assert not P.grade(
        "<reasoning>4 * 7 = 28; 28 + 5 = 33</reasoning><answer>33</answer>", question, 33
    ).trace


@pytest.mark.parametrize(
    "text",
    [
        "9" * 1_000_000,
        "<reasoning>" * 100_000,
        "1 + 1 = " * 200_000,
        "1," * 500_000,
        "1,111" * 4_000,
        " " * 19_000 + "x",
        "<answer>" * 2_400,
        "1 + 1 = 2; " * 1_800,
        "-" * 19_999,
    ],
)
def test_hostile_text_is_graded_at_once(text):
    start = time.perf_counter()
    assert not strict(text)
    assert time.perf_counter() - start < 1.0  # a catastrophic pattern takes hours; no benchmark


def test_random_garbage_never_raises_and_never_passes():
    rng = random.Random(0)
    pieces = [
        *P.TAGS,
        "37",
        "42",
        "12 + 30 = 42",
        " ",
        ";",
        "\n",
        "<",
        ">",
        "é",
        "\x00",
        "-",
        ",",
        ".",
    ]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 12)))
        assert not strict(text)


def test_a_completion_must_be_text():
    with pytest.raises(TypeError, match="a completion is a str, not list"):
        P.grade([{"role": "assistant", "content": GOLD}], QUESTION, 37)
