"""Calls side by side, each in a process of its own, and the tables of results that come of them."""

import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from threading import RLock, Thread
from typing import Any

from rlnb import files

import pandas as pd

Rows = list[dict[str, Any]]
# What each process runs. Its arguments are the first one's sys.path.
CHILD = "import sys; sys.path[:], sys.argv[1:] = sys.argv[1:], []\nfrom rlnb.tools import experiments as e; e._child()"


def side_by_side(call: Callable, tasks: Iterable[tuple], jobs: int) -> Iterator[Any]:
    """What call(*task) returns, each in a new process and on one core, as soon as it is there.

    call: a function of a module, whose arguments and result can be pickled. What it prints is lost, as
    they would print into each other; what it raises is raised here, and then no new one starts. jobs:
    how many run at a time. Ctrl-C interrupts those at work, once each time, and waits for them to end.
    Raises ChildProcessError for a process that was killed.
    """
    children, lock = [], RLock()
    stopped = interrupted = False

    def run(task: tuple) -> list:
        nonlocal stopped
        with lock:
            if stopped:
                return []
            children.append(child := _start())
        try:
            return [_result(child, call, task)]
        except BaseException:
            stopped = True
            raise

    def interrupt(*_: Any) -> None:
        nonlocal stopped, interrupted
        with lock:
            stopped = interrupted = True
            for child in children:
                with suppress(OSError, ValueError):  # it has just ended; Windows: the console interrupts it
                    child.send_signal(signal.SIGINT)

    before, threads = signal.signal(signal.SIGINT, interrupt), ThreadPoolExecutor(jobs)
    try:
        for future in as_completed([threads.submit(run, task) for task in tasks]):
            yield from future.result()
    finally:
        stopped = True
        threads.shutdown()
        signal.signal(signal.SIGINT, before)
        if interrupted:
            raise KeyboardInterrupt


def _start() -> subprocess.Popen:
    """A child in a process group of its own: the terminal's Ctrl-C goes to the first process alone, which
    passes it on. So each gets it once, whoever sent it.
    """
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *sys.path], env={**os.environ, "OMP_NUM_THREADS": "1"}, process_group=0,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _result(child: subprocess.Popen, call: Callable, task: tuple) -> Any:
    """Has the child make a call, and waits for what comes of it."""
    module = sys.modules["__main__"].__spec__.name if call.__module__ == "__main__" else call.__module__
    try:
        with child:
            child.stdin.write(pickle.dumps((module, call.__name__, task)))
            child.stdin.flush()
            result, error = pickle.load(child.stdout)
            child.wait()
    except (OSError, EOFError, pickle.UnpicklingError):
        why = f"its process died or was killed (status {child.returncode}). Had the machine memory left?"
        raise ChildProcessError(f"{call.__name__}{task}: {why}") from None
    if error:
        raise error
    return result


def _child() -> None:
    """Makes a call that comes by standard input, and writes what comes of it to standard output."""
    module, name, task = pickle.load(sys.stdin.buffer)
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # also of processes that it starts, such as kernels
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        found = pickle.dumps((getattr(import_module(module), name)(*task), None))
    except BaseException as error:
        error.add_note(traceback.format_exc())
        found = pickle.dumps((None, error))
    with answer:
        answer.write(found)


def _end_with_parent() -> None:
    """Interrupts the call when standard input ends: the first process is gone, however it ended."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGINT)


# --- tables --------------------------------------------------------------------------------------


def run_grid(
    measure: Callable[[str, int], dict | Rows], methods: Iterable[str], seeds: int, out: Path, *,
    resume: bool = False, jobs: int = 1, first: str | None = None,
) -> Rows:  # fmt: skip
    """What measure(method, seed) returns, a row or several, of each method and seed, and the other rows
    of ``out``, which is written whole after each. A row has the columns "method" and "seed".

    resume: keep those that are there; else they are made anew. jobs: how many at a time. first: the
    method that the others start from.
    """
    rows, methods = read(out) if out.is_file() else [], list(methods)
    there = {(row["method"], row["seed"]) for row in rows} if resume else set()
    wanted = [(method, seed) for seed in range(seeds) for method in methods if (method, seed) not in there]
    order = list(dict.fromkeys([*(row["method"] for row in rows), *methods]))
    for early in (True, False):
        for new in side_by_side(measure, [task for task in wanted if (task[0] == first) == early], jobs):
            added = new if isinstance(new, list) else [new]
            mine = added[0]["method"], added[0]["seed"]
            rows = [row for row in rows if (row["method"], row["seed"]) != mine] + added
            rows.sort(key=lambda row: (row["seed"], order.index(row["method"])))
            files.write(out, text(rows))
            print(f"{mine[0]}, seed {mine[1]}", flush=True)
    return rows


def text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as CSV."""
    return pd.DataFrame(rows).to_csv(index=False, lineterminator="\n")


def read(path: Path) -> Rows:
    """The rows of a table, its numbers as numbers."""
    return pd.read_csv(path).to_dict("records")
