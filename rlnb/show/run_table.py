"""A table of runs on the screen: sort it, take runs out of a plot, delete them.

`RunTable` is used by the training panel. What a click does can be called: `sort`, `hide`, `delete`.
"""

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from html import escape
from typing import Any

from rlnb.show import drawing as draw
from rlnb.record import runs
from rlnb.measure.evaluate import Proportion

SHORT = {"learning_rate": "rate", "demonstrations": "examples", "kl_coef": "KL", "lam": "lambda"}
IMPLIED = ("parent", "labels", "alpha")  # settings that others decide, or that are long to say
WIDTHS = "2.2rem 7rem minmax(10rem, 1fr) 12rem 6rem 6.5rem 7rem 5.5rem"
SHOWN = 5  # runs that are ticked to begin with
GREY, RED = "var(--jp-ui-font-color2, #616161)", "var(--jp-error-color1, #c62828)"

# What a column shows of a run, and what it is sorted by; `names` has the runs' settings in words.
Column = tuple[Callable[[runs.Run, dict], str], Callable[[runs.Run, dict], Any]]
COLUMNS: dict[str, Column] = {
    "run": (lambda run, names: clock(run), lambda run, names: run.started),
    "settings": (lambda run, names: names[run.id], lambda run, names: names[run.id]),
    "held out": (lambda run, names: held_out(run), lambda run, names: share(run)),
    "seconds": (lambda run, names: number(run.seconds), lambda run, names: run.seconds or 0),
    "peak MB": (
        lambda run, names: number(run.peak_gpu_memory_mb or run.peak_memory_mb),
        lambda run, names: run.peak_gpu_memory_mb or run.peak_memory_mb or 0,
    ),
    "ended": (lambda run, names: run.status, lambda run, names: run.status),
}


class RunTable:
    """runs: those in the table, newest first. colours: of each run, by id, which stay. hidden: ids.

    changed: called when a run is hidden, shown or deleted.
    """

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        import ipywidgets

        self.changed = changed
        self.runs: list[runs.Run] = []
        self.colours: dict[str, str] = {}
        self.hidden: set[str] = set()
        self.order = ("run", True)  # column, and whether the highest comes first
        self.armed: str | None = None  # the run that the next `delete` deletes
        self.box = ipywidgets.GridBox(
            layout=dict(grid_template_columns=WIDTHS, overflow="auto", align_items="center")
        )

    def update(self, found: Sequence[runs.Run]) -> None:
        """Show these runs, newest first. Of those that are new to it the first few are ticked."""
        self.runs = list(found)
        for number, run in reversed(list(enumerate(self.runs))):
            if run.id not in self.colours:
                self.colours[run.id] = self.next_colour()
                self.hidden |= {run.id} if number >= SHOWN else set()
        self.refresh()

    def shown(self) -> list[runs.Run]:
        """The runs that are not hidden, the oldest first."""
        return [run for run in reversed(self.runs) if run.id not in self.hidden]

    def next_colour(self) -> str:
        """The one that the next new run gets."""
        return draw.COLOURS[len(self.colours) % len(draw.COLOURS)]

    def sort(self, column: str) -> None:
        """Sort by a column; a second time, the other way round. KeyError for one that is not there."""
        COLUMNS[column]
        self.order = (column, not self.order[1] if self.order[0] == column else True)
        self.refresh()

    def hide(self, run: runs.Run, hidden: bool = True) -> None:
        """Take a run out of the plot, or put it back."""
        self.hidden = self.hidden | {run.id} if hidden else self.hidden - {run.id}
        self.changed()

    def delete(self, run: runs.Run) -> None:
        """The first call asks, the second deletes the run's folder."""
        if self.armed != run.id:
            self.armed = run.id
            return self.refresh()
        self.armed = None
        runs.delete(run)
        self.runs.remove(run)
        self.refresh()
        return self.changed()

    def rows(self) -> list[runs.Run]:
        """The runs in the order of the table."""
        names = self._names()
        key = COLUMNS[self.order[0]][1]
        return sorted(self.runs, key=lambda run: key(run, names), reverse=self.order[1])

    def refresh(self) -> None:
        """Make the table anew from what it holds."""
        names = self._names()
        cells = [html(""), *(self._head(name) for name in COLUMNS), html("")]
        for run in self.rows():
            cells += [self._tick(run), *(html(show(run, names)) for show, _ in COLUMNS.values())]
            cells[-len(COLUMNS)].value = swatch(self.colours[run.id]) + clock(run)
            sure = run.id == self.armed
            delete = button("Sure?" if sure else "Delete", "danger" if sure else "", "5rem")
            delete.on_click(lambda _, run=run: self.delete(run))
            cells.append(delete)
        self.box.children = cells if self.runs else ()

    def _names(self) -> dict[str, str]:
        return {run.id: name for run, name in zip(self.runs, settings(self.runs), strict=True)}

    def _head(self, name: str) -> Any:
        arrow = "" if name != self.order[0] else " ▾" if self.order[1] else " ▴"
        head = button(name + arrow, "", "max-content")
        head.style.button_color, head.style.font_weight = "transparent", "600"
        head.tooltip = f"sort by {name}"
        head.on_click(lambda _: self.sort(name))
        return head

    def _tick(self, run: runs.Run) -> Any:
        import ipywidgets

        box = ipywidgets.Checkbox(
            value=run.id not in self.hidden, indent=False, tooltip="draw it", layout={"width": "2rem"}
        )
        box.observe(lambda change: self.hide(run, not change["new"]), "value")
        return box


