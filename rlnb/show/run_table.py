"""The runs of a notebook in a table: tick those to draw, delete with a second click."""

from collections.abc import Callable, Sequence
from datetime import datetime
from html import escape
from typing import Any

import ipywidgets

from rlnb.measure.intervals import Proportion
from rlnb.record import runs
from rlnb.show import drawing as draw

NAMES = {"per_device_train_batch_size": "batch size", "gradient_accumulation_steps": "accumulated batches",
         "kl_coef": "KL coefficient", "lam": "GAE lambda", "max_lora_rank": "max_lora_rank"}  # fmt: skip
UNSAID = {"parent", "labels", "data"}  # settings that are long to say
COLUMNS = ("", "run", "settings", "held out", "seconds", "peak MB", "ended", "")
WIDTHS = "2.2rem 7rem minmax(10rem, 1fr) 12rem 6rem 6.5rem 7rem 6rem"
SHOWN = 5  # runs that are ticked to begin with
RED = "var(--jp-error-color1, #c62828)"


class RunTable:
    """changed: called when a run is hidden, shown or deleted. runs: newest first. hidden: ids of some."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self.changed, self.runs, self.hidden = changed, [], set()
        self.colours: dict[str, str] = {}
        self.sure: str | None = None  # the run that the next `delete` deletes
        layout = dict(grid_template_columns=WIDTHS, overflow="auto", align_items="center")
        self.box = ipywidgets.GridBox(layout=layout)

    def update(self, found: Sequence[runs.Run]) -> None:
        """Show these runs, newest first. Of those that are new to it the first few are ticked."""
        self.hidden |= {run.id for run in found[SHOWN:] if run.id not in self.colours}
        self.runs, said = list(found), settings(found)
        for run in reversed(self.runs):
            self.colour(run)  # the oldest has the first one
        cells = [ipywidgets.HTML(f"<b>{name}</b>") for name in COLUMNS] if found else []
        for run in self.runs:
            tick = ipywidgets.Checkbox(run.id not in self.hidden, indent=False, layout={"width": "2rem"})
            tick.observe(lambda change, run=run: self.hide(run, not change["new"]), "value")
            swatch = f"<span style='color:{self.colour(run)}'>&#9632;</span> {clock(run)}"
            peak = run.peak_gpu_memory_mb or run.peak_memory_mb or 0
            texts = said[run.id], held_out(run), f"{run.seconds or 0:,.0f}", f"{peak:,.0f}", run.status
            words = ("Sure?", "danger") if run.id == self.sure else ("Delete", "")
            delete = button(*words, lambda run=run: self.delete(run))
            cells += [tick, ipywidgets.HTML(swatch), *(ipywidgets.HTML(block(t)) for t in texts), delete]
        self.box.children = cells

    def colour(self, run: runs.Run) -> str:
        """Of a run's curve and square; it stays."""
        return self.colours.setdefault(run.id, draw.COLOURS[len(self.colours) % len(draw.COLOURS)])

    def shown(self) -> list[runs.Run]:
        """The runs that are not hidden, the oldest first."""
        return [run for run in reversed(self.runs) if run.id not in self.hidden]

    def hide(self, run: runs.Run, hidden: bool = True) -> None:
        """Take a run out of the plot, or put it back."""
        (self.hidden.add if hidden else self.hidden.discard)(run.id)
        self.changed()

    def delete(self, run: runs.Run) -> None:
        """The first call asks, the second deletes the run's folder."""
        if self.sure == run.id:
            runs.delete(run)
            self.runs.remove(run)
        self.sure = run.id
        self.update(self.runs)
        self.changed()


# --- words ---------------------------------------------------------------------------------------


def settings(shown: Sequence[runs.Run]) -> dict[str, str]:
    """By id, the settings of a run that are not the same in all of them: "rank 8, learning rate 2e-4"."""
    differ = runs.differences(shown)
    silent = UNSAID | {key for found in differ.values() for key, value in found.items() if value is None}
    return {id: ", ".join(f"{name(key)} {text(value)}" for key, value in found.items() if key not in silent)
            for id, found in differ.items()}  # fmt: skip


def labels(shown: Sequence[runs.Run]) -> list[str]:
    """The same for a legend: with the time where the settings don't tell runs apart."""
    said = list(settings(shown).values())
    return [words if words and said.count(words) == 1 else f"{words} {clock(run)}".strip()
            for words, run in zip(said, shown, strict=True)]  # fmt: skip


def name(key: str) -> str:
    """A setting's name on the screen."""
    return NAMES.get(key, key.replace("_", " "))


def text(value: Any) -> str:
    """A setting in few characters: "0.0002", "2e-05", "64"."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def clock(run: runs.Run) -> str:
    """When a run began, by this machine's clock."""
    return f"{datetime.fromisoformat(run.started).astimezone():%H:%M:%S}"


def held_out(run: runs.Run) -> str:
    """Strict accuracy with its interval, a reward model's on pairs; "" if it was not measured."""
    found = run.get("result.strict") or run.get("result.pair_accuracy")
    return str(Proportion(**found)) if found else ""


def block(said: str, colour: str = "inherit") -> str:
    """HTML of a line of text; what it says is text, not HTML."""
    style = f"color:{colour};line-height:1.4;white-space:normal;overflow-wrap:anywhere"
    return f"<div style='{style}'>{escape(said)}</div>" if said else ""


def button(name: str, look: str, act: Callable[[], Any]) -> ipywidgets.Button:
    widget = ipywidgets.Button(description=name, button_style=look, layout={"width": "5.5rem"})
    widget.on_click(lambda _: act())
    return widget
