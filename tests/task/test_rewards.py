"""Reward functions: values by hand, both shapes of completion, and the text of every error."""

import math

import numpy as np
import pytest
import torch

from rlnb.task import problems, rewards

QUESTION = "Mia has 12 pens. She buys 5 more and gives away 3. How many pens has she now?"
GOLD = "<reasoning>12 + 5 = 17; 17 - 3 = 14</reasoning><answer>14</answer>"
WRONG = "<reasoning>12 + 5 = 17</reasoning><answer>17</answer>"
FALSE_TRACE = "<reasoning>12 + 3 = 14</reasoning><answer>14</answer>"
BARE = "12 + 5 = 17, 17 - 3 = 14. The answer is 14"
COLUMNS = {"question": [QUESTION] * 4, "answer": [14] * 4, "kind": ["change"] * 4}
EXAMPLES = [GOLD, WRONG, FALSE_TRACE, BARE]


def as_messages(texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


@pytest.mark.parametrize("shape", [list, as_messages])
def test_values_by_hand_for_strings_and_messages(shape):
    given = {"prompts": ["p"] * 4, "completions": shape(EXAMPLES), **COLUMNS}
    assert rewards.correctness(**given) == [1.0, 0.0, 0.0, 0.0]
    assert rewards.answer_only(**given) == [1.0, 0.0, 1.0, 1.0]
    assert rewards.format_reward(**given) == [1.0, 1.0, 1.0, 0.0]


def test_gold_solutions_earn_everything():
    gold = problems.generate("validation", 24)
    columns = {"question": [p.question for p in gold], "answer": [p.answer for p in gold]}
    completions = [problems.solution(p) for p in gold]
    assert rewards.correctness(completions, **columns) == [1.0] * 24
    assert rewards.format_reward(completions) == [1.0] * 24


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: rewards.correctness([GOLD], question=[QUESTION], answer=["14"]),
            r"answer 0 is '14', not a whole number.*dataset\.map",
        ),
    ],
)
def test_bad_columns_and_completions_are_named(call, message):
    with pytest.raises(rewards.RewardError, match=message):
        call()


def test_checked_lets_good_values_through():
    values = [1, True, None, np.float32(0.5), torch.tensor(0.25)]

    def fine(completions, **columns):
        return values

    reward = rewards.checked(fine)
    assert reward(completions=["x"] * 5) == [1.0, 1.0, None, 0.5, 0.25]
    assert reward.__name__ == "fine"
    assert rewards.checked(lambda completions, **_: np.ones(2))(completions=["x"] * 2) == [1.0] * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, math.nan], r"'mine' returned nan for completion 1, 'two': return a finite number"),
        ([math.inf, 1.0], r"returned inf for completion 0, 'one'"),
        ([1.0, "1.0"], r"returned '1\.0' for completion 1"),
        ([[1.0], 1.0], r"returned \[1\.0\] for completion 0"),
        ([1.0, torch.ones(2)], r"returned tensor\(\[1\., 1\.\]\) for completion 1"),
        ([1.0], r"'mine' returned 1 values for 2 completions.*None for one"),
        (1.0, r"'float' object is not iterable.*it must return a list of 2 numbers"),
        (None, r"'NoneType' object is not iterable.*it must return a list of 2 numbers"),
    ],
)
def test_checked_names_the_reward_the_place_and_the_value(values, message):
    def mine(completions, **columns):
        return values

    with pytest.raises(rewards.RewardError, match=message):
        rewards.checked(mine)(completions=["one", "two"])


def test_checked_chains_what_the_reward_raised():
    def mine(prompts, completions, **columns):
        return [1 / 0]

    with pytest.raises(rewards.RewardError, match=r"'mine' raised ZeroDivisionError") as caught:
        rewards.checked(mine)(prompts=["p"], completions=["one"], kind=["gain"])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "1 completions and prompts, kind" in str(caught.value)


def test_checked_keeps_an_error_that_names_its_reward():
    with pytest.raises(rewards.RewardError, match=r"^reward 'correctness': answer 0 is '14'"):
        rewards.checked(rewards.correctness)(completions=[GOLD], question=[QUESTION], answer=["14"])


def test_checked_refuses_async_rewards_at_once():
    async def slow(completions, **columns):
        return [1.0]

    with pytest.raises(TypeError, match="'slow' is async"):
        rewards.checked(slow)


def test_they_take_all_that_trl_passes():
    guarded = [rewards.checked(fn) for fn in (rewards.format_reward, rewards.correctness)]
    assert [fn.__name__ for fn in guarded] == ["format_reward", "correctness"]  # TRL logs these
    given = {"prompts": [[]] * 4, "completions": as_messages(EXAMPLES), **COLUMNS}
    given |= {"completion_ids": [[1] * 9] * 4, "trainer_state": None, "log_extra": None}
    for fn in guarded:
        values = fn(log_metric=None, **given)
        assert len(values) == 4 and all(isinstance(value, float) for value in values)
