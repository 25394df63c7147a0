"""Data sets in TRL's shapes, from problems or from elsewhere, and errors that name what is wrong.

Every prompt and completion is conversational: a list of {"role": ..., "content": ...} messages, to
which the trainer applies the model's own chat template. A data set from elsewhere comes in through
``read``, or through ``validate`` if it is in memory, and then goes into the same trainers.
"""

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlnb.task import problems as tasks
from rlnb.task.problems import Problem

if TYPE_CHECKING:
    from datasets import Dataset  # the library: an absolute import never means this file

# What a trainer needs in each shape; any other column is handed to the reward functions.
SHAPES = {
    "prompt-completion": ("prompt", "completion"),  # SFT
    "prompts": ("prompt",),  # GRPO, PPO
    "preference": ("prompt", "chosen", "rejected"),  # reward model, DPO, ORPO
    "unpaired": ("prompt", "completion", "label"),  # KTO: good (True) or bad (False)
}
ENDINGS = ("completion", "chosen", "rejected")  # the columns that hold what the assistant says

# --- build ---------------------------------------------------------------------------------------


def prompt_completion(problems: Sequence[Problem], system: str | None = None) -> "Dataset":
    """Demonstrations for SFTTrainer: columns prompt and completion, the right solution."""
    rows = ({"prompt": tasks.prompt(p, system), "completion": tasks.solution(p)} for p in problems)
    return _dataset("prompt-completion", map(conversational, rows))


def prompts(problems: Sequence[Problem], system: str | None = None) -> "Dataset":
    """Prompts for GRPOTrainer, with what the reward functions read: id, kind, question, answer."""
    rows = (
        {"prompt": tasks.prompt(p, system), "id": p.id, "kind": p.kind, "question": p.question,
         "answer": p.answer} for p in problems
    )  # fmt: skip
    return _dataset("prompts", rows)


def preference(rows: Iterable[Mapping[str, Any]]) -> "Dataset":
    """Pairs for RewardTrainer, DPOTrainer and ORPOTrainer: columns prompt, chosen, rejected.

    rows: mappings with these, as text or messages (``conversational``); other columns stay.
    """
    return _dataset("preference", map(conversational, rows))


def unpaired(rows: Iterable[Mapping[str, Any]]) -> "Dataset":
    """Labelled completions for KTOTrainer: columns prompt, completion, label (True is good).

    rows as for ``preference``. Their order stays, and KTOTrainer keeps to it: mix the labels before.
    """
    return _dataset("unpaired", map(conversational, rows))


def subset(problems: "Sequence | Dataset", n: int, seed: int = 0) -> "list | Dataset":
    """n of the problems, without repetition; under one seed a larger subset begins with a smaller.

    Takes any sequence, and a Dataset, which gives a Dataset.
    Raises ValueError unless 1 <= n <= len(problems).
    """
    if not 1 <= n <= len(problems):
        raise ValueError(f"n={n} problems are asked for: 1 to {len(problems)} can be given")
    order = list(range(len(problems)))
    random.Random(seed).shuffle(order)
    if hasattr(problems, "select"):
        return problems.select(order[:n])
    return [problems[i] for i in order[:n]]


def _dataset(shape: str, rows: Iterable[dict[str, Any]]) -> "Dataset":
    return _load(list(_checked(_numbered(rows), shape)))


def _load(rows: list[dict[str, Any]], name: str = "") -> "Dataset":
    import pyarrow
    from datasets import Dataset

    columns = dict.fromkeys(column for row in rows for column in row)
    try:
        return Dataset.from_list([{c: row.get(c) for c in columns} for row in rows])
    except (pyarrow.ArrowException, TypeError, UnicodeError) as error:
        raise ValueError(f"{name}the rows do not fit into columns: {error}") from error


# --- read ----------------------------------------------------------------------------------------


def read(source: str | Path, shape: str, split: str = "train", **options: Any) -> "Dataset":
    """A data set in one of SHAPES from a .jsonl or .parquet file, a folder, or "owner/name".

    "owner/name" is a data set on the Hugging Face hub, which is asked only if there is no such
    folder here. It and a folder are read by datasets.load_dataset, which gets split and options.
    Plain strings become messages, and preferences whose prompt is implicit (the messages that
    chosen and rejected share) get it as a column.

    Raises FileNotFoundError, ConnectionError, and ValueError as ``validate`` does, with the file
    and the line in front.
    """
    _check_shape(shape)
    convert = explicit if shape == "preference" else conversational
    places = (
        (where, convert(row) if isinstance(row, dict) else row)
        for where, row in _places(source, split, options)
    )
    name = f"{Path(source).name if Path(source).is_file() else source}: "
    return _load(list(_checked(places, shape, name)), name)


