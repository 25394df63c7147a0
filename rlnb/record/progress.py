"""Where a training shows itself: a screen, which rlnb.train.loop feeds with the logged rows, {"step": 3,
"seconds": 4.1 since the training began, "loss": ...}.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

Rows = Sequence[Mapping[str, float]]


class Stopped(KeyboardInterrupt):
    """A screen asked a training to stop. As with Ctrl-C, its run counts as interrupted."""


class Screen:
    """Shows nothing. Set `stopping` to have the training end at its next step."""

    stopping = False

    def show(self, rows: Rows, total: int) -> None:
        """Called with all rows so far after each one that is logged."""

    def end(self, rows: Rows, total: int) -> None:
        """The training has ended."""


class Lines(Screen):
    """Prints some ten lines, with the figures that would be drawn."""

    def show(self, rows: Rows, total: int) -> None:
        if len(rows) in (1, total) or len(rows) % max(1, total // 10) == 0:
            print(line(rows[-1], total), flush=True)


_SCREEN: ContextVar[Screen | None] = ContextVar("screen", default=None)
_default: Callable[[], Screen] = Lines


@contextmanager
def on(screen: Screen) -> Iterator[None]:
    """Trainings that this thread starts inside show themselves on this screen."""
    token = _SCREEN.set(screen)
    try:
        yield
    finally:
        _SCREEN.reset(token)


def set_default(factory: Callable[[], Screen]) -> None:
    """The factory makes the screen of each training that is started outside of `on`."""
    global _default
    _default = factory


def current_screen() -> Screen:
    """The screen of `on`; else a new default one, or under `rlnb run`, where nobody looks, Lines."""
    return _SCREEN.get() or (Lines if "RLNB_NOTEBOOK" in os.environ else _default)()


def metrics(keys: Iterable[str]) -> list[str]:
    """Which of the logged names to show, at most four: of methods that sample the reward and the KL."""
    keys = set(keys)
    if "reward" in keys:
        return [name for name in ("reward", "kl", "reward_std") if name in keys][:2]
    accuracy = [name for name in ("rewards/accuracies", "accuracy", "mean_token_accuracy") if name in keys][:1]
    return [name for name in ("loss", *accuracy, "logps/chosen", "logps/rejected") if name in keys]


def line(row: Mapping[str, float], total: int) -> str:
    """One row in words: "step 12 of 64, 4.1 s: loss 0.6312, ..."."""
    figures = ", ".join(f"{name} {row[name]:.4g}" for name in metrics(row))
    return f"step {row['step']:{len(str(total))}} of {total}, {row['seconds']:.1f} s: {figures}"
