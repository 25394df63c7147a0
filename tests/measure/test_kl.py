"""The divergence against all sequences of two tokens, and its estimators against each other."""

import copy

import pytest

from rlnb.measure import kl as divergence
from rlnb.measure.kl import kl
from rlnb.model import LoRA, load_model, sampling
from tests import tiny

import torch  # after rlnb.model, which brings in Unsloth

PROMPTS = [[{"role": "user", "content": text}] for text in tiny.CORPUS]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A random model with opinions, and an adapter that changes them."""
    folder = tiny.make(tmp_path_factory.mktemp("model"))
    model, tokens = load_model(folder, lora=LoRA(rank=4))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            size = 0.06 if "lora" in name else 0.12
            parameter.data.normal_(0, size, generator=generator)
    return model.eval(), tokens


@torch.no_grad()
def exact_kl_of_two_tokens(model, prompt, end):
    """By the chain rule, over every first token; after the end token there is no second one."""

    def log_probs():
        first = model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        rows = torch.tensor([[*prompt, token] for token in range(len(first))])
        return first, model(input_ids=rows).logits[:, -1].log_softmax(-1)

    p1, p2 = log_probs()
    with model.disable_adapter():
        q1, q2 = log_probs()
    second = (p2.exp() * (p2 - q2)).sum(-1)
    second[end] = 0
    return ((p1.exp() * (p1 - q1)).sum() + (p1.exp() * second).sum()).item()


def test_kl_agrees_with_all_sequences_of_two_tokens(adapted):
    model, tokens = adapted
    prompt_ids = sampling.tokenize(tokens, PROMPTS)
    exact = [exact_kl_of_two_tokens(model, prompt, tokens.eos_token_id) for prompt in prompt_ids]
    found = [
        kl(model, tokens, [prompt] * 800, max_new_tokens=2, seed=seed)
        for seed, prompt in enumerate(PROMPTS)
    ]
    for truth, estimate in zip(exact, found, strict=True):
        assert truth > 0.1
        assert estimate.mean == pytest.approx(truth, rel=0.05)
        assert estimate.k1 == pytest.approx(truth, rel=0.35)


def test_the_exact_sum_has_a_small_error(adapted):
    model, tokens = adapted
    found = kl(model, tokens, PROMPTS[:1] * 64, max_new_tokens=12)
    assert 0 < found.error < found.mean / 4 and abs(found.k1 - found.mean) < 8 * found.error
    assert found.sequences == 64
    assert str(found).endswith("nats per sequence (64 sequences)")


def test_rows_of_different_length_are_scored_as_alone(adapted):
    model, _ = adapted
    pairs = [([5, 6, 7, 8, 9], [10]), ([11], [12, 13, 14]), ([15, 16], [17, 18])]

    def score(pairs):
        policy = divergence.log_probs(model, pairs)
        with model.disable_adapter():
            return divergence._divergences(policy, divergence.log_probs(model, pairs), pairs)

    for together, pair in zip(score(pairs), pairs, strict=True):
        assert together == pytest.approx(score([pair])[0], rel=1e-4)


def test_kl_to_itself_is_zero_and_a_reference_can_be_given(adapted):
    model, tokens = adapted
    itself = kl(model, tokens, PROMPTS, reference=model, max_new_tokens=8)
    assert (itself.mean, itself.k1) == pytest.approx((0, 0), abs=1e-6)
    disabled = kl(model, tokens, PROMPTS, max_new_tokens=8)
    base = copy.deepcopy(model)
    for name, parameter in base.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    given = kl(model, tokens, PROMPTS, max_new_tokens=8, reference=base)
    assert given.mean == pytest.approx(disabled.mean, rel=1e-4)


def test_kl_refuses_what_is_no_reference(adapted, tmp_path):
    model, tokens = adapted
    base, _ = load_model(tiny.make(tmp_path))
    with pytest.raises(ValueError, match="no adapter to disable"):
        kl(base, tokens, PROMPTS)
    with pytest.raises(ValueError, match="1 prompt"):
        kl(model, tokens, PROMPTS[:1])
