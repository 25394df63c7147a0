"""rlnb.data.preferences: responses, ranks, and shapes against TRL's own."""

import json
import re
import subprocess
import sys

import pytest

from rlnb.data import preferences
from rlnb.task import problems
from rlnb.data.annotators import Clarity, Noisy, Verifier
from tests.rows import LOOSE, QUESTION, RIGHT, WRONG, Fixed, row


def judged(*responses, annotator=None, id="a"):
    return preferences.annotate([row(*responses, id=id)], annotator or Verifier())


def says(messages):
    (message,) = messages
    assert message["role"] == "assistant"
    return message["content"]


# --- responses -----------------------------------------------------------------------------------


def test_rows_from_texts(tmp_path):
    some = problems.generate("train", 2, seed=1)
    rows = preferences.rows(some, [["a", "b"], ["c", "d"]])
    assert rows[1] == {
        "id": some[1].id, "question": some[1].question, "answer": some[1].answer, "kind": some[1].kind,
        "prompt": problems.prompt(some[1]), "responses": ["c", "d"],
    }  # fmt: skip
    with pytest.raises(ValueError):
        preferences.rows(some, [["a", "b"]])
    ranked = preferences.annotate(rows, Noisy(0.5))
    for data in (rows, ranked):
        preferences.write(data, tmp_path / "new" / "rows.jsonl")
        assert preferences.read(tmp_path / "new" / "rows.jsonl") == data


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    preferences.write([row(RIGHT, WRONG)], path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        preferences.write([row(RIGHT), row({1, 2})], path)
    assert preferences.read(path) == [row(RIGHT, WRONG)]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"id": 3}, "line 2, id: 3 is no str"),
        ({"answer": "17"}, "line 2, answer: '17' is no int"),
        ({"answer": True}, "line 2, answer: True is no int"),
        ({"responses": RIGHT}, "line 2, responses: '<reasoning>"),
        ({"prompt": []}, "line 2, prompt: [] is not a list of messages"),
        ({"prompt": QUESTION}, "line 2, prompt: 'Anna has"),
    ],
)
def test_a_bad_row_of_a_file_is_named(change, says, tmp_path):
    preferences.write([row(RIGHT), row(RIGHT) | change], tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"^rows\.jsonl, " + re.escape(says)):
        preferences.read(tmp_path / "rows.jsonl")


