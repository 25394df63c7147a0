"""The training functions on the practice model, in the smoke profile: real runs of two steps."""

import pytest

from rlnb import recipes, runs, training


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
