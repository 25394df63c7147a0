"""Files that are never seen half-written."""

import os
from pathlib import Path


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all, in UTF-8 with "\\n".

    Readers see the old file or the new one. A crash may leave ".name.pid" behind, nothing else.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave an empty file under the new name
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
