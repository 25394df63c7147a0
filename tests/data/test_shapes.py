"""rlnb.data.shapes: TRL's shapes, subsets, and errors that name the row, the field and the value."""

import json
import re
import subprocess
import sys

import pytest

from rlnb.data import shapes
from rlnb.task import problems
from tests import tiny

USER = {"role": "user", "content": "How many?"}
ANSWER = {"role": "assistant", "content": "5"}
SYSTEM = {"role": "system", "content": "Count."}
GOOD = {"prompt": [USER], "completion": [ANSWER]}


@pytest.fixture(scope="module")
def some():
    return problems.generate("train", 12, seed=3)


def test_the_shapes_are_trls(some):
    sft, rl = shapes.prompt_completion(some), shapes.prompts(some)
    assert sft.column_names == ["prompt", "completion"]
    assert rl.column_names == ["prompt", "id", "kind", "question", "answer"]
    assert sft[5]["prompt"] == [{"role": "user", "content": some[5].question}]
    assert sft[5]["completion"] == [{"role": "assistant", "content": problems.solution(some[5])}]
    assert rl["answer"][:] == [problem.answer for problem in some]
    assert rl["id"][:] == [problem.id for problem in some]


def test_the_problems_prompt_decides_on_a_system_message(some, monkeypatch):
    monkeypatch.setenv("RLNB_MODEL", "some/model")
    for shape in (shapes.prompt_completion, shapes.prompts):
        assert shape(some)[0]["prompt"] == problems.prompt(some[0], problems.SYSTEM)


def test_the_import_is_light():
    code = (
        "import sys, rlnb.data.shapes\n"
        "print([m for m in ('datasets', 'torch', 'trl', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_subsets_are_nested_and_follow_the_seed(some):
    assert shapes.subset(some, 4, seed=1) == shapes.subset(some, 4, seed=1)
    assert shapes.subset(some, 9, seed=1)[:4] == shapes.subset(some, 4, seed=1)
    assert shapes.subset(some, 9, seed=1) != shapes.subset(some, 9, seed=2)
    whole = shapes.subset(some, 12, seed=1)
    assert sorted(p.id for p in whole) == sorted(p.id for p in some)


@pytest.mark.parametrize("n", [0, -1, 13])
def test_a_subset_of_an_impossible_size(some, n):
    with pytest.raises(ValueError, match=f"n={n} problems are asked for: 1 to 12"):
        shapes.subset(some, n, seed=0)


@pytest.mark.parametrize(
    "prompt", [[USER], [SYSTEM, USER], [USER, ANSWER, USER], [SYSTEM, USER, ANSWER, USER]]
)
def test_good_rows_pass(prompt):
    for shape in ("prompt-completion", "prompts"):
        shapes.check_row({"prompt": prompt, "completion": [ANSWER], "more": 1}, shape, "row 0")


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
        shapes.check_row(row, "prompt-completion", "row 1")


def test_a_long_value_is_cut():
    with pytest.raises(ValueError) as error:
        shapes.check_row({"prompt": "x" * 10_000}, "prompts", "row 0")
    assert len(str(error.value)) < 200


def test_an_empty_data_set():
    with pytest.raises(ValueError, match="needs a row, and there is none"):
        shapes.prompts([])


PAIR = {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER | {"content": "6"}]}
LABELLED = [GOOD | {"label": True}, GOOD | {"label": False}]


# --- preferences ---------------------------------------------------------------------------------


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_pairs_and_labels_from_texts():
    pairs = shapes.preference(
        [{"prompt": [USER], "chosen": "5", "rejected": "6", "id": "a"}, PAIR | {"id": "b"}]
    )
    assert pairs[0] == pairs[1] | {"id": "a"} == PAIR | {"id": "a"}
    labels = shapes.unpaired(
        [{"prompt": "How many?", "completion": "5", "label": x} for x in (True, False)]
    )
    assert labels[:]["label"] == [True, False]
    assert labels[1] == GOOD | {"label": False}


def test_trl_renders_them_as_it_does_its_own():
    from trl.data_utils import is_conversational, maybe_apply_chat_template

    tokens = tiny.tokenizer()
    pairs, labels = shapes.preference([PAIR]), shapes.unpaired(LABELLED)
    assert is_conversational(pairs[0]) and is_conversational(labels[0])
    head = "<|user|>How many?<|assistant|>"
    assert maybe_apply_chat_template(pairs[0], tokens) == {
        "prompt": head, "chosen": "5<|end|>", "rejected": "6<|end|>",
    }  # fmt: skip
    assert maybe_apply_chat_template(labels[1], tokens) == {
        "prompt": head, "completion": "5<|end|>", "label": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"prompt": [USER], "chosen": [ANSWER]},
            ": no column 'rejected', there are prompt, chosen;",
        ),
        (PAIR | {"rejected": [ANSWER]}, ": chosen and rejected are both '5'"),
        (
            PAIR | {"prompt": [USER | {"content": ""}]},
            ", prompt, message 0, content: '' is no text",
        ),
        (PAIR | {"prompt": []}, ", prompt: [] is not a list of messages"),
        (PAIR | {"chosen": [USER, ANSWER]}, ", chosen: the roles are user, assistant, not one"),
        (PAIR | {"rejected": [USER]}, ", rejected: the roles are user, not one assistant"),
        (PAIR | {"prompt": [USER, ANSWER]}, ", prompt: the roles are user, assistant, not [sys"),
        (PAIR | {"chosen": None}, ", chosen: None is not a list of messages"),
        ([PAIR], "is not an object with columns"),
    ],
)
def test_a_bad_pair_is_named(row, says, tmp_path):
    with pytest.raises(ValueError, match=r"^row 1\b.*" + re.escape(says)):
        shapes.preference([PAIR, row])
    path = lines(tmp_path / "pairs.jsonl", [PAIR, row])
    with pytest.raises(ValueError, match=r"^pairs\.jsonl, line 2\b.*" + re.escape(says)):
        shapes.read(path, "preference")


