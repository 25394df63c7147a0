"""What `python -m rlnb run` does: executes notebooks, keeps an HTML copy of each, sums up.

Every notebook gets a kernel of its own, which is the Python that runs this, in the notebook's
folder. One that fails does not stop the others.
"""

import asyncio
import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path
from textwrap import indent
from typing import NamedTuple

from rlnb import files
from rlnb.profiles import profile
from rlnb.record import runs
from rlnb.tools.experiments import side_by_side
from rlnb.tools.setup import ROOT, show_line

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter

NOTEBOOKS = ROOT / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


class Outcome(NamedTuple):
    """One executed notebook. failure: about the cell that failed, in its first line where; "" if none did.
    page: the HTML copy, None for a file that is no notebook. measured: by its runs.
    """

    name: str
    seconds: float
    failure: str
    page: Path | None = None
    measured: str = ""


def main(arguments, rest) -> int:
    """python -m rlnb run"""
    names, write = arguments.names, arguments.write
    return execute_all(names, arguments.out, write, arguments.jobs or usual_jobs(names, write))


def usual_jobs(names: list[str], write: bool) -> int:
    """2 where there are as many cores, but 1 for one notebook, for outputs that tell how long a run
    took with the whole machine, and for a GPU, which they would share.
    """
    alone = len(names) == 1 or write or profile() == "gpu"
    return 1 if alone or (os.cpu_count() or 1) < 2 else 2


def execute_all(names: list[str], out: Path, write: bool = False, jobs: int = 1) -> int:
    """Executes notebooks, all if none is named. Returns 1 if one of them failed, else 0.

    out: the folder for the HTML copies. write: also store the outputs in the notebooks, cleaned.
    jobs: how many at a time; if more than one, each has one core.
    Ctrl-C interrupts the cell, sums up what is done and goes on as KeyboardInterrupt.
    """
    tasks, outcomes, began = [(path, out.absolute(), write) for path in find(names)], [], time.monotonic()
    if jobs > 1:  # what takes long first: at the end it would go on alone
        tasks.sort(key=lambda task: task[0].stat().st_size, reverse=True)
    found = (execute(*task) for task in tasks) if jobs == 1 else side_by_side(execute, tasks, jobs)
    try:
        for outcome in found:
            outcomes.append(outcome)
            print(f"{outcome.name}: {outcome.seconds:.1f} s, {outcome.failure or 'ok'}", flush=True)
    finally:
        if outcomes:
            outcomes.sort(key=lambda outcome: outcome.name)
            total = f"{len(outcomes)} of {len(tasks)} in {time.monotonic() - began:.0f} s"
            total += f", {jobs} at a time, a core each" if jobs > 1 else ""
            print(f"{summary(outcomes)}\n{total}", flush=True)
    return int(any(outcome.failure for outcome in outcomes))


def find(names: list[str]) -> list[Path]:
    """The notebooks of these names: a path, or a name in notebooks/ with or without the ending.

    No names: all of notebooks/ in order, without the solutions. FileNotFoundError if one does not exist.
    """
    known = sorted(NOTEBOOKS.glob("*.ipynb"))
    found = []
    for name in names:
        places = (Path(name), NOTEBOOKS / name, NOTEBOOKS / f"{name}.ipynb")
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"no notebook {name}; there are: {', '.join(p.stem for p in known)}")
        found.append(path.absolute())
    return found or known


def execute(path: Path, out: Path, write: bool) -> Outcome:
    """Executes one notebook and writes its copies. Raises KeyboardInterrupt on Ctrl-C."""
    inside = path.is_relative_to(NOTEBOOKS)
    name = (path.relative_to(NOTEBOOKS) if inside else Path(path.name)).with_suffix("").as_posix()
    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises many kinds
        return Outcome(name, 0.0, f"FAILED, no notebook\n  {path}: {error!r:.200}")
    before = {run.id for run in runs.find()}
    began = time.monotonic()
    failure = Execution(notebook, name).run(path.parent)
    seconds = time.monotonic() - began
    new = [run for run in reversed(runs.find(notebook=name)) if run.id not in before]
    scores = [(run.method, run.get("result.strict.k"), run.get("result.strict.n")) for run in new]
    if not failure:  # else stderr may say more about it
        clean(notebook)
    page = out / f"{name}.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    # Of what nbconvert would load from the net only MathJax remains.
    exporter = HTMLExporter(embed_images=True, require_js_url="", jquery_url="")
    resources = {"metadata": {"name": path.stem, "path": str(path.parent)}}
    files.write(page, exporter.from_notebook_node(notebook, resources=resources)[0])
    if write and not failure:
        files.write(path, nbformat.writes(notebook) + "\n")
    measured = ", ".join(f"{method} {100 * k / n:.1f} %" for method, k, n in scores if n)
    return Outcome(name, seconds, failure, page, measured)


