"""LoRA's three modes and its rules, checked before any weight is read. Importing this loads no torch.

The modes are RLinf's, which names them with three keys; ``load_model(name, lora=...)`` takes one of
these, and ``from_rlinf`` reads it from RLinf's YAML:

    is_lora  lora_rank  lora_path     lora=                 what trains
    false    ignored    null          None                  every parameter (full fine-tuning)
    true     16         null          LoRA(rank=16)         a new adapter
    true     absent     "runs/sft"    "runs/sft"            a saved adapter, which goes on training
    true     16         "runs/sft"    Saved("runs/sft", 16) the same: its own rank stays, and a
                                                            different one asked for is reported
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ALL_LINEAR = ATTENTION + MLP
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm.config.lora.MaxLoRARanks
# Our names of what `init` may be -> PEFT's init_lora_weights.
INITS = {"default": True} | {i: i for i in ("gaussian", "orthogonal", "pissa", "olora")}
REWRITE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # the others leave it as it is
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
        "pissa" and "olora" take a part of W out into A and B: see ``check_init``.
    Raises ValueError for a value that cannot work.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: tuple[str, ...] | str = ALL_LINEAR
    init: str = "default"
    use_rslora: bool = False

    def __post_init__(self) -> None:
        whole("LoRA rank", self.rank)
        if not self.alpha > 0:
            raise ValueError(f"LoRA alpha is {self.alpha!r}: it must be above 0 (usual: 2 x rank)")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout is {self.dropout!r}: it must be at least 0 and below 1")
        if not self.targets or (isinstance(self.targets, str) and self.targets != "all-linear"):
            raise ValueError(
                f'LoRA targets is {self.targets!r}: it must be "all-linear" or names, as {ATTENTION}'
            )
        if self.init not in INITS:
            why = ""
            if str(self.init).startswith(REWRITE_BASE):
                why = f"; {self.init} needs data or settings that load_model does not have"
            raise ValueError(f"LoRA init is {self.init!r}: it must be one of {_list(INITS)}{why}")
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(
                f"LoRA rank is {self.rank} and init is 'orthogonal', which splits the rank in two "
                f"halves: take {self.rank + 1}, or another init"
            )
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))


@dataclass(frozen=True)
class Saved:
    """A saved adapter that goes on training. rank: the rank that was asked for, if one was; the
    adapter's own stays, and ``load_model`` says so where they differ.
    """

    path: str | os.PathLike[str]
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None:
            whole("LoRA rank", self.rank)


# --- rules ---------------------------------------------------------------------------------------


def check_rank(rank: int, max_lora_rank: int, smallest_width: int | None = None) -> None:
    """Raise ValueError unless 1 <= rank <= max_lora_rank, and rank <= smallest_width if given.

    Unsloth never compares the first two, and vLLM does at the first rollout. smallest_width is the
    smallest input or output width of a target layer, whose update cannot have more rank than that.
    """
    whole("LoRA rank", rank)
    whole("max_lora_rank", max_lora_rank)
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
    whole("max_lora_rank", max_lora_rank)
    for rank in VLLM_RANKS:
        if rank >= max_lora_rank:
            return rank
    raise ValueError(
        f"max_lora_rank {max_lora_rank} is above {VLLM_RANKS[-1]}, the most that vLLM serves: "
        "lower it, or pass fast_inference=False, since transformers has no limit"
    )


def check_init(init: Any, reference: bool, where: str = "LoRA init") -> None:
    """Raise ValueError if a method needs the base as its reference, and this init rewrites the base.

    PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA put a part of W into the adapter and leave the rest: with
    the adapter off, what remains is not the base. init: LoRA's or PEFT's name.
    """
    if reference and isinstance(init, str) and init.lower().startswith(REWRITE_BASE):
        raise ValueError(
            f"{where} is {init!r}, which rewrites the base's weights: with the adapter off the model "
            "is no longer the base, and GRPO, PPO, DPO, KTO and every KL take it as the reference. "
            'Take "default", "gaussian" or "orthogonal", or pass reference=False for SFT alone'
        )


def skeleton(config: Any) -> "torch.nn.Module | None":
    """The model that a config describes, without weights; None if it describes no causal LM.

    It lies on torch's meta device: shapes, but no memory.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except ValueError:  # transformers does not know the architecture
        return None


def linear_layers(model: "torch.nn.Module") -> dict[str, tuple[int, int]]:
    """Every linear layer of a model, or of its skeleton: name -> (inputs, outputs)."""
    import torch
    from transformers.pytorch_utils import Conv1D  # GPT-2's, whose weight is (inputs, outputs)

    found = {}
    for name, module in model.named_modules():
        # With an adapter on it, a layer X is at X.base_layer, and X.lora_A and X.lora_B are ours.
        if isinstance(module, torch.nn.Linear | Conv1D) and ".lora_" not in name:
            first, second = module.weight.shape
            widths = (first, second) if isinstance(module, Conv1D) else (second, first)
            found[name.removesuffix(".base_layer")] = widths
    return found


