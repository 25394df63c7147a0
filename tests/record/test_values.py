"""How values are written down; tests/test_runs.py has the table and the curve."""

import json
import math
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch

from rlnb.record import runs


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True)
class Settings:
    rank: int = 8
    path: Path = Path("data") / "x"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Settings(), {"rank": 8, "path": "data/x"}),
        ({1: Colour.RED, "b": (1, None, True)}, {"1": "red", "b": [1, None, True]}),
        ({3, 1, 2}, [1, 2, 3]),
        ([math.nan, math.inf, -math.inf, 0.5], ["NaN", "Infinity", "-Infinity", 0.5]),
        (math.floor, "floor"),
        (Settings, "Settings"),
        ([np.int64(5), np.float32(0.5), torch.tensor(2)], [5, 0.5, 2]),
        (torch.bfloat16, "torch.bfloat16"),
        ({"hub_token": "abc", "eos_token": "</s>"}, {"hub_token": "<hidden>", "eos_token": "</s>"}),
        ({"hub_token": None}, {"hub_token": None}),
    ],
)
def test_values_become_json(value, expected):
    found = runs.jsonable(value)
    assert found == expected
    json.dumps(found, allow_nan=False)
