"""Bad input to rlnb.data: what the message must say."""

import json
import math
import random

import pytest
from clear import cases, check

from rlnb.data import annotators, preferences, shapes
from rlnb.data.annotators import Annotator, Clarity, LengthBiased, Noisy, Verifier

USER, SAID = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": "5"}
PAIR = {"prompt": "How many?", "chosen": "5", "rejected": "6"}
LABEL = {"prompt": "How many?", "completion": "5", "label": True}
ROW = {"id": "a", "question": "1 and 2", "answer": 3, "kind": "gain", "prompt": [USER], "responses": ["3", "4"]}
JSONL = {  # name: lines
    "broken": ['{"prompt": "a", "completion": "b"}', '{"prompt": "a",'],
    "list": ['["a", "b"]'],
    "null": ["null"],
    "column": ['{"prompt": "a", "completion": "b"}', '{"prompt": "a", "answer": "b"}'],
    "number": ['{"prompt": 5, "completion": "b"}'],
    "none": ['{"prompt": "a", "completion": null}'],
    "empty": [],
    "blank": ["", " "],
    "label": ['{"prompt": "a", "completion": "b", "label": "yes"}'],
    "one": ['{"prompt": "a", "completion": "b", "label": false}'] * 3,
    "role": ['{"prompt": [{"role": "human", "content": "a"}], "completion": "b"}'],
    "sharegpt": ['{"conversations": [{"from": "human", "value": "a"}]}'],
    "content": ['{"prompt": [{"role": "user", "content": ["a"]}], "completion": "b"}'],
    "nan": ['{"prompt": "a", "completion": NaN}'],
}
RESPONSES = {"id": 3, "question": None, "answer": "3", "kind": ["gain"], "responses": "3", "prompt": []}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, rows in JSONL.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in rows))
    for field, value in RESPONSES.items():
        (folder / f"no-{field}.jsonl").write_text(f"{json.dumps(ROW)}\n{json.dumps(ROW | {field: value})}\n")
    (folder / "latin.jsonl").write_bytes('{"prompt": "Zoë"}'.encode("latin-1"))
    (folder / "rows.json").write_text("[]")
    (folder / "nothing").mkdir()
    from datasets import Dataset

    Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}]).to_parquet(
        folder / "rows.parquet"
    )
    return folder


def read(name, shape="prompt-completion", **options):
    return lambda folder: shapes.read(folder / name, shape, **options)


def pairs(**changed):
    return lambda folder: shapes.preference([PAIR, PAIR | changed])


def without(row, key):
    return {name: value for name, value in row.items() if name != key}


def labels(*values):
    return lambda folder: shapes.unpaired([LABEL | {"label": value} for value in values])


def subset(n, of=3):
    return lambda folder: shapes.subset(list(range(of)), n)


def here(call):
    return lambda folder: call()


