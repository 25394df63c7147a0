"""The training panel: knobs for a method's settings, what a run will cost, its live curve, and a table of
the runs of this notebook. ``panel("dpo")`` as the last line of a cell shows it.

It calls rlnb.train.methods.train, as a cell of code does, in a thread, so that the kernel stays free. What a
click does can be called as well: ``set``, ``run``, ``stop``, ``reset``.
"""

import atexit
import gc
import threading
from dataclasses import replace
from html import escape
from typing import Any

import ipywidgets

from rlnb import machine
from rlnb.model import LoRA, memory, resolve
from rlnb.model.folders import base_name, read_saved
from rlnb.model.lora import VLLM_RANKS, check_rank
from rlnb.profiles import model_name, profile
from rlnb.record import progress, runs
from rlnb.show import drawing, forecast, live, run_table
from rlnb.streams import captured
from rlnb.train import methods
from rlnb.train.recipes import adapter, common, recipe

import torch

RATES = [float(f"{m}e{e}") for e in range(-7, 0) for m in (1, 1.5, 2, 3, 5, 7)]
NO_KNOB = ("gradient_accumulation_steps", "max_completion_length", "num_mini_batches", "cliprange_value")
SHOWN = 5  # runs whose curves are drawn
RED = "var(--jp-error-color1, #c62828)"
_BUSY = threading.Lock()  # one training at a time: they share the cores and the random state


