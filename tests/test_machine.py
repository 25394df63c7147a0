"""What a process does with its memory."""

import ctypes
import resource
import subprocess
import sys

import pytest

from rlnb import machine


def pages() -> int:
    """How many new pages of memory a block of 64 MiB takes that is filled and given back."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(2**26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def three() -> list[int]:
    """Pages of a block before, inside and after `hold`, each of the second such block."""
    found = [pages(), pages()][1:]
    with machine.hold():
        found += [pages(), pages()][1:]
    return found + [pages(), pages()][1:]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt") or sys.platform != "linux", reason="another C library")
def test_large_blocks_stay_while_they_are_held():
    # In a process of its own: in this one an earlier test may have left a gap of the heap that such a block fits into.
    run = [sys.executable, "-c", "from tests.test_machine import three; print(*three())"]
    before, inside, after = map(int, subprocess.check_output(run, text=True).split())
    assert before > 10_000  # of 4 KiB each, if they are small
    assert inside < 100
    assert after > 10_000


def test_nothing_is_held_where_the_c_library_cannot(monkeypatch):
    monkeypatch.setattr(machine.sys, "platform", "win32")
    with machine.hold():
        bytearray(2**26)
