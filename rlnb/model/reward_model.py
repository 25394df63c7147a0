"""Reward models: a score head and a LoRA adapter on the base, trained on pairs by TRL's RewardTrainer. The reward of a
completion is one number, r(x, y), read off at its last token. Only differences between completions of one prompt mean
something: y is preferred to z with the chance sigmoid(r(x, y) - r(x, z)) (Bradley and Terry 1952).
"""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rlnb.model import attention
from rlnb.model.backends import quiet
from rlnb.model.folders import read_saved, resolve
from rlnb.model.lora import LoRA

import torch  # these come after rlnb.model, which brings in Unsloth
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

Messages = list[dict[str, str]]


def load(
    name: str | os.PathLike[str], lora: LoRA | str | os.PathLike[str], *, seed: int = 0
) -> tuple[Any, Any]:
    """A model with one output per sequence, and its tokenizer.

    lora: LoRA(...) for a new adapter with a new score head, or the folder of a saved reward adapter,
    which does not train. transformers and PEFT load it: Unsloth speeds up causal models only.
    """
    base = resolve(name)
    if not isinstance(lora, LoRA):
        lora, _ = read_saved(lora, base, reward=True)
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right")
    torch.manual_seed(seed)
    with quiet(bars=not Path(base).is_dir()), ExitStack() as stack:
        stack.callback(logging.set_verbosity, logging.get_verbosity())
        logging.set_verbosity_error()  # the score head is new, as it has to be, and that would be reported
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=1, dtype=torch.float32, pad_token_id=tokenizer.pad_token_id
        ).to("cuda" if torch.cuda.is_available() else "cpu")
    attention.use(model)
    if not isinstance(lora, LoRA):
        return PeftModel.from_pretrained(model, str(lora)).eval(), tokenizer
    return get_peft_model(model, lora.config(task_type="SEQ_CLS", modules_to_save=["score"])), tokenizer


def score(model: Any, tokenizer: Any, conversations: Sequence[Messages], batch_size: int = 32) -> list[float]:
    """The reward of each conversation, prompt and completion together; equal ones are read once."""
    ids = tokenizer.apply_chat_template(list(conversations), tokenize=True, return_dict=True)["input_ids"]
    ids = [tuple(row) for row in ids]
    if not hasattr(model, "score"):
        raise TypeError(f"{type(model).__name__} is no reward model: load one with reward_model.load")
    order = sorted(set(ids), key=lambda row: (len(row), row))  # like lengths need less padding
    found: dict[tuple[int, ...], float] = {}
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = tokenizer.pad({"input_ids": [list(row) for row in rows]}, return_tensors="pt")
            found.update(zip(rows, model(**batch.to(model.device)).logits[:, 0].tolist(), strict=True))
    model.train(was_training)
    return [found[row] for row in ids]


def as_reward(model: Any, tokenizer: Any) -> Callable[..., list[float]]:
    """The model as a reward function with TRL's signature, for conversational prompts."""

    def reward_model(prompts: list[Messages], completions: list[Messages], **columns: Any) -> list[float]:
        return score(model, tokenizer, [p + c for p, c in zip(prompts, completions, strict=True)])

    return reward_model
