"""Files and folders that are never seen half-written, and lines of JSON that say where they are wrong."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
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


@contextmanager
def replaced(folder: Path, files: Iterable[str]) -> Iterator[Path]:
    """Yields a new folder to write into, which then takes the folder's place: whole or not at all. Raises
    FileExistsError if that holds anything but these files, which are patterns.
    """
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file: name a folder")
    others = [f.name for f in folder.glob("*") if not any(fnmatch(f.name, pattern) for pattern in files)]
    if others:
        raise FileExistsError(f"{folder} holds other files ({', '.join(others)}): name another folder")
    clear(folder)
    new, old = (folder.with_name(f".{folder.name}.{end}") for end in (os.getpid(), "old"))
    try:
        new.mkdir(parents=True)
        yield new
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():  # no call replaces a full folder, so that one steps aside
            folder.replace(old)
        new.replace(folder)
    finally:
        if old.exists() and not folder.exists():
            old.replace(folder)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(new, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove what processes that were killed have left of a folder: .name.pid beside it."""
    import psutil

    for left in folder.parent.glob(f".{folder.name}.*"):
        if left.suffix[1:].isdigit() and not psutil.pid_exists(int(left.suffix[1:])):
            shutil.rmtree(left, ignore_errors=True)


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


def rows(path: Path, kinds: Mapping[str, type]) -> list[dict[str, Any]]:
    """The objects of a JSONL file, each with these fields of these types."""
    found = list(lines(path))
    for where, row in found:
        check_fields(row, kinds, where)
    return [row for _, row in found]


def check_fields(row: Any, kinds: Mapping[str, type], where: str) -> None:
    """Raise ValueError, with the place, for a row that is no object and for a field that is not of its type."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: {row!r:.80} is not an object with columns")
    for name, kind in kinds.items():
        if type(row.get(name)) is not kind:
            raise ValueError(f"{where}, {name}: {row.get(name)!r:.80} is no {kind.__name__}")
