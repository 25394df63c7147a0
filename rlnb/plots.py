"""Figures from runs and evaluations. Every function returns the Figure and shows nothing itself.

In a notebook a figure that is the last line of a cell is shown once, and `display(figure)` shows
it anywhere else: the figures are not pyplot's, so `plt.show()` does not know them. They are light
cards with dark text, which read the same on a light and a dark theme.
"""

import functools
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle, islice, pairwise
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
# What trainers log, as an axis label with its unit. Other names are their own label.
LABELS = {
    "reward": "mean reward",
    "reward_std": "sd of reward in a group",
    "frac_reward_zero_std": "share of groups with equal rewards",
    "kl": "KL to the reference (nats per token)",
    "entropy": "entropy (nats per token)",
    "completions/mean_length": "completion length (tokens)",
    "completions/clipped_ratio": "share of completions cut off",
    "mean_token_accuracy": "share of tokens predicted right",
    "grad_norm": "norm of the gradient",
    "learning_rate": "learning rate",
    "step_time": "time per step (s)",
    "rewards/margins": "reward margin, chosen - rejected",
    "rewards/accuracies": "share of pairs in the right order",
    "num_tokens": "tokens seen",
}


def style():
    """A context manager with the workbook's look, for figures of one's own."""
    from matplotlib import rc_context

    return rc_context(RC)


def _styled(fn: Callable) -> Callable:
    """Draws in the workbook's look and leaves the user's rcParams as they were."""

    @functools.wraps(fn)
    def drawn(*args, **kwargs):
        with style():
            return fn(*args, **kwargs)

    return drawn


# --- figures -------------------------------------------------------------------------------------


@_styled
def curves(
    runs: Any,
    metrics: str | Sequence[str] | Mapping[str, str] = ("loss",),
    *,
    smooth: int | None = None,
    title: str | None = None,
):
    """Training curves, one panel per metric: the logged points faint, their moving average strong.

    `runs` is a run (anything with `.curve()`), its rows (dicts with "step"), a list of runs, or a
    mapping from a label to a run or to several (seeds: one colour, a line each). `metrics` are
    names of logged values, or a mapping from name to axis label. `smooth` is the width of the
    centred moving average in logged points (default: a tenth of them; 1: none). What is not finite
    leaves a gap, and a cross on the axis. Raises ValueError for a metric that no run has logged.
    """
    metrics = [metrics] if isinstance(metrics, str) else metrics
    labels = {name: LABELS.get(name, name) for name in metrics}
    labels |= dict(metrics) if isinstance(metrics, Mapping) else {}
    groups = {name: _rows(group) for name, group in _labelled(runs).items()}
    logged = {key for group in groups.values() for rows in group for row in rows for key in row}
    if missing := [name for name in labels if name not in logged]:
        raise ValueError(f"no run has logged {missing}; logged: {', '.join(sorted(logged))}.")
    columns = {1: 1, 2: 2, 4: 2}.get(len(labels), 3)
    panel = (4.8 if columns == 1 else 7.2 / columns + 0.6, 2.5)
    fig, axes = _figure(math.ceil(len(labels) / columns), columns, panel)
    for ax, (metric, label) in zip(axes, labels.items(), strict=False):
        ax.set_xlabel("optimizer step")
        # Above the axis a label takes less room than beside it; an inch holds some 12 characters.
        ax.set_title(textwrap.fill(label, int(12 * panel[0]) - 5))
        for colour, group in zip(_colours(groups), groups.values(), strict=True):
            for rows in group:
                _curve(ax, rows, metric, smooth, colour)
    for ax in axes[len(labels) :]:
        ax.set_visible(False)
    _head(fig, title, groups)
    return fig


@_styled
def bars(
    results: Mapping[str, Any],
    *,
    xlabel: str = "accuracy (%) and its 95 % interval",
    title: str | None = None,
):
    """Horizontal bars with intervals, a row per label, the figures at the right.

    A result has .mean, .low, .high in [0, 1], and perhaps .k and .n (`rlnb.evaluate.Proportion`).
    """
    fig, (ax,) = _figure(1, 1, (6.8, 0.6 + 0.42 * len(results)))
    for row, (colour, result) in enumerate(zip(_colours(results), results.values(), strict=True)):
        mean, low, high = _percent(result)
        ax.barh(row, mean, height=0.55, color=colour, alpha=0.75)
        ax.plot([low, high], [row, row], color=INK, linewidth=1.4)
        count = f"   {result.k} of {result.n}" if hasattr(result, "n") else ""
        note = f"{mean:.1f} % [{low:.1f}, {high:.1f}]{count}"
        ax.annotate(note, (1.03, row), xycoords=("axes fraction", "data"), va="center")
    _percent_axis(ax.xaxis, xlabel)
    _rows_axis(ax, results)
    _head(fig, title)
    return fig


