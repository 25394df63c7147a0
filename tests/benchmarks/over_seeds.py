"""What the benchmarks over seeds share: their command line, and figures with an interval."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from rlnb.tools import compare, grid

RESULTS = compare.OUT.parent


def carry_out(doc: str, out: Path, arms: Sequence[str], measure: Callable) -> list[dict]:
    """The rows of each arm with each seed, in the cpu profile."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each; default: 2")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    arguments = parser.parse_args()
    os.environ["RLNB_PROFILE"] = "cpu"
    return grid.carry_out(
        measure, arms, arguments.seeds, out, resume=arguments.resume, jobs=arguments.jobs,
        say=lambda new: f"seed {(new if isinstance(new, dict) else new[-1])['seed']}",
    )


def figure(values: Sequence[float], shown: str = "{:.1f}", unit: str = " %") -> str:
    """The mean, and for two seeds or more its 95 % interval (Student's t)."""
    middle, *ends = (shown.format(x) for x in grid.over_seeds(values))
    return middle + unit + (f" [{', '.join(ends)}]" if len(values) > 1 else "")
