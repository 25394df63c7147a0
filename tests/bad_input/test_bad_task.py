"""Bad input to rlnb.profiles and rlnb.task: what the message must say."""

import json
import math

import numpy as np
import pytest
from clear import cases, check, environment, inside

from rlnb import profiles
from rlnb.task import problems, rewards
from rlnb.task.rewards import RewardError

ROW = {"id": "x-0001", "split": "x", "kind": "gain", "question": "Anna has 1 pen and gets 2.", "answer": 3,
       "trace": ["1 + 2 = 3"], "numbers": {"a": 1, "b": 2}}  # fmt: skip
FILES = {  # of data/problems, by name
    "float": [ROW, ROW | {"answer": 37.9}],
    "bool": [ROW | {"answer": True}],
    "text": [ROW | {"answer": "3"}],
    "trace": [ROW | {"trace": "1 + 2 = 3"}],
    "question": [ROW | {"question": 5}],
    "numbers": [ROW | {"numbers": [1, 2]}],
    "missing": [ROW, {key: value for key, value in ROW.items() if key != "kind"}],
    "list": [ROW, [1, 2]],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, rows in FILES.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "json.jsonl").write_text('{"id": 1\n')
    (tmp_path / "latin.jsonl").write_bytes('{"id": "Zoë"}\n'.encode("latin-1"))
    monkeypatch.setattr(problems, "DATA", tmp_path)
    return tmp_path


def profile(value, call=profiles.profile):
    return lambda: inside(environment(RLNB_PROFILE=value), call)


def load(name):
    return lambda: problems.load(name)


def generate(*given, **more):
    return lambda: problems.generate(*given, **more)


def grade(completion="37", question="12 and 25", answer=37):
    return lambda: problems.grade(completion, question, answer)


@cases(
    (lambda: profiles.by(gpu=1), TypeError, "by(gpu)", "give cpu="),
    (lambda: profiles.by(), TypeError, "by()", "give cpu="),
    (lambda: profiles.by(cpu=1, tpu=2), TypeError, "by(cpu, tpu)", "gpu= and smoke="),
    (profile("fast"), ValueError, "RLNB_PROFILE is 'fast'", "cpu, gpu, smoke"),
    (profile("CPU"), ValueError, "RLNB_PROFILE is 'CPU'", "cpu, gpu, smoke"),
    (profile(" ", lambda: profiles.by(cpu=1)), ValueError, "RLNB_PROFILE is ' '", "cpu, gpu, smoke"),
    (profile("gqu", profiles.model_name), ValueError, "RLNB_PROFILE is 'gqu'", "cpu, gpu, smoke"),
    (load("gone"), FileNotFoundError, "no split 'gone'", "there are id,"),
    (load(None), FileNotFoundError, "no split None", "there are id,"),
    (load("float"), ValueError, "float.jsonl, line 2, answer", "37.9", "int"),
    (load("bool"), ValueError, "bool.jsonl, line 1, answer", "True", "int"),
    (load("text"), ValueError, "text.jsonl, line 1, answer", "'3'", "int"),
    (load("trace"), ValueError, "trace.jsonl, line 1, trace", "'1 + 2 = 3'", "list"),
    (load("question"), ValueError, "question.jsonl, line 1, question", "5", "str"),
    (load("numbers"), ValueError, "numbers.jsonl, line 1, numbers", "[1, 2]", "dict"),
    (load("missing"), ValueError, "missing.jsonl, line 2, kind", "None", "str"),
    (load("list"), ValueError, "list.jsonl, line 2", "[1, 2]"),
    (load("json"), ValueError, "json.jsonl, line 1", "Expecting"),
    (load("latin"), ValueError, "latin.jsonl, line 1", "utf-8"),
    (generate("gone", 3), ValueError, "split is 'gone'", "the splits are id,"),
    (generate("id", -1), ValueError, "n is -1", "from 1 to 100000"),
    (generate("id", 0), ValueError, "n is 0", "from 1 to"),
    (generate("id", "5"), ValueError, "n is '5'", "from 1 to"),
    (generate("id", 2.5), ValueError, "n is 2.5", "from 1 to"),
    (generate("id", True), ValueError, "n is True", "from 1 to"),
    (generate("id", 3, kinds=["nope"]), ValueError, "kinds is ('nope',)", "no kind of problem but gain"),
    (generate("id", 3, kinds=[]), ValueError, "kinds is ()", "no kind of problem but gain"),
    (generate("id", 3, kinds="gain"), ValueError, "kinds is ('g', 'a', 'i', 'n')", "no kind of problem but gain"),
    (generate("id", 10**9), ValueError, "n is 1000000000", "from 1 to 100000"),
    (generate("id", 10**5, kinds=["groups"]), ValueError, "different problems", "ask for fewer"),
    (lambda: problems.prompt("How many?"), TypeError, "'How many?'", "Problem"),
    (lambda: problems.prompt(None), TypeError, "None", "Problem"),
    (lambda: problems.prompt(ROW), TypeError, "x-0001", "Problem"),
    (grade(None), TypeError, "a completion is a str, not NoneType"),
    (grade(b"37"), TypeError, "a completion is a str, not bytes", "b'37'"),
    (grade([{"content": "37"}]), TypeError, "a completion is a str, not list"),
    (grade(37), TypeError, "a completion is a str, not int: 37"),
    (grade(question=None), TypeError, "question is a str, not NoneType"),
    (grade(answer="37"), TypeError, "answer is an int, not str: '37'"),
    (grade("37", answer="37"), TypeError, "answer is an int, not str: '37'"),
    (grade(answer=37.0), TypeError, "answer is an int, not float: 37.0"),
    (grade(answer=None), TypeError, "answer is an int, not NoneType: None"),
    (grade(answer=True), TypeError, "answer is an int, not bool: True"),
)
def test_of_a_task(call, kind, words, folder):
    check(call, kind, words, folder=folder)


