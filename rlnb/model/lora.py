"""LoRA's rules, checked before any weight is read."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ALL_LINEAR = ATTENTION + MLP
MAX_LORA_RANK = 64  # the default
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm.config.lora.MaxLoRARanks
INITS = {"default": True, "gaussian": "gaussian"}  # ours -> PEFT's
REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # how PEFT's names of such inits begin


@dataclass(frozen=True)
class LoRA:
    """A new low-rank adapter: W x becomes W x + s B A x, and only A and B train.

    rank: r, A's rows and B's columns. alpha: s is alpha / r. dropout: on x, in the adapter's branch only.
    targets: names of linear layers, as ATTENTION, or "all-linear": all but the output layer.
    init: how A starts: "default" (Kaiming uniform) or "gaussian". B starts at zero, so the model is
        unchanged at step 0 (arXiv 2106.09685, 4.1).
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: tuple[str, ...] | str = ALL_LINEAR
    init: str = "default"

    def __post_init__(self) -> None:
        check_positive_int("LoRA rank", self.rank)
        check_init(self.init)
        if isinstance(self.targets, list | set):
            object.__setattr__(self, "targets", tuple(self.targets))
        names = isinstance(self.targets, tuple) and self.targets and all(isinstance(t, str) for t in self.targets)
        alpha = isinstance(self.alpha, int | float) and 0 < self.alpha < math.inf
        dropout = isinstance(self.dropout, int | float) and 0 <= self.dropout < 1
        targets = names or self.targets == "all-linear"
        fine = {"alpha": alpha, "dropout": dropout, "targets": targets, "init": self.init in INITS}
        if wrong := [f"{name} is {getattr(self, name)!r}" for name, holds in fine.items() if not holds]:
            rules = f'alpha above 0, dropout in [0, 1), targets "all-linear" or names, as {ATTENTION}'
            raise ValueError(f"LoRA {', '.join(wrong)}: it takes {rules}, init one of {', '.join(INITS)}")

    def config(self, **more: Any) -> LoraConfig:
        """PEFT's config of this adapter."""
        return LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, init_lora_weights=INITS[self.init],
            target_modules=self.targets if isinstance(self.targets, str) else list(self.targets), **more,
        )  # fmt: skip


def check_positive_int(what: str, value: Any) -> None:
    """Raise ValueError unless the value is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} is {value!r}: it must be a whole number of at least 1")


def check_rank(rank: int, max_lora_rank: int = MAX_LORA_RANK, smallest_width: int | None = None) -> None:
    """Raise ValueError unless 1 <= rank <= max_lora_rank, which Unsloth never compares and vLLM compares at
    the first rollout, and rank <= `smallest_width`, if given.
    """
    check_positive_int("LoRA rank", rank)
    check_positive_int("max_lora_rank", max_lora_rank)
    if rank > max_lora_rank:
        way = f"pass max_lora_rank={rank} to load_model, which costs memory for rollouts with vLLM"
        raise ValueError(f"LoRA rank {rank} is above max_lora_rank {max_lora_rank}: lower the rank, or {way}")
    if smallest_width is not None and rank > smallest_width:
        way = "lower the rank, or leave the narrow layers out of targets"
        raise ValueError(f"LoRA rank {rank} is above {smallest_width}, the smallest width of a target layer: {way}")


def largest_rank(adapter: Any) -> int:
    """The largest rank that PEFT's config of an adapter has anywhere."""
    return max([adapter.r, *(adapter.rank_pattern or {}).values()])


def vllm_rank(max_lora_rank: int) -> int:
    """The max_lora_rank that vLLM takes: the next of VLLM_RANKS. ValueError above the last one."""
    check_positive_int("max_lora_rank", max_lora_rank)
    if max_lora_rank > VLLM_RANKS[-1]:
        raise ValueError(f"max_lora_rank {max_lora_rank} is above {VLLM_RANKS[-1]}, the most that vLLM has")
    return next(rank for rank in VLLM_RANKS if rank >= max_lora_rank)


def check_init(init: Any, where: str = "LoRA init") -> None:
    """Raise ValueError for an init that moves a part of the base, the reference of most methods, into the adapter."""
    if isinstance(init, str) and init.lower().startswith(REWRITES_BASE):
        says = "no longer the base, and GRPO, PPO, DPO, KTO and every KL take it as the reference"
        raise ValueError(f"{where} is {init!r}, which rewrites the base's weights: with the adapter off the model is "
                         f'{says}. Take "default" or "gaussian"')  # fmt: skip


def skeleton(config: Any) -> torch.nn.Module:
    """The model that a config describes, on torch's meta device: shapes, but no memory and no weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def lora_layers(model: torch.nn.Module) -> dict[str, LoraLayer]:
    """The layers of a model that have LoRA adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def target_layers(model: torch.nn.Module, targets: Iterable[str] | str = ALL_LINEAR) -> dict[str, tuple]:
    """The linear layers of a model, or of its skeleton, that an adapter goes on: name -> (in, out). targets: as LoRA
    or PEFT takes them. Raises ValueError for one that is no linear layer, and for the output layer.
    """
    modules = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    shapes = {name: (m.in_features, m.out_features) for name, m in modules.items()}
    head = next((name for name, m in modules.items() if m is model.get_output_embeddings()), None)
    body = {name: shape for name, shape in shapes.items() if name != head}
    if targets == "all-linear":
        return body
    if isinstance(targets, str):
        hits = {targets: [name for name in shapes if re.fullmatch(targets, name)]}
    else:
        hits = {t: [name for name in shapes if f".{name}".endswith(f".{t}")] for t in targets}
    if unknown := ", ".join(target for target, names in hits.items() if not names):
        there = ", ".join(dict.fromkeys(name.split(".")[-1] for name in body))
        as_text = ", and text is a regular expression: give names in a list" if isinstance(targets, str) else ""
        raise ValueError(f"the model has no linear layer {unknown} for LoRA: its layers are {there}{as_text}")
    found = {name: shapes[name] for names in hits.values() for name in names}
    if head in found:
        says = "TRL computes log-probabilities from its weight itself: an adapter there would never train"
        raise ValueError(f"LoRA on {head} is refused: {says}. Leave it out of targets")
    return found


def smallest_width(layers: Mapping[str, tuple[int, int]]) -> int:
    """The smallest input or output width of `target_layers`: the most rank an update can have."""
    return min(min(widths) for widths in layers.values())


def from_rlinf(settings: Mapping[str, Any]) -> LoRA | str | None:
    """RLinf's keys is_lora, lora_rank and lora_path as the `lora` of `load_model`."""
    is_lora, rank, path = (settings.get(key) for key in ("is_lora", "lora_rank", "lora_path"))
    if not isinstance(is_lora, bool):
        raise ValueError(f"is_lora is {is_lora!r}: it must be true or false")
    if not is_lora or path:
        return path if is_lora else None
    check_positive_int("lora_rank", rank)
    return LoRA(rank=rank, alpha=rank, init="gaussian")
