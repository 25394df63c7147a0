"""For all tests: nothing is downloaded, runs don't land among the user's own, Unsloth comes first."""

import os
import re
import tempfile

import rlnb  # noqa: F401  before torch: it sets how threads wait

_runs = tempfile.TemporaryDirectory()  # goes when pytest ends
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("RLNB_PROFILE", "smoke")
os.environ.setdefault("RLNB_RUNS", _runs.name)

HEAVY = "torch|transformers|trl|peft|models|sampling|evaluate|training|pretrain|ppo"
IMPORTS = re.compile(rf"^ *(from|import) .*\b({HEAVY})\b", re.MULTILINE)


def pytest_pycollect_makemodule(module_path):
    """Imports Unsloth before a test file can import what Unsloth patches; it takes seconds, so only
    where some file of the session needs it.
    """
    if IMPORTS.search(module_path.read_text(encoding="utf-8")):
        from rlnb.model import load as models

        models.backend()
