"""The attention of models on a CPU. PyTorch's fused attention is made for long texts. On short ones in bfloat16, on a
CPU, it takes twice as long to train as plain matrix products (tests/benchmarks/bench_attention.py), which keep (rows,
heads, length, length) numbers for the backward pass and so are used where that is small. When a token is generated,
grouped query heads share a key-value head (arXiv 2305.13245), which the fused attention would copy for each of them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

MOST = 2**24  # attention weights in a layer, of which 96 MiB are kept
PIECE = 2**22  # of them at a time: larger tensors are slower, each is fetched from the system anew


def use(model: Any) -> None:
    """Put this attention in the place of "sdpa" in a model of transformers, on a CPU."""
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("rlnb")


def is_plain(rows: int, heads: int, new: int, length: int, low: bool) -> bool:
    """Whether plain matrix products are the faster way. low: they are in 16 bits."""
    return low and new > 1 and rows * heads * new * length <= MOST


def _attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **rest):
    rows, heads, new, size = query.shape
    unusual, mask = dropout or rest.get("position_bias") is not None, attention_mask
    if not unusual and new == 1 and heads > key.shape[1]:
        query = query.reshape(rows, key.shape[1], -1, size)  # a group's heads: queries of one attention
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return out.reshape(rows, 1, heads, -1), None
    low = value.dtype.itemsize == 2 or torch.is_autocast_enabled(value.device.type)
    if unusual or not is_plain(rows, heads, new, key.shape[2], low):
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, is_causal, **rest)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and causal:
        mask = query.new_ones(1, 1, new, key.shape[2], dtype=bool).tril()
    return plain(query, key, value, mask, scaling), None


def plain(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(Q K^T x scale + mask) V (arXiv 1706.03762, eq. 1), the softmax in float32.

    query: (rows, heads, new, size); key and value: (rows, key-value heads, length, size); mask: (rows or 1,
    heads or 1, new, length), True where seen, or numbers to add; scale: default 1 / sqrt(size). Returns
    (rows, new, heads, size), as transformers wants it.
    """
    rows, heads, new, size = query.shape
    shared, length = key.shape[1], key.shape[2]
    at_once = max(1, PIECE // (heads * new * length))
    if rows > at_once:
        own = mask is not None and len(mask) > 1  # else all rows share it
        pieces = [slice(i, i + at_once) for i in range(0, rows, at_once)]
        return torch.cat([plain(query[i], key[i], value[i], mask[i] if own else mask, scale) for i in pieces])
    query = query.reshape(rows, shared, -1, size) * (size**-0.5 if scale is None else scale)
    weights = (query @ key.transpose(2, 3)).view(rows, heads, new, length)
    if mask is not None and mask.dtype == torch.bool:
        # The least number, not minus infinity: padding that sees nothing gets no NaN.
        least = torch.finfo(weights.dtype).min
        mask = torch.zeros(mask.shape, dtype=weights.dtype).masked_fill(~mask, least)
    weights = weights if mask is None else weights + mask
    weights = weights.softmax(-1, dtype=torch.float32).to(value.dtype)
    out = weights.view(rows, shared, -1, length) @ value
    return out.view(rows, heads, new, size).transpose(1, 2)


AttentionInterface.register("rlnb", _attention)
AttentionMaskInterface.register("rlnb", sdpa_mask)
