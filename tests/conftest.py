"""For all tests: nothing is downloaded, runs don't land among the user's own, Unsloth comes first."""

import importlib
import os
import re
import signal
import tempfile

import rlnb  # noqa: F401  before torch: it sets how threads wait

_runs = tempfile.TemporaryDirectory()  # goes when pytest ends
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("RLNB_PROFILE", "smoke")
os.environ.setdefault("RLNB_RUNS", _runs.name)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it sends to the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # children would inherit it, and hear no Ctrl-C

IMPORTS = re.compile(r"^ *(from|import) (torch|transformers|trl|peft)\b", re.MULTILINE)


def pytest_pycollect_makemodule(module_path):
    """Imports rlnb.model, and so Unsloth, above a test file that imports what Unsloth patches. It takes
    seconds: so not for the others.
    """
    if IMPORTS.search(module_path.read_text(encoding="utf-8")):
        importlib.import_module("rlnb.model")
