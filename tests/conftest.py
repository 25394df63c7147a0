"""For all tests: nothing is downloaded, and runs don't land among the user's own."""

import os
import tempfile

_runs = tempfile.TemporaryDirectory()  # goes when pytest ends
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("RLNB_PROFILE", "smoke")
os.environ.setdefault("RLNB_RUNS", _runs.name)
