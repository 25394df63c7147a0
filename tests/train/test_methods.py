"""The training functions on the practice model, in the smoke profile: real runs of two steps."""

import argparse

import pytest

from rlnb import __main__
from rlnb.record import runs
from rlnb.train import recipes, methods as training


@pytest.fixture(autouse=True)
def smoke(monkeypatch, tmp_path):
    monkeypatch.setenv("RLNB_PROFILE", "smoke")
    monkeypatch.setenv("RLNB_RUNS", str(tmp_path))
    monkeypatch.delenv("RLNB_MODEL", raising=False)


def test_grpo_starts_from_the_usual_sft_run_and_from_no_other():
    usual = training.sft()
    other = training.sft(recipe=recipes.recipe("sft", learning_rate=1e-5))
    assert runs.latest(method="sft").id == other.id
    assert training.find_or_train_sft(0).id == usual.id
    run = training.grpo()
    assert run.parent == usual.id
    assert run.status == "done" and run.adapter.is_dir()
    assert run.result["strict"]["n"] == recipes.recipe("grpo").test_problems
    assert usual.labels == recipes.recipe("sft").demonstrations


def test_grpo_from_the_base_has_no_parent_and_takes_other_rewards():
    def constant(completions, **columns):
        return [0.5] * len(completions)

    run = training.grpo(start="base", reward_weights={constant: 2.0})
    assert run.parent is None
    rows = [row for row in run.curve() if "reward" in row]
    assert all(row["reward"] == 1.0 and row["frac_reward_zero_std"] == 1.0 for row in rows)


def test_an_adapter_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="there is no adapter 'nowhere'"):
        training.grpo(start="nowhere")
    assert not runs.all()


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_preferences_train_from_the_shipped_responses(method):
    run = training.METHODS[method]()
    recipe = recipes.recipe(method)
    assert run.status == "done" and run.adapter.is_dir()
    assert run.labels == recipe.pairs * (2 if method == "kto" else 1)
    assert (run.parent is None) == (method == "orpo")  # which starts from the base
    assert run.result["strict"]["n"] == recipe.test_problems
    losses = [row["loss"] for row in run.curve() if "loss" in row]
    if method == "dpo":  # policy and reference agree at the start
        assert losses[0] == pytest.approx(0.6931, abs=0.01)


def test_a_reward_model_is_judged_on_prompts_that_it_has_not_seen():
    run = training.reward_model()
    assert run.adapter.is_dir()
    train, unseen = training.gold_pairs(), training.gold_pairs(held_out=True)
    assert not set(train["id"]) & set(unseen["id"])
    assert run.result["pair_accuracy"]["n"] == len(unseen)


def test_the_reward_model_that_ships_is_the_judge(monkeypatch):
    assert training.judge() == training.REWARD_MODEL
    assert (training.REWARD_MODEL / "adapter_config.json").is_file()
    assert not runs.all()  # nothing was trained for it


@pytest.mark.parametrize("method", ["ppo", "rloo"])
def test_rlhf_learns_from_the_judge(method):
    run = training.METHODS[method]()
    assert run.status == "done" and run.adapter.is_dir() and run.parent
    name = {"ppo": "rewards/reward-model/mean", "rloo": "rewards/reward_model/mean"}[method]
    assert len([row for row in run.curve() if name in row]) == recipes.recipe(method).steps


def test_the_command_line_knows_every_method():
    assert set(__main__.METHODS) == set(training.METHODS)


def test_sft_takes_other_data():
    pairs = training.gold_pairs().select(range(16))
    data = pairs.remove_columns("rejected").rename_column("chosen", "completion")
    assert training.sft(data=data).labels == 16


def test_methods_that_start_from_the_base_take_no_other_start(capsys):
    arguments = argparse.Namespace(method="sft", seed=0, start="base")
    with pytest.raises(SystemExit, match="sft starts from the base: leave --from out"):
        training.main(arguments)


def test_two_processes_make_one_run(tmp_path):
    """The README's command, in the smoke profile on two CPU processes."""
    import os
    import subprocess
    import sys

    from rlnb.tools.setup import ROOT

    own = {"RLNB_PROFILE": "smoke", "RLNB_RUNS": str(tmp_path), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "-m", "rlnb", "train", "grpo", "--from", "base"],
        cwd=ROOT, env={**os.environ, **own, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert (folder / "adapter").is_dir() and done.stdout.count(folder.name) == 1
