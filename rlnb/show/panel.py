"""The training panel: knobs for a method's settings, what a run will cost, its live curve, and a table
of the runs of this notebook. `rlnb.show.widgets.panel("dpo")` makes one.

It starts the same function that a code cell calls (rlnb.train.methods.dpo), in a thread, so that the
kernel stays free. What a click does can be called as well: `set`, `run`, `stop`, `reset`, and the
table's `sort`, `hide`, `delete`. It is made of plain ipywidgets, for JupyterLab, VS Code and Colab.
"""

import atexit
import inspect
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlnb.show import forecast, live
from rlnb import machine
from rlnb.record import runs
from rlnb.train import recipes, methods as training
from rlnb.model import memory, load as models
from rlnb.model.lora import VLLM_RANKS, check_rank
from rlnb.show.run_table import RED, RunTable, block, button, held_out, labels, text

# What a knob offers; the recipe's own value is added.
OFFERED = {
    "learning_rate": [float(f"{m}e{e}") for e in range(-7, -1) for m in (1, 1.5, 2, 3, 5, 7)],
    "steps": (2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512),
    "batch": (4, 8, 16, 32, 64, 128),
    "demonstrations": (16, 32, 64, 128, 256, 512),
    "pairs": (32, 64, 128, 256, 512),
    "group": (2, 4, 8, 16, 32),
    "epochs": (1, 2, 3, 4),
    "temperature": (0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5),
    "beta": (0, 0.003, 0.01, 0.03, 0.05, 0.1, 0.2, 0.5, 1),
    "kl_coef": (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1),
    "lam": (0, 0.5, 0.8, 0.9, 0.95, 1),
    "seed": range(10),
    "max_lora_rank": VLLM_RANKS,
}
NOT_KNOBS = ("alpha", "accumulate", "max_new_tokens", "test_problems")
NAMES = {"kl_coef": "KL coefficient", "lam": "GAE lambda", "max_lora_rank": "max_lora_rank"}
_BUSY = threading.Lock()  # one training at a time: they share the cores and the random state


