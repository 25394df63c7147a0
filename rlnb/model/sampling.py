"""The one way to sample completions: rollouts, evaluation and preference data all go through here.

On a CPU our own loop decodes (rlnb/model/decode_cpu.py), on a GPU the model's own generate, or Unsloth's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from rlnb.model.decode_cpu import Settings, decode, left_pad, up_to_end, view
from rlnb.model.lora import check_positive_int

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Completions:
    """What was sampled, as [prompt][sample]: ids without prompt and padding, texts without special tokens."""

    texts: list[list[str]]
    ids: list[list[list[int]]]


def sample(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], n: int = 1, *, max_new_tokens: int = 64,
    temperature: float = 1.0, seed: int = 0, batch_size: int = 256, progress: str | bool | None = None,
) -> Completions:  # fmt: skip
    """Sample n completions of each prompt. The model and every random state stay as they are.

    prompts: chat messages, which get the chat template and its generation prompt, or plain strings.
    temperature: 0 is greedy: all n are the same. seed: fixes the samples, on a CPU up to rounding.
    progress: a label for a bar, which comes at once; None: a bar after two seconds; False: none.

    Raises ValueError for a setting out of range, a prompt without tokens or too long for the model,
    TypeError for prompts of another kind, FloatingPointError if the model's logits are not finite.
    """
    settings = _settings(model, tokenizer, max_new_tokens, temperature, seed, batch_size, n)
    prompt_ids, draws = tokenize(tokenizer, prompts), 1 if temperature == 0 else n
    flat = _run(model, [ids for ids in prompt_ids for _ in range(draws)], settings, progress)
    texts = tokenizer.batch_decode(flat, skip_special_tokens=True) if flat else []
    by_prompt = [slice(i, i + draws) for i in range(0, len(flat), draws)]
    return Completions(*([column[rows] * (n // draws) for rows in by_prompt] for column in (texts, flat)))


def rollout(prompts: list[Prompt], trainer: Any) -> dict[str, list]:
    """Sample a completion for each prompt: GRPOTrainer(..., rollout_func=sampling.rollout).

    Settings are the trainer's. The seed is drawn from torch's global generator, which the trainer seeds and restores
    on resuming. Raises ValueError if the trainer asks for anything that this does not do, such as vLLM.
    """
    for name, values in (
        ("top_p", (1.0, None)), ("top_k", (0, -1, None)), ("min_p", (None, 0.0)), ("repetition_penalty", (1.0, None)),
        ("tools", (None, [])), ("environments", (None, [])), ("generation_kwargs", (None, {})),
        ("use_vllm", (False, None)),
    ):  # fmt: skip
        if (value := getattr(trainer.args, name, getattr(trainer, name, None))) not in values:
            takes = f"takes {name}={values[0]} only, and the trainer has {value!r}"
            raise ValueError(f"sampling.rollout {takes}: change that or leave rollout_func out")
    model, tokenizer, limit = trainer.model, trainer.processing_class, trainer.max_completion_length
    template = {"chat_template": trainer.chat_template, **trainer.chat_template_kwargs}
    prompt_ids = tokenize(tokenizer, prompts, **template)
    seed = int(torch.randint(2**62, ()))
    settings = _settings(model, tokenizer, limit, trainer.temperature, seed)
    completion_ids = _run(model, prompt_ids, settings, progress=False)
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}


def tokenize(tokenizer: Any, prompts: Sequence[Prompt], **template: Any) -> list[list[int]]:
    """The token ids of each prompt, as TRL's trainers make them. Raises TypeError, or ValueError for an empty one."""
    if isinstance(prompts, str | None) or (kinds := {type(prompt) for prompt in prompts}) not in (set(), {str}, {list}):
        raise TypeError(f"prompts must be a list of strings or a list of conversations, not {str(prompts)[:80]}")
    if kinds == {list}:
        for prompt in prompts:
            if not prompt or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt):
                raise TypeError(f"the prompt {prompt!r:.80} is no conversation: give messages with role and content")
        prompt_ids = tokenizer.apply_chat_template(
            list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True, **template
        )["input_ids"]
    else:
        prompt_ids = tokenizer(text=list(prompts))["input_ids"] if kinds else []
    if [] in prompt_ids:
        raise ValueError(f"prompt {prompt_ids.index([])} has no tokens")
    return prompt_ids


