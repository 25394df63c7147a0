"""Load a model, attach LoRA, save the adapter: one code path on a CPU and on a GPU.

``load_model`` goes through Unsloth's ``FastLanguageModel`` on both. Without Unsloth, or on macOS
(where Unsloth trains with MLX, not with torch), it does the same with plain transformers and PEFT,
and says so once. Unsloth has to be imported before trl, transformers and peft: call ``backend()``
above those imports. The GPU branches are untested on a GPU until tests/gpu has run on one.
"""

import contextlib
import functools
import importlib.util
import io
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

DATA = Path(__file__).resolve().parent.parent / "data"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ALL_LINEAR = ATTENTION + MLP
INITS = {"default": True, "gaussian": "gaussian"}  # our names -> PEFT's init_lora_weights
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm.config.lora.MaxLoRARanks
MAX_LENGTH = 2048  # tokens, where the caller names none and the model takes that many
PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")

for _name, _value in {
    "UNSLOTH_DISABLE_STATISTICS": "1",  # nothing calls home: Unsloth on a GPU, TRL everywhere
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Unsloth's chunked loss for a CPU drops TRL's entropy and token accuracy from SFT's log.
    "UNSLOTH_CPU_CHUNKED_CE": "0",
}.items():
    os.environ.setdefault(_name, _value)