@_styled
def by_kind(
    reports: Mapping[str, Any],
    *,
    field: str = "kind",
    xlabel: str = "accuracy (%) and its 95 % interval",
    title: str | None = None,
):
    """Dots with intervals: a row per kind of problem, a colour per label.

    A report has `.by(field)`, or is what that returns: a mapping from kind to a result as `bars`
    takes it.
    """
    tables = {label: r if isinstance(r, Mapping) else r.by(field) for label, r in reports.items()}
    kinds = list(dict.fromkeys(kind for table in tables.values() for kind in table))
    fig, (ax,) = _figure(1, 1, (6.6, 1.1 + 0.11 * len(kinds) * (len(tables) + 1)))
    for place, (colour, table) in enumerate(zip(_colours(tables), tables.values(), strict=True)):
        shift = (place - (len(tables) - 1) / 2) * 0.7 / len(tables)
        for kind, result in table.items():
            mean, low, high = _percent(result)
            row = kinds.index(kind) + shift
            ax.plot([low, high], [row, row], color=colour, alpha=0.6)
            ax.plot(mean, row, "o", color=colour, markersize=5, clip_on=False, zorder=3)
    for border in range(1, len(kinds)):
        ax.axhline(border - 0.5, color=FAINT, linewidth=0.6)
    _percent_axis(ax.xaxis, xlabel)
    _rows_axis(ax, kinds)
    _head(fig, title, tables)
    return fig


