"""Load a model, with LoRA in one of its three modes: one code path on a CPU and on a GPU.

``load_model`` goes through Unsloth's ``FastLanguageModel`` on both. Without Unsloth, or on macOS
(where Unsloth trains with MLX, not with torch), it does the same with plain transformers and PEFT,
and says so once. Unsloth has to be imported before trl, transformers and peft: call ``backend()``
above those imports. The GPU branches are untested on a GPU until tests/gpu has run on one.
"""

import contextlib
import functools
import importlib.util
import io
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlnb.show import live
from rlnb.model import attention
from rlnb.model.folders import (
    DATA, base_name, check_fits, load_weights, read_saved, resolve, save_adapter, saved_rank,
    warn_of_another_base,
)  # fmt: skip
from rlnb.model.lora import (
    ALL_LINEAR, ATTENTION, INITS, MLP, LoRA, Saved, check_init, check_rank, from_rlinf, skeleton,
    smallest_width, target_layers, vllm_rank, whole,
)  # fmt: skip

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

__all__ = [
    "ALL_LINEAR", "ATTENTION", "DATA", "MLP", "LoRA", "Saved", "backend", "check_rank",
    "from_rlinf", "load_model", "resolve", "save_adapter", "trainable",
]  # fmt: skip

MAX_LENGTH = 2048  # tokens, where the caller names none and the model takes that many
PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")

for _name, _value in {
    "UNSLOTH_DISABLE_STATISTICS": "1",  # nothing calls home: Unsloth on a GPU, TRL everywhere
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",  # GRPO's rollout_func and ORPO would warn at every use
    "TQDM_DELAY": "2",  # seconds: what is done before, such as tokenizing some rows, shows no bar
    # Unsloth's chunked loss for a CPU drops TRL's entropy and token accuracy from SFT's log.
    "UNSLOTH_CPU_CHUNKED_CE": "0",
    # On a CPU torch keeps a kernel for each new shape, by default 1,024 of them. Batches of text bring
    # new shapes at every step, and a run would hold ever more memory: with runs.TRIM, half as much.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    "LRU_CACHE_CAPACITY": "32",
}.items():
    os.environ.setdefault(_name, _value)


@functools.cache
def backend() -> str:
    """Import Unsloth, once, and name what does the work: "unsloth-cpu", "unsloth-gpu" or "plain".

    From then on trainers show themselves with rlnb.show.live. Raises RuntimeError, with Unsloth's own
    message, where it is installed and does not import.
    """
    kind = _import_backend()
    live.install()
    return kind


def _import_backend() -> str:
    reason = None
    if sys.platform == "darwin":
        reason = "Unsloth has no torch backend on macOS"
    elif importlib.util.find_spec("unsloth") is None:
        reason = "Unsloth is not installed"
    if reason:
        _say_once(f"{reason}: models load with plain transformers and PEFT.")
        return "plain"
    try:
        with quiet():
            import unsloth  # noqa: F401  it patches the others, so it comes first
            from unsloth_zoo.device_type import DEVICE_TYPE
    except Exception as error:
        raise RuntimeError(
            f"Unsloth is installed but does not import here: {type(error).__name__}: {error}. "
            "Repair it, or go on without it: pip uninstall unsloth unsloth_zoo. "
            "To leave an NVIDIA card unused set CUDA_VISIBLE_DEVICES to nothing"
        ) from error
    return "unsloth-cpu" if DEVICE_TYPE == "cpu" else "unsloth-gpu"


