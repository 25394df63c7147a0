"""Labelling by hand, without a screen: what is asked next, and every answer on disk at once.

    session = Session(rows, "anna", "labels/")      rows as from preferences.collect
    session.current.shown                           the two responses, left and right
    session.choose("left")                          or right, tie, skip; undo() takes it back
    data, left_out = session.pairs()                for the trainers

rlnb.show.widgets shows a session in a notebook. The file is JSONL, one answer a line, only ever appended
to: the next session with the same name goes on where this one stopped.
"""

import json
import os
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlnb.data import preferences, agreement as quality
from rlnb.data.annotators import Annotator, Comparison, Verifier, Row
from rlnb.measure.evaluate import Proportion

if TYPE_CHECKING:
    from datasets import Dataset

SIDES = ("left", "right")
GOLD = Verifier()


@dataclass(frozen=True)
class Item:
    """One question to the annotator."""

    row: Row  # with the k responses that are shown
    order: tuple[int, ...]  # their places in the row, from left to right on the screen

    @property
    def shown(self) -> list[str]:
        return [self.row["responses"][i] for i in self.order]

    @property
    def key(self) -> tuple:
        return self.row["id"], frozenset(self.row["responses"])


class Session:
    """One annotator's way through rows of responses.

    rows: {id, prompt, responses} and, for the gold, {question, answer}. Of a row's distinct
        responses k are drawn (all, if there are fewer), the same for every annotator; their order
        on the screen is drawn for each annotator anew, so that a liking for a side cancels out.
        Rows with one distinct response have nothing to compare: ``left_out`` counts them.
    path: a .jsonl file, or a folder, which gets a file for each annotator. Several may share either.
    gold: who to compare with in ``agreement``; None for rows without an answer.
    ``file`` is where the answers go, ``labels`` the answers by item key in the order of coming.
    """

    def __init__(
        self, rows: Iterable[Row], annotator: str, path: str | Path, *, k: int = 2, seed: int = 0,
        gold: Annotator | None = GOLD,
    ) -> None:  # fmt: skip
        if not isinstance(annotator, str) or not re.fullmatch(r"\w[\w .@-]{0,63}", annotator):
            raise ValueError(f"annotator is {annotator!r}: use letters, digits, ' ', '.', '@', '-'")
        if not 2 <= k <= 9:
            raise ValueError(f"k is {k}: 2 to 9 responses can be shown at a time")
        if gold and annotator == gold.name:
            raise ValueError(f"annotator is {annotator!r}, the name of the gold: take another")
        self.annotator, self.k, self.seed, self.gold = annotator, k, seed, gold
        self.path = Path(path)
        self._in_folder = self.path.is_dir() or not (self.path.suffix or self.path.is_file())
        self.file = self.path / f"{annotator}.jsonl" if self._in_folder else self.path
        rows = list(rows)
        self._check(rows)
        found = [self._item(row) for row in rows]
        self.items: list[Item] = [item for item in found if item]
        self.left_out = len(rows) - len(self.items)
        if not self.items:
            raise ValueError(f"none of the {len(rows)} rows has two different responses to compare")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._by_key = {item.key: item for item in self.items}
        self.labels = self._replay(_events([self.file]), annotator)

    # --- answering -------------------------------------------------------------------------------

    @property
    def current(self) -> Item | None:
        """The item to answer, None at the end."""
        return next((item for item in self.items if item.key not in self.labels), None)

    def choose(self, what: str) -> None:
        """Answer the current item: "left" or "right" ("1" to "9" for k > 2), "tie" or "skip".

        The answer is on disk when this returns. Raises ValueError for anything else, and when no
        item is left.
        """
        item = self.current
        if item is None:
            raise ValueError(f"all {len(self.items)} items are answered; undo() takes one back")
        if what not in (known := self.choices(item)):
            raise ValueError(f"the answer is {what!r}: it can be {', '.join(known)}")
        self.labels[item.key] = self._append(item, what)

    def undo(self) -> None:
        """Take this annotator's last answer back, also one of an earlier session; it is asked again.

        Raises ValueError if there is none.
        """
        if not self.labels:
            raise ValueError(f"{self.annotator} has answered nothing that could be taken back")
        key = next(reversed(self.labels))
        self._append(self._by_key[key], "undo")
        del self.labels[key]

    def choices(self, item: Item) -> tuple[str, ...]:
        """The answers that an item takes."""
        places = tuple(str(i + 1) for i in range(len(item.order)))
        return (*(SIDES if self.k == 2 else places), "tie", "skip")

    def play(self, annotator: Annotator, n: int | None = None, seed: int = 0) -> None:
        """Let an annotator of rlnb.data.annotators answer the next n items, by default all.

        Of more than two responses it names the best, and skips if several share the first rank.
        """
        for item in [item for item in self.items if item.key not in self.labels][:n]:
            (row,) = preferences.annotate([item.row], annotator, seed)
            best = [i for i, rank in enumerate(row["ranks"]) if rank == 1]
            if len(best) == 1:
                self.choose(self.choices(item)[item.order.index(best[0])])
            else:
                self.choose("tie" if len(best) == len(row["ranks"]) else "skip")

    # --- what there is so far --------------------------------------------------------------------

    @property
    def progress(self) -> dict[str, int]:
        """How many items there are, are answered (skipped among them), and are skipped."""
        skipped = sum(label["choice"] == "skip" for label in self.labels.values())
        return {"items": len(self.items), "answered": len(self.labels), "skipped": skipped}

    @property
    def left_first(self) -> Proportion | None:
        """How often the leftmost response was chosen, of the answers that chose one.

        With two responses a half is to be expected, whatever they are. None without such an answer.
        """
        chosen = [label["choice"] for label in self.labels.values()]
        chosen = [choice for choice in chosen if choice not in ("tie", "skip")]
        return Proportion(sum(c in ("left", "1") for c in chosen), len(chosen)) if chosen else None

    def annotations(self) -> list[Row]:
        """The answers as annotated rows; items without an answer and skipped ones are left out."""
        return self._annotations(self.annotator, self.labels)

    def others(self) -> dict[str, list[Row]]:
        """The same of everybody else who answered these items in the same file or folder."""
        files = sorted(self.path.glob("*.jsonl")) if self._in_folder else [self.path]
        events = list(_events(files))
        names = sorted({event["annotator"] for event in events} - {self.annotator})
        found = {name: self._annotations(name, self._replay(events, name)) for name in names}
        return {name: rows for name, rows in found.items() if rows}

    def agreement(self) -> dict[str, Proportion]:
        """With the gold and with the others: how often both prefer the same, where both take a side."""
        found, mine = {}, self.annotations()
        for name, rows in self._references(mine).items():
            _, both = quality.shared([quality.verdicts(mine), quality.verdicts(rows)], ties=False)
            if both:
                found[name] = Proportion(sum(a == b for a, b in both), len(both))
        return found

    def report(self) -> quality.Table:
        """Kappa with the gold, with the others and of all; ties count as an answer.

        Raises ValueError if there is nobody to compare with or two have no item in common.
        """
        mine = self.annotations()
        return quality.agreement({self.annotator: mine, **self._references(mine)})

    def pairs(self) -> "tuple[Dataset, Counter]":
        """The answers for RewardTrainer, DPOTrainer and ORPOTrainer: see ``preferences.pairs``."""
        return preferences.pairs(self.annotations())

    def unpaired(self, seed: int = 0) -> "tuple[Dataset, Counter]":
        """The answers for KTOTrainer: see ``preferences.unpaired``."""
        return preferences.unpaired(self.annotations(), seed=seed)

    def __str__(self) -> str:
        parts = ["{answered} of {items} answered, {skipped} skipped".format(**self.progress)]
        if self.left_first:
            parts.append(f"leftmost chosen {self.left_first}")
        parts += [f"agrees with {name} {share}" for name, share in self.agreement().items()]
        return "; ".join(parts)

    # --- inside ----------------------------------------------------------------------------------

    def _check(self, rows: list[Row]) -> None:
        needed = ("id", "prompt", "responses", *(("question", "answer") if self.gold else ()))
        seen = set()
        for i, row in enumerate(rows):
            if missing := [name for name in needed if name not in row]:
                way_out = " (gold=None does without)" if "answer" in missing else ""
                raise ValueError(f"row {i}: no {', '.join(missing)}{way_out}")
            if not isinstance(row["id"], str) or row["id"] in seen:
                raise ValueError(f"row {i}: id {row['id']!r} is no string or has come before")
            seen.add(row["id"])

    def _item(self, row: Row) -> Item | None:
        texts = [text for text in dict.fromkeys(row["responses"]) if text.strip()]
        if len(texts) < 2:
            return None
        draw = random.Random(f"{self.seed}-{row['id']}")
        places = sorted(draw.sample(range(len(texts)), min(self.k, len(texts))))
        order = list(range(len(places)))
        random.Random(f"{self.seed}-{self.annotator}-{row['id']}").shuffle(order)
        return Item({**row, "responses": [texts[i] for i in places]}, tuple(order))

    def _append(self, item: Item, choice: str) -> dict[str, Any]:
        """One write of one line, so that two sessions on one file don't cut each other's lines.

        A line that a crash has cut is ended first; behind a write under way that leaves an empty
        line, which does no harm. Returns what the line says.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        event = {"time": now, "annotator": self.annotator, "id": item.row["id"], "choice": choice,
                 "shown": item.shown}  # fmt: skip
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

    def _annotations(self, annotator: str, labels: Mapping[tuple, dict]) -> list[Row]:
        made = [(item, labels[item.key]) for item in self.items if item.key in labels]
        return [preferences.judged(item.row, annotator, _comparisons(item, label))
                for item, label in made if label["choice"] != "skip"]  # fmt: skip

    def _references(self, mine: Sequence[Row]) -> dict[str, list[Row]]:
        gold = {self.gold.name: preferences.annotate(mine, self.gold)} if self.gold else {}
        return gold | self.others()


def _comparisons(item: Item, label: Mapping[str, Any]) -> list[Comparison]:
    """The one chosen is better than each other; the others are not compared. All equal for a tie."""
    texts, choice = item.row["responses"], label["choice"]
    if choice == "tie":
        return [(i, j, 0) for i, j in combinations(range(len(texts)), 2)]
    place = SIDES.index(choice) if choice in SIDES else int(choice) - 1
    best = texts.index(label["shown"][place])
    return [(min(i, best), max(i, best), 1 if best < i else -1)
            for i in range(len(texts)) if i != best]  # fmt: skip


def _events(files: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """The answers in files, in order. What is none, such as a line cut by a crash, is warned of."""
    for path in files:
        broken = []
        lines = path.read_bytes().splitlines() if path.is_file() else []
        for number, line in enumerate(lines, 1):
            if event := _event(line):
                yield event
            elif line.strip():
                broken.append(number)
        if broken:
            warnings.warn(f"{path}: skipped line(s) {broken}, which are no answers", stacklevel=2)


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
        texts, names = event["shown"], [event[name] for name in ("annotator", "id", "choice")]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    if not isinstance(texts, list) or not all(isinstance(x, str) for x in [*texts, *names]):
        return None
    places = [*SIDES[: len(texts)], *map(str, range(1, len(texts) + 1))]
    return event if event["choice"] in (*places, "tie", "skip", "undo") else None
