"""What `python -m rlnb run` does: executes notebooks, keeps an HTML copy of each, sums up.

Every notebook gets a kernel of its own, which is the Python that runs this, in the notebook's
folder. One that fails does not stop the others.
"""

import asyncio
import os
import re
import time
from pathlib import Path

from rlnb import files
from rlnb.profiles import profile
from rlnb.record import runs
from rlnb.tools.experiments import side_by_side
from rlnb.tools.setup import ROOT

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from tqdm import tqdm

NOTEBOOKS = ROOT / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def main(arguments, rest) -> int:
    """python -m rlnb run"""
    names, write = arguments.names, arguments.write
    alone = len(names) == 1 or write or profile() == "gpu"  # two would share the GPU, and outputs tell seconds
    jobs = arguments.jobs or (1 if alone else min(2, os.cpu_count() or 1))
    return execute_all(names, arguments.out, write, jobs)


def execute_all(names: list[str], out: Path, write: bool = False, jobs: int = 1) -> int:
    """Executes notebooks, all if none is named. Returns 1 if one of them failed, else 0.

    out: the folder for the HTML copies. write: also store the outputs in the notebooks, cleaned.
    jobs: how many at a time; if more than one, each has one core. Ctrl-C interrupts the cell.
    """
    tasks, results, began = [(path, out.absolute(), write) for path in find(names)], [], time.monotonic()
    found = (execute(*task) for task in tasks) if jobs == 1 else side_by_side(execute, tasks, jobs)
    try:
        for name, seconds, result in found:
            results.append(result)
            print(f"{name}: {seconds:.1f} s, {result}", flush=True)
    finally:
        print(f"{len(results)} of {len(tasks)} in {time.monotonic() - began:.0f} s, {jobs} at a time; see {out}")
    return int(set(results) != {"ok"})


def find(names: list[str]) -> list[Path]:
    """The notebooks of these names: a path, or a name in notebooks/ without the ending.

    No names: all of notebooks/ but 16, which takes long, and the solutions. FileNotFoundError if one does not exist.
    """
    known, found = sorted(NOTEBOOKS.glob("*.ipynb")), []
    for name in names:
        path = next((p for p in (Path(name), NOTEBOOKS / f"{name}.ipynb") if p.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"no notebook {name}; there are: {', '.join(p.stem for p in known)}")
        found.append(path.absolute())
    return found or [path for path in known if path.stem != "16_real_model"]


def execute(path: Path, out: Path, write: bool) -> tuple[str, float, str]:
    """Executes one notebook and writes its copies: its name, the seconds, "ok" or what went wrong."""
    inside = path.is_relative_to(NOTEBOOKS)
    name = (path.relative_to(NOTEBOOKS) if inside else Path(path.name)).with_suffix("").as_posix()
    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises many kinds
        return name, 0.0, f"FAILED, no notebook: {path}: {error!r:.200}"
    began = time.monotonic()
    result = asyncio.run(_run_cells(notebook, name, path.parent))
    seconds = time.monotonic() - began
    if result == "ok":  # else stderr may say more about it
        clean(notebook)
    page = out / f"{name}.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    # Of what nbconvert would load from the net only MathJax remains.
    exporter = HTMLExporter(embed_images=True, require_js_url="", jquery_url="")
    resources = {"metadata": {"name": path.stem, "path": str(path.parent)}}
    files.write(page, exporter.from_notebook_node(notebook, resources=resources)[0])
    if write and result == "ok":
        files.write(path, nbformat.writes(notebook) + "\n")
    return name, seconds, result


async def _run_cells(notebook, name: str, folder: Path) -> str:
    """Executes all cells in a kernel of this Python. "ok", or where it failed and how.

    Ctrl-C, which cancels this, interrupts the cell and waits for it: a training saves what it has learnt.
    A second one waits no more. Then the kernel has five seconds to end.
    """
    # Without folders to look in, the one kernel that is found is the one of this Python.
    kernel = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]), transport_encryption="auto")
    client = NotebookClient(notebook, km=kernel, timeout=None, record_timing=False)
    own = {"PYTHONPATH": str(ROOT), "RLNB_NOTEBOOK": name, "RLNB_RUNS": str(runs.root().absolute())}
    cells = [i for i, c in enumerate(notebook.cells) if c.cell_type == "code" and c.source.strip()]
    try:
        await kernel.start_kernel(cwd=str(folder), env={**os.environ, **own})
        client.kc = kernel.client()
        client.kc.start_channels()
        await client.kc.wait_for_ready(timeout=600)  # seconds, for a busy machine
        client.kc.allow_stdin = False
        bar = tqdm(cells, name, leave=False, mininterval=0, disable=None)  # None: it shows in a terminal only
        for number, i in enumerate(bar, 1):
            cell = asyncio.ensure_future(client.async_execute_cell(notebook.cells[i], i))
            failed = f"FAILED in cell {number} of {len(cells)}"
            try:
                await asyncio.shield(cell)
            except asyncio.CancelledError:
                await kernel.interrupt_kernel()
                await asyncio.gather(cell, return_exceptions=True)
                raise
            except CellExecutionError as error:
                return f"{failed}: {error.ename}: {error.evalue}"
            except RuntimeError as error:
                return f"{failed}: {error}"
        return "ok"
    except RuntimeError as error:
        return f"FAILED before the first cell: {error}"
    finally:
        await kernel.shutdown_kernel()


# --- outputs -------------------------------------------------------------------------------------


def clean(notebook) -> None:
    """Leaves only what is the same whenever and wherever the notebook is executed, in place.

    Goes: stderr, widgets (they live in JupyterLab only), finished progress bars, timestamps, the
    name of this folder.
    """
    notebook.metadata = {"kernelspec": KERNELSPEC, "language_info": {"name": "python"}}
    for i, cell in enumerate(notebook.cells):
        cell.metadata = {k: v for k, v in cell.metadata.items() if k in ("tags", "jupyter")}
        if cell.cell_type == "code":
            kept = [o for o in cell.outputs if o.get("name") != "stderr" and not is_progress_bar(o)]
            cell.outputs = [_without_machine(output) for output in kept]
            CoalesceStreamsPreprocessor().preprocess_cell(cell, {}, i)


def is_progress_bar(output) -> bool:
    """Whether an output is a widget of tqdm's, like "Training:   0%|          | 0/3"."""
    data = output.get("data", {})
    return WIDGET in data and bool(re.match(r"[^|]*\d%\|", data.get("text/plain", "")))


def _without_machine(output):
    data = output.get("data", {})
    if data.pop(WIDGET, None):
        data["text/plain"] = "(a widget, alive in JupyterLab)"
    for place, key in ((output, "text"), *((data, key) for key in data)):
        if isinstance(place.get(key), str):
            place[key] = place[key].replace(f"{ROOT}{os.sep}", "").replace(str(ROOT), ".")
    return output
