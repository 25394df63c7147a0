"""Labelling by hand, in a notebook or without a screen; every answer is on disk at once.

    label(rows, annotator="anna", path="labels.jsonl")    buttons and keys, as the last line of a cell
    session = Session(rows, "anna", "labels.jsonl")       the same for a program; rows as of data.preferences
    session.choose("left")                                or right, tie, skip; undo() takes it back
"""

import json
import os
import random
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets

from rlnb.data import preferences
from rlnb.data.annotators import Annotator, Row, Verifier
from rlnb.measure import agreement
from rlnb.measure.intervals import Proportion

SIDES = ("left", "right")
ANSWERS = (*SIDES, "tie", "skip")
BUTTONS = ("left", "tie", "right", "skip", "undo")  # their first letters are the keys
LINE = "1px solid var(--jp-border-color1, #bdbdbd)"  # JupyterLab's colour, or one for Colab
TEXT = "white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; padding: 0 4px;"
TALL = "font-size: 1.05em; max-height: 20rem; overflow: auto;"
MONO = "font-family: var(--jp-code-font-family, monospace); max-height: 24rem; overflow: auto;"


def label(rows: Iterable[Row], *, annotator: str, path: str | Path) -> "LabelView":
    """A ``Session`` on the screen, as the last line of a cell."""
    return LabelView(Session(rows, annotator, path))


@dataclass(frozen=True)
class Item:
    """One question to the annotator: a row with two responses, and these as they stand, left and right."""

    row: Row
    shown: list[str]
    key = property(lambda self: (self.row["id"], frozenset(self.shown)))


class Session:
    """One annotator's way through rows of responses; the next session of that name and path goes on with it.

    rows: {id, prompt, responses} and, for ``agreement``, {question, answer}. Of a row's distinct responses two
        are drawn, the same for everybody; who stands left is drawn for each annotator anew, so that a liking
        for a side cancels out. Rows with less than two are left out.
    path: a .jsonl file, an answer a line, or a folder with one for each annotator.
    """

    def __init__(self, rows: Iterable[Row], annotator: str, path: str | Path, *, seed: int = 0) -> None:
        if not re.fullmatch(r"\w[\w .@-]{0,63}", annotator):
            raise ValueError(f"annotator is {annotator!r}: use letters, digits, ' ', '.', '@', '-'")
        self.annotator, self.seed, path = annotator, seed, Path(path)
        self.file = path if path.suffix == ".jsonl" else path / f"{annotator}.jsonl"
        rows = list(rows)
        self.items: list[Item] = [item for row in rows if (item := self._item(row))]
        if not self.items:
            raise ValueError(f"none of the {len(rows)} rows has two different responses to compare")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.labels = self._read()  # the answers by item key, in the order of coming

    @property
    def current(self) -> Item | None:
        """The item to answer, None at the end."""
        return next((item for item in self.items if item.key not in self.labels), None)

    def choose(self, what: str) -> None:
        """Answer the current item with one of ANSWERS, on disk when this returns; else ValueError."""
        item = self.current
        if item is None:
            raise ValueError(f"all {len(self.items)} items are answered; undo() takes one back")
        if what not in ANSWERS:
            raise ValueError(f"the answer is {what!r}: it can be {', '.join(ANSWERS)}")
        self.labels[item.key] = self._append(item, what)

    def undo(self) -> None:
        """Take this annotator's last answer back, also one of an earlier session; it is asked again."""
        if not self.labels:
            raise ValueError(f"{self.annotator} has answered nothing that could be taken back")
        last = next(reversed(self.labels))
        self._append(next(item for item in self.items if item.key == last), "undo")
        del self.labels[last]

    def play(self, annotator: Annotator, n: int | None = None) -> None:
        """Let an annotator of rlnb.data.annotators answer the next n items, by default all."""
        for item in [item for item in self.items if item.key not in self.labels][:n]:
            (row,) = preferences.annotate([item.row], annotator)
            best = row["responses"][row["ranks"].index(1)]
            self.choose("tie" if row["ranks"] == [1, 1] else SIDES[item.shown.index(best)])

    @property
    def progress(self) -> dict[str, int]:
        """How many items there are, are answered (skipped among them), and are skipped."""
        skipped = sum(event["choice"] == "skip" for event in self.labels.values())
        return {"items": len(self.items), "answered": len(self.labels), "skipped": skipped}

    def annotations(self) -> list[Row]:
        """The answers as annotated rows; items without an answer and skipped ones are left out."""
        found = []
        for item in self.items:
            event = self.labels.get(item.key, {"choice": "skip"})
            if event["choice"] != "skip":
                shown = dict(zip(SIDES, event["shown"], strict=True)) | {"tie": None}
                verdict = {item.row["responses"][0]: 1, None: 0}.get(shown[event["choice"]], -1)
                found.append(preferences.judged(item.row, self.annotator, [(0, 1, verdict)]))
        return found

    def agreement(self) -> dict[str, Proportion]:
        """How often the verifier prefers the same, where both take a side: {"gold": share}; {} without any."""
        mine = [row for row in self.annotations() if "answer" in row]
        gold = preferences.annotate(mine, Verifier())
        _, both = agreement.shared(agreement.verdicts(mine), agreement.verdicts(gold))
        return {"gold": Proportion(sum(a == b for a, b in both), len(both))} if both else {}

    def pairs(self) -> tuple[Any, dict[str, int]]:
        """The answers for RewardTrainer, DPOTrainer and ORPOTrainer: see ``preferences.pairs``."""
        return preferences.pairs(self.annotations())

    def __str__(self) -> str:
        said = "{answered} of {items} answered, {skipped} skipped".format(**self.progress)
        return said + "".join(f"; agrees with {name} {share}" for name, share in self.agreement().items())

    def _item(self, row: Row) -> Item | None:
        texts = [text for text in dict.fromkeys(row["responses"]) if text.strip()]
        if len(texts) < 2:
            return None
        drawn = random.Random(f"{self.seed}-{row['id']}").sample(range(len(texts)), 2)
        texts = [texts[i] for i in sorted(drawn)]
        shown = texts[:]
        random.Random(f"{self.seed}-{self.annotator}-{row['id']}").shuffle(shown)
        return Item({**row, "responses": texts}, shown)

    def _append(self, item: Item, choice: str) -> dict[str, Any]:
        # A line that a crash has cut is ended first.
        event = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "annotator": self.annotator,
                 "id": item.row["id"], "choice": choice, "shown": item.shown}  # fmt: skip
        line = (json.dumps(event, ensure_ascii=False) + "\n").encode()
        with self.file.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        return event

    def _read(self) -> dict[tuple, dict]:
        """This annotator's answers that count, for the items of this session."""
        labels, broken, keys = {}, [], {item.key for item in self.items}
        lines = self.file.read_bytes().splitlines() if self.file.is_file() else []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                event = json.loads(line)
                key, choice = (event["id"], frozenset(event["shown"])), event["choice"]
                if event["annotator"] == self.annotator and key in keys:
                    labels.pop(key, None)
                    if choice in ANSWERS:  # else it is "undo"
                        labels[key] = event
            except (KeyError, TypeError, ValueError):
                broken.append(number)
        if broken:  # such as a line cut by a crash
            warnings.warn(f"{self.file}: skipped line(s) {broken}, which are no answers", stacklevel=3)
        return labels


