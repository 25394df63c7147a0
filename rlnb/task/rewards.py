"""Reward functions for TRL's GRPO and RLOO trainers, and a guard around those that readers write.

A reward function gets `prompts`, `completions`, every column of the data set and more by keyword, and
returns one number per completion, or None for one that it cannot judge. What it does not need it swallows
in `**columns`. A completion is a string or, for conversational prompts, a list of messages such as
`[{"role": "assistant", "content": "..."}]`.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlnb.task.grading import Grade, grade

Completion = str | Sequence[Mapping[str, Any]]
Reward = Callable[..., list[float | None]]


class RewardError(ValueError):
    """A reward function that failed, or returned something that no trainer can use."""


def text(completion: Completion) -> str:
    """The text of a completion: itself, or the content of its last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def correctness(
    completions: Sequence[Completion], question: Sequence[str], answer: Sequence[int], **columns: Any
) -> list[float]:
    """1.0 for a completion in the strict format with the right answer and a true trace, else 0.0.

    The columns `question` and `answer` come from the data set (`rlnb.data.shapes.prompts` has both).
    """
    return [float(grade.strict) for grade in _grades("correctness", completions, question, answer)]


def answer_only(
    completions: Sequence[Completion], question: Sequence[str], answer: Sequence[int], **columns: Any
) -> list[float]:
    """1.0 for the right final answer, in whatever style and by whatever way, else 0.0."""
    return [float(grade.correct) for grade in _grades("answer_only", completions, question, answer)]


def format_reward(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """1.0 for a completion in the strict format, be the answer right or wrong, else 0.0."""
    return [float(grade(text(completion), "", 0).format) for completion in completions]


def _grades(name: str, completions, question: Sequence[str], answer: Sequence[int]) -> list[Grade]:
    for row, value in enumerate(answer):
        # A right answer of another type equals no answer given: every reward would be 0.
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise RewardError(
                f"reward {name!r}: answer {row} is {value!r}, not a whole number. Convert the "
                'column: dataset.map(lambda row: {"answer": int(row["answer"])}).'
            )
    rows = zip(completions, question, answer, strict=True)
    return [grade(text(completion), asked, int(right)) for completion, asked, right in rows]


def checked(fn: Reward) -> Reward:
    """The same reward function, but a RewardError names it, and says where and what is wrong, when
    it raises or returns NaN, an infinity, something that is no number, or too few or many values.
    """
    if not callable(fn):
        raise TypeError(f"the reward {fn!r:.60} is no function")
    name = getattr(fn, "__name__", type(fn).__name__)  # under which TRL logs it
    if inspect.iscoroutinefunction(fn):
        raise TypeError(f"reward {name!r} is async: give it to the trainer as it is.")

    @functools.wraps(fn)
    def reward(completions, **columns):
        n = len(completions)
        try:
            values = list(fn(completions=completions, **columns))
        except RewardError:
            raise  # names its reward already
        except Exception as error:
            raise RewardError(
                f"reward {name!r} raised {type(error).__name__}: {error}. It was given {n} completions and "
                f"{', '.join(columns) or 'no columns'}: it must return a list of {n} numbers, None for a "
                "completion that it cannot judge."
            ) from error
        if len(values) != n:
            raise RewardError(f"reward {name!r} returned {len(values)} values for {n} completions: return one "
                              "per completion, None for one that it cannot judge.")  # fmt: skip
        return [_number(name, i, value, completions[i]) for i, value in enumerate(values)]

    reward.__name__ = reward.__qualname__ = name
    return reward


def _number(name: str, index: int, value: Any, completion: Completion) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)  # takes 0-d tensors
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if math.isfinite(number):
        return number
    raise RewardError(
        f"reward {name!r} returned {value!r:.60} for completion {index}, {completion!r:.60}: "
        "return a finite number, or None if it cannot judge this one."
    )
