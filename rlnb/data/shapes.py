"""Data sets in TRL's shapes, from problems or from elsewhere, and errors that name what is wrong.

Every prompt and completion is conversational: a list of {"role": ..., "content": ...} messages, to
which the trainer applies the model's own chat template. A data set from elsewhere comes in through
``read``, or through ``preference`` and ``unpaired`` if it is in memory.
"""

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlnb.task import problems as task
from rlnb.task.problems import Problem

if TYPE_CHECKING:
    from datasets import Dataset

# What a trainer needs in each shape; any other column is handed to the reward functions.
SHAPES = {
    "prompt-completion": ("prompt", "completion"),  # SFT
    "prompts": ("prompt",),  # GRPO, PPO
    "preference": ("prompt", "chosen", "rejected"),  # reward model, DPO, ORPO
    "unpaired": ("prompt", "completion", "label"),  # KTO: good (True) or bad (False)
}
ROLES = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}


def prompt_completion(problems: Sequence[Problem]) -> "Dataset":
    """Demonstrations for SFTTrainer: columns prompt and completion, the right solution."""
    rows = [{"prompt": task.prompt(p), "completion": task.solution(p)} for p in problems]
    return _build("prompt-completion", _numbered(rows))


def prompts(problems: Sequence[Problem]) -> "Dataset":
    """Prompts for GRPOTrainer, with what the reward functions read: id, kind, question, answer."""
    columns = ("id", "kind", "question", "answer")
    rows = [{"prompt": task.prompt(p)} | {c: getattr(p, c) for c in columns} for p in problems]
    return _build("prompts", _numbered(rows))


def preference(rows: Iterable[Mapping[str, Any]]) -> "Dataset":
    """Pairs for RewardTrainer, DPOTrainer and ORPOTrainer: columns prompt, chosen, rejected.

    rows: mappings with these, each as text or as messages; other columns stay.
    Raises ValueError, naming row, field and value, for what no trainer can use.
    """
    return _build("preference", _numbered(rows))


def unpaired(rows: Iterable[Mapping[str, Any]]) -> "Dataset":
    """Labelled completions for KTOTrainer: columns prompt, completion, label (True is good).

    rows as for ``preference``. Their order stays, and KTOTrainer keeps to it: mix the labels before.
    """
    return _build("unpaired", _numbered(rows))


def subset(problems: "Sequence | Dataset", n: int, seed: int = 0) -> "list | Dataset":
    """n of the problems, or of a Dataset's rows; under one seed a larger subset begins with a smaller.

    Raises ValueError unless 1 <= n <= len(problems).
    """
    if not 1 <= n <= len(problems):
        raise ValueError(f"n={n} problems are asked for: 1 to {len(problems)} can be given")
    order = list(range(len(problems)))
    random.Random(seed).shuffle(order)
    return problems.select(order[:n]) if hasattr(problems, "select") else [problems[i] for i in order[:n]]


def read(source: str | Path, shape: str, split: str = "train", **options: Any) -> "Dataset":
    """A data set in one of SHAPES from a .jsonl or .parquet file, a folder, or "owner/name".

    "owner/name" is a data set on the Hugging Face hub, which is asked only if there is no such
    folder here. It and a folder are read by datasets.load_dataset, which gets split and options.
    Plain strings become messages, and preferences whose prompt is implicit (the messages that
    chosen and rejected share) get it as a column.

    Raises FileNotFoundError, ConnectionError, and ValueError with the place (the file and the line),
    the field and its value: for a column that is missing, messages that are none, an empty text,
    roles other than [system,] user, assistant, ..., user in the prompt and one assistant in the rest,
    chosen and rejected that are equal, and labels that are not true or false or all the same.
    """
    if shape not in SHAPES:
        raise ValueError(f"there is no shape {shape!r}; there are {', '.join(SHAPES)}")
    name = f"{Path(source).name if Path(source).is_file() else source}: "
    return _build(shape, _places(source, split, options), name)


