"""Files that are never seen half-written, and lines of JSON that say where they are wrong."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def write(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all; text in UTF-8 with "\\n".

    Readers see the old file or the new one. A crash may leave ".name.pid" behind, nothing else.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave an empty file under the new name
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a JSONL file, each with the file and line where it stands; ValueError for what is no JSON."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path.name}, line {number}"
                try:
                    yield where, json.loads(line.decode("utf-8-sig"))
                except ValueError as error:  # no JSON, or no UTF-8
                    raise ValueError(f"{where}: {error} in {line!r:.80}") from error


def check_fields(row: Any, kinds: Mapping[str, type], where: str) -> None:
    """Raise ValueError, with the place, for a row that is no object and for a field that is not of its type."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: {row!r:.80} is not an object with columns")
    for name, kind in kinds.items():
        if type(row.get(name)) is not kind:
            raise ValueError(f"{where}, {name}: {row.get(name)!r:.80} is no {kind.__name__}")
