"""Intervals against published values, closed forms and coverage by enumeration."""

import math
import subprocess
import sys

import numpy as np
import pytest

from rlnb.measure import intervals


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_as_published(k, n, low, high):
    """Newcombe (1998), Statistics in Medicine 17, p. 857, table I, method 3."""
    assert intervals.wilson(k, n) == pytest.approx((low, high), abs=5e-5)
    mirrored = intervals.wilson(n - k, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_solves_its_equation():
    """Its ends are where the mean is z standard errors away: (p - k/n)^2 = z^2 p (1 - p) / n."""
    for p in intervals.wilson(37, 120):
        assert (p - 37 / 120) ** 2 == pytest.approx(1.959963984540054**2 * p * (1 - p) / 120)


@pytest.mark.parametrize(("k", "n"), [(1, 0), (0, 0), (-1, 5), (6, 5)])
def test_no_proportion(k, n):
    with pytest.raises(ValueError, match="successes in"):
        intervals.Proportion(k, n)


def test_proportion_as_text():
    assert str(intervals.Proportion(262, 500)) == "52.4 % [48.0, 56.7]"


@pytest.mark.parametrize(("gain", "loss"), [(0.2, 0.05), (0.1, 0.1), (0.02, 0.01)])
def test_the_paired_interval_covers_the_difference(gain, loss):
    """By enumerating all outcomes of 30 pairs; the plain Wald interval covers 0.59 in the last."""
    n, covered = 30, 0.0
    for gained in range(n + 1):
        for lost in range(n + 1 - gained):
            rest = n - gained - lost
            chance = math.comb(n, gained) * math.comb(n - gained, lost)
            chance *= gain**gained * loss**lost * (1 - gain - loss) ** rest
            found = intervals.Difference(gained, lost, n)
            covered += chance * (found.low <= gain - loss <= found.high)
    assert covered > 0.94


@pytest.mark.parametrize(
    ("n", "t"), [(2, 12.706), (3, 4.303), (10, 2.262), (11, 2.228), (31, 2.042)]
)
def test_the_interval_over_seeds_is_students(n, t):
    """Table of t, two-sided 95 %, by n - 1 degrees of freedom."""
    values = [1.0, 3.0] * (n // 2) + [2.0] * (n % 2)
    half = t * math.sqrt(sum((x - 2) ** 2 for x in values) / (n - 1) / n)
    mean, low, high = intervals.over_seeds(values)
    assert (mean, low, high) == pytest.approx((2, 2 - half, 2 + half), abs=5e-4)


def test_one_seed_has_no_interval():
    assert intervals.over_seeds([0.5]) == intervals.Estimate(0.5, 0.5, 0.5)


def test_importing_loads_no_scipy():
    code = "import sys, rlnb.measure.intervals; print({'scipy', 'statsmodels', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_over_both_is_as_wide_as_seeds_and_problems_together():
    """The variance of the mean is that of seeds plus that of problems, where the two add up."""
    rng = np.random.default_rng(1)
    seeds, problems = rng.normal(0, 0.02, 40), rng.normal(0.5, 0.1, 400)
    found = intervals.over_both(seeds[:, None] + problems)
    half = 1.96 * math.sqrt(seeds.var() / 40 + problems.var() / 400)
    assert found.mean == pytest.approx((seeds[:, None] + problems).mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.08)
    alone = intervals.over_both([problems] * 40)  # all seeds the same: problems alone
    assert (alone.high - alone.low) / 2 == pytest.approx(1.96 * problems.std() / 20, rel=0.08)
    assert tuple(intervals.over_both([[0.25] * 4] * 3)) == pytest.approx((0.25,) * 3)
    assert intervals.over_both([problems] * 2) == intervals.over_both([problems] * 2)  # its seed is fixed
