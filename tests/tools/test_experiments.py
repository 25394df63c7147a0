"""Calls side by side, in real processes, and the tables that they fill."""

import os
import signal
import subprocess
import sys
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
    assert "in fail" in caught.value.__notes__[0]


def test_nothing_to_do():
    assert list(experiments.side_by_side(who, [], jobs=2)) == []


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_told():
    with pytest.raises(ChildProcessError, match=r"die\(5,\): its process died or was killed \(status -9\)"):
        list(experiments.side_by_side(die, [(5,)], jobs=1))


def save_when_interrupted(file):
    Path(file).touch()
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        time.sleep(1)
        Path(file).write_text("saved")
        raise


SCRIPT = """
import sys
from rlnb.tools import experiments
from test_experiments import save_when_interrupted

if __name__ == "__main__":
    list(experiments.side_by_side(save_when_interrupted, [(name,) for name in sys.argv[1:]], jobs=2))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
@pytest.mark.parametrize(("send", "number"), [
    (os.killpg, signal.SIGINT), (os.kill, signal.SIGINT), (os.kill, signal.SIGKILL),
])  # fmt: skip
def test_what_is_at_work_ends_properly_and_nothing_is_left_behind(tmp_path, send, number):
    """As the terminal's Ctrl-C goes to a process group, or to the parent alone, or the parent is killed."""
    (tmp_path / "script.py").write_text(SCRIPT)
    files = [tmp_path / name for name in "abc"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    parent = subprocess.Popen([sys.executable, tmp_path / "script.py", *files], env=environment, stderr=-1,
                              start_new_session=True)  # fmt: skip
    while not (files[0].exists() and files[1].exists()):
        assert parent.poll() is None
        time.sleep(0.05)
    children = psutil.Process(parent.pid).children()
    send(parent.pid, number)
    assert b"KeyboardInterrupt" in parent.communicate(timeout=60)[1] or number == signal.SIGKILL
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
    assert [file.read_text() for file in files if file.exists()] == ["saved", "saved"]


def note(file):
    Path(file).touch()
    if file.endswith("bad"):
        raise ValueError("bad")
    time.sleep(1)


@pytest.mark.parametrize("ended", ["by an error", "by who asks"])
def test_none_starts_after_the_end(tmp_path, ended):
    names = ["good", "bad", "late", "later"] if ended == "by an error" else ["one", "two", "late", "later"]
    found = experiments.side_by_side(note, [(str(tmp_path / name),) for name in names], jobs=2)
    if ended == "by an error":
        with pytest.raises(ValueError, match="bad"):
            list(found)
        assert not (tmp_path / "late").exists()
    else:
        next(found)
        found.close()
    assert not (tmp_path / "later").exists()


def test_a_call_of_the_main_module(tmp_path):
    """As a benchmark has it: python -m tests.benchmarks.rlhf."""
    (tmp_path / "main_module.py").write_text(
        "from rlnb.tools import experiments\ndef double(n): return 2 * n\n"
        "if __name__ == '__main__': print(*experiments.side_by_side(double, [(4,)], 1))"
    )
    own = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "main_module"], cwd=tmp_path, env=own, stdout=-1, text=True)
    assert done.stdout == "8\n"


# --- tables --------------------------------------------------------------------------------------


def measure(method, seed):
    if method == "broken":
        raise ValueError("no such thing")
    return {"method": method, "seed": seed, "pid": os.getpid(), "share": 0.1}


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
    found = experiments.run_grid(measure, ["base", "SFT"], 2, out, first="SFT")
    assert [(r["method"], r["seed"]) for r in found] == [("base", 0), ("SFT", 0), ("base", 1), ("SFT", 1)]
    said = capsys.readouterr().out.splitlines()
    assert said == ["SFT, seed 0", "SFT, seed 1", "base, seed 0", "base, seed 1"]


def several(method, seed):
    return [{"method": method, "seed": seed, "step": step} for step in range(3)]


def test_a_run_may_have_several_rows(tmp_path):
    out = tmp_path / "rows.csv"
    for _ in range(2):
        found = experiments.run_grid(several, ["PPO", "RLOO"], 1, out)
    assert [(r["method"], r["step"]) for r in found] == [(m, i) for m in ("PPO", "RLOO") for i in range(3)]