@cases(
    (here(lambda: shapes.preference([])), ValueError, "shape preference needs a row", "there is none"),
    (here(lambda: shapes.preference([5])), ValueError, "row 0: 5 is not an object with columns"),
    (here(lambda: shapes.preference([without(PAIR, "chosen")])), ValueError, "row 0: no column 'chosen'",
     "there are prompt, rejected", "needs prompt, chosen, rejected"),
    (here(lambda: shapes.preference("rows")), ValueError, "row 0: 'r' is not an object with columns"),
    (pairs(prompt=5), ValueError, "row 1, prompt: 5 is not a list of messages"),
    (pairs(prompt=""), ValueError, "row 1, prompt, message 0, content: '' is no text"),
    (pairs(chosen=None), ValueError, "row 1, chosen: None is not a list of messages"),
    (pairs(chosen=" \n"), ValueError, "row 1, chosen, message 0, content", "is no text"),
    (pairs(chosen=[]), ValueError, "row 1, chosen: [] is not a list of messages"),
    (pairs(chosen="6"), ValueError, "row 1: chosen and rejected are both '6'"),
    (pairs(chosen=[USER]), ValueError, "row 1, chosen: the roles are user, not one assistant message"),
    (pairs(rejected=[SAID, SAID]), ValueError, "row 1, rejected: the roles are assistant, assistant"),
    (pairs(prompt=[SAID]), ValueError, "row 1, prompt: the roles are assistant, not [system,] user"),
    (pairs(prompt=[USER, SAID]), ValueError, "row 1, prompt: the roles are user, assistant, not"),
    (pairs(prompt=[USER, USER]), ValueError, "row 1, prompt: the roles are user, user, not"),
    (pairs(prompt=[{"role": "system", "content": "a"}]), ValueError, "row 1, prompt: the roles are system, not"),
    (pairs(prompt=["How many?"]), ValueError, "row 1, prompt, message 0: 'How many?' needs a role and a content"),
    (pairs(prompt=[{"role": "user"}]), ValueError, "row 1, prompt, message 0", "needs a role and a content"),
    (pairs(prompt=[{"role": None, "content": "a"}]), ValueError, "row 1, prompt: the roles are None, not"),
    (pairs(prompt=[USER | {"content": 7}]), ValueError, "row 1, prompt, message 0, content: 7 is no text"),
    (labels(True, 1), ValueError, "row 1, label: 1 is not true or false"),
    (labels(True, None), ValueError, "row 1, label: None is not true or false"),
    (labels("False", True), ValueError, "row 0, label: 'False' is not true or false"),
    (labels(True, True), ValueError, "label is True in all 2 rows", "KTO learns from good and bad ones"),
    (labels(False), ValueError, "label is False in all 1 rows", "it needs both"),
    (labels(), ValueError, "shape unpaired needs a row"),
    (here(lambda: shapes.prompts([])), ValueError, "shape prompts needs a row"),
    (here(lambda: shapes.prompts(["How many?"])), TypeError, "'How many?' is a str, not a Problem"),
    (here(lambda: shapes.prompt_completion([])), ValueError, "shape prompt-completion needs a row"),
    (here(lambda: shapes.prompt_completion([ROW])), TypeError, "is a dict, not a Problem", "problems.load"),
    (subset(0), ValueError, "n=0 problems", "1 to 3 can be given"),
    (subset(4), ValueError, "n=4 problems", "1 to 3 can be given"),
    (subset(-1), ValueError, "n=-1 problems", "1 to 3"),
    (subset("2"), ValueError, "n='2' problems", "1 to 3"),
    (subset(1.5), ValueError, "n=1.5 problems", "1 to 3"),
    (subset(1, of=0), ValueError, "n=1 problems", "1 to 0"),
    (read("empty.jsonl", "pairs"), ValueError, "no shape 'pairs'", "there are prompt-completion, prompts"),
    (read("gone.jsonl"), FileNotFoundError, "gone.jsonl is no .jsonl or .parquet file", "'owner/name' on the hub"),
    (read("gone.parquet"), FileNotFoundError, "gone.parquet is no .jsonl or .parquet file"),
    (read("rows.json"), FileNotFoundError, "rows.json is no .jsonl or .parquet file"),
    (here(lambda: shapes.read("word", "prompts")), FileNotFoundError, "word is no .jsonl"),
    (read("broken.jsonl"), ValueError, "broken.jsonl, line 2: Expecting", 'in b\'{"prompt": "a",'),
    (read("latin.jsonl"), ValueError, "latin.jsonl, line 1", "utf-8"),
    (read("list.jsonl"), ValueError, "list.jsonl, line 1: ['a', 'b'] is not an object with columns"),
    (read("null.jsonl"), ValueError, "null.jsonl, line 1: None is not an object"),
    (read("column.jsonl"), ValueError, "column.jsonl, line 2: no column 'completion'", "there are prompt, answer"),
    (read("number.jsonl"), ValueError, "number.jsonl, line 1, prompt: 5 is not a list of messages"),
    (read("none.jsonl"), ValueError, "none.jsonl, line 1, completion: None is not"),
    (read("nan.jsonl"), ValueError, "nan.jsonl, line 1, completion: nan is not"),
    (read("empty.jsonl"), ValueError, "empty.jsonl: a data set of shape prompt-completion needs a row"),
    (read("blank.jsonl"), ValueError, "blank.jsonl: a data set", "needs a row"),
    (read("label.jsonl", "unpaired"), ValueError, "label.jsonl, line 1, label: 'yes' is not true or false"),
    (read("one.jsonl", "unpaired"), ValueError, "one.jsonl: label is False in all 3 rows"),
    (read("role.jsonl"), ValueError, "role.jsonl, line 1, prompt: the roles are human, not"),
    (read("sharegpt.jsonl"), ValueError, "sharegpt.jsonl, line 1: no column 'prompt', there are conversations"),
    (read("content.jsonl"), ValueError, "content.jsonl, line 1, prompt, message 0, content: ['a'] is no text"),
    (read("rows.parquet"), ValueError, "rows.parquet, row 1, completion, message 0, content: ' ' is no text"),
    (read("rows.parquet", "preference"), ValueError, "rows.parquet, row 0: no column 'chosen'"),
    (read("rows.parquet", split="test"), ValueError, "Unknown split \"test\"", "one of ['train']"),
    (read("nothing"), FileNotFoundError, "nothing doesn't contain any data files"),
    (here(lambda: shapes.read("nobody/nothing", "prompts")), ConnectionError, "reach 'nobody/nothing' on the Hub"),
)  # fmt: skip
def test_of_a_data_set(call, kind, words, folder):
    check(lambda: call(folder), kind, words, folder=folder)


