"""LoRA's three modes and its rules, checked before any weight is read.

The modes are RLinf's, which names them with three keys; `from_rlinf` reads those from RLinf's YAML:

    is_lora  lora_rank  lora_path   load_model(lora=...)    what trains
    false    ignored    ignored     None                    every parameter (full fine-tuning)
    true     16         null        LoRA(rank=16)           a new adapter
    true     absent     "runs/sft"  "runs/sft"              a saved adapter, which goes on training
    true     16         "runs/sft"  Saved("runs/sft", 16)   the same: it keeps its own rank, and says so
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D  # GPT-2's, whose weight is (inputs, outputs)

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ALL_LINEAR = ATTENTION + MLP
MAX_LORA_RANK = 64  # the default
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm.config.lora.MaxLoRARanks
INITS = {"default": True} | {i: i for i in ("gaussian", "orthogonal", "pissa", "olora")}  # ours -> PEFT's
REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # how PEFT's names of such inits begin
CONVENTION = {"SFT": (8, 16), "DPO": (16, 32), "RL": (32, 64)}
ROLES = {"sft": "SFT"} | dict.fromkeys(("grpo", "ppo", "rloo"), "RL")
ROLES |= dict.fromkeys(("dpo", "kto", "orpo", "reward_model"), "DPO")


@dataclass(frozen=True)
class LoRA:
    """A new low-rank adapter: W x becomes W x + s B A x, and only A and B train.

    rank: r, A's rows and B's columns. alpha: s is alpha / r, or alpha / sqrt(r) with use_rslora (arXiv
        2312.03732, eq. 5). dropout: on x, in the adapter's branch only.
    targets: names of linear layers, as ATTENTION, or "all-linear": all but the output layer.
    init: how A starts: "default" (Kaiming uniform) or "gaussian". B starts at zero, so the model is
        unchanged at step 0 (arXiv 2106.09685, 4.1). "orthogonal" has neither at zero, but B A = 0.
        "pissa" and "olora" take a part of W out into A and B: see `rewrites_base`.
    Raises ValueError for a value that cannot work.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: tuple[str, ...] | str = ALL_LINEAR
    init: str = "default"
    use_rslora: bool = False

    def __post_init__(self) -> None:
        check_positive_int("LoRA rank", self.rank)
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        names = bool(self.targets) and not isinstance(self.targets, str)
        for name, fine, says in (
            ("alpha", self.alpha > 0, "above 0 (usual: 2 x rank)"),
            ("dropout", 0 <= self.dropout < 1, "at least 0 and below 1"),
            ("targets", names or self.targets == "all-linear", f'"all-linear" or names, as {ATTENTION}'),
            ("init", self.init in INITS, f"one of {', '.join(INITS)}"),
            ("rank", self.init != "orthogonal" or self.rank % 2 == 0, "even for init='orthogonal'"),
        ):
            if not fine:
                raise ValueError(f"LoRA {name} is {getattr(self, name)!r}: it must be {says}")


@dataclass(frozen=True)
class Saved:
    """A saved adapter, and the rank that the caller expects: `load_model` says where it has another."""

    path: str | os.PathLike[str]
    rank: int | None = None


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
        raise ValueError(
            f"LoRA rank {rank} is above max_lora_rank {max_lora_rank}: lower the rank, or pass "
            f"max_lora_rank={rank} to load_model, which costs memory for rollouts with vLLM"
        )
    if smallest_width is not None and rank > smallest_width:
        raise ValueError(
            f"LoRA rank {rank} is above {smallest_width}, the smallest width of a target layer: lower the "
            "rank, or leave the narrow layers out of targets"
        )


def largest_rank(adapter: Any) -> int:
    """The largest rank that PEFT's config of an adapter has anywhere."""
    return max([adapter.r, *(adapter.rank_pattern or {}).values()])


