"""Calls side by side, each in a process of its own, and the tables of results that come of them."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from rlnb import files

import pandas as pd

Rows = list[dict[str, Any]]


def side_by_side(call: Callable, tasks: Iterable[tuple], jobs: int) -> Iterator[Any]:
    """What call(*task) returns, each in a new process and on one core, as soon as it is there.

    call: a function of a module, whose arguments and result can be pickled. What it prints is lost, as
    they would print into each other; what it raises is raised here, and then no new one starts. jobs:
    how many run at a time. Ctrl-C interrupts those at work, once each time, and waits for them to end.
    Raises ChildProcessError for a process that the system has killed.
    """
    resource_tracker.ensure_running()  # first: as it starts, it lifts the mask of the thread that starts it
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads without their locks
    pool = ProcessPoolExecutor(jobs, spawn, _begin, max_tasks_per_child=1)
    tasks, working = iter(tasks), {}
    try:
        while True:
            with _interrupts_held():
                # No more than can run at once: the pool starts what it has in its queue even after a shutdown.
                for task in islice(tasks, jobs - len(working)):
                    working[pool.submit(_interruptible, call, *task)] = task
            if not working:
                return
            for future in wait(working, return_when=FIRST_COMPLETED).done:
                task = working.pop(future)
                yield future.result()
    except KeyboardInterrupt:
        _interrupt_children()
        raise
    except BrokenProcessPool:
        raise ChildProcessError(
            f"{call.__name__}{task}: its process, or one beside it, was killed. Had the machine memory left?"
        ) from None
    finally:
        while working:  # and not in shutdown(), whose join of a thread an interrupt ends for good
            try:
                working = wait(working).not_done
            except KeyboardInterrupt:
                _interrupt_children()
        pool.shutdown()


def _begin() -> None:
    """What each of the processes does first."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # of this process and of those that it starts, such as kernels
        os.dup2(nowhere, stream)
    os.environ["OMP_NUM_THREADS"] = "1"
    if torch := sys.modules.get("torch"):  # it read that when the first process's own module was imported
        torch.set_num_threads(1)
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # the terminal's Ctrl-C goes to the first process alone, which passes it on
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _interruptible(call: Callable, *task: Any) -> Any:
    """Lets interrupts through while the call is at work: a process that starts or waits would die of one,
    and then the pool would kill the others, which are about to end properly.
    """
    _mask_interrupts(False)
    try:
        return call(*task)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGINT)  # what is at work ends properly
    time.sleep(60)
    os._exit(1)


def _interrupt_children() -> None:
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGINT)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Puts off Ctrl-C to the end of the block; processes that start in it do not see it until they ask."""
    late = []
    # The mask, which processes inherit, is this thread's alone: another one can take the signal for us.
    before = signal.signal(signal.SIGINT, lambda *what: late.append(what))
    _mask_interrupts(True)
    try:
        yield
    finally:
        _mask_interrupts(False)
        signal.signal(signal.SIGINT, before)
    if late:
        raise KeyboardInterrupt


def _mask_interrupts(on: bool) -> None:
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK if on else signal.SIG_UNBLOCK, [signal.SIGINT])


# --- tables --------------------------------------------------------------------------------------


def run_grid(
    measure: Callable[[str, int], dict | Rows], methods: Iterable[str], seeds: int, out: Path, *,
    resume: bool = False, jobs: int = 1, first: str | None = None, say: Callable[[Any], str] = str,
) -> Rows:  # fmt: skip
    """What measure(method, seed) returns, a row or several, of each method and seed, and the other rows
    of ``out``, which is written whole after each.

    A row has the columns "method" and "seed". resume: keep those that are there; else they are made
    anew. jobs: how many at a time. first: the method that the others start from. say: what to print of
    each.
    """
    rows, methods = read(out) if out.is_file() else [], list(methods)
    there = {(row["method"], row["seed"]) for row in rows}
    wanted = [(method, seed) for seed in range(seeds) for method in methods
              if not (resume and (method, seed) in there)]  # fmt: skip
    order = list(dict.fromkeys(row["method"] for row in rows))
    if not set(methods) <= set(order):
        order = list(dict.fromkeys([*methods, *order]))
    done = 0
    for early in (True, False):
        for new in side_by_side(measure, [task for task in wanted if (task[0] == first) == early], jobs):
            added = new if isinstance(new, list) else [new]
            mine = added[0]["method"], added[0]["seed"]
            rows = [row for row in rows if (row["method"], row["seed"]) != mine] + added
            rows.sort(key=lambda row: (row["seed"], order.index(row["method"])))
            files.write(out, text(rows))
            done += 1
            print(f"{done} of {len(wanted)}: {say(new)}", flush=True)
    return rows


def text(rows: Sequence[dict]) -> str:
    """The rows as CSV."""
    return pd.DataFrame(rows).to_csv(index=False, lineterminator="\n")


def read(path: Path) -> Rows:
    """The rows of a table, its numbers as numbers."""
    return pd.read_csv(path).to_dict("records")