# --- preferences ---------------------------------------------------------------------------------


class Scores(Annotator):
    name = "mine"

    def __init__(self, score):
        self.score = lambda *row: score


class Silent(Annotator):
    name = "silent"


def ask(annotator, row=ROW):
    return lambda folder: preferences.annotate([row], annotator)


def judged(**row):
    return preferences.annotate([ROW | row], Verifier())


def good():
    return shapes.preference([PAIR | {"id": "a"}])


@cases(
    *((lambda folder, field=field: preferences.read(folder / f"no-{field}.jsonl"), ValueError,
       f"no-{field}.jsonl, line 2, {field}: {value!r} is no")
      for field, value in RESPONSES.items() if field != "prompt"),
    (lambda folder: preferences.read(folder / "no-prompt.jsonl"), ValueError, "line 2, prompt: [] is not a list"),
    (lambda folder: preferences.read(folder / "gone.jsonl"), FileNotFoundError, "gone.jsonl"),
    (lambda folder: preferences.read(folder / "broken.jsonl"), ValueError,
     "broken.jsonl, line 1, prompt: 'a' is not a list of messages"),
    (ask(Verifier(), without(ROW, "responses")), ValueError, "row 0, responses: None is no list"),
    (ask(Verifier(), without(ROW, "id")), ValueError, "row 0, id: None is no str"),
    (ask(Verifier(), "row"), ValueError, "row 0: 'row' is not an object with columns"),
    (ask(Verifier(), ROW | {"answer": "3"}), TypeError, "an answer is an int, not str: '3'"),
    (ask(Scores(math.nan)), ValueError, "row a: mine scores [nan, nan], which has no order"),
    (ask(LengthBiased(weight=math.nan)), ValueError, "row a: length-biased scores [nan, nan]"),
    (ask(Silent()), NotImplementedError, "Silent compares responses but has no scores"),
    (lambda folder: Noisy(rate=1.5), ValueError, "rate is 1.5", "between 0 and 1"),
    (lambda folder: Noisy(rate=-0.1), ValueError, "rate is -0.1", "between 0 and 1"),
    (lambda folder: Noisy(rate=math.nan), ValueError, "rate is nan", "between 0 and 1"),
    (lambda folder: Noisy(rate="0.2"), ValueError, "rate is '0.2'", "between 0 and 1"),
    (lambda folder: Noisy(rate=None), ValueError, "rate is None", "between 0 and 1"),
    (lambda folder: Clarity(correctness=-1), ValueError, "the weights are (-1, 1.0, 1.0)", "none below 0"),
    (lambda folder: Clarity(0, 0, 0), ValueError, "the weights are (0, 0, 0)", "one above"),
    (lambda folder: Clarity(math.nan), ValueError, "the weights are (nan, 1.0, 1.0)"),
    (lambda folder: Clarity(detail=2), ValueError, "detail is 2", "between 0 and 1"),
    (lambda folder: annotators.check_rate(2, "share"), ValueError, "share is 2", "between 0 and 1"),
    (lambda folder: preferences.pairs([]), ValueError, "no pair is left", "'ties': 0"),
    (lambda folder: preferences.pairs(judged(responses=["4", "5"])), ValueError, "no pair is left", "'ties': 1"),
    (lambda folder: preferences.pairs([ROW]), ValueError,
     "row 0, which annotate makes, comparisons: None is no list"),
    (lambda folder: preferences.pairs(judged(), how="best"), ValueError, "how is 'best'", "'all' or 'random'"),
    (lambda folder: preferences.unpair([LABEL | {"prompt": [USER]}]), ValueError, "row 0: no column 'chosen'"),
    (lambda folder: preferences.unpair([]), ValueError, "shape preference needs a row"),
    (lambda folder: preferences.noise(good(), 1.1), ValueError, "rate is 1.1", "between 0 and 1"),
    (lambda folder: preferences.noise(good(), "half"), ValueError, "rate is 'half'", "between 0 and 1"),
    (lambda folder: preferences.noise([], 0.5), ValueError, "shape preference needs a row"),
    (lambda folder: preferences.noise([LABEL], 1.0), ValueError, "row 0", "no column 'chosen'"),
    (lambda folder: preferences.write([{"id": object()}], folder / "new.jsonl"), TypeError, "object is not JSON"),
)  # fmt: skip
def test_of_preferences(call, kind, words, folder):
    random.seed(0)
    check(lambda: call(folder), kind, words, folder=folder)
