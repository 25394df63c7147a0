"""Labelling by hand, in a notebook or without a screen; every answer is on disk at once.

    label(rows, annotator="anna", path="labels/")   buttons and keys, as the last line of a cell
    session = Session(rows, "anna", "labels/")      the same for a program; rows as of data.preferences
    session.choose("left")                          or right, tie, skip; undo() takes it back
"""

import json
import os
import random
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
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
GOLD = Verifier()
LINE = "1px solid var(--jp-border-color1, #bdbdbd)"  # JupyterLab's colour, or one for Colab
TEXT = "white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; padding: 0 4px;"
TALL = "font-size: 1.05em; max-height: 20rem; overflow: auto;"
MONO = "font-family: var(--jp-code-font-family, monospace); max-height: 24rem; overflow: auto;"


def label(rows: Iterable[Row], *, annotator: str, path: str | Path, **options: Any) -> "LabelView":
    """A ``Session`` on the screen, as the last line of a cell. options: as for that."""
    return LabelView(Session(rows, annotator, path, **options))


@dataclass(frozen=True)
class Item:
    """One question to the annotator."""

    row: Row  # with the two responses that are shown
    shown: list[str]  # these as they stand, left and right

    @property
    def key(self) -> tuple:
        return self.row["id"], frozenset(self.shown)

    def verdict(self, label: Mapping[str, Any]) -> int:
        """1 where the label prefers the row's first response, -1 for the second, 0 for a tie."""
        chosen = dict(zip(SIDES, label["shown"], strict=True)).get(label["choice"])
        return 0 if chosen is None else 1 if chosen == self.row["responses"][0] else -1


class Session:
    """One annotator's way through rows of responses; the next session of that name goes on with it.

    rows: {id, prompt, responses} and, for the gold, {question, answer}. Of a row's distinct responses two are
        drawn, the same for everybody; who stands left is drawn for each annotator anew, so that a liking
        for a side cancels out. ``left_out`` counts rows with nothing to compare.
    path: a .jsonl file, an answer a line, or a folder with one for each annotator. Several may share it.
    gold: who to compare with in ``agreement``; None for rows without an answer.
    """

    def __init__(
        self, rows: Iterable[Row], annotator: str, path: str | Path, *, seed: int = 0,
        gold: Annotator | None = GOLD,
    ) -> None:  # fmt: skip
        if not isinstance(annotator, str) or not re.fullmatch(r"\w[\w .@-]{0,63}", annotator):
            raise ValueError(f"annotator is {annotator!r}: use letters, digits, ' ', '.', '@', '-'")
        if gold and annotator == gold.name:
            raise ValueError(f"annotator is {annotator!r}, the name of the gold: take another")
        self.annotator, self.seed, self.gold, self.path = annotator, seed, gold, Path(path)
        self._in_folder = self.path.is_dir() or not (self.path.suffix or self.path.is_file())
        self.file = self.path / f"{annotator}.jsonl" if self._in_folder else self.path
        rows = self._checked(rows)
        self.items: list[Item] = [item for row in rows if (item := self._item(row))]
        self.left_out = len(rows) - len(self.items)
        if not self.items:
            raise ValueError(f"none of the {len(rows)} rows has two different responses to compare")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._by_key = {item.key: item for item in self.items}
        self.labels = self._replay(_events([self.file]), annotator)  # by item key, in the order of coming

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
        key = next(reversed(self.labels))
        self._append(self._by_key[key], "undo")
        del self.labels[key]

    def play(self, annotator: Annotator, n: int | None = None, seed: int = 0) -> None:
        """Let an annotator of rlnb.data.annotators answer the next n items, by default all."""
        for item in [item for item in self.items if item.key not in self.labels][:n]:
            (row,) = preferences.annotate([item.row], annotator, seed)
            best = row["responses"][row["ranks"].index(1)]
            self.choose("tie" if row["ranks"] == [1, 1] else SIDES[item.shown.index(best)])

    @property
    def progress(self) -> dict[str, int]:
        """How many items there are, are answered (skipped among them), and are skipped."""
        skipped = sum(label["choice"] == "skip" for label in self.labels.values())
        return {"items": len(self.items), "answered": len(self.labels), "skipped": skipped}

    @property
    def left_first(self) -> Proportion | None:
        """How often the left response was chosen, of the answers that chose one: a half is to be expected."""
        chosen = [label["choice"] for label in self.labels.values() if label["choice"] in SIDES]
        return Proportion(chosen.count("left"), len(chosen)) if chosen else None

    def annotations(self) -> list[Row]:
        """The answers as annotated rows; items without an answer and skipped ones are left out."""
        return self._annotated(self.annotator, self.labels)

    def others(self) -> dict[str, list[Row]]:
        """The same of everybody else who answered these items in the same file or folder."""
        events = list(_events(sorted(self.path.glob("*.jsonl")) if self._in_folder else [self.path]))
        names = sorted({event["annotator"] for event in events} - {self.annotator})
        found = ((name, self._annotated(name, self._replay(events, name))) for name in names)
        return {name: rows for name, rows in found if rows}

    def agreement(self) -> dict[str, Proportion]:
        """With the gold and with the others: how often both prefer the same, where both take a side."""
        found, mine = {}, self.annotations()
        gold = {self.gold.name: preferences.annotate(mine, self.gold)} if self.gold else {}
        for name, rows in (gold | self.others()).items():
            _, both = agreement.shared([agreement.verdicts(mine), agreement.verdicts(rows)], ties=False)
            if both:
                found[name] = Proportion(sum(a == b for a, b in both), len(both))
        return found

    def pairs(self) -> tuple[Any, dict[str, int]]:
        """The answers for RewardTrainer, DPOTrainer and ORPOTrainer: see ``preferences.pairs``."""
        return preferences.pairs(self.annotations())

    def __str__(self) -> str:
        parts = ["{answered} of {items} answered, {skipped} skipped".format(**self.progress)]
        if self.left_first:
            parts.append(f"left chosen {self.left_first}")
        parts += [f"agrees with {name} {share}" for name, share in self.agreement().items()]
        return "; ".join(parts)

    def _checked(self, rows: Iterable[Row]) -> list[Row]:
        needed = ("id", "prompt", "responses", *(("question", "answer") if self.gold else ()))
        found: dict[str, Row] = {}
        for i, row in enumerate(rows):
            if missing := [name for name in needed if name not in row]:
                way_out = " (gold=None does without)" if "answer" in missing else ""
                raise ValueError(f"row {i}: no {', '.join(missing)}{way_out}")
            if not isinstance(row["id"], str) or row["id"] in found:
                raise ValueError(f"row {i}: id {row['id']!r} is no string or has come before")
            found[row["id"]] = row
        return list(found.values())

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
        # One write of one line, so that two sessions on one file don't cut each other's lines. A line that
        # a crash has cut is ended first; behind a write under way that leaves an empty one.
        event = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "annotator": self.annotator}
        event |= {"id": item.row["id"], "choice": choice, "shown": item.shown}
        line = (json.dumps(event, ensure_ascii=False) + "\n").encode()
        with self.file.open("a+b", buffering=0) as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            if file.write(line) != len(line):
                raise OSError(f"{self.file}: the answer was not written in full; is the disk full?")
            os.fsync(file.fileno())
        return event

    def _replay(self, events: Iterable[dict], annotator: str) -> dict[tuple, dict]:
        """An annotator's answers that count, for the items of this session."""
        labels: dict[tuple, dict] = {}
        for event in events:
            key = (event["id"], frozenset(event["shown"]))
            if event["annotator"] == annotator and key in self._by_key:
                labels.pop(key, None)
                if event["choice"] != "undo":
                    labels[key] = event
        return labels

    def _annotated(self, annotator: str, labels: Mapping[tuple, dict]) -> list[Row]:
        found = [(item, labels[item.key]) for item in self.items if item.key in labels]
        return [preferences.judged(item.row, annotator, [(0, 1, item.verdict(label))])
                for item, label in found if label["choice"] != "skip"]  # fmt: skip


