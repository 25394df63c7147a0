"""rlnb.show.live: what a training shows, in a notebook, in a terminal, and in a thread of its own."""

import io
import math
import re
import sys
import threading
from xml.etree import ElementTree

import nbformat
import pytest
from nbclient import NotebookClient

from rlnb.show import live
from rlnb.tools.setup import ROOT

DPO = ("loss", "rewards/accuracies", "logps/chosen", "logps/rejected", "grad_norm")


def rows(n, names=("loss",), start=1.0):
    return [
        {"step": i + 1, "seconds": 0.5 * (i + 1)} | dict.fromkeys(names, start / (i + 1))
        for i in range(n)
    ]


def drawing(*curves, **options):
    """The card as XML, which it has to be, and the texts in it."""
    root = ElementTree.fromstring(live.card(curves, **options))
    return root, [text for text in root.itertext() if text]


# --- what is drawn -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logged", "drawn"),
    [
        (DPO, ["loss", "rewards/accuracies", "logps/chosen", "logps/rejected"]),
        (("loss", "mean_token_accuracy", "entropy"), ["loss", "mean_token_accuracy"]),
        (("loss", "accuracy", "margin"), ["loss", "accuracy"]),
        (("loss", "logps/chosen", "logps/rejected"), ["loss", "logps/chosen", "logps/rejected"]),
        (("loss", "reward", "reward_std", "entropy"), ["reward", "reward_std"]),
        (("loss", "reward", "reward_std", "kl"), ["reward", "kl"]),
        (("train_runtime", "epoch"), []),
    ],
)
def test_each_method_has_its_curves(logged, drawn):
    assert live.metrics(logged) == drawn


def test_a_card_has_a_panel_per_metric_and_a_line_per_run():
    runs = [("rank 8", "#111111", rows(5, DPO)), ("rank 16", "#222222", rows(3, DPO))]
    root, texts = drawing(*runs, total=10)
    panels = root.findall(".//svg")
    assert len(panels) == 4 and [p.get("role") for p in panels] == ["img"] * 4
    for panel in panels:
        lines = [path for path in panel.iter("path") if path.get("fill") == "none"]
        assert [line.get("stroke") for line in lines] == ["#111111", "#222222"]
        assert [len(re.findall("[ML]", line.get("d"))) for line in lines] == [5, 3]
    assert {"rank 8", "rank 16", "log-probability of chosen (nats)", "optimizer step"} <= set(texts)


def test_labels_are_text():
    root, texts = drawing(("<b>&", "red", rows(2)), ("", "blue", rows(2)))
    assert "<b>&" in texts and root.find(".//b") is None


def test_what_is_not_finite_leaves_a_gap_and_a_cross():
    curve = rows(5)
    curve[2]["loss"], curve[4]["loss"] = math.nan, math.inf
    root, texts = drawing(("", "red", curve))
    (line,) = [path for path in root.iter("path") if path.get("fill") == "none"]
    assert re.findall("[ML]", line.get("d")) == ["M", "L", "M"]
    assert texts.count("×") == 2 and "nan" not in live.card([("", "red", curve)]).lower()


@pytest.mark.parametrize("curve", [[], rows(1), [{"step": 1, "loss": math.nan}], rows(3, start=0)])
def test_a_card_of_next_to_nothing_is_drawn(curve):
    root, _ = drawing(("", "red", curve), total=8)
    assert len(root.findall(".//svg")) == bool(curve)


def test_nothing_leaves_its_panel():
    """Whatever is drawn, drawn it is between the edges."""
    curve = [{"step": s, "loss": v} for s, v in ((1, -1e6), (2, 3e-7), (40, 1e6))]
    root, _ = drawing(("", "red", curve), total=40)
    for path in root.iter("path"):
        x, y = zip(*re.findall(r"([\d.-]+) ([\d.-]+)", path.get("d")), strict=True)
        assert all(0 <= float(v) <= live.WIDTH for v in x)
        assert all(0 <= float(v) <= live.HEIGHT for v in y)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.68, 0.7), (-3.2e-5, 9e-5), (1, 64), (-7e4, 0)])
def test_ticks_are_round_and_inside(low, high):
    found = live.ticks(low, high)
    assert 2 <= len(found) <= 6 and low <= found[0] and found[-1] <= high * (1 + 1e-9)
    assert all(len(f"{tick:g}") <= 7 for tick in found)


# --- screens -------------------------------------------------------------------------------------


def test_a_terminal_gets_some_ten_lines(capsys):
    screen = live.Lines()
    curve = rows(64, DPO)
    for n in range(1, 65):
        screen.show(curve[:n], 64)
    lines = capsys.readouterr().out.splitlines()
    assert 10 <= len(lines) <= 13
    assert lines[0].startswith("step  1 of 64, 0.5 s: loss 1, rewards/accuracies 1")
    assert lines[-1].startswith("step 64 of 64, 32.0 s: loss 0.01562")


def test_the_bar_says_how_long_it_will_take():
    assert "step 3 of 8, 1.5 s, about 2 s left" in live.bar(rows(3), 8)
    assert live.bar(rows(8), 8).endswith("step 8 of 8, 4.0 s")


