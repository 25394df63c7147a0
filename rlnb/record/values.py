"""Values as JSON, which has no NaN and no infinity: those become "NaN", "Infinity", "-Infinity", as `float` takes."""

import json
import math
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

# Names of credentials; "num_tokens" and "eos_token" are none.
SECRET = re.compile(
    r"(^|hub|hf|api|access|auth|bearer|refresh|session|wandb|github|secret)_?token$|(api|access|private|secret)_?key(_id)?$"
    r"|passw(or)?d$|passphrase$|secret$|credentials?$|authorization$|bearer$|cookie$", re.IGNORECASE
)


def jsonable(value: Any) -> Any:
    """A value as JSON can hold it: dataclasses and mappings as dicts, their credentials hidden, sets sorted, enums
    as their values, functions and classes as names, the rest (paths) as text.
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): "<hidden>" if v and SECRET.search(str(k)) else jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(v) for v in (value if isinstance(value, list | tuple) else sorted(value, key=str))]
    if isinstance(value, Enum):
        return jsonable(value.value)
    if (plain := number(value)) is not None:
        return plain if math.isfinite(plain) else {math.inf: "Infinity", -math.inf: "-Infinity"}.get(plain, "NaN")
    if value is None or isinstance(value, str):
        return value
    return getattr(value, "__name__", None) or str(value)[:200]


def number(value: Any) -> float | int | None:
    """A Python number for a number, a numpy scalar or a tensor of one element, else None."""
    if hasattr(value, "item"):
        with suppress(RuntimeError, ValueError):
            value = value.item()
    return value if isinstance(value, int | float) else None


def read_rows(path: Path) -> list[dict[str, float]]:
    """The lines of a .jsonl as dicts of numbers, [] without the file; a crash's broken lines are skipped."""
    rows, broken = [], []
    for place, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else [], 1):
        try:
            rows.append({k: float(v) if isinstance(v, str) else v for k, v in json.loads(line).items()})
        except (AttributeError, ValueError):
            broken.append(place)
    if broken:
        warnings.warn(f"{path}: skipped broken line(s) {broken}", stacklevel=3)
    return rows
