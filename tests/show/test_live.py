"""rlnb.show.live: what a training shows in a notebook, and how a figure is shown there."""

import base64
import itertools
import math
import re
import time

import nbformat
import pytest
from nbclient import NotebookClient

from rlnb.record import progress
from rlnb.show import drawing, live
from rlnb.tools.setup import ROOT

DPO = ("loss", "rewards/accuracies", "logps/chosen", "logps/rejected", "grad_norm")


def rows(n, names=("loss",), start=1.0):
    return [
        {"step": i + 1, "seconds": 0.5 * (i + 1)} | dict.fromkeys(names, start / (i + 1))
        for i in range(n)
    ]


@pytest.fixture
def figures(monkeypatch):
    """The figures that cards are drawn of."""
    drawn, curves = [], live.plots.curves
    monkeypatch.setattr(live.plots, "curves", lambda *a, **k: drawn.append(curves(*a, **k)) or drawn[-1])
    return drawn


# --- what is drawn -------------------------------------------------------------------------------


def test_a_drawing_has_a_panel_per_metric_and_a_line_per_run(figures):
    html = live.curves_html({"rank 8": rows(5, DPO), "rank 16": rows(3, DPO)}, ["#111111", "#222222"], total=10)
    axes = figures[0].axes
    assert [ax.get_title("left") for ax in axes] == [live.plots.LABELS.get(name, name) for name in DPO[:4]]
    for ax in axes:
        assert [(line.get_color(), len(line.get_xdata())) for line in ax.lines] == [("#111111", 5), ("#222222", 3)]
        assert ax.get_xlim()[1] == 10  # room for what is to come
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["rank 8", "rank 16"]
    assert f"alt='{', '.join(DPO[:4])}'" in html
    picture = base64.b64decode(re.search("src='data:image/png;base64,([^']*)'", html)[1])
    assert picture.startswith(b"\x89PNG") and len(html) < 200_000


def test_the_last_run_says_what_is_drawn(figures):
    live.curves_html({"a": rows(3, ("loss",)), "b": rows(2, ("reward", "kl")), "going": []}, list(drawing.COLOURS[:3]))
    assert [ax.get_title("left") for ax in figures[0].axes] == ["mean reward", live.plots.LABELS["kl"]]


@pytest.mark.parametrize("curve", [[], rows(1), [{"step": 1, "loss": math.nan}], rows(3, start=0)])
def test_a_drawing_of_next_to_nothing_is_drawn(curve):
    html = live.curves_html({"": curve}, ["red"], 8, "<p>head</p>")
    assert "<p>head</p>" in html and ("<img" in html) == bool(curve)


def test_the_bar_says_how_long_it_will_take():
    assert "step 3 of 8, 1.5 s, about 2 s left" in live.progress_html(rows(3), 8)
    assert live.progress_html(rows(8), 8).endswith("step 8 of 8, 4.0 s")


def test_drawing_takes_a_tenth_of_the_time_at_most(monkeypatch):
    """And two drawings are half a second apart at least."""
    now, takes, begun = 0.0, 0.0, []

    class Slow(live.Drawn):
        def draw(self, rows, total):
            nonlocal now
            begun.append(now)
            now += takes

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    for cost, between in ((0.01, 0.51), (0.2, 2.2)):
        takes = cost
        begun.clear()
        screen, stop = Slow(), now + 10
        while now < stop:
            screen.show(rows(1), 8)
            now += 0.001
        gaps = [b - a for a, b in itertools.pairwise(begun)]
        assert gaps and all(gap == pytest.approx(between, abs=0.01) for gap in gaps)
        screen.end(rows(1), 8)
        assert begun[-1] > stop  # the last state is drawn in any case


def test_a_terminal_has_lines():
    assert type(progress.current_screen()) is progress.Lines


# --- in a kernel ---------------------------------------------------------------------------------


def kernel(monkeypatch, *cells):
    """Executes cells in a kernel as Jupyter does; their outputs."""
    monkeypatch.delenv("RLNB_NOTEBOOK", raising=False)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # of conftest.py, and no reader's
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=str(ROOT))
    return [cell.outputs for cell in notebook.cells]


def test_a_notebook_gets_one_output_that_is_drawn_anew(monkeypatch):
    drawn, shown, after = kernel(
        monkeypatch,
        "from rlnb.show import plots\nfrom rlnb.record import progress\nscreen = progress.current_screen()",
        "rows = [{'step': i + 1, 'seconds': i, 'loss': 1 / (i + 1)} for i in range(20)]\n"
        "for n in range(1, 21): screen.show(rows[:n], 20)\nscreen.end(rows, 20)",
        "import os\nos.environ['RLNB_NOTEBOOK'] = 'x'\nprint(type(progress.current_screen()).__name__)",
    )
    assert drawn == []
    (output,) = shown
    assert output.output_type == "display_data" and "<img" in output.data["text/html"]
    assert "step 20 of 20" in output.data["text/html"]
    assert output.data["text/plain"].startswith("step 20 of 20")
    assert after[0].text == "Lines\n"  # under `rlnb run` nobody looks


def test_a_figure_is_shown_once_and_as_a_picture(monkeypatch):
    """Without any magic, also drawn in a thread, and beside figures of pyplot's."""
    code = "plots.bars({'a': (0.2, 0.1, 0.3)})"
    plain, shown, thread, beside = kernel(
        monkeypatch,
        f"from rlnb.show import plots\n{code}",
        f"figure = {code}\ndisplay(figure)",
        f"import threading\nt = threading.Thread(target=lambda: globals().update(drawn={code}))\n"
        "t.start(); t.join()\ndrawn",
        f"import matplotlib.pyplot as plt\nplt.plot([1, 2])\n{code}",
    )
    for outputs in (plain, shown, thread):
        (output,) = outputs
        assert output.data["image/png"] and "CellFigure" in output.data["text/plain"]
    assert ["image/png" in output.data for output in beside] == [True, True]
