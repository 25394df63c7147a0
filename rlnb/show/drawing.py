"""What the figures of rlnb.show.plots are made of: the look, the frame, the axes, a curve, the numbers."""

import functools
import io
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import numpy
import pandas
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Okabe and Ito's colour-blind-safe palette, in an order that puts strong contrasts first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#444444")
INK, FAINT, CARD = "#222222", "#D9D9D6", "#FCFCFA"
RC = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), CARD),
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color",
                     "ytick.color"), INK),
    **dict.fromkeys(("font.size", "axes.labelsize", "axes.titlesize", "legend.fontsize", "xtick.labelsize",
                     "ytick.labelsize"), 9),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    "axes.titlelocation": "left", "axes.linewidth": 0.8, "grid.color": FAINT, "grid.linewidth": 0.6,
    "lines.linewidth": 1.8, "lines.solid_capstyle": "round",
}  # fmt: skip
_LOCK = threading.RLock()


def styled(fn: Callable) -> Callable:
    """Draws in the workbook's look and leaves the user's rcParams as they were."""

    @functools.wraps(fn)
    def drawn(*args, **kwargs):
        with _LOCK, rc_context(RC):  # live curves are drawn in a thread, and rcParams are one for all threads
            return fn(*args, **kwargs)

    return drawn


class CellFigure(Figure):
    """A figure that a notebook shows as a PNG. pyplot does not hold it, so nothing shows it twice."""

    def _repr_png_(self, dpi: int = 100) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png", dpi=dpi)
        return picture.getvalue()


def figure(rows: int, columns: int, panel: tuple[float, float], **share):
    """A figure and its axes in one list. panel: width and height of each in inches."""
    fig = CellFigure(figsize=(panel[0] * columns, panel[1] * rows), layout="constrained")
    return fig, list(fig.subplots(rows, columns, squeeze=False, **share).flat)


def legend(fig: Figure, labels: Iterable[str], shades: Sequence[str] | None = None) -> None:
    """A legend above the axes if there is more than one label. shades: default ``colours``."""
    labels = list(labels)
    if len(labels) > 1:
        handles = [Line2D([], [], color=colour, linewidth=3) for colour in shades or colours(labels)]
        room = fig.get_figwidth() / (0.6 + 0.085 * max(map(len, labels)))  # inches, of 9 point text
        fig.legend(handles, labels, loc="outside upper left", ncols=max(1, int(room)), alignment="left")


def colours(labels) -> list[str]:
    return list(islice(cycle(COLOURS), len(labels)))


def percent_axis(axis, label: str) -> None:
    axis.set_view_interval(0, 100, ignore=True)
    axis.set_ticks(range(0, 101, 20))
    axis.set_label_text(label)


def rows_axis(ax, labels: Iterable[str]) -> None:
    """One row per label from the top down; a "$" in a label is a dollar."""
    labels = list(labels)
    ax.set_yticks(range(len(labels)), labels, parse_math=False)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")


def rows_of(group: Any) -> list[Sequence[Mapping[str, float]]]:
    """The rows of every run of a group, which is a run, its rows, or a list of either."""
    if hasattr(group, "curve"):
        return [group.curve()]
    if not group or isinstance(group[0], Mapping):
        return [group]
    return [rows for run in group for rows in rows_of(run)]


def curve(ax, rows, metric: str, colour: str) -> None:
    """Draws one run's metric: its points, their moving average, and crosses for what is not finite."""
    logged = {row.get("step", i): row[metric] for i, row in enumerate(rows) if metric in row}
    logged = pandas.Series(logged, dtype=float).sort_index()
    good = logged[numpy.isfinite(logged)]
    width = 2 * (len(good) // 20) + 1  # odd, about a tenth of the points
    bad = logged.index.difference(good.index)
    if len(bad):
        ax.plot(bad, [0] * len(bad), "x", color=colour, clip_on=False, transform=ax.get_xaxis_transform())
    if width > 1 or len(good) == 1:
        ax.plot(good.index, good, ".", color=colour, alpha=0.25 if width > 1 else 1, markersize=4)
    average = good.rolling(width, center=True, min_periods=1).mean()
    ax.plot(logged.index, average.reindex(logged.index), color=colour)  # NaN leaves a gap


def interval(result: Any) -> tuple[float, float, float]:
    """(mean, low, high) of a result with these names, of three numbers, or of one."""
    if hasattr(result, "low"):
        return result.mean, result.low, result.high
    return tuple(result) if isinstance(result, Sequence) else (result, result, result)


def percent(result: Any) -> tuple[float, float, float]:
    """(mean, low, high) in percent. Raises ValueError for what is not a share."""
    found = interval(result)
    if not all(-1e-9 <= value <= 1 + 1e-9 for value in found):  # rounding is no offence
        raise ValueError(f"mean, low, high = {found}: give shares in [0, 1], not percent.")
    return tuple(100 * value for value in found)
