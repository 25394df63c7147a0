"""The executor, on notebooks written here and kernels that really run."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from rlnb.record import runs
from rlnb.tools import notebooks
from rlnb.tools.setup import ROOT


def write(folder: Path, name: str, *sources: str) -> Path:
    """A notebook of code cells under a title."""
    cells = [new_markdown_cell(f"# {name}"), *map(new_code_cell, sources)]
    nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


@pytest.fixture
def out(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RLNB_RUNS", str(tmp_path / "runs"))
    return tmp_path / "html"


def test_a_notebook_runs_here_and_is_written_back_clean(tmp_path, out, capsys, monkeypatch):
    path = write(
        tmp_path,
        "lesson",
        "import os, sys, rlnb\n"
        "print(rlnb.__file__); print(sys.executable == os.environ['PARENT']); print(os.getcwd())",
        "from rlnb.record import runs\n"
        "with runs.start('sft') as run:\n    run.finish(strict={'k': 1, 'n': 3})\n"
        "print(run.notebook, file=sys.stderr)",
        "import ipywidgets\nipywidgets.IntSlider(3)",
    )
    monkeypatch.setenv("PARENT", sys.executable)
    assert notebooks.execute_all([str(path)], out=out, write=True) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"^lesson: [\d.]+ s, ok\n1 of 1 in \d+ s, 1 at a time; see {out}$", printed)
    assert "(a widget, alive in JupyterLab)" in (out / "lesson.html").read_text()

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = notebook.cells[1:]
    assert [cell.execution_count for cell in code] == [1, 2, 3]
    assert code[0].outputs[0].text == f"rlnb/__init__.py\nTrue\n{tmp_path}\n"
    assert code[1].outputs == []
    assert notebook.metadata == {
        "kernelspec": notebooks.KERNELSPEC,
        "language_info": {"name": "python"},
    }
    first = path.read_text()
    assert notebooks.execute_all([str(path)], out=out, write=True) == 0
    assert path.read_text() == first, "executed twice, the same file"


def test_a_failure_is_named_and_does_not_stop_the_rest(tmp_path, out, capsys):
    bad = write(tmp_path, "bad", "x = 1", "1 / 0", "never")
    good = write(tmp_path, "good", "1")
    before = bad.read_text()
    assert notebooks.execute_all([str(bad), str(good)], out=out, write=True) == 1
    printed = capsys.readouterr().out
    assert "FAILED in cell 2 of 3: ZeroDivisionError: division by zero\n" in printed
    assert bad.read_text() == before
    assert "ZeroDivisionError" in (out / "bad.html").read_text()
    assert nbformat.read(good, as_version=4).cells[1].execution_count == 1


@pytest.mark.slow
def test_two_at_a_time(tmp_path, out, capsys):
    """Each waits for the other, so both are under way at once; a third fails, and stops neither."""
    meet = (
        "import os, pathlib, time\nprint(os.environ['OMP_NUM_THREADS'])\n"
        "pathlib.Path('{}').touch()\nwhile not pathlib.Path('{}').exists():\n    time.sleep(0.1)"
    )
    paths = [
        write(tmp_path, "one", meet.format("a", "b")),
        write(tmp_path, "two", meet.format("b", "a")),
        write(tmp_path, "wrong", "1 / 0"),
    ]
    assert notebooks.execute_all([str(path) for path in paths], out=out, write=True, jobs=2) == 1
    printed = capsys.readouterr().out
    assert "wrong: " in printed and "ZeroDivisionError" in printed
    assert re.search(r"^3 of 3 in \d+ s, 2 at a time", printed, re.MULTILINE)
    assert nbformat.read(paths[0], as_version=4).cells[1].outputs[0].text == "1\n"


@pytest.mark.parametrize(
    ("names", "write", "profile", "cores", "jobs"),
    [([], False, "cpu", 2, 2), (["a"], False, "cpu", 8, 1), ([], True, "cpu", 8, 1),
     ([], False, "gpu", 8, 1), (["a", "b"], False, "smoke", 1, 1)],
)  # fmt: skip
def test_how_many_at_a_time(names, write, profile, cores, jobs, monkeypatch):
    monkeypatch.setenv("RLNB_PROFILE", profile)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(notebooks, "execute_all", lambda *arguments: arguments[-1])
    assert notebooks.main(SimpleNamespace(names=names, write=write, out=None, jobs=None), []) == jobs


def test_a_kernel_that_dies_is_a_failure(tmp_path, out, capsys, monkeypatch):
    path = write(tmp_path, "dies", "import os; os._exit(1)")
    assert notebooks.execute_all([str(path)], out=out) == 1
    assert "FAILED in cell 1 of 1" in capsys.readouterr().out
    # This one does not even start.
    (tmp_path / "ipykernel_launcher.py").write_text("raise SystemExit(1)")
    assert notebooks.execute_all([str(path)], out=out) == 1
    assert "FAILED before the first cell: Kernel died" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[1]", "\xff"])
def test_what_is_no_notebook_is_named_and_does_not_stop_the_rest(tmp_path, out, capsys, text):
    bad, good = tmp_path / "bad.ipynb", write(tmp_path, "good", "1")
    bad.write_text(text, encoding="latin-1")
    assert notebooks.execute_all([str(bad), str(good)], out=out, write=True) == 1
    printed = capsys.readouterr().out
    assert f"bad: 0.0 s, FAILED, no notebook: {bad}: " in printed and "2 of 2 in" in printed
    assert [path.name for path in out.iterdir()] == ["good.html"]


SLEEP = "import time\ntime.sleep(600)"
TRAINING = """
import pathlib, time
from rlnb.record import runs
with runs.start("sft") as run:
    run.on_interrupt = lambda: (time.sleep(4), run.log(1, saved=1))
    pathlib.Path("started").touch()
    time.sleep(600)
