"""What one thread prints, held back while the others go on printing."""

import io
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LOCK = threading.Lock()


class _Routed:
    """A standard stream that gives what some threads write to texts of their own, and passes on the rest.

    A library may hold it for good, as logging's handlers do: then it passes everything on. It is no
    io.TextIOBase, whose encoding and fileno would hide the stream's own.
    """

    def __init__(self, stream: Any) -> None:
        self.stream, self.texts = stream, {}  # thread -> its texts, the innermost last

    def write(self, text: str) -> int:
        own = self.texts.get(threading.get_ident())
        return (own[-1] if own else self.stream).write(text)

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def captured(stderr: bool = True) -> Iterator[io.StringIO]:
    """What this thread writes to sys.stdout and sys.stderr goes into the text that this yields, what it displays in
    a notebook nowhere. stderr=False: sys.stdout alone, so that progress bars pass.

    contextlib.redirect_stdout would take from all threads, also from a notebook's cells while another one trains.
    """
    text, me = io.StringIO(), threading.get_ident()
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    publisher = getattr(shell, "display_pub", None) if stderr else None
    hooks = hasattr(publisher, "register_hook")  # ipykernel's; each thread has its own
    with _LOCK:
        streams = {}
        for name in ("stdout", "stderr") if stderr else ("stdout",):
            if not isinstance(getattr(sys, name), _Routed):
                setattr(sys, name, _Routed(getattr(sys, name)))
            streams[name] = getattr(sys, name)
            streams[name].texts.setdefault(me, []).append(text)
    if hooks:
        publisher.register_hook(_drop)
    try:
        yield text
    finally:
        if hooks:
            publisher.unregister_hook(_drop)
        with _LOCK:
            for name, routed in streams.items():
                routed.texts[me].pop()
                routed.texts = {thread: texts for thread, texts in routed.texts.items() if texts}
                if not routed.texts and getattr(sys, name) is routed:
                    setattr(sys, name, routed.stream)


def _drop(message: Any) -> None:
    """A hook of ipykernel: a message that it returns would be sent."""
