"""Figures from runs and evaluations. Every function returns the Figure and shows nothing itself.

In a notebook a figure that is the last line of a cell is shown once, and `display(figure)` shows
it anywhere else: the figures are not pyplot's, so `plt.show()` does not know them. They are light
cards with dark text, which read the same on a light and a dark theme.
"""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, pairwise
from typing import Any

from rlnb.show import drawing as draw
from rlnb.show.drawing import COLOURS, FAINT, INK

style = draw.style  # for figures of one's own

# What trainers log, as an axis label with its unit. Other names are their own label.
LABELS = {
    "reward": "mean reward",
    "reward_std": "sd of reward in a group",
    "frac_reward_zero_std": "share of groups with equal rewards",
    "rewards/format_reward/mean": "mean format reward",
    "rewards/correctness/mean": "mean correctness reward",
    "kl": "KL to the reference (nats per token)",
    "kl/sequence": "KL from the start (nats per completion)",
    "entropy": "entropy (nats per token)",
    "completions/mean_length": "completion length (tokens)",
    "completions/clipped_ratio": "share of completions cut off",
    "mean_token_accuracy": "share of tokens predicted right",
    "grad_norm": "norm of the gradient",
    "learning_rate": "learning rate",
    "step_time": "time per step (s)",
    "rewards/margins": "reward margin, chosen - rejected",
    "rewards/accuracies": "share of pairs in the right order",
    "logps/chosen": "log-probability of chosen (nats)",
    "logps/rejected": "log-probability of rejected (nats)",
    "nll_loss": "loss on prompt and chosen (nats per token)",
    "log_odds_ratio": "log sigmoid of the log odds ratio",
    "accuracy": "share of pairs in the right order",
    "margin": "reward margin, chosen - rejected",
    "mean_reward": "mean reward of a pair's two answers",
    "num_tokens": "tokens seen",
}


@draw.styled
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
    groups = {name: draw.rows_of(group) for name, group in draw.labelled(runs).items()}
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
        for colour, group in zip(draw.colours(groups), groups.values(), strict=True):
            for rows in group:
                draw.curve(ax, rows, metric, smooth, colour)
    for ax in axes[len(labels) :]:
        ax.set_visible(False)
    draw.head(fig, title, groups)
    return fig


@draw.styled
def bars(
    results: Mapping[str, Any],
    *,
    xlabel: str = "accuracy (%) and its 95 % interval",
    title: str | None = None,
):
    """Horizontal bars with intervals, a row per label, the figures at the right.

    A result has .mean, .low, .high in [0, 1], and perhaps .k and .n (`rlnb.measure.evaluate.Proportion`).
    """
    fig, (ax,) = draw.figure(1, 1, (6.8, 0.6 + 0.42 * len(results)))
    for row, (colour, result) in enumerate(
        zip(draw.colours(results), results.values(), strict=True)
    ):
        mean, low, high = draw.percent(result)
        ax.barh(row, mean, height=0.55, color=colour, alpha=0.75)
        ax.plot([low, high], [row, row], color=INK, linewidth=1.4)
        count = f"   {result.k} of {result.n}" if hasattr(result, "n") else ""
        note = f"{mean:.1f} % [{low:.1f}, {high:.1f}]{count}"
        ax.annotate(note, (1.03, row), xycoords=("axes fraction", "data"), va="center")
    draw.percent_axis(ax.xaxis, xlabel)
    draw.rows_axis(ax, results)
    draw.head(fig, title)
    return fig


@draw.styled
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
    fig, (ax,) = draw.figure(1, 1, (6.6, 1.1 + 0.11 * len(kinds) * (len(tables) + 1)))
    for place, (colour, table) in enumerate(
        zip(draw.colours(tables), tables.values(), strict=True)
    ):
        shift = (place - (len(tables) - 1) / 2) * 0.7 / len(tables)
        for kind, result in table.items():
            mean, low, high = draw.percent(result)
            row = kinds.index(kind) + shift
            ax.plot([low, high], [row, row], color=colour, alpha=0.6)
            ax.plot(mean, row, "o", color=colour, markersize=5, clip_on=False, zorder=3)
    for border in range(1, len(kinds)):
        ax.axhline(border - 0.5, color=FAINT, linewidth=0.6)
    draw.percent_axis(ax.xaxis, xlabel)
    draw.rows_axis(ax, kinds)
    draw.head(fig, title, tables)
    return fig


