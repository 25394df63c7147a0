"""rlnb.show.labelling: every answer on disk at once, resumed, undone, shared, and fit for the trainers."""

import json
import re
import subprocess
import sys
import threading

import pytest

from rlnb.data import preferences
from rlnb.data.annotators import Noisy, Verifier
from rlnb.measure import agreement
from rlnb.measure.intervals import Proportion
from rlnb.show import labelling
from rlnb.show.labelling import Session


def row(i, *responses):
    question = f"Anna has {i} apples and buys 5 more. How many now?"
    right = f"<reasoning>{i} + 5 = {i + 5}</reasoning><answer>{i + 5}</answer>"
    return {"id": f"p{i}", "question": question, "answer": i + 5, "kind": "gain",
            "prompt": [{"role": "user", "content": question}],
            "responses": list(responses) or [right, f"It is {i}.", right]}  # fmt: skip


ROWS = [row(i) for i in range(10, 22)]


def events(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def answer_all(session, right=True):
    """The answer that the verifier would give, or its opposite."""
    while session.current:
        best = ["<reasoning>" in text for text in session.current.shown].index(right)
        session.choose(labelling.SIDES[best])


# --- answering -----------------------------------------------------------------------------------


def test_every_answer_is_on_disk_at_once(tmp_path):
    session = Session(ROWS, "anna", tmp_path / "labels.jsonl")
    for i, choice in enumerate(("left", "right", "tie", "skip")):
        item = session.current
        assert item.row["id"] == ROWS[i]["id"]
        session.choose(choice)
        (*_, event) = events(tmp_path / "labels.jsonl")
        assert event.pop("time").endswith("+00:00")
        assert event == {"annotator": "anna", "id": item.row["id"], "choice": choice,
                         "shown": item.shown}  # fmt: skip
    assert session.progress == {"items": 12, "answered": 4, "skipped": 1}


def test_it_survives_being_killed_and_goes_on(tmp_path):
    path = tmp_path / "labels.jsonl"
    code = (
        "import json, os, sys; from rlnb.show.labelling import Session\n"
        "rows = json.load(sys.stdin); session = Session(rows, 'anna', sys.argv[1])\n"
        "session.choose('left'); session.choose('tie'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], input=json.dumps(ROWS), text=True)
    again = Session(ROWS, "anna", path)
    assert again.progress["answered"] == 2 and again.current.row["id"] == ROWS[2]["id"]
    again.choose("right")
    assert [event["choice"] for event in events(path)] == ["left", "tie", "right"]


def test_a_line_that_was_cut_off_is_skipped_and_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "labels.jsonl"
    session = Session(ROWS, "anna", path)
    session.choose("left"), session.choose("left")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(UserWarning, match=r"labels.jsonl: skipped line\(s\) \[2\]"):
        again = Session(ROWS, "anna", path)
    assert again.progress["answered"] == 1 and again.current.row["id"] == ROWS[1]["id"]
    again.choose("right")
    with pytest.warns(UserWarning, match=r"skipped line\(s\) \[2\]"):
        assert Session(ROWS, "anna", path).progress["answered"] == 2


@pytest.mark.parametrize(
    "junk",
    [b"\xff\xfe", b"null", b"[1]", b'{"annotator": "anna"}',
     b'{"annotator": "anna", "id": "p10", "choice": "left", "shown": 3}'],
)  # fmt: skip
def test_lines_that_are_no_answers_are_named(junk, tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_bytes(junk + b"\n")
    with pytest.warns(UserWarning, match=r"skipped line\(s\) \[1\], which are no answers"):
        session = Session(ROWS, "anna", path)
    assert session.progress["answered"] == 0


def test_undo_goes_back_through_earlier_sessions(tmp_path):
    path = tmp_path / "labels.jsonl"
    first = Session(ROWS, "anna", path)
    first.choose("left"), first.choose("skip")
    again = Session(ROWS, "anna", path)
    again.undo()
    assert again.current.row["id"] == ROWS[1]["id"]
    again.undo()
    assert again.current.row["id"] == ROWS[0]["id"] and again.progress["answered"] == 0
    with pytest.raises(ValueError, match="anna has answered nothing that could be taken back"):
        again.undo()
    again.choose("right")
    assert [e["choice"] for e in events(path)] == ["left", "skip", "undo", "undo", "right"]
    (label,) = Session(ROWS, "anna", path).labels.values()
    assert label["choice"] == "right"


def test_answers_that_it_does_not_take(tmp_path):
    session = Session(ROWS, "anna", tmp_path)
    for what in ("", "LEFT", "1", "undo", None):
        says = f"the answer is {what!r}: it can be left, right, tie, skip"
        with pytest.raises(ValueError, match=re.escape(says)):
            session.choose(what)
    assert not session.file.exists()
    answer_all(session)
    with pytest.raises(ValueError, match=r"all 12 items are answered; undo\(\)"):
        session.choose("left")


def test_a_full_disk_is_no_answer(tmp_path, monkeypatch):
    session = Session(ROWS, "anna", tmp_path / "labels.jsonl")
    (tmp_path / "labels.jsonl").mkdir()  # nothing can be written there
    with pytest.raises(OSError):
        session.choose("left")
    assert session.progress["answered"] == 0 and session.current.row["id"] == ROWS[0]["id"]


# --- what is shown -------------------------------------------------------------------------------


def test_sides_are_random_and_the_texts_the_same_for_everybody(tmp_path):
    rows = [row(i) for i in range(10, 410)]
    anna, bob = (Session(rows, name, tmp_path) for name in ("anna", "bob"))
    assert [i.key for i in anna.items] == [i.key for i in bob.items]
    same = sum(a.shown == b.shown for a, b in zip(anna.items, bob.items, strict=True))
    right = sum("<reasoning>" in item.shown[0] for item in anna.items)
    assert abs(same - 200) < 60 and abs(right - 200) < 60  # six standard deviations of a coin
    again = Session(rows, "anna", tmp_path)
    assert [i.shown for i in again.items] == [i.shown for i in anna.items]
    other = Session(rows, "anna", tmp_path, seed=1)
    assert [i.shown for i in other.items] != [i.shown for i in anna.items]


def test_rows_with_nothing_to_compare(tmp_path):
    rows = [row(1, "a", "a", " "), row(2, "a", "b", "a"), row(3, "a")]
    session = Session(rows, "anna", tmp_path)
    assert len(session.items) == 1
    assert sorted(session.current.shown) == ["a", "b"]
    with pytest.raises(ValueError, match="none of the 1 rows has two different responses"):
        Session(rows[:1], "anna", tmp_path)


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        (ROWS, {"annotator": ""}, "annotator is ''"),
        (ROWS, {"annotator": "../anna"}, "annotator is '../anna'"),
        ([], {}, "none of the 0 rows"),
    ],
)
def test_what_cannot_be_a_session(rows, options, says, tmp_path):
    options = {"annotator": "anna", "path": tmp_path} | options
    with pytest.raises(ValueError, match=re.escape(says)):
        Session(rows, **options)


# --- several annotators --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["labels", "labels.jsonl"])
def test_two_annotators_share_a_folder_or_a_file(name, tmp_path):
    anna, bob = (Session(ROWS, who, tmp_path / name) for who in ("anna", "bob"))
    for _ in range(5):  # in turns
        anna.choose("left"), bob.choose("tie")
    bob.undo()
    again = Session(ROWS, "anna", tmp_path / name)
    assert again.progress["answered"] == 5
    assert Session(ROWS, "bob", tmp_path / name).progress["answered"] == 4
    files = {"labels": ["anna.jsonl", "bob.jsonl"], "labels.jsonl": ["labels.jsonl"]}[name]
    assert sorted(p.name for p in tmp_path.rglob("*.jsonl") if p.is_file()) == files


def test_many_writers_do_not_cut_each_others_lines(tmp_path):
    rows, path = [row(i) for i in range(10, 60)], tmp_path / "labels.jsonl"
    sessions = [Session(rows, f"w{i}", path) for i in range(4)]
    threads = [threading.Thread(target=answer_all, args=(s,)) for s in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(events(path)) == 200
    assert all(Session(rows, f"w{i}", path).agreement() == {"gold": Proportion(50, 50)} for i in range(4))


def test_answers_to_other_responses_do_not_count(tmp_path):
    path = tmp_path / "labels.jsonl"
    answer_all(Session(ROWS, "anna", path))
    changed = [r | {"responses": [r["responses"][0], "something new"]} for r in ROWS]
    session = Session(changed, "anna", path)
    assert session.progress["answered"] == 0
    with pytest.raises(ValueError, match="nothing that could be taken back"):
        session.undo()
    session.choose("left")
    assert Session(ROWS, "anna", path).progress["answered"] == 12


def test_agreement_with_the_verifier(tmp_path):
    anna, bob = (Session(ROWS, who, tmp_path) for who in ("anna", "bob"))
    assert anna.agreement() == {}
    answer_all(anna)
    assert anna.agreement() == {"gold": Proportion(12, 12)}
    bob.choose("skip"), bob.choose("tie")
    answer_all(bob, right=False)
    assert bob.agreement() == {"gold": Proportion(0, 10)}
    assert str(bob) == "12 of 12 answered, 1 skipped; agrees with gold 0.0 % [0.0, 27.8]"
    said = {"bob": bob.annotations(), "anna": anna.annotations()}
    assert agreement.agreement(said)["kappa"][0].value == -1
    assert agreement.agreement(said)["comparisons"][0] == 10
    without = [{name: row[name] for name in ("id", "prompt", "responses")} for row in ROWS]
    cleo = Session(without, "cleo", tmp_path)
    cleo.choose("left")
    assert cleo.agreement() == {} and str(cleo).startswith("1 of 12 answered")


# --- for the trainers ----------------------------------------------------------------------------


def test_the_answers_become_data_sets(tmp_path):
    session = Session(ROWS, "anna", tmp_path)
    session.choose("skip"), session.choose("tie")
    answer_all(session)
    pairs, left_out = session.pairs()
    assert len(pairs) == 10 and left_out["ties"] == 1
    ranked = [r for r in preferences.annotate(ROWS, Verifier()) if r["id"] in pairs["id"][:]]
    gold, _ = preferences.pairs(ranked)
    assert pairs[:]["chosen"] == gold[:]["chosen"] and pairs[:]["prompt"] == gold[:]["prompt"]
    labels = preferences.unpair(pairs, seed=1)
    assert sum(labels["label"][:]) == 10 and len(labels) == 20
    for r in labels:
        assert r["label"] == ("<reasoning>" in r["completion"][0]["content"])


def test_an_annotator_can_play(tmp_path):
    gold, noisy = Session(ROWS, "anna", tmp_path), Session(ROWS, "bob", tmp_path)
    gold.play(Verifier(), n=5)
    assert gold.progress["answered"] == 5
    gold.play(Verifier())
    assert gold.current is None and gold.agreement() == {"gold": Proportion(12, 12)}
    noisy.play(Noisy(1.0))
    assert noisy.agreement()["gold"] == Proportion(0, 12)
    rows = [row(1, "a", "b"), row(2, "tie", row(2)["responses"][0])]
    ties = Session(rows, "cleo", tmp_path)
    ties.play(Verifier())
    assert [label["choice"] == "tie" for label in ties.labels.values()] == [True, False]
    assert ties.agreement()["gold"] == Proportion(1, 1)
    ties.undo(), ties.play(Noisy(0.0))
    assert ties.agreement()["gold"] == Proportion(1, 1)
