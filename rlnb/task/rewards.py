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


# --- rewards -------------------------------------------------------------------------------------


def correctness(
    completions: Sequence[Completion],
    question: Sequence[str] | None = None,
    answer: Sequence[int] | None = None,
    **columns: Any,
) -> list[float]:
    """1.0 for a completion in the strict format with the right answer and a true trace, else 0.0.

    The columns `question` and `answer` come from the data set (`rlnb.data.shapes.prompts` has both).
    """
    grades = _grades("correctness", completions, question, answer)
    return [float(grade.strict) for grade in grades]


def answer_only(
    completions: Sequence[Completion],
    question: Sequence[str] | None = None,
    answer: Sequence[int] | None = None,
    **columns: Any,
) -> list[float]:
    """1.0 for the right final answer, in whatever style and by whatever way, else 0.0."""
    grades = _grades("answer_only", completions, question, answer)
    return [float(grade.correct) for grade in grades]


def format_reward(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """1.0 for a completion in the strict format, be the answer right or wrong, else 0.0."""
    return [float(grade(text(completion), "", 0).format) for completion in completions]


def length(target: int, scale: float | None = None) -> Reward:
    """A reward for completions of `target` tokens: 0 there, down in a straight line on both sides
    to -1 at `scale` tokens from it (default: `target`), and -1 from there on.

    Tokens are counted in `completion_ids`, which TRL passes. The name is `length_<target>`.
    """
    scale = target if scale is None else scale
    if not (target >= 0 and 0 < scale < math.inf):
        raise ValueError(
            f"length(target={target}, scale={scale}): the target must be 0 or more tokens and the "
            "scale more than 0 (with target=0 give a scale)."
        )

    def reward(completions, completion_ids=None, **columns):
        _check_column("length", "completion_ids", completion_ids, len(completions))
        return [max(-1.0, -abs(len(ids) - target) / scale) for ids in completion_ids]

    return _named(reward, f"length_{target}")


def repetition(size: int = 3) -> Reward:
    """A penalty in (-1, 0] for saying the same again: minus the share of n-grams of `size` words
    that have occurred before, so 0 when no n-gram occurs twice.

    "Demystifying Long Chain-of-Thought Reasoning" (arXiv 2502.03373), appendix C.2, with words in
    place of tokens: here a token is one digit. The name is `repetition_<size>`.
    """
    if size < 1:
        raise ValueError(f"repetition(size={size}): an n-gram has at least 1 word.")

    def reward(completions, **columns):
        return [_repetition(text(completion).split(), size) for completion in completions]

    return _named(reward, f"repetition_{size}")


# --- combine and check ---------------------------------------------------------------------------


def combine(parts: Mapping[Reward, float], name: str | None = None) -> Reward:
    """One reward function: the weighted sum of several, each of them `checked`.

    None counts as nothing, as in TRL: the sum is None only where every part is None. The mean of
    each part before its weight is logged as `rewards/<name>/<part>`. Default name: the parts
    joined by "+".
    """
    for fn, weight in parts.items():
        if not math.isfinite(weight):
            raise ValueError(f"combine: the weight of {_name(fn)!r} is {weight}; give a number.")
    guarded = {_name(fn): (checked(fn), weight) for fn, weight in parts.items()}
    if not parts or len(guarded) < len(parts):
        raise ValueError(
            f"combine: got the rewards {[_name(fn) for fn in parts]}; give at least one, and each "
            "a name of its own (set fn.__name__)."
        )
    name = name or "+".join(guarded)

    def reward(completions, log_metric=None, **columns):
        totals: list[float | None] = [None] * len(completions)
        for part, (fn, weight) in guarded.items():
            values = fn(completions=completions, log_metric=log_metric, **columns)
            judged = [(i, value) for i, value in enumerate(values) if value is not None]
            for i, value in judged:
                totals[i] = (totals[i] or 0.0) + weight * value
            if log_metric and judged:
                log_metric(f"rewards/{name}/{part}", sum(v for _, v in judged) / len(judged))
        return totals

    return _named(reward, name)


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

    return _named(reward, _name(fn))


def _check_values(name: str, values: Any, completions: Sequence[Completion]) -> list[float | None]:
    n = len(completions)
    try:
        values = list(values)
    except TypeError as error:
        raise RewardError(
            f"reward {name!r} returned {_short(values)}: return a list of {n} numbers, one per "
            "completion."
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


# --- helpers -------------------------------------------------------------------------------------


def _grades(name: str, completions, question, answer) -> list[Grade]:
    _check_column(name, "question", question, len(completions))
    _check_column(name, "answer", answer, len(completions))
    for row, value in enumerate(answer):
        # A right answer of another type equals no answer given: every reward would be 0.
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise RewardError(
                f"reward {name!r}: answer {row} is {value!r}, not a whole number. Convert the "
                'column: dataset.map(lambda row: {"answer": int(row["answer"])}).'
            )
    rows = zip(completions, question, answer, strict=True)
    return [grade(text(completion), asked, int(right)) for completion, asked, right in rows]


def _check_column(name: str, column: str, values: Sequence | None, n: int) -> None:
    if values is None:
        way_out = (
            "TRL's trainers pass it; by hand, give completion_ids=[[...], ...]"
            if column == "completion_ids"
            else "add it to the data set (rlnb.data.shapes.prompts has it); "
            "the trainer passes every column on"
        )
        raise RewardError(f"reward {name!r} needs the column {column!r}, and got none: {way_out}.")
    if len(values) != n:
        raise RewardError(
            f"reward {name!r}: {n} completions, but {len(values)} values of {column!r}. Repeat "
            "each row once per completion."
        )


def _repetition(words: list[str], size: int) -> float:
    """Minus the share of n-grams that have occurred before; 0.0 if there is no n-gram at all."""
    total = len(words) - size + 1
    if total < 1:
        return 0.0
    return len({tuple(words[i : i + size]) for i in range(total)}) / total - 1.0


def _name(fn: Reward) -> str:
    """The name under which TRL logs a reward function."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return getattr(fn, "__name__", type(fn).__name__)


def _named(fn: Reward, name: str) -> Reward:
    fn.__name__ = fn.__qualname__ = name
    return fn


def _short(value: Any, width: int = 60) -> str:
    shown = repr(value)
    return shown if len(shown) <= width else shown[: width - 3] + "..."
