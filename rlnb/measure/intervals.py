"""How sure a figure is: 95 % intervals of shares, of differences between them, and of means over seeds.

scipy and statsmodels, which take most of a second to load, come in with the first interval.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

Z = NormalDist().inv_cdf(0.975)  # 1.96


@dataclass(frozen=True)
class Estimate:
    """A value between 0 and 1 and its interval. Unpacks into the three: mean, low, high = estimate."""

    mean: float
    low: float
    high: float

    def __iter__(self) -> Iterator[float]:
        return iter((self.mean, self.low, self.high))

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Proportion:
    """k of n, with its Wilson interval. Raises ValueError unless 0 <= k <= n and n >= 1."""

    k: int
    n: int

    mean = property(lambda self: self.k / self.n)
    low = property(lambda self: wilson(self.k, self.n)[0])
    high = property(lambda self: wilson(self.k, self.n)[1])

    def __post_init__(self) -> None:
        if not 0 <= self.k <= self.n or self.n < 1:
            raise ValueError(f"{self.k} successes in {self.n} trials: need 0 <= k <= n and n >= 1")

    def __str__(self) -> str:
        return str(Estimate(self.mean, self.low, self.high))


def wilson(k: int, n: int) -> tuple[float, float]:
    """The Wilson score interval of k successes in n trials (Wilson 1927, JASA 22, p. 209)."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(k, n, alpha=0.05, method="wilson")
    return 0.0 if k == 0 else low, 1.0 if k == n else high  # exact there, but for rounding


@dataclass(frozen=True)
class Difference:
    """How much higher the second of two shares is, on the same n problems: gained are those that only the second
    solves, lost those that only the first does.

    With the adjusted Wald interval of Agresti and Min (2005, Statistics in Medicine 24, p. 729): half an
    observation more in each cell of the two-by-two table holds the level for small counts.
    """

    gained: int
    lost: int
    n: int

    mean = property(lambda self: (self.gained - self.lost) / self.n)
    low = property(lambda self: max(-1.0, self._interval()[0]))
    high = property(lambda self: min(1.0, self._interval()[1]))

    def _interval(self) -> tuple[float, float]:
        more, n = self.gained - self.lost, self.n + 2
        half = Z * math.sqrt(self.gained + self.lost + 1 - more**2 / n) / n
        return more / n - half, more / n + half

    def __str__(self) -> str:
        mean, low, high = (f"{100 * x:+.1f}" for x in (self.mean, self.low, self.high))
        return f"{mean} points [{low}, {high}]; {self.gained} gained, {self.lost} lost of {self.n}"


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean over independent seeds and its interval by Student's t; a single seed has none: low = high."""
    from scipy.stats import t

    middle, n = fmean(values), len(values)
    half = float(t.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n) if n > 1 else 0.0
    return Estimate(middle, middle - half, middle + half)


def over_both(table: Sequence[Sequence[float]], seed: int = 0) -> Estimate:
    """The mean of a table, a row for each seed of a training and a column for each problem, with its 95 %
    percentile bootstrap interval: seeds and problems are drawn anew, each by themselves, 2,000 times.
    """
    import numpy as np

    values, rng = np.asarray(table, float), np.random.default_rng(seed)
    seeds, problems = (rng.multinomial(n, np.full(n, 1 / n), 2000) / n for n in values.shape)
    low, high = np.quantile(((seeds @ values) * problems).sum(1), (0.025, 0.975))
    return Estimate(float(values.mean()), float(low), float(high))
