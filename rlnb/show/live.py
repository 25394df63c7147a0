"""Live curves: what a training shows while it runs, in a notebook's cell or in the panel.

Importing this makes `Cell` the screen of every training that a notebook's cell starts.
"""

import base64
import sys
import time
from collections.abc import Mapping, Sequence

from rlnb.record import progress
from rlnb.show import drawing as draw, plots

PAUSE = 0.5  # seconds between two drawings at least, and ten times what a drawing takes


class Drawn(progress.Screen):
    """A screen that is drawn anew when there are new rows, but not too often, and at the end."""

    due = 0.0  # when the next drawing may begin, by time.perf_counter

    def draw(self, rows: progress.Rows, total: int) -> None:
        """Show all rows so far."""

    def show(self, rows: progress.Rows, total: int) -> None:
        if (began := time.perf_counter()) >= self.due:
            self.draw(rows, total)
            now = time.perf_counter()
            self.due = now + max(PAUSE, 10 * (now - began))

    def end(self, rows: progress.Rows, total: int) -> None:
        if rows:
            self.draw(rows, total)


class Cell(Drawn):
    """An output of a notebook's cell, drawn in place."""

    handle = None

    def draw(self, rows: progress.Rows, total: int) -> None:
        from IPython.display import display

        data = {"text/html": curves_html({"": rows}, [draw.COLOURS[0]], total, progress_html(rows, total)),
                "text/plain": progress.line(rows[-1], total)}  # fmt: skip
        if self.handle is None:
            self.handle = display(data, raw=True, display_id=True)
        else:
            self.handle.update(data, raw=True)


def curves_html(curves: Mapping[str, progress.Rows], colours: Sequence[str], total: int = 0, head: str = "") -> str:
    """HTML: the rows of runs by label, drawn with the metrics of the last run that has any, in a light card.

    total: steps that the axes have room for. head: HTML above.
    """
    found = [names for rows in curves.values() if (names := progress.metrics({k for r in rows for k in r}))]
    if found:
        fig = plots.curves(curves, found[-1], colours=colours)
        for ax in fig.axes:
            ax.set_xlim(right=max(total, ax.get_xlim()[1]))
            ax.locator_params(nbins=5)  # ticks are half of the time that a drawing takes
        data = base64.b64encode(fig._repr_png_(dpi=130)).decode()
        head += (f"<img alt='{', '.join(found[-1])}' src='data:image/png;base64,{data}' "
                 f"style='max-width:100%;width:{90 * fig.get_figwidth():.0f}px;display:block'>")  # fmt: skip
    style = f"background:{draw.CARD};color:{draw.INK};border-radius:4px;padding:8px 10px;max-width:48rem"
    return f"<div style='{style};font:12px/1.5 sans-serif'>{head}</div>"


def progress_html(rows: progress.Rows, total: int) -> str:
    """HTML: how far a training is, and how long it will still take at this pace."""
    step, spent = int(rows[-1]["step"]), rows[-1]["seconds"]
    left = f", about {spent / step * (total - step):.0f} s left" if step < total else ""
    return (
        f"<progress value='{step}' max='{total}' style='width:200px;vertical-align:middle'></progress> "
        f"step {step} of {total}, {spent:.1f} s{left}"
    )


def _usual() -> progress.Screen:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return Cell() if hasattr(shell, "kernel") else progress.Lines()


progress.set_default(_usual)
