"""What a run will cost, about: memory from the model's shape, seconds from earlier runs on this machine."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from rlnb import machine
from rlnb.model import LoRA, memory, sampling
from rlnb.model.folders import base_name, resolve
from rlnb.model.lora import skeleton, smallest_width, target_layers
from rlnb.profiles import PRACTICE, has_cuda, model_name, profile
from rlnb.record import progress, runs
from rlnb.task import problems

import torch
from transformers import AutoConfig, AutoTokenizer

SIDES = {"dpo": 2, "orpo": 2, "reward_model": 2}  # sequences per row of a batch
HELD = 2  # bytes that a process on a CPU holds for one in use: measured


@dataclass(frozen=True)
class Timing:
    """Of one run, in seconds: until its first step, for each sequence of a step, and after its last step."""

    before: float
    sequence: float
    after: float

    def of(self, settings: Mapping[str, Any]) -> tuple[float, float]:
        """Seconds of a step and of a whole run with these settings; a step has its sequences' time."""
        step = self.sequence * _sequences(settings)
        return step, self.before + settings["max_steps"] * step + self.after


def timing(method: str) -> Timing | None:
    """Of the newest finished run of the method with this model and profile on this machine, if any."""
    here = dict(method=method, model=base_name(resolve(model_name())), profile=profile(), status="done")
    for run in runs.find(**here, **{"machine.platform": machine.describe()["platform"]}):
        at = [row["seconds"] for row in run.curve() if "seconds" in row and progress.metrics(row)]
        if len(at) > 1:
            step = (at[-1] - at[0]) / (len(at) - 1)
            return Timing(max(0.0, at[0] - step), step / _sequences(run.config), run.seconds - at[-1])
    return None


def _sequences(settings: Mapping[str, Any]) -> int:
    return settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1)


@functools.lru_cache(1024)
def training(method: str, model: str, rank: int, rows: int, new: int | None) -> tuple[int, int]:
    """(parameters that train, bytes that it takes). rows: of a forward pass. new: tokens of a completion
    that is sampled; None: the data has them. Rows are as long as the longest of the workbook's.
    """
    prompt, answered = lengths(model)
    found = memory.predict(
        model, LoRA(rank=rank), batch=rows * SIDES.get(method, 1), length=prompt + new if new else answered,
        checkpointing=has_cuda() and model != PRACTICE,
    )  # fmt: skip
    logits = 0 if method == "orpo" else found.logits  # the others' losses never hold all of them
    return found.trainable, (found.peak - logits) * (1 if has_cuda() else HELD)


def held() -> int:
    """Bytes that this process holds now, or on a GPU torch's allocator."""
    return torch.cuda.memory_allocated() if has_cuda() else psutil.Process().memory_info().rss


@functools.cache
def narrowest(model: str) -> int:
    """The smallest width of a layer that an adapter goes on."""
    return smallest_width(target_layers(skeleton(AutoConfig.from_pretrained(resolve(model)))))


@functools.cache
def lengths(model: str) -> tuple[int, int]:
    """Tokens of the longest prompt of some training problems, and with a model solution behind it."""
    tokenizer, some = AutoTokenizer.from_pretrained(resolve(model)), problems.load("train")[:128]
    prompts = sampling.tokenize(tokenizer, [problems.prompt(p) for p in some])
    answers = tokenizer([problems.solution(p) for p in some])["input_ids"]
    whole = [len(p) + len(a) + 1 for p, a in zip(prompts, answers, strict=True)]
    return max(map(len, prompts)), max(whole)