def load_model(
    name: str | os.PathLike[str] = "abacus-3m",
    lora: LoRA | Saved | str | os.PathLike[str] | None = None,
    *,
    max_lora_rank: int = 64,
    fast_inference: bool = False,
    max_seq_length: int | None = None,
    dtype: "str | torch.dtype | None" = None,
    seed: int = 0,
    reference: bool = True,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer for TRL's trainers; print one line that says what it is.

    name: see ``resolve``.
    lora: LoRA(...) attaches a new adapter; a path, or Saved(path, rank), attaches a saved one, which
        goes on training at its own rank; None trains every parameter. rlnb/model/lora.py has the table.
    max_lora_rank: the largest rank that rollouts serve; the adapter's is checked against it.
    fast_inference: roll out with vLLM. On a CPU it says once that transformers does, and goes on.
    max_seq_length: in tokens; default: what the model takes, at most 2048.
    dtype: of the weights; default: float32 on a CPU, on every host alike (bfloat16 weights are no
        faster there than autocast, the trainer's bf16=True), bfloat16 or float16 on a GPU.
    seed: of the start of a new adapter.
    reference: whether a method will take the model with its adapter off as the base, as everything
        in this workbook does but SFT; it decides which inits are refused (``lora.check_init``).

    Raises ValueError, FileNotFoundError or ImportError before any weight is loaded.
    """
    base = resolve(name)
    lora = Saved(lora) if isinstance(lora, str | os.PathLike) else lora
    saved, rank = _check_lora(lora, reference)
    if max_seq_length is not None:
        whole("max_seq_length", max_seq_length)
    if rank is not None:
        check_rank(rank, max_lora_rank)
    engine_rank = _engine_rank(max_lora_rank, rank) if fast_inference else max_lora_rank
    kind = backend()
    adapter, longest = _read_configs(base, lora, saved, max_lora_rank)
    options = {
        "max_seq_length": max_seq_length or min(MAX_LENGTH, longest),
        "dtype": _dtype(dtype, kind),
        "full_finetuning": adapter is None,
        "fast_inference": fast_inference and _vllm_works(kind),
        "max_lora_rank": engine_rank,
        "random_state": seed,
        # On a CPU it is time that is short, not memory.
        "use_gradient_checkpointing": "unsloth" if kind == "unsloth-gpu" else False,
    }
    with quiet(bars=not Path(base).is_dir()):
        model, tokenizer = _load(base, kind, options)
        if adapter is not None:
            model = _attach(model, adapter, kind, options)
        if saved:
            load_weights(model, saved, "default", trainable=True)
    spare_casts(model)
    attention.use(model)
    _check_trainable(model, adapter is not None)
    _set_padding(model, tokenizer)
    _report(model, base, kind, lora, rank)
    return model, tokenizer


def trainable(model: "torch.nn.Module") -> tuple[int, int]:
    """How many parameters a model trains, and how many it has."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


@functools.cache
def _say_once(line: str) -> None:
    print(line)


def _check_lora(lora: Any, reference: bool) -> tuple[Path | None, int | None]:
    """The folder of a saved adapter and the rank, as far as the adapter itself tells if it works."""
    if lora is None:
        return None, None
    if isinstance(lora, LoRA):
        check_init(lora.init, reference)
        return None, lora.rank
    if not isinstance(lora, Saved):
        raise ValueError(f"lora is {lora!r}: it must be LoRA(...), an adapter's folder or None")
    folder, config = read_saved(lora.path)
    file = folder / "adapter_config.json"
    check_init(config.get("init_lora_weights"), reference, f"{file}: init_lora_weights")
    return folder, saved_rank(config)


def _engine_rank(max_lora_rank: int, rank: int | None) -> int:
    """What vLLM makes room for. A CPU has no vLLM, but gets the same errors."""
    if rank is None:
        raise ValueError("fast_inference=True serves an adapter: pass lora=LoRA(...) as well")
    engine_rank = vllm_rank(max_lora_rank)
    if engine_rank != max_lora_rank:
        _say_once(f"max_lora_rank {max_lora_rank} becomes {engine_rank}, the next that vLLM has.")
    return engine_rank


def _vllm_works(kind: str) -> bool:
    """Whether fast_inference=True is real here. ImportError on a GPU where something is missing."""
    import torch

    if kind == "unsloth-cpu" or not torch.cuda.is_available():
        _say_once("fast_inference: vLLM needs a GPU, so rollouts use transformers here.")
        return False
    for package in ("unsloth", "vllm"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"fast_inference=True needs {package}, which is not installed: run python -m rlnb "
                "setup --kind gpu, or pass fast_inference=False to roll out with transformers"
            )
    return True


def _dtype(dtype: "str | torch.dtype | None", kind: str) -> "torch.dtype":
    import torch

    on_gpu = kind != "unsloth-cpu" and torch.cuda.is_available()
    if dtype is None and not on_gpu:
        return torch.float32
    if dtype is None:
        native = torch.cuda.is_bf16_supported(including_emulation=False)  # not on a T4
        return torch.bfloat16 if native else torch.float16
    allowed = [torch.float32, torch.bfloat16] + [torch.float16] * on_gpu
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in allowed:
        raise ValueError(f"dtype is {dtype!r}: it must be one of {', '.join(map(str, allowed))}")
    return found


def _read_configs(
    base: str, lora: LoRA | Saved | None, saved: Path | None, max_lora_rank: int
) -> tuple["LoraConfig | None", int]:
    """PEFT's config of the adapter, checked against the model's, and the model's longest input."""
    from peft import LoraConfig
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base)
    longest = getattr(config, "max_position_embeddings", None) or MAX_LENGTH
    if lora is None:
        return None, longest
    bones = skeleton(config)
    if saved:
        adapter = LoraConfig.from_pretrained(str(saved))
        warn_of_another_base(saved, vars(adapter), base)
        if bones is not None:
            target_layers(bones, adapter.target_modules)
            check_fits(saved, bones)
        adapter.base_model_name_or_path, adapter.inference_mode = None, False
    else:
        targets = lora.targets
        if bones is not None:
            layers = target_layers(bones, targets)
            check_rank(lora.rank, max_lora_rank, smallest_width(layers))
            targets = {name.split(".")[-1] for name in layers}
        adapter = LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets,
            init_lora_weights=INITS[lora.init], use_rslora=lora.use_rslora,
        )  # fmt: skip
    adapter.task_type = "CAUSAL_LM"
    return adapter, longest


