"""Do the notebooks teach the model? Read from the runs that the notebooks have just made at full size.

`python -m rlnb test learning` executes every notebook in the cpu profile into an empty registry and then
runs this file on it. One seed, so the margins are wider than in data/results/methods.csv,
and still a broken method falls through.
"""

import pytest

from rlnb.measure.judge import auc, judge_pairs
from rlnb.model import reward_model
from rlnb.record import runs
from rlnb.task import problems
from rlnb.train import gold_pairs, methods, responses


def strict(report: dict) -> float:
    """Greedy strict accuracy in percent."""
    return 100 * report["strict"]["k"] / report["strict"]["n"]


def only_run(method: str, notebook: str, with_parent: bool | None = None) -> runs.Run:
    """The first finished run of a method in a notebook."""
    found = [
        run
        for run in runs.find(method=method, notebook=notebook, status="done")
        if with_parent is None or bool(run.parent) == with_parent
    ]
    if not found:
        pytest.fail(f"no finished {method} run of {notebook}: has the notebook been executed?")
    return found[-1]  # newest first, so this is the first one made


def test_sft_learns_what_it_is_shown():
    run = only_run("sft", "02_sft")
    base, after = run.result["start"], run.result
    assert base["strict"]["n"] >= 500
    assert strict(base) < 5
    assert strict(after) > strict(base) + 20
    assert 35 < strict(after) < 80  # room is left for the other methods


def test_grpo_goes_beyond_sft():
    run = only_run("grpo", "08_grpo", with_parent=True)
    assert run.result["strict"]["n"] >= 500
    assert strict(run.result) > strict(run.result["start"]) + 10


def test_grpo_learns_without_demonstrations():
    run = only_run("grpo", "08_grpo", with_parent=False)
    assert strict(run.result["start"]) < 5
    assert strict(run.result) > strict(run.result["start"]) + 40


# A hot rate costs tens of points.
@pytest.mark.parametrize("method, notebook", [("dpo", "05_dpo"), ("kto", "06_kto")])
def test_preferences_help_and_do_not_harm(method, notebook):
    run = only_run(method, notebook)
    assert strict(run.result) > strict(run.result["start"]) - 2
    ends = [row for row in run.curve() if "rewards/margins" in row][-10:]
    assert sum(row["rewards/margins"] for row in ends) / len(ends) > 0.02


def test_a_hot_rate_on_foreign_pairs_breaks_dpo():
    own, hot, foreign = reversed(runs.find(method="dpo", notebook="05_dpo", status="done"))
    assert strict(own.result) > strict(hot.result) + 15
    assert strict(own.result) > strict(foreign.result) + 15


def test_orpo_learns_from_pairs_alone():
    run = only_run("orpo", "07_orpo")
    assert strict(run.result["start"]) < 5
    assert strict(run.result) > 50


def test_the_short_reward_model_tells_right_from_wrong():
    share = only_run("reward_model", "03_reward_model").result["pair_accuracy"]
    assert share["k"] / share["n"] > 0.6  # three standard errors above a coin


def test_the_reward_model_that_ships_is_a_good_judge():
    model, tokenizer = reward_model.load("abacus-3m", methods.REWARD_MODEL)
    pairs = judge_pairs(model, tokenizer, gold_pairs(held_out=True))
    assert pairs.accuracy.n >= 250 and pairs.accuracy.mean > 0.8
    rows = responses(held_out=True)
    answers = [(row, text) for row in rows for text in row["responses"]]
    said = [row["prompt"] + [{"role": "assistant", "content": text}] for row, text in answers]
    right = [problems.grade(text, row["question"], row["answer"]).strict for row, text in answers]
    scores = list(zip(reward_model.score(model, tokenizer, said), right, strict=True))
    area = auc([s for s, good in scores if good], [s for s, good in scores if not good])
    assert area > 0.85


def mean_of_last(run: runs.Run, name: str, n: int = 5) -> float:
    values = [row[name] for row in run.curve() if name in row][-n:]
    return sum(values) / len(values)


def test_ppo_learns_from_the_judge_while_the_kl_term_holds():
    near, loose = reversed(runs.find(method="ppo", notebook="04_rlhf_ppo", status="done"))
    assert strict(near.result) > strict(near.result["start"]) + 5
    # Without it the judge is at least as happy, and the truth is gone.
    judged = "rewards/reward-model/mean"
    assert mean_of_last(loose, judged) > mean_of_last(near, judged) - 0.2
    assert strict(loose.result) < strict(loose.result["start"]) - 10
    assert mean_of_last(loose, "kl/sequence") > 3 * mean_of_last(near, "kl/sequence")


def test_rloo_learns_from_the_same_judge():
    run = only_run("rloo", "04_rlhf_ppo")
    assert strict(run.result) > strict(run.result["start"]) + 5