def test_the_import_is_light():
    code = (
        "import sys, rlnb.data.annotators, rlnb.data.preferences, rlnb.data.shapes\n"
        "heavy = 'datasets', 'torch', 'trl', 'transformers', 'numpy', 'pandas', 'pyarrow'\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- annotations ---------------------------------------------------------------------------------


def test_ranks_by_comparisons_won():
    assert preferences.ranks(3, [(0, 1, 1), (1, 2, 1), (0, 2, -1)]) == [1, 1, 1]  # a circle
    assert preferences.ranks(3, [(0, 1, -1), (1, 2, 1)]) == [2, 1, 2]  # the best of three
    assert preferences.ranks(2, [(0, 1, 0)]) == [1, 1]
    assert preferences.ranks(2, []) == [1, 1]


# --- TRL's shapes --------------------------------------------------------------------------------


def test_all_pairs_and_what_is_left_out():
    data, left_out = preferences.pairs(judged(RIGHT, WRONG, WRONG, LOOSE, " "))
    assert [(says(r["chosen"]), says(r["rejected"])) for r in data] == [
        (RIGHT, WRONG), (RIGHT, LOOSE),
    ]  # fmt: skip
    assert left_out == {"ties": 6, "duplicates": 1, "empty": 1}
    assert data[0]["prompt"] == row()["prompt"] and data["id"][:] == ["a", "a"]


def test_one_pair_of_each_prompt():
    ranked = []
    for i in range(40):
        ranked += judged("c", "a", "b", "a", annotator=Fixed(a=1, b=2, c=3), id=str(i))
    ranked += judged("a", "a", annotator=Fixed(a=1), id="tied")
    some, left_out = preferences.pairs(ranked, how="random", seed=2)
    assert some["id"][:] == [str(i) for i in range(40)]
    assert left_out == {"ties": 1, "duplicates": 0, "empty": 0}
    seen = {(says(r["chosen"]), says(r["rejected"])) for r in some}
    assert seen == {("c", "a"), ("c", "b"), ("b", "a")}
    assert preferences.pairs(ranked, how="random", seed=2)[0][:] == some[:]
    assert preferences.pairs(ranked, how="random", seed=3)[0][:] != some[:]


def test_what_ships_depends_on_these_selections():
    ranked = []
    for i in range(8):
        ranked += judged("c", "a", "b", annotator=Fixed(a=1, b=2, c=3), id=f"train-{i:04d}")
    some, _ = preferences.pairs(ranked, how="random", seed=0)
    assert [says(r["chosen"]) + says(r["rejected"]) for r in some] == ["ba"] * 5 + ["cb", "cb", "ba"]
    labels = preferences.unpair(some, seed=0)
    assert "".join(says(r["completion"]) for r in labels) == "cbaaababbabbbbac"


def test_no_pair_left_and_a_wrong_choice():
    with pytest.raises(ValueError, match=r"no pair is left; left out are \{'ties': 1, "):
        preferences.pairs(judged(RIGHT, RIGHT))
    with pytest.raises(ValueError, match="how is 'best': it can be 'all' or 'random'"):
        preferences.pairs(judged(RIGHT, WRONG), how="best")


def test_the_labels_come_mixed():
    ranked = []
    for i in range(100):
        ranked += judged(RIGHT, WRONG, id=str(i))
    pairs, _ = preferences.pairs(ranked)
    labels = preferences.unpair(pairs, seed=1)["label"][:]
    assert sum(labels) == 100 and len(labels) == 200
    batches = [labels[i : i + 8] for i in range(0, 200, 8)]
    assert all(0 < sum(batch) < 8 for batch in batches[:10])


def test_unpair_gives_the_rows_of_trl():
    from trl.data_utils import unpair_preference_dataset

    pairs, _ = preferences.pairs(judged(RIGHT, WRONG, LOOSE, annotator=Clarity()))
    theirs, ours = unpair_preference_dataset(pairs), preferences.unpair(pairs, seed=1)
    assert sorted(theirs.column_names) == sorted(ours.column_names)

    def rows(data):
        return sorted(json.dumps(r, sort_keys=True) for r in data)

    assert rows(ours) == rows(theirs)
    assert theirs["label"][:] != ours["label"][:]


def test_noise_turns_round_the_share_that_was_asked_for():
    ranked = []
    for i in range(50):
        ranked += judged(RIGHT, WRONG, id=str(i))
    pairs, _ = preferences.pairs(ranked)
    before = set()
    for rate in (0.0, 0.1, 0.25, 1.0):
        noisy = preferences.noise(pairs, rate, seed=5)
        wrong = {r["id"] for r in noisy if says(r["chosen"]) == WRONG}
        assert len(wrong) == round(50 * rate) and before <= wrong
        assert wrong == {r["id"] for r in noisy if r["flipped"]}
        assert all({says(r["chosen"]), says(r["rejected"])} == {RIGHT, WRONG} for r in noisy)
        before = wrong
    assert preferences.noise(pairs, 0.1, seed=6)["flipped"][:] != noisy["flipped"][:]
    with pytest.raises(ValueError, match=r"rate is -0\.1"):
        preferences.noise(pairs, -0.1)


def test_a_verdict_can_be_read_back_from_its_file(tmp_path):
    ranked = judged(RIGHT, WRONG, LOOSE, annotator=Noisy(0.5))
    preferences.write(ranked, tmp_path / "x.jsonl")
    again = preferences.read(tmp_path / "x.jsonl")
    assert preferences.pairs(again)[0].to_list() == preferences.pairs(ranked)[0].to_list()