def test_a_marked_file_and_odd_line_ends_are_read(folder):
    odd = ROW | {"question": "Anna has 1 pen.\u2028She gets 2."}
    (folder / "marked.jsonl").write_text(json.dumps(odd, ensure_ascii=False) + "\n\n", encoding="utf-8-sig")
    (found,) = problems.load("marked")
    assert (found.question, found.trace) == (odd["question"], ("1 + 2 = 3",))


# --- rewards -------------------------------------------------------------------------------------

CHAT = [[{"role": "assistant", "content": "37"}]] * 2


def returns(values, completions=("37", "38")):
    def mine(completions, **columns):
        return values

    return lambda: rewards.checked(mine)(completions=completions, question=["12 and 25"] * 2)


def correctness(completions=("37", "38"), question=("12", "12"), answer=(37, 37), fn=rewards.correctness):
    return lambda: fn(completions, question=question, answer=answer)


def fails(error):
    def mine(completions, **columns):
        raise error

    return lambda: rewards.checked(mine)(completions=["37"], answer=[1])


async def waits(completions, **columns):
    return [1.0 for _ in completions]


@cases(
    (returns([1.0]), RewardError, "'mine' returned 1 values for 2", "one per completion"),
    (returns([1.0] * 3), RewardError, "'mine' returned 3 values for 2", "one per completion"),
    (returns([]), RewardError, "'mine' returned 0 values for 2", "one per completion"),
    (returns(5), RewardError, "'mine' raised TypeError", "not iterable", "a list of 2 numbers"),
    (returns(None), RewardError, "'mine' raised TypeError", "not iterable", "a list of 2 numbers"),
    (returns("ab"), RewardError, "'mine' returned 'a' for completion 0, '37'", "a finite number"),
    (returns([1.0, math.nan]), RewardError, "'mine' returned nan for completion 1, '38'", "a finite number"),
    (returns([math.inf, 1.0]), RewardError, "'mine' returned inf for completion 0, '37'", "a finite number"),
    (returns([-math.inf, 1.0]), RewardError, "'mine' returned -inf for completion 0", "a finite number"),
    (returns([1.0, "1.0"]), RewardError, "returned '1.0' for completion 1", "or None if it cannot judge"),
    (returns([1.0, b"1"]), RewardError, "returned b'1' for completion 1", "a finite number"),
    (returns([[1.0], [2.0]]), RewardError, "returned [1.0] for completion 0", "a finite number"),
    (returns([1j, 1.0]), RewardError, "returned 1j for completion 0", "a finite number"),
    (returns([{}, 1.0]), RewardError, "returned {} for completion 0", "a finite number"),
    (returns(np.array([1.0, np.nan])), RewardError, "'mine' returned", "nan", "for completion 1"),
    (returns(np.ones((2, 3))), RewardError, "'mine' returned array([1., 1., 1.]) for completion 0"),
    (returns({"a": 1, "b": 2}), RewardError, "returned 'a' for completion 0", "a finite number"),
    (fails(KeyError("answer")), RewardError, "'mine' raised KeyError: 'answer'",
     "It was given 1 completions and answer"),
    (fails(ZeroDivisionError("division by zero")), RewardError, "'mine' raised ZeroDivisionError: division"),
    (fails(IndexError("list index out of range")), RewardError, "'mine' raised IndexError", "a list of 1 numbers"),
    (lambda: rewards.checked(waits), TypeError, "'waits' is async", "give it to the trainer as it is"),
    (lambda: rewards.checked(None), TypeError, "None", "function"),
    (lambda: rewards.checked("correctness"), TypeError, "'correctness'", "function"),
    (lambda: rewards.checked(rewards.correctness)(["37"], question=["12"]), RewardError,
     "'correctness' raised TypeError", "argument: 'answer'"),
    (correctness(answer=(37, "37")), RewardError, "answer 1 is '37', not a whole number", "dataset.map"),
    (correctness(answer=(37.0, 37)), RewardError, "answer 0 is 37.0, not a whole number", "dataset.map"),
    (correctness(answer=(None, 37)), RewardError, "answer 0 is None, not a whole number"),
    (correctness(answer=(True, 37)), RewardError, "answer 0 is True, not a whole number"),
    (correctness(completions=([{"role": "assistant", "content": None}], "3")), TypeError,
     "a completion is a str, not NoneType"),
    (correctness(question=(None, "12")), TypeError, "question is a str, not NoneType"),
)  # fmt: skip
def test_of_a_reward(call, kind, words, tmp_path):
    check(call, kind, words, folder=tmp_path)
