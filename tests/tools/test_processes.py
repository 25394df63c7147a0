"""Calls side by side, in real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rlnb.tools import processes
from rlnb.tools.setup import ROOT


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


STARTS_ONE = """
import time
from rlnb.tools import processes

if __name__ == "__main__":
    list(processes.side_by_side(time.sleep, [(0,)], jobs=1))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_even_the_first_process_holds_interrupts_back_while_it_starts(tmp_path):
    (tmp_path / "starts_one.py").write_text(STARTS_ONE)
    command = [sys.executable, tmp_path / "starts_one.py"]
    parent = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    blocked = None
    while blocked is None and parent.poll() is None:
        for child in psutil.Process(parent.pid).children():
            if "spawn_main" in " ".join(child.cmdline()):
                status = Path(f"/proc/{child.pid}/status").read_text()
                blocked = int(status.split("SigBlk:")[1].split()[0], 16)
    assert parent.wait() == 0
    assert blocked & (1 << (signal.SIGINT - 1))
