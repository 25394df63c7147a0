"""How values are written down: as JSON in a run's file, as cells of a table before a reader.

JSON has no NaN and no infinity: they are written as the strings "NaN", "Infinity" and "-Infinity",
which `float` takes.
"""

import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

_SECRET = re.compile(r"(hub_token|api_key|password|secret)$")


def jsonable(value: Any) -> Any:
    """A value as JSON can hold it.

    Dataclasses and mappings become dicts, sets sorted lists, functions and classes their names,
    enums their values, NaN and infinities strings, and the rest (paths, dtypes) text. Mappings
    lose what looks like a credential.
    """
    if isinstance(value, Enum):
        return jsonable(value.value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        names = {math.inf: "Infinity", -math.inf: "-Infinity"}
        return float(value) if math.isfinite(value) else names.get(value, "NaN")
    if is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): "<hidden>" if v and _SECRET.search(str(k)) else jsonable(v)
                for k, v in value.items()}  # fmt: skip
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if (plain := number(value)) is not None:
        return jsonable(plain)
    return getattr(value, "__name__", None) or str(value)[:200]


def number(value: Any) -> float | int | None:
    """A Python number for a number, a numpy scalar or a tensor of one element, else None."""
    if hasattr(value, "item"):
        with suppress(RuntimeError, ValueError):
            value = value.item()
    return value if isinstance(value, int | float) else None


def read_rows(path: Path) -> list[dict[str, float]]:
    """The lines of a .jsonl as dicts of numbers, [] if there is no such file.

    Lines that are none, as a crash leaves them, are left out with a warning.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows, broken = [], []
    for place, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({k: float(v) if isinstance(v, str) else v for k, v in row.items()})
        except (AttributeError, ValueError):
            broken.append(place)
    if broken:
        warnings.warn(f"{path}: skipped broken line(s) {broken}", stacklevel=3)
    return rows


class Table(list):
    """A list of dicts, one per run, that shows itself as a table in text and in a notebook."""

    def _cells(self) -> list[list[str]]:
        return [[_cell(value) for value in row.values()] for row in self]

    def __str__(self) -> str:
        if not self:
            return "no runs"
        lines = [list(self[0]), *self._cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
        return "\n".join("  ".join(line).rstrip() for line in padded)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from html import escape

        def line(tag: str, cells: Iterable[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{escape(c)}</{tag}>" for c in cells) + "</tr>"

        if not self:
            return "<p>no runs</p>"
        body = "".join(line("td", cells) for cells in self._cells())
        return f"<table><thead>{line('th', self[0])}</thead><tbody>{body}</tbody></table>"


def fits_a_cell(value: Any) -> bool:
    """Whether a value is a single one, or a proportion: {"k": successes, "n": trials}."""
    return _is_proportion(value) or not isinstance(value, Mapping | list)


def _is_proportion(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {"k", "n"} and value["n"] > 0


def _cell(value: Any) -> str:
    if _is_proportion(value):
        return f"{100 * value['k'] / value['n']:.1f} % of {value['n']}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
