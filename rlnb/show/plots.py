"""Figures from runs and evaluations. Every function returns the Figure: the last line of a cell shows it, and
`display(figure)` anywhere else; `plt.show()` does not know it. An interval is an object with .mean, .low and .high
(``rlnb.measure.intervals.Proportion``) or these three numbers, shares in [0, 1].
"""

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from itertools import cycle
from typing import Any

from rlnb.show import drawing as draw
from rlnb.show.drawing import FAINT, INK

# What trainers log, as an axis label with its unit. Other names are their own label.
LABELS = {
    "reward": "mean reward",
    "reward_std": "sd of reward in a group",
    "frac_reward_zero_std": "share of groups with equal rewards",
    "rewards/format_reward/mean": "mean format reward",
    "rewards/correctness/mean": "mean correctness reward",
    "kl": "KL to the reference (nats per token)",
    "kl/sequence": "KL from the start (nats per completion)",
    "completions/mean_length": "completion length (tokens)",
    "mean_token_accuracy": "share of tokens predicted right",
    "grad_norm": "norm of the gradient",
    "rewards/margins": "reward margin, chosen - rejected",
    "rewards/accuracies": "share of pairs in the right order",
    "logps/chosen": "log-probability of chosen (nats)",
    "logps/rejected": "log-probability of rejected (nats)",
    "nll_loss": "loss on prompt and chosen (nats per token)",
    "log_odds_ratio": "log sigmoid of the log odds ratio",
    "accuracy": "share of pairs in the right order",
    "margin": "reward margin, chosen - rejected",
    "mean_reward": "mean reward of a pair's two answers",
}


@draw.styled
def curves(
    runs: Any, metrics: str | Sequence[str] | Mapping[str, str] = ("loss",), *,
    colours: Sequence[str] | None = None,
):  # fmt: skip
    """Training curves, one panel per metric: the logged points faint, their moving average strong.

    runs: a run (anything with .curve()), its rows (dicts with "step"), or a mapping from a label to a run
        or to several (seeds: one colour, a line each).
    metrics: names of logged values, or a mapping from name to axis label. colours: one per label.
    The average is centred and over a tenth of the points. What is not finite leaves a gap, and a cross on
    the axis. Raises ValueError for a metric that no run has logged.
    """
    metrics = [metrics] if isinstance(metrics, str) else metrics
    labels = {name: LABELS.get(name, name) for name in metrics}
    labels |= metrics if isinstance(metrics, Mapping) else {}
    by_label = runs if isinstance(runs, Mapping) else {"run": runs}
    groups = {name: draw.rows_of(group) for name, group in by_label.items()}
    colours = colours or draw.colours(groups)
    logged = {key for group in groups.values() for rows in group for row in rows for key in row}
    if missing := [name for name in labels if name not in logged]:
        raise ValueError(f"no run has logged {missing}; logged: {', '.join(sorted(logged))}.")
    columns = {1: 1, 2: 2, 4: 2}.get(len(labels), 3)
    panel = (4.8 if columns == 1 else 7.2 / columns + 0.6, 2.5)
    fig, axes = draw.figure(math.ceil(len(labels) / columns), columns, panel)
    for ax, (metric, label) in zip(axes, labels.items(), strict=False):
        ax.set_xlabel("optimizer step")
        ax.xaxis.get_major_locator().set_params(integer=True)
        # Above the axis a label takes less room than beside it; an inch holds some 12 characters.
        ax.set_title(textwrap.fill(label, int(12 * panel[0]) - 5))
        for colour, group in zip(colours, groups.values(), strict=True):
            for rows in group:
                draw.curve(ax, rows, metric, colour)
    for ax in axes[len(labels) :]:
        ax.set_visible(False)
    draw.legend(fig, groups, colours)
    return fig


@draw.styled
def bars(results: Mapping[str, Any], *, xlabel: str = "accuracy (%) and its 95 % interval"):
    """Horizontal bars with intervals, a row per label, the figures at the right, with k of n if known."""
    fig, (ax,) = draw.figure(1, 1, (6.8, 0.6 + 0.42 * len(results)))
    for row, (colour, result) in enumerate(zip(draw.colours(results), results.values(), strict=True)):
        mean, low, high = draw.percent(result)
        ax.barh(row, mean, height=0.55, color=colour, alpha=0.75)
        ax.plot([low, high], [row, row], color=INK, linewidth=1.4)
        count = f"   {result.k} of {result.n}" if hasattr(result, "n") else ""
        note = f"{mean:.1f} % [{low:.1f}, {high:.1f}]{count}"
        ax.annotate(note, (1.03, row), xycoords=("axes fraction", "data"), va="center")
    draw.percent_axis(ax.xaxis, xlabel)
    draw.rows_axis(ax, results)
    return fig


