"""The registry of runs: one folder per run, under $RLNB_RUNS or `runs/` of the repository.

    runs/20261120-125239-grpo/
        run.json       what was asked for, on what machine, how it ended, what it cost, the result
        curve.jsonl    one line per log: step, seconds since the start, and the numbers logged
        adapter/       the LoRA adapter, if the run saved one

`run.json` is replaced whole, so a reader sees the old one or the new one. How values become JSON,
which has no NaN, is in rlnb/record/values.py.
"""

import itertools
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlnb import files
from rlnb import machine
from rlnb.record.values import Table, fits_a_cell, jsonable, number, read_rows

SCHEMA = 1  # of run.json; a reader skips what it does not know
COLUMNS = ("id", "method", "model", "status", "seed", "labels", "seconds", "train_seconds",
           "peak_memory_mb")  # fmt: skip
TRIM = 0.5  # seconds: how often at most a training gives freed memory back
ASKED = ("seed", "model", "profile", "parent", "labels")  # settings beside the config


@dataclass(eq=False, repr=False)
class Run:
    """One run, live or read from disk. Every field but `folder` is in run.json.

    `status` is running, done, failed or interrupted, and lost for a run whose process died. Memory
    is the peak of the process in MB (2**20 bytes): since the run started on Linux, since the
    process started elsewhere.
    """

    id: str
    folder: Path
    method: str
    started: str  # UTC, ISO 8601
    status: str = "running"
    error: str | None = None
    model: str | None = None
    parent: str | None = None  # the run whose adapter this one started from
    notebook: str | None = None
    profile: str | None = None
    seed: int | None = None
    labels: int = 0  # preference labels or demonstrations used
    config: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    timers: dict[str, float] = field(default_factory=dict)  # seconds, by name
    peak_memory_mb: float | None = None
    peak_gpu_memory_mb: float | None = None  # of torch's allocator
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    process: dict[str, Any] = field(default_factory=dict)

    _began = None  # time.perf_counter() at the start; no field, as only `start` knows it
    _training = None  # the model that `callback` sees, until the run ends

    def __repr__(self) -> str:
        cost = "" if self.seconds is None else f", {self.seconds:.1f} s"
        return f"<Run {self.id}: {self.status}{cost}>"

    @property
    def adapter(self) -> Path:
        """Where the run's adapter belongs; look with `.is_dir()` whether there is one."""
        return self.folder / "adapter"

    @property
    def train_seconds(self) -> float | None:
        """What `timer("train")` measured, None if it was not used."""
        return self.timers.get("train")

    def get(self, key: str) -> Any:
        """A field, or else a value of `config`, or else of `result`; None if there is none.

        Dots go down: `get("lora.rank")`, `get("result.strict")`.
        """
        head, *rest = key.split(".")
        own = {**vars(self), "train_seconds": self.train_seconds}
        places = (own, self.config, self.result)
        value = next((place[head] for place in places if head in place), None)
        for part in rest:
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def log(self, step: int | None = None, **values: float) -> None:
        """Appends one line of numbers to the curve, at once. TypeError for a value that is none."""
        for name, value in values.items():
            if number(value) is None:
                raise TypeError(f"log: {name}={value!r} is no number; results go to finish().")
        self._append(step, values)

    def finish(self, **result: Any) -> None:
        """Adds to the result and writes it; may be called again, and after the run has ended."""
        self.result |= jsonable(result)
        self._save()

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to `timers[name]`, also when the inside raises."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = self.timers.get(name, 0.0) + time.perf_counter() - began
            self.timers[name] = round(spent, 3)
            self._save()

    def callback(self):
        """A transformers TrainerCallback that puts the numbers of each log into the curve, has the
        adapter saved if the run is interrupted, and gives freed memory back between steps.
        """
        from transformers import TrainerCallback

        run, trimmed = self, time.perf_counter()

        class Curve(TrainerCallback):
            def on_train_begin(self, args, state, control, model=None, **kwargs):
                if state.is_world_process_zero:
                    run._training = model

            def on_step_end(self, args, state, control, **kwargs):
                nonlocal trimmed
                if time.perf_counter() - trimmed > TRIM:
                    machine.trim()
                    trimmed = time.perf_counter()

            def on_log(self, args, state, control, logs=None, **kwargs):
                if state.is_world_process_zero:
                    run._append(state.global_step, logs or {})

        return Curve()

    def curve(self) -> list[dict[str, float]]:
        """The lines of curve.jsonl as dicts of numbers; lines cut off by a crash are left out."""
        return read_rows(self.folder / "curve.jsonl")

    def _append(self, step: int | None, values: Mapping[str, Any]) -> None:
        row = {"step": step} if step is not None else {}
        if self._began is not None:
            row["seconds"] = round(time.perf_counter() - self._began, 3)
        row |= {k: plain for k, v in values.items() if (plain := number(v)) is not None}
        with (self.folder / "curve.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(jsonable(row), allow_nan=False) + "\n")

    def _close(self, status: str, error: BaseException | None = None) -> None:
        if status == "interrupted":
            self._keep()
        self._training = None
        self._measure()
        self.status = status
        self.error = f"{type(error).__name__}: {error}"[:2000] if error else None
        self._save()

    def _keep(self) -> None:
        """Saves what an interrupted training has learnt, unless the run has saved its adapter."""
        if hasattr(self._training, "peft_config") and not self.adapter.exists():
            from rlnb.model import folders

            with suppress(Exception):  # the interrupt goes on, and is what the user is told of
                folders.save_adapter(self._training, self.adapter)

    def _measure(self) -> None:
        if self.status == "running" and self._began is not None:
            self.seconds = round(time.perf_counter() - self._began, 3)
            self.peak_memory_mb = machine.peak_memory_mb()
            self.peak_gpu_memory_mb, self.machine["gpu"] = machine.gpu()

    def _save(self) -> None:
        self._measure()
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "folder"}
        text = json.dumps({"schema": SCHEMA, **jsonable(data)}, indent=1, allow_nan=False)
        files.write(self.folder / "run.json", text + "\n")


