"""What `python -m rlnb run` does: executes notebooks, keeps an HTML copy of each, sums up.

Every notebook gets a kernel of its own, which is the Python that runs this, in the notebook's
folder. One that fails does not stop the others.
"""

import asyncio
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent

from rlnb import files
from rlnb.tools import processes
from rlnb.record import runs
from rlnb.tools.setup import ROOT, show_line

NOTEBOOKS = ROOT / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


@dataclass(frozen=True)
class Outcome:
    """One executed notebook.

    failure: what to print about the cell that failed, in its first line where; "" if none did.
    page: the HTML copy, None for a file that is no notebook.
    """

    name: str
    seconds: float
    failure: str
    page: Path | None = None
    measured: str = ""


def main(names: list[str], *, out: Path, write: bool = False, jobs: int = 1) -> int:
    """Executes notebooks, all if none is named. Returns 1 if one of them failed, else 0.

    out: the folder for the HTML copies. write: also store the outputs in the notebooks, cleaned.
    jobs: how many at a time; if more than one, each has one core.
    Ctrl-C interrupts the cell, sums up what is done and goes on as KeyboardInterrupt.
    """
    paths, outcomes = find(names), []
    began = time.monotonic()
    try:
        for outcome in carry_out_all(paths, out.absolute(), write, jobs):
            outcomes.append(outcome)
            verdict = outcome.failure or "ok"
            print(f"{outcome.name}: {outcome.seconds:.1f} s, {verdict}", flush=True)
    finally:
        if outcomes:
            outcomes.sort(key=lambda outcome: outcome.name)
            total = f"{len(outcomes)} of {len(paths)} in {time.monotonic() - began:.0f} s"
            total += f", {jobs} at a time, a core each" if jobs > 1 else ""
            print(f"{summary(outcomes)}\n{total}", flush=True)
    return int(any(outcome.failure for outcome in outcomes))


def usual_jobs(names: list[str], write: bool) -> int:
    """2 where there are as many cores, but 1 for one notebook, for outputs that tell how long a run
    took with the whole machine, and for a GPU, which they would share.
    """
    from rlnb.train import recipes

    alone = len(names) == 1 or write or recipes.profile() == "gpu"
    return 1 if alone or (os.cpu_count() or 1) < 2 else 2


def find(names: list[str]) -> list[Path]:
    """The notebooks of these names: a path, or a name in notebooks/ with or without the ending.

    No names: all of notebooks/ in order, without the solutions. Exits if one does not exist.
    """
    known = sorted(NOTEBOOKS.glob("*.ipynb"))
    found = []
    for name in names:
        places = (Path(name), NOTEBOOKS / name, NOTEBOOKS / f"{name}.ipynb")
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise SystemExit(f"no notebook {name}; there are: {', '.join(p.stem for p in known)}")
        found.append(path.absolute())
    return found or known


def carry_out_all(paths: list[Path], out: Path, write: bool, jobs: int) -> Iterator[Outcome]:
    """The outcome of each notebook, as soon as it is there."""
    if jobs == 1:
        yield from (carry_out(path, out, write) for path in paths)
        return
    paths = sorted(paths, key=promised, reverse=True)  # a long one at the end would go on alone
    found: list[Outcome] = []
    with _clock(lambda: f"{len(found)} of {len(paths)} notebooks done"):
        for outcome in processes.side_by_side(carry_out, [(p, out, write) for p in paths], jobs):
            found.append(outcome)
            show_line("")
            yield outcome


def promised(path: Path) -> int:
    """Minutes on two cores, as the table at a notebook's head says in words; 1 if it does not."""
    with suppress(OSError, UnicodeError):
        if said := re.search(r"this notebook \| about (\w+) minutes", path.read_text("utf-8")):
            return {"two": 2, "three": 3, "four": 4, "five": 5}.get(said[1], 1)
    return 1


def carry_out(path: Path, out: Path, write: bool) -> Outcome:
    """Executes one notebook and writes its copies. Raises KeyboardInterrupt on Ctrl-C."""
    import nbformat

    inside = path.is_relative_to(NOTEBOOKS)
    name = (path.relative_to(NOTEBOOKS) if inside else Path(path.name)).with_suffix("").as_posix()
    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises many kinds
        return Outcome(name, 0.0, f"FAILED, no notebook\n  {path}: {error!r:.200}")
    before = {run.id for run in runs.all()}
    began = time.monotonic()
    failure = Execution(notebook, path.parent, name).run()
    seconds = time.monotonic() - began
    new = [run for run in reversed(runs.all()) if run.id not in before and run.notebook == name]
    if not failure:  # else stderr may say more about it
        clean(notebook)
    page = out / f"{name}.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    files.write(page, html(notebook, path))
    if write and not failure:
        files.write(path, nbformat.writes(notebook) + "\n")
    return Outcome(name, seconds, failure, page, measured(new))


