"""The decoding loop on a CPU. What saves time (tests/benchmarks/bench_sampling.py): equal prompts are read once,
prompts of like length go together and few are read at a time, rows that have ended leave the batch, query heads
that share a key-value head share its cache, and LoRA is merged into a copy of the weights.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from rlnb.model import attention
from rlnb.model.lora import lora_layers

COMPACT = 7 / 8  # copying the cache pays once no more than this share of its rows is at work
READ_AT_ONCE = 32  # prompts: more fall out of the processor's cache, and need more padding


@dataclass(frozen=True)
class Settings:
    max_new_tokens: int
    temperature: float  # 0 is greedy
    seed: int
    batch_size: int
    ends: tuple[int, ...]  # tokens that end a completion
    pad: int


def decode(view: Any, prompts: list[list[int]], s: Settings, done: Callable[[int], Any]) -> list[list[int]]:
    """The ids of one completion for each prompt's. view: from `view`. done(k): told of k more completions."""
    # All numbers are drawn at once, so that what a row gets does not depend on its batch.
    generator = torch.Generator().manual_seed(s.seed)
    chances = torch.rand(len(prompts), s.max_new_tokens, generator=generator)
    completions = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
    for start in range(0, len(order), s.batch_size):
        rows = order[start : start + s.batch_size]
        found = _decode_batch(view, [prompts[i] for i in rows], chances[rows], s, done)
        for i, ids in zip(rows, found, strict=True):
            completions[i] = ids
    return completions


def _decode_batch(view: Any, prompts: list, chances: Tensor, s: Settings, done: Callable[[int], Any]) -> list:
    """chances: (rows, max_new_tokens), uniform in [0, 1)."""
    cache, logits, mask = _read(view, prompts, s.pad)
    tokens, ends = torch.full(chances.shape, s.pad), torch.tensor(s.ends)
    rows, at_work = torch.arange(len(prompts)), torch.ones(len(prompts), dtype=torch.bool)
    for t in range(s.max_new_tokens):
        token = pick(logits, chances[rows, t], s)
        tokens[rows, t] = token
        ended = at_work & torch.isin(token, ends)
        at_work &= ~ended
        done(int(ended.sum()))
        if t == s.max_new_tokens - 1 or not at_work.any():
            break
        if at_work.sum() <= COMPACT * len(rows):
            cache.batch_select_indices(at_work)
            rows, token, mask = rows[at_work], token[at_work], mask[at_work]
            at_work = at_work[at_work]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        logits = _forward(view, token[:, None], mask, cache)
    done(int(at_work.sum()))
    return [up_to_end(row, s.ends) for row in tokens.tolist()]


def _forward(view: Any, ids: Tensor, mask: Tensor, cache: Cache) -> Tensor:
    """New ids, the mask of all ids so far and the cache -> (rows, vocabulary) logits of the next token."""
    position = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return view(
        input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]  # fmt: skip


def _read(view: Any, prompts: list[list[int]], pad: int) -> tuple[Cache, Tensor, Tensor]:
    """Run the prompts through the model, equal ones once and a few at a time. Returns the cache, and for
    each of `prompts` the logits of the next token and the mask.
    """
    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    ids, mask = left_pad(list(distinct), pad)
    # A cache with a sliding window has a shape of its own, which `_join` does not know.
    simple = all(type(layer) is DynamicLayer for layer in DynamicCache(config=view.config).layers)
    size = READ_AT_ONCE if simple else len(ids)
    logits, caches = [], []
    for ids_here, mask_here in zip(ids.split(size), mask.split(size), strict=True):
        longest = int(mask_here.sum(1).max())
        caches.append(DynamicCache(config=view.config))
        logits.append(_forward(view, ids_here[:, -longest:], mask_here[:, -longest:], caches[-1]))
    cache = _join(caches, ids.shape[1]) if len(caches) > 1 else caches[0]
    where = torch.tensor([distinct[tuple(prompt)] for prompt in prompts])
    cache.batch_select_indices(where)
    return cache, torch.cat(logits)[where], mask[where]


def _join(caches: list[Cache], width: int) -> Cache:
    """One cache for the rows of all, padded on the left to `width` positions."""
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        for name in ("keys", "values"):  # (rows, heads, positions, size)
            tensors = [getattr(layer, name) for layer in layers]
            padded = [torch.nn.functional.pad(t, (0, 0, width - t.shape[2], 0)) for t in tensors]
            setattr(layers[0], name, torch.cat(padded))
    return caches[0]


def left_pad(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """(rows, longest) ids and their attention mask."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def pick(logits: Tensor, chances: Tensor, s: Settings) -> Tensor:
    """(rows, vocabulary) logits and (rows,) numbers, uniform in [0, 1) -> (rows,) token ids.

    Inverts the cumulative distribution. Raises FloatingPointError if the logits are not finite.
    """
    logits = logits.float()
    top, best = logits.max(-1)
    if not top.isfinite().all():
        raise FloatingPointError("the model's logits are not finite: its training has diverged")
    if s.temperature == 0:
        return best
    p = ((logits - top[:, None]) / s.temperature).softmax(-1)
    reached = p.cumsum(-1)
    # A chance is at most 1 - 2**-24, so that its point stays below the total in float32 too.
    return torch.searchsorted(reached, chances[:, None] * reached[:, -1:], right=True)[:, 0]


def up_to_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """ids up to and including the first end token; all of them if there is none."""
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids)


def view(model: Any) -> Any:
    """A copy of a model's modules that shares its weights, in eval mode and with LoRA merged: the model stays
    as it is, bit for bit. Merged is float32 only: 16 bits lose small updates.
    """
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    copied = copy.deepcopy(model, shared).eval()
    for module in copied.modules():  # accelerate puts the trainer's autocast there, and TRL a way back to the model
        vars(module).pop("forward", None)
    for layer in lora_layers(copied).values():
        base = layer.get_base_layer()
        if layer.merged or layer.disable_adapters:
            continue
        if base.weight.dtype != torch.float32:  # else each token would cast them
            for part in chain(layer.lora_A.values(), layer.lora_B.values()):
                part.weight = torch.nn.Parameter(part.weight.detach().to(base.weight.dtype), requires_grad=False)
            continue
        for name, parameter in list(base.named_parameters(recurse=False)):
            setattr(base, name, torch.nn.Parameter(parameter.detach().clone(), requires_grad=False))
        layer.merge()
    attention.use(copied)
    return copied