class Panel(live.Drawn):
    """A panel for one method of rlnb.train.methods.METHODS; its knobs begin at the recipe's values.

    start, data, reward, problems: as ``train`` takes them. settings: arguments of the method's config to begin
    with, and those without a knob to keep. knobs: ipywidgets with a value, by name.
    """

    def __init__(
        self, method: str, *, seed: int = 0, start: Any = None, data: Any = None, reward: Any = None,
        problems: Any = None, **settings: Any,
    ) -> None:  # fmt: skip
        self.usual = recipe("grpo_from_base" if (method, start) == ("grpo", "base") else method) | settings
        if reward is not None and "reward_weights" not in settings:
            self.usual.pop("reward_weights", None)  # they are for the usual rewards
        self.method, self.lora, self.start = method, adapter(method), start or methods.METHODS[method].start
        self.given = dict(start=start, data=data, reward=reward, problems=problems)
        own = {"base": ("rank", "alpha"), "sft": ("rank",)}.get(self.start, ())  # SFT's adapter keeps its alpha
        if not own:  # a saved adapter keeps both
            _, saved = read_saved(start.adapter if isinstance(start, runs.Run) else start)
            self.lora = LoRA(rank=saved["r"], alpha=saved["lora_alpha"])
        self.first = {key: getattr(self.lora, key) for key in own} | {"max_lora_rank": 64}
        self.first |= {key: self.usual[key] for key, value in recipe(method).items()
                       if type(value) in (int, float) and key not in NO_KNOB} | {"seed": seed}  # fmt: skip
        self.runs: list[runs.Run] = []  # of this method and notebook that have ended, newest first
        self.rows: progress.Rows = []  # of the run that is going
        self.running = False
        self.ended = threading.Event()  # a thread's join does not survive Ctrl-C in Python 3.11
        self.ended.set()
        self._build()
        self.refresh()
        atexit.register(self._leave)

    # --- settings --------------------------------------------------------------------------------

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of the method's config class: the recipe's, as the knobs have them."""
        return self.usual | {key: knob.value for key, knob in self.knobs.items() if key in self.usual}

    @property
    def adapter(self) -> LoRA:
        """Rank and alpha of the adapter."""
        return replace(self.lora, **{key: self.knobs[key].value for key in ("rank", "alpha") if key in self.knobs})

    def set(self, **values: float) -> None:
        """Move knobs. Raises ValueError for a knob that is not there."""
        if unknown := set(values) - set(self.knobs):
            raise ValueError(f"no knob {', '.join(sorted(unknown))}: there are {', '.join(self.knobs)}")
        for key, value in values.items():
            knob = self.knobs[key]
            if hasattr(knob, "options"):  # those offer some values only
                knob.options = _options({value, *(known for _, known in knob.options)})
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
        self.stopping, self.running, self.rows, self.due = False, True, [], 0.0
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
                with captured(), progress.on(self):  # what libraries print would go into any cell
                    said = self._train(arguments)
            finally:
                self.running, self.rows = False, []
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
            return (f"Done in {run.seconds:.0f} s. Held out: {run_table.held_out(run) or 'not measured'}",)
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

    def show(self, rows: progress.Rows, total: int) -> None:
        self.rows = rows
        self.status.value = live.progress_html(rows, total)
        super().show(rows, total)

    def end(self, rows: progress.Rows, total: int) -> None:
        super().end(rows, total)
        if rows and not self.stopping:
            self._say(f"{progress.line(rows[-1], total)}. Measuring on held-out data.")

    # --- what is shown ---------------------------------------------------------------------------

    def refresh(self) -> None:
        """Read the registry anew, and show everything."""
        here = dict(model=base_name(resolve(model_name())), profile=profile())
        mine = runs.find(method=self.method, notebook=runs.this_notebook(), **here)
        self.runs = [run for run in mine if run.status != "running"]
        self.table.value = run_table.table(self.runs, self._colours())
        self.earlier = forecast.earlier_run(self.method)
        self.sft = {(run.seed, run.config.get("rank")) for run in runs.find(method="sft", status="done", **here)}
        self._tell()
        self.draw()

    def draw(self, rows: progress.Rows = (), total: int = 0) -> None:
        """The curves of the newest runs, in the colours of the table, and of the one that is going."""
        shown = self.runs[:SHOWN]
        curves = {label: run.curve() for label, run in zip(run_table.labels(shown), shown, strict=True)}
        curves |= {"now": rows} if rows else {}
        colours = [*self._colours(), drawing.INK][: len(curves)]
        self.plot.value = live.curves_html(curves, colours, total) if curves else ""

    def _colours(self) -> list[str]:
        """Of the newest runs. A run keeps its colour when others come."""
        return drawing.colours(self.runs)[::-1][:SHOWN]

    def _tell(self) -> None:
        """Show what a run would cost, or why it cannot be."""
        problem, lora, values = self.problem(), self.adapter, self.settings
        self.buttons["run"].disabled = bool(problem or self.running)
        self.buttons["stop"].disabled = not self.running or self.stopping
        if problem:
            self.costs.value = _line(problem, RED)
            return
        rows, new = values["per_device_train_batch_size"], values.get("max_completion_length")
        trains, takes = forecast.training(self.method, model_name(), lora.rank, rows, new)
        spent = "time not known before the first run"
        if self.earlier:
            step, whole = forecast.seconds(self.earlier, values)
            spent = f"takes about <b>{whole:.0f} s</b>, {values['max_steps']} steps of {step:.2g} s"
        if self.start == "sft" and (self.knobs["seed"].value, lora.rank) not in self.sft:
            spent += "<br>before that an SFT run of this rank and seed"
        self.costs.value = (
            f"<div style='line-height:1.6'>alpha / r = {lora.alpha:g} / {lora.rank} = {lora.alpha / lora.rank:g}<br>"
            f"trains <b>{trains:,}</b> parameters<br>{spent}<br>"
            f"takes about <b>{takes / memory.MB:,.0f} MB</b> beside the libraries</div>"
        )

    def _say(self, said: str, colour: str = "inherit") -> None:
        self.status.value = _line(said, colour)

    # --- widgets ---------------------------------------------------------------------------------

    def _build(self) -> None:
        self.knobs = {key: _knob(key, value) for key, value in self.first.items()}
        for knob in self.knobs.values():
            knob.observe(lambda _: self._tell(), "value")
        self.buttons = {}
        for act, look in ((self.run, "primary"), (self.stop, "warning"), (self.reset, "")):
            button = ipywidgets.Button(description=act.__name__.title(), button_style=look, layout=dict(width="5.5rem"))
            button.on_click(lambda _, act=act: act())
            self.buttons[act.__name__] = button
        self.costs, self.plot, self.table = (ipywidgets.HTML() for _ in range(3))
        self.status = ipywidgets.HTML(layout={"min_height": "2rem"})
        left = [*self.knobs.values(), self.costs, ipywidgets.HBox([*self.buttons.values()])]
        left = ipywidgets.VBox(left, layout=dict(flex="1 1 20rem", min_width="18rem", max_width="27rem"))
        right = ipywidgets.VBox([self.status, self.plot], layout=dict(flex="2 1 24rem", min_width="0"))
        both = ipywidgets.Box([left, right], layout=dict(flex_flow="row wrap"))
        self.box = ipywidgets.VBox([both, self.table], layout=dict(max_width="78rem"))

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return self.box._repr_mimebundle_(**kwargs)


panel = Panel  # the name in the notebooks


def _knob(key: str, value: float) -> Any:
    """Sliders for rank and rates, a field for any other number."""
    look = dict(value=value, description=run_table.name(key), layout={"width": "auto"},
                style={"description_width": "8.5rem"})  # fmt: skip
    if key == "max_lora_rank":
        return ipywidgets.Dropdown(options=_options({value, *VLLM_RANKS}), **look)
    if key == "rank":  # up to the narrowest layer
        ranks = {2**k for k in range(forecast.narrowest(model_name()).bit_length())}
        return ipywidgets.SelectionSlider(options=_options({value, *ranks}), **look)
    if key.endswith("learning_rate"):
        rates = {rate for rate in RATES if value / 101 < rate < value * 101}
        return ipywidgets.SelectionSlider(options=_options({value, *rates}), **look)
    return (ipywidgets.IntText if isinstance(value, int) else ipywidgets.FloatText)(**look)


def _options(values: set[float]) -> list[tuple[str, float]]:
    return [(run_table.text(value), value) for value in sorted(values)]


def _line(said: str, colour: str = "inherit") -> str:
    """HTML of a line of text; what it says is text, not HTML."""
    style = f"color:{colour};line-height:1.4;white-space:normal;overflow-wrap:anywhere"
    return f"<div style='{style}'>{escape(said)}</div>" if said else ""
