"""The diffs: their files, their defects, and what reads the answers."""

import ast
import json
from collections import Counter

import pytest

from data.review import check as V
from data.review import make as M

ROWS = {split: V.load(split) for split in V.SPLITS}
ALL = [row for rows in ROWS.values() for row in rows]


def code(row) -> str:
    return "\n".join(line[1:] for line in row["prompt"].splitlines()[1:])


def test_files_come_out_byte_for_byte(tmp_path):
    M.write_data(tmp_path)
    for split in V.SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (V.DATA / f"{split}.jsonl").read_bytes()
    assert {split: len(rows) for split, rows in ROWS.items()} == {"train": 400, "test": 150}


def test_splits_share_no_family_and_no_diff():
    assert not {row["family"] for row in ROWS["train"]} & {row["family"] for row in ROWS["test"]}
    assert len({row["prompt"] for row in ALL}) == len({row["id"] for row in ALL}) == len(ALL)
    for rows in ROWS.values():
        kinds = Counter(row["defect"] for row in rows)
        assert set(kinds) == set(V.KINDS) and max(kinds.values()) / len(rows) < 0.14  # the majority class


def test_a_diff_is_short_python_and_the_defect_is_on_an_added_line():
    correct = {_plain(function["code"].strip()) for function in M.FUNCTIONS}
    for row in ALL:
        ast.parse(code(row))
        lines = row["prompt"].splitlines()[1:]
        assert 3 <= len(lines) <= 8 and {line[0] for line in lines} <= {"+", " "}
        assert (row["line"] == 0) == (row["defect"] == "none")
        assert row["line"] == 0 or lines[row["line"] - 1].startswith("+")
    assert len(correct) == len(M.FUNCTIONS)


def _plain(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("function", M.FUNCTIONS, ids=lambda f: f"{f['family']}-{f['names']['a'][0]}")
def test_every_defect_goes_in_where_it_says(function):
    clean = function["code"].strip()
    for kind, right, wrong in function["defects"]:
        broken, line = M.put_in(clean, right, wrong)
        assert kind in V.KINDS and broken != clean
        changed = broken.splitlines()[line - 1]
        assert changed != clean.splitlines()[line - 1]
        if kind == "mutable default":
            assert line == 1 and any(default in changed for default in ("=[]", "={}", "=set()"))
        if kind == "unclosed file":
            assert "= open(" in changed and "with" not in changed
        if kind == "missing return":
            assert "return" not in changed


def test_a_place_that_is_not_there_once():
    with pytest.raises(ValueError, match="2 times"):
        M.put_in("a = a", "a", "b")


def test_answers_are_graded_by_halves():
    row = {"defect": "off-by-one", "line": 3}
    assert all(V.score(r["completion"], r) == 1.0 for r in ALL)
    assert V.score('{ "line": 3, "defect": "off-by-one" }', row) == 1.0
    assert V.score('{"defect": "none", "line": 3}', row) == 0.5
    assert V.score('{"defect": "none", "line": 0}', row) == 0.0
    said = [[{"role": "assistant", "content": json.dumps(row)}], "nothing"]
    assert V.findings(completions=said, defect=["off-by-one"] * 2, line=[3, 3], family=["x"] * 2) == [1.0, 0.0]


@pytest.mark.parametrize("text", [
    "", "3", "null", "[]", '{"defect":"none"}', '{"defect":"none","line":0} ok', '{"defect":"none","line":true}',
    '{"defect":"none","line":0.0}', '{"defect":"none","line":"0"}', '{"defect":"None","line":0}',
    '{"defect":["none"],"line":0}', '{"defect":"none","line":NaN}', '{"defect":"none","line":0,"line":1}',
    '{"defect":"none","line":0,"why":""}', "[" * 1999, "x" * 10_000_000, '{"defect":"\\ud800","line":0}',
])  # fmt: skip
def test_no_other_text_parses(text):
    found, why = V.parse(text)
    assert found is None and 0 < len(why) < 200
    assert V.score(text, {"defect": "none", "line": 0}) == 0.0


def test_a_split_that_is_not_there():
    with pytest.raises(ValueError, match="the splits are train, test"):
        V.load("validation")
