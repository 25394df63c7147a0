"""Files that are never seen half-written."""

import os
from pathlib import Path


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