def kernel(*cells):
    """Executes cells in a kernel as Jupyter does; their outputs."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute(cwd=str(ROOT))
    return [cell.outputs for cell in notebook.cells]


def test_a_notebook_gets_one_output_that_is_drawn_anew(monkeypatch):
    monkeypatch.delenv("RLNB_NOTEBOOK", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    made, shown, thread, after = kernel(
        "from rlnb.show import live\nscreen = live.usual()\nlive.PAUSE = 0",
        "rows = [{'step': i + 1, 'seconds': i, 'loss': 1 / (i + 1)} for i in range(20)]\n"
        "for n in range(1, 21): screen.show(rows[:n], 20)\nscreen.end(rows, 20)",
        "import threading\nfrom IPython.display import display\n"
        "def work():\n"
        "    with live.hushed() as said:\n"
        "        print('noise'); display('more noise')\n"
        "    print('heard:', said.getvalue().strip())\n"
        "thread = threading.Thread(target=work); thread.start(); thread.join()",
        "import os, sys\nos.environ['RLNB_NOTEBOOK'] = 'x'\n"
        "print(type(live.usual()).__name__, type(sys.stdout).__name__)",
    )
    assert made == []
    (output,) = shown
    assert output.output_type == "display_data" and "<svg" in output.data["text/html"]
    assert "step 20 of 20" in output.data["text/html"]
    assert len(output.data["text/plain"].splitlines()) == 11
    assert [o.text for o in thread] == ["heard: noise\n"]
    assert after[0].text == "Lines OutStream\n"


# --- the trainer's side --------------------------------------------------------------------------


@pytest.fixture
def train():
    """Calls a progress callback as a trainer does: steps of a loss, until it stops."""
    from transformers import TrainerControl, TrainerState
    from transformers.trainer_callback import CallbackHandler

    def train(screen, steps=6):
        with live.on(screen):
            callback = live.progress()()
        handler = CallbackHandler([callback], None, None, None, None)
        state = TrainerState(is_world_process_zero=True, max_steps=steps)
        control = handler.on_train_begin(None, state, TrainerControl())
        for step in range(1, steps + 1):
            state.global_step = step
            control = handler.on_step_end(None, state, control)
            handler.on_log(None, state, control, {"loss": 1 / step, "note": "text"})
            if control.should_training_stop:
                break
        handler.on_log(None, state, control, {"train_runtime": 1.0, "train_loss": 0.5})
        handler.on_train_end(None, state, control)

    return train


class Watched(live.Screen):
    def __init__(self, stop_at=None):
        self.seen, self.stop_at = [], stop_at

    def begin(self, total):
        self.seen.append(total)

    def show(self, rows, total):
        self.seen.append(rows[-1]["step"])
        self.stopping |= len(rows) == self.stop_at

    def end(self, rows, total):
        self.seen.append("end")


def test_a_screen_sees_a_training_from_begin_to_end(train):
    screen = Watched()
    train(screen)
    assert screen.seen == [6, 1, 2, 3, 4, 5, 6, "end"]


def test_a_screen_stops_a_training_at_the_next_step(train):
    screen = Watched(stop_at=2)
    with pytest.raises(live.Stopped, match="stopped at step 3 of 6"):
        train(screen)
    assert screen.seen == [6, 1, 2, 3, "end"]
    assert issubclass(live.Stopped, KeyboardInterrupt)


def test_a_stop_at_the_last_step_comes_too_late(train):
    screen = Watched(stop_at=6)
    train(screen)
    assert screen.stopping and screen.seen[-2:] == [6, "end"]


def test_trainers_show_themselves_so():
    import transformers.trainer

    from rlnb.model import load as models

    models.backend()
    assert transformers.trainer.DEFAULT_PROGRESS_CALLBACK is live.progress()


# --- what a thread prints ------------------------------------------------------------------------


def test_a_thread_keeps_its_own_words_and_no_others(capsys):
    held, ready, done = io.StringIO(), threading.Event(), threading.Event()

    def work():
        with live.kept("stdout", held):
            print("mine")
            ready.set()
            done.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(10)
    print("yours")
    inner = io.StringIO()
    with live.kept("stdout", inner):
        print("inner")
    done.set()
    thread.join()
    assert (held.getvalue(), inner.getvalue()) == ("mine\n", "inner\n")
    assert capsys.readouterr().out == "yours\n"
    assert not isinstance(sys.stdout, live._Routed)


def test_words_within_words_go_to_the_inner_ones_and_an_error_ends_it():
    outer, inner = io.StringIO(), io.StringIO()
    with pytest.raises(RuntimeError), live.kept("stderr", outer):
        print("a", file=sys.stderr)
        with live.kept("stderr", inner):
            print("b", file=sys.stderr)
        print("c", file=sys.stderr)
        raise RuntimeError
    assert (outer.getvalue(), inner.getvalue()) == ("a\nc\n", "b\n")
    assert not isinstance(sys.stderr, live._Routed)
