"""Every figure: its labels, that no text overlaps or leaves the figure, and its errors."""

import math
import subprocess
import sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
from matplotlib.text import Text

from rlnb.show import drawing, plots


@dataclass(frozen=True)
class Share:
    k: int
    n: int

    @property
    def mean(self):
        return self.k / self.n

    @property
    def low(self):
        return max(0.0, self.mean - 0.05)

    @property
    def high(self):
        return min(1.0, self.mean + 0.05)


@dataclass
class Percent:
    mean: float

    @property
    def low(self):
        return self.mean - 2

    @property
    def high(self):
        return self.mean + 2


class Report:
    def __init__(self, k):
        self.k = k

    def by(self, field):
        return {f"{field} {i}": Share((self.k + 7 * i) % 41, 40) for i in range(12)}


class Run:
    """What plots need of a run."""

    def __init__(self, method="grpo", id="1", bad=()):
        self.method, self.id, self.bad = method, id, bad

    def curve(self):
        rows = [
            {"step": s, "loss": math.nan if s in self.bad else 1 / s, "reward": s / 40,
             "kl": 0.01 * s, "completions/mean_length": 50 - s / 4}
            for s in range(1, 41)
        ]  # fmt: skip
        return [*rows, {"step": 40, "train_runtime": 9.0}]


LONG = "GRPO from the base, with a hot learning rate"
METRICS = ("reward", "loss", "kl", "completions/mean_length")
RESULTS = {"base": Share(2, 500), "SFT on 128 demonstrations": Share(262, 500),
           "GRPO from SFT": Share(391, 500), "GRPO from the base": Share(500, 500)}  # fmt: skip
PASSES = {"base": {1: (0.27, 0.24, 0.3), 8: (0.8, 0.77, 0.83), 32: (0.99, 0.98, 1.0)}.items(),
          "GRPO": {1: Share(78, 100), 8: Share(90, 100), 32: Share(97, 100)}.items()}  # fmt: skip
DOTS = {f"method {i}": (7.0 * i or None, Percent(60 + i / 9)) for i in range(11)}
FIGURES = {
    "one curve": lambda: plots.curves(Run(), "loss"),
    "curves": lambda: plots.curves(
        {"GRPO from SFT": [Run(), Run()], LONG + "s": Run(), LONG: Run(bad=range(20, 24))},
        METRICS,
    ),
    "five curves": lambda: plots.curves(Run(), {f"{m}": f"a long label for {m}, in its unit (unit)"
                                              for m in (*METRICS, "step")}),
    "bars": lambda: plots.bars(RESULTS),
    "by kind": lambda: plots.by_kind({"base": Report(1), "SFT": Report(9), "GRPO": Report(25)}),
    "pass@k": lambda: plots.lines(PASSES, xlabel="k", ylabel="pass@k (%)", logx=True, percent=True),
    "histogram": lambda: plots.rewards_histogram(
        {"good": [i / 7 for i in range(50)], "bad": [0, 1]}
    ),
    "discrete": lambda: plots.rewards_histogram({"step 1": [0, 0, 0.2]}),
    "lines": lambda: plots.lines({LONG: [(1, 0.2), (64, Share(9, 10))], "other": [(8, 0.1)]},
                                 xlabel="n", ylabel="share (%)", logx=True, percent=True),
    "frontier": lambda: plots.frontier(DOTS, xlabel="time (s)", ylabel="accuracy (%)", logx=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def figures():
    before = dict(mpl.rcParams)
    drawn = {name: make() for name, make in FIGURES.items()}
    assert dict(mpl.rcParams) == before  # the user's settings are left alone
    assert plt.get_fignums() == []  # and nothing is shown a second time
    return drawn


def boxes(fig):
    """(text, box in pixels) of every visible text of a figure."""
    fig.draw_without_rendering()
    texts = [t for t in fig.findobj(Text) if t.get_text().strip() and t.get_visible()]
    unseen = set(_unseen(fig))
    return [(t.get_text(), t.get_window_extent()) for t in texts if t not in unseen]


def legend(fig):
    """The labels in a figure's legend, from the top."""
    return [text.get_text() for text in fig.legends[0].get_texts()]


def _unseen(fig):
    """Labels that are not drawn: of ticks outside their axis, and of axes that are not shown."""
    for ax in fig.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks() + axis.get_minor_ticks():
                if not (ax.get_visible() and low <= tick.get_loc() <= high):
                    yield from (tick.label1, tick.label2)


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_overlaps_or_is_cut_off(figures, name):
    fig = figures[name]
    found = boxes(fig)
    assert len(found) > 4
    for (one, a), (other, b) in combinations(found, 2):
        width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert width < 1 or height < 1, f"{one!r} and {other!r} overlap"
    for text, box in found:
        assert fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1, f"{text!r} leaves the figure"
        assert fig.bbox.y0 <= box.y0 and box.y1 <= fig.bbox.y1, f"{text!r} leaves the figure"


@pytest.mark.parametrize("name", FIGURES)
def test_every_axis_says_what_it_shows(figures, name):
    axes = [ax for ax in figures[name].axes if ax.get_visible()]
    assert axes[-1].get_xlabel()
    for ax in axes:
        categories = any(label.get_text()[0].isalpha() for label in ax.get_yticklabels()[:1])
        assert ax.get_ylabel() or ax.get_title("left") or categories


def test_curves_show_points_average_and_what_is_not_finite(figures):
    ax = figures["curves"].axes[1]
    assert ax.get_title("left") == "loss" and ax.get_xlabel() == "optimizer step"
    crosses, points, line = ax.lines[-3:]
    assert list(crosses.get_xdata()) == [20, 21, 22, 23] and crosses.get_marker() == "x"
    assert len(points.get_xdata()) == 36 and len(line.get_xdata()) == 40
    assert [math.isnan(y) for y in line.get_ydata()].count(True) == 4
    assert legend(figures["curves"]) == ["GRPO from SFT", LONG + "s", LONG]
    assert figures["curves"].axes[2].get_title("left") == "KL to the reference (nats per token)"


def test_the_moving_average_is_centred():
    """Over a tenth of the points, made odd, and over fewer at the ends."""
    rows = [{"step": s, "loss": float(s % 2)} for s in range(20)]
    points, line = plots.curves(rows, "loss").axes[0].lines
    assert list(points.get_ydata()) == [0, 1] * 10
    assert list(line.get_ydata()) == pytest.approx([1 / 2, *[1 / 3, 2 / 3] * 9, 1 / 2])
    (line,) = plots.curves(rows[:19], "loss").axes[0].lines
    assert list(line.get_ydata()) == [row["loss"] for row in rows[:19]]


def test_bars_say_the_figures(figures):
    (ax,) = figures["bars"].axes
    assert [round(bar.get_width(), 1) for bar in ax.patches] == [0.4, 52.4, 78.2, 100.0]
    assert [text.get_text() for text in ax.texts][1] == "52.4 % [47.4, 57.4]   262 of 500"
    assert ax.get_xlim() == (0, 100)


def test_kinds_are_rows_and_reports_colours(figures):
    (ax,) = figures["by kind"].axes
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"kind {i}" for i in range(12)]
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert len(dots) == 36 and {dot.get_color() for dot in dots} == set(drawing.COLOURS[:3])


def test_lines_take_tuples_and_objects(figures):
    (ax,) = figures["pass@k"].axes
    assert list(ax.lines[1].get_ydata()) == pytest.approx([78, 90, 97])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "8", "32"]
    assert ax.get_xscale() == "log" and legend(figures["pass@k"]) == ["base", "GRPO"]


