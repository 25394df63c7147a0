"""The training panel: knobs for a method's settings, what a run will cost, its live curve, and a table of
the runs of this notebook. ``panel("dpo")`` as the last line of a cell shows it.

It calls rlnb.train.methods.train, as a cell of code does, in a thread, so that the kernel stays free. What a
click does can be called as well: ``set``, ``run``, ``stop``, ``reset``, and the table's ``hide`` and ``delete``.
"""

import atexit
import gc
import threading
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import ipywidgets

from rlnb import machine
from rlnb.model import LoRA, memory
from rlnb.model.folders import base_name, read_saved, resolve
from rlnb.model.lora import VLLM_RANKS, check_rank
from rlnb.profiles import model_name, profile
from rlnb.record import progress, runs
from rlnb.show import forecast, live
from rlnb.show.run_table import RED, RunTable, block, button, held_out, labels, name, text
from rlnb.streams import captured
from rlnb.train import methods
from rlnb.train.recipes import adapter, common, recipe

import torch

RATES = [float(f"{m}e{e}") for e in range(-7, -1) for m in (1, 1.5, 2, 3, 5, 7)]
# What a knob offers; its first value is added, and others get that times and by 2 and 4.
OFFERED = {
    "alpha": [2**k for k in range(10)],
    "max_lora_rank": VLLM_RANKS,
    "max_steps": (2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512),
    "per_device_train_batch_size": (4, 8, 16, 32, 64, 128),
    "num_generations": (2, 4, 8, 16, 32),
    "num_ppo_epochs": (1, 2, 3, 4),
    "temperature": (0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5),
    **dict.fromkeys(("beta", "kl_coef"), (0.0, 0.003, 0.01, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)),
    "gamma": (0.9, 0.95, 0.99, 1.0),
    "lam": (0.0, 0.5, 0.8, 0.9, 0.95, 1.0),
    "seed": range(10),
}
NO_KNOB = ("gradient_accumulation_steps", "max_completion_length", "num_mini_batches", "cliprange_value")
_BUSY = threading.Lock()  # one training at a time: they share the cores and the random state


def panel(method: str, **given: Any) -> "Panel":
    """The training panel of a method, as the last line of a cell. given: as for ``Panel``."""
    return Panel(method, **given)


