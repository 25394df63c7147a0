"""Tables of results: a row for each run of an arm and a seed, made side by side, kept in a CSV file."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rlnb import files
from rlnb.tools import processes

# Student's t, two-sided 95 %, by the number of values.
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def carry_out(
    measure: Callable[[str, int], dict | list[dict]], arms: Iterable[str], seeds: int, out: Path, *,
    resume: bool = False, jobs: int = 1, first: str | None = None, say: Callable[[Any], str] = str,
) -> list[dict]:  # fmt: skip
    """What measure(arm, seed) returns, a row or several, of each arm and seed; ``out`` has every row
    as soon as it is there. jobs: how many at a time. first: the arm that the others start from.
    say: what to print of each.
    """
    rows, arms = read(out) if resume and out.is_file() else [], list(arms)
    there = {(r["arm"], r["seed"]) for r in rows}
    asked = [(arm, seed) for seed in range(seeds) for arm in arms if (arm, seed) not in there]
    done = 0
    for early in (True, False):
        tasks = [task for task in asked if (task[0] == first) == early]
        for new in processes.side_by_side(measure, tasks, jobs):
            rows += new if isinstance(new, list) else [new]
            rows.sort(key=lambda r: (r["seed"], arms.index(r["arm"]) if r["arm"] in arms else -1))
            files.write(out, text(rows))
            done += 1
            print(f"{done} of {len(asked)}: {say(new)}", flush=True)
    return rows


def text(rows: Sequence[dict]) -> str:
    """The rows as CSV."""
    found = io.StringIO()
    writer = csv.DictWriter(found, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return found.getvalue()


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a table, its numbers as numbers."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: _value(cell) for name, cell in r.items()} for r in csv.DictReader(file)]


def _value(cell: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell


def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean and its 95 % interval (Student's t), which a single seed does not have.

    Raises KeyError for more than ten values.
    """
    middle = fmean(values)
    half = T_95[len(values)] * stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return middle, middle - half, middle + half