@dataclass(frozen=True)
class LoRA:
    """A new low-rank adapter: W x becomes W x + (alpha / rank) B A x, and only A and B train.

    B starts at zero, so the model is unchanged at step 0 (Hu et al. 2021, arXiv 2106.09685, 4.1).
    targets: names of linear layers. init: how A starts, "default" (Kaiming uniform) or "gaussian".
    Raises ValueError for a value that cannot work.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = ALL_LINEAR
    init: str = "default"

    def __post_init__(self) -> None:
        _whole("LoRA rank", self.rank)
        if not self.alpha > 0:
            raise ValueError(f"LoRA alpha is {self.alpha!r}: it must be above 0 (usual: 2 x rank)")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout is {self.dropout!r}: it must be at least 0 and below 1")
        if isinstance(self.targets, str) or not self.targets:
            raise ValueError(f"LoRA targets is {self.targets!r}: it must be names, as {ATTENTION}")
        if self.init not in INITS:
            raise ValueError(f"LoRA init is {self.init!r}: it must be one of {', '.join(INITS)}")
        object.__setattr__(self, "targets", tuple(self.targets))


def check_rank(rank: int, max_lora_rank: int, smallest_width: int | None = None) -> None:
    """Raise ValueError unless 1 <= rank <= max_lora_rank, and rank <= smallest_width if given.

    Unsloth never compares the first two, and vLLM does at the first rollout. smallest_width is the
    smallest input or output width of a target layer, whose update cannot have more rank than that.
    """
    _whole("LoRA rank", rank)
    _whole("max_lora_rank", max_lora_rank)
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
    _whole("max_lora_rank", max_lora_rank)
    for rank in VLLM_RANKS:
        if rank >= max_lora_rank:
            return rank
    raise ValueError(
        f"max_lora_rank {max_lora_rank} is above {VLLM_RANKS[-1]}, the most that vLLM serves: "
        "lower it, or pass fast_inference=False, since transformers has no limit"
    )


def smallest_width(config: Any, targets: Iterable[str]) -> int | None:
    """The smallest width of the target layers, from a model's config; None where it says nothing.

    Layers whose names are not in ALL_LINEAR are left out. "all-linear" means ALL_LINEAR.
    """
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", 0)
    if not hidden or not heads:
        return None
    head = getattr(config, "head_dim", None) or hidden // heads
    keys = head * (getattr(config, "num_key_value_heads", None) or heads)
    mlp = getattr(config, "intermediate_size", None) or hidden
    widths = dict.fromkeys(MLP, min(hidden, mlp)) | dict.fromkeys(ATTENTION, min(hidden, keys))
    widths |= dict.fromkeys(("q_proj", "o_proj"), min(hidden, head * heads))
    names = ALL_LINEAR if isinstance(targets, str) else targets
    return min((widths[name] for name in names if name in widths), default=None)


@functools.cache
def backend() -> str:
    """Import Unsloth, once, and name what does the work: "unsloth-cpu", "unsloth-gpu" or "plain".

    Raises RuntimeError, with Unsloth's own message, where it is installed and does not import.
    """
    reason = None
    if sys.platform == "darwin":
        reason = "Unsloth has no torch backend on macOS"
    elif importlib.util.find_spec("unsloth") is None:
        reason = "Unsloth is not installed"
    if reason:
        _say_once(f"{reason}: models load with plain transformers and PEFT.")
        return "plain"
    try:
        with _quiet():
            import unsloth  # noqa: F401  it patches the others, so it comes first
            from unsloth_zoo.device_type import DEVICE_TYPE
    except Exception as error:
        raise RuntimeError(
            f"Unsloth is installed but does not import here: {type(error).__name__}: {error}. "
            "Repair it, or go on without it: pip uninstall unsloth unsloth_zoo. "
            "To leave an NVIDIA card unused set CUDA_VISIBLE_DEVICES to nothing"
        ) from error
    return "unsloth-cpu" if DEVICE_TYPE == "cpu" else "unsloth-gpu"


def resolve(name: str | os.PathLike[str]) -> str:
    """Where a model is: a folder of data/ by name, any folder by path, or "owner/name" on the hub.

    Returns the folder's full path, or the hub id as it is. Raises FileNotFoundError, which says
    what there is, for a folder that is missing or holds no model in safetensors.
    """
    path = Path(name).expanduser()
    for folder in (DATA / path, path.absolute()):
        if folder.is_dir():
            return str(_holding(folder, "a model", "config.json", "*.safetensors"))
    owner, _, rest = str(name).partition("/")
    if rest and "/" not in rest and owner not in (".", "..", "~", "") and not Path(owner).exists():
        return str(name)
    known = sorted(file.parent.name for file in DATA.glob("*/config.json"))
    raise FileNotFoundError(
        f"there is no model {str(name)!r}: {path.absolute()} is no folder, and data/ has "
        f"{', '.join(known) or 'none'}. A model of the hub is named owner/name"
    )


def load_model(
    name: str | os.PathLike[str] = "abacus-3m",
    lora: LoRA | str | os.PathLike[str] | None = None,
    *,
    max_lora_rank: int = 64,
    fast_inference: bool = False,
    max_seq_length: int | None = None,
    dtype: "str | torch.dtype | None" = None,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer for TRL's trainers; print one line that says what it is.

    name: see ``resolve``.
    lora: LoRA(...) attaches a new adapter; a path attaches a saved one, which goes on training at
        its own rank; None trains every parameter.
    max_lora_rank: the largest rank that rollouts serve; the adapter's is checked against it.
    fast_inference: roll out with vLLM. On a CPU it says once that transformers does, and goes on.
    max_seq_length: in tokens; default: what the model takes, at most 2048.
    dtype: of the weights; default: float32 on a CPU, on every host alike (bfloat16 weights are no
        faster there than autocast, the trainer's bf16=True), bfloat16 or float16 on a GPU.
    seed: fixes how a new adapter starts. It is given to torch's global generator.

    Raises ValueError, FileNotFoundError or ImportError before any weight is loaded.
    """
    base = resolve(name)
    saved = None if lora is None or isinstance(lora, LoRA) else _saved_adapter(lora)
    rank = _saved_rank(saved) if saved else lora.rank if lora else None
    if max_seq_length is not None:
        _whole("max_seq_length", max_seq_length)
    if rank is not None:
        check_rank(rank, max_lora_rank)
    engine_rank = _engine_rank(max_lora_rank, rank) if fast_inference else max_lora_rank
    kind = backend()
    adapter, longest = _read_configs(base, lora, saved, rank, max_lora_rank)
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
    with _quiet(bars=not Path(base).is_dir()):
        model, tokenizer = _load(base, kind, options)
        if adapter is not None:
            model = _attach(model, adapter, kind, options)
        if saved:
            missing = model.load_adapter(str(saved), "default", is_trainable=True).missing_keys
            if missing:
                raise ValueError(f"{saved}/adapter_model.safetensors has no {missing[0]}")
    _check_trainable(model, adapter is not None)
    _set_padding(model, tokenizer)
    _report(model, base, kind, rank, saved)
    return model, tokenizer


