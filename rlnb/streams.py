"""What one thread prints, held back while the others go on printing."""

import io
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LOCK = threading.Lock()


class _Routed(io.TextIOBase):
    """A standard stream that gives what some threads write to texts of their own, and passes on the rest."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.texts = stream, {}  # thread -> its texts, the innermost last

    def write(self, text: str) -> int:
        own = self.texts.get(threading.get_ident())
        return (own[-1] if own else self.stream).write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def flush(self) -> None:
        self.stream.flush()


@contextmanager
def captured(names: tuple[str, ...] = ("stdout", "stderr")) -> Iterator[io.StringIO]:
    """What this thread writes to sys.stdout and sys.stderr, or to one of them, goes into the text yielded.

    contextlib.redirect_stdout would take from all threads: a training in the background of a notebook
    would swallow what the cells print meanwhile.
    """
    text, me = io.StringIO(), threading.get_ident()
    with _LOCK:
        for name in names:
            if not isinstance(getattr(sys, name), _Routed):
                setattr(sys, name, _Routed(getattr(sys, name)))
            getattr(sys, name).texts.setdefault(me, []).append(text)
        streams = [getattr(sys, name) for name in names]
    try:
        yield text
    finally:
        with _LOCK:
            for name, routed in zip(names, streams, strict=True):
                routed.texts[me].pop()
                routed.texts = {thread: texts for thread, texts in routed.texts.items() if texts}
                if not routed.texts and getattr(sys, name) is routed:
                    setattr(sys, name, routed.stream)