class LabelView:
    """A session on the screen: prompt, a card for each response, buttons, keys, progress."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.prompt, self.status, self.message = (ipywidgets.HTML() for _ in range(3))
        wide = dict(flex="1 1 15rem", min_width="0", margin="4px", padding="0.5rem", border=LINE)
        self.cards = [ipywidgets.HTML(layout=wide) for _ in SIDES]
        self.buttons = {}
        for name in BUTTONS:
            look = dict(button_style="primary" if name in SIDES else "", layout=dict(width="6rem"))
            self.buttons[name] = ipywidgets.Button(description=name.title(), tooltip=f"key {name[0]}", **look)
            self.buttons[name].on_click(lambda _, name=name: self.act(name))
        narrow = dict(flex="1 1 16rem", max_width="26rem")
        self.keys = ipywidgets.Text(placeholder="or click here and type l, t, r, s or u", layout=narrow)
        self.keys.observe(self._on_key, "value")
        self.bar = ipywidgets.IntProgress(max=len(session.items), layout=dict(width="99%", height="0.6rem"))
        wrap = dict(flex_flow="row wrap", align_items="stretch")
        rows = [ipywidgets.Box(row, layout=wrap) for row in (self.cards, [*self.buttons.values(), self.keys])]
        parts = [self.prompt, *rows, self.bar, self.status, self.message]
        self.box = ipywidgets.VBox(parts, layout=dict(max_width="72rem"))
        self.refresh()

    def act(self, what: str) -> None:
        """Answer, or "undo", and show what comes next. What goes wrong is shown, not raised."""
        try:
            self.session.undo() if what == "undo" else self.session.choose(what)
            self.refresh()
        except (OSError, ValueError) as error:
            self.refresh(str(error))

    def refresh(self, said: str = "") -> None:
        """Show the session as it is, with a message below."""
        session, item = self.session, self.session.current
        turns = item.row["prompt"] if item else [{"content": "All answered."}]
        self.prompt.value = "".join(_html(message["content"], TALL) for message in turns)
        for i, card in enumerate(self.cards):
            card.layout.display = "block" if item else "none"
            card.value = f"<b>{SIDES[i].title()}</b>{_html(item.shown[i], MONO)}" if item else ""
        for name, button in self.buttons.items():
            button.disabled = not session.labels if name == "undo" else item is None
        self.bar.value = len(session.labels)
        self.status.value = _html(str(session), "color: var(--jp-ui-font-color2, #616161);")
        self.message.value = _html(said, "color: var(--jp-error-color1, #c62828);") if said else ""

    def _on_key(self, change: dict[str, Any]) -> None:
        # One letter is one answer. Several at once came before the screen showed what they answer.
        typed = change["new"].strip().lower()
        if name := next((name for name in BUTTONS if typed == name[0]), None):
            self.act(name)
        elif change["new"]:
            self.refresh(f"{typed[:20]!r} is no answer: type one letter at a time, l, t, r, s or u")
        self.keys.value = ""

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return self.box._repr_mimebundle_(**kwargs)


def _html(text: str, style: str) -> str:
    return f"<div style='{TEXT} {style}'>{escape(text)}</div>"