def _load(base: str, kind: str, options: dict[str, Any]) -> tuple[Any, Any]:
    if kind == "plain":
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(base, dtype=options["dtype"])
        tokenizer = AutoTokenizer.from_pretrained(base, model_max_length=options["max_seq_length"])
        return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer
    from unsloth import FastLanguageModel

    # A full fine-tuning leaves this at "1", and the next model would get no adapter.
    os.environ["UNSLOTH_ENABLE_FULL_FINETUNING"] = "0"
    return FastLanguageModel.from_pretrained(
        base, load_in_4bit=False, use_exact_model_name=True, **options
    )


def _attach(model: Any, adapter: "LoraConfig", kind: str, options: dict[str, Any]) -> Any:
    """Put an adapter of this shape on the model. How it starts depends on the seed alone."""
    if kind == "plain":
        import torch
        from peft import get_peft_model

        torch.manual_seed(options["random_state"])
        return get_peft_model(model, adapter)
    from unsloth import FastLanguageModel

    # Unsloth takes the fields one by one and fills in these itself.
    own = {"task_type", "peft_type", "base_model_name_or_path", "revision", "inference_mode",
           "auto_mapping", "peft_version"}  # fmt: skip
    arguments = {f.name: getattr(adapter, f.name) for f in fields(adapter) if f.name not in own}
    if isinstance(adapter.target_modules, set):
        arguments["target_modules"] = sorted(adapter.target_modules)
    arguments |= {key: options[key] for key in ("random_state", "use_gradient_checkpointing")}
    return FastLanguageModel.get_peft_model(model, **arguments)


def spare_casts(model: Any) -> None:
    """Keep PEFT from turning the inputs of float32 adapters on a float32 base to float32.

    They are float32 already, or bfloat16 under autocast, which would turn them back at once. No number
    changes; a training step takes some 4 % less time.
    """
    import torch

    if all(p.dtype == torch.float32 for p in model.parameters()):
        for module in model.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False


def _check_trainable(model: Any, with_adapter: bool) -> None:
    """What trains is checked, not assumed: the adapter and nothing else, or everything."""
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    if with_adapter:
        wrong = [n for n, on in trains.items() if on and "lora_" not in n and "to_save" not in n]
    else:
        wrong = [n for n, on in trains.items() if not on]
    if wrong or not any(trains.values()):
        what = "only the adapter" if with_adapter else "every parameter"
        raise RuntimeError(f"{what} should train; at odds: {wrong[:3] or 'nothing trains'}")


def _set_padding(model: Any, tokenizer: Any) -> None:
    """Pad on the left, and not with the end token: lengths are counted up to the first padding."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token not in (None, tokenizer.eos_token):
        return
    vocabulary = tokenizer.get_vocab()
    spare = [t for t in PAD_TOKENS if t in vocabulary and t != tokenizer.eos_token]
    if not spare:
        warnings.warn(f"no token to pad with but the end, {tokenizer.eos_token}", stacklevel=3)
        return
    tokenizer.pad_token = spare[0]
    model.config.pad_token_id = tokenizer.pad_token_id


def _report(model: Any, base: str, kind: str, lora: LoRA | Saved | None, rank: int | None) -> None:
    count, total = trainable(model)
    mode = "full fine-tuning, which has no rank" if lora is None else f"LoRA rank {rank}"
    if isinstance(lora, Saved):
        mode += f" from {Path(lora.path).name}"
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    print(f"{base_name(base)}: {total:,} parameters, {count:,} train ({mode}), {kind}, {dtype}")
    if isinstance(lora, Saved) and lora.rank not in (None, rank):
        print(f"Rank {lora.rank} was asked for: the saved adapter keeps its own, {rank}.")


@contextlib.contextmanager
def quiet(bars: bool = True) -> Iterator[None]:
    """Hold back what libraries print while they import and load; show it where they fail."""
    held = io.StringIO()
    with contextlib.ExitStack() as stack:
        if not bars:
            from transformers.utils import logging

            if logging.is_progress_bar_enabled():
                logging.disable_progress_bar()
                stack.callback(logging.enable_progress_bar)
        try:
            with live.kept("stdout", held):
                yield
        except BaseException:
            print(held.getvalue(), end="", file=sys.stderr)
            raise