class Panel(live.Drawn):
    """A panel for one method of rlnb.train.methods.METHODS; its knobs begin at the recipe's values.

    start, data, reward, problems: as ``train`` takes them. lora: of a new adapter. settings: arguments of the
    method's config to begin with, and those without a knob to keep. knobs: ipywidgets with a value, by name.
    printed: what libraries said during the last run.
    """

    def __init__(
        self, method: str, *, seed: int = 0, start: Any = None, data: Any = None, reward: Any = None,
        problems: Any = None, lora: LoRA | None = None, max_lora_rank: int = 64, **settings: Any,
    ) -> None:  # fmt: skip
        self.method, self.lora, self.start = method, lora or adapter(method), start or methods.METHODS[method].start
        own = {"base": ("rank", "alpha"), "sft": ("rank",)}.get(self.start, ())
        if not own:  # a saved adapter keeps its rank and alpha
            _, saved = read_saved(start.adapter if isinstance(start, runs.Run) else start)
            self.lora = LoRA(rank=saved["r"], alpha=saved["lora_alpha"])
        self.given = dict(start=start, data=data, reward=reward, problems=problems)
        self.usual = recipe("grpo_from_base" if (method, start) == ("grpo", "base") else method) | settings
        if reward is not None and "reward_weights" not in settings:
            self.usual.pop("reward_weights", None)  # they are for the usual rewards
        self.first = {key: getattr(self.lora, key) for key in own} | {"max_lora_rank": max_lora_rank}
        self.first |= {key: self.usual[key] for key, value in recipe(method).items()
                       if type(value) in (int, float) and key not in NO_KNOB} | {"seed": seed}  # fmt: skip
        self.current: runs.Run | None = None  # the run that is going
        self.rows, self.running, self.printed = [], False, ""
        self.ended = threading.Event()  # a thread's join does not survive Ctrl-C in Python 3.11
        self.ended.set()
        self._build()
        self.refresh()
        atexit.register(self._leave)

    @property
    def last(self) -> runs.Run | None:
        """The newest run of this method and notebook that has ended."""
        return self.table.runs[0] if self.table.runs else None

    # --- settings --------------------------------------------------------------------------------

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of the method's config class: the recipe's, as the knobs have them."""
        return self.usual | {key: knob.value for key, knob in self.knobs.items() if key in self.usual}

    @property
    def adapter(self) -> LoRA:
        """What a new adapter will be, or what the saved one is."""
        return replace(self.lora, **{key: self.knobs[key].value for key in ("rank", "alpha") if key in self.knobs})

    def set(self, **values: float) -> None:
        """Move knobs, also to what they do not offer. Raises KeyError for a knob that is not there."""
        for key, value in values.items():
            knob = self.knobs[key]
            if value not in (known := [v for _, v in knob.options]):
                knob.options = _options({value, *known})
            knob.value = value

    def reset(self) -> None:
        """Move all knobs back to where they were at first."""
        self.set(**self.first)

    def problem(self) -> str:
        """Why the settings cannot work; "" if they can."""
        config, _ = methods.METHODS[self.method].classes()
        try:
            check_rank(self.adapter.rank, self.knobs["max_lora_rank"].value, forecast.narrowest(model_name()))
            config(**common(config, self.knobs["seed"].value) | self.settings)
        except ValueError as error:
            return str(error)
        return ""

    # --- a run -----------------------------------------------------------------------------------

    def run(self, wait: bool = False) -> bool:
        """Start a run in a thread. wait: return when it has ended, and let Ctrl-C stop it.

        False, and a message on the panel, if the settings cannot work or a run is going.
        """
        problem = self.problem()
        if problem or not _BUSY.acquire(blocking=False):
            self._say(problem or "A run is going in this kernel: wait until it has ended, or stop it.", RED)
            return False
        self.stopping, self.running, self.rows = False, True, []
        self._say("Loading the model and the data.")
        self._tell()
        self.ended.clear()
        arguments = {key: self.knobs[key].value for key in ("seed", "max_lora_rank")} | {"lora": self.adapter}
        arguments |= self.given | self.settings
        threading.Thread(target=self._work, args=(arguments,), daemon=True).start()
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

    def _work(self, arguments: dict[str, Any]) -> None:
        """The thread: what is to be said at the end is said when everything else is done."""
        try:
            try:
                with captured() as printed, progress.on(self):
                    said = self._train(arguments)
                self.printed = printed.getvalue()
            finally:
                self.current, self.running = None, False
                gc.collect()  # a trainer and its model hold each other
                machine.trim()
                if torch.cuda.is_initialized():
                    torch.cuda.empty_cache()
                _BUSY.release()
            self.refresh()
            self._say(*said)
        finally:
            self.ended.set()

    def _train(self, arguments: dict[str, Any]) -> tuple[str, ...]:
        """Train; what to say of how it ended."""
        try:
            run = methods.train(self.method, **arguments)
            return (f"Done in {run.seconds:.0f} s. Held out: {held_out(run) or 'not measured'}",)
        except KeyboardInterrupt as stopped:
            return (f"{str(stopped).capitalize()}. What it learnt is saved.",)
        except Exception as error:
            return f"{type(error).__name__}: {error}", RED

    def _leave(self) -> None:
        """A kernel that is shut down keeps what was learnt, if there is the time."""
        if not self.ended.is_set():
            self.stop()
            self.ended.wait(3)  # seconds; JupyterLab gives a kernel five

    # --- what the training calls, in its thread: the methods of progress.Screen -------------------

    def begin(self, total: int) -> None:
        here = machine.process()
        self.current = next((run for run in runs.find(status="running") if run.process == here), None)
        self.due = 0.0

    def show(self, rows: progress.Rows, total: int) -> None:
        self.rows = rows
        self.status.value = f"<div>{self._phase()}{live.progress_html(rows, total)}</div>"
        super().show(rows, total)

    def end(self, rows: progress.Rows, total: int) -> None:
        super().end(rows, total)
        if rows and not self.stopping:
            self._say(f"{self._phase()}{progress.line(rows[-1], total)}. Measuring on held-out data.")

    def _phase(self) -> str:
        going = self.current.method if self.current else self.method
        return "" if going == self.method else f"First {going}, which it starts from: "

    # --- what is shown ---------------------------------------------------------------------------

    def refresh(self) -> None:
        """Read the registry anew, and show everything."""
        here = dict(model=base_name(resolve(model_name())), profile=profile())
        mine = runs.find(method=self.method, notebook=runs.this_notebook(), **here)
        self.table.update([run for run in mine if run.status != "running"])
        self.timing = forecast.timing(self.method)
        self.sft = {(run.seed, run.config.get("rank")) for run in runs.find(method="sft", status="done", **here)}
        self._tell()
        self.draw()

    def draw(self, rows: progress.Rows = (), total: int = 0) -> None:
        """The curves of the runs that are not hidden, and of the one that is going."""
        shown = self.table.shown() + ([self.current] if self.current else [])
        found = dict(zip(labels(shown), shown, strict=True))
        curves, colours = {label: run.curve() for label, run in found.items()}, map(self.table.colour, found.values())
        self.plot.value = live.curves_html(curves, list(colours), total) if found else ""

    def _tell(self) -> None:
        """Show what a run would cost, or why it cannot be."""
        problem, lora, values = self.problem(), self.adapter, self.settings
        self.buttons["run"].disabled = bool(problem or self.running)
        self.buttons["stop"].disabled = not self.running or self.stopping
        if problem:
            self.costs.value = block(problem, RED)
            return
        rows, new = values["per_device_train_batch_size"], values.get("max_completion_length")
        trains, takes = forecast.training(self.method, model_name(), lora.rank, rows, new)
        spent = "time not known before the first run"
        if self.timing:
            step, whole = self.timing.of(values)
            spent = f"takes about <b>{whole:.0f} s</b>, {values['max_steps']} steps of {step:.2g} s"
        if self.start == "sft" and (self.knobs["seed"].value, lora.rank) not in self.sft:
            spent += "<br>before that an SFT run of this rank and seed"
        peak = (takes + forecast.held()) / memory.MB
        self.costs.value = (
            f"<div style='line-height:1.6'>alpha / r = {lora.alpha:g} / {lora.rank} = {lora.alpha / lora.rank:g}<br>"
            f"trains <b>{trains:,}</b> parameters<br>{spent}<br>memory about <b>{peak:,.0f} MB</b>, "
            f"{takes / memory.MB:,.0f} MB of it for training</div>"
        )

    def _say(self, said: str, colour: str = "inherit") -> None:
        self.status.value = block(said, colour)

    # --- widgets ---------------------------------------------------------------------------------

    def _build(self) -> None:
        self.table = RunTable(self.draw)
        self.knobs = {key: self._knob(key, value) for key, value in self.first.items()}
        self.costs, self.plot = ipywidgets.HTML(), ipywidgets.HTML()
        self.status = ipywidgets.HTML(layout={"min_height": "2rem"})
        self.buttons = {"run": button("Run", "primary", self.run), "stop": button("Stop", "warning", self.stop),
                        "reset": button("Reset", "", self.reset)}  # fmt: skip
        left = [*self.knobs.values(), self.costs, ipywidgets.HBox([*self.buttons.values()])]
        left = ipywidgets.VBox(left, layout=dict(flex="1 1 20rem", min_width="18rem", max_width="27rem"))
        right = ipywidgets.VBox([self.status, self.plot], layout=dict(flex="2 1 24rem", min_width="0"))
        both = ipywidgets.Box([left, right], layout=dict(flex_flow="row wrap"))
        self.box = ipywidgets.VBox([both, self.table.box], layout=dict(max_width="78rem"))

    def _knob(self, key: str, value: float) -> Any:
        make = ipywidgets.Dropdown if key == "max_lora_rank" else ipywidgets.SelectionSlider
        knob = make(options=_options({value, *_offered(key, value)}), value=value, description=name(key),
                    layout={"width": "auto"}, style={"description_width": "8.5rem"})  # fmt: skip
        knob.observe(lambda _: self._tell(), "value")
        return knob

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return self.box._repr_mimebundle_(**kwargs)


def _offered(key: str, value: float) -> Iterable[float]:
    if key == "rank":  # up to the narrowest layer
        width = forecast.narrowest(model_name())
        return [2**k for k in range(width.bit_length()) if 2**k <= width]
    if key.endswith("learning_rate"):
        return [rate for rate in RATES if value / 101 < rate < value * 51]
    return OFFERED.get(key) or [value * 2.0**k for k in range(-2, 3)]


def _options(values: Iterable[float]) -> list[tuple[str, float]]:
    return [(text(value), value) for value in sorted(values)]
