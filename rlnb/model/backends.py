"""Which library does the work. Unsloth has to be imported before trl, transformers and peft, which it
patches, and the environment set before any of them: this module comes first wherever rlnb.model is imported.
"""

import contextlib
import functools
import importlib.util
import os
import sys
from collections.abc import Iterator

from rlnb.streams import captured

for _name, _value in {
    "UNSLOTH_DISABLE_STATISTICS": "1",  # nothing calls home: Unsloth on a GPU, TRL everywhere
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",  # GRPO's rollout_func and ORPO would warn at every use
    "TQDM_DELAY": "2",  # seconds: what is done before, such as tokenizing some rows, shows no bar
    "UNSLOTH_CPU_CHUNKED_CE": "0",  # Unsloth's chunked loss drops TRL's entropy and accuracy from SFT's log
    # On a CPU torch keeps a kernel for each new shape, by default 1,024 of them. Batches of text bring new
    # shapes at every step, and a run would hold ever more memory: with machine.trim, half as much.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    "LRU_CACHE_CAPACITY": "32",
}.items():
    os.environ.setdefault(_name, _value)


@functools.cache
def backend() -> str:
    """Import Unsloth, once, and name what does the work: "unsloth-cpu", "unsloth-gpu" or "plain". Raises RuntimeError,
    with Unsloth's own message, where it is installed and does not import.
    """
    if sys.platform == "darwin" or importlib.util.find_spec("unsloth") is None:
        say_once("Unsloth is not installed, or this is macOS: models load with plain transformers and PEFT.")
        return "plain"
    try:
        with quiet():
            import unsloth  # noqa: F401  it patches the others, so it comes first
            from unsloth_zoo.device_type import DEVICE_TYPE
    except Exception as error:
        says = f"{type(error).__name__}: {error}. Repair it, or go on without it: pip uninstall unsloth unsloth_zoo"
        raise RuntimeError(f"Unsloth is installed but does not import here: {says}") from error
    return "unsloth-cpu" if DEVICE_TYPE == "cpu" else "unsloth-gpu"


@functools.cache
def say_once(line: str) -> None:
    print(line)


@contextlib.contextmanager
def quiet(bars: bool = True) -> Iterator[None]:
    """Hold back what libraries print while they import and load; show it where they fail. bars: whether
    transformers shows its progress bars, which are written to stderr and pass.
    """
    with contextlib.ExitStack() as stack:
        if not bars:
            from transformers.utils import logging

            if logging.is_progress_bar_enabled():
                logging.disable_progress_bar()
                stack.callback(logging.enable_progress_bar)
        text = stack.enter_context(captured(stderr=False))
        try:
            yield
        except BaseException:
            print(text.getvalue(), end="", file=sys.stderr)
            raise