def vllm_rank(max_lora_rank: int) -> int:
    """The max_lora_rank that vLLM takes: the next of VLLM_RANKS. ValueError above the last one."""
    check_positive_int("max_lora_rank", max_lora_rank)
    if max_lora_rank > VLLM_RANKS[-1]:
        raise ValueError(f"max_lora_rank {max_lora_rank} is above {VLLM_RANKS[-1]}, the most that vLLM has")
    return next(rank for rank in VLLM_RANKS if rank >= max_lora_rank)


def rewrites_base(init: Any) -> bool:
    """Whether an init (LoRA's or PEFT's name) moves a part of W into the adapter: off, W is not the base's."""
    return isinstance(init, str) and init.lower().startswith(REWRITES_BASE)


def check_init(init: Any, reference: bool, where: str = "LoRA init") -> None:
    """Raise ValueError if a method takes the base as its reference, and this init rewrites the base."""
    if reference and rewrites_base(init):
        raise ValueError(
            f"{where} is {init!r}, which rewrites the base's weights: with the adapter off the model "
            "is no longer the base, and GRPO, PPO, DPO, KTO and every KL take it as the reference. "
            'Take "default", "gaussian" or "orthogonal", or pass reference=False for SFT alone'
        )


def skeleton(config: Any) -> torch.nn.Module:
    """The model that a config describes, on torch's meta device: shapes, but no memory and no weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def lora_layers(model: torch.nn.Module) -> dict[str, LoraLayer]:
    """The layers of a model that have LoRA adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def target_layers(model: torch.nn.Module, targets: Iterable[str] | str = ALL_LINEAR) -> dict[str, tuple]:
    """The linear layers of a model, or of its skeleton, that an adapter goes on: name -> (in, out).

    targets: as LoRA takes them, or a regular expression of a full name, as PEFT does.
    Raises ValueError for a target that is no linear layer, and for the output layer.
    """
    modules = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    shapes = {n: tuple(m.weight.shape)[:: 1 if isinstance(m, Conv1D) else -1] for n, m in modules.items()}
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
        raise ValueError(f"the model has no linear layer {unknown} for LoRA: its layers are {there}")
    found = {name: shapes[name] for names in hits.values() for name in names}
    if head in found:
        raise ValueError(
            f"LoRA on {head} is refused: TRL computes log-probabilities from its weight itself, so "
            "that an adapter there would never train. Leave it out of targets"
        )
    return found


def smallest_width(layers: Mapping[str, tuple[int, int]]) -> int:
    """The smallest input or output width of `target_layers`: the most rank an update can have."""
    return min(min(widths) for widths in layers.values())


def suggest_rank(method: str) -> str:
    """What recipes usually take, the upper end of a range, and how little is behind it."""
    if method not in ROLES:
        raise ValueError(f"method is {method!r}: it must be one of {', '.join(ROLES)}")
    role, (low, high) = ROLES[method], CONVENTION[ROLES[method]]
    return (
        f"rank {high}: the usual range for {role} is {low}-{high}. This is a convention, not a finding: "
        "TRL's page says the opposite (SFT 256, RL 1-32), and LoRA Without Regret finds rank 1 enough for RL"
    )


def from_rlinf(source: str | os.PathLike[str] | Mapping[str, Any]) -> LoRA | Saved | None:
    """RLinf's is_lora, lora_rank and lora_path as the `lora` of `load_model`; the table is above.

    source: a YAML file or a mapping, with the keys at its top or, as in RLinf's own files, below actor.model.
    As in RLinf, a new adapter has alpha = rank and a gaussian A. Raises ValueError that names file and key.
    """
    settings, where = source, "the mapping"
    if not isinstance(source, Mapping):
        settings, where = yaml.safe_load(Path(source).read_text(encoding="utf-8")), str(source)
    settings = settings["actor"]["model"] if "actor" in settings else settings
    is_lora, rank, path = (settings.get(key) for key in ("is_lora", "lora_rank", "lora_path"))
    if not isinstance(is_lora, bool):
        raise ValueError(f"{where}: is_lora is {is_lora!r}: it must be true or false")
    if not is_lora:
        return None
    if path:
        return Saved(path, rank)
    check_positive_int(f"{where}: lora_rank", rank)
    return LoRA(rank=rank, alpha=rank, init="gaussian")