@draw.styled
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
    fig, (ax,) = draw.figure(1, 1, (6.0, 3.4))
    ends = []
    for colour, (label, by_k) in zip(draw.colours(results), results.items(), strict=True):
        ks, points = zip(*sorted((int(k), draw.percent(by_k[k])) for k in by_k), strict=True)
        mean, low, high = zip(*points, strict=True)
        ax.fill_between(ks, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.plot(ks, mean, "o-", color=colour, markersize=4)
        ends.append((mean[-1], label, colour))
    every_k = sorted({int(k) for by_k in results.values() for k in by_k})
    ax.set_xscale("log", base=2)
    ax.set_xticks(every_k, [str(k) for k in every_k])
    ax.set_xlabel("k, samples per problem (log scale)")
    draw.percent_axis(ax.yaxis, ylabel)
    heights = draw.spread([mean for mean, _, _ in ends], gap=7.0)
    for height, (_, label, colour) in zip(heights, ends, strict=True):
        ax.annotate(label, (1.02, height), xycoords=("axes fraction", "data"), color=colour,
                    va="center", weight="bold")  # fmt: skip
    draw.head(fig, title)
    return fig


@draw.styled
def lines(
    series: Mapping[str, Sequence[tuple[float, Any]]],
    *,
    xlabel: str,
    ylabel: str,
    logx: bool = False,
    percent: bool = False,
    title: str | None = None,
):
    """A line per label through its points (x, y), with a band where y has an interval.

    y is a number, or has .mean, .low and .high. `percent` takes shares in [0, 1] and shows 0 to
    100 %. `logx` spaces the x by their logarithm and ticks each.
    """
    fig, (ax,) = draw.figure(1, 1, (5.6, 3.0))
    for colour, points in zip(draw.colours(series), series.values(), strict=True):
        xs = [x for x, _ in points]
        ys = [(y.mean, y.low, y.high) if hasattr(y, "mean") else (y, y, y) for _, y in points]
        mean, low, high = ([(100 if percent else 1) * v for v in c] for c in zip(*ys, strict=True))
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
    draw.head(fig, title, series)
    return fig


@draw.styled
def frontier(
    points: Mapping[str, tuple[float | None, Any]],
    *,
    xlabel: str,
    ylabel: str,
    logx: bool = False,
    title: str | None = None,
):
    """A dot per label at (x, y), with the interval of y and the label at the right in its colour.

    y has .mean, .low and .high, in percent. `logx` spaces the x by their logarithm. What has None for
    x is left out, but keeps its colour and mark for other figures of the same labels.
    """
    fig, (ax,) = draw.figure(1, 1, (6.4, 3.6))
    looks = zip(draw.colours(points), cycle("osD^vPXp<>"), points.items(), strict=False)
    dots = [(colour, mark, *dot) for colour, mark, dot in looks if dot[1][0] is not None]
    for colour, mark, _, (x, y) in dots:
        ax.plot([x, x], [y.low, y.high], color=colour, alpha=0.6)
        ax.plot(x, y.mean, mark, color=colour, markersize=6, zorder=3)
    if logx:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
    draw.percent_axis(ax.yaxis, "")
    ax.set(xlabel=xlabel, title=ylabel)
    heights = draw.spread([y.mean for *_, (_, y) in dots], gap=7.0)
    for height, (colour, mark, label, _) in zip(heights, dots, strict=True):
        place = dict(xycoords=("axes fraction", "data"), va="center", color=colour)
        ax.plot([1.04], [height], mark, color=colour, clip_on=False,
                transform=ax.get_yaxis_transform(), markersize=5)  # fmt: skip
        ax.annotate(label, (1.07, height), weight="bold", **place)
    draw.head(fig, title)
    return fig


@draw.styled
def loop(steps: Sequence[str], back_to: int = 0):
    """Boxes in a row with arrows from each to the next, and one from the last back to `back_to`."""
    fig, (ax,) = draw.figure(1, 1, (1.45 * len(steps), 1.5))
    ax.set(xlim=(-0.5, len(steps) - 0.5), ylim=(-1.1, 0.6))
    ax.axis("off")
    box = dict(boxstyle="round,pad=0.4", facecolor="white", edgecolor=COLOURS[0])
    for i, text in enumerate(steps):
        ax.text(i, 0, text, ha="center", va="center", bbox=box, fontsize=8.5)
    arrow = dict(arrowstyle="-|>", color=INK, shrinkA=0, shrinkB=0)
    for i in range(len(steps) - 1):
        ax.annotate("", (i + 0.57, 0), (i + 0.43, 0), arrowprops=arrow)
    last = len(steps) - 1
    ax.plot([last, last, back_to], [-0.35, -0.8, -0.8], color=INK, linewidth=1.0)
    ax.annotate("", (back_to, -0.35), (back_to, -0.81), arrowprops=arrow)
    ax.text((last + back_to) / 2, -0.98, "again, from the new policy", ha="center", va="center")
    return fig


@draw.styled
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
    clean = {name: [v for v in group if draw.finite(v)] for name, group in values.items()}
    if empty := [name for name, group in clean.items() if not group]:
        raise ValueError(f"no finite reward in {empty}.")
    distinct = sorted({v for group in clean.values() for v in group})
    fig, axes = draw.figure(len(clean), 1, (5.6, 1.6), sharex=True, sharey=True)
    for ax, colour, (name, group) in zip(axes, draw.colours(clean), clean.items(), strict=True):
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
    draw.head(fig, title)
    return fig


@draw.styled
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
    texts = [draw.cut(text, 50) for text in texts]
    wide = 5.4 + 0.07 * max(map(len, texts))  # inches
    fig, (left, right) = draw.figure(1, 2, (wide / 2, 0.9 + 0.32 * len(rewards)), sharey=True)
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
    draw.rows_axis(right, texts)
    draw.rows_axis(left, texts)
    draw.head(fig, title)
    return fig