class Panel(live.Screen):
    """See the module. method: of rlnb.train.methods.METHODS. recipe: the settings to start from (default:
    the method's). seed: to start from. train: another function than the method's, which is called
    with seed, recipe and `given`. given: more of its arguments, such as start or pairs: they stay.
    trials: whether to time a few steps in the background where no run tells how long they take.

    knobs: ipywidgets with a value, by name. last: the run that ended last. said: what libraries
    printed meanwhile.
    """

    def __init__(
        self, method: str, *, recipe: recipes.Recipe | None = None, seed: int = 0,
        train: Callable[..., runs.Run] | None = None, trials: bool = True, **given: Any,
    ) -> None:  # fmt: skip
        models.backend()  # before transformers, which the forecast needs
        forecast.tidy()
        self.base = recipe or recipes.recipe(method)
        self.method, self.given, self.trials = self.base.method, given, trials
        self.train = train or training.METHODS[self.method]
        self.last: runs.Run | None = None
        self.going: tuple[recipes.Recipe, int] | None = None  # settings and seed of the run
        self.ended = threading.Event()  # a thread's join does not survive Ctrl-C in Python 3.11
        self.ended.set()
        self.trial: Trial | None = None
        self.said, self.phase, self.rows, self.total, self.drawn = "", "", [], 0, 0.0
        self.table = RunTable(self._draw)
        self._build(seed)
        self.refresh()
        atexit.register(self._leave)

    # --- settings --------------------------------------------------------------------------------

    @property
    def recipe(self) -> recipes.Recipe:
        """The settings as the knobs have them."""
        values = {name: knob.value for name, knob in self.knobs.items() if name != "seed"}
        return replace(self.base, **values)

    def set(self, **values: Any) -> None:
        """Move knobs, also to what they do not offer. Raises KeyError for a knob that is not there."""
        for name, value in values.items():
            knob = self.knobs[name]
            if value not in (known := [v for _, v in knob.options]):
                knob.options = options([*known, value])
            knob.value = value

    def reset(self) -> None:
        """Move all knobs back to where they were at first."""
        self.set(**self.first)

    def problems(self) -> dict[str, str]:
        """What cannot work, by the knob that it is shown at; {} if all is well."""
        recipe, found = self.recipe, {}
        try:
            check_rank(recipe.rank, recipe.max_lora_rank, forecast.narrowest(recipes.model_name()))
        except ValueError as error:
            found["rank"] = str(error)
        try:
            recipe.trl("", self.knobs["seed"].value)
        except ValueError as error:
            found["batch"] = str(error)
        return found

    # --- a run -----------------------------------------------------------------------------------

    def run(self, wait: bool = False) -> bool:
        """Start a run in a thread. wait: return when it has ended, and let Ctrl-C stop it.

        False, and a message on the panel, if the settings cannot work or a run is going.
        """
        if problems := self.problems():
            self._say("; ".join(problems.values()), RED)
            return False
        if self.trial:
            self.trial.cancel()
            self.trial.timer.join()
        if not _BUSY.acquire(blocking=False):
            self.notes["batch"].value = block(
                "A run is going in this kernel: wait until it has ended, or stop it.", RED
            )
            return False
        self.stopping, self.rows, self.total, self.phase = False, [], 0, ""
        self.going = (self.recipe, self.knobs["seed"].value)
        self._say("Loading the model and the data.")
        self._tell()
        self.ended.clear()
        threading.Thread(target=self._work, args=self.going, daemon=True).start()
        if wait:
            self.wait()
        return True

    def wait(self) -> None:
        """Return when the run has ended. Ctrl-C stops it, and is raised when it has."""
        try:
            while not self.ended.wait(0.2):  # without a time to wait, Windows does not hear Ctrl-C
                pass
        except KeyboardInterrupt:
            self.stop()
            self.ended.wait()
            raise

    def stop(self) -> None:
        """End the run after the step that it is at: it counts as interrupted and keeps what it learnt."""
        self.stopping = self.buttons["stop"].disabled = True

    def _work(self, recipe: recipes.Recipe, seed: int) -> None:
        """The thread: what is to be said at the end is said when everything else is done."""
        try:
            try:
                forecast.tidy()
                before, held = {run.id for run in runs.all()}, forecast.held()
                said = self._train(recipe, seed, held)
                made = (r for r in runs.all() if r.id not in before and r.method == self.method)
                self.last = next(made, self.last)
            finally:
                self.going, self.rows, self.total = None, [], 0
                forecast.tidy()
                _BUSY.release()
            self.refresh()
            self._say(*said)
        finally:
            self.ended.set()

    def _train(self, recipe: recipes.Recipe, seed: int, held: int) -> tuple[str, ...]:
        """Call the function; what to say of how it ended."""
        with live.hushed() as printed, live.on(self):
            try:
                run = self.train(seed=seed, recipe=recipe, **self.given)
                forecast.note(recipe, held, run)
                measured = held_out(run)
                said = (f"Done in {run.seconds:.0f} s." + f" Held out: {measured}" * bool(measured),)
            except KeyboardInterrupt as stopped:
                said = (f"{str(stopped).capitalize()}. What it learnt is saved.",)
            except Exception as error:
                said = (f"{type(error).__name__}: {error}", RED)
        self.said = printed.getvalue()
        return said

    def _leave(self) -> None:
        """A kernel that is shut down keeps what was learnt, if there is the time."""
        if not self.ended.is_set():
            self.stop()
            self.ended.wait(3)  # seconds; JupyterLab gives a kernel five

    # --- what the training calls, in its thread --------------------------------------------------

    def begin(self, total: int) -> None:
        here = machine.process()
        going = next((r for r in runs.find(status="running") if r.process == here), None)
        other = going is not None and going.method != self.method  # what the method starts from
        self.phase = f"First {going.method}, which it starts from: " if other else ""
        self.rows, self.total, self.drawn = [], total, 0.0

    def show(self, rows: live.Rows, total: int) -> None:
        self.rows = rows
        if time.perf_counter() - self.drawn >= live.PAUSE:
            self.drawn = time.perf_counter()
            self.status.value = f"<div>{self.phase}{live.bar(rows, total)}</div>"
            self._draw()

    def end(self, rows: live.Rows, total: int) -> None:
        self.rows = rows
        self._draw()
        if not self.stopping:
            self._say(f"{self.phase}{live.line(rows[-1], total)}. Measuring on held-out data.")

    # --- what is shown ---------------------------------------------------------------------------

    def refresh(self) -> None:
        """Read the registry anew, and show everything."""
        found = runs.find(
            method=self.method, model=recipes.model_name(), profile=recipes.profile(),
            notebook=runs.this_notebook(),
        )  # fmt: skip
        self.table.update([run for run in found if run.status != "running"])
        self._tell()
        self._draw()

    def _moved(self) -> None:
        """A knob has moved, or the panel has come into view."""
        known = self._tell()
        if self.trial:
            self.trial.cancel()
        if self.trials and not known and not self.going and not self.problems():
            self.trial = Trial(self)

    def _tell(self) -> bool:
        """Show what a run would cost. Whether there is a timing of about these sizes."""
        problems = self.problems()
        for name, note in self.notes.items():
            note.value = block(problems.get(name, ""), RED)
        self.buttons["run"].disabled = bool(problems or self.going)
        self.buttons["stop"].disabled = not self.going or self.stopping
        if problems:
            self.costs.value = ""
            return False
        cost, steps = forecast.forecast(self.recipe), self.recipe.steps
        spent = "not known yet: some steps are timed when the kernel is idle"
        if cost.seconds is not None:
            spent = f"<b>{cost.seconds:.0f} s</b>, {steps} steps of {cost.step:.2g} s"
            spent += "" if cost.exact else "; from runs of other sizes"
        spent += self._first()
        self.costs.value = (
            f"<div style='line-height:1.6;margin:6px 0'>trains <b>{cost.trainable:,}</b> parameters"
            f"<br>takes {spent}<br>memory <b>{cost.peak / memory.MB:,.0f} MB</b> at the peak, "
            f"{cost.memory / memory.MB:,.0f} MB of it for training</div>"
        )
        return cost.exact

    def _first(self) -> str:
        """What has to be made before the method can start, in words; "" if nothing."""
        takes = inspect.signature(self.train).parameters
        start = takes["start"].default if "start" in takes else None
        rank, seed = self.knobs["rank"].value, self.knobs["seed"].value
        if self.given.get("start", start) != "sft" or training.find_sft(seed, rank):
            return ""
        cost = forecast.forecast(recipes.recipe("sft", rank=rank))
        known = f", {cost.seconds:.0f} s" if cost.seconds else ""
        return f"<br>before that an SFT run of this rank and seed{known}"

    def _draw(self) -> None:
        """The runs that are not hidden, and the one that is going."""
        shown = self.table.shown()
        curves = [(self.table.colours[run.id], run.curve()) for run in shown]
        if self.going and self.rows:
            config, now = runs.jsonable(self.going[0]), datetime.now(UTC).isoformat()
            shown.append(runs.Run("", Path(), self.method, now, config=config, seed=self.going[1]))
            curves.append((self.table.next_colour(), self.rows))
        names = labels(shown)
        drawn = [(name, *curve) for name, curve in zip(names, curves, strict=True)]
        self.plot.value = live.card(drawn, self.total) if drawn else ""

    def _say(self, said: str, colour: str = "inherit") -> None:
        self.status.value = block(said, colour)

    # --- widgets ---------------------------------------------------------------------------------

    def _build(self, seed: int) -> None:
        import ipywidgets as w

        self.knobs = {name: self._knob(name, value) for name, value in self._values(seed).items()}
        self.first = {name: knob.value for name, knob in self.knobs.items()}
        self.notes = {"rank": w.HTML(), "batch": w.HTML()}
        self.costs, self.plot = w.HTML(), w.HTML()
        self.status = w.HTML(layout={"min_height": "2rem"})
        looks = {"run": "primary", "stop": "warning", "reset": ""}
        self.buttons = {name: button(name.title(), look, "6rem") for name, look in looks.items()}
        self.buttons["run"].on_click(lambda _: self.run())
        self.buttons["stop"].on_click(lambda _: self.stop())
        self.buttons["reset"].on_click(lambda _: self.reset())
        top = [self.knobs["rank"], self.knobs["max_lora_rank"], self.notes["rank"]]
        rest = [knob for name, knob in self.knobs.items() if name not in ("rank", "max_lora_rank")]
        left = [*top, *rest, self.notes["batch"], self.costs, w.HBox([*self.buttons.values()])]
        sides = [
            w.VBox(left, layout=dict(flex="1 1 20rem", min_width="18rem", max_width="27rem")),
            w.VBox([self.status, self.plot], layout=dict(flex="2 1 24rem", min_width="0")),
        ]
        both = w.Box(sides, layout=dict(flex_flow="row wrap"))
        self.box = w.VBox([both, self.table.box], layout=dict(max_width="78rem"))
        self.box._view_count = 0  # a front end counts its views: who looks wants to know the time
        self.box.observe(lambda _: self._moved(), "_view_count")

    def _values(self, seed: int) -> dict[str, float]:
        """The numbers of the recipe that get a knob."""
        numbers = {k: v for k, v in vars(self.base).items() if isinstance(v, int | float)}
        return {k: v for k, v in numbers.items() if k not in NOT_KNOBS} | {"seed": seed}

    def _knob(self, name: str, value: float) -> Any:
        import ipywidgets as w

        make = w.Dropdown if name == "max_lora_rank" else w.SelectionSlider
        knob = make(
            options=options([*offered(name, value), value]), value=value,
            description=NAMES.get(name, name.replace("_", " ")), layout={"width": "auto"},
            style={"description_width": "8.5rem"},
        )  # fmt: skip
        knob.observe(lambda _: self._moved(), "value")
        return knob

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return self.box._repr_mimebundle_(**kwargs)


