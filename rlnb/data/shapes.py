"""Data sets in TRL's shapes, from problems or from elsewhere, and errors that name what is wrong.

Every prompt and completion is conversational: a list of {"role": ..., "content": ...} messages, to
which the trainer applies the model's own chat template.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlnb import files
from rlnb.task import problems as task

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


def prompt_completion(problems: Sequence[task.Problem]) -> "Dataset":
    """Demonstrations for SFTTrainer: columns prompt and completion, the right solution."""
    rows = [{"prompt": task.prompt(p), "completion": task.solution(p)} for p in problems]
    return _build("prompt-completion", _numbered(rows))


def prompts(problems: Sequence[task.Problem]) -> "Dataset":
    """Prompts for GRPOTrainer, with what the reward functions read: id, kind, question, answer."""
    columns = ("id", "kind", "question", "answer")
    rows = [{"prompt": task.prompt(p)} | {c: getattr(p, c) for c in columns} for p in problems]
    return _build("prompts", _numbered(rows))


def preference(rows: Iterable[Mapping[str, Any]]) -> "Dataset":
    """Pairs for RewardTrainer, DPOTrainer and ORPOTrainer: columns prompt, chosen, rejected.

    rows: mappings with these, each as text or as messages; other columns stay. Raises ValueError as ``read``.
    """
    return _build("preference", _numbered(rows))


def unpaired(rows: Iterable[Mapping[str, Any]]) -> "Dataset":
    """Labelled completions for KTOTrainer: columns prompt, completion, label (True is good).

    rows as for ``preference``. Their order stays, and KTOTrainer keeps to it: mix the labels before.
    """
    return _build("unpaired", _numbered(rows))


def subset(problems: "Sequence | Dataset", n: int, seed: int = 0) -> "list | Dataset":
    """n of the problems, or of a Dataset's rows; under one seed a larger subset begins with a smaller. Of rows with
    an id one that comes or goes changes one row of the subset, and not the whole of it.

    Raises ValueError unless 1 <= n <= len(problems).
    """
    if not (isinstance(n, int) and 1 <= n <= len(problems)):
        raise ValueError(f"n={n!r} problems are asked for: 1 to {len(problems)} can be given")
    order = list(range(len(problems)))
    random.Random(seed).shuffle(order)
    if not hasattr(problems, "select"):
        return [problems[i] for i in order[:n]]
    if "id" in problems.column_names:
        drawn = [random.Random(f"{seed}-{id}").random() for id in problems["id"]]
        order.sort(key=lambda i: drawn[i])
    return problems.select(order[:n])


def read(source: str | Path, shape: str, split: str = "train", **options: Any) -> "Dataset":
    """A data set in one of SHAPES from a .jsonl or .parquet file, a folder, or "owner/name" on the hub.

    split and options go to datasets.load_dataset, which reads all but .jsonl. Strings become messages. Raises
    FileNotFoundError, and ValueError with file, line, field and value for what no trainer can use.
    """
    if shape not in SHAPES:
        raise ValueError(f"there is no shape {shape!r}; there are {', '.join(SHAPES)}")
    path = Path(source)
    if path.is_file() and path.suffix == ".jsonl":
        return _build(shape, files.lines(path), f"{path.name}: ")
    from datasets import load_dataset

    if path.is_file() and path.suffix == ".parquet":
        rows = load_dataset("parquet", data_files=str(path), split=split, **options)
        return _build(shape, _numbered(rows, f"{path.name}, "))
    a_file = path.suffix in (".json", ".jsonl", ".parquet", ".csv")
    if not path.is_dir() and (a_file or str(source).count("/") != 1):
        raise FileNotFoundError(f"{source} is no .jsonl or .parquet file, no folder and no 'owner/name' on the hub")
    return _build(shape, _numbered(load_dataset(str(source), split=split, **options), f"{source}, "))


def check_row(row: Any, shape: str, where: str) -> None:
    """Raises ValueError as ``read`` does for what is wrong in one row; ``where`` stands in front of it."""
    files.check_fields(row, {}, where)
    for column in SHAPES[shape]:
        if column not in row:
            there, needed = ", ".join(row) or "none", ", ".join(SHAPES[shape])
            raise ValueError(f"{where}: no column {column!r}, there are {there}; shape {shape} needs {needed}")
        if column != "label":
            _check_messages(row[column], f"{where}, {column}", of_prompt=column == "prompt")
        elif not isinstance(row[column], bool):
            raise ValueError(f"{where}, label: {row[column]!r:.80} is not true or false")
    if shape == "preference" and row["chosen"] == row["rejected"]:
        raise ValueError(f"{where}: chosen and rejected are both {row['chosen'][0]['content']!r:.80}")


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
    n = len(spoken) | 1  # a prompt is an odd number of turns
    turns = (["user", "assistant"] * n)[:n] if of_prompt else ["assistant"]
    if spoken != turns:
        wanted = "[system,] user, assistant, ..., user" if of_prompt else "one assistant message"
        raise ValueError(f"{where}: the roles are {', '.join(map(str, roles))}, not {wanted}")


def _build(shape: str, places: Iterable[tuple[str, Any]], name: str = "") -> "Dataset":
    """The rows, each with the place where it stands, checked one by one and then together."""
    from datasets import Dataset

    rows = []
    for where, row in places:
        if isinstance(row, Mapping):
            says = {c: row[c] for c in ROLES if isinstance(row.get(c), str)}
            row = {**row} | {c: [{"role": ROLES[c], "content": text}] for c, text in says.items()}
        check_row(row, shape, where)
        rows.append(row)
    if not rows:
        raise ValueError(f"{name}a data set of shape {shape} needs a row, and there is none")
    if shape == "unpaired" and len({row["label"] for row in rows}) == 1:
        alike = f"{name}label is {rows[0]['label']} in all {len(rows)} rows"
        raise ValueError(f"{alike}: KTO learns from good and bad ones, so it needs both")
    columns = dict.fromkeys(column for row in rows for column in row)
    return Dataset.from_list([{c: row.get(c) for c in columns} for row in rows])


def _numbered(rows: Iterable[Any], name: str = "") -> Iterator[tuple[str, Any]]:
    return ((f"{name}row {i}", row) for i, row in enumerate(rows))
