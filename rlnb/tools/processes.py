"""Calls in processes of their own: their memory is their own, and they go on side by side."""

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing import active_children, get_context, resource_tracker
from multiprocessing.connection import Connection
from typing import Any


def side_by_side(call: Callable, tasks: Iterable[tuple], jobs: int) -> Iterator[Any]:
    """What call(*task) returns, each in a new process and on one core, as soon as it is there.

    call: a function of a module, whose arguments and result can be pickled. What it prints is lost, as
    they would print into each other; what it raises is raised here. jobs: how many run at a time.
    After an error no new one starts. Ctrl-C interrupts those at work, once each time, and waits for
    them to end. Raises RuntimeError for a process that died.
    """
    stopping = threading.Event()
    resource_tracker.ensure_running()  # first: as it starts, it lifts the mask of the thread that starts it
    pool = ThreadPoolExecutor(jobs, initializer=_mask, initargs=(True,))

    def stop() -> None:
        stopping.set()
        for process in active_children():
            os.kill(process.pid, signal.SIGINT)

    try:
        waiting = [pool.submit(_in_own_process, call, task, stopping) for task in tasks]
        for done in as_completed(waiting):
            yield done.result()
    except KeyboardInterrupt:
        stop()
        raise
    finally:
        while pool is not None:
            try:
                pool.shutdown(cancel_futures=True)
                pool = None
            except KeyboardInterrupt:
                stop()


def _in_own_process(call: Callable, task: tuple, stopping: threading.Event) -> Any:
    spawn = get_context("spawn")  # a fork would inherit torch's threads without their locks
    here, there = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_work, args=(there, call, task))
    process.start()
    there.close()
    if stopping.is_set():  # since this thread looked for something to do
        os.kill(process.pid, signal.SIGINT)
    try:
        returned, found = here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{call.__name__}{task}: its process ended with {process.exitcode}") from None
    process.join()
    if not returned:
        raise found
    return found


def _work(there: Connection, call: Callable, task: tuple) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # of this process and of those that it starts, such as kernels
        os.dup2(nowhere, stream)
    os.environ["OMP_NUM_THREADS"] = "1"
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # the terminal's Ctrl-C goes to the first process alone, which passes it on
    try:
        _mask(False)
        there.send((True, call(*task)))
    except BaseException as error:
        error.add_note("In the process:\n" + traceback.format_exc())
        there.send((False, error))


def _mask(on: bool) -> None:
    """Hold interrupts back, or no longer: a process that starts would die of one with a traceback."""
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        how = signal.SIG_BLOCK if on else signal.SIG_UNBLOCK
        signal.pthread_sigmask(how, [signal.SIGINT])