@contextmanager
def inference(model: Any) -> Iterator[torch.nn.Module]:
    """The model, ready to run without gradients: on a CPU a copy that shares the weights, so that nothing
    of the model is touched; elsewhere the model itself, switched to inference and back.
    """
    if model.device.type == "cpu":
        with torch.inference_mode():
            yield view(model)
    else:
        with torch.no_grad(), switched(model):
            yield model


@contextmanager
def switched(model: Any) -> Iterator[None]:
    """Unsloth's switches set more than the mode: checkpointing, the cache, which forward runs."""
    unsloth = hasattr(model, "for_inference")
    modes = [(module, module.training) for module in model.modules()]
    checkpoints = [(module, module.gradient_checkpointing) for module in model.modules()
                   if hasattr(module, "gradient_checkpointing")]  # fmt: skip
    try:
        model.for_inference() if unsloth else model.eval()
        yield
    finally:
        if unsloth:
            model.for_training(use_gradient_checkpointing=next((on for _, on in checkpoints if on), False))
        for module, training in modes:
            module.training = training
        for module, on in checkpoints:  # for_inference turns it off, also for a later training
            module.gradient_checkpointing = on


def _settings(
    model: Any, tokenizer: Any, max_new_tokens: int, temperature: float, seed: int, batch_size: int = 256, n: int = 1
) -> Settings:  # fmt: skip
    for name, value in {"n": n, "max_new_tokens": max_new_tokens, "batch_size": batch_size}.items():
        check_positive_int(name, value)
    if not isinstance(temperature, int | float) or not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature!r}: it must be 0 (greedy) or a positive number")
    pad = tokenizer.pad_token_id or 0  # any token will do: padding is masked, and cut off
    ends = tuple(end_tokens(model, tokenizer))
    return Settings(max_new_tokens, temperature, seed, batch_size, ends, pad)


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The ids of the tokens that end a completion."""
    ends = model.generation_config.eos_token_id or []
    return {tokenizer.eos_token_id, *([ends] if isinstance(ends, int) else ends)} - {None}


def _run(model: Any, rows: list, settings: Settings, progress: str | bool | None) -> list[list[int]]:
    """One completion for each row of prompt ids."""
    # Unsloth cuts what is longer than the max_seq_length that a model was loaded with.
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit = min(filter(None, (positions, getattr(model, "max_seq_length", None))), default=None)
    if limit and (longest := max(map(len, rows), default=0)) + settings.max_new_tokens > limit:
        says = f"but the model has {limit} positions: shorten the prompt or set max_new_tokens lower"
        raise ValueError(f"a prompt has {longest} tokens and max_new_tokens is {settings.max_new_tokens}, {says}")
    look = {"desc": progress, "delay": 0} if isinstance(progress, str) else {"delay": 2}  # seconds
    engine = decode if model.device.type == "cpu" else _generate
    with tqdm(total=len(rows), disable=progress is False, leave=False, **look) as bar, inference(model) as module:
        return engine(module, rows, settings, bar.update)


def _generate(model: Any, prompts: list, s: Settings, done: Callable[[int], Any]) -> list[list[int]]:
    """The model's own generate: Unsloth's forward for GPUs has a cache that only that knows."""
    sampled = {"do_sample": True, "temperature": s.temperature, "top_p": 1.0, "top_k": 0}
    how = sampled if s.temperature > 0 else {"do_sample": False}
    completions = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with torch.random.fork_rng():
        torch.manual_seed(s.seed)
        for start in range(0, len(order), s.batch_size):
            rows = order[start : start + s.batch_size]
            ids, mask = (x.to(model.device) for x in left_pad([prompts[i] for i in rows], s.pad))
            # What is not given here comes from the model's generation_config: some penalise.
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=s.max_new_tokens,
                repetition_penalty=1.0, eos_token_id=list(s.ends), pad_token_id=s.pad, **how,
            )  # fmt: skip
            for i, row in zip(rows, out[:, ids.shape[1] :].tolist(), strict=True):
                completions[i] = up_to_end(row, s.ends)
            done(len(rows))
    return completions
