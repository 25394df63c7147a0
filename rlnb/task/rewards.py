"""Reward functions for TRL's GRPO and RLOO trainers, and a guard around those that readers write.

A reward function gets, by keyword, `prompts`, `completions`, `completion_ids`, every column of the
data set, `trainer_state`, `log_extra` and `log_metric`, and returns one number per completion, or
None for a completion that it cannot judge. It takes what it needs and swallows the rest in
`**columns`. By hand, `completions` may come first: `format_reward(["<reasoning>..."])`.

A completion is a string or, for conversational prompts, a list of messages such as
`[{"role": "assistant", "content": "..."}]`.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlnb.task.problems import Grade, grade

Completion = str | Sequence[Mapping[str, Any]]
Reward = Callable[..., list[float | None]]


class RewardError(ValueError):
    """A reward function that failed, or returned something that no trainer can use."""


def text(completion: Completion) -> str:
    """The text of a completion: itself, or the content of its last message."""
    if isinstance(completion, str):
        return completion
    try:
        content = completion[-1]["content"]
    except (IndexError, KeyError, TypeError):
        content = None
    if isinstance(content, str):
        return content
    raise RewardError(
        f"no text in the completion {_short(completion)}: expected a string, or messages such as "
        '[{"role": "assistant", "content": "..."}].'
    )


def correctness(
    completions: Sequence[Completion], question: Sequence[str] | None = None,
    answer: Sequence[int] | None = None, **columns: Any,
) -> list[float]:
    """1.0 for a completion in the strict format with the right answer and a true trace, else 0.0.

    The columns `question` and `answer` come from the data set (`rlnb.data.shapes.prompts` has both).
    """
    return [float(grade.strict) for grade in _grades("correctness", completions, question, answer)]


def answer_only(
    completions: Sequence[Completion], question: Sequence[str] | None = None,
    answer: Sequence[int] | None = None, **columns: Any,
) -> list[float]:
    """1.0 for the right final answer, in whatever style and by whatever way, else 0.0."""
    return [float(grade.correct) for grade in _grades("answer_only", completions, question, answer)]


def format_reward(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """1.0 for a completion in the strict format, be the answer right or wrong, else 0.0."""
    return [float(grade(text(completion), "", 0).format) for completion in completions]


def checked(fn: Reward) -> Reward:
    """The same reward function, but a RewardError names it, and says where and what is wrong, when
    it raises or returns NaN, an infinity, something that is no number, or too few or many values.
    """
    if inspect.iscoroutinefunction(fn):
        raise TypeError(f"reward {_name(fn)!r} is async: give it to the trainer as it is.")

    @functools.wraps(fn)
    def reward(completions, **columns):
        try:
            values = fn(completions=completions, **columns)
        except RewardError:
            raise  # names its reward already
        except Exception as error:
            raise RewardError(
                f"reward {_name(fn)!r} raised {type(error).__name__}: {error}. It was given "
                f"{len(completions)} completions and {', '.join(columns) or 'no columns'}. Mend "
                "it, or let it return None for a completion that it cannot judge."
            ) from error
        return _check_values(_name(fn), values, completions)

    reward.__name__ = reward.__qualname__ = _name(fn)
    return reward


def _check_values(name: str, values: Any, completions: Sequence[Completion]) -> list[float | None]:
    n = len(completions)
    try:
        values = list(values)
    except TypeError as error:
        raise RewardError(
            f"reward {name!r} returned {_short(values)}: return a list of {n} numbers, one per completion."
        ) from error
    if len(values) != n:
        raise RewardError(
            f"reward {name!r} returned {len(values)} values for {n} completions: return one per "
            "completion, None for one that it cannot judge."
        )
    return [_check_value(name, i, value, completions[i]) for i, value in enumerate(values)]


def _check_value(name: str, index: int, value: Any, completion: Completion) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)  # takes 0-d tensors
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if math.isfinite(number):
        return number
    raise RewardError(
        f"reward {name!r} returned {_short(value)} for completion {index}, {_short(completion)}: "
        "return a finite number, or None if it cannot judge this one."
    )


def _grades(name: str, completions, question, answer) -> list[Grade]:
    for column, values in (("question", question), ("answer", answer)):
        got = "none" if values is None else len(values)
        if got != len(completions):
            raise RewardError(
                f"reward {name!r} needs the column {column!r}, a value for each of the {len(completions)} "
                f"completions, and got {got}. The trainer passes every column of the data set on "
                "(rlnb.data.shapes.prompts has it); by hand, repeat each row once per completion."
            )
    for row, value in enumerate(answer):
        # A right answer of another type equals no answer given: every reward would be 0.
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise RewardError(
                f"reward {name!r}: answer {row} is {value!r}, not a whole number. Convert the "
                'column: dataset.map(lambda row: {"answer": int(row["answer"])}).'
            )
    rows = zip(completions, question, answer, strict=True)
    return [grade(text(completion), asked, int(right)) for completion, asked, right in rows]


def _name(fn: Reward) -> str:
    """The name under which TRL logs a reward function."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return getattr(fn, "__name__", type(fn).__name__)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