class Execution(NotebookClient):
    """The execution of a notebook by a kernel of this Python, with a line in the terminal on where it is."""

    def __init__(self, notebook, name: str) -> None:
        # Without folders to look in, the one kernel that is found is the one of this Python.
        specs = KernelSpecManager(kernel_dirs=[])
        self.kernel = AsyncKernelManager(kernel_spec_manager=specs, transport_encryption="auto")
        self.name, self.interrupted = name, False
        self.cells = [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]
        self.number = 0  # of the cell that runs, from 1, as in In [1]
        super().__init__(
            notebook, km=self.kernel, timeout=None, record_timing=False, on_cell_execute=self._on_cell,
            startup_timeout=600,  # seconds, for a busy machine; if the kernel dies it waits no more
        )  # fmt: skip

    def run(self, folder: Path) -> str:
        """Executes all cells; what went wrong, or "". Raises KeyboardInterrupt on Ctrl-C."""
        own = {"PYTHONPATH": str(ROOT), "RLNB_NOTEBOOK": self.name, "RLNB_RUNS": str(runs.root().absolute())}
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        failure = ""
        try:
            self.execute(cwd=str(folder), env={**os.environ, **own}, cleanup_kc=True)
        except (CellExecutionError, RuntimeError, asyncio.CancelledError) as error:  # RuntimeError: it died
            self.km = self.kernel  # nbclient drops one that has not started, and misses it
            failure = self._describe(error)
        finally:
            show_line("")
            for number, handler in handlers.items():  # nbclient leaves its own where no kernel starts
                signal.signal(number, handler)
        if self.interrupted:
            raise KeyboardInterrupt
        return failure

    async def async_start_new_kernel(self, **options) -> None:
        """Has Ctrl-C interrupt the cell, which ends its run properly, and a second one kill it. While the
        kernel still starts, the first one takes effect at the first cell.
        """
        task, loop = asyncio.current_task(), asyncio.get_running_loop()

        def stop() -> None:
            if self.interrupted:
                task.cancel()
            elif self.number:
                self.stopping = asyncio.ensure_future(self.kernel.interrupt_kernel())
            self.interrupted = True

        # Here, as nbclient has just set handlers that kill the kernel and call that a failure.
        with suppress(NotImplementedError):  # on Windows Ctrl-C ends the loop instead
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, stop)
        await super().async_start_new_kernel(**options)

    def _on_cell(self, cell, cell_index: int) -> None:
        if self.interrupted:
            raise RuntimeError("interrupted before this cell")
        self.number += 1
        show_line(f"{self.name}: cell {self.number} of {len(self.cells)}")

    def _describe(self, error: BaseException) -> str:
        what = f"{getattr(error, 'ename', type(error).__name__)}: {getattr(error, 'evalue', error)}"
        if not self.number:
            return f"FAILED before the first cell\n  {what}"
        lines = self.cells[self.number - 1].source.splitlines()
        shown = indent("\n".join([*lines[:5], *["..."] * (len(lines) > 5)]), "    ")
        return f"FAILED in cell {self.number} of {len(self.cells)}\n{shown}\n  {what}"


# --- outputs -------------------------------------------------------------------------------------


def clean(notebook) -> None:
    """Leaves only what is the same whenever and wherever the notebook is executed, in place.

    Goes: stderr, widgets (they live in JupyterLab only), finished progress bars, timestamps, the
    name of this folder.
    """
    notebook.metadata = {"kernelspec": KERNELSPEC, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k in ("tags", "jupyter")}
        if cell.cell_type == "code":
            cell.outputs = _clean_outputs(cell.outputs)


def is_progress_bar(output) -> bool:
    """Whether an output is a widget of tqdm's, like "Training:   0%|          | 0/3"."""
    data = output.get("data", {})
    return WIDGET in data and bool(re.match(r"[^|]*\d%\|", data.get("text/plain", "")))


def _clean_outputs(outputs: list) -> list:
    left = []
    for output in outputs:
        data = output.get("data", {})
        if output.get("name") == "stderr" or is_progress_bar(output):
            continue
        if data.pop(WIDGET, None):
            data["text/plain"] = "(a widget, alive in JupyterLab)"
        for place, key in ((output, "text"), *((data, key) for key in data)):
            if isinstance(place.get(key), str):
                place[key] = place[key].replace(f"{ROOT}{os.sep}", "").replace(str(ROOT), ".")
        if left and output.get("name") == left[-1].get("name") == "stdout":
            left[-1]["text"] += output["text"]
        else:
            left.append(output)
    return left


def summary(outcomes: list[Outcome]) -> str:
    """A table of what was executed, with where the copies are."""
    rows = [("notebook", "seconds", "", "strict accuracy of its runs", "copy")]
    for o in outcomes:
        verdict, copy = o.failure.split("\n")[0] or "ok", o.page.as_uri() if o.page else ""
        rows.append((o.name, f"{o.seconds:.1f}", verdict, o.measured, copy))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n" + "\n".join(lines)
