"""What the figures of rlnb.show.plots are made of: the look, the frame, the axes, a curve, the numbers."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle, islice
from typing import Any

# Okabe and Ito's colour-blind-safe palette, in an order that puts strong contrasts first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#444444")
INK, FAINT, CARD = "#222222", "#D9D9D6", "#FCFCFA"
RC = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), CARD),
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("font.size", "axes.labelsize", "axes.titlesize", "legend.fontsize"), 9),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 9),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    "axes.titlelocation": "left",
    "axes.linewidth": 0.8,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def style():
    """A context manager with the workbook's look, for figures of one's own."""
    from matplotlib import rc_context

    return rc_context(RC)


def styled(fn: Callable) -> Callable:
    """Draws in the workbook's look and leaves the user's rcParams as they were."""

    @functools.wraps(fn)
    def drawn(*args, **kwargs):
        with style():
            return fn(*args, **kwargs)

    return drawn


def figure(rows: int, columns: int, panel: tuple[float, float], **share):
    """A figure that pyplot does not hold, and its axes in one list. `panel` is in inches.

    Making it by pyplot is what tells a notebook how to show figures; letting go of it keeps the
    notebook from showing it twice.
    """
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(
        rows, columns, figsize=(panel[0] * columns, panel[1] * rows), squeeze=False,
        layout="constrained", **share,
    )  # fmt: skip
    plt.close(fig)
    return fig, list(axes.flat)


def head(fig, title: str | None, labels: Iterable[str] = ()) -> None:
    """The title, and under it a legend if there is more than one label."""
    from matplotlib.lines import Line2D

    font, labels = {"size": 11, "weight": "bold"}, list(labels)
    if len(labels) < 2:
        fig.suptitle(title or "", x=0.01, ha="left", **font)
        return
    handles = [Line2D([], [], color=colour, linewidth=3) for colour in colours(labels)]
    room = fig.get_figwidth() / (0.6 + 0.085 * max(map(len, labels)))  # inches, of 9 point text
    fig.legend(handles, labels, loc="outside upper left", ncols=max(1, int(room)), alignment="left",
               title=title, title_fontproperties=font)  # fmt: skip


def colours(labels) -> list[str]:
    return list(islice(cycle(COLOURS), len(labels)))


def percent_axis(axis, label: str) -> None:
    axis.set_view_interval(0, 100, ignore=True)
    axis.set_ticks(range(0, 101, 20))
    axis.set_label_text(label)


def rows_axis(ax, labels: Iterable[str]) -> None:
    """One row per label from the top down; a "$" in a label is a dollar."""
    labels = list(labels)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    for label in ax.get_yticklabels():
        label.set_parse_math(False)


def labelled(runs: Any) -> Mapping[str, Any]:
    """A label for every run: the method, or the id where two runs are of one method."""
    if isinstance(runs, Mapping):
        return runs
    if hasattr(runs, "curve") or not runs or isinstance(runs[0], Mapping):
        return {"run": runs}
    methods = [run.method for run in runs]
    return {run.method if methods.count(run.method) == 1 else run.id: run for run in runs}


def rows_of(group: Any) -> list[list[Mapping[str, float]]]:
    """The rows of every run of a group, which is a run, its rows, or a list of either."""
    if hasattr(group, "curve"):
        return [group.curve()]
    if not group or isinstance(group[0], Mapping):
        return [group]
    return [rows for run in group for rows in rows_of(run)]


def curve(ax, rows, metric: str, smooth: int | None, colour: str) -> None:
    """Draws one run's metric: its points if they are smoothed, the average, crosses for the rest."""
    logged = [(row.get("step", i), row[metric]) for i, row in enumerate(rows) if metric in row]
    good = [(step, value) for step, value in logged if finite(value)]
    width = max(1, len(good) // 10) if smooth is None else smooth
    line = [(step, math.nan) for step, value in logged if not finite(value)]
    if line:
        ax.plot([step for step, _ in line], [0] * len(line), "x", color=colour, clip_on=False,
                transform=ax.get_xaxis_transform())  # fmt: skip
    averaged = _moving_average([value for _, value in good], width)
    line += [(step, value) for (step, _), value in zip(good, averaged, strict=True)]
    if width > 1:
        ax.plot(*_columns(good), ".", color=colour, alpha=0.25, markersize=4)
    ax.plot(*_columns(sorted(line)), color=colour)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _moving_average(values: Sequence[float], width: int) -> list[float]:
    """Centred, over `width` values (one more if `width` is even), fewer at the ends."""
    half = width // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [math.fsum(window) / len(window) for window in windows]


def finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def percent(result: Any) -> tuple[float, float, float]:
    """(mean, low, high) in percent. Raises ValueError for what is not a share."""
    if not isinstance(result, Sequence):
        result = (result.mean, result.low, result.high)
    if not all(-1e-9 <= value <= 1 + 1e-9 for value in result):  # rounding is no offence
        raise ValueError(f"mean, low, high = {tuple(result)}: give shares in [0, 1], not percent.")
    mean, low, high = (100 * value for value in result)
    return mean, low, high


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Heights for labels: near the values, at least `gap` apart, in the values' order."""
    order = sorted(range(len(values)), key=values.__getitem__)
    heights: list[float] = []
    for i in order:
        heights.append(max(values[i], heights[-1] + gap) if heights else values[i])
    lift = math.fsum(heights) / len(heights) - math.fsum(values) / len(values)
    lift = max(lift, heights[-1] - 100)  # not above the axis
    return [heights[order.index(i)] - lift for i in range(len(values))]


def cut(text: str, width: int) -> str:
    """One line of at most `width` characters, cut in the middle: the end holds the answer."""
    text = " ".join(text.split())
    half = (width - 5) // 2
    return text if len(text) <= width else f"{text[:half]} ... {text[-half:]}"
