"""Reward functions: values by hand, both shapes of completion, and the text of every error."""

import functools
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


def ones(completions, **columns):
    return [1.0] * len(completions)


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


def test_length_counts_tokens_and_stops_at_minus_one():
    ids = [[0] * n for n in (10, 5, 15, 0, 40)]
    values = rewards.length(10)(completions=[""] * 5, completion_ids=ids)
    assert values == [0.0, -0.5, -0.5, -1.0, -1.0]
    assert math.copysign(1, values[0]) == 1  # no "-0.0" in a table
    assert rewards.length(10, scale=20)(completions=[""], completion_ids=[[0] * 20]) == [-0.5]
    assert rewards.length(10).__name__ == "length_10"


def test_repetition_is_the_share_of_repeated_ngrams():
    reward = rewards.repetition(size=2)
    texts = ["a b c d", "a a a a a", "a b a b", "a", ""]
    assert reward(completions=texts) == pytest.approx([0.0, -0.75, -1 / 3, 0.0, 0.0])
    assert reward(completions=as_messages(texts)) == reward(completions=texts)
    assert rewards.repetition(3)(completions=["go on " * 5000])[0] > -1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rewards.length(-1), r"length\(target=-1.*0 or more tokens"),
        (lambda: rewards.length(0), r"with target=0 give a scale"),
        (lambda: rewards.length(5, scale=math.nan), r"scale=nan"),
        (lambda: rewards.repetition(0), r"repetition\(size=0\).*at least 1 word"),
    ],
)
def test_factories_check_their_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rewards.correctness([GOLD], answer=[14]), r"'correctness' needs the column 'q"),
        (lambda: rewards.answer_only([GOLD], question=[QUESTION]), r"needs the column 'answer'"),
        (lambda: rewards.length(9)([GOLD]), r"needs the column 'completion_ids'.*TRL's trainers"),
        (
            lambda: rewards.correctness([GOLD, GOLD], question=[QUESTION], answer=[14]),
            r"2 completions, but 1 values of 'question'",
        ),
        (
            lambda: rewards.correctness([GOLD], question=[QUESTION], answer=["14"]),
            r"answer 0 is '14', not a whole number.*dataset\.map",
        ),
        (lambda: rewards.format_reward([[]]), r"no text in the completion \[\]"),
        (lambda: rewards.format_reward([[{"role": "assistant", "content": None}]]), r"no text.*None"),
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
    assert rewards.checked(functools.partial(fine)).__name__ == "fine"
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
        (1.0, r"returned 1\.0: return a list of 2 numbers"),
        (None, r"returned None: return a list of 2 numbers"),
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
    with pytest.raises(rewards.RewardError, match=r"^reward 'correctness' needs the column"):
        rewards.checked(rewards.correctness)(completions=[GOLD])


def test_checked_refuses_async_rewards_at_once():
    async def slow(completions, **columns):
        return [1.0]

    with pytest.raises(TypeError, match="'slow' is async"):
        rewards.checked(slow)


def test_combine_weighs_and_logs_the_parts():
    logged = {}
    reward = rewards.combine({rewards.correctness: 1.0, rewards.format_reward: 0.2}, name="total")
    values = reward(completions=EXAMPLES, log_metric=logged.__setitem__, **COLUMNS)
    assert values == pytest.approx([1.2, 0.2, 0.2, 0.0])
    assert logged == {"rewards/total/correctness": 0.25, "rewards/total/format": 0.75}
    assert reward.__name__ == "total"
    assert rewards.combine({rewards.correctness: 1, ones: 1}).__name__ == "correctness+ones"


def test_combine_treats_none_as_trl_does():
    def sometimes(completions, **columns):
        return [2.0, None]

    alone = rewards.combine({sometimes: 0.5})
    assert alone(completions=["a", "b"]) == [1.0, None]
    both = rewards.combine({sometimes: 0.5, ones: 1.0})
    assert both(completions=["a", "b"]) == [2.0, 1.0]


def test_combine_names_the_part_that_fails():
    def broken(completions, **columns):
        return [math.nan] * len(completions)

    with pytest.raises(rewards.RewardError, match="'broken' returned nan for completion 0"):
        rewards.combine({ones: 1.0, broken: 0.1})(completions=["x"])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, r"got the rewards \[\]; give at least one"),
        ({lambda **c: [1.0]: 1.0, lambda **c: [2.0]: 1.0}, r"<lambda>.*a name of its own"),
        ({ones: math.nan}, r"the weight of 'ones' is nan"),
    ],
)
def test_combine_checks_its_parts(parts, message):
    with pytest.raises(ValueError, match=message):
        rewards.combine(parts)


def test_they_take_all_that_trl_passes():
    total = rewards.combine({rewards.correctness: 1.0, rewards.length(9): 0.1}, name="total")
    guarded = [rewards.checked(rewards.format_reward), rewards.repetition(4), total]
    assert [fn.__name__ for fn in guarded] == ["format", "repetition_4", "total"]  # TRL logs these
    given = {"prompts": [[]] * 4, "completions": as_messages(EXAMPLES), **COLUMNS}
    given |= {"completion_ids": [[1] * 9] * 4, "trainer_state": None, "log_extra": None}
    for fn in guarded:
        values = fn(log_metric=None, **given)
        assert len(values) == 4 and all(isinstance(value, float) for value in values)
