"""Reward models: scores whatever the batch, saved and loaded again."""

import subprocess
import sys

import pytest

from rlnb.model import LoRA, reward_model, save_adapter


def test_scores_do_not_hang_on_the_batch_and_survive_saving(tmp_path):
    model, tokenizer = reward_model.load("abacus-3m", LoRA(rank=4))
    texts = [
        [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2" * n}]
        for n in (1, 9, 3, 30)
    ]
    together = reward_model.score(model, tokenizer, texts)
    alone = [reward_model.score(model, tokenizer, [text])[0] for text in texts]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len(set(together)) == 4
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or "score" in name for name in trains)
    assert any("score" in name for name in trains)
    save_adapter(model, tmp_path / "adapter")
    again, _ = reward_model.load("abacus-3m", tmp_path / "adapter", seed=5)
    assert reward_model.score(again, tokenizer, texts) == pytest.approx(together, abs=1e-6)


def test_loading_prints_nothing():
    """transformers would report that the score head is new. In a process of its own, as its log goes
    to the stderr that was there when it was imported.
    """
    code = "from rlnb.model import LoRA, reward_model as r; r.load('abacus-3m', LoRA(rank=4))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "score.weight" not in done.stdout + done.stderr