@_styled
def passk(
    results: Mapping[str, Mapping[int, Any]],
    *,
    ylabel: str = "pass@k (%)",
    title: str | None = None,
):
    """pass@k over k on a logarithmic axis, with a band for the interval and a label at each line.

    `results[label][k]` is (mean, low, high) in [0, 1], or an object with these. Text is good for a
    k, as JSON makes it.
    """
    fig, (ax,) = _figure(1, 1, (6.0, 3.4))
    ends = []
    for colour, (label, by_k) in zip(_colours(results), results.items(), strict=True):
        ks, points = zip(*sorted((int(k), _percent(by_k[k])) for k in by_k), strict=True)
        mean, low, high = zip(*points, strict=True)
        ax.fill_between(ks, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.plot(ks, mean, "o-", color=colour, markersize=4)
        ends.append((mean[-1], label, colour))
    every_k = sorted({int(k) for by_k in results.values() for k in by_k})
    ax.set_xscale("log", base=2)
    ax.set_xticks(every_k, [str(k) for k in every_k])
    ax.set_xlabel("k, samples per problem (log scale)")
    _percent_axis(ax.yaxis, ylabel)
    heights = _spread([mean for mean, _, _ in ends], gap=7.0)
    for height, (_, label, colour) in zip(heights, ends, strict=True):
        ax.annotate(label, (1.02, height), xycoords=("axes fraction", "data"), color=colour,
                    va="center", weight="bold")  # fmt: skip
    _head(fig, title)
    return fig


@_styled
def rewards_histogram(
    values: Mapping[str, Iterable[float | None]],
    *,
    bins: int = 24,
    xlabel: str = "reward",
    title: str | None = None,
):
    """How rewards are spread, a panel per label on one axis, with the mean as a line.

    Up to 12 different values become one bar each, more become `bins` bins. None and NaN are left
    out. Raises ValueError for a label without any number.
    """
    clean = {name: [v for v in group if _finite(v)] for name, group in values.items()}
    if empty := [name for name, group in clean.items() if not group]:
        raise ValueError(f"no finite reward in {empty}.")
    distinct = sorted({v for group in clean.values() for v in group})
    fig, axes = _figure(len(clean), 1, (5.6, 1.6), sharex=True, sharey=True)
    for ax, colour, (name, group) in zip(axes, _colours(clean), clean.items(), strict=True):
        if len(distinct) > 12:
            share = [100 / len(group)] * len(group)
            reach = (distinct[0], distinct[-1])
            ax.hist(group, bins, range=reach, weights=share, color=colour, alpha=0.75)
        else:
            heights = [100 * group.count(value) / len(group) for value in distinct]
            width = 0.8 * min((b - a for a, b in pairwise(distinct)), default=1.0)
            ax.bar(distinct, heights, width=width, color=colour, alpha=0.75)
        mean = math.fsum(group) / len(group)
        ax.axvline(mean, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
        ax.set_title(f"{name}: mean {mean:.2f}, n = {len(group)}", color=colour, weight="bold")
        ax.set_ylabel("share (%)")
    axes[-1].set_xlabel(xlabel)
    _head(fig, title)
    return fig


@_styled
def advantages(
    rewards: Sequence[float],
    completions: Sequence[str] | None = None,
    *,
    scale: bool = True,
    title: str | None = None,
):
    """One group of completions with its rewards and what GRPO makes of them, a row each.

    The advantage is that of TRL: reward minus the mean of the group, over its standard deviation
    (n - 1) plus 1e-4 unless `scale` is False (arXiv 2402.03300, 2503.20783).
    """
    mean = math.fsum(rewards) / len(rewards)
    spread = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / max(1, len(rewards) - 1))
    gains = [(r - mean) / (spread + 1e-4 if scale else 1) for r in rewards]
    texts = completions or [f"completion {i}" for i in range(1, len(rewards) + 1)]
    texts = [_cut(text, 50) for text in texts]
    wide = 5.4 + 0.07 * max(map(len, texts))  # inches
    fig, (left, right) = _figure(1, 2, (wide / 2, 0.9 + 0.32 * len(rewards)), sharey=True)
    rows = range(len(rewards))
    left.barh(rows, rewards, height=0.55, color="#8C8C88")
    left.axvline(mean, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
    left.set(xlabel="reward", title=f"mean of the group {mean:.2f}")
    signs = [COLOURS[0] if gain >= 0 else COLOURS[1] for gain in gains]
    right.bar_label(right.barh(rows, gains, height=0.55, color=signs), fmt="{:+.2f}", padding=3)
    right.axvline(0, color=INK, linewidth=0.8)
    reach = 1.4 * max(1, *map(abs, gains))
    right.set(xlabel="advantage", xlim=(-reach, reach))
    right.set_title("less likely", color=COLOURS[1])
    right.set_title("more likely", color=COLOURS[0], loc="right")
    _rows_axis(right, texts)
    _rows_axis(left, texts)
    _head(fig, title)
    return fig


# --- parts ---------------------------------------------------------------------------------------


def _figure(rows: int, columns: int, panel: tuple[float, float], **share):
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


def _head(fig, title: str | None, labels: Iterable[str] = ()) -> None:
    """The title, and under it a legend if there is more than one label."""
    from matplotlib.lines import Line2D

    font, labels = {"size": 11, "weight": "bold"}, list(labels)
    if len(labels) < 2:
        fig.suptitle(title or "", x=0.01, ha="left", **font)
        return
    handles = [Line2D([], [], color=colour, linewidth=3) for colour in _colours(labels)]
    room = fig.get_figwidth() / (0.6 + 0.085 * max(map(len, labels)))  # inches, of 9 point text
    fig.legend(handles, labels, loc="outside upper left", ncols=max(1, int(room)), alignment="left",
               title=title, title_fontproperties=font)  # fmt: skip


def _colours(labels) -> list[str]:
    return list(islice(cycle(COLOURS), len(labels)))


def _percent_axis(axis, label: str) -> None:
    axis.set_view_interval(0, 100, ignore=True)
    axis.set_ticks(range(0, 101, 20))
    axis.set_label_text(label)


def _rows_axis(ax, labels: Iterable[str]) -> None:
    """One row per label from the top down; a "$" in a label is a dollar."""
    labels = list(labels)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    for label in ax.get_yticklabels():
        label.set_parse_math(False)


def _labelled(runs: Any) -> Mapping[str, Any]:
    """A label for every run: the method, or the id where two runs are of one method."""
    if isinstance(runs, Mapping):
        return runs
    if hasattr(runs, "curve") or not runs or isinstance(runs[0], Mapping):
        return {"run": runs}
    methods = [run.method for run in runs]
    return {run.method if methods.count(run.method) == 1 else run.id: run for run in runs}


def _rows(group: Any) -> list[list[Mapping[str, float]]]:
    """The rows of every run of a group, which is a run, its rows, or a list of either."""
    if hasattr(group, "curve"):
        return [group.curve()]
    if not group or isinstance(group[0], Mapping):
        return [group]
    return [rows for run in group for rows in _rows(run)]


def _curve(ax, rows, metric: str, smooth: int | None, colour: str) -> None:
    logged = [(row.get("step", i), row[metric]) for i, row in enumerate(rows) if metric in row]
    good = [(step, value) for step, value in logged if _finite(value)]
    width = max(1, len(good) // 10) if smooth is None else smooth
    line = [(step, math.nan) for step, value in logged if not _finite(value)]
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


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _percent(result: Any) -> tuple[float, float, float]:
    """(mean, low, high) in percent. Raises ValueError for what is not a share."""
    if not isinstance(result, Sequence):
        result = (result.mean, result.low, result.high)
    if not all(-1e-9 <= value <= 1 + 1e-9 for value in result):  # rounding is no offence
        raise ValueError(f"mean, low, high = {tuple(result)}: give shares in [0, 1], not percent.")
    mean, low, high = (100 * value for value in result)
    return mean, low, high


def _spread(values: Sequence[float], gap: float) -> list[float]:
    """Heights for labels: near the values, at least `gap` apart, in the values' order."""
    order = sorted(range(len(values)), key=values.__getitem__)
    heights: list[float] = []
    for i in order:
        heights.append(max(values[i], heights[-1] + gap) if heights else values[i])
    lift = math.fsum(heights) / len(heights) - math.fsum(values) / len(values)
    lift = max(lift, heights[-1] - 100)  # not above the axis
    return [heights[order.index(i)] - lift for i in range(len(values))]


def _cut(text: str, width: int) -> str:
    """One line of at most `width` characters, cut in the middle: the end holds the answer."""
    text = " ".join(text.split())
    half = (width - 5) // 2
    return text if len(text) <= width else f"{text[:half]} ... {text[-half:]}"
