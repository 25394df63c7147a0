"""rlnb.show.labelling on the screen: the same session behind buttons, keys and plain calls, and nothing else."""

import pytest

from rlnb.data.annotators import Verifier
from rlnb.show import labelling

ROWS = [
    {"id": f"p{i}", "question": f"{i} + 5?", "answer": i + 5, "kind": "gain",
     "prompt": [{"role": "user", "content": f"What is {i} + 5 & more?"}],
     "responses": [f"<reasoning>{i} + 5 = {i + 5}</reasoning><answer>{i + 5}</answer>", "no", "7"]}
    for i in range(6)
]  # fmt: skip


def choices(view):
    return [label["choice"] for label in view.session.labels.values()]


@pytest.fixture
def view(tmp_path):
    return labelling.label(ROWS, annotator="anna", path=tmp_path)


def test_it_shows_the_current_item_as_text(view):
    item = view.session.current
    assert "What is 0 + 5 &amp; more?" in view.prompt.value
    for card, text, side in zip(view.cards, item.shown, ("Left", "Right"), strict=True):
        assert side in card.value and text.replace("<", "&lt;").replace(">", "&gt;") in card.value
        assert "<reasoning>" not in card.value
    assert view.buttons["undo"].disabled and not view.buttons["left"].disabled
    assert list(view.buttons) == ["left", "tie", "right", "skip", "undo"]
    assert view.box in [view.box] and view._repr_mimebundle_()


def test_buttons_call_the_session(view):
    for name in ("left", "tie", "skip", "right", "undo", "tie"):
        view.buttons[name].click()
    assert choices(view) == ["left", "tie", "skip", "tie"]
    assert view.bar.value == 4 and view.bar.max == 6
    assert "4 of 6 answered, 1 skipped" in view.status.value
    assert "What is 4 + 5" in view.prompt.value
    resumed = labelling.Session(ROWS, "anna", view.session.file)
    assert resumed.labels == view.session.labels


def test_keys_are_one_letter_each(view):
    for letter in "lRtsu":
        view.keys.value = letter
        assert view.keys.value == ""
    assert choices(view) == ["left", "right", "tie"]
    for typed in ("lr", "x", "1", "left!", "<b>"):
        view.keys.value = typed
        assert "is no answer" in view.message.value and "<b>" not in view.message.value
    assert choices(view) == ["left", "right", "tie"] and view.keys.value == ""
    view.keys.value = "r"
    assert view.message.value == "" and choices(view)[-1] == "right"


def test_at_the_end_only_undo_is_left(view):
    view.session.play(Verifier())
    view.refresh()
    assert [n for n, button in view.buttons.items() if not button.disabled] == ["undo"]
    assert "All answered" in view.prompt.value and view.bar.value == 6
    assert all(card.layout.display == "none" for card in view.cards)
    view.act("left")
    assert "all 6 items are answered" in view.message.value
    view.act("undo")
    assert view.message.value == "" and view.cards[0].layout.display == "block"
    assert "agrees with gold 100.0 %" in view.status.value


def test_what_cannot_be_written_is_said_and_the_item_stays(view):
    view.session.file.mkdir(parents=True)
    before = view.prompt.value
    view.act("left")
    assert "directory" in view.message.value.lower() and view.prompt.value == before
    assert choices(view) == []


def test_a_prompt_may_have_several_messages(tmp_path):
    talk = [{"role": "system", "content": "Be brief."}, *ROWS[0]["prompt"]]
    view = labelling.label([ROWS[0] | {"prompt": talk}], annotator="anna", path=tmp_path)
    assert 0 < view.prompt.value.index(">Be brief.<") < view.prompt.value.index(">What is 0 + 5 &amp; more?<")