def _events(files: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """The answers in files, in order. What is none, such as a line cut by a crash, is warned of."""
    for path in files:
        broken = []
        for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], 1):
            try:
                event = json.loads(line)
                texts = [event["annotator"], event["id"], *event["shown"]]
                good = isinstance(event["shown"], list) and [type(text) for text in texts] == [str] * 4
                good = good and event["choice"] in (*ANSWERS, "undo")
            except (KeyError, TypeError, ValueError, RecursionError):
                good = False
            if good:
                yield event
            elif line.strip():
                broken.append(number)
        if broken:
            warnings.warn(f"{path}: skipped line(s) {broken}, which are no answers", stacklevel=2)


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
        except (OSError, ValueError) as error:
            return self.refresh(str(error))
        return self.refresh()

    def refresh(self, said: str = "") -> None:
        """Show the session as it is, with a message below."""
        session, item = self.session, self.session.current
        self.prompt.value = _conversation(item.row["prompt"]) if item else _html("All answered.")
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
        if name := next((name for name in BUTTONS if typed in (name, name[0])), None):
            self.act(name)
        elif change["new"]:
            self.refresh(f"{typed[:20]!r} is no answer: type one letter at a time, l, t, r, s or u")
        self.keys.value = ""

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return self.box._repr_mimebundle_(**kwargs)


def _conversation(messages: list[dict[str, str]]) -> str:
    # Roles are named where there is more than one message.
    roles = [f"<b>{escape(m['role'])}</b>" if len(messages) > 1 else "" for m in messages]
    return "".join(role + _html(m["content"], TALL) for role, m in zip(roles, messages, strict=True))


def _html(text: str, style: str = "") -> str:
    return f"<div style='{TEXT} {style}'>{escape(text)}</div>"
