"""What nbval needs to execute these notebooks: pytest -p no:python --nbval-lax --nbval-current-env

Outputs are compared only in cells tagged nbval-check-output.
"""

import os
import tempfile
from pathlib import Path

from nbval.plugin import IPyNbCell

from rlnb.tools.notebooks import is_progress_bar

_runs = tempfile.TemporaryDirectory()  # not among the user's own; goes when pytest ends
os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("RLNB_PROFILE", "smoke")
os.environ.setdefault("RLNB_RUNS", _runs.name)


def pytest_collectstart(collector):
    """Leaves stderr, where warnings and progress bars go, out of every comparison."""
    if collector.path.suffix == ".ipynb":
        collector.skip_compare += ("stderr",)


def _compare_without_bars(self, test, ref, skip_compare=None, compare=IPyNbCell.compare_outputs):
    """Progress bars come up where the machine is slow, and stored notebooks have none."""
    return compare(self, [o for o in test if not is_progress_bar(o)], ref, skip_compare)


IPyNbCell.compare_outputs = _compare_without_bars
