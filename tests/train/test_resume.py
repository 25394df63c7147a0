"""A training that ended early goes on from its checkpoint, and ends as one that did not."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlnb.model import LoRA, load_model
from rlnb.record import runs
from rlnb.train import loop, methods, recipes, train
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


@pytest.mark.slow
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


def test_what_is_done_is_not_trained_again_and_what_is_broken_goes_on(base_trainer):
    with pytest.raises(RuntimeError, match="is gone"):
        loop.fit("sft", base_trainer(BreakAt(3)), problems=(), resume=True)
    broken = runs.find(status="failed")[0]
    whole = loop.fit("sft", base_trainer(), problems=(), resume=True)
    assert whole.id == broken.id and whole.status == "done" and len(whole.curve()) >= 4
    trainer = base_trainer()
    again = loop.fit("sft", trainer, problems=(), resume=True)
    assert again.id == whole.id and len(runs.find()) == 1
    saved, own = weights(whole), dict(trainer.model.named_parameters())
    assert all(torch.equal(own[name.replace(".weight", ".default.weight")], saved[name]) for name in saved)
    other = loop.fit("sft", base_trainer(learning_rate=1e-3), problems=(), resume=True)
    assert other.id != whole.id and loop.fit("sft", base_trainer(), problems=()).id not in (whole.id, other.id)


@pytest.fixture
def base_trainer():
    """Trainers of one and the same short training."""
    config, trainer = methods.METHODS["sft"].classes()

    def make(*callbacks, **settings):
        model, tokenizer = load_model("abacus-3m", LoRA(rank=4))
        args = config(**recipes.common(config, 0) | recipes.recipe("sft") | STEPS | settings)
        data = methods.default_data("sft", 0).select(range(16))
        return trainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[*callbacks])

    return make


def test_a_long_run_has_checkpoints_until_it_is_done(monkeypatch):
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append([folder.name for folder in runs.find()[0].folder.glob("checkpoint-*")])

    monkeypatch.setattr(loop, "SAVE", 0.0)
    run = train("sft", problems=(), max_steps=3, callbacks=[Look()])
    assert seen == [[], ["checkpoint-1"], ["checkpoint-2"]]
    assert not list(run.folder.glob("checkpoint-*")) and run.adapter.is_dir()


CODE = """
import os, signal, sys
from rlnb.train import train
from transformers import TrainerCallback

class Ask(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), getattr(signal, sys.argv[1]))

train("sft", problems=(), max_steps=4, callbacks=[Ask()])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_process_that_is_asked_to_end_keeps_what_was_learnt(name):
    done = subprocess.run([sys.executable, "-c", CODE, name], cwd=ROOT, capture_output=True, text=True)
    (run,) = runs.find()
    assert done.returncode and run.status == "interrupted" and name in run.error and run.adapter.is_dir()