@draw.styled
def by_kind(reports: Mapping[str, Any]):
    """Dots with intervals: a row per kind of problem, a colour per label.

    A report has .by("kind"), or is what that returns: a mapping from kind to an interval.
    """
    tables = {label: r if isinstance(r, Mapping) else r.by("kind") for label, r in reports.items()}
    kinds = list(dict.fromkeys(kind for table in tables.values() for kind in table))
    fig, (ax,) = draw.figure(1, 1, (6.6, 1.1 + 0.11 * len(kinds) * (len(tables) + 1)))
    for place, (colour, table) in enumerate(zip(draw.colours(tables), tables.values(), strict=True)):
        shift = (place - (len(tables) - 1) / 2) * 0.7 / len(tables)
        for kind, result in table.items():
            mean, low, high = draw.percent(result)
            row = kinds.index(kind) + shift
            ax.plot([low, high], [row, row], color=colour, alpha=0.6)
            ax.plot(mean, row, "o", color=colour, markersize=5, clip_on=False, zorder=3)
    for border in range(1, len(kinds)):
        ax.axhline(border - 0.5, color=FAINT, linewidth=0.6)
    draw.percent_axis(ax.xaxis, "accuracy (%) and its 95 % interval")
    draw.rows_axis(ax, kinds)
    draw.legend(fig, tables)
    return fig


@draw.styled
def lines(
    series: Mapping[str, Collection[tuple[float, Any]]], *, xlabel: str, ylabel: str, logx: bool = False,
    percent: bool = False,
):  # fmt: skip
    """A line per label through its points (x, y), with a band where y is an interval and no number.

    percent: y are shares in [0, 1], shown as 0 to 100 %. logx: space the x by their logarithm, and
    tick each.
    """
    fig, (ax,) = draw.figure(1, 1, (5.6, 3.0))
    for colour, points in zip(draw.colours(series), series.values(), strict=True):
        xs = [x for x, _ in points]
        ys = [draw.percent(y) if percent else draw.interval(y) for _, y in points]
        mean, low, high = zip(*ys, strict=True)
        ax.plot(xs, mean, "o-", color=colour, markersize=4)
        ax.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
        if len(xs) == 1:  # a band has no width there
            ax.plot(xs * 2, low + high, color=colour, alpha=0.6)
    if logx:
        ticks = sorted({x for points in series.values() for x, _ in points})
        ax.set_xscale("log")
        ax.set_xticks(ticks, [f"{x:g}" for x in ticks], minor=False)
        ax.set_xticks([], minor=True)
    ax.set(xlabel=xlabel, title=ylabel)  # above the axis a label takes less room than beside it
    if percent:
        draw.percent_axis(ax.yaxis, "")
    draw.legend(fig, series)
    return fig


@draw.styled
def frontier(
    points: Mapping[str, tuple[float | None, Any]], *, xlabel: str, ylabel: str, logx: bool = False,
):  # fmt: skip
    """A dot per label at (x, y), with the interval of y and the label at the right in its colour.

    y has .mean, .low and .high, in percent. logx: space the x by their logarithm. What has None for x
    is left out, but keeps its colour and mark for other figures of the same labels.
    """
    fig, (ax,) = draw.figure(1, 1, (6.4, 3.6))
    looks = zip(draw.colours(points), cycle("osD^vPXp<>"), points.items(), strict=False)
    dots = [(y.mean, colour, mark, label, x, y) for colour, mark, (label, (x, y)) in looks if x is not None]
    for mean, colour, mark, label, x, y in sorted(dots, reverse=True):  # the legend has the best on top
        ax.plot([x, x], [y.low, y.high], color=colour, alpha=0.6)
        ax.plot(x, mean, mark, color=colour, markersize=6, zorder=3, label=label)
    if logx:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
    ax.set(xlabel=xlabel, title=ylabel)
    fig.legend(loc="outside right center", labelcolor="linecolor", prop={"weight": "bold"}, handletextpad=0.2)
    return fig


@draw.styled
def rewards_histogram(values: Mapping[str, Sequence[float]]):
    """How rewards are spread, a panel per label on one axis, with the mean as a line."""
    reach = [end(v for group in values.values() for v in group) for end in (min, max)]
    fig, axes = draw.figure(len(values), 1, (5.6, 1.6), sharex=True, sharey=True)
    for ax, colour, (name, group) in zip(axes, draw.colours(values), values.items(), strict=True):
        share = [100 / len(group)] * len(group)
        ax.hist(group, 24, range=reach, weights=share, color=colour, alpha=0.75)
        mean = math.fsum(group) / len(group)
        ax.axvline(mean, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
        ax.set_title(f"{name}: mean {mean:.2f}, n = {len(group)}", color=colour, weight="bold")
        ax.set_ylabel("share (%)")
    axes[-1].set_xlabel("reward")
    return fig
