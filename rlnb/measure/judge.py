"""How good a judge is: a reward model on pairs, right against wrong, and as the one who picks."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.stats import rankdata

from rlnb.measure.intervals import Proportion
from rlnb.model.reward_model import score


@dataclass(frozen=True)
class PairReport:
    """What a reward model says of pairs: margins are r(chosen) - r(rejected), a pair each."""

    margins: tuple[float, ...]

    @property
    def accuracy(self) -> Proportion:
        """How often the chosen one has the higher reward; equal rewards count as wrong."""
        return Proportion(sum(m > 0 for m in self.margins), len(self.margins))

    @property
    def loss(self) -> float:
        """Mean of -log sigmoid(margin), in nats; ln 2 = 0.693 for a model that cannot tell."""
        return float(np.logaddexp(0, -np.array(self.margins)).mean())

    def calibration(self, bins: int = 5) -> list[tuple[float, Proportion]]:
        """(mean of sigmoid(|margin|), share in the right order) of equally many pairs each, least sure first."""
        groups = np.array_split(sorted(self.margins, key=abs), min(bins, len(self.margins)))
        return [(float((1 / (1 + np.exp(-abs(g)))).mean()), PairReport(tuple(g.tolist())).accuracy)
                for g in groups]  # fmt: skip


def judge_pairs(model: Any, tokenizer: Any, pairs: Iterable[Mapping[str, Any]]) -> PairReport:
    """The margins of a data set with the columns prompt, chosen and rejected."""
    pairs = list(pairs)
    texts = [row["prompt"] + row[side] for side in ("chosen", "rejected") for row in pairs]
    found = score(model, tokenizer, texts)
    return PairReport(tuple(a - b for a, b in zip(found, found[len(pairs) :], strict=False)))


def auc(right: Iterable[float], wrong: Iterable[float]) -> float:
    """The chance that one of the right scores higher than one of the wrong; a tie counts half.

    The area under the ROC curve: 0.5 for a model that cannot tell. ValueError for no score or one that is not finite.
    """
    right, wrong = list(right), list(wrong)
    if not right or not wrong or not all(map(math.isfinite, right + wrong)):
        raise ValueError(f"{len(right)} right and {len(wrong)} wrong scores: each needs one, and none may be NaN")
    ranks = rankdata(right + wrong)[: len(right)]
    return float((ranks.mean() - (len(right) + 1) / 2) / len(wrong))


def best_of_n(
    proxy: Sequence[Sequence[float]], gold: Sequence[Sequence[float]], ns: Iterable[int]
) -> dict[int, float]:
    """Expected gold score of the sample with the highest proxy score among n, mean over prompts.

    proxy, gold: (prompts, samples). Exact, not by drawing: with the N samples of a prompt sorted by proxy, the
    i-th is the best of n with probability C(i-1, n-1) / C(N, n). Raises ValueError for an n outside 1..N.
    """
    prompts = list(zip(proxy, gold, strict=True))
    return {n: float(np.mean([_expected_best(p, g, n) for p, g in prompts])) for n in ns}


def _expected_best(proxy: Sequence[float], gold: Sequence[float], n: int) -> float:
    if not 1 <= n <= len(proxy):
        raise ValueError(f"best of n={n}: there are {len(proxy)} samples of a prompt")
    _, place, sizes = np.unique(proxy, return_inverse=True, return_counts=True)  # lowest score first
    means = np.bincount(place, np.asarray(gold, float)) / sizes  # of the samples that share a score
    ways = [math.comb(last, n) for last in (0, *sizes.cumsum().tolist())]  # draws with nothing above it
    return float(means @ [(b - a) / ways[-1] for a, b in pairwise(ways)])


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n from the policy in nats, log n - (n - 1) / n; less where samples repeat."""
    return math.log(n) - (n - 1) / n