def target_layers(
    model: "torch.nn.Module", targets: Iterable[str] | str = ALL_LINEAR
) -> dict[str, tuple[int, int]]:
    """The linear layers of a model, or of its skeleton, that an adapter goes on: name -> (in, out).

    targets: as LoRA takes them, or a regular expression of a whole name, as PEFT does.
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
    if unknown := [target for target, names in hits.items() if not names]:
        there = _list(dict.fromkeys(name.split(".")[-1] for name in body))
        raise ValueError(
            f"the model has no linear layer {_list(unknown)} for LoRA: its layers are {there}"
        )
    found = {name: linear[name] for names in hits.values() for name in names}
    if head in found:
        raise ValueError(
            f"LoRA on {head} is refused: TRL computes log-probabilities from its weight itself, so "
            "that an adapter there would never train. Leave it out of targets"
        )
    return found


def smallest_width(layers: Mapping[str, tuple[int, int]]) -> int | None:
    """The smallest input or output width of ``target_layers``: the most rank an update can have."""
    return min((min(widths) for widths in layers.values()), default=None)


@dataclass(frozen=True)
class Suggestion:
    """A rank, and the words that say where it comes from."""

    rank: int
    why: str

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.why}"


def suggest_rank(
    method: str, task_complexity: str = "complex", max_lora_rank: int = 64
) -> Suggestion:
    """The rank that the field's convention gives: RL 32-64, SFT 8-16, preferences (DPO) 16-32.

    The lower end for a "simple" task, the upper one for a "complex" task, and never more than
    max_lora_rank: with the usual 64, RL gets half of it or all of it. THIS IS A CONVENTION, found in
    recipes and never measured; TRL's own table says the opposite (SFT 256, RL 1-32), and "LoRA
    Without Regret" finds rank 1 enough for RL. Notebook 10 tests it.
    Raises ValueError for an unknown method or complexity.
    """
    whole("max_lora_rank", max_lora_rank)
    if method not in ROLES:
        raise ValueError(f"method is {method!r}: it must be one of {_list(ROLES)}")
    if task_complexity not in ("simple", "complex"):
        raise ValueError(
            f'task_complexity is {task_complexity!r}: it must be "simple" or "complex"'
        )
    role = ROLES[method]
    usual = CONVENTION[role]
    rank = min(usual[task_complexity == "complex"], max_lora_rank)
    capped = f", held to max_lora_rank {max_lora_rank}" if rank < min(usual) else ""
    return Suggestion(
        rank,
        f"the usual range for {role} is {usual[0]}-{usual[1]}{capped}. This is a convention, not a "
        "finding",
    )


# --- RLinf's keys --------------------------------------------------------------------------------


def from_rlinf(source: str | os.PathLike[str] | Mapping[str, Any]) -> LoRA | Saved | None:
    """RLinf's is_lora, lora_rank and lora_path as the `lora` of ``load_model``; the table is above.

    source: a YAML file or a mapping, with the three keys at its top or, as in RLinf's own files,
    below actor.model. As in RLinf, a new adapter has alpha = rank, no dropout and a gaussian A; its
    list of targets comes down to ALL_LINEAR here, without lm_head (see ``target_layers``).

    Raises FileNotFoundError, and ValueError that names file and key for an unknown key, a value of
    the wrong kind, or values that contradict each other.
    """
    where, settings = _rlinf_settings(source)
    is_lora, rank, path = (settings.get(key) for key in ("is_lora", "lora_rank", "lora_path"))
    a_path = isinstance(path, str | os.PathLike) and str(path)
    a_rank = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    for key, fine, says in (
        ("is_lora", isinstance(is_lora, bool), "it must be true or false"),
        ("lora_path", path is None or a_path, "it must be the folder of a saved adapter, or null"),
        ("lora_rank", rank is None or a_rank, "it must be a whole number of at least 1"),
        ("lora_path", is_lora or not a_path, "is_lora is false, which ignores it: set it to true"),
        ("lora_rank", not is_lora or a_path or a_rank, "a new adapter (no lora_path) needs a rank"),
    ):
        if not fine:
            raise ValueError(f"{where}: {key} is {settings.get(key)!r}: {says}")
    if is_lora:
        return Saved(path, rank) if a_path else LoRA(rank=rank, alpha=rank, init="gaussian")
    if rank is not None:
        print(f"{where}: is_lora is false: full fine-tuning, lora_rank {rank} is ignored.")
    return None


def _rlinf_settings(source: Any) -> tuple[str, Mapping[str, Any]]:
    """Where the three keys are, in words, and the mapping that holds them."""
    where, keys = "the mapping", ("is_lora", "lora_rank", "lora_path")
    if not isinstance(source, Mapping):
        import yaml

        where = str(source)
        try:
            source = yaml.safe_load(Path(source).expanduser().read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{where} is no YAML: {error}") from error
    nested = isinstance(source, Mapping) and "actor" in source
    settings = source
    for key in ("actor", "model") if nested else ():
        settings = settings.get(key) if isinstance(settings, Mapping) else None
    if not isinstance(settings, Mapping):
        place = "actor.model" if nested else "the file"
        raise ValueError(f"{where}: {place} is {settings!r}: it must hold {_list(keys)}")
    # RLinf's own files hold much else below actor.model, which is none of our business.
    mine = [key for key in settings if not nested or "lora" in str(key)]
    if unknown := [key for key in mine if key not in keys]:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}: the keys are {_list(keys)}")
    return where, settings


def whole(what: str, value: Any) -> None:
    """Raise ValueError unless the value is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} is {value!r}: it must be a whole number of at least 1")


def _list(names: Iterable[Any]) -> str:
    return ", ".join(map(str, names))