# --- words ---------------------------------------------------------------------------------------


def settings(shown: Iterable[runs.Run]) -> list[str]:
    """Of each run the settings that differ between them, as "rank 8, rate 2e-4"."""
    differ = runs.differences(shown)
    told = {k for found in differ.values() for k in found if k not in IMPLIED}
    told -= {k for found in differ.values() for k, v in found.items() if v is None}
    return [
        ", ".join(f"{SHORT.get(k, k.replace('_', ' '))} {text(v)}" for k, v in found.items() if k in told)
        for found in differ.values()
    ]


def labels(shown: Sequence[runs.Run]) -> list[str]:
    """The same for a legend: with the time where the settings don't tell runs apart."""
    found = settings(shown)
    return [
        f"{name}, {clock(run)}".removeprefix(", ") if found.count(name) > 1 or not name else name
        for name, run in zip(found, shown, strict=True)
    ]


def text(value: Any) -> str:
    """A setting in few characters: "2e-4", "0.05", "64"."""
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(power)}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def clock(run: runs.Run) -> str:
    """When a run began, by this machine's clock."""
    return f"{datetime.fromisoformat(run.started).astimezone():%H:%M:%S}"


def held_out(run: runs.Run) -> str:
    """Strict accuracy with its interval, a reward model's on pairs; "" if it was not measured."""
    found = run.get("result.strict") or run.get("result.pair_accuracy")
    return str(Proportion(**found)) if found else ""


def share(run: runs.Run) -> float:
    """The same as a number, below all others if it was not measured."""
    found = run.get("result.strict") or run.get("result.pair_accuracy")
    return Proportion(**found).mean if found else -1.0


def number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def swatch(colour: str) -> str:
    style = f"display:inline-block;width:12px;height:12px;margin-right:6px;background:{colour}"
    return f"<span style='{style}'></span>"


def html(said: str, colour: str = "inherit") -> Any:
    """A line of text; what it says is text, not HTML."""
    import ipywidgets

    return ipywidgets.HTML(block(said, colour))


def block(said: str, colour: str = "inherit") -> str:
    style = f"color:{colour};line-height:1.4;white-space:normal;overflow-wrap:anywhere"
    return f"<div style='{style}'>{escape(said)}</div>" if said else ""


def button(name: str, look: str, width: str) -> Any:
    import ipywidgets

    return ipywidgets.Button(description=name, button_style=look, layout={"width": width})