class Execution:
    """The execution of a notebook in a folder, with a line in the terminal on where it is."""

    def __init__(self, notebook, folder: Path, name: str) -> None:
        self.notebook, self.folder, self.name = notebook, folder, name
        self.cells = [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]
        self.number = 0  # of the cell that runs, from 1, as in In [1]
        self.interrupted = False

    def run(self) -> str:
        """Executes all cells; what went wrong, or "". Raises KeyboardInterrupt on Ctrl-C."""
        from nbclient.exceptions import CellExecutionError

        client = self._client()
        stopped = (CellExecutionError, RuntimeError, asyncio.CancelledError)
        with _signals_restored(), _clock(self._where):
            try:
                client.execute(cwd=str(self.folder), env=self._environment(), cleanup_kc=True)
            except stopped as error:  # RuntimeError: the kernel died
                client.km = self.kernel  # nbclient drops one that has not started, and misses it
                if not self.interrupted:
                    return self._describe(error)
        if self.interrupted:
            raise KeyboardInterrupt
        return ""

    def _client(self):
        from jupyter_client import AsyncKernelManager
        from jupyter_client.kernelspec import KernelSpecManager
        from nbclient import NotebookClient

        class Client(NotebookClient):
            async def async_start_new_kernel(client, **options):
                # nbclient has just set handlers, which kill the kernel and call that a failure.
                self._catch_signals()
                await super().async_start_new_kernel(**options)

        # Without folders to look in, the one kernel that is found is the one of this Python.
        self.kernel = AsyncKernelManager(
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]), transport_encryption="auto"
        )
        return Client(
            self.notebook,
            km=self.kernel,
            startup_timeout=600,  # seconds, for a busy machine; if the kernel dies it waits no more
            timeout=None,
            record_timing=False,
            on_cell_execute=self._on_cell,
        )

    def _environment(self) -> dict[str, str]:
        given = {"PYTHONPATH": str(ROOT), "RLNB_NOTEBOOK": self.name}
        return {**os.environ, **given, "RLNB_RUNS": str(runs.root().absolute())}

    def _catch_signals(self) -> None:
        """Has Ctrl-C interrupt the cell, which ends its run properly, and a second one kill it.

        While the kernel still starts, the first one takes effect at the first cell.
        """
        task, loop = asyncio.current_task(), asyncio.get_running_loop()

        def stop() -> None:
            if self.interrupted:
                task.cancel()
            elif self.number:
                self.stopping = asyncio.ensure_future(self.kernel.interrupt_kernel())
            self.interrupted = True

        with suppress(NotImplementedError):  # on Windows Ctrl-C ends the loop instead
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, stop)

    def _on_cell(self, cell, cell_index) -> None:
        if self.interrupted:
            raise RuntimeError("interrupted before this cell")
        self.number += 1

    def _where(self) -> str:
        return f"{self.name}: cell {self.number}/{len(self.cells)}"

    def _describe(self, error: BaseException) -> str:
        what = f"{getattr(error, 'ename', type(error).__name__)}: {getattr(error, 'evalue', error)}"
        if not self.number:
            return f"FAILED before the first cell\n  {what}"
        lines = self.cells[self.number - 1].source.splitlines()
        shown = indent("\n".join([*lines[:5], *["..."] * (len(lines) > 5)]), "    ")
        return f"FAILED in cell {self.number} of {len(self.cells)}\n{shown}\n  {what}"


@contextmanager
def _clock(where: Callable[[], str]) -> Iterator[None]:
    """Shows each second where the execution is."""
    done, began = threading.Event(), time.monotonic()

    def tick() -> None:
        while not done.wait(1):
            show_line(f"{where()}, {time.monotonic() - began:.0f} s")

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        show_line("")


@contextmanager
def _signals_restored() -> Iterator[None]:
    """nbclient leaves its handlers behind where a kernel does not start."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    kept = []
    for output in outputs:
        data = output.get("data", {})
        if output.get("name") == "stderr" or is_progress_bar(output):
            continue
        if data.pop(WIDGET, None):
            data["text/plain"] = "(a widget, alive in JupyterLab)"
        for place, key in ((output, "text"), *((data, key) for key in data)):
            if isinstance(place.get(key), str):
                place[key] = place[key].replace(f"{ROOT}{os.sep}", "").replace(str(ROOT), ".")
        if kept and output.get("name") == kept[-1].get("name") == "stdout":
            kept[-1]["text"] += output["text"]
        else:
            kept.append(output)
    return kept


def html(notebook, path: Path) -> str:
    """The notebook as a page. Of what nbconvert would load from the net only MathJax remains."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(embed_images=True, require_js_url="", jquery_url="")
    resources = {"metadata": {"name": path.stem, "path": str(path.parent)}}
    page, _ = exporter.from_notebook_node(notebook, resources=resources)
    return page


def measured(new: list[runs.Run]) -> str:
    """The headline of some runs: strict accuracy, where a run has measured it."""
    scores = [(run.method, run.get("result.strict.k"), run.get("result.strict.n")) for run in new]
    return ", ".join(f"{method} {100 * k / n:.1f} %" for method, k, n in scores if n)


def summary(outcomes: list[Outcome]) -> str:
    """A table of what was executed, with where the copies are."""
    rows = [("notebook", "seconds", "", "strict accuracy of its runs", "copy")]
    for o in outcomes:
        verdict, copy = o.failure.split("\n")[0] or "ok", o.page.as_uri() if o.page else ""
        rows.append((o.name, f"{o.seconds:.1f}", verdict, o.measured, copy))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n" + "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
