"""What a process does with its memory."""

import ctypes
import resource
import sys

import pytest

from rlnb import machine


def pages() -> int:
    """How many new pages of memory a block of 64 MiB takes that is filled and given back."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(2**26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt") or sys.platform != "linux", reason="another C library")
def test_large_blocks_stay_while_they_are_held():
    pages()
    assert pages() > 10_000  # of 4 KiB each, if they are small
    with machine.hold():
        pages()
        assert pages() < 100
    pages()
    assert pages() > 10_000


def test_nothing_is_held_where_the_c_library_cannot(monkeypatch):
    monkeypatch.setattr(machine.sys, "platform", "win32")
    with machine.hold():
        bytearray(2**26)
