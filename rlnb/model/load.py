"""Load a model, with LoRA in one of its three modes: through Unsloth's ``FastLanguageModel`` on a CPU and on a GPU, and
without Unsloth, or on macOS, through plain transformers and PEFT.
"""

import importlib.util
import os
import re
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlnb import machine
from rlnb.model import attention
from rlnb.model.backends import backend, quiet, say_once
from rlnb.model.folders import base_name, load_weights, opened, read_saved, resolve
from rlnb.model.gguf import spare_padding
from rlnb.model.lora import (
    MAX_LORA_RANK, LoRA, check_positive_int, check_rank, largest_rank, skeleton,
    smallest_width, target_layers, vllm_rank,
)  # fmt: skip
from rlnb.profiles import PRACTICE

WIDE = 512  # from this width of a model on, 16 bits save a CPU more than they cost
MAX_LENGTH = 2048  # tokens, where the caller names none and the model takes that many
LAYER = re.compile(r"\w+\.\d+")  # in the name of a weight, as layers.3
# What Unsloth's get_peft_model fills in itself; it takes the other fields of LoraConfig one by one.
FILLED_IN = {"task_type", "peft_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
             "peft_version"}  # fmt: skip


def load_model(
    name: str | os.PathLike[str] = PRACTICE, lora: LoRA | str | os.PathLike[str] | None = None, *,
    max_lora_rank: int = MAX_LORA_RANK, fast_inference: bool = False, max_seq_length: int | None = None,
    dtype: str | None = None, load_in_4bit: bool = False, seed: int = 0,
) -> tuple[Any, Any]:  # fmt: skip
    """Load a model and its tokenizer for TRL's trainers; print one line that says what it is.

    name: see `resolve`. lora: LoRA(...) is a new adapter; the folder of a saved one goes on training, at its
        own rank; None trains every parameter. seed: of the start of a new adapter.
    max_lora_rank: the largest rank that rollouts serve; the adapter's is checked against it.
    fast_inference: TRL's GRPOTrainer rolls out with vLLM. On a CPU it says once that it does not, and goes on.
    max_seq_length: in tokens; default: what the model takes, at most 2048.
    dtype: of the weights; default: float32 where all train; under an adapter 16 bits on a GPU, and on a CPU that
        computes in bfloat16 for a model of width 512 or more whose weights are stored so; else float32.
    load_in_4bit: the base in 4 bits (QLoRA, arXiv 2305.14314): a quarter of the memory of 16 bits. On a GPU, with an
        adapter; such a base cannot be merged here.
    Raises ValueError, FileNotFoundError or ImportError before any weight is loaded, but for a saved adapter
    whose weights do not fit.
    """
    # 1. check
    base, kind, adapter, folder = resolve(name), backend(), None, None
    config = AutoConfig.from_pretrained(base)
    if lora is not None:
        adapter, folder = _adapter(lora, base, config, max_lora_rank)
    rank = adapter and largest_rank(adapter)
    if load_in_4bit and (kind != "unsloth-gpu" or rank is None):
        says = "needs Unsloth on a GPU and an adapter, which alone trains"
        raise ValueError(f"load_in_4bit=True {says}: this is {kind}, and lora is {lora!r}")
    options = _options(kind, config, rank, max_lora_rank, fast_inference, max_seq_length, dtype, seed)
    options["load_in_4bit"] = load_in_4bit
    if kind == "unsloth-gpu" and base_name(base) != PRACTICE:  # elsewhere it is time that is short, not memory
        options["use_gradient_checkpointing"] = "unsloth"
    _check_layers(base, config)
    # 2. load
    with quiet(bars=not Path(base).is_dir()):
        model, tokenizer = _load(base, kind, options)
        if adapter is not None:
            model = _attach(model, adapter, kind, options)
        if folder:
            load_weights(model, folder, "default", trainable=True)
    # 3. set up and say what it is
    attention.use(model)
    _set_padding(model, tokenizer)
    _report(model, base, kind, lora, rank)
    return model, tokenizer


def trainable(model: torch.nn.Module) -> tuple[int, int]:
    """How many parameters a model trains, and how many it has."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def _check_layers(base: str, config: Any) -> None:
    """Raise ValueError for a layer of the config that no file has: transformers would take random numbers."""
    layers = set()
    for file in sorted(Path(base).glob("*.safetensors")):  # none where the model is of the hub
        with opened(file) as found:
            layers |= {match[0] for name in found.keys() if (match := LAYER.search(name))}  # noqa: SIM118
    for name, _ in skeleton(config).named_parameters() if layers else ():
        if (layer := LAYER.search(name)) and layer[0] not in layers:
            raise ValueError(f"{base}: config.json has {layer[0]}, and no weights are there: it would be random")


def _adapter(lora: Any, base: str, config: Any, most: int) -> tuple[LoraConfig, Path | None]:
    """PEFT's config of the adapter, checked against the model's, and the folder of a saved one."""
    if isinstance(lora, LoRA):
        folder, adapter = None, lora.config()
    elif isinstance(lora, str | os.PathLike):
        folder, _ = read_saved(lora, base)
        adapter = LoraConfig.from_pretrained(str(folder))
        adapter.base_model_name_or_path, adapter.inference_mode = None, False
    else:
        raise ValueError(f"lora is {lora!r}: it must be LoRA(...), an adapter's folder or None")
    check_rank(largest_rank(adapter), most)
    layers = target_layers(skeleton(config), adapter.target_modules)
    if not folder:
        check_rank(lora.rank, most, smallest_width(layers))
        adapter.target_modules = {name.split(".")[-1] for name in layers}
    adapter.task_type = "CAUSAL_LM"
    return adapter, folder


def _options(
    kind: str, config: Any, rank: int | None, max_lora_rank: int, fast_inference: bool,
    max_seq_length: int | None, dtype: str | None, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """What Unsloth's FastLanguageModel.from_pretrained takes."""
    if max_seq_length is None:
        max_seq_length = min(MAX_LENGTH, getattr(config, "max_position_embeddings", None) or MAX_LENGTH)
    check_positive_int("max_seq_length", max_seq_length)
    if fast_inference:
        if rank is None:
            raise ValueError("fast_inference=True serves an adapter: pass lora=LoRA(...) as well")
        max_lora_rank = vllm_rank(max_lora_rank)
    return {
        "max_seq_length": max_seq_length, "dtype": _dtype(dtype, kind, rank, config), "full_finetuning": rank is None,
        "fast_inference": fast_inference and _vllm_works(kind), "max_lora_rank": max_lora_rank,
        "random_state": seed, "use_gradient_checkpointing": False,
    }  # fmt: skip


