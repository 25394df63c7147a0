"""The pins of the GPU fit together, by what the packages' own metadata say (tests/gpu/resolve.py)."""

import json

import pytest

from rlnb.tools.setup import PYTHONS
from tests.gpu import resolve

STORED = json.loads(resolve.STORED.read_text(encoding="utf-8"))


def test_the_stored_metadata_are_those_of_the_pinned_versions():
    """If not: python -m tests.gpu.resolve --renew."""
    assert list(STORED) == [f"{n}=={(resolve.pins() | resolve.UNPINNED)[n]}" for n in resolve.ASKED]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_package_allows_the_pins(python):
    assert resolve.conflicts(resolve.pins(), STORED, python) == []


def test_a_newer_numpy_fits_from_python_3_13_on():
    """What requirements-gpu.txt says of its pin."""
    newer = resolve.pins() | {"numpy": "2.4.6"}
    found = {python: resolve.conflicts(newer, STORED, python) for python in PYTHONS}
    assert [len(found[python]) for python in PYTHONS] == [1, 1, 0]
    assert "mistral_common==1.13.1 wants numpy<2.4" in found["3.11"][0]


def test_a_pin_that_is_not_allowed_is_named():
    lines = resolve.conflicts(resolve.pins() | {"trl": "1.16.0"}, STORED, "3.12")
    assert {line.split()[2].split("==")[0] for line in lines} == {"unsloth", "unsloth_zoo"}