def conversational(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose texts are messages: the prompt the user's, the other columns the assistant's."""
    roles = {"prompt": "user", **dict.fromkeys(ENDINGS, "assistant")}
    return {
        column: [{"role": roles[column], "content": value}]
        if column in roles and isinstance(value, str)
        else value
        for column, value in row.items()
    }


def explicit(row: Mapping[str, Any]) -> dict[str, Any]:
    """A preference with its prompt in a column of its own, as messages.

    As in TRL, the prompt is what chosen and rejected share at their start, if there is no prompt
    column or if that is a string beside messages. The last message is never part of the prompt.
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    hidden = isinstance(chosen, list) and isinstance(rejected, list)
    if hidden and not isinstance(row.get("prompt"), list):
        most = max(0, min(len(chosen), len(rejected)) - 1)
        shared = next((i for i in range(most) if chosen[i] != rejected[i]), most)
        if shared:
            row = {**row, "prompt": chosen[:shared], "chosen": chosen[shared:],
                   "rejected": rejected[shared:]}  # fmt: skip
    return conversational(row)


def _places(source: str | Path, split: str, options: dict) -> Iterator[tuple[str, Any]]:
    """The rows of a source, each with the place where it stands."""
    path = Path(source)
    if path.is_file() and path.suffix == ".jsonl":
        return lines(path)
    if path.is_file() and path.suffix == ".parquet":
        return _numbered(_records(path), f"{path.name}, ")
    if path.is_file():
        raise ValueError(f"{path.name}: a data set is a .jsonl or .parquet file, not {path.suffix}")
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source))
    if not path.is_dir() and (not on_hub or path.suffix in (".json", ".jsonl", ".parquet", ".csv")):
        raise FileNotFoundError(
            f"there is no file or folder {str(source)!r}; a data set on the hub is 'owner/name'"
        )
    from datasets import load_dataset

    return _numbered(load_dataset(str(source), split=split, **options), f"{source}, ")


def lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a JSONL file, each with the file and the line where it stands.

    Raises ValueError, with these, for what is no JSON or no UTF-8.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path.name}, line {number}"
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{where}: {error} in {_short(line)}") from error
                yield where, row


def _records(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path.name}: {error}") from error


def _numbered(rows: Iterable[Any], name: str = "") -> Iterator[tuple[str, Any]]:
    return ((f"{name}row {i}", row) for i, row in enumerate(rows))


# --- check ---------------------------------------------------------------------------------------


def validate(rows: Iterable[Mapping[str, Any]], shape: str) -> int:
    """Check every row of a data set against a shape of SHAPES, and return how many there are.

    Raises ValueError, naming the row (counted from 0), the field and its value, for a column that
    is missing, messages that are none, an empty text, roles in another order than
    [system,] user, assistant, ..., user for the prompt and one assistant for the rest, chosen and
    rejected that are equal, and labels that are not true or false or are all the same.
    """
    _check_shape(shape)
    return sum(1 for _ in _checked(_numbered(rows), shape))


def check_lengths(dataset: Iterable[Mapping[str, Any]], tokenizer: Any, max_length: int) -> int:
    """Print and return how many rows have more than max_length tokens, chat template included.

    The length of a pair is that of its longer side. Nothing is left out here, but the trainers do,
    and say nothing (TRL 1.15): RewardTrainer drops such rows, the others cut them, and DPO and KTO
    drop those whose prompt alone has max_length.
    """
    lengths = []
    for row in dataset:
        whole = [row["prompt"] + row[column] for column in ENDINGS if column in row]
        ids = tokenizer.apply_chat_template(
            whole or [row["prompt"]],
            add_generation_prompt=not whole,
            tokenize=True,
            return_dict=True,
        )["input_ids"]
        lengths.append(max(map(len, ids)))
    over = [i for i, length in enumerate(lengths) if length > max_length]
    rows = ", ".join(map(str, over[:5])) + (", ..." if len(over) > 5 else "")
    print(
        f"{len(over)} of {len(lengths)} rows have more than {max_length} tokens"
        + (f" (rows {rows})" if over else "")
        + f"; the longest has {max(lengths, default=0)}."
    )
    return len(over)


def _check_shape(shape: str) -> None:
    if shape not in SHAPES:
        raise ValueError(f"there is no shape {shape!r}; there are {', '.join(SHAPES)}")


def _checked(places: Iterable[tuple[str, Any]], shape: str, name: str = "") -> Iterator[dict]:
    """The rows as they come, each after it was checked, and at the end what concerns them all."""
    count, labels = 0, set()
    for where, row in places:
        check_row(row, shape, where)
        count += 1
        if shape == "unpaired":
            labels.add(row["label"])
        yield row
    if not count:
        raise ValueError(f"{name}a data set of shape {shape} needs a row, and there is none")
    if len(labels) == 1:
        raise ValueError(
            f"{name}label is {labels.pop()} in all {count} rows: KTO learns from good and bad ones, "
            "so it needs both"
        )


def check_row(row: Any, shape: str, where: str) -> None:
    """What ``validate`` checks of one row; ``where`` it stands is told in front of the error."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: {_short(row)} is not an object with columns")
    for column in SHAPES[shape]:
        if column not in row:
            raise ValueError(
                f"{where}: no column {column!r}, there are {', '.join(row) or 'none'}; "
                f"shape {shape} needs {', '.join(SHAPES[shape])}"
            )
        if column != "label":
            _check_messages(row[column], f"{where}, {column}", of_prompt=column == "prompt")
        elif not isinstance(row[column], bool):
            raise ValueError(f"{where}, label: {_short(row[column])} is not true or false")
    if shape == "preference" and row["chosen"] == row["rejected"]:
        text = _short(row["chosen"][0]["content"])
        raise ValueError(
            f"{where}: chosen and rejected are both {text}: a pair needs two responses"
        )


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
