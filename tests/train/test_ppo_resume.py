"""PPO killed and resumed, and on two processes: equal to one run on one process."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlnb.model import LoRA, load_model
from rlnb.model.lora import ALL_LINEAR, ATTENTION
from tests import tiny
from tests.train.ppo_tiny import assert_same, build, load, log, spread, weights

import torch
import transformers
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny")


class Killed(Exception):
    pass


class Kill(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise Killed


@pytest.mark.parametrize("start, again, at", (
    ("trained", "trained", 2), ("trained", "new", 3), ("new", "new", 1),
))  # fmt: skip
def test_resumed_equals_never_stopped(base, tmp_path, start, again, at):
    """24 prompts in batches of 8: step 3 ends the epoch. The checkpoint holds where the policy started."""
    settings = {
        "max_steps": 5, "num_ppo_epochs": 2, "num_mini_batches": 2, "learning_rate": 3e-3,
        "value_learning_rate": 1e-2, "warmup_steps": 2, "rollout": None,
    }  # fmt: skip
    never = build(load(base, start), tmp_path / "never", **settings)
    never.train()
    settings |= {"save_strategy": "steps", "save_steps": at}
    with pytest.raises(Killed):
        build(load(base, start), tmp_path / "cut", callbacks=[Kill()], **settings).train()
    resumed = build(load(base, again), tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{at}"))
    assert [row["step"] for row in log(resumed)] == [1, 2, 3, 4, 5]
    assert log(resumed) == log(never)
    assert_same(weights(resumed), weights(never))


def test_a_checkpoint_is_an_adapter_that_others_load(base, tmp_path):
    trainer = build(load(base, "trained"), tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    model, _ = load_model(base, lora=checkpoint)
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        assert torch.equal(model.eval()(input_ids=ids).logits, expected)
    assert not list(checkpoint.rglob("*reward*"))
    assert load_file(checkpoint / "value_head.safetensors")["weight"].shape == (1, 64)


def test_a_checkpoint_of_another_trainer_is_refused(base, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    trainer = build(load(base), tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"no checkpoint of PPOTrainer: it has no value_head\.safetensors"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("then, match", (
    ({"rank": 8}, r"(?s)adapter_model.safetensors is for another base or not whole: .*size mismatch"),
    ({"targets": ATTENTION}, r"adapter_model.safetensors is .* this base has no .*mlp"),
    ({"targets": "all-linear", "first": ATTENTION}, r"adapter_model.safetensors is .* the file has no .*mlp"),
))  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused(base, tmp_path, then, match):
    def run(rank=4, targets=ALL_LINEAR, **settings):
        loaded = load_model(base, lora=LoRA(rank=rank, targets=targets))
        spread(loaded[0])
        return build(loaded, tmp_path, max_steps=2, **settings)

    first = {"targets": then.pop("first")} if "first" in then else {}
    run(save_strategy="steps", save_steps=1, **first).train()
    with pytest.raises(ValueError, match=match):
        run(**then).train(resume_from_checkpoint=tmp_path / "checkpoint-1")


SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from tests.train import ppo_tiny as t
base, folder, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
kill, resume, rollout = (settings.pop(k, None) for k in ("kill", "resume", "rollout"))
class Kill(t.transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == kill:
            os.kill(os.getpid(), signal.SIGKILL)
trainer = t.build(
    t.load(base, "trained"), folder, callbacks=[Kill()], rollout=t.script if rollout else None,
    reward=[t.length, t.digits], **settings)
trainer.train(resume_from_checkpoint=resume)
t.torch.save({"weights": t.weights(trainer), "log": t.log(trainer)},
             folder / f"result_{trainer.args.process_index}.pt")
"""


def launch(base, folder, *command, **settings):
    """A run in a process of its own."""
    folder.mkdir(exist_ok=True)
    file = folder / "run.py"
    file.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, *command, str(file), str(base), str(folder), json.dumps(settings)],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def result(folder, process=0):
    return torch.load(folder / f"result_{process}.pt", weights_only=True)


@pytest.mark.slow
def test_a_killed_process_goes_on_where_it_was(base, tmp_path):
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "num_ppo_epochs": 2,
    }
    killed = launch(base, tmp_path / "cut", kill=3, **settings)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "cut" / "result_0.pt").exists()
    resumed = launch(base, tmp_path / "cut", resume=True, **settings)
    assert resumed.returncode == 0, resumed.stderr
    never = launch(base, tmp_path / "never", **settings)
    assert never.returncode == 0, never.stderr
    found, expected = result(tmp_path / "cut"), result(tmp_path / "never")
    assert found["log"] == expected["log"]
    assert_same(found["weights"], expected["weights"])


@pytest.mark.slow
def test_two_processes_do_what_one_does(base, tmp_path):
    """Half of each batch on each: statistics and gradients are those of the whole batch."""
    settings = {
        "max_steps": 3, "rollout": True, "num_ppo_epochs": 2,
    }  # fmt: skip
    one = launch(base, tmp_path / "one", per_device_train_batch_size=8, **settings)
    assert one.returncode == 0, one.stderr
    # accelerate's name for a launch through torchrun; use_cpu=True puts both on the CPU.
    command = (
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no",
    )  # fmt: skip
    two = launch(base, tmp_path / "two", *command, per_device_train_batch_size=4,
                 ddp_backend="gloo", **settings)  # fmt: skip
    assert two.returncode == 0, two.stderr
    first, second = (result(tmp_path / "two", process) for process in (0, 1))
    assert_same(first["weights"], second["weights"])
    expected = result(tmp_path / "one")
    for row, other in zip(first["log"], expected["log"], strict=True):
        assert_same(row, other, rtol=2e-3, atol=2e-5)
    assert_same(first["weights"], expected["weights"], rtol=1e-2, atol=1e-4)
