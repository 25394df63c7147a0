"""The runs of a notebook as a table in HTML, and the words for them."""

from collections.abc import Sequence
from datetime import datetime
from html import escape
from itertools import zip_longest
from typing import Any

from rlnb.measure.intervals import Proportion
from rlnb.record import runs

NAMES = {"per_device_train_batch_size": "batch size", "gradient_accumulation_steps": "accumulated batches",
         "kl_coef": "KL coefficient", "lam": "GAE lambda", "max_lora_rank": "max_lora_rank"}  # fmt: skip
UNSAID = {"data", "weights"}  # settings that are long to say
COLUMNS = ("run", "settings", "held out", "seconds", "peak MB", "ended")
CELL = "padding:2px 14px 2px 0;text-align:left;vertical-align:top"


def table(shown: Sequence[runs.Run], colours: Sequence[str]) -> str:
    """A row per run, the first ones with a square in the colour of their curve; "" without any run."""
    if not shown:
        return ""
    said, rows = settings(shown), ["".join(f"<th style='{CELL}'>{name}</th>" for name in COLUMNS)]
    for run, colour in zip_longest(shown, colours, fillvalue="transparent"):
        square = f"<span style='color:{colour}'>&#9632;</span> {clock(run)}"
        peak = run.peak_gpu_memory_mb or run.peak_memory_mb or 0
        texts = said[run.id], held_out(run), f"{run.seconds or 0:,.0f}", f"{peak:,.0f}", run.status
        rows.append("".join(f"<td style='{CELL}'>{text}</td>" for text in (square, *map(escape, texts))))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<div class='rlnb-runs' style='overflow:auto;line-height:1.4'><table>{body}</table></div>"


def settings(shown: Sequence[runs.Run]) -> dict[str, str]:
    """By id, the settings of a run that are not the same in all of them: "rank 8, learning rate 2e-4"."""
    given = {run.id: run.config | {"seed": run.seed} for run in shown}
    keys = dict.fromkeys(key for of in given.values() for key in of if key not in UNSAID)
    differ = [key for key in keys if len({repr(of.get(key)) for of in given.values()}) > 1]
    return {id: ", ".join(f"{name(key)} {text(of[key])}" for key in differ if of.get(key) is not None)
            for id, of in given.items()}  # fmt: skip


def labels(shown: Sequence[runs.Run]) -> list[str]:
    """The same for a legend: with the time where the settings don't tell runs apart."""
    said = list(settings(shown).values())
    return [words if words and said.count(words) == 1 else f"{words} {clock(run)}".strip()
            for words, run in zip(said, shown, strict=True)]  # fmt: skip


def name(key: str) -> str:
    """A setting's name on the screen."""
    return NAMES.get(key, key.replace("_", " "))


def text(value: Any) -> str:
    """A setting in few characters: "0.0002", "2e-05", "64"."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def clock(run: runs.Run) -> str:
    """When a run began, by this machine's clock."""
    return f"{datetime.fromisoformat(run.started).astimezone():%H:%M:%S}"


def held_out(run: runs.Run) -> str:
    """Strict accuracy with its interval, a reward model's on pairs; "" if it was not measured."""
    found = run.get("result.strict") or run.get("result.pair_accuracy")
    return str(Proportion(**found)) if found else ""
