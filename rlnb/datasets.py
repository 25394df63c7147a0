"""Problems as data sets in TRL's shapes, and a validator that names what is wrong with a row.

Every prompt and completion is conversational: a list of {"role": ..., "content": ...} messages, to
which the trainer applies the model's own chat template. A data set from elsewhere in the same shape
goes through ``validate`` and then into the same trainers.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlnb import problems as tasks
from rlnb.problems import Problem

if TYPE_CHECKING:
    from datasets import Dataset  # the library: an absolute import never means this file

# What a trainer needs in each shape; any other column is handed to the reward functions.
SHAPES = {"prompt-completion": ("prompt", "completion"), "prompts": ("prompt",)}


def prompt_completion(problems: Sequence[Problem], system: str | None = None) -> "Dataset":
    """Demonstrations for SFTTrainer: columns prompt and completion, the right solution."""
    return _dataset(
        "prompt-completion",
        (
            {
                "prompt": tasks.prompt(problem, system),
                "completion": [{"role": "assistant", "content": tasks.solution(problem)}],
            }
            for problem in problems
        ),
    )


def prompts(problems: Sequence[Problem], system: str | None = None) -> "Dataset":
    """Prompts for GRPOTrainer, with what the reward functions read: id, kind, question, answer."""
    return _dataset(
        "prompts",
        (
            {
                "prompt": tasks.prompt(problem, system),
                "id": problem.id,
                "kind": problem.kind,
                "question": problem.question,
                "answer": problem.answer,
            }
            for problem in problems
        ),
    )


def subset(problems: Sequence[Problem], n: int, seed: int = 0) -> list[Problem]:
    """n of the problems, without repetition; under one seed a larger subset begins with a smaller.

    Raises ValueError unless 1 <= n <= len(problems).
    """
    if not 1 <= n <= len(problems):
        raise ValueError(f"n={n} problems are asked for: 1 to {len(problems)} can be given")
    order = list(range(len(problems)))
    random.Random(seed).shuffle(order)
    return [problems[i] for i in order[:n]]


def validate(rows: Iterable[Mapping[str, Any]], shape: str) -> int:
    """Check every row of a data set against a shape of SHAPES, and return how many there are.

    Raises ValueError, naming the row (counted from 0), the field and its value, for a column that
    is missing, messages that are none, an empty text, or roles in another order than
    [system,] user, assistant, ..., user for the prompt and one assistant for the completion.
    """
    if shape not in SHAPES:
        raise ValueError(f"there is no shape {shape!r}; there are {', '.join(SHAPES)}")
    count = 0
    for count, row in enumerate(rows, 1):
        where = f"row {count - 1}"
        for column in SHAPES[shape]:
            if column not in row:
                raise ValueError(
                    f"{where}: no column {column!r}, there are {', '.join(row) or 'none'}; "
                    f"shape {shape} needs {', '.join(SHAPES[shape])}"
                )
            _check_messages(row[column], f"{where}, {column}", of_prompt=column == "prompt")
    if not count:
        raise ValueError(f"a data set of shape {shape} needs a row, and there is none")
    return count


def _dataset(shape: str, rows: Iterable[dict[str, Any]]) -> "Dataset":
    from datasets import Dataset

    rows = list(rows)
    validate(rows, shape)
    return Dataset.from_list(rows)


def _check_messages(messages: Any, where: str, of_prompt: bool) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: {_short(messages)} is not a list of messages")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"{where}, message {i}: {_short(message)} needs a role and a content")
        content = message["content"]
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"{where}, message {i}, content: {_short(content)} is no text")
    roles = [message["role"] for message in messages]
    turns = roles[1:] if of_prompt and roles[0] == "system" else roles
    if of_prompt:
        wanted = "[system,] user, assistant, ..., user"
        good = len(turns) % 2 and turns == (["user", "assistant"] * len(turns))[: len(turns)]
    else:
        wanted, good = "one assistant message", turns == ["assistant"]
    if not good:
        raise ValueError(f"{where}: the roles are {', '.join(map(str, roles))}, not {wanted}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
