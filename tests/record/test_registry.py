"""rlnb.record.runs between notebooks: who made a run, and what is left of a training that was interrupted."""

import contextlib
import json

import pytest

from rlnb.record import runs
from rlnb.record.progress import Stopped


@pytest.fixture(autouse=True)
def registry(tmp_path, monkeypatch):
    monkeypatch.setenv("RLNB_RUNS", str(tmp_path))
    monkeypatch.delenv("RLNB_NOTEBOOK", raising=False)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    return tmp_path


def record(seed=0, parent=None, method="sft", **config):
    with runs.start(method, config=config, seed=seed, parent=parent) as run:
        run.finish(strict={"k": 3, "n": 4})
    return run


@pytest.mark.parametrize(
    ("session", "name"),
    [
        ("/somewhere/notebooks/05_dpo.ipynb", "05_dpo"),
        ("notebooks/solutions/02_sft.ipynb", "solutions/02_sft"),
        ("8b2b9d2e-5c0b-4f0c", None),
        ("", None),
    ],
)
def test_a_run_knows_the_notebook_that_made_it(monkeypatch, session, name):
    monkeypatch.setenv("JPY_SESSION_NAME", session)
    assert record().notebook == name
    monkeypatch.setenv("RLNB_NOTEBOOK", "08_grpo")
    assert record().notebook == "08_grpo"


@pytest.mark.parametrize(
    ("error", "status", "calls"),
    [
        (KeyboardInterrupt(), "interrupted", 1),
        (Stopped(), "interrupted", 1),
        (SystemExit(1), "interrupted", 1),
        (ValueError("no"), "failed", 0),
        (None, "done", 0),
    ],
)
def test_what_an_interrupted_training_has_learnt_is_saved_before_the_record_is_closed(error, status, calls):
    seen = []
    with contextlib.suppress(BaseException), runs.start("sft") as run:
        run.on_interrupt = lambda: seen.append((runs.load(run.id).status, run.adapter.mkdir()))
        if error:
            raise error
    assert runs.load(run.id).status == status and run.on_interrupt is None
    assert seen == [("running", None)] * calls and run.adapter.is_dir() == bool(calls)


@pytest.mark.parametrize("second", [OSError("disk full"), KeyboardInterrupt("again")])
def test_a_saving_that_fails_hides_nothing(second):
    def save():
        raise second

    with pytest.raises(KeyboardInterrupt, match="first"), runs.start("sft") as run:
        run.on_interrupt = save
        raise KeyboardInterrupt("first")
    saved = runs.load(run.id)
    assert saved.status == "interrupted" and saved.error == "KeyboardInterrupt: first"


def test_what_is_for_the_caller_alone_is_not_written():
    with runs.start("sft") as run:
        run.report, run.on_interrupt = object(), print
    assert not {"report", "on_interrupt"} & set(json.loads((run.folder / "run.json").read_text()))
    assert runs.load(run.id).report is None
