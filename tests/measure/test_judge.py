"""Judges: closed forms for pairs, AUC and best-of-n, and log-probabilities against a model's own."""

import itertools
import math

import pytest

from rlnb.measure import judge
from rlnb.measure.judge import PairReport



def test_accuracy_loss_and_calibration_of_known_margins():
    assert PairReport((0.0,) * 4).loss == pytest.approx(math.log(2))
    assert PairReport((0.0,) * 4).accuracy.k == 0  # it cannot tell, which is not right
    report = PairReport((2.0, -2.0, 2.0, 2.0, 0.1, -0.1))
    assert report.accuracy.k == 4
    unsure, sure = report.calibration(bins=2)
    assert sure == (pytest.approx(1 / (1 + math.exp(-2))), PairReport((-2.0, 2.0, 2.0)).accuracy)
    assert unsure[1].n == 3
    # Far out, neither the loss nor the confidence may overflow.
    assert PairReport((-800.0,)).loss == pytest.approx(800)
    assert PairReport((-800.0,)).calibration(1)[0][0] == 1.0


def test_auc_by_hand():
    # Of six comparisons 3 beats 1 and 2, ties with 3; 2 beats 1, ties with 2, loses to 3.
    assert judge.auc([3, 2], [1, 2, 3]) == pytest.approx((2 + 0.5 + 1 + 0.5) / 6)
    assert judge.auc([1.0, 2.0], [-1.0, 0.0]) == 1
    assert judge.auc([-1.0], [0.0, 0.5]) == 0
    assert judge.auc([7.0] * 3, [7.0] * 5) == 0.5
    with pytest.raises(ValueError, match="0 right and 1 wrong scores"):
        judge.auc([], [1.0])


def test_best_of_n_is_the_mean_over_all_draws():
    proxy, gold = [[0.3, 0.1, 0.9, 0.5, 0.7]], [[0.0, 1.0, 0.0, 1.0, 1.0]]
    for n in range(1, 6):
        draws = itertools.combinations(range(5), n)
        best = [gold[0][max(draw, key=lambda i: proxy[0][i])] for draw in draws]
        found = judge.best_of_n(proxy, gold, [n])
        assert found[n] == pytest.approx(sum(best) / len(best))


def test_equal_proxy_scores_decide_nothing():
    gold = [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]]
    found = judge.best_of_n([[5.0] * 4] * 2, gold, [1, 2, 4])
    assert list(found.values()) == pytest.approx([0.375] * 3)
    with pytest.raises(ValueError, match="best of n=5: there are 4 samples"):
        judge.best_of_n([[5.0] * 4] * 2, gold, [5])


def test_the_kl_of_best_of_n():
    assert judge.best_of_n_kl(1) == 0
    assert judge.best_of_n_kl(4) == pytest.approx(0.636, abs=1e-3)


def test_draws_with_partly_equal_scores_by_enumeration():
    proxy, gold = [1.0, 1.0, 2.0, 0.0, 2.0, 2.0], [0.0, 1.0, 1.0, 0.0, 0.0, 0.5]
    for n in range(1, 7):
        best = []
        for draw in itertools.combinations(range(6), n):
            top = max(proxy[i] for i in draw)
            tied = [gold[i] for i in draw if proxy[i] == top]
            best.append(sum(tied) / len(tied))
        assert judge.best_of_n([proxy], [gold], [n])[n] == pytest.approx(sum(best) / len(best))
    many = [[float(i) for i in range(2000)]]  # counts of draws far beyond a float
    assert judge.best_of_n(many, [[0.0] * 1000 + [1.0] * 1000], [1000])[1000] == pytest.approx(1)
