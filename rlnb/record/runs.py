"""The registry of runs: one folder per run, under $RLNB_RUNS or `runs/` of the repository.

    runs/20261120-125239-grpo/
        run.json       what was asked for, on what machine, how it ended, what it cost, the result; replaced whole
        curve.jsonl    one line per log: step, seconds since the start, and the numbers logged
        adapter/       the LoRA adapter, if the run saved one
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
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlnb import files, machine, profiles
from rlnb.record.values import jsonable, number, read_rows

if TYPE_CHECKING:
    from pandas import DataFrame

ROOM = 50_000_000  # bytes that have to be free for a run
SCHEMA = 1  # of run.json; a reader skips what it does not know
COLUMNS = ("id", "method", "status", "seed", "seconds", "result.strict", "result.pair_accuracy")


@dataclass(eq=False, repr=False)
class Run:
    """One run, live or read from disk. Every field but `folder` is in run.json, and has its type there."""

    id: str
    folder: Path
    method: str
    started: str  # UTC, ISO 8601
    status: str = "running"  # done, failed or interrupted; lost: its process has died
    error: str | None = None
    model: str | None = None
    parent: str | None = None  # the run whose adapter this one started from
    notebook: str | None = None
    profile: str | None = None
    seed: int | None = None
    labels: int = 0  # preference labels or demonstrations used
    config: dict = field(default_factory=dict)  # TRL's names, and rank, alpha, targets, data
    result: dict = field(default_factory=dict)
    seconds: float | int | None = None
    timers: dict = field(default_factory=dict)  # name -> seconds
    peak_memory_mb: float | int | None = None  # of 2**20 bytes; of the whole process, except on Linux
    peak_gpu_memory_mb: float | int | None = None  # of torch's allocator
    versions: dict = field(default_factory=dict)
    machine: dict = field(default_factory=dict)
    process: dict = field(default_factory=dict)

    # Without a type these are no fields, and are not written.
    report = None  # of the held-out problems: an evaluate.Report
    on_interrupt = None  # what `start` calls when the run is interrupted
    _began = None  # time.perf_counter() at the start; only `start` knows it

    def __repr__(self) -> str:
        return f"<Run {self.id}: {self.status}" + (f", {self.seconds:.1f} s>" if self.seconds else ">")

    @property
    def adapter(self) -> Path:
        """Where the run's adapter belongs; `.is_dir()` says whether there is one."""
        return self.folder / "adapter"

    @property
    def checkpoint(self) -> Path | None:
        """The folder of the newest complete checkpoint, for `fit(..., resume=run)`; None without one."""
        complete = [file.parent for file in self.folder.glob("checkpoint-*/trainer_state.json")]  # its last file
        return max(complete, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)

    @property
    def train_seconds(self) -> float | None:
        """What `timer("train")` measured, None if it was not used."""
        return self.timers.get("train")

    def get(self, key: str) -> Any:
        """A field, else a value of `config`, else of `result`, else None. Dots go down: "result.strict"."""
        head, *rest = key.split(".")
        own = {**vars(self), "train_seconds": self.train_seconds}
        value = next((of[head] for of in (own, self.config, self.result) if head in of), None)
        for part in rest:
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def log(self, step: int | None = None, **values: float) -> None:
        """Appends one line of numbers to the curve, at once. TypeError for a value that is none."""
        if bad := [f"{k}={v!r}" for k, v in {"step": step or 0, **values}.items() if number(v) is None]:
            raise TypeError(f"log: {', '.join(bad)} is no number; results go to finish().")
        row = {} if step is None else {"step": step}
        if self._began is not None:
            row["seconds"] = round(time.perf_counter() - self._began, 3)
        with (self.folder / "curve.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(jsonable(row | values), allow_nan=False) + "\n")

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
            self.timers[name] = round(self.timers.get(name, 0.0) + time.perf_counter() - began, 3)
            self._save()

    def curve(self) -> list[dict[str, float]]:
        """The lines of curve.jsonl as dicts of numbers; lines cut off by a crash are left out."""
        return read_rows(self.folder / "curve.jsonl")

    def _save(self, status: str = "running", error: BaseException | None = None) -> None:
        """Writes run.json: of a live run with what it has cost so far, and how it ended if it has."""
        if self.status == "running" and self._began is not None:
            self.seconds = round(time.perf_counter() - self._began, 3)
            self.peak_memory_mb = machine.peak_memory_mb()
            self.peak_gpu_memory_mb, self.machine["gpu"] = machine.gpu()
            self.status = status
            self.error = f"{type(error).__name__}: {error}"[:2000] if error else None
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "folder"}
        text = json.dumps({"schema": SCHEMA, **jsonable(data)}, indent=1, allow_nan=False)
        files.write(self.folder / "run.json", text + "\n")


def root() -> Path:
    """$RLNB_RUNS, or `runs` in the repository, or in the working folder if rlnb is installed."""
    repository = Path(__file__).resolve().parents[2]
    default = (repository if (repository / "pyproject.toml").is_file() else Path.cwd()) / "runs"
    return Path(os.environ.get("RLNB_RUNS") or default).expanduser().absolute()


