"""Live curves: what a training shows while it runs.

`models.backend()` makes `progress()` the display of every trainer of transformers, TRL and rlnb.train.ppo,
in place of a table that grows by a row each step. Where it shows is a screen: an output of a notebook's
cell, lines in a terminal, or a panel (rlnb/show/panel.py). The drawings are SVG made here: they take
milliseconds beside a training and touch none of matplotlib's global state, so that they can be made
in a thread.
"""

import functools
import io
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from html import escape
from typing import Any

from rlnb.show import drawing as draw
from rlnb.show import plots
from rlnb.record.values import number

Rows = Sequence[Mapping[str, float]]
ACCURACIES = ("rewards/accuracies", "accuracy", "mean_token_accuracy")
WIDTH, HEIGHT = 300, 160  # of a panel, in CSS pixels; it shrinks where there is less room
LEFT, TOP, RIGHT, BOTTOM = 52, 26, 12, 32
PAUSE = 0.5  # seconds between two drawings


def metrics(keys: Any) -> list[str]:
    """Which of the logged names to draw: reward with its spread and KL, or loss with accuracy, and
    the log-probabilities of chosen and rejected, or their margin, where a method has them.
    """
    if "reward" in keys:
        return [name for name in ("reward", "kl", "reward_std") if name in keys][:2]
    accuracy = [name for name in ACCURACIES if name in keys][:1]
    logps = [name for name in ("logps/chosen", "logps/rejected") if name in keys]
    return [name for name in ("loss", *accuracy) if name in keys] + logps


# --- drawings ------------------------------------------------------------------------------------


def card(curves: Sequence[tuple[str, str, Rows]], total: int = 0, head: str = "") -> str:
    """HTML: a light card that reads the same on a light and a dark theme, with a panel per metric.

    curves: (label, colour, rows) of each run, the one that is going on last. total: steps that the
    axis has room for. head: HTML above. The metrics are those of the last run that has any.
    """
    known = [names for _, _, rows in curves if (names := metrics({k for r in rows for k in r}))]
    panels = "".join(_panel(name, curves, total) for name in (known[-1] if known else ()))
    swatch = "display:inline-block;width:14px;height:3px;margin:0 5px 3px 0;background:"
    legend = "".join(
        "<span style='margin-right:16px;display:inline-block'>"
        f"<span style='{swatch}{colour}'></span>{escape(label)}</span>"
        for label, colour, _ in curves
        if label
    )
    style = (
        f"background:{draw.CARD};color:{draw.INK};border-radius:4px;padding:8px 10px;"
        "font:12px/1.5 sans-serif;max-width:640px"
    )
    room = "display:flex;flex-wrap:wrap;gap:4px 12px"
    return f"<div style='{style}'>{head}<div>{legend}</div><div style='{room}'>{panels}</div></div>"


def _panel(name: str, curves: Sequence[tuple[str, str, Rows]], total: int) -> str:
    """One metric over the steps, as SVG."""
    series = [
        (colour, [(row["step"], row[name]) for row in rows if name in row and "step" in row])
        for _, colour, rows in curves
    ]
    good = [value for _, points in series for _, value in points if math.isfinite(value)]
    steps = [step for _, points in series for step, _ in points]
    low, high = _range(good)
    last = max([total, *steps, 2])

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - 1) / (last - 1)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    parts = [f"<text x='4' y='14' font-weight='600'>{escape(plots.LABELS.get(name, name))}</text>"]
    for tick in ticks(low, high):
        at = y(tick)
        parts.append(f"<path d='M{LEFT} {at:.1f}H{WIDTH - RIGHT}' stroke='{draw.FAINT}'/>")
        parts.append(f"<text x='{LEFT - 6}' y='{at + 4:.1f}' text-anchor='end'>{tick:g}</text>")
    for tick in dict.fromkeys([1, *(t for t in ticks(1, last) if t > last / 8 and t == int(t))]):
        parts.append(
            f"<text x='{x(tick):.1f}' y='{HEIGHT - 18}' text-anchor='middle'>{tick:g}</text>"
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f"<text x='{middle}' y='{HEIGHT - 4}' text-anchor='middle'>optimizer step</text>")
    for place, (colour, points) in enumerate(series):
        parts.append(_line(points, colour, x, y, strong=place == len(series) - 1))
    label = escape(plots.LABELS.get(name, name), quote=True)
    return (
        f"<svg role='img' aria-label='{label}' style='flex:1 1 240px;max-width:{WIDTH}px' "
        f"viewBox='0 0 {WIDTH} {HEIGHT}' font-family='sans-serif' font-size='11' fill='{draw.INK}'>"
        f"{''.join(parts)}</svg>"
    )


