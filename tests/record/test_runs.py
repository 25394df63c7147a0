"""The registry: what is recorded, how runs end, crashes, concurrency, and reading it back."""

import json
import math
import mmap
import os
import platform
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rlnb
from rlnb.record import runs

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def registry(tmp_path, monkeypatch):
    monkeypatch.setenv("RLNB_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("RLNB_NOTEBOOK", raising=False)
    monkeypatch.setenv("RLNB_PROFILE", "smoke")
    return tmp_path / "runs"


def python(code, **options):
    """Starts Python on code that may use `runs`, in the test's registry."""
    code = f"import os, time\nfrom rlnb.record import runs\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, **options
    )


def raw(run):
    """run.json as strict JSON, which has no NaN."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((run.folder / "run.json").read_text(), parse_constant=refuse)


@dataclass(frozen=True)
class Settings:
    rank: int = 8
    path: Path = Path("data") / "x"


# --- what is recorded ----------------------------------------------------------------------------


def test_a_run_is_recorded_whole(registry, monkeypatch):
    monkeypatch.setenv("RLNB_NOTEBOOK", "08_grpo")
    with runs.start("sft", model="abacus-3m") as first:
        pass
    config = {"learning_rate": 1e-3, "lora": Settings()}
    with runs.start("grpo", model="m", config=config, seed=3, labels=64, parent=first) as run:
        assert runs.load(run.id).status == "running"
        with run.timer("train"):
            run.log(step=1, loss=0.5)
        run.finish(strict=0.5)
    saved = raw(run)
    assert saved["schema"] == 1 and saved["id"] == run.folder.name and saved["method"] == "grpo"
    assert saved["status"] == "done" and saved["error"] is None and saved["parent"] == first.id
    assert saved["notebook"] == "08_grpo" and saved["profile"] == "smoke"
    assert saved["seed"] == 3 and saved["labels"] == 64 and saved["result"] == {"strict": 0.5}
    assert saved["config"] == {"learning_rate": 1e-3, "lora": {"rank": 8, "path": "data/x"}}
    wheel = metadata.version("torch")  # as pip names it: with CUDA torch calls itself 2.13.0+cu130, its wheel 2.13.0
    assert saved["versions"]["torch"] == wheel and "trl" in saved["versions"]
    assert saved["versions"]["rlnb"] == rlnb.__version__
    assert saved["machine"]["cpus"] == os.cpu_count()
    assert 0 <= saved["timers"]["train"] <= saved["seconds"] < 60
    assert 1 < saved["peak_memory_mb"] < 100_000
    assert [path.name for path in run.folder.iterdir() if path.name.startswith(".")] == []


def test_results_may_come_after_the_end_and_change_nothing_else():
    with runs.start("sft") as run:
        pass
    seconds = run.seconds
    run.finish(strict=0.4)
    runs.load(run.id).finish(correct=0.6)
    again = runs.load(run.id)
    assert again.result == {"strict": 0.4, "correct": 0.6}
    assert again.seconds == seconds and again.status == "done"


def test_timers_add_up_also_when_the_inside_raises():
    with runs.start("sft") as run:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError), run.timer("train"):
                time.sleep(0.01)
                _ = 1 / 0
    assert 0.02 <= runs.load(run.id).train_seconds < 10


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the reset is Linux's")
def test_peak_memory_is_the_runs_own():
    # Not malloc's memory: that may be some that earlier tests have freed, and then nothing grows.
    memory = mmap.mmap(-1, 80 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with memory, runs.start("big") as big:
        for place in range(0, len(memory), mmap.PAGESIZE):
            memory[place] = 1
    with runs.start("small") as small:
        pass
    assert big.peak_memory_mb - small.peak_memory_mb > 50


@pytest.mark.parametrize("method", ["a/b", ""])
def test_start_checks_before_it_makes_a_folder(method, registry):
    with pytest.raises(ValueError, match=f"method is '{method}': use letters, digits"), runs.start(method):
        pass
    assert not registry.exists()


# --- how a run ends ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("rank is 0"), "failed"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(1), "interrupted"),
    ],
)
def test_exceptions_are_recorded_and_go_on(error, status):
    with pytest.raises(type(error)), runs.start("grpo") as run:
        run.log(step=1, reward=0.1)
        run.finish(strict=0.1)
        raise error
    saved = runs.load(run.id)
    assert saved.status == status and saved.error == f"{type(error).__name__}: {error}"
    assert saved.result == {"strict": 0.1} and saved.curve()[0]["reward"] == 0.1


def test_a_killed_run_is_lost():
    process = python(
        "with runs.start('grpo') as run:\n"
        "    run.log(step=1, loss=1.0)\n"
        "    print(run.id, flush=True)\n"
        "    time.sleep(60)"
    )
    name = process.stdout.readline().strip()
    assert runs.load(name).status == "running"
    process.kill()
    deadline = time.monotonic() + 5
    while runs.load(name).status == "running" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert runs.load(name).status == "lost"  # a zombie, as nobody has waited for it yet
    process.communicate()
    run = runs.load(name)
    assert run.status == "lost" and run.curve()[0]["loss"] == 1.0
    assert runs.find(method="grpo", status="done") == [] and runs.find(status="lost")[0].id == name
    assert raw(run)["status"] == "running"  # reading changes nothing


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, "running"),
        ({"born": "another boot:1"}, "lost"),  # the number of a dead process, used again
        ({"pid": 2**22 + 1}, "lost"),
        ({"host": "elsewhere", "pid": 2**22 + 1}, "running"),  # cannot be known from here
    ],
)
def test_running_is_believed_of_living_processes_only(change, status):
    with runs.start("sft") as run:
        run.process |= change
        run._save()
        assert runs.load(run.id).status == status


# --- crashes and concurrency ---------------------------------------------------------------------


def test_a_crash_between_write_and_replace_leaves_the_old_file():
    process = python(
        "from pathlib import Path\n"
        "with runs.start('grpo') as run:\n"
        "    run.finish(strict=0.25)\n"
        "    print(run.id, flush=True)\n"
        "    Path.replace = lambda *paths: os._exit(9)\n"
        "    run.finish(strict=0.75)"
    )
    name = process.communicate()[0].strip()
    assert process.returncode == 9
    run = runs.load(name)
    assert (run.folder / f".run.json.{process.pid}").exists()  # it was written, and not used
    assert run.result == {"strict": 0.25} and run.status == "lost"


def test_a_crash_while_starting_leaves_no_run(registry):
    process = python(
        "from pathlib import Path\n"
        "Path.replace = lambda *paths: os._exit(9)\n"
        "with runs.start('grpo'):\n"
        "    pass"
    )
    assert process.wait() == 9
    assert len(list(registry.iterdir())) == 1
    with warnings.catch_warnings(action="error"):
        assert runs.find() == []


def test_processes_that_start_in_the_same_second_get_their_own_folders(registry):
    code = (
        "from datetime import UTC, datetime\n"
        "class Still(datetime):\n"
        "    @classmethod\n"
        "    def now(cls, zone): return datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)\n"
        "runs.datetime = Still\n"
        "for seed in range(4):\n"
        "    with runs.start('grpo', seed=seed) as run:\n"
        "        print(run.id)"
    )
    processes = [python(code) for _ in range(3)]
    with warnings.catch_warnings(action="error"):  # a reader never sees half a run
        while any(process.poll() is None for process in processes):
            runs.find()
    names = [name for process in processes for name in process.communicate()[0].split()]
    assert len(set(names)) == len(names) == 12
    assert sorted(names) == sorted(path.name for path in registry.iterdir())
    assert "20260102-030405-grpo" in names and "20260102-030405-grpo-12" in names
    assert all(raw(run)["id"] == run.id for run in runs.find())


def test_what_is_broken_is_skipped_with_one_warning_and_what_is_no_run_without(registry):
    with runs.start("sft") as run:
        pass
    (registry / "notes").mkdir()
    (registry / "notes" / "a.txt").write_text("a folder without run.json")
    (registry / "README").write_text("not a folder")
    with warnings.catch_warnings(action="error"):
        assert [r.id for r in runs.find()] == [run.id]
    texts = {"half": '{"schema": 1, "id"', "foreign": "[1]", "newer": '{"schema": 2}'}
    for name, text in texts.items():
        (registry / name).mkdir()
        (registry / name / "run.json").write_text(text)
    with pytest.warns(UserWarning) as caught:
        found = runs.find()
    assert [r.id for r in found] == [run.id] and len(caught) == 1
    message = str(caught[0].message)
    assert f"{registry / 'newer' / 'run.json'} is broken: it is not of schema 1" in message
    assert "foreign" in message and "half" in message and "notes" not in message


@pytest.mark.parametrize(
    "change",
    [
        {"started": None}, {"status": ["done"]}, {"config": []}, {"seconds": "5"}, {"method": None}, {"machine": "cpu"},
        {"status": "running", "process": {"host": platform.node(), "born": "1"}},
    ],
)  # fmt: skip
def test_a_field_of_a_wrong_kind_breaks_that_run_and_no_other(registry, change):
    """Once one such file made every call on the registry end in a TypeError."""
    with runs.start("sft", config={"rank": 8}) as run:
        run.finish(strict={"k": 1, "n": 2})
    with runs.start("sft") as other:
        pass
    (other.folder / "run.json").write_text(json.dumps(raw(other) | change))
    with pytest.warns(UserWarning, match=f"skipped broken run.*{other.id}.*run.json is broken"):
        assert [r.id for r in runs.find()] == [run.id]
    with pytest.warns(UserWarning):
        assert runs.find(rank=8)[0].id == run.id
    with pytest.warns(UserWarning):
        assert len(runs.table(runs.find())) == 1
    with pytest.raises(ValueError, match=r"run\.json is broken: "):
        runs.load(other.id)


def test_of_several_processes_the_first_alone_is_in_the_registry(registry, monkeypatch):
    with runs.start("sft") as first:
        monkeypatch.setenv("RANK", "1")
        with runs.start("sft") as second:
            second.log(1, loss=0.5)
            assert second.curve()[0]["loss"] == 0.5
    assert [run.id for run in runs.find()] == [first.id]
    assert second.folder.parent == registry / ".others"


# --- the curve -----------------------------------------------------------------------------------


def test_each_log_is_written_at_once():
    with runs.start("grpo") as run:
        rest = {"rewards/format_reward/mean": np.float32(0.25), "kl": torch.tensor(0.125)}
        for step, loss in enumerate((0.5, math.nan, -math.inf), 1):
            run.log(step, loss=loss, **rest)
            assert len(runs.load(run.id).curve()) == step
    curve = run.curve()
    seconds = [row.pop("seconds") for row in curve]
    assert seconds == sorted(seconds)
    assert curve[0] == {"step": 1, "loss": 0.5, "rewards/format_reward/mean": 0.25, "kl": 0.125}
    assert math.isnan(curve[1]["loss"]) and curve[2]["loss"] == -math.inf
    assert '"loss": "NaN"' in (run.folder / "curve.jsonl").read_text()


def test_log_refuses_what_is_no_number():
    with runs.start("sft") as run, pytest.raises(TypeError, match=r"note='high' is no number"):
        run.log(step=1, loss=1.0, note="high")
    assert run.curve() == []


def test_a_broken_line_is_skipped_with_a_warning():
    with runs.start("sft") as run:
        run.log(step=1, loss=1.0)
        with (run.folder / "curve.jsonl").open("a") as file:
            file.write('[1]\n{"step": 2, "lo')
    with pytest.warns(UserWarning, match=r"curve\.jsonl: skipped broken line\(s\) \[2, 3\]"):
        assert [row["step"] for row in run.curve()] == [1]


# --- reading it back -----------------------------------------------------------------------------


def test_find():
    for seed, rate in ((0, 1e-3), (1, 1e-3), (0, 5e-3)):
        with runs.start("grpo", seed=seed, config={"rate": rate, "lora": Settings(rank=4)}) as run:
            run.finish(strict=rate * 100)
    with pytest.raises(ValueError), runs.start("grpo", seed=7) as bad:
        raise ValueError
    assert [r.seed for r in runs.find(method="grpo")] == [7, 0, 1, 0]
    assert [r.seed for r in runs.find(rate=1e-3)] == [1, 0]
    assert len(runs.find(**{"lora.rank": 4}, seed=0)) == 2
    assert len(runs.find(lora=Settings(rank=4))) == 3
    assert runs.find(method="dpo") == []
    assert runs.find(status="done")[0].id == run.id and runs.find()[0].id == bad.id
    assert runs.find(strict=0.1, seed=1)[0].config["rate"] == 1e-3
    assert runs.find(status="done")[0].adapter == run.folder / "adapter"
    assert repr(run) == f"<Run {run.id}: done, {run.seconds:.1f} s>"


def test_load_names_the_newest_when_there_is_none_of_that_id():
    with pytest.raises(FileNotFoundError, match=r"no run 'x' in .*: none yet\."):
        runs.load("x")
    with runs.start("sft") as run:
        pass
    with pytest.raises(FileNotFoundError, match=rf"the newest are: {run.id}\."):
        runs.load("x")


def test_the_table_is_a_dataframe_that_reads_well():
    assert runs.table([]).empty
    with runs.start("sft", config={"learning_rate": 1e-3}) as run:
        run.finish(strict={"k": 262, "n": 500}, kl=0.125)
    with runs.start("dpo", seed=3) as other:
        pass
    table = runs.table(runs.find())
    assert list(table["id"]) == [other.id, run.id] and list(table["status"]) == ["done", "done"]
    assert table["seed"][0] == 3 and table["result.strict"][1] == "52.4 % of 500"
    assert "result.pair_accuracy" not in table  # no run has any
    columns = ["method", "config.learning_rate", "kl", "nothing"]
    assert runs.table([run], columns).to_dict("records") == [
        {"method": "sft", "config.learning_rate": 1e-3, "kl": 0.125}
    ]


@pytest.mark.parametrize("value", [{"k": 1, "n": 0}, {"k": "1", "n": 2}, {"k": 1}, {"k": None, "n": 2}, [1, 2], 3])
def test_what_is_no_proportion(value):
    assert not runs.is_proportion(value) and runs.is_proportion({"k": 0, "n": 1})


def test_the_root_is_the_repository_by_default(monkeypatch):
    monkeypatch.delenv("RLNB_RUNS")
    assert runs.root() == REPOSITORY / "runs"


def test_the_root_is_absolute_whatever_is_given(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given, place in (("~/runs", tmp_path / "home" / "runs"), ("here", tmp_path / "here")):
        monkeypatch.setenv("RLNB_RUNS", given)
        assert runs.root() == place


def test_importing_it_is_light():
    code = "import sys; print(*{'torch', 'transformers', 'numpy', 'pandas', 'psutil'} & set(sys.modules))"
    assert python(code).communicate()[0].strip() == ""


def test_a_registry_that_cannot_be_written_says_so_at_the_start(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RLNB_RUNS", str(tmp_path / "file" / "runs"))
    with pytest.raises(OSError, match=r"no run can be kept in .*set RLNB_RUNS"), runs.start("sft"):
        pass
    monkeypatch.setenv("RLNB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="1,000 bytes are free, and 50,000,000 are needed"), runs.start("sft"):
        pass
