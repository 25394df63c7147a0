"""What a run will cost, about: memory from the model's shape, seconds from an earlier run on this machine."""

import functools
from collections.abc import Mapping
from typing import Any

from rlnb import machine
from rlnb.model import LoRA, memory, resolve, sampling
from rlnb.model.folders import base_name
from rlnb.model.lora import skeleton, smallest_width, target_layers
from rlnb.profiles import PRACTICE, has_cuda, model_name, profile
from rlnb.record import runs
from rlnb.task import problems
from rlnb.train.loop import LARGE

from transformers import AutoConfig, AutoTokenizer

SIDES = {"dpo": 2, "orpo": 2, "reward_model": 2}  # sequences per row of a batch
HELD = 2  # bytes that a process on a CPU holds for one in use: measured; of a LARGE model one


def earlier_run(method: str) -> runs.Run | None:
    """The newest finished run of the method with this model and profile on this machine, if any."""
    here = dict(method=method, model=base_name(resolve(model_name())), profile=profile(), status="done")
    found = runs.find(**here, **{"machine.platform": machine.describe()["platform"]})
    return next((run for run in found if run.train_seconds and run.config["max_steps"] > 0), None)


def seconds(earlier: runs.Run, settings: Mapping[str, Any]) -> tuple[float, float]:
    """Of a step and of a whole run with these settings: each sequence of a step takes as long as it took."""
    step = earlier.train_seconds / earlier.config["max_steps"] * _sequences(settings) / _sequences(earlier.config)
    return step, earlier.seconds - earlier.train_seconds + settings["max_steps"] * step


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
    return found.trainable, (found.peak - logits) * (1 if has_cuda() or found.parameters > LARGE else HELD)


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
