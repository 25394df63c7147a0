"""rlnb.datasets: TRL's shapes, subsets, and errors that name the row, the field and the value."""

import re
import subprocess
import sys

import pytest

from rlnb import datasets, problems

USER = {"role": "user", "content": "How many?"}
ANSWER = {"role": "assistant", "content": "5"}
SYSTEM = {"role": "system", "content": "Count."}
GOOD = {"prompt": [USER], "completion": [ANSWER]}


@pytest.fixture(scope="module")
def some():
    return problems.generate("train", 12, seed=3)


def test_the_shapes_are_trls(some):
    sft, rl = datasets.prompt_completion(some), datasets.prompts(some)
    assert sft.column_names == ["prompt", "completion"]
    assert rl.column_names == ["prompt", "id", "kind", "question", "answer"]
    assert sft[5]["prompt"] == [{"role": "user", "content": some[5].question}]
    assert sft[5]["completion"] == [{"role": "assistant", "content": problems.solution(some[5])}]
    assert rl["answer"][:] == [problem.answer for problem in some]
    assert rl["id"][:] == [problem.id for problem in some]


def test_a_system_message_comes_first(some):
    for shape in (datasets.prompt_completion, datasets.prompts):
        prompt = shape(some, "Be brief.")[0]["prompt"]
        assert [message["role"] for message in prompt] == ["system", "user"]
        assert prompt[0]["content"] == "Be brief."


def test_the_module_of_the_same_name_is_the_library(some):
    import datasets as library

    assert library is not datasets
    assert isinstance(datasets.prompts(some), library.Dataset)


def test_the_import_is_light():
    code = (
        "import sys, rlnb.datasets\n"
        "print([m for m in ('datasets', 'torch', 'trl', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_subsets_are_nested_and_follow_the_seed(some):
    assert datasets.subset(some, 4, seed=1) == datasets.subset(some, 4, seed=1)
    assert datasets.subset(some, 9, seed=1)[:4] == datasets.subset(some, 4, seed=1)
    assert datasets.subset(some, 9, seed=1) != datasets.subset(some, 9, seed=2)
    whole = datasets.subset(some, 12, seed=1)
    assert sorted(p.id for p in whole) == sorted(p.id for p in some)


@pytest.mark.parametrize("n", [0, -1, 13])
def test_a_subset_of_an_impossible_size(some, n):
    with pytest.raises(ValueError, match=f"n={n} problems are asked for: 1 to 12"):
        datasets.subset(some, n, seed=0)


@pytest.mark.parametrize(
    "prompt", [[USER], [SYSTEM, USER], [USER, ANSWER, USER], [SYSTEM, USER, ANSWER, USER]]
)
def test_good_rows_pass(prompt):
    rows = [GOOD, {"prompt": prompt, "completion": [ANSWER], "more": 1}]
    assert datasets.validate(rows, "prompt-completion") == 2
    assert datasets.validate(iter(rows), "prompts") == 2


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"completion": [ANSWER]}, ": no column 'prompt', there are completion; shape"),
        ({"prompt": [USER]}, ": no column 'completion', there are prompt; shape"),
        ({"prompt": "How many?"}, ", prompt: 'How many?' is not a list of messages"),
        ({"prompt": []}, ", prompt: [] is not a list of messages"),
        ({"prompt": ["How?"]}, ", prompt, message 0: 'How?' needs a role and a content"),
        ({"prompt": [{"role": "user"}]}, "message 0: {'role': 'user'} needs a role and a content"),
        ({"prompt": [USER | {"content": " "}]}, ", prompt, message 0, content: ' ' is no text"),
        ({"prompt": [USER | {"content": None}]}, ", prompt, message 0, content: None is no text"),
        ({"prompt": [USER, SYSTEM]}, "the roles are user, system, not [system,] user"),
        ({"prompt": [USER, ANSWER]}, "the roles are user, assistant, not"),
        ({"prompt": [SYSTEM]}, "the roles are system, not"),
        (GOOD | {"completion": [USER]}, ", completion: the roles are user, not one assistant"),
        (GOOD | {"completion": [ANSWER] * 2}, "the roles are assistant, assistant, not one"),
        (GOOD | {"completion": [ANSWER | {"content": ""}]}, ", completion, message 0, content: ''"),
    ],
)
def test_a_bad_row_is_named(row, says):
    with pytest.raises(ValueError, match=r"^row 1\b.*" + re.escape(says)):
        datasets.validate([GOOD, row], "prompt-completion")


def test_a_long_value_is_cut():
    with pytest.raises(ValueError) as error:
        datasets.validate([{"prompt": "x" * 10_000}], "prompts")
    assert len(str(error.value)) < 200


def test_an_empty_data_set_and_an_unknown_shape():
    with pytest.raises(ValueError, match="needs a row, and there is none"):
        datasets.prompts([])
    with pytest.raises(ValueError, match="no shape 'pairs'; there are prompt-completion, prompts"):
        datasets.validate([GOOD], "pairs")