"""
STUBBORN = """
import pathlib, time
while True:
    try:
        pathlib.Path("started").touch()
        time.sleep(600)
    except KeyboardInterrupt:
        pass
"""


def interrupted(paths, out, jobs, ready, send, times=1) -> str:
    """What `rlnb run` prints that is interrupted as soon as it is ready; nothing of it is left."""
    command = [sys.executable, "-m", "rlnb", "run", *map(str, paths), "--out", str(out), "--jobs", str(jobs)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True)  # fmt: skip
    while not ready(process):
        assert process.poll() is None
        time.sleep(0.01)
    started = psutil.Process(process.pid).children(recursive=True)
    for _ in range(times):
        send(process.pid, signal.SIGINT)
        time.sleep(1)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and printed.endswith("Interrupted.\n")
    assert "FAILED" not in printed and not out.exists()
    _, alive = psutil.wait_procs(started, timeout=20)
    assert alive == []
    return printed


@pytest.mark.slow
@pytest.mark.parametrize(("jobs", "send"), [(1, os.killpg), (2, os.kill)])
def test_ctrl_c_ends_a_training_that_saves_what_it_learnt(tmp_path, out, jobs, send):
    paths = [write(tmp_path, "long", TRAINING, "1"), write(tmp_path, "next", SLEEP)]
    printed = interrupted(paths, out, jobs, lambda _: (tmp_path / "started").exists(), send)
    assert "Traceback" not in printed
    (run,) = runs.find()
    assert run.status == "interrupted" and run.curve()[-1]["saved"] == 1


@pytest.mark.slow
def test_a_second_ctrl_c_kills_what_does_not_end(tmp_path, out):
    paths = [write(tmp_path, "stubborn", STUBBORN), write(tmp_path, "next", SLEEP)]
    interrupted(paths, out, 2, lambda _: (tmp_path / "started").exists(), os.killpg, times=2)


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_while_a_kernel_starts_ends_both(tmp_path, out, jobs):
    """The kernel may say of itself where it was: that is not held against it."""
    paths = [write(tmp_path, name, SLEEP) for name in ("one", "two")]
    interrupted(paths, out, jobs, lambda process: psutil.Process(process.pid).children(), os.kill)


def test_names_are_found_and_a_wrong_one_is_told(tmp_path, monkeypatch):
    (tmp_path / "solutions").mkdir()
    two, one = write(tmp_path, "02_two", "1"), write(tmp_path, "01_one", "1")
    answers = write(tmp_path / "solutions", "01_one", "1")
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)
    assert notebooks.find([]) == [one, two]
    assert notebooks.find(["02_two", "solutions/01_one", str(one)]) == [two, answers, one]
    with pytest.raises(FileNotFoundError, match="no notebook 03_three; there are: 01_one, 02_two"):
        notebooks.find(["02_two", "03_three"])


def test_clean_merges_what_was_printed_and_drops_finished_progress_bars():
    def stream(text, name="stdout"):
        return nbformat.from_dict({"output_type": "stream", "name": name, "text": text})

    def shown(**data):
        return nbformat.from_dict({"output_type": "display_data", "data": data, "metadata": {}})

    bar = shown(**{notebooks.WIDGET: {}, "text/plain": "Training:   0%|          | 0/3 [00:00<?]"})
    cell = new_code_cell("", metadata={"tags": ["a"], "execution": {"iopub.execute_input": "now"}})
    cell.outputs = [stream("1\n"), stream("!", "stderr"), bar, stream(f"{ROOT}/runs/1 in {ROOT}\n")]
    info = {"name": "python", "version": "3"}
    notebook = new_notebook(cells=[cell], metadata={"widgets": {}, "language_info": info})
    notebooks.clean(notebook)
    assert [output.text for output in cell.outputs] == ["1\nruns/1 in .\n"]
    assert cell.metadata == {"tags": ["a"]}
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
