"""Calls side by side, in real processes."""

import os
import time

import pytest

from rlnb import processes


def who(number):
    time.sleep(0.2)
    print("nobody shall read this")
    return number, os.getpid(), os.environ["OMP_NUM_THREADS"]


def fail(number):
    raise ValueError(f"number {number}")


def test_each_call_has_a_process_and_a_core_of_its_own(capfd):
    found = sorted(processes.side_by_side(who, [(n,) for n in range(3)], jobs=2))
    assert [number for number, _, _ in found] == [0, 1, 2]
    assert len({pid for _, pid, _ in found} - {os.getpid()}) == 3
    assert {threads for _, _, threads in found} == {"1"}
    assert "nobody" not in "".join(capfd.readouterr())


def test_what_a_call_raises_comes_back():
    with pytest.raises(ValueError, match="number 7") as caught:
        list(processes.side_by_side(fail, [(7,)], jobs=2))
    assert "in fail" in caught.value.__notes__[0]


def test_nothing_to_do():
    assert list(processes.side_by_side(who, [], jobs=2)) == []


def die():
    os._exit(3)


def test_a_process_that_dies_is_told():
    with pytest.raises(RuntimeError, match=r"die\(\): its process ended with 3"):
        list(processes.side_by_side(die, [()], jobs=2))
