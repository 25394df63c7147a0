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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent

from rlnb import runs
from rlnb.bootstrap import ROOT, show_line

NOTEBOOKS = ROOT / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


@dataclass(frozen=True)
class Outcome:
    """One executed notebook. failure: what to print about the cell that failed, "" if none did."""

    name: str
    seconds: float
    page: Path
    failure: str
    measured: str


def main(names: list[str], *, out: Path, write: bool = False) -> int:
    """Executes notebooks, all if none is named. Returns 1 if one of them failed, else 0.

    out: the folder for the HTML copies. write: also store the outputs in the notebooks, cleaned.
    Ctrl-C interrupts the cell, sums up what is done and goes on as KeyboardInterrupt.
    """
    paths, outcomes = find(names), []
    try:
        for path in paths:
            outcome = carry_out(path, out.absolute(), write)
            outcomes.append(outcome)
            verdict = outcome.failure or "ok"
            print(f"{outcome.name}: {outcome.seconds:.1f} s, {verdict}", flush=True)
    finally:
        if outcomes:
            print(summary(outcomes), flush=True)
    return int(any(outcome.failure for outcome in outcomes))


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


def carry_out(path: Path, out: Path, write: bool) -> Outcome:
    """Executes one notebook and writes its copies. Raises KeyboardInterrupt on Ctrl-C."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    inside = path.is_relative_to(NOTEBOOKS)
    name = (path.relative_to(NOTEBOOKS) if inside else Path(path.name)).with_suffix("").as_posix()
    before = {run.id for run in runs.all()}
    began = time.monotonic()
    failure = Execution(notebook, path.parent, name).run()
    seconds = time.monotonic() - began
    new = [run for run in reversed(runs.all()) if run.id not in before and run.notebook == name]
    if not failure:  # else stderr may say more about it
        clean(notebook)
    page = out / f"{name}.html"
    replace(page, html(notebook, path))
    if write and not failure:
        replace(path, nbformat.writes(notebook) + "\n")
    return Outcome(name, seconds, page, failure, measured(new))


class Execution:
    """The execution of a notebook in a folder, with a line in the terminal on where it is."""

    def __init__(self, notebook, folder: Path, name: str) -> None:
        self.notebook, self.folder, self.name = notebook, folder, name
        self.cells = [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]
        self.number = 0  # of the cell that runs, from 1, as in In [1]
        self.interrupted = False

    def run(self) -> str:
        """Executes all cells; what went wrong, or "". Raises KeyboardInterrupt on Ctrl-C."""
        from jupyter_client import AsyncKernelManager
        from jupyter_client.kernelspec import KernelSpecManager
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError

        # Without folders to look in, the one kernel that is found is the one of this Python.
        self.kernel = AsyncKernelManager(
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]), transport_encryption="auto"
        )
        client = NotebookClient(
            self.notebook,
            km=self.kernel,
            timeout=None,
            record_timing=False,
            on_notebook_start=self._on_start,
            on_cell_execute=self._on_cell,
        )
        done = threading.Event()
        clock = threading.Thread(target=self._tick, args=(done, time.monotonic()), daemon=True)
        clock.start()
        try:
            client.execute(cwd=str(self.folder), env=self._environment(), cleanup_kc=True)
        except (CellExecutionError, RuntimeError) as error:  # the latter if the kernel died
            if not self.interrupted:
                return self._describe(error)
        finally:
            done.set()
            clock.join()
            show_line("")
        if self.interrupted:
            raise KeyboardInterrupt
        return ""

    def _environment(self) -> dict[str, str]:
        given = {"PYTHONPATH": str(ROOT), "RLNB_NOTEBOOK": self.name}
        return {**os.environ, **given, "RLNB_RUNS": str(runs.root().absolute())}

    def _on_start(self, notebook) -> None:
        """Has Ctrl-C interrupt the cell, which ends its run properly, and a second one kill it."""
        task, loop = asyncio.current_task(), asyncio.get_running_loop()

        def stop() -> None:
            if self.interrupted:
                task.cancel()
            self.interrupted = True
            self.stopping = asyncio.ensure_future(self.kernel.interrupt_kernel())

        with suppress(NotImplementedError):  # on Windows Ctrl-C ends the loop instead
            loop.add_signal_handler(signal.SIGINT, stop)

    def _on_cell(self, cell, cell_index) -> None:
        if self.interrupted:
            raise RuntimeError("the cell before this one has caught the interrupt")
        self.number += 1

    def _tick(self, done: threading.Event, began: float) -> None:
        while not done.wait(1):
            seconds = time.monotonic() - began
            show_line(f"{self.name}: cell {self.number}/{len(self.cells)}, {seconds:.0f} s")

    def _describe(self, error: BaseException) -> str:
        lines = self.cells[max(self.number, 1) - 1].source.splitlines()
        shown = indent("\n".join([*lines[:5], *["..."] * (len(lines) > 5)]), "    ")
        what = f"{getattr(error, 'ename', type(error).__name__)}: {getattr(error, 'evalue', error)}"
        return f"FAILED in cell {self.number} of {len(self.cells)}\n{shown}\n  {what}"


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


def replace(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def measured(new: list[runs.Run]) -> str:
    """The headline of some runs: strict accuracy, where a run has measured it."""
    scores = [(run.method, run.get("result.strict.k"), run.get("result.strict.n")) for run in new]
    return ", ".join(f"{method} {100 * k / n:.1f} %" for method, k, n in scores if n)


def summary(outcomes: list[Outcome]) -> str:
    """A table of what was executed, with where the copies are."""
    rows = [("notebook", "seconds", "", "strict accuracy of its runs", "copy")]
    for o in outcomes:
        verdict = "FAILED" if o.failure else "ok"
        rows.append((o.name, f"{o.seconds:.1f}", verdict, o.measured, o.page.as_uri()))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n" + "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