@pytest.mark.parametrize("label", [1, 0, "true", None, "yes", [True]])
def test_a_label_must_be_a_boolean(label):
    with pytest.raises(
        ValueError, match=re.escape(f"row 2, label: {label!r} is not true or false")
    ):
        shapes.unpaired([*LABELLED, GOOD | {"label": label}])


@pytest.mark.parametrize("label", [True, False])
def test_one_class_is_not_enough_for_kto(label, tmp_path):
    rows = [GOOD | {"label": label}] * 3
    with pytest.raises(ValueError, match=f"^label is {label} in all 3 rows: KTO .* needs both"):
        shapes.unpaired(rows)
    with pytest.raises(ValueError, match=f"^k.jsonl: label is {label} in all 3 rows"):
        shapes.read(lines(tmp_path / "k.jsonl", rows), "unpaired")
    data = shapes.read(lines(tmp_path / "k.jsonl", rows), "prompt-completion")
    assert len(data) == 3  # there, label is any other column


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["preference", "unpaired", "prompt-completion", "prompts"])
def test_what_was_written_is_read(shape, tmp_path):
    rows = LABELLED if shape == "unpaired" else [PAIR | GOOD | {"n": 1}, PAIR | GOOD | {"n": None}]
    built = shapes.read(lines(tmp_path / "x.jsonl", rows), shape)
    assert built.to_list() == rows
    built.to_parquet(tmp_path / "x.parquet")
    cache = str(tmp_path / "cache")
    assert shapes.read(str(tmp_path / "x.parquet"), shape, cache_dir=cache).to_list() == rows
    folder = tmp_path / "owner" / "name"  # as the hub holds one, read by the same function
    folder.mkdir(parents=True)
    lines(folder / "train.jsonl", rows)
    assert shapes.read(folder, shape, cache_dir=cache).to_list() == rows


def test_columns_of_later_rows_are_kept_and_empty_lines_are_none(tmp_path):
    path = lines(tmp_path / "x.jsonl", [PAIR, PAIR | {"source": "me"}])
    path.write_text("\n" + path.read_text() + "\n \n")
    assert shapes.read(path, "preference")["source"][:] == [None, "me"]


def test_strings_become_messages_and_an_unclear_prompt_is_refused(tmp_path):
    text = {"prompt": "How many?", "chosen": "5", "rejected": "6"}
    mixed = text | {"chosen": [ANSWER], "rejected": [ANSWER | {"content": "6"}]}
    path = lines(tmp_path / "x.jsonl", [text, mixed])
    assert shapes.read(path, "preference").to_list() == [PAIR, PAIR]
    lines(path, [{"chosen": "Human: How many? 5", "rejected": "Human: How many? 6"}])
    with pytest.raises(ValueError, match="line 1: no column 'prompt'"):
        shapes.read(path, "preference")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"prompt": \n', "x.jsonl, line 1: Expecting value"),
        (b"{}\n\xff\xfe\n", "x.jsonl, line 1: no column 'prompt', there are none"),
        (b"\n\xff\n", "x.jsonl, line 2: 'utf-8' codec can't decode"),
        (b"3\n", "x.jsonl, line 1: 3 is not an object"),
        (b"", "x.jsonl: a data set of shape prompts needs a row, and there is none"),
    ],
)
def test_a_broken_file_is_named(content, says, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="^" + re.escape(says)):
        shapes.read(tmp_path / "x.jsonl", "prompts")


def test_what_is_no_source(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.jsonl is no .jsonl or .parquet file"):
        shapes.read(tmp_path / "nothing.jsonl", "prompts")
    with pytest.raises(FileNotFoundError, match="no 'owner/name' on the hub"):
        shapes.read("data/pairs.jsonl", "prompts")  # a file's name is no data set's
    (tmp_path / "x.csv").write_text("prompt\nHow many?\n")
    with pytest.raises(FileNotFoundError, match=r"x.csv is no .jsonl or .parquet file"):
        shapes.read(tmp_path / "x.csv", "prompts")
    with pytest.raises(ValueError, match="no shape 'pairs'; there are prompt-completion, prompts"):
        shapes.read(tmp_path / "x.csv", "pairs")
    with pytest.raises(ConnectionError, match="nobody-here/nothing"):  # tests are offline
        shapes.read("nobody-here/nothing", "prompts")


def test_subsets_of_a_data_set(some):
    whole = shapes.prompts(some)
    few, more = shapes.subset(whole, 3, seed=2), shapes.subset(whole, 7, seed=2)
    assert few["id"][:] == more["id"][:3]


def test_a_row_that_comes_changes_one_row_of_a_subset():
    rows = [{"prompt": f"{i}?", "chosen": "a", "rejected": "b", "id": f"row-{i}"} for i in range(40)]
    small, large = (shapes.subset(shapes.preference(some), 16, seed=3)["id"] for some in (rows[1:], rows))
    assert len(set(small) ^ set(large)) in (0, 2)
    assert small != shapes.subset(shapes.preference(rows[1:]), 16, seed=4)["id"]
