"""What Unsloth makes of our settings on a GPU, read without one: see unsloth_trainers.py.

A release of Unsloth or TRL that takes a setting in another way, or sets a default that we do not pass, fails here.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
METHODS = ("sft", "reward_model", "rloo", "dpo", "kto", "orpo", "grpo")
# What differs from TRL's although we pass all that TRL has, and why that is no matter.
FREE = {"dataset_num_proc"}  # how many processes tokenize the rows
# What the trainer changes in its arguments: none of it is read in a training without evaluation.
SET_LATER = {"bf16_full_eval", "max_seq_length", "remove_unused_columns"}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="Unsloth is not installed")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By method: what the generated config and trainer do. Nothing is written outside the test's own folder."""
    folder = tmp_path_factory.mktemp("unsloth")
    own = {"HOME": str(folder), "HF_HOME": str(folder / "hf"), "RLNB_RUNS": str(folder / "runs"),
           "UNSLOTH_COMPILE_LOCATION": str(folder / "generated"), "TMPDIR": str(folder),
           "UNSLOTH_ALLOW_CPU": "1", "HF_HUB_OFFLINE": "1",
           "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}  # fmt: skip
    given = {k: v for k, v in os.environ.items() if not k.startswith(("UNSLOTH_", "RLNB_"))}
    script = ROOT / "tests" / "train" / "unsloth_trainers.py"
    done = subprocess.run([sys.executable, str(script)], env=given | own, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads(done.stdout.splitlines()[-1])["methods"]


@pytest.mark.parametrize("method", METHODS)
def test_the_trainer_is_the_one_that_unsloth_wrote(found, method):
    assert found[method]["trainer"].startswith("Unsloth")


@pytest.mark.parametrize("method", METHODS)
def test_every_argument_exists_and_arrives_unchanged(found, method):
    made = found[method]
    assert made["unknown"] == []
    for profile, passed in made["passed"].items():
        passed = {k: v for k, v in passed.items() if k != "output_dir"} | {"report_to": "[]"}  # for "none"
        assert {name: made["unsloth"][profile][name] for name in passed} == passed


@pytest.mark.parametrize("method", METHODS)
def test_what_unsloth_sets_otherwise_is_passed(found, method):
    """TRL's config and Unsloth's, both given what a lesson passes, agree in every field that TRL has."""
    made = found[method]
    for profile, plain in made["trl"].items():
        mine = made["unsloth"][profile]
        assert {k: (v, mine.get(k)) for k, v in plain.items() if k not in FREE and mine.get(k) != v} == {}


@pytest.mark.parametrize("method", METHODS)
def test_the_trainer_leaves_the_arguments_alone(found, method):
    before, after = found[method]["unsloth"]["smoke"], found[method]["after"]
    free = SET_LATER | ({"max_length"} if method == "sft" else set()) | ({"beta"} if method == "grpo" else set())
    assert {k: (v, after[k]) for k, v in before.items() if k not in free and after[k] != v} == {}
    # SFT's None, for no limit, becomes all that the model takes, which is no other limit.
    assert after.get("max_length") == ("512" if method == "sft" else before.get("max_length"))


@pytest.mark.parametrize("method", ["dpo", "kto", "rloo"])
def test_the_reference_is_the_adapter_that_the_policy_starts_from(found, method):
    assert found[method]["adapters"] == ["default", "ref"]


def test_grpo_with_a_kl_measures_it_from_the_base(found):
    """TRL copies the policy's adapter as "ref"; Unsloth takes that out, and the adapter off. Where the policy starts
    from SFT, that is another reference: no lesson has beta > 0.
    """
    assert found["grpo"]["adapters"] == ["default"]


def test_our_rollouts_and_our_guard_of_rewards_are_called(found):
    assert found["grpo"]["rollout"]
    assert found["grpo"]["rewards"] and found["rloo"]["rewards"]


@pytest.mark.parametrize(("method", "logs", "lacks"), [
    ("sft", (), ("entropy", "mean_token_accuracy")),  # which TRL logs: nothing of ours needs them
    ("reward_model", ("accuracy", "margin"), ()),
    ("dpo", ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "entropy"), ()),
    ("kto", ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "kl"), ()),
    ("orpo", ("rewards/margins", "logps/chosen", "nll_loss"), ()),
    ("rloo", ("reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", "completions/clipped_ratio"), ()),
    # Always a kl, 0 where beta is; never an entropy: of diagnose's rules two have nothing to read.
    ("grpo", ("reward", "reward_std", "frac_reward_zero_std", "kl", "completions/clipped_ratio"), ("entropy",)),
])  # fmt: skip
def test_the_metrics_that_our_diagnosis_reads_are_logged(found, method, logs, lacks):
    logged = set(found[method]["logged"])
    assert set(logs) <= logged and not set(lacks) & logged