def _line(points: list[tuple[float, float]], colour: str, x: Any, y: Any, strong: bool) -> str:
    """The moving average as a line, the points themselves faint, a cross for what is not finite."""
    good = [(step, value) for step, value in points if math.isfinite(value)]
    smooth = draw._moving_average([value for _, value in good], max(1, len(good) // 10))
    averaged = dict(zip((step for step, _ in good), smooth, strict=True))
    path, pen = [], "M"
    for step, _ in points:
        if step in averaged:
            path.append(f"{pen}{x(step):.1f} {y(averaged[step]):.1f}")
        pen = "L" if step in averaged else "M"  # what is not finite leaves a gap
    width, alpha = (2.2, 1) if strong else (1.5, 0.75)
    parts = [
        f"<path d='{''.join(path)}' fill='none' stroke='{colour}' stroke-width='{width}' "
        f"stroke-linejoin='round' opacity='{alpha}'/>"
    ]
    if strong or len(good) == 1:
        radius, alpha = (3, 1) if len(good) == 1 else (1.6, 0.35)
        parts += [
            f"<circle cx='{x(step):.1f}' cy='{y(value):.1f}' r='{radius}' fill='{colour}' "
            f"opacity='{alpha}'/>"
            for step, value in good
        ]
    parts += [
        f"<text x='{x(step):.1f}' y='{HEIGHT - BOTTOM}' fill='{colour}' text-anchor='middle'>×</text>"
        for step, value in points
        if not math.isfinite(value)
    ]
    return "".join(parts)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The ends of the axis: a little beyond the values."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.1 * abs(low) or 0.1
    return low - room, high + room


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers between two numbers, some `about` of them, 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(k * step, 12) for k in range(first, last + 1)]


# --- screens -------------------------------------------------------------------------------------


class Screen:
    """Where a training shows itself. Set `stopping` to have it end at the next step."""

    stopping = False

    def begin(self, total: int) -> None:
        """A training of so many steps begins."""

    def show(self, rows: Rows, total: int) -> None:
        """Called with all rows so far after each one that is logged."""

    def end(self, rows: Rows, total: int) -> None:
        """The training has ended."""


class Lines(Screen):
    """Some ten lines, with the figures that would be drawn."""

    def show(self, rows: Rows, total: int) -> None:
        if shown(len(rows), total):
            print(line(rows[-1], total), flush=True)


def shown(n: int, total: int) -> bool:
    """Whether the n-th row gets a line: the first, the last, and some ten between."""
    return n == 1 or n >= total or n % max(1, total // 10) == 0


def line(row: Mapping[str, float], total: int) -> str:
    """One row in words: "step 12 of 64, 4.1 s: loss 0.6312, ..."."""
    figures = ", ".join(f"{name} {row[name]:.4g}" for name in metrics(row))
    return f"step {row['step']:{len(str(total))}} of {total}, {row['seconds']:.1f} s: {figures}"


class Cell(Screen):
    """An output of a notebook's cell, drawn in place. As plain text it has what `Lines` prints."""

    def __init__(self) -> None:
        self.handle, self.drawn = None, 0.0

    def show(self, rows: Rows, total: int) -> None:
        if self.handle is None or time.perf_counter() - self.drawn >= PAUSE:
            self._draw(rows, total)

    def end(self, rows: Rows, total: int) -> None:
        if rows:
            self._draw(rows, total)

    def _draw(self, rows: Rows, total: int) -> None:
        from IPython.display import display

        self.drawn = time.perf_counter()
        html = card([("", draw.COLOURS[0], rows)], total, bar(rows, total))
        text = "\n".join(
            line(row, total) for n, row in enumerate(rows, 1) if shown(n, total) or n == len(rows)
        )
        data = {"text/html": html, "text/plain": text}
        if self.handle is None:
            self.handle = display(data, raw=True, display_id=True)
        else:
            self.handle.update(data, raw=True)


def bar(rows: Rows, total: int) -> str:
    """HTML: how far a training is, and how long it will still take at this pace."""
    step, spent = int(rows[-1]["step"]), rows[-1]["seconds"]
    left = f", about {pace(rows) * (total - step):.0f} s left" if step < total else ""
    return (
        f"<progress value='{step}' max='{total}' style='width:200px;vertical-align:middle'>"
        f"</progress> step {step} of {total}, {spent:.1f} s{left}"
    )


def pace(rows: Rows) -> float:
    """Seconds per step, from the rows so far; the first holds what is set up only once."""
    if len(rows) < 2:
        return rows[0]["seconds"] if rows else 0.0
    first, last = rows[max(0, len(rows) - 20)], rows[-1]
    return (last["seconds"] - first["seconds"]) / max(1, last["step"] - first["step"])


_SCREEN: ContextVar[Screen | None] = ContextVar("screen", default=None)


@contextmanager
def on(screen: Screen) -> Iterator[None]:
    """Trainers that this thread makes inside show themselves on this screen."""
    token = _SCREEN.set(screen)
    try:
        yield
    finally:
        _SCREEN.reset(token)


def usual() -> Screen:
    """A cell's output in a notebook that somebody looks at; else lines, as under `rlnb run`."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    in_notebook = shell is not None and hasattr(shell, "kernel")
    return Cell() if in_notebook and "RLNB_NOTEBOOK" not in os.environ else Lines()


# --- the trainer's side --------------------------------------------------------------------------


class Stopped(KeyboardInterrupt):
    """A screen asked a training to stop. As with Ctrl-C, its run counts as interrupted."""


@functools.cache
def progress() -> type:
    """The TrainerCallback that shows a training on the screen of the thread that made the trainer.

    Raises Stopped out of trainer.train() if the screen stopped it before its last step.
    """
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def __init__(self) -> None:
            self.screen = _SCREEN.get() or usual()
            self.rows, self.began = [], 0.0

        def on_train_begin(self, args, state, control, **kwargs):
            self.rows, self.began = [], time.perf_counter()
            self.screen.begin(state.max_steps)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if not state.is_world_process_zero or not metrics(logs or {}):
                return
            numbers = {k: plain for k, v in logs.items() if (plain := number(v)) is not None}
            spent = time.perf_counter() - self.began
            self.rows.append({"step": state.global_step, "seconds": spent, **numbers})
            self.screen.show(self.rows, state.max_steps)

        def on_step_end(self, args, state, control, **kwargs):
            if self.screen.stopping:
                control.should_training_stop = True

        def on_train_end(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                self.screen.end(self.rows, state.max_steps)
            if self.screen.stopping and state.global_step < state.max_steps:
                raise Stopped(f"stopped at step {state.global_step} of {state.max_steps}")

    return Progress


def install() -> None:
    """Make `progress()` what trainers show themselves with; `models.backend()` does."""
    import transformers.trainer

    transformers.trainer.DEFAULT_PROGRESS_CALLBACK = progress()


# --- what a thread prints ------------------------------------------------------------------------


class _Routed(io.TextIOBase):
    """A standard stream that keeps what some threads write, each its own, and passes on the rest."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.held = stream, {}  # thread -> its texts, the innermost last

    def write(self, text: str) -> int:
        held = self.held.get(threading.get_ident())
        return (held[-1] if held else self.stream).write(text)

    def flush(self) -> None:
        with suppress(ValueError):  # closed
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


_LOCK = threading.Lock()


@contextmanager
def kept(name: str, text: io.StringIO) -> Iterator[None]:
    """What this thread writes to sys.stdout or sys.stderr goes into the text, and what others write
    goes where it went: contextlib.redirect_stdout takes from all of them.
    """
    me = threading.get_ident()
    with _LOCK:
        routed = getattr(sys, name)
        if not isinstance(routed, _Routed):
            routed = _Routed(routed)
            setattr(sys, name, routed)
        routed.held.setdefault(me, []).append(text)
    try:
        yield
    finally:
        with _LOCK:
            routed.held[me].pop()
            routed.held = {thread: texts for thread, texts in routed.held.items() if texts}
            if not routed.held and getattr(sys, name) is routed:
                setattr(sys, name, routed.stream)


@contextmanager
def hushed() -> Iterator[io.StringIO]:
    """What this thread prints goes into the text that this yields, and what it displays nowhere.

    For work in the background of a notebook, which would write into whatever cell ran last.
    """
    text = io.StringIO()
    with ExitStack() as stack:
        stack.enter_context(kept("stdout", text))
        stack.enter_context(kept("stderr", text))
        shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
        publisher = getattr(shell, "display_pub", None)
        if hasattr(publisher, "register_hook"):  # ipykernel's; a thread has hooks of its own
            def drop(message: Any) -> None:
                return None

            publisher.register_hook(drop)
            stack.callback(publisher.unregister_hook, drop)
        yield text
