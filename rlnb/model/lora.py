"""LoRA's three modes and its rules, checked before any weight is read.

The modes are RLinf's, which names them with three keys; `from_rlinf` reads those from RLinf's YAML:

    is_lora  lora_rank  lora_path   load_model(lora=...)    what trains
    false    ignored    null        None                    every parameter (full fine-tuning)
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
MAX_LORA_RANK = 64  # the default wherever a rank is checked
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm.config.lora.MaxLoRARanks
INITS = {"default": True} | {i: i for i in ("gaussian", "orthogonal", "pissa", "olora")}  # ours -> PEFT's
REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # how PEFT's names of such inits begin
ROLES = {"grpo": "RL", "ppo": "RL", "rloo": "RL", "sft": "SFT", "orpo": "DPO", "dpo": "DPO",
         "kto": "DPO", "reward_model": "DPO"}  # fmt: skip
CONVENTION = {"RL": (32, 64), "SFT": (8, 16), "DPO": (16, 32)}


@dataclass(frozen=True)
class LoRA:
    """A new low-rank adapter: W x becomes W x + s B A x, and only A and B train.

    rank: r. A has r rows, B has r columns. alpha: the scale s is alpha / r, or alpha / sqrt(r) with
        use_rslora (arXiv 2312.03732, eq. 5). dropout: on x, in the adapter's branch only.
    targets: names of linear layers, as ATTENTION, MLP or ALL_LINEAR, or "all-linear": all but the
        output layer, whatever they are called in this model.
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
        inits = f"one of {', '.join(INITS)}; others need data or settings that load_model does not have"
        for name, fine, says in (
            ("alpha", self.alpha > 0, "above 0 (usual: 2 x rank)"),
            ("dropout", 0 <= self.dropout < 1, "at least 0 and below 1"),
            ("targets", names or self.targets == "all-linear", f'"all-linear" or names, as {ATTENTION}'),
            ("init", self.init in INITS, inits),
            ("rank", self.init != "orthogonal" or self.rank % 2 == 0, "even for init='orthogonal'"),
        ):
            if not fine:
                raise ValueError(f"LoRA {name} is {getattr(self, name)!r}: it must be {says}")


@dataclass(frozen=True)
class Saved:
    """A saved adapter that goes on training at its own rank. rank: the one that the caller expects, if any;
    `load_model` says where they differ.
    """

    path: str | os.PathLike[str]
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_positive_int("LoRA rank", self.rank)


# --- rules ---------------------------------------------------------------------------------------


def check_positive_int(what: str, value: Any) -> None:
    """Raise ValueError unless the value is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} is {value!r}: it must be a whole number of at least 1")


def check_rank(rank: int, max_lora_rank: int = MAX_LORA_RANK, smallest_width: int | None = None) -> None:
    """Raise ValueError unless 1 <= rank <= max_lora_rank, and rank <= smallest_width if given.

    Unsloth never compares the first two, and vLLM does at the first rollout. smallest_width is the
    smallest input or output width of a target layer, whose update cannot have more rank than that.
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
            f"LoRA rank {rank} is above {smallest_width}, the smallest width of a target layer, "
            "where the rest is useless: lower the rank, or leave the narrow layers out of targets"
        )


def vllm_rank(max_lora_rank: int) -> int:
    """The max_lora_rank that vLLM takes: the next of VLLM_RANKS. ValueError above the last one."""
    check_positive_int("max_lora_rank", max_lora_rank)
    if max_lora_rank > VLLM_RANKS[-1]:
        raise ValueError(
            f"max_lora_rank {max_lora_rank} is above {VLLM_RANKS[-1]}, the most that vLLM serves: "
            "lower it, or pass fast_inference=False, since transformers has no limit"
        )
    return next(rank for rank in VLLM_RANKS if rank >= max_lora_rank)


def rewrites_base(init: Any) -> bool:
    """Whether an init (LoRA's or PEFT's name for it) puts a part of W into the adapter and leaves the base
    the rest. With the adapter off, what remains is not the base.
    """
    return isinstance(init, str) and init.lower().startswith(REWRITES_BASE)


def check_init(init: Any, reference: bool, where: str = "LoRA init") -> None:
    """Raise ValueError if a method takes the base as its reference, and this init rewrites the base."""
    if reference and rewrites_base(init):
        raise ValueError(
            f"{where} is {init!r}, which rewrites the base's weights: with the adapter off the model "
            "is no longer the base, and GRPO, PPO, DPO, KTO and every KL take it as the reference. "
            'Take "default", "gaussian" or "orthogonal", or pass reference=False for SFT alone'
        )


# --- layers --------------------------------------------------------------------------------------


def skeleton(config: Any) -> torch.nn.Module | None:
    """The model that a config describes, on torch's meta device: shapes, but no memory and no weights.
    None if it describes no causal LM.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except ValueError:  # transformers does not know the architecture
        return None


def linear_layers(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Every linear layer of a model, or of its skeleton: name -> (inputs, outputs)."""
    found = {}
    for name, module in model.named_modules():
        # With an adapter on it, a layer X is at X.base_layer, and X.lora_A and X.lora_B are ours.
        if isinstance(module, torch.nn.Linear | Conv1D) and ".lora_" not in name:
            shape = tuple(module.weight.shape)
            found[name.removesuffix(".base_layer")] = shape if isinstance(module, Conv1D) else shape[::-1]
    return found