def _vllm_works(kind: str) -> bool:
    """Whether fast_inference=True is real here. ImportError on a GPU where something is missing."""
    if kind == "unsloth-cpu" or not torch.cuda.is_available():
        say_once("fast_inference: vLLM needs a GPU, so rollouts use transformers here.")
        return False
    for package in ("unsloth", "vllm"):
        if importlib.util.find_spec(package) is None:
            says = "run python -m rlnb setup --kind gpu, or pass fast_inference=False"
            raise ImportError(f"fast_inference=True needs {package}, which is not installed: {says}")
    return True


def _dtype(dtype: str | None, kind: str, rank: int | None, config: Any) -> torch.dtype:
    on_gpu = kind != "unsloth-cpu" and torch.cuda.is_available()
    if dtype is None and on_gpu and rank:  # all weights train in float32: 16 bits lose small updates. A T4 has no bf16
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if dtype not in (None, "float32", "bfloat16") and (dtype != "float16" or not on_gpu):
        raise ValueError(f"dtype is {dtype!r}: it must be float32, bfloat16 or, on a GPU, float16")
    if dtype is None and rank and not on_gpu and config.dtype == torch.bfloat16:  # as they are stored: nothing is lost
        wide = (getattr(config.get_text_config(), "hidden_size", None) or 0) >= WIDE
        dtype = "bfloat16" if wide and machine.cpu_bf16() else None
    return getattr(torch, dtype or "float32")


def _load(base: str, kind: str, options: dict[str, Any]) -> tuple[Any, Any]:
    if kind == "plain":
        model = AutoModelForCausalLM.from_pretrained(base, dtype=options["dtype"])
        tokenizer = AutoTokenizer.from_pretrained(base, model_max_length=options["max_seq_length"])
        return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer
    from unsloth import FastLanguageModel

    # A full fine-tuning leaves this at "1", and the next model would get no adapter.
    os.environ["UNSLOTH_ENABLE_FULL_FINETUNING"] = "0"
    return FastLanguageModel.from_pretrained(base, use_exact_model_name=True, **options)


def _attach(model: Any, adapter: LoraConfig, kind: str, options: dict[str, Any]) -> Any:
    """Put an adapter of this shape on the model. How it starts depends on the seed alone."""
    if kind == "plain":
        torch.manual_seed(options["random_state"])
        return get_peft_model(model, adapter)
    from unsloth import FastLanguageModel

    arguments = {f.name: getattr(adapter, f.name) for f in fields(adapter) if f.name not in FILLED_IN}
    if isinstance(adapter.target_modules, set):
        arguments["target_modules"] = sorted(adapter.target_modules)
    arguments |= {key: options[key] for key in ("random_state", "use_gradient_checkpointing")}
    return FastLanguageModel.get_peft_model(model, **arguments)


def _set_padding(model: Any, tokenizer: Any) -> None:
    """Pad on the left, and not with the end token if another is there."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token not in (None, tokenizer.eos_token):
        return
    if spare := spare_padding(tokenizer.get_vocab(), tokenizer.eos_token):
        tokenizer.pad_token = spare
        model.config.pad_token_id = tokenizer.pad_token_id
    else:
        warnings.warn(f"no token to pad with but the end, {tokenizer.eos_token}", stacklevel=3)


def _report(model: Any, base: str, kind: str, lora: Any, rank: int | None) -> None:
    """Print what the model is. RuntimeError unless the adapter trains and nothing else, or everything."""
    if any(p.requires_grad != (lora is None or "lora_" in name) for name, p in model.named_parameters()):
        raise RuntimeError(f"what should train does not, or the other way round, after loading by {kind}")
    mode = "full fine-tuning, which has no rank" if lora is None else f"LoRA rank {rank}"
    mode += f" from {Path(lora).name}" if isinstance(lora, str | os.PathLike) else ""
    (count, total), dtype = trainable(model), str(next(model.parameters()).dtype).removeprefix("torch.")
    print(f"{base_name(base)}: {total:,} parameters, {count:,} train ({mode}), {kind}, {dtype}")
