"""Every method on the practice model, in the smoke profile: real runs of two steps."""

import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from rlnb.data import shapes
from rlnb.measure import evaluate
from rlnb.model import LoRA, resolve
from rlnb.record import runs
from rlnb.task import problems, rewards
from rlnb.task.rewards import RewardError
from rlnb.tools.setup import ROOT
from rlnb.train import methods, recipes
from rlnb.train.methods import find, find_or_train_sft, gold_pairs, train
from tests.train.breaks import BreakAt


@pytest.fixture(autouse=True)
def smoke(monkeypatch, tmp_path):
    monkeypatch.setenv("RLNB_PROFILE", "smoke")
    monkeypatch.setenv("RLNB_RUNS", str(tmp_path))
    monkeypatch.delenv("RLNB_MODEL", raising=False)


def test_grpo_starts_from_the_usual_sft_run_and_from_no_other():
    usual = train("sft")
    slow = train("sft", learning_rate=1e-5)
    other = train("sft", data=shapes.prompt_completion(problems.load("demonstrations")[:16]))
    assert runs.find(method="sft")[0].id == other.id
    assert find_or_train_sft(0).id == usual.id and find("sft", learning_rate=1e-5).id == slow.id
    run = train("grpo")
    assert run.parent == usual.id and run.status == "done" and run.adapter.is_dir()
    assert run.result["strict"]["n"] == len(evaluate.held_out()) == len(run.report.rows)
    assert usual.labels == 16 and run.labels == 0


def test_grpo_from_the_base_has_no_parent_and_takes_other_rewards():
    def constant(completions, **columns):
        return [0.5] * len(completions)

    run = train("grpo", start="base", reward=constant, reward_weights=[2.0])
    assert run.parent is None
    rows = [row for row in run.curve() if "reward" in row]
    assert all(row["reward"] == 1.0 and row["frac_reward_zero_std"] == 1.0 for row in rows)


def test_a_run_is_found_by_what_it_learnt_from(tmp_path, monkeypatch):
    usual = train("grpo", start="base", max_steps=2)
    settings = {"max_steps": 2}
    assert find("grpo", **settings).id == usual.id
    train("grpo", start="base", reward=[rewards.correctness, rewards.answer_only], **settings)
    train("grpo", start="base", data=shapes.prompts(problems.load("train")[:100]), **settings)
    train("grpo", start="base", lora=LoRA(targets=("q_proj", "v_proj")), **settings)
    assert find("grpo", **settings).id == usual.id and len(runs.find(method="grpo")) == 4
    other = shutil.copytree(resolve("abacus-3m"), tmp_path / "elsewhere" / "abacus-3m")  # another model of this name
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 0.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setenv("RLNB_MODEL", str(other))
    assert find("grpo", **settings) is None


@pytest.mark.parametrize("method", ["dpo", "ppo"])
def test_the_command_line_goes_on_with_a_run_as_it_was_begun(method):
    given = dict(max_steps=3, learning_rate=1e-4, save_strategy="steps", save_steps=1)
    sft = find_or_train_sft(0)
    with pytest.raises(RuntimeError, match="gone"):
        train(method, start=sft, callbacks=[BreakAt(2)], **given)
    broken = runs.find(status="failed")[0]
    again = methods.resume(broken.id, method)
    assert again.id == broken.id and again.status == "done" and again.parent == sft.id
    assert again.config == broken.config and [r["step"] for r in again.curve() if "loss" in r] == [1, 2, 3]
    with pytest.raises(ValueError, match=rf"is done, of {method}: there is no {method} to go on with"):
        methods.resume(broken.id, method)


@pytest.mark.parametrize("method", ["grpo", "rloo", "ppo"])
def test_a_reward_that_is_no_number_ends_the_run(method):
    def broken(completions, **columns):
        return [float("nan")] * len(completions)

    with pytest.raises(RewardError, match="'broken' returned nan"):
        train(method, start="base", reward=broken)
    assert [run.status for run in runs.find()] == ["failed"]


def test_mistakes_are_named_before_anything_is_made():
    with pytest.raises(FileNotFoundError, match="there is no adapter 'nowhere'"):
        train("grpo", start="nowhere")
    with pytest.raises(ValueError, match="method is 'dqn': it must be one of sft, "):
        train("dqn")
    with pytest.raises(TypeError, match="DPOConfig has no argument lr"):
        train("dpo", lr=1.0)
    with pytest.raises(ValueError, match="sft starts from the base, and start is 'nowhere'"):
        train("sft", start="nowhere")
    with pytest.raises(ValueError, match="data has no rows for dpo"):
        train("dpo", data=gold_pairs().select(range(0)))
    assert not runs.find()


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_preferences_train_from_the_shipped_responses(method):
    run = train(method)
    assert run.status == "done" and run.adapter.is_dir()
    assert run.labels == 32 * (2 if method == "kto" else 1)
    assert (run.parent is None) == (method == "orpo")  # which starts from the base
    losses = [row["loss"] for row in run.curve() if "loss" in row]
    if method == "dpo":  # policy and reference agree at the start
        assert losses[0] == pytest.approx(0.6931, abs=0.01)


def test_the_record_says_what_was_used():
    run = train("dpo", beta=0.5)
    usual = recipes.recipe("dpo") | {"beta": 0.5, "rank": 16, "alpha": 32}
    assert {name: run.config[name] for name in usual} == usual
    other = train("dpo", data=gold_pairs().select(range(16)))
    assert other.config["data"] != run.config["data"]
    assert runs.load(run.id).config == run.config


def test_a_reward_model_is_judged_on_prompts_that_it_has_not_seen():
    run = train("reward_model")
    assert run.adapter.is_dir() and (run.config["rank"], run.config["alpha"]) == (64, 128)
    seen, unseen = gold_pairs(), gold_pairs(held_out=True)
    assert not set(seen["id"]) & set(unseen["id"])
    assert run.result["pair_accuracy"]["n"] == len(unseen)


def test_the_reward_model_that_ships_is_the_judge():
    assert methods.judge() == methods.REWARD_MODEL
    assert (methods.REWARD_MODEL / "adapter_config.json").is_file()
    assert not runs.find()  # nothing was trained for it


@pytest.mark.parametrize("method", ["ppo", "rloo"])
def test_rlhf_learns_from_the_judge(method):
    run = train(method)
    assert run.status == "done" and run.adapter.is_dir() and run.parent
    name = {"ppo": "rewards/reward-model/mean", "rloo": "rewards/reward_model/mean"}[method]
    assert len([row for row in run.curve() if name in row]) == recipes.recipe(method)["max_steps"]


def test_a_rank_that_rollouts_cannot_serve_is_refused_before_anything_is_loaded():
    from rlnb.model import LoRA

    with pytest.raises(ValueError, match="LoRA rank 128 is above max_lora_rank 64"):
        train("grpo", start="base", lora=LoRA(rank=128))
    assert not runs.find()


@pytest.mark.slow
def test_two_processes_make_one_run(tmp_path):
    """The README's command, in the smoke profile on two CPU processes."""
    own = {"RLNB_PROFILE": "smoke", "RLNB_RUNS": str(tmp_path), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "-m", "rlnb", "train", "grpo", "--from", "base"],
        cwd=ROOT, env={**os.environ, **own, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert (folder / "adapter").is_dir() and done.stdout.count(folder.name) == 1
