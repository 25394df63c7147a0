"""What a model forgets while it learns a task: simple questions with an answer that a program finds, and how
surprising it finds plain text. Questions and text are in data/general, written for this workbook.
"""

import math
import re
from pathlib import Path
from typing import Any

from rlnb import files
from rlnb.measure.intervals import Proportion
from rlnb.model import sampling

import torch

DATA = Path(__file__).parents[2] / "data" / "general"


def answered(text: str, wants: str) -> bool:
    """Whether an answer in words holds what is wanted; JSON, which nobody has asked for, does not count."""
    return not text.lstrip().startswith(("{", "[")) and re.search(wants, text, re.IGNORECASE) is not None


def asked(model: Any, tokenizer: Any, n: int | None = None) -> tuple[Proportion, list[str]]:
    """How many of the questions, or of the first n, a model answers greedily, and what it says."""
    rows = files.rows(DATA / "prompts.jsonl", {"prompt": str, "wants": str})[:n]  # wants: a regular expression
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    found = sampling.sample(model, tokenizer, prompts, temperature=0, max_new_tokens=48, progress=False)
    texts = [text for (text,) in found.texts]
    right = [answered(text, row["wants"]) for text, row in zip(texts, rows, strict=True)]
    return Proportion(sum(right), len(right)), texts


def perplexity(model: Any, tokenizer: Any, text: str | None = None) -> float:
    """exp of the mean loss in nats a token on plain text, its paragraphs read one by one. Default: text.txt."""
    text = (DATA / "text.txt").read_text(encoding="utf-8") if text is None else text
    loss, tokens = 0.0, 0
    with sampling.inference(model) as module:
        for paragraph in text.split("\n\n"):
            ids = torch.tensor([tokenizer(text=paragraph)["input_ids"]], device=model.device)
            logits = module(input_ids=ids).logits[0, :-1].float()
            loss += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            tokens += ids.shape[1] - 1
    return math.exp(loss / tokens)