def trainable(model: "torch.nn.Module") -> tuple[int, int]:
    """How many parameters a model trains, and how many it has."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def save_adapter(model: Any, folder: str | os.PathLike[str]) -> Path:
    """Save the adapter in PEFT's format, whole or not at all, and return the folder's full path.

    adapter_config.json names the base without its path, so that another machine can use it: give
    PEFT the base yourself. An adapter that is in the folder already is replaced at the very end.
    Raises TypeError without an adapter, FileExistsError if the folder holds anything else.
    """
    from peft import PeftModel

    folder = Path(folder).expanduser().absolute()
    if "default" not in getattr(model, "peft_config", {}):
        raise TypeError("the model has no adapter to save; a full one has model.save_pretrained")
    adapter_files = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    others = {file.name for file in folder.glob("*")} - adapter_files
    if others:
        raise FileExistsError(
            f"{folder} holds more than an adapter ({', '.join(sorted(others))}): name another one"
        )
    new = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        # The class's own method: Unsloth puts another on the instance. TRL's "ref" stays out.
        PeftModel.save_pretrained(
            model, str(new), selected_adapters=["default"], save_embedding_layers=False
        )
        _tidy(new)
        _swap(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


@functools.cache
def _say_once(line: str) -> None:
    print(line)


def _whole(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} is {value!r}: it must be a whole number of at least 1")


def _holding(folder: Path, what: str, *patterns: str) -> Path:
    """The folder, if it holds a file for each pattern."""
    for pattern in patterns:
        if not any(folder.glob(pattern)):
            there = ", ".join(sorted(file.name for file in folder.glob("*"))) or "nothing"
            raise FileNotFoundError(f"{folder} is not {what}: there is no {pattern} among {there}")
    return folder


def _saved_adapter(lora: str | os.PathLike[str]) -> Path:
    if not isinstance(lora, str | os.PathLike):
        raise ValueError(f"lora is {lora!r}: it must be LoRA(...), an adapter's folder or None")
    folder = Path(lora).expanduser().absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no adapter {str(lora)!r}: {folder} is no folder")
    return _holding(folder, "an adapter", "adapter_config.json", "adapter_model.safetensors")


def _saved_rank(folder: Path) -> int:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {config.get('peft_type')!r}, it must be 'LORA'")
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


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
    base: str, lora: LoRA | Any, saved: Path | None, rank: int | None, max_lora_rank: int
) -> tuple["LoraConfig | None", int]:
    """PEFT's config of the adapter, checked against the model's, and the model's longest input."""
    from peft import LoraConfig
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base)
    longest = getattr(config, "max_position_embeddings", None) or MAX_LENGTH
    if rank is None:
        return None, longest
    if saved:
        adapter = LoraConfig.from_pretrained(str(saved))
        trained_on = _without_path(adapter.base_model_name_or_path or "")
        if trained_on and Path(trained_on).name != Path(base).name:
            warnings.warn(f"{saved} was trained on {trained_on}, not on {base}", stacklevel=3)
        adapter.base_model_name_or_path, adapter.inference_mode = None, False
    else:
        adapter = LoraConfig(
            r=rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout,
            target_modules=list(lora.targets), init_lora_weights=INITS[lora.init],
        )  # fmt: skip
    adapter.task_type = "CAUSAL_LM"
    check_rank(rank, max_lora_rank, smallest_width(config, adapter.target_modules))
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


def _report(model: Any, base: str, kind: str, rank: int | None, saved: Path | None) -> None:
    count, total = trainable(model)
    mode = f"LoRA rank {rank}" if rank else "full fine-tuning"
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    print(
        f"{_without_path(base)}: {total:,} parameters, {count:,} train ({mode}"
        f"{f' from {saved.name}' if saved else ''}), {kind}, {dtype}"
    )


def _without_path(model: str) -> str:
    """ "abacus-3m" for data/abacus-3m, any other folder's name, a hub id as it is."""
    path = Path(model)
    if path.is_relative_to(DATA):
        return path.relative_to(DATA).as_posix()
    return path.name if path.is_absolute() else model


def _tidy(folder: Path) -> None:
    """PEFT's config without a path and in a fixed order; PEFT's card is an empty form and goes."""
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = _without_path(config["base_model_name_or_path"])
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _swap(new: Path, folder: Path) -> None:
    """Put `new` in the folder's place. No call replaces a full folder, so that one steps aside."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    try:
        if folder.exists():
            folder.replace(old)
        new.replace(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.replace(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _quiet(bars: bool = True) -> Iterator[None]:
    """Hold back what libraries print while they import and load; show it where they fail."""
    held = io.StringIO()
    with contextlib.ExitStack() as stack:
        if not bars:
            from transformers.utils import logging

            if logging.is_progress_bar_enabled():
                logging.disable_progress_bar()
                stack.callback(logging.enable_progress_bar)
        try:
            with contextlib.redirect_stdout(held):
                yield
        except BaseException:
            print(held.getvalue(), end="", file=sys.stderr)
            raise
