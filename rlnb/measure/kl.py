"""How far a policy has moved from its reference."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from rlnb.model import sampling
from rlnb.model.decode_cpu import left_pad

import torch  # after rlnb.model, which brings in Unsloth

Pairs = Sequence[tuple[list[int], list[int]]]  # token ids of a prompt and of its completion
SCORED_AT_ONCE = 2**26  # log-probabilities, in numbers: 256 MiB for each of the two models


@dataclass(frozen=True)
class KL:
    """KL(policy || reference) in nats per sequence, and its standard error over prompts.

    mean is the exact KL of each next token, given what was sampled before it, summed over the sequence: an
    average over all tokens instead of the one that was drawn. It is unbiased, never negative, and never
    varies more than k1 (arXiv 2504.10637), the sum of log p - log q of the tokens drawn (J. Schulman,
    Approximating KL Divergence, 2020), which PPO and GRPO log.
    """

    mean: float
    error: float
    k1: float
    sequences: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} +- {self.error:.3f} nats per sequence ({self.sequences} sequences)"


def kl(
    model: Any, tokenizer: Any, prompts: Sequence[sampling.Prompt], *, reference: Any = None,
    max_new_tokens: int = 64, seed: int = 0, progress: str | bool | None = None,
) -> KL:
    """How far the policy is from its reference, on a fresh sample (temperature 1) of each prompt.

    reference: a model; None is the policy with its adapter disabled, that is the base. After GRPO from an
    SFT adapter the base is not where GRPO started: pass the SFT model for that. The rest is as for
    ``sampling.sample``. Raises ValueError with less than two prompts, and if there is no adapter to disable.
    """
    if len(prompts) < 2:
        raise ValueError(f"{len(prompts)} prompt: a standard error over prompts needs two or more")
    if reference is None and not getattr(model, "peft_config", None):
        raise ValueError("the model has no adapter to disable: pass reference=, the base for one")
    settings = dict(max_new_tokens=max_new_tokens, seed=seed, progress=progress)
    found = sampling.sample(model, tokenizer, prompts, **settings)
    prompt_ids = sampling.tokenize(tokenizer, prompts)
    pairs = [(p, c) for p, (c,) in zip(prompt_ids, found.ids, strict=True)]
    at_once = max(1, SCORED_AT_ONCE // (model.config.get_text_config().vocab_size * max_new_tokens))
    sums: list[tuple[float, float]] = []
    for start in range(0, len(pairs), at_once):
        batch = pairs[start : start + at_once]
        policy = log_probs(model, batch)
        with model.disable_adapter() if reference is None else nullcontext():
            other = log_probs(model if reference is None else reference, batch)
        sums += _divergences(policy, other, batch)
    exact, k1 = zip(*sums, strict=True)
    return KL(fmean(exact), stdev(exact) / math.sqrt(len(exact)), fmean(k1), len(pairs))


def log_probs(model: Any, pairs: Pairs) -> torch.Tensor:
    """(rows, longest completion, vocabulary) in float32, aligned at the right."""
    ids, mask = (x.to(model.device) for x in left_pad([p + c for p, c in pairs], 0))
    longest = max(len(completion) for _, completion in pairs)
    with sampling.inference(model) as module:
        places = (mask.cumsum(1) - 1).clamp(min=0)
        out = module(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False,
                     logits_to_keep=longest + 1)  # fmt: skip
        return out.logits[:, -longest - 1 : -1].float().log_softmax(-1)


def _divergences(policy: torch.Tensor, reference: torch.Tensor, pairs: Pairs) -> list[tuple[float, float]]:
    found = []
    for p, q, (_, completion) in zip(policy, reference, pairs, strict=True):
        p, q = p[-len(completion) :], q[-len(completion) :].to(p.device)
        # A token that the policy rules out adds nothing, whatever the reference makes of it.
        exact = torch.where(p.isneginf(), 0, p.exp() * (p - q)).sum()
        k1 = (p - q).gather(1, torch.tensor(completion, device=p.device)[:, None])
        found.append((exact.item(), k1.sum().item()))
    return found
