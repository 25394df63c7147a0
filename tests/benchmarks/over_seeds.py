"""What the benchmarks over seeds share: their command line, and figures with an interval."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from rlnb.measure import intervals
from rlnb.task import problems
from rlnb.tools import experiments

RESULTS = problems.DATA.parent / "results"


def rows_over_seeds(doc: str, out: Path, methods: Sequence[str], measure: Callable) -> list[dict]:
    """The rows of each method with each seed, in the cpu profile, by the options of the command line."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each; default: 2")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    arguments = parser.parse_args()
    os.environ["RLNB_PROFILE"] = "cpu"
    options = {"resume": arguments.resume, "jobs": arguments.jobs}
    return experiments.run_grid(measure, methods, arguments.seeds, out, **options)


def figure(values: Sequence[float], shown: str = "{:.1f}", unit: str = " %") -> str:
    """The mean, and for two seeds or more its 95 % interval (Student's t)."""
    middle, *ends = (shown.format(x) for x in intervals.over_seeds(values))
    return middle + unit + (f" [{', '.join(ends)}]" if len(values) > 1 else "")
