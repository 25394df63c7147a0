"""rlnb.streams: one thread's output is held back, and whatever happens the streams are as before."""

import contextlib
import io
import logging
import sys
import threading

import nbformat
import pytest
from nbclient import NotebookClient

from rlnb import streams
from rlnb.tools.setup import ROOT


def with_a_screen(test):
    """Puts a stream in the place of sys.stdout and sys.stderr; out() is what came to it."""

    def run():
        stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            test(lambda: stream.buffer.getvalue().decode())
            assert sys.stdout is sys.stderr is stream

    return run


def in_a_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@with_a_screen
def test_it_nests_and_ends_with_an_error(out):
    with pytest.raises(ZeroDivisionError), streams.captured() as outer:
        print("a")
        with streams.captured() as inner:
            print("b", file=sys.stderr)
            sys.stdout.writelines(["c", "d"])
        print("e", flush=True)
        _ = 1 / 0
    print("f")
    assert (outer.getvalue(), inner.getvalue(), out()) == ("a\ne\n", "b\ncd", "f\n")


@with_a_screen
def test_others_go_on_printing_and_threads_end_in_any_order(out):
    inside, leave = threading.Event(), threading.Event()
    texts = []

    def work():
        with streams.captured() as text:
            print("work")
            inside.set()
            leave.wait(10)
            print("more work")
        texts.append(text.getvalue())

    thread = threading.Thread(target=work)
    with streams.captured() as mine:
        thread.start()
        inside.wait(10)
        in_a_thread(lambda: print("another"))
        print("mine")
    print("after")
    leave.set()
    thread.join()
    assert (mine.getvalue(), texts, out()) == ("mine\n", ["work\nmore work\n"], "another\nafter\n")


@with_a_screen
def test_other_ways_to_redirect_go_along(out):
    with streams.captured() as text:
        with contextlib.redirect_stdout(io.StringIO()) as other:
            print("a")
            with streams.captured() as inner:
                print("b")
        print("c")
    assert (text.getvalue(), other.getvalue(), inner.getvalue()) == ("c\n", "a\n", "b\n")
    with contextlib.redirect_stdout(io.StringIO()) as other:
        with streams.captured():
            print("d")
        print("e")
    assert other.getvalue() == "e\n"


@with_a_screen
def test_a_library_may_keep_the_stream_and_ask_it_what_it_asks_any(out):
    with streams.captured() as text:
        handler = logging.StreamHandler()
        handler.emit(logging.makeLogRecord({"msg": "inside"}))
        assert sys.stdout.encoding == "utf-8" and not sys.stdout.closed and not sys.stdout.isatty()
    handler.emit(logging.makeLogRecord({"msg": "afterwards"}))
    assert (text.getvalue(), out()) == ("inside\n", "afterwards\n")


@with_a_screen
def test_stdout_alone(out):
    with streams.captured(stderr=False) as text:
        print("a")
        print("bar", file=sys.stderr)
    assert (text.getvalue(), out()) == ("a\n", "bar\n")


def test_in_a_notebook_a_thread_displays_nowhere_and_the_cell_still_does(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [
        nbformat.v4.new_code_cell(
            "import sys, threading\nfrom IPython.display import clear_output, display\n"
            "from rlnb.streams import captured\n"
            "def work():\n"
            "    global said\n"
            "    with captured() as text:\n"
            "        print('noise'); display('noise'); clear_output()\n"
            "        with captured(stderr=False): pass\n"
            "        display('noise'); main.set(); go.wait(10)\n"
            "    said = text.getvalue(); display('free')\n"
            "main, go = threading.Event(), threading.Event()\n"
            "thread = threading.Thread(target=work); thread.start(); main.wait(10)\n"
            "print('cell'); display('shown')"
        ),
        nbformat.v4.new_code_cell("go.set(); thread.join(); print(repr(said), type(sys.stdout).__name__)"),
        nbformat.v4.new_code_cell("with captured(stderr=False): display('bar')"),
    ]
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute(cwd=str(ROOT))
    first, second, third = (
        [o.get("text") or o.data["text/plain"] for o in cell.outputs] for cell in notebook.cells
    )
    # What a thread shows once it is free goes to the cell that started it, or to the one that runs.
    shown = sorted([*first, *second])
    assert shown == sorted(["cell\n", "'shown'", "'free'", "'noise\\n' OutStream\n"])
    assert third == ["'bar'"]