def test_histograms_are_shares_with_their_mean(figures):
    (ax,) = figures["discrete"].axes
    heights = [bar.get_height() for bar in ax.patches]
    assert [height for height in heights if height] == pytest.approx([200 / 3, 100 / 3])
    assert ax.get_title("left") == "step 1: mean 0.07, n = 3"
    many = figures["histogram"].axes[0].patches
    assert len(many) == 24 and sum(bar.get_height() for bar in many) == pytest.approx(100)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: plots.curves(Run(), "rewrd"), r"no run has logged \['rewrd'\]; logged: .*reward"),
        (lambda: plots.bars({"base": (52.4, 48.0, 56.8)}), r"\(52\.4, 48\.0, 56\.8\): give shares"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_importing_it_is_light():
    code = "import sys, rlnb.show.plots; print(*{'torch', 'transformers'} & set(sys.modules))"
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert found.stdout.strip() == "" and found.returncode == 0


def test_lines_have_bands_where_there_are_intervals():
    series = {"a": [(1, Share(50, 100)), (10, 0.9)], "b": [(1, Share(10, 100))]}
    fig = plots.lines(series, xlabel="n", ylabel="y", logx=True, percent=True)
    (ax,) = fig.axes
    many, dot, bar = (pytest.approx(list(line.get_ydata())) for line in ax.lines)
    assert (many, dot, bar) == ([50, 90], [10], [5, 15])  # a band would have no width at one point
    band = ax.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == (pytest.approx(45), pytest.approx(90))
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "10"]


def test_a_label_keeps_its_look_where_another_has_no_place():
    """"method 0" has no time; the others look as they do where it has one."""
    both = [plots.frontier(DOTS | given, xlabel="x", ylabel="y") for given in ({}, {"method 0": (1, Percent(9))})]
    looks = [
        {round(line.get_xdata()[0]): (line.get_color(), line.get_marker()) for line in fig.axes[0].lines
         if len(line.get_xdata()) == 1 and line.get_xdata()[0] > 1.1}
        for fig in both
    ]  # fmt: skip
    assert looks[0] == looks[1] and len(looks[0]) == 10 and len(set(looks[0].values())) == 10
    assert set(legend(both[1])) - set(legend(both[0])) == {"method 0"}
    assert legend(both[0])[0] == "method 10"  # the best on top