def _build(shape: str, places: Iterable[tuple[str, Any]], name: str = "") -> "Dataset":
    """The rows, each with the place where it stands, checked one by one and then together."""
    import pyarrow
    from datasets import Dataset

    rows = []
    for where, row in places:
        rows.append(_conversational(row) if isinstance(row, Mapping) else row)
        check_row(rows[-1], shape, where)
    if not rows:
        raise ValueError(f"{name}a data set of shape {shape} needs a row, and there is none")
    if shape == "unpaired" and len({row["label"] for row in rows}) == 1:
        raise ValueError(
            f"{name}label is {rows[0]['label']} in all {len(rows)} rows: KTO learns from good and bad "
            "ones, so it needs both"
        )
    columns = dict.fromkeys(column for row in rows for column in row)
    try:
        return Dataset.from_list([{c: row.get(c) for c in columns} for row in rows])
    except (pyarrow.ArrowException, TypeError, UnicodeError) as error:
        raise ValueError(f"{name}the rows do not fit into columns: {error}") from error


def _conversational(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose texts are messages: the prompt the user's, the other columns the assistant's.

    As in TRL, whose function drops other columns, the prompt is what chosen and rejected share at their
    start, if there is no prompt column or if that is a string beside messages.
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(row.get("prompt"), list):
        most = max(0, min(len(chosen), len(rejected)) - 1)
        n = next((i for i in range(most) if chosen[i] != rejected[i]), most)
        if n:
            row = {**row, "prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}
    return {column: [{"role": ROLES[column], "content": value}]
            if column in ROLES and isinstance(value, str) else value
            for column, value in row.items()}  # fmt: skip


def _places(source: str | Path, split: str, options: dict) -> Iterator[tuple[str, Any]]:
    """The rows of a source, each with the place where it stands."""
    path = Path(source)
    if path.is_file() and path.suffix == ".jsonl":
        return lines(path)
    if path.is_file() and path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            return _numbered(pyarrow.parquet.read_table(path).to_pylist(), f"{path.name}, ")
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path.name}: {error}") from error
    if path.is_file():
        raise ValueError(f"{path.name}: a data set is a .jsonl or .parquet file, not {path.suffix}")
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source))
    if not path.is_dir() and (not on_hub or path.suffix in (".json", ".jsonl", ".parquet", ".csv")):
        raise FileNotFoundError(f"no file or folder {str(source)!r}; a data set on the hub is 'owner/name'")
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
                    raise ValueError(f"{where}: {error} in {line!r:.80}") from error
                yield where, row


def _numbered(rows: Iterable[Any], name: str = "") -> Iterator[tuple[str, Any]]:
    return ((f"{name}row {i}", row) for i, row in enumerate(rows))


def check_row(row: Any, shape: str, where: str) -> None:
    """Raises ValueError as ``read`` does for what is wrong in one row; ``where`` stands in front of it."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: {row!r:.80} is not an object with columns")
    for column in SHAPES[shape]:
        if column not in row:
            raise ValueError(
                f"{where}: no column {column!r}, there are {', '.join(row) or 'none'}; "
                f"shape {shape} needs {', '.join(SHAPES[shape])}"
            )
        if column != "label":
            _check_messages(row[column], f"{where}, {column}", of_prompt=column == "prompt")
        elif not isinstance(row[column], bool):
            raise ValueError(f"{where}, label: {row[column]!r:.80} is not true or false")
    if shape == "preference" and row["chosen"] == row["rejected"]:
        text = row["chosen"][0]["content"]
        raise ValueError(f"{where}: chosen and rejected are both {text!r:.80}: a pair needs two responses")


def _check_messages(messages: Any, where: str, of_prompt: bool) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: {messages!r:.80} is not a list of messages")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"{where}, message {i}: {message!r:.80} needs a role and a content")
        content = message["content"]
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"{where}, message {i}, content: {content!r:.80} is no text")
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if of_prompt and roles[0] == "system" else roles
    turns = ["user", "assistant"] * len(spoken) if of_prompt else ["assistant"]
    if spoken != turns[: len(spoken)] or len(spoken) % 2 == 0:
        wanted = "[system,] user, assistant, ..., user" if of_prompt else "one assistant message"
        raise ValueError(f"{where}: the roles are {', '.join(map(str, roles))}, not {wanted}")
