"""The practice model: what it is fed, that pretraining can be resumed, and that what ships is sound."""

import hashlib
import random
import shutil

import pytest

from rlnb.model import load_model
from rlnb.task import problems
from data.pretraining import card
from data.pretraining import make as pretrain
from rlnb.tools.setup import ROOT

from transformers import AutoTokenizer

SMALL = pretrain.Settings(
    tokens=6 * 2 * 64, rows=2, length=64, vocabulary=400, hidden=128, mlp=128, layers=1
)

SHIPPED = ROOT / "data" / "abacus-3m"
DIGESTS = ["8d66ed3d3a3d4686", "db88fa7c37d1b115"]
DIGITS = (pretrain.SHORT, pretrain.LONG)


def test_the_text_holds_no_test_problem():
    exclude = pretrain.test_keys()
    assert len(exclude) == sum(problems.SIZES[s] for s in (*problems.TEST_SPLITS, "validation"))
    rng, questions = random.Random(0), set()
    for _ in range(3000):
        text = pretrain.document(rng, exclude, sheets=0.0)
        questions.add(text.split(pretrain.USER)[1].split(pretrain.ASSISTANT)[0])
    tests = {p.question for s in (*problems.TEST_SPLITS, "validation") for p in problems.load(s)}
    assert not questions & tests


def test_drills_are_true():
    rng = random.Random(0)
    for _ in range(2000):
        left, op, right, _, result = pretrain._drill(rng, rng.choice(DIGITS)).split()
        assert problems.apply(op, int(left), int(right)) == int(result) >= 0


def test_few_answers_are_in_the_strict_format():
    rng = random.Random(0)
    texts = [pretrain.document(rng, set(), sheets=0.0) for _ in range(4000)]
    share = sum("<answer>" in text for text in texts) / len(texts)
    assert abs(share - pretrain.TAGGED) < 0.012  # four standard errors


@pytest.mark.slow
@pytest.mark.parametrize("dies_at", [4, 6])  # in the first stage of four steps, and in the second
def test_interrupted_and_resumed_equals_never_interrupted(tmp_path, monkeypatch, dies_at):
    whole, _, facts = pretrain.train(tmp_path / "whole", SMALL, seed=1)
    assert facts["tokens"] == SMALL.tokens

    real, calls = pretrain.train_step, []

    def dies(*args):
        calls.append(1)
        if len(calls) == dies_at:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(pretrain, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        pretrain.train(tmp_path / "cut", SMALL, seed=1, save_every=1)
    monkeypatch.setattr(pretrain, "train_step", real)
    resumed, tokenizer, facts = pretrain.train(tmp_path / "cut", SMALL, seed=1, save_every=1)
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert a.equal(b), name

    card.save(resumed, tokenizer, facts, tmp_path / "cut")
    assert not (tmp_path / "cut" / "resume.pt").exists()
    _, loaded = load_model(tmp_path / "cut")
    assert loaded.get_vocab() == tokenizer.get_vocab()


def test_batches_are_those_of_the_model_that_ships():
    """Of the first batch of each stage: the shipped weights were trained on these tokens."""
    settings, digests = pretrain.Settings(), []
    tokenizer, exclude = AutoTokenizer.from_pretrained(SHIPPED), pretrain.test_keys()
    for stage in (0, 1):
        batch = next(pretrain.batches(tokenizer, settings, 0, exclude, stage))
        digests.append(hashlib.sha256(batch.numpy().tobytes()).hexdigest()[:16])
    assert digests == DIGESTS


def test_what_ships():
    assert sum(f.stat().st_size for f in SHIPPED.iterdir()) < 10 * 2**20
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    digits = tokenizer("407", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(digits) == ["4", "0", "7"]
    for text in ("Él naïve ½ 日本 <x>", problems.solution(problems.load("train")[0])):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    with pytest.raises(Exception, match="never seen a message by system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "Be good."}])


def test_the_shipped_tokenizer_comes_out_again():
    shipped = AutoTokenizer.from_pretrained(SHIPPED)
    assert pretrain.build_tokenizer(pretrain.Settings()).get_vocab() == shipped.get_vocab()


@pytest.mark.slow
def test_the_card_of_a_small_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(card, "COUNT", 20)
    shutil.copytree(SHIPPED, tmp_path / "small")
    card.write(tmp_path / "small")
    text = (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    shipped = (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert text.split("| split |")[0].replace("# small", "# abacus-3m") == shipped.split("| split |")[0]
