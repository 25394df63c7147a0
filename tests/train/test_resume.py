"""A training that ended early goes on from its checkpoint, and ends as one that did not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlnb.model import LoRA
from rlnb.record import runs
from rlnb.train import loop, methods, train
from tests.train.breaks import BreakAt

from transformers import TrainerCallback

ROOT = Path(__file__).resolve().parents[2]
STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch, tmp_path):
    monkeypatch.setenv("RLNB_PROFILE", "smoke")
    monkeypatch.setenv("RLNB_RUNS", str(tmp_path))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(run):
    return load_file(run.adapter / "adapter_model.safetensors")


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_broken_run_ends_as_one_that_was_not(method):
    data = methods.default_data(method, 0).select(range(16))
    given = STEPS | dict(start=None if method in methods.FROM_BASE else "base", data=data, problems=())
    whole = train(method, **given)
    with pytest.raises(RuntimeError, match="is gone"):
        train(method, callbacks=[BreakAt(3)], **given)
    broken = runs.find(status="failed")[0]
    assert broken.checkpoint.name == "checkpoint-2"
    torch.manual_seed(99)  # another process is in another state
    again = train(method, resume=broken.id, **given)
    assert again.id == broken.id and again.status == "done"
    mine, theirs = weights(again), weights(whole)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    losses = [[row["loss"] for row in run.curve() if "loss" in row] for run in (again, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_what_cannot_be_resumed_is_refused(capsys):
    data = methods.default_data("sft", 0)
    with pytest.raises(RuntimeError):
        train("sft", data=data, problems=(), callbacks=[BreakAt(3)], **STEPS)
    broken = runs.find(status="failed")[0]
    capsys.readouterr()
    whole = train("sft", data=data, problems=(), **STEPS)
    assert f"fit(..., resume='{broken.id}') goes on from its step 2" in capsys.readouterr().out
    for given, words in (
        ({"learning_rate": 1e-3}, "learning_rate is 0.001 here and 0.002 in"),
        ({"data": data.select(range(8))}, "data is '"),
        ({"seed": 1}, "seed is 1 here and 0 in"),
        ({"lora": LoRA(rank=2)}, "rank is 2 here and 16 in"),
    ):
        with pytest.raises(ValueError, match=words):
            train("sft", **({"data": data, "problems": ()} | STEPS | given), resume=broken)
    (broken.checkpoint / "trainer_state.json").unlink()  # the last file of a checkpoint
    with pytest.raises(ValueError, match="is failed and has no checkpoint"):
        train("sft", data=data, problems=(), resume=broken, **STEPS)
    with pytest.raises(FileNotFoundError, match="no run 'nowhere'"):
        train("sft", data=data, problems=(), resume="nowhere", **STEPS)
    with runs.start("sft") as live, pytest.raises(ValueError, match="still runs"), runs.go_on(live, 0):
        pass
    assert whole.status == "done" and runs.load(broken.id).status == "failed"


def test_a_long_run_has_checkpoints_until_it_is_done(monkeypatch):
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append([folder.name for folder in runs.find()[0].folder.glob("checkpoint-*")])

    monkeypatch.setattr(loop, "SAVE", 0.0)
    run = train("sft", problems=(), max_steps=3, callbacks=[Look()])
    assert seen == [[], ["checkpoint-1"], ["checkpoint-2"]]
    assert not list(run.folder.glob("checkpoint-*")) and run.adapter.is_dir()
