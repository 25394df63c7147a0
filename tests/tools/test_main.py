"""The command line: what it hands on, and what it says of mistakes."""

import shutil

import pytest

from rlnb import __main__
from rlnb.data import preferences
from rlnb.record import runs
from rlnb.task import problems
from rlnb.train import methods


@pytest.fixture(autouse=True)
def registry(tmp_path, monkeypatch):
    monkeypatch.setenv("RLNB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("RLNB_PROFILE", "smoke")


def test_the_methods_are_those_of_the_package():
    assert tuple(methods.METHODS) == __main__.METHODS


@pytest.mark.parametrize(("text", "setting"), [
    ("beta=0.5", ("beta", 0.5)), ("max_steps=3", ("max_steps", 3)), ("loss_type=['ipo']", ("loss_type", ["ipo"])),
    ("scale_rewards=none", ("scale_rewards", "none")), ("optim=", ("optim", "")), ("a=b=c", ("a", "b=c")),
])  # fmt: skip
def test_a_setting_is_a_literal_or_text(text, setting):
    assert __main__._setting(text) == setting


def test_train_takes_settings_and_an_adapter(capsys):
    command = ["train", "sft", "--seed", "3", "--rank", "4", "--set", "max_steps=1", "--set", "learning_rate=1e-3"]
    assert __main__.main(command) == 0
    (run,) = runs.find(method="sft")
    assert (run.seed, run.config["rank"], run.config["alpha"]) == (3, 4, 32)
    assert (run.config["max_steps"], run.config["learning_rate"]) == (1, 1e-3)
    assert run.id in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    (["train", "dpo", "--set", "bta=1"], "DPOConfig has no argument bta"),
    (["train", "dpo", "--set", "beta"], "--set beta: give NAME=VALUE, like beta=0.5"),
    (["train", "sft", "--from", "sft"], "sft starts from the base"),
    (["train", "dpo", "--from", "no/such/folder"], "no/such/folder"),
    (["doctor", "20261120-dpo"], "no run '20261120-dpo'"),
    (["run", "99_gone"], "no notebook 99_gone; there are: 00_start"),
    (["test", "units"], "no stage units; there are lint, unit"),
])  # fmt: skip
def test_a_mistake_is_told_in_a_line(arguments, message, capsys):
    assert __main__.main(arguments) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: ") and message in told


def test_on_demand_with_its_traceback():
    with pytest.raises(ValueError, match="give NAME=VALUE"):
        __main__.main(["--debug", "train", "sft", "--set", "beta"])


def test_the_doctor_reads_a_run(capsys):
    with runs.start("sft") as run:
        run.log(1, loss=float("nan"))
    assert __main__.main(["doctor", run.id]) == 1
    assert "not a number: loss at step 1" in capsys.readouterr().out


@pytest.mark.slow
def test_data_writes_what_ships(tmp_path, monkeypatch):
    """The samples are those that ship, in another order; the reward model trains two steps on them."""
    rows = list(reversed(preferences.read(methods.RESPONSES)))
    monkeypatch.setattr(problems, "write_data", lambda: (tmp_path / "problems").touch())
    monkeypatch.setattr(methods, "sample_responses", lambda: rows)
    monkeypatch.setattr(methods, "RESPONSES", tmp_path / "responses.jsonl")
    shutil.copytree(methods.REWARD_MODEL, tmp_path / "judge")
    monkeypatch.setattr(methods, "REWARD_MODEL", tmp_path / "judge")
    before = (tmp_path / "judge" / "adapter_model.safetensors").read_bytes()
    assert __main__.main(["data", "--preferences", "--reward-model"]) == 0
    assert (tmp_path / "problems").exists() and preferences.read(methods.RESPONSES) == rows
    after = (tmp_path / "judge" / "adapter_model.safetensors").read_bytes()
    assert len(after) == len(before) and after != before
