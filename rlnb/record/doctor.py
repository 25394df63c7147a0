"""What this machine can do, and why a run is dead.

    python -m rlnb doctor                       this machine; exit status 1 if something won't work
    python -m rlnb doctor 20261120-125239-dpo   a run of the registry

In a notebook: `doctor.machine()`, and `doctor.run(run)` for a run or `trainer.state.log_history`.
The looks at the machine are in checkup.py, the rules for runs in symptoms.py.
"""

from __future__ import annotations  # for Python 3.9: see bootstrap

from dataclasses import dataclass
from typing import Any

WIDTH = 8  # of the column that says ok, advice or PROBLEM


@dataclass(frozen=True)
class Finding:
    """What was seen; level is ok, advice or problem. What it means (of runs), and what to do."""

    name: str
    saw: str
    level: str = "ok"
    do: str = ""
    means: str = ""

    def __str__(self) -> str:
        level = self.level.upper() if self.level == "problem" else self.level
        if self.means:
            lines = (f"{level:{WIDTH}}{self.name}: {self.saw}", self.means, self.do)
            return f"\n{'':{WIDTH}}".join(lines)
        return f"{level:{WIDTH}}{self.name:9} {self.saw}" + (f". {self.do}" if self.do else "")


class Report(list):
    """Findings, shown one below the other, or `nothing` if there are none."""

    def __init__(self, findings: Any = (), nothing: str = ""):
        super().__init__(findings)
        self.nothing = nothing

    def __repr__(self) -> str:
        return "\n".join(map(str, self)) or self.nothing

    __str__ = __repr__

    @property
    def works(self) -> bool:
        """Whether none of the findings is a problem."""
        return all(finding.level != "problem" for finding in self)


def machine() -> Report:
    """What works on this machine, a line each. It takes some seconds if it has to import Unsloth."""
    from rlnb.tools import check_machine as checkup

    return Report(map(_look, checkup.LOOKS))


def _look(look: Any) -> Finding:
    name = look.__name__
    try:
        return Finding(name, *look())
    except Exception as error:  # whatever is broken: that is when people ask a doctor
        saw = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return Finding(name, saw, "problem", "To mend the packages: python -m rlnb setup")


def run(run: Any) -> Report:
    """What is wrong with a training run: for each symptom the numbers, their meaning, a way out.

    run: a `rlnb.record.runs.Run`, or rows as in `trainer.state.log_history`. A run that is still going is
    judged by what it has logged so far; it takes six logs to see a trend.
    """
    from rlnb.record import runs, symptoms

    known = isinstance(run, runs.Run)
    rows = run.curve() if known else list(run)
    logs = sum("loss" in row for row in rows)
    return Report(symptoms.look(rows, run if known else None), f"nothing wrong in {logs} logs")


def main(id: str | None = None) -> int:
    """``python -m rlnb doctor``: prints a report, and returns 1 if there is a problem in it."""
    if id is None:
        report = machine()
    else:
        from rlnb.record import runs

        report = run(runs.load(id))
    print(report)
    return 0 if report.works else 1
