"""How values are written down; test_runs.py has the curve."""

import json
import math
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch

from rlnb.record.values import jsonable, number

SECRETS = ("token", "HF_TOKEN", "hub_token", "access_token", "auth_token", "api_key", "apikey", "OPENAI_API_KEY",
           "aws_secret_access_key", "aws_access_key_id", "private_key", "password", "db_passwd", "passphrase",
           "client_secret", "credentials", "Authorization", "cookie", "github_token", "wandb_token")  # fmt: skip
PUBLIC = ("eos_token", "pad_token", "num_tokens", "max_new_tokens", "tokenizer", "keys", "key", "secretary")


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
        (dict.fromkeys(SECRETS, "abc"), dict.fromkeys(SECRETS, "<hidden>")),
        (dict.fromkeys(PUBLIC, "abc"), dict.fromkeys(PUBLIC, "abc")),
        ([{"token": "a"}, {"hf_token": "b"}], [{"token": "<hidden>"}, {"hf_token": "<hidden>"}]),
        ({"max_tokens": 8, "data": {"key": "c"}}, {"max_tokens": 8, "data": {"key": "c"}}),
    ],
)
def test_values_become_json(value, expected):
    found = jsonable(value)
    assert found == expected
    json.dumps(found, allow_nan=False)


def test_numbers_are_what_one_value_is():
    given = [1, 0.5, True, np.float32(0.5), torch.tensor([2]), "1", None, torch.ones(2), np.ones(3)]
    assert list(map(number, given)) == [1, 0.5, True, 0.5, 2, None, None, None, None]
