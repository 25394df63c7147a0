"""A real local server with OpenAI's interface for an exported model, started and stopped cleanly."""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from rlnb.model.folders import resolve

# Nothing calls home: transformers' command line looks for updates once a day, vLLM sends statistics.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "DO_NOT_TRACK": "1"}
# The server's standard input is a pipe from here, which closes when this process ends, however it ends: a killed
# kernel leaves no server behind.
WATCHDOG = """
import os, runpy, signal, sys, threading
def end_with_the_pipe():
    sys.stdin.read()
    os.killpg(0, signal.SIGTERM) if hasattr(os, "killpg") else os._exit(1)
threading.Thread(target=end_with_the_pipe, daemon=True).start()
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


class Server(NamedTuple):
    """Where a client finds the model: OpenAI(base_url=url, api_key="none").chat.completions.create(model=model, ...)"""

    url: str
    model: str


@contextlib.contextmanager
def serve(folder: str | os.PathLike[str], *, timeout: float = 300) -> Iterator[Server]:
    """Inside, a real local server answers OpenAI's chat calls; on leaving it is stopped.

    vLLM on a GPU that has it, else `transformers serve`; for this machine only. timeout: seconds until it is ready.
    Raises RuntimeError with the end of the server's log if it stops by itself, TimeoutError if it is never ready.
    """
    model = resolve(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            _command(model, port), stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | OFFLINE, start_new_session=True,  # so that what it starts can be stopped with it
        )  # fmt: skip
        try:
            _wait_until_ready(process, port, timeout, log)
            yield Server(f"http://127.0.0.1:{port}/v1", model)
        finally:
            for number in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):  # asked, then made to
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number) if hasattr(os, "killpg") else process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
            process.stdin.close()


def _command(model: str, port: int) -> list[str]:
    watched, where = [sys.executable, "-c", WATCHDOG], ["--host", "127.0.0.1", "--port", str(port)]
    if torch.cuda.is_available() and importlib.util.find_spec("vllm"):
        # Half of the GPU's memory, because a notebook's kernel is on it too.
        vllm = ["vllm.entrypoints.cli.main", "serve", model, "--gpu-memory-utilization", "0.5", "--enforce-eager"]
        return [*watched, *vllm, *where]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [*watched, "transformers.cli.transformers", "serve", model, "--device", device, *where]


def _wait_until_ready(process: subprocess.Popen, port: int, timeout: float, log: Any) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy to this machine
    until = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError):
            if opener.open(f"http://127.0.0.1:{port}/health", timeout=5).status == 200:
                return
        time.sleep(0.1)
    log.seek(0)
    tail = "its log ends\n" + "".join(log.readlines()[-20:])
    if process.returncode is not None:
        raise RuntimeError(f"the server ended with status {process.returncode}: {tail}")
    raise TimeoutError(f"the server was not ready within {timeout:g} s: {tail}")
