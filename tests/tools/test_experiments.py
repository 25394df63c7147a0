"""Calls side by side, in real processes, and the tables that they fill."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from rlnb.tools import experiments
from rlnb.tools.setup import ROOT


def who(number):
    time.sleep(0.2)
    print("nobody shall read this")
    return number, os.getpid(), os.environ["OMP_NUM_THREADS"]


def fail(number):
    raise ValueError(f"number {number}")


def test_each_call_has_a_process_and_a_core_of_its_own(capfd):
    found = sorted(experiments.side_by_side(who, [(n,) for n in range(3)], jobs=2))
    assert [number for number, _, _ in found] == [0, 1, 2]
    assert len({pid for _, pid, _ in found} - {os.getpid()}) == 3
    assert {threads for _, _, threads in found} == {"1"}
    assert "nobody" not in "".join(capfd.readouterr())


def test_what_a_call_raises_comes_back():
    with pytest.raises(ValueError, match="number 7") as caught:
        list(experiments.side_by_side(fail, [(7,)], jobs=2))
    assert "in fail" in str(caught.value.__cause__)


def test_nothing_to_do():
    assert list(experiments.side_by_side(who, [], jobs=2)) == []


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_told():
    with pytest.raises(ChildProcessError, match=r"die\(5,\): its process, or one beside it, was killed"):
        list(experiments.side_by_side(die, [(5,)], jobs=1))


def touch_and_wait(file):
    Path(file).touch()
    if file.endswith("quick"):
        return
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        time.sleep(2)  # as if it saved what it has
        Path(file).write_text("interrupted")
        raise


SLEEPS = """
import sys
from rlnb.tools import experiments
from test_experiments import touch_and_wait

if __name__ == "__main__":
    list(experiments.side_by_side(touch_and_wait, [(name,) for name in sys.argv[1:]], jobs=2))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
@pytest.mark.parametrize(("sent", "names"), [
    (signal.SIGINT, "a b c"), (signal.SIGINT, "quick b"), (signal.SIGKILL, "a b c"),
])  # fmt: skip
def test_what_is_at_work_ends_properly_and_nothing_is_left_behind(tmp_path, sent, names):
    """Ctrl-C interrupts the calls and starts no third, also where one has ended and a process is idle; so
    does a parent that is killed.
    """
    (tmp_path / "sleeps.py").write_text(SLEEPS)
    calls = [tmp_path / name for name in names.split()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    parent = subprocess.Popen([sys.executable, tmp_path / "sleeps.py", *calls], env=environment, stderr=-1)
    while not (calls[0].exists() and calls[1].exists()):
        assert parent.poll() is None
        time.sleep(0.05)
    time.sleep(5 * names.startswith("quick"))  # until there is another process in the place of the first
    children = psutil.Process(parent.pid).children()
    parent.send_signal(sent)
    assert b"KeyboardInterrupt" in parent.communicate(timeout=60)[1] or sent == signal.SIGKILL
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
    assert [call.read_text() for call in calls if call.exists() and call.name != "quick"] == (
        ["interrupted"] * (1 if "quick" in names else 2))  # fmt: skip


STARTS_ONE = """
import time
from rlnb.tools import experiments

if __name__ == "__main__":
    list(experiments.side_by_side(time.sleep, [(0,)], jobs=1))
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


# --- tables --------------------------------------------------------------------------------------


def measure(method, seed):
    if method == "broken":
        raise ValueError("no such thing")
    return {"method": method, "seed": seed, "pid": os.getpid(), "share": 0.1}


def test_interrupts_are_held_even_where_another_thread_can_take_them():
    threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
    done = False
    with pytest.raises(KeyboardInterrupt), experiments._interrupts_held():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        done = True
    assert done



@pytest.mark.parametrize("resume", [False, True])
def test_a_table_keeps_the_rows_that_nobody_asked_for(tmp_path, resume):
    """Without resume two rows are made anew, with it none; four others stay as they are."""
    out = tmp_path / "rows.csv"
    old = [{"method": m, "seed": s, "pid": 0, "share": 0.5} for s in range(2) for m in ("SFT", "DPO", "KTO")]
    out.write_text(experiments.text(old))
    found = experiments.run_grid(measure, ["DPO"], 2, out, resume=resume, jobs=2)
    assert experiments.read(out) == found
    assert [(r["method"], r["seed"]) for r in found] == [(r["method"], r["seed"]) for r in old]
    fresh = [row for row in found if row["pid"]]
    assert [(r["method"], r["seed"]) for r in fresh] == ([] if resume else [("DPO", 0), ("DPO", 1)])


def test_an_error_leaves_the_table_whole(tmp_path):
    out = tmp_path / "rows.csv"
    experiments.run_grid(measure, ["SFT", "DPO"], 2, out, jobs=2)
    before = out.read_text()
    with pytest.raises(ValueError, match="no such thing"):
        experiments.run_grid(measure, ["broken", "DPO"], 1, out, first="broken")
    assert out.read_text() == before


def test_the_first_method_comes_first_and_the_order_is_that_of_the_methods(tmp_path, capsys):
    out = tmp_path / "rows.csv"
    found = experiments.run_grid(measure, ["base", "SFT"], 2, out, first="SFT", say=lambda row: row["method"])
    assert [(r["method"], r["seed"]) for r in found] == [("base", 0), ("SFT", 0), ("base", 1), ("SFT", 1)]
    said = capsys.readouterr().out.splitlines()
    assert said == ["1 of 4: SFT", "2 of 4: SFT", "3 of 4: base", "4 of 4: base"]


def several(method, seed):
    return [{"method": method, "seed": seed, "step": step} for step in range(3)]


def test_a_run_may_have_several_rows(tmp_path):
    out = tmp_path / "rows.csv"
    for _ in range(2):
        found = experiments.run_grid(several, ["PPO", "RLOO"], 1, out)
    assert [(r["method"], r["step"]) for r in found] == [(m, i) for m in ("PPO", "RLOO") for i in range(3)]
