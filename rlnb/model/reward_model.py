"""Reward models: a score head and a LoRA adapter on the base, trained on pairs by TRL's RewardTrainer.

The reward of a completion is one number, r(x, y), read off at its last token. Only differences
between completions of one prompt mean something: under the model of Bradley and Terry (1952) the
chance that y is preferred to z is sigmoid(r(x, y) - r(x, z)).
"""

import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from rlnb.model import attention, load as models
from rlnb.measure.evaluate import Proportion
from rlnb.model.load import LoRA

Messages = list[dict[str, str]]


def load(
    name: str | os.PathLike[str], lora: LoRA | str | os.PathLike[str], *, seed: int = 0
) -> tuple[Any, Any]:
    """A model with one output per sequence, and its tokenizer.

    lora: LoRA(...) for a new adapter with a new score head, or the folder of a saved reward adapter,
    which does not train. transformers and PEFT load it: Unsloth speeds up causal models only.
    """
    models.backend()
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = models.resolve(name)
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right")
    torch.manual_seed(seed)
    with models.quiet(bars=not Path(base).is_dir()), _without_report():
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=1, dtype=torch.float32, pad_token_id=tokenizer.pad_token_id
        ).to("cuda" if torch.cuda.is_available() else "cpu")
    attention.use(model)
    if not isinstance(lora, LoRA):
        model = PeftModel.from_pretrained(model, str(lora)).eval()
        models.spare_casts(model)
        return model, tokenizer
    config = LoraConfig(
        task_type="SEQ_CLS", r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        modules_to_save=["score"],
    )  # fmt: skip
    model = get_peft_model(model, config)
    models.spare_casts(model)
    return model, tokenizer


@contextmanager
def _without_report() -> Iterator[None]:
    """transformers reports at length that the score head is new, which is as it has to be."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def score(
    model: Any, tokenizer: Any, texts: Sequence[Messages], batch_size: int = 32
) -> list[float]:
    """The reward of each conversation, prompt and completion together; equal ones are read once."""
    import torch

    asked = tokenizer.apply_chat_template(list(texts), tokenize=True, return_dict=True)["input_ids"]
    asked = [tuple(ids) for ids in asked]
    order = sorted(set(asked), key=lambda ids: (len(ids), ids))  # like lengths need less padding
    found: dict[tuple[int, ...], float] = {}
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = tokenizer.pad({"input_ids": [list(ids) for ids in rows]}, return_tensors="pt")
            scores = model(**batch.to(model.device)).logits[:, 0].tolist()
            found.update(zip(rows, scores, strict=True))
    model.train(was_training)
    return [found[ids] for ids in asked]


def as_reward(model: Any, tokenizer: Any) -> Callable[..., list[float]]:
    """The model as a reward function with TRL's signature, for conversational prompts."""

    def reward_model(
        prompts: list[Messages], completions: list[Messages], **columns: Any
    ) -> list[float]:
        return score(model, tokenizer, [p + c for p, c in zip(prompts, completions, strict=True)])

    return reward_model


@dataclass(frozen=True)
class PairReport:
    """What a reward model says of pairs: margins are r(chosen) - r(rejected), a pair each."""

    margins: tuple[float, ...]

    @property
    def accuracy(self) -> Proportion:
        """How often the chosen completion has the higher reward; equal rewards count as wrong."""
        return Proportion(sum(m > 0 for m in self.margins), len(self.margins))

    @cached_property
    def loss(self) -> float:
        """Mean of -log sigmoid(margin), in nats; ln 2 = 0.693 for a model that cannot tell."""
        return sum(_softplus(-m) for m in self.margins) / len(self.margins)

    def calibration(self, bins: int = 5) -> list[tuple[float, Proportion]]:
        """(mean confidence, share in the right order) of equally many pairs each, least sure first.

        Confidence is sigmoid(|margin|). Of a calibrated model the two agree.
        """
        by_confidence = sorted(self.margins, key=abs)
        cuts = [round(i * len(by_confidence) / bins) for i in range(bins + 1)]
        groups = (by_confidence[a:b] for a, b in pairwise(cuts) if b > a)
        return [
            (sum(math.exp(-_softplus(-abs(m))) for m in group) / len(group),
             PairReport(tuple(group)).accuracy)
            for group in groups
        ]  # fmt: skip


def judge_pairs(model: Any, tokenizer: Any, pairs: Iterable[Mapping[str, Any]]) -> PairReport:
    """The margins of a data set with the columns prompt, chosen and rejected."""
    pairs = list(pairs)
    texts = [row["prompt"] + row[side] for side in ("chosen", "rejected") for row in pairs]
    found = score(model, tokenizer, texts)
    return PairReport(tuple(a - b for a, b in zip(found, found[len(pairs) :], strict=False)))


def auc(right: Iterable[float], wrong: Iterable[float]) -> float:
    """The chance that one of the right scores higher than one of the wrong; a tie counts half.

    The area under the ROC curve, and the statistic of Mann and Whitney (1947) over its largest
    value; 0.5 for a model that cannot tell. Raises ValueError if either has no score.
    """
    right, wrong = list(right), sorted(wrong)
    if not right or not wrong:
        raise ValueError(f"{len(right)} right and {len(wrong)} wrong scores: each needs one")
    wins = sum(bisect_left(wrong, x) + bisect_right(wrong, x) for x in right) / 2
    return wins / (len(right) * len(wrong))


def best_of_n(
    proxy: Sequence[Sequence[float]], gold: Sequence[Sequence[float]], ns: Iterable[int]
) -> dict[int, float]:
    """Expected gold score of the sample with the highest proxy score among n, mean over prompts.

    proxy, gold: (prompts, samples). Exact, not by drawing: with the N samples of a prompt sorted by
    proxy, the i-th is the best of n with probability C(i-1, n-1) / C(N, n). Equal proxy scores share
    their places. Raises ValueError for an n outside 1..N.
    """
    ns, found = tuple(ns), {}
    for n in ns:
        values = []
        for scores, truth in zip(proxy, gold, strict=True):
            if not 1 <= n <= len(scores):
                raise ValueError(f"best of n={n}: there are {len(scores)} samples of a prompt")
            values.append(_expected_best(scores, truth, n))
        found[n] = math.fsum(values) / len(values)
    return found


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n from the policy in nats, log n - (n - 1) / n; less where samples repeat."""
    return math.log(n) - (n - 1) / n


def _expected_best(scores: Sequence[float], truth: Sequence[float], n: int) -> float:
    ordered = sorted(zip(scores, truth, strict=True), key=lambda pair: pair[0])
    total, place, all_ways = 0.0, 0, math.comb(len(ordered), n)
    for _, group in groupby(ordered, key=lambda pair: pair[0]):
        equal = [value for _, value in group]
        ways = math.comb(place + len(equal), n) - math.comb(place, n)  # the best is in this group
        total += ways / all_ways * math.fsum(equal) / len(equal)
        place += len(equal)
    return total


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