def lora_layers(model: torch.nn.Module) -> dict[str, LoraLayer]:
    """The layers of a model that have LoRA adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def target_layers(model: torch.nn.Module, targets: Iterable[str] | str = ALL_LINEAR) -> dict[str, tuple]:
    """The linear layers of a model, or of its skeleton, that an adapter goes on: name -> (in, out).

    targets: as LoRA takes them, or a regular expression of a full name, as PEFT does.
    Raises ValueError for a target that is no linear layer, and for the output layer.
    """
    linear, output = linear_layers(model), model.get_output_embeddings()
    head = next((name for name in linear if model.get_submodule(name) is output), None)
    body = {name: widths for name, widths in linear.items() if name != head}
    if targets == "all-linear":
        return body
    if isinstance(targets, str):
        hits = {targets: [name for name in linear if re.fullmatch(targets, name)]}
    else:
        hits = {t: [name for name in linear if f".{name}".endswith(f".{t}")] for t in targets}
    if unknown := ", ".join(target for target, names in hits.items() if not names):
        there = ", ".join(dict.fromkeys(name.split(".")[-1] for name in body))
        raise ValueError(f"the model has no linear layer {unknown} for LoRA: its layers are {there}")
    found = {name: linear[name] for names in hits.values() for name in names}
    if head in found:
        raise ValueError(
            f"LoRA on {head} is refused: TRL computes log-probabilities from its weight itself, so "
            "that an adapter there would never train. Leave it out of targets"
        )
    return found


def smallest_width(layers: Mapping[str, tuple[int, int]]) -> int | None:
    """The smallest input or output width of `target_layers`: the most rank an update can have."""
    return min((min(widths) for widths in layers.values()), default=None)


# --- conventions ---------------------------------------------------------------------------------


def suggest_rank(method: str, task_complexity: str = "complex", max_lora_rank: int = MAX_LORA_RANK) -> str:
    """What recipes usually take: RL 32-64, SFT 8-16, preferences (DPO) 16-32, of which a "simple" task gets
    the lower end and a "complex" one the upper end, never above max_lora_rank; and how little is behind it.
    Raises ValueError for an unknown method or complexity.
    """
    check_positive_int("max_lora_rank", max_lora_rank)
    if method not in ROLES:
        raise ValueError(f"method is {method!r}: it must be one of {', '.join(ROLES)}")
    if task_complexity not in ("simple", "complex"):
        raise ValueError(f'task_complexity is {task_complexity!r}: it must be "simple" or "complex"')
    low, high = CONVENTION[ROLES[method]]
    return (
        f"rank {min(low if task_complexity == 'simple' else high, max_lora_rank)}: the usual range for "
        f"{ROLES[method]} is {low}-{high}. This is a convention, not a finding: TRL's page says the opposite "
        "(SFT 256, RL 1-32), and LoRA Without Regret finds rank 1 enough for RL"
    )


def from_rlinf(source: str | os.PathLike[str] | Mapping[str, Any]) -> LoRA | Saved | None:
    """RLinf's is_lora, lora_rank and lora_path as the `lora` of `load_model`; the table is above.

    source: a YAML file or a mapping, with the keys at its top or, as in RLinf's own files, below actor.model.
    As in RLinf, a new adapter has alpha = rank, no dropout and a gaussian A; its list of targets comes down
    to ALL_LINEAR here, without lm_head (see `target_layers`).
    Raises FileNotFoundError, and ValueError that names file and key.
    """
    where = "the mapping" if isinstance(source, Mapping) else str(source)
    is_lora, rank, path = _rlinf_values(source, where)
    if not isinstance(is_lora, bool):
        raise ValueError(f"{where}: is_lora is {is_lora!r}: it must be true or false")
    if rank is not None:
        check_positive_int(f"{where}: lora_rank", rank)
    if path is not None and not (isinstance(path, str | os.PathLike) and str(path)):
        raise ValueError(f"{where}: lora_path is {path!r}: it must be the folder of a saved adapter, or null")
    if is_lora and path is None and rank is None:
        raise ValueError(f"{where}: lora_rank is None: a new adapter (no lora_path) needs a rank")
    if is_lora:
        return Saved(path, rank) if path else LoRA(rank=rank, alpha=rank, init="gaussian")
    if path:
        says = "is_lora is false, which ignores it: set it to true"
        raise ValueError(f"{where}: lora_path is {path!r}: {says}")
    if rank:
        print(f"{where}: is_lora is false: full fine-tuning, lora_rank {rank} is ignored.")
    return None


def _rlinf_values(settings: Any, where: str) -> list[Any]:
    if not isinstance(settings, Mapping):
        try:
            settings = yaml.safe_load(Path(settings).expanduser().read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{where} is no YAML: {error}") from error
    keys = ("is_lora", "lora_rank", "lora_path")
    nested = isinstance(settings, Mapping) and "actor" in settings
    for key in ("actor", "model") if nested else ():
        settings = settings.get(key) if isinstance(settings, Mapping) else None
    if not isinstance(settings, Mapping):
        place = "actor.model" if nested else "the file"
        raise ValueError(f"{where}: {place} is {settings!r}: it must hold {', '.join(keys)}")
    # RLinf's own files hold much else below actor.model, which is none of our business.
    if unknown := [key for key in settings if key not in keys and (not nested or "lora" in str(key))]:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}: the keys are {', '.join(keys)}")
    return [settings.get(key) for key in keys]
