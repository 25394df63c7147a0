"""The attention of models on a CPU against transformers' own."""

import pytest
import torch
import transformers
from transformers.integrations.sdpa_attention import repeat_kv

from rlnb.model import attention, load_model

SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             vocab_size=120, max_position_embeddings=64)  # fmt: skip
MAKES = {
    "llama": dict(num_key_value_heads=2),
    "mistral": dict(num_key_value_heads=2, sliding_window=6),
    "qwen3": dict(num_key_value_heads=1, head_dim=32),
    "gpt2": {},
}


def tensors(rows=3, heads=4, shared=2, new=7, length=9, size=8):
    torch.manual_seed(0)
    shapes = [(rows, heads, new, size), *[(rows, shared, length, size)] * 2]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def fused(query, key, value, mask, scale=None):
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale
    ).transpose(1, 2)


@pytest.mark.parametrize("at_once", (1, 2**22))
@pytest.mark.parametrize("rows_of_mask", (0, 1, 3))
@pytest.mark.parametrize("scale", (None, 0.3))
@pytest.mark.parametrize("numbers", (False, True))
def test_plain_is_fused(monkeypatch, at_once, rows_of_mask, scale, numbers):
    """Values and gradients, whole and in pieces of one row, with every kind of mask."""
    monkeypatch.setattr(attention, "PIECE", at_once)
    mask = None
    if rows_of_mask:
        mask = torch.rand(rows_of_mask, 1, 7, 9) > 0.3
        mask[..., 0] = True
        mask = torch.where(mask, 0.0, -torch.inf) if numbers else mask
    mine, theirs = tensors(), tensors()
    found, expected = attention.plain(*mine, mask, scale), fused(*theirs, mask, scale)
    torch.testing.assert_close(found, expected)
    for out in (found, expected):
        out.square().sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_row_that_sees_nothing_is_finite():
    query, key, value = tensors()
    mask = torch.ones(3, 1, 7, 9, dtype=torch.bool)
    mask[1, :, :2] = False
    attention.plain(query, key, value, mask).sum().backward()
    assert all(x.grad.isfinite().all() for x in (query, key, value))


def of_make(kind):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SMALL | MAKES[kind])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", MAKES)
def test_a_model_computes_the_same_with_it(kind, monkeypatch):
    """Loss and gradients, with and without padding; plain is what runs."""
    calls, plain = [], attention.plain
    monkeypatch.setattr(attention, "plain", lambda *a: calls.append(1) or plain(*a))
    monkeypatch.setattr(attention, "is_plain", lambda rows, heads, new, length, low: new > 1)  # in float32 too
    ids = torch.randint(2, 119, (3, 20))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    found = {}
    for quick in (False, True):
        model = of_make(kind)
        if quick:
            attention.use(model)
            assert model.config._attn_implementation == "rlnb"
        for name, given in (("whole", {}), ("padded", {"attention_mask": mask})):
            labels = ids.clone()
            labels[0, :6] = -100  # what padding predicts is nobody's business
            model.zero_grad()
            loss = model(input_ids=ids, labels=labels, **given).loss
            loss.backward()
            grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            found[quick, name] = loss.detach(), grads
    assert len(calls) == 2 * 2
    for name in ("whole", "padded"):
        torch.testing.assert_close(found[True, name], found[False, name])


def test_under_autocast_it_is_as_exact_as_the_fused_one():
    """Both round to bfloat16; the distance to float32 is of one size."""
    ids, grads = torch.randint(2, 119, (3, 20)), {}
    for kind, quick, low in (("exact", False, False), ("fused", False, True), ("plain", True, True)):
        model = of_make("llama")
        if quick:
            attention.use(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            model(input_ids=ids, labels=ids).loss.backward()
        grads[kind] = torch.cat([p.grad.flatten() for p in model.parameters()])
    fused, plain = ((grads[kind] - grads["exact"]).norm() for kind in ("fused", "plain"))
    assert 0 < plain < 1.2 * fused


def test_float32_and_long_texts_are_left_to_the_fused_one(monkeypatch):
    monkeypatch.setattr(attention, "plain", None)  # a call would fail
    model, ids = of_make("llama"), torch.randint(2, 119, (3, 20))
    attention.use(model)
    model(input_ids=ids)
    monkeypatch.setattr(attention, "MOST", 3 * 4 * 20 * 20 - 1)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids)


def test_another_attention_is_left_alone():
    model = of_make("llama")
    model.set_attn_implementation("eager")
    attention.use(model)
    assert model.config._attn_implementation == "eager"


def test_loaded_models_have_it_and_saved_ones_do_not_tell(tmp_path):
    model, _ = load_model("abacus-3m")
    assert model.config._attn_implementation == "rlnb"
    model.save_pretrained(tmp_path)
    assert "rlnb" not in (tmp_path / "config.json").read_text()
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert stock.config._attn_implementation == "sdpa"
