"""What makes a mistake clear: the words of its message, its kind, and that nothing was written for it."""

import os
import re
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlnb.record import runs

# With these nobody finds the mistake.
UNCLEAR = (AssertionError, AttributeError, IndexError, KeyError, RecursionError, StopIteration, UnicodeError)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder, but for runs that are recorded as failed."""
    failed = {run.folder for run in runs.find(status="failed")} if (folder / "runs").is_dir() else set()
    found = [path for path in folder.rglob("*") if path.is_file() and not failed & set(path.parents)]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def check(call, kind, words, *, folder: Path) -> None:
    """The call raises this kind of error, no other, with all of the words, and leaves the folder as it was."""
    before = files(folder)
    with pytest.raises(BaseException) as caught:
        call()
    error, says = caught.value, str(caught.value)
    if record := os.environ.get("BAD_INPUT_MESSAGES"):  # a file to read them all in
        with Path(record).open("a", encoding="utf-8") as file:
            file.write(f"{type(error).__name__}: {says}\n")
    assert isinstance(error, kind) and not isinstance(error, UNCLEAR), f"{type(error).__name__}: {says}"
    assert [word for word in words if word not in says] == [], says
    assert files(folder) == before, "it wrote"


def cases(*rows):
    """Rows of (call, kind, *words) for pytest, under names that the words give."""
    names = [re.sub(r"\W+", " ", " ".join(row[2:]))[:50] for row in rows]
    return pytest.mark.parametrize(
        ("call", "kind", "words"), [pytest.param(call, kind, words, id=name)
                                    for (call, kind, *words), name in zip(rows, names, strict=True)],
    )  # fmt: skip


@contextmanager
def environment(**values: str):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, str(value))
        yield


def inside(context, call):
    """The call within a context."""
    with context:
        return call()
