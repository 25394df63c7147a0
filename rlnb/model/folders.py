"""Where models and adapters lie: found by name, read and checked, written whole or not at all.

A saved adapter's folder holds PEFT's two files and nothing else, so that other tools read it.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open

from rlnb.model.lora import linear_layers

DATA = Path(__file__).resolve().parents[2] / "data"
FILES = ("adapter_config.json", "adapter_model.safetensors")


def resolve(name: str | os.PathLike[str]) -> str:
    """Where a model is: a folder of data/ by name, any folder by path, or "owner/name" on the hub.

    Returns the folder's full path, or the hub id as it is. Raises FileNotFoundError, which says
    what there is, for a folder that is missing or holds no model in safetensors.
    """
    path = Path(name).expanduser()
    for folder in (DATA / path, path.absolute()):
        if folder.is_dir():
            return str(_check_holds(folder, "a model", "config.json", "*.safetensors"))
    owner, _, rest = str(name).partition("/")
    if rest and "/" not in rest and owner not in (".", "..", "~", "") and not Path(owner).exists():
        return str(name)
    known = ", ".join(sorted(file.parent.name for file in DATA.glob("*/config.json"))) or "none"
    raise FileNotFoundError(
        f"there is no model {str(name)!r}: {path.absolute()} is no folder, and data/ has {known}. A model "
        "of the hub is named owner/name"
    )


def base_name(model: str) -> str:
    """ "abacus-3m" for data/abacus-3m, any other folder's name, a hub id as it is."""
    path = Path(model)
    if path.is_relative_to(DATA):
        return path.relative_to(DATA).as_posix()
    return path.name if path.is_absolute() else model


def save_adapter(model: Any, folder: str | os.PathLike[str], name: str = "default") -> Path:
    """Save an adapter in PEFT's format, whole or not at all, and return the folder's full path.

    adapter_config.json names the base without its path, so that another machine can use it: give
    PEFT the base yourself. An adapter that is in the folder already is replaced at the very end.
    Raises TypeError without an adapter, FileExistsError if the folder holds anything else.
    """
    folder = Path(folder).expanduser().absolute()
    if not hasattr(model, "peft_config"):
        raise TypeError("the model has no adapter to save; a full one has model.save_pretrained")
    check_name(model, name)
    new = replacement(folder, "an adapter", [*FILES, "README.md"])
    try:
        # The class's own method: Unsloth puts another on the instance. TRL's "ref" stays out.
        PeftModel.save_pretrained(model, str(new), selected_adapters=[name], save_embedding_layers=False)
        written = new if name == "default" else new / name  # PEFT's own habit
        _normalise(written)
        swap(written, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def _normalise(folder: Path) -> None:
    """PEFT's config without a path and in a fixed order; PEFT's README is an empty form and goes."""
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / FILES[0]
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_name(config["base_model_name_or_path"])
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_saved(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """The full path of a saved adapter's folder, and its adapter_config.json.

    Raises FileNotFoundError if a file is missing, ValueError for another kind of adapter.
    """
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no adapter {str(path)!r}: {folder} is no folder")
    file = _check_holds(folder, "an adapter", *FILES) / FILES[0]
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {config.get('peft_type')!r}, it must be 'LORA'")
    return folder, config


def check_fits(folder: Path, config: dict[str, Any], base: str, model: torch.nn.Module | None) -> None:
    """Warn if a saved adapter names another base than the one it goes on, `base`. Raise ValueError unless
    its weights fit that model, or its skeleton. Only the file's header is read.
    """
    trained_on = base_name(config.get("base_model_name_or_path") or "")
    if trained_on and Path(trained_on).name != Path(base).name:
        warnings.warn(f"{folder} was trained on {trained_on}, not on {base}", stacklevel=4)
    linear, file = linear_layers(model) if model is not None else {}, folder / FILES[1]
    with safe_open(file, "pt") as weights:
        for key in weights.keys() if linear else ():
            found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
            if not found:
                continue
            name, is_b = found[1], found[2] == "B"
            if name not in linear:
                raise ValueError(f"{file} is for another base: this one has no layer {name}")
            width = weights.get_slice(key).get_shape()[0 if is_b else 1]
            if width != linear[name][is_b]:
                here = f"{width} wide there and {linear[name][is_b]} here"
                raise ValueError(f"{file} is for another base: {name} is {here}")


def load_weights(model: Any, folder: Path, name: str, trainable: bool) -> None:
    """Read a saved adapter into the model, under a name that may be there already.

    Raises ValueError, and takes a new name away again, if the file lacks a weight.
    """
    new = name not in model.peft_config
    result = model.load_adapter(str(folder), name, is_trainable=trainable)
    # PEFT lists every key that holds the name, so that "sft" finds fault with "sft2".
    if missing := [key for key in result.missing_keys if name in key.split(".")[-2:]]:
        if new:
            model.delete_adapter(name)
        raise ValueError(f"{folder / FILES[1]} has no {missing[0]}")


def check_name(model: Any, name: str) -> None:
    """Raise ValueError if the model has no adapter of that name."""
    there = getattr(model, "peft_config", {})
    if name not in there:
        raise ValueError(f"the model has no adapter {name!r}: it has {', '.join(there) or 'none'}")


def _check_holds(folder: Path, what: str, *patterns: str) -> Path:
    for pattern in patterns:
        if not any(folder.glob(pattern)):
            there = ", ".join(sorted(file.name for file in folder.glob("*"))) or "nothing"
            raise FileNotFoundError(f"{folder} is not {what}: there is no {pattern} among {there}")
    return folder


def replacement(folder: Path, what: str, files: Iterable[str]) -> Path:
    """A new name beside the folder, to write into and then to `swap`.

    files: patterns. Raises FileExistsError if the folder holds any other file.
    """
    there = {file.name for file in folder.glob("*")}
    if others := sorted(name for name in there if not any(fnmatch(name, p) for p in files)):
        raise FileExistsError(f"{folder} holds more than {what} ({', '.join(others)}): name another one")
    return folder.with_name(f".{folder.name}.{os.getpid()}")


def swap(new: Path, folder: Path) -> None:
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
