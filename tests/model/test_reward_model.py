"""Reward models: closed forms for pairs and best-of-n, and a real one trained for two steps."""

import itertools
import math
import subprocess
import sys

import pytest

from rlnb.model import reward_model as reward_models
from rlnb.model.reward_model import PairReport


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
    assert reward_models.auc([3, 2], [1, 2, 3]) == pytest.approx((2 + 0.5 + 1 + 0.5) / 6)
    assert reward_models.auc([1.0, 2.0], [-1.0, 0.0]) == 1
    assert reward_models.auc([-1.0], [0.0, 0.5]) == 0
    assert reward_models.auc([7.0] * 3, [7.0] * 5) == 0.5
    with pytest.raises(ValueError, match="0 right and 1 wrong scores"):
        reward_models.auc([], [1.0])


def test_best_of_n_is_the_mean_over_all_draws():
    proxy, gold = [[0.3, 0.1, 0.9, 0.5, 0.7]], [[0.0, 1.0, 0.0, 1.0, 1.0]]
    for n in range(1, 6):
        draws = itertools.combinations(range(5), n)
        best = [gold[0][max(draw, key=lambda i: proxy[0][i])] for draw in draws]
        found = reward_models.best_of_n(proxy, gold, [n])
        assert found[n] == pytest.approx(sum(best) / len(best))


def test_equal_proxy_scores_decide_nothing():
    gold = [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]]
    found = reward_models.best_of_n([[5.0] * 4] * 2, gold, [1, 2, 4])
    assert list(found.values()) == pytest.approx([0.375] * 3)
    with pytest.raises(ValueError, match="best of n=5: there are 4 samples"):
        reward_models.best_of_n([[5.0] * 4] * 2, gold, [5])


def test_the_kl_of_best_of_n():
    assert reward_models.best_of_n_kl(1) == 0
    assert reward_models.best_of_n_kl(4) == pytest.approx(0.636, abs=1e-3)


def test_scores_do_not_hang_on_the_batch_and_survive_saving(tmp_path):
    from rlnb.model import load as models

    model, tokenizer = reward_models.load("abacus-3m", models.LoRA(rank=4))
    texts = [
        [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2" * n}]
        for n in (1, 9, 3, 30)
    ]
    together = reward_models.score(model, tokenizer, texts)
    alone = [reward_models.score(model, tokenizer, [text])[0] for text in texts]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len(set(together)) == 4
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or "score" in name for name in trains)
    assert any("score" in name for name in trains)
    models.save_adapter(model, tmp_path / "adapter")
    again, _ = reward_models.load("abacus-3m", tmp_path / "adapter", seed=5)
    assert reward_models.score(again, tokenizer, texts) == pytest.approx(together, abs=1e-6)


def test_loading_prints_nothing():
    """transformers would report that the score head is new. In a process of its own, as its log goes
    to the stderr that was there when it was imported.
    """
    code = "from rlnb.model import load as models, reward_model as r; r.load('abacus-3m', models.LoRA(rank=4))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "score.weight" not in done.stdout + done.stderr
