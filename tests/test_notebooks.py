"""What can be said of the notebooks without running them. nbval runs them: see README.md."""

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from rlnb.tools.setup import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").rglob("[!.]*.ipynb"))
MACHINE = re.compile(r"(?<![\w.])/(?:home|root|Users|tmp|work|mnt|content|opt)/\w|[A-Z]:\\+Users")
INSTALLS = re.compile(r"^\s*(!|%%?(pip|conda|uv|sh|bash|system)\b)|pip install", re.MULTILINE)
LOGINS = re.compile(r"notebook_login|\blogin\(|push_to_hub|wandb|hf_[A-Za-z]{10,}")
UNSTABLE = "metadata that changes: write it with `python -m rlnb run --write`"
LINK = re.compile(r"\]\(([^)\s]+)")


def faults(path: Path) -> list[str]:
    """What is wrong with a notebook; each in a few words, with the cell's number in the file."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = notebook.cells
    code = [c for c in cells if c.cell_type == "code" and c.source.strip()]
    found = []
    if not cells or not re.match(r"# \S", cells[0].source):
        found.append("the first cell is no title")
    if [c.execution_count for c in code] != list(range(1, len(code) + 1)):
        found.append("not executed from top to bottom")
    if not any("nbval-check-output" in c.metadata.get("tags", ()) for c in code):
        found.append("no cell is tagged nbval-check-output")
    if set(notebook.metadata) - {"kernelspec", "language_info"}:
        found.append(UNSTABLE)
    for number, cell in enumerate(cells, 1):
        check = _code_faults if cell.cell_type == "code" else _prose_faults
        found += [f"cell {number}: {fault}" for fault in check(cell, path.parent)]
    return found


def _code_faults(cell, folder: Path) -> list[str]:
    lines, outputs = cell.source.splitlines(), str(cell.outputs)
    checked = "nbval-check-output" in cell.metadata.get("tags", ())
    faults = {
        "over 45 lines": len(lines) > 45,
        "a line over 100 characters": max(map(len, lines), default=0) > 100,
        "a path of one machine": MACHINE.search(cell.source) or MACHINE.search(outputs),
        "installs, or leaves Python": INSTALLS.search(cell.source),
        "logs in or sends off": LOGINS.search(cell.source),
        "an error or stderr is stored": re.search(r"'(error|stderr)'", outputs),
        "nothing to check": checked and not cell.outputs,
    }
    return [fault for fault, holds in faults.items() if holds]


def _prose_faults(cell, folder: Path) -> list[str]:
    targets = [unquote(link.split("#")[0]) for link in LINK.findall(cell.source)]
    local = [t for t in targets if t and not re.match(r"https?:|mailto:|attachment:|data:", t)]
    broken = [f"no such file: {target}" for target in local if not (folder / target).exists()]
    return broken + ["a path of one machine"] * bool(MACHINE.search(cell.source))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path):
    assert faults(path) == []


def good() -> nbformat.NotebookNode:
    """A notebook without a fault."""
    prose = "# Title\n\nSee [the next](good.ipynb#part) and [the paper](https://example.org/a)."
    printed = nbformat.v4.new_output("stream", name="stdout", text="1\n")
    cell = new_code_cell("print(1)", execution_count=1, outputs=[printed])
    cell.metadata["tags"] = ["nbval-check-output"]
    return new_notebook(cells=[new_markdown_cell(prose), cell])


FAULTS = {
    "the first cell is no title": lambda nb: nb.cells[0].update(source="## Section"),
    "not executed from top to bottom": lambda nb: nb.cells[1].update(execution_count=2),
    "no cell is tagged nbval-check-output": lambda nb: nb.cells[1].update(metadata={}),
    UNSTABLE: lambda nb: nb.metadata.update(widgets={}),
    "cell 1: no such file: gone.ipynb": lambda nb: add(nb.cells[0], "[there](gone.ipynb)"),
    "cell 1: a path of one machine": lambda nb: add(nb.cells[0], "in `/" + "home/me`"),
    "cell 2: a path of one machine": lambda nb: add(nb.cells[1], "open('/" + "tmp/file')"),
    "cell 2: over 45 lines": lambda nb: add(nb.cells[1], "\n" * 45 + "2"),
    "cell 2: a line over 100 characters": lambda nb: add(nb.cells[1], "1 + " * 25 + "1"),
    "cell 2: installs, or leaves Python": lambda nb: add(nb.cells[1], "!ls"),
    "cell 2: logs in or sends off": lambda nb: add(nb.cells[1], "model.push_to_hub('me/it')"),
    "cell 2: an error or stderr is stored": lambda nb: nb.cells[1].outputs[0].update(name="stderr"),
    "cell 2: nothing to check": lambda nb: nb.cells[1].update(outputs=[]),
}


def add(cell, line: str) -> None:
    cell.source += f"\n{line}"


def test_a_good_notebook_has_no_fault(tmp_path):
    nbformat.write(good(), tmp_path / "good.ipynb")
    assert faults(tmp_path / "good.ipynb") == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(tmp_path, fault):
    notebook = good()
    FAULTS[fault](notebook)
    nbformat.write(notebook, tmp_path / "good.ipynb")
    assert faults(tmp_path / "good.ipynb") == [fault]


def test_nbval_compares_what_is_printed_and_nothing_else(tmp_path):
    source = (
        "import sys, rlnb\nfrom tqdm.auto import tqdm\n"
        "for i in tqdm([1]): print(i)\nprint('warning', file=sys.stderr)"
    )
    notebook = good()
    notebook.cells[1].source = source
    nbformat.write(notebook, tmp_path / "same.ipynb")
    notebook.cells[1].outputs[0].text = "2\n"
    nbformat.write(notebook, tmp_path / "other.ipynb")
    command = [sys.executable, "-m", "pytest", "-p", "notebooks.conftest", "-p", "no:python"]
    command += ["--nbval-lax", "--nbval-current-env", "-q", str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=-1, text=True)
    # With the variable CI set, pytest prints whole messages in its summary, hence the loose search.
    assert re.search(r"FAILED .*other\.ipynb::Cell 0", done.stdout)
    assert "1 failed, 1 passed" in done.stdout