@contextmanager
def start(
    method: str, *, model: str | None = None, config: Any = None, seed: int | None = None,
    labels: int = 0, parent: Run | str | None = None,
) -> Iterator[Run]:  # fmt: skip
    """Registers a run, times it, and records how it ended: done, failed, or interrupted (Ctrl-C, SystemExit).

    The block may set `run.on_interrupt` to a function that saves what an interrupted training has learnt.
    config: a mapping or a dataclass. ValueError for a method that makes no folder name. Of several processes of
    one training (torchrun, accelerate) the first alone is in the registry.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", method):
        raise ValueError(f"method is {method!r}: use letters, digits, '-' and '_' only.")
    now = datetime.now(UTC)
    folder = _new_folder(f"{now:%Y%m%d-%H%M%S}-{method}")
    run = Run(
        folder.name, folder, method, now.isoformat(), model=None if model is None else str(model),
        parent=parent.id if isinstance(parent, Run) else parent, notebook=this_notebook(),
        profile=profiles.profile(), seed=seed, labels=labels, config=jsonable({} if config is None else config),
        versions=machine.versions(), machine=machine.describe(), process=machine.process(),
    )  # fmt: skip
    with _live(run):
        yield run


@contextmanager
def go_on(run: Run, step: int) -> Iterator[Run]:
    """A run that ended early goes on after this step: what it logged later is dropped. Else as ``start``.

    Raises ValueError for a run that still runs.
    """
    if load(run.id).status == "running":
        raise ValueError(f"run {run.id} still runs in process {run.process.get('pid')}: stop it first")
    rows = [row for row in run.curve() if row.get("step", 0) <= step]
    files.write(run.folder / "curve.jsonl", "".join(json.dumps(jsonable(row)) + "\n" for row in rows))
    run.status, run.error, run.process = "running", None, machine.process()
    run.timers["train"] = spent = max((row.get("seconds", 0.0) for row in rows), default=0.0)
    with _live(run, spent):
        yield run


@contextmanager
def _live(run: Run, spent: float = 0.0) -> Iterator[None]:
    """Times a run, and records how it ended. spent: seconds before."""
    machine.reset_peak_memory()
    run._began = time.perf_counter() - spent
    run._save()
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        if stopped and run.on_interrupt:
            with suppress(BaseException):  # also a second Ctrl-C: the first one goes on
                run.on_interrupt()
        run._save("interrupted" if stopped else "failed", error)
        raise
    else:
        run._save("done")
    finally:
        run.on_interrupt = None  # it may hold a model


def this_notebook() -> str | None:
    """The name of the notebook that runs, as "05_dpo": under `rlnb run` and in JupyterLab; else None."""
    if name := os.environ.get("RLNB_NOTEBOOK"):
        return name
    path = Path(os.environ.get("JPY_SESSION_NAME", ""))  # a path, or an id where nobody knows it
    if path.suffix != ".ipynb":
        return None
    return f"solutions/{path.stem}" if path.parent.name == "solutions" else path.stem


def _new_folder(name: str) -> Path:
    """A folder for this run alone. Without a run.json it is no run yet. OSError where nothing can be kept."""
    place = root() / ".others" if int(os.environ.get("RANK", "0")) else root()
    try:
        place.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(place).free) < ROOM:
            raise OSError(f"{free:,} bytes are free, and {ROOM:,} are needed")
        for folder in itertools.chain([place / name], (place / f"{name}-{n}" for n in itertools.count(2))):
            with suppress(FileExistsError):  # another run of this second
                folder.mkdir()
                return folder
    except OSError as error:
        raise OSError(f"no run can be kept in {place}: {error}. Make room there, or set RLNB_RUNS") from error


def _read(folder: Path) -> Run:
    """The run of a folder, checked so far that nothing that reads it later breaks. Raises ValueError."""
    file = folder / "run.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ValueError(f"it is not of schema {SCHEMA}")
        known = {f.name: data[f.name] for f in fields(Run) if f.name in data}
        run = Run(**{**known, "id": folder.name, "folder": folder})
        if bad := [f.name for f in fields(Run) if not isinstance(getattr(run, f.name), f.type)]:
            raise ValueError(f"{bad[0]} is {getattr(run, bad[0])!r:.80}")
        if run.status == "running" and not machine.alive(run.process):
            run.status = "lost"
    except Exception as error:  # whatever somebody's JSON can do
        raise ValueError(f"{file} is broken: {error}") from error
    return run


def find(**filters: Any) -> list[Run]:
    """The runs with these values (see `Run.get`), newest first; without filters all. One warning names those with
    a broken run.json, which are skipped.
    """
    found, broken, wanted = [], [], jsonable(filters)
    for path in root().glob("[!.]*/run.json"):
        try:
            found.append(_read(path.parent))
        except ValueError as error:
            broken.append(str(error))
    if broken:
        warnings.warn(f"skipped broken run(s): {'; '.join(broken)}", stacklevel=2)
    found = [run for run in found if wanted == {key: run.get(key) for key in wanted}]
    return sorted(found, key=lambda run: (run.started, run.id), reverse=True)


def load(id: str) -> Run:
    """The run of that id. FileNotFoundError names the newest if there is none; ValueError if it is broken."""
    if not (root() / id / "run.json").is_file():
        newest = ", ".join(run.id for run in find()[:3]) or "none yet"
        raise FileNotFoundError(f"no run {id!r} in {root()}; the newest are: {newest}.")
    return _read(root() / id)


def table(runs: Iterable[Run], columns: Iterable[str] = COLUMNS) -> "DataFrame":
    """The runs, a row each. columns: names for `Run.get`, left out without a value. Shares read "53.0 % of 500"."""
    import pandas as pd  # here, so that looking at runs stays light

    rows = [{name: _in_words(run.get(name)) for name in columns} for run in runs]
    return pd.DataFrame(rows).dropna(axis=1, how="all")


def is_proportion(value: Any) -> bool:
    """Whether a value is {"k": successes, "n": trials}."""
    counts = isinstance(value, dict) and set(value) == {"k", "n"} and all(isinstance(v, int) for v in value.values())
    return counts and value["n"] > 0


def _in_words(value: Any) -> Any:
    return f"{100 * value['k'] / value['n']:.1f} % of {value['n']}" if is_proportion(value) else value
