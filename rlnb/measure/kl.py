"""How far a policy has moved from its reference. Called as `evaluate.kl`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from rlnb.model import sampling
from rlnb.model.decode_cpu import left_pad

if TYPE_CHECKING:
    import torch

REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations of LoRA
SCORED_AT_ONCE = 2**26  # log-probabilities, in numbers: 256 MiB for each of the two models


@dataclass(frozen=True)
class KL:
    """KL(policy || reference) in nats per sequence; each error is a standard error over prompts.

    mean is the exact KL of each next token, given what was sampled before it, summed over the
    sequence: an average over all tokens instead of the one that was drawn. It is unbiased, never
    negative, and never varies more than k1 (arXiv 2504.10637). k1 sums log p - log q of the tokens
    drawn, k3 sums q/p - 1 - log(q/p) (J. Schulman, Approximating KL Divergence, 2020): both are
    unbiased too, k1 can come out negative, and k3 can be ruled by a few rare tokens.
    """

    mean: float
    error: float
    k1: float
    k1_error: float
    k3: float
    k3_error: float
    sequences: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} +- {self.error:.3f} nats per sequence ({self.sequences} sequences)"


def kl(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[sampling.Prompt],
    *,
    reference: Any = None,
    n: int = 1,
    max_new_tokens: int = 64,
    seed: int = 0,
    batch_size: int = 256,
    progress: str | bool | None = None,
) -> KL:
    """How far the policy is from its reference, on n fresh samples (temperature 1) of each prompt.

    reference: a model; None is the policy with its adapter disabled, that is the base. After GRPO
        from an SFT adapter the base is not where GRPO started: pass the SFT model for that.
    A sequence ends at the end token or after max_new_tokens.

    Raises ValueError with less than two prompts, and if there is no adapter to disable or its
    initialisation has changed the base.
    """
    if len(prompts) < 2:
        raise ValueError(f"{len(prompts)} prompt: a standard error over prompts needs two or more")
    without = _without_adapter(model) if reference is None else None
    found = sampling.sample(
        model, tokenizer, prompts, n, max_new_tokens=max_new_tokens, seed=seed,
        batch_size=batch_size, progress=progress,
    )  # fmt: skip
    prompt_ids = sampling.tokenize(tokenizer, prompts)
    pairs = [(p, c) for p, group in zip(prompt_ids, found.ids, strict=True) for c in group]
    vocabulary = model.config.get_text_config().vocab_size
    rows = max(1, SCORED_AT_ONCE // (vocabulary * max_new_tokens))
    sums: list[tuple[float, float, float]] = []
    for start in range(0, len(pairs), rows):
        batch = pairs[start : start + rows]
        policy = _log_probs(model, batch)
        if without is None:
            sums += _divergences(policy, _log_probs(reference, batch), batch)
        else:
            with without():
                sums += _divergences(policy, _log_probs(model, batch), batch)
    columns = []
    for values in zip(*sums, strict=True):
        by_prompt = [fmean(values[i : i + n]) for i in range(0, len(values), n)]
        columns += [fmean(by_prompt), stdev(by_prompt) / math.sqrt(len(by_prompt))]
    return KL(*columns, sequences=len(pairs))


def _without_adapter(model: Any) -> Callable[[], Any]:
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    if not configs:
        raise ValueError("the model has no adapter to disable: pass reference=, the base for one")
    for name, config in configs.items():
        init = str(getattr(config, "init_lora_weights", "")).lower()
        if init.startswith(REWRITES_BASE):
            raise ValueError(
                f"adapter {name!r} was initialised with {init!r}, which changes the base's "
                "weights: without the adapter it is not the base, so pass that as reference="
            )
    return model.disable_adapter


def _log_probs(model: Any, pairs: Sequence[tuple[list[int], list[int]]]) -> "torch.Tensor":
    """(rows, longest completion, vocabulary) for (prompt, completion) ids, aligned at the right."""
    ids, mask = (x.to(model.device) for x in left_pad([p + c for p, c in pairs], 0))
    longest = max(len(completion) for _, completion in pairs)
    with sampling.inference(model) as module:
        logits = module(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=longest + 1,
        ).logits
        return logits[:, -longest - 1 : -1].float().log_softmax(-1)


def _divergences(
    policy: "torch.Tensor",
    reference: "torch.Tensor",
    pairs: Sequence[tuple[list[int], list[int]]],
) -> list[tuple[float, float, float]]:
    """The exact, k1 and k3 sums of each row; log-probabilities as from `_log_probs`."""
    import torch

    found = []
    for p, q, (_, completion) in zip(policy, reference, pairs, strict=True):
        p, q = p[-len(completion) :], q[-len(completion) :].to(p.device)
        # A token that the policy rules out adds nothing, whatever the reference makes of it.
        exact = torch.where(p.isneginf(), 0, p.exp() * (p - q)).sum()
        drawn = torch.tensor(completion, device=p.device)[:, None]
        k1 = (p - q).gather(1, drawn)
        found.append((exact.item(), k1.sum().item(), ((-k1).expm1() + k1).sum().item()))
    return found