# --- start and find ------------------------------------------------------------------------------


def root() -> Path:
    """$RLNB_RUNS, or `runs` in the repository, or in the working folder if rlnb is installed."""
    if given := os.environ.get("RLNB_RUNS"):
        return Path(given)
    repository = Path(__file__).resolve().parents[2]
    return (repository if (repository / "pyproject.toml").is_file() else Path.cwd()) / "runs"


@contextmanager
def start(
    method: str,
    *,
    model: str | None = None,
    config: Any = None,
    seed: int | None = None,
    labels: int = 0,
    parent: Run | str | None = None,
    notebook: str | None = None,
    profile: str | None = None,
) -> Iterator[Run]:
    """Registers a run, times it, and records how it ended.

    Leaving the block marks the run done; an exception marks it failed and Ctrl-C interrupted, and
    both go on. An interrupted training with `callback` keeps its adapter. `config` is a mapping or a
    dataclass. `notebook` is this one's name by default, `profile` the one in force. Raises ValueError
    for a method that makes no folder name, TypeError for a config of another type. Of several
    processes of one training (torchrun, accelerate) the first alone is in the registry.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", method):
        raise ValueError(f"method is {method!r}: use letters, digits, '-' and '_' only.")
    settings = jsonable({} if config is None else config)
    if not isinstance(settings, dict):
        raise TypeError(f"config is {config!r:.80}: give a mapping or a dataclass.")
    from rlnb.train import recipes  # here, so that looking at runs stays light

    run = _create(
        method=method,
        model=model if model is None else str(model),
        config=settings,
        seed=seed,
        labels=labels,
        parent=parent.id if isinstance(parent, Run) else parent,
        notebook=notebook or this_notebook(),
        profile=profile or recipes.profile(),
    )
    try:
        yield run
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        run._close("interrupted" if stopped else "failed", error)
        raise
    run._close("done")


def this_notebook() -> str | None:
    """The name of the notebook that runs, as "05_dpo": under `rlnb run` and in JupyterLab; else None."""
    if name := os.environ.get("RLNB_NOTEBOOK"):
        return name
    path = Path(os.environ.get("JPY_SESSION_NAME", ""))  # a path, or an id where nobody knows it
    if path.suffix != ".ipynb":
        return None
    parts = path.with_suffix("").parts
    return "/".join(parts[-2:] if parts[-2:-1] == ("solutions",) else parts[-1:])


_PLACE: ContextVar[Path | None] = ContextVar("place", default=None)


@contextmanager
def apart(folder: Path) -> Iterator[None]:
    """Runs that this thread starts inside go into a registry of their own: see `all`."""
    token = _PLACE.set(folder)
    try:
        yield
    finally:
        _PLACE.reset(token)


def _create(method: str, **asked: Any) -> Run:
    """A new run whose folder appears under its name with run.json in it: readers never see half."""
    now = datetime.now(UTC)
    name = f"{now:%Y%m%d-%H%M%S}-{method}"
    place = _PLACE.get() or root()
    if int(os.environ.get("RANK", "0")):
        place /= ".others"
    folder = place / f".{name}.{os.urandom(4).hex()}"
    folder.mkdir(parents=True)
    run = Run(name, folder, method, now.isoformat(), **asked)
    run.versions, run.machine = machine.versions(), machine.describe()
    run.process = machine.process()
    machine.reset_peak_memory()
    run._began = time.perf_counter()
    for again in itertools.count(2):
        run._save()
        try:
            run.folder = folder.rename(place / run.id)
            break
        except OSError:  # another run has that name
            if not (place / run.id).exists():
                raise
            run.id = f"{name}-{again}"
    return run


def all(folder: Path | None = None) -> list[Run]:
    """Every run, newest first. Those with a broken run.json are skipped, with one warning for all;
    a folder without one is no run. folder: another registry than `root`.
    """
    found, broken = [], []
    for path in (folder or root()).glob("[!.]*/run.json"):
        try:
            found.append(_read(path.parent))
        except (OSError, TypeError, ValueError) as error:
            broken.append(f"{path.parent.name} ({error})")
    if broken:
        warnings.warn(f"{folder or root()}: skipped broken run(s): {'; '.join(broken)}", stacklevel=2)
    return sorted(found, key=lambda run: (run.started, run.id), reverse=True)


def load(id: str) -> Run:
    """The run of that id. Raises FileNotFoundError with the newest ids if there is none."""
    if not (root() / id / "run.json").is_file():
        newest = ", ".join(run.id for run in all()[:3]) or "none yet"
        raise FileNotFoundError(f"no run {id!r} in {root()}; the newest are: {newest}.")
    return _read(root() / id)


def find(**filters: Any) -> list[Run]:
    """The runs whose fields, config or result have these values (see `Run.get`), newest first."""
    wanted = jsonable(filters)
    return [run for run in all() if wanted == {key: run.get(key) for key in wanted}]


def latest(*, status: str | None = "done", **filters: Any) -> Run | None:
    """The newest run that is done (or has that status; None: any) and fits, None if none does."""
    filters |= {} if status is None else {"status": status}
    return next(iter(find(**filters)), None)


def _read(folder: Path) -> Run:
    data = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"run.json is not of schema {SCHEMA}")
    known = {f.name: data[f.name] for f in fields(Run) if f.name in data}
    run = Run(**{**known, "id": folder.name, "folder": folder})
    if run.status == "running" and not machine.alive(run.process):
        run.status = "lost"
    return run


def delete(run: Run) -> None:
    """Deletes a run with all its files. Raises ValueError for one that still runs."""
    if (run.folder / "run.json").is_file() and _read(run.folder).status == "running":
        raise ValueError(f"run {run.id} is still running: stop it first")
    gone = run.folder.rename(run.folder.with_name(f".{run.id}.gone"))  # readers never see half
    shutil.rmtree(gone)


def differences(runs: Iterable[Run]) -> dict[str, dict[str, Any]]:
    """By id of the run, the settings that are not the same in all of them: of the config, and seed,
    model, parent, profile and labels. One that a run does not have is None.
    """
    runs = list(runs)
    asked = [dict(run.config) | {key: getattr(run, key) for key in ASKED} for run in runs]
    keys = dict.fromkeys(key for settings in asked for key in settings)
    differ = [key for key in keys if any(s.get(key) != asked[0].get(key) for s in asked)]
    return {run.id: {key: s.get(key) for key in differ} for run, s in zip(runs, asked, strict=True)}


def compare(runs: Iterable[Run]) -> Table:
    """What differs between runs, and what came of it: a row each, its settings that are not the same
    in all, what it cost, and its results.
    """
    runs = list(runs)
    differ = differences(runs)
    rows = table(runs)
    if not rows:
        return rows
    kept = [name for name in rows[0] if name not in (*ASKED, "id")]
    return Table(
        {"id": run.id} | differ[run.id] | {name: row[name] for name in kept}
        for run, row in zip(runs, rows, strict=True)
    )


def table(runs: Iterable[Run] | None = None, columns: Iterable[str] | None = None) -> Table:
    """The runs (default: all) as rows of `columns`: names for `Run.get`.

    By default what they are and cost, and every result that is a value or a proportion; columns
    without any value are left out.
    """
    runs = all() if runs is None else list(runs)
    if columns is None:
        flat = [k for run in runs for k, v in run.result.items() if fits_a_cell(v)]
        results = dict.fromkeys(f"result.{key}" for key in flat)
        columns = [c for c in (*COLUMNS, *results) if any(run.get(c) is not None for run in runs)]
    columns = list(columns)
    return Table({name: run.get(name) for name in columns} for run in runs)