def offered(name: str, value: float) -> list[float]:
    """What a knob offers beside its first value."""
    if name == "rank":
        return forecast.ranks(recipes.model_name())
    if name == "learning_rate":
        return [rate for rate in OFFERED[name] if value / 101 < rate < value * 51]
    return list(OFFERED.get(name) or [value * 2**k for k in range(-2, 3)])


def options(values: Iterable[float]) -> list[tuple[str, float]]:
    return [(text(value), value) for value in sorted(set(values))]


class Trial(live.Screen):
    """Times a few steps at a panel's settings, in a thread, a moment after the last move."""

    def __init__(self, panel: Panel, wait: float = 0.7) -> None:
        self.panel = panel
        self.timer = threading.Timer(wait, self._work)
        self.timer.daemon = True
        self.timer.start()

    def cancel(self) -> None:
        """End it: at once if it has not begun, else after the step that it is at."""
        self.stopping = True
        self.timer.cancel()

    def _work(self) -> None:
        panel = self.panel
        while not _BUSY.acquire(timeout=0.1):
            if self.stopping or panel.going:
                return
        try:
            if self.stopping:
                return
            with live.on(self), live.hushed():
                seed = panel.knobs["seed"].value
                forecast.trial(panel.train, panel.recipe, seed, **panel.given)
        except KeyboardInterrupt:
            return
        except Exception as error:
            panel._say(f"A trial of these settings failed: {type(error).__name__}: {error}", RED)
        finally:
            forecast.tidy()
            _BUSY.release()
        panel._tell()
