"""Where models and adapters lie: found by name, read and checked, written whole or not at all."""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError, safe_open

from rlnb.files import check_fields
from rlnb.model.lora import LoRA, check_init

DATA = Path(__file__).resolve().parents[2] / "data"
SAMPLE = 2**20  # bytes at each end of a file of weights
FILES = ("adapter_config.json", "adapter_model.safetensors")


def resolve(name: str | os.PathLike[str]) -> str:
    """Where a model is: a folder of data/ by name, any folder by path, or "owner/name" on the hub.

    Returns the full path, or the hub id. Raises FileNotFoundError without a model in safetensors.
    """
    path = Path(name).expanduser()
    for folder in (DATA / path, path.absolute()):
        if folder.is_dir():
            _read_config(_check_holds(folder, "a model", "config.json", "*.safetensors") / "config.json")
            return str(folder)
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name)) and not path.parent.exists():
        return str(name)
    known = ", ".join(sorted(file.parent.name for file in DATA.glob("*/config.json"))) or "none"
    where = f"{path.absolute()} is no folder, and data/ has {known}"
    raise FileNotFoundError(f"there is no model {str(name)!r}: {where}. A model of the hub is named owner/name")


def weights(model: str) -> str | None:
    """Sixteen characters that differ where a model's weights do: of the size, the head and the end of each of
    its files. None for a model of the hub, whose name says it.
    """
    folder = Path(resolve(model))
    if not folder.is_absolute():
        return None
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            digest.update(f"{file.name} {file.stat().st_size}".encode() + opened.read(SAMPLE))
            opened.seek(max(0, file.stat().st_size - SAMPLE))
            digest.update(opened.read())
    return digest.hexdigest()[:16]


def base_name(model: str) -> str:
    """The folder's name of a model in a folder, as "abacus-3m"; a hub id as it is."""
    return Path(model).name if Path(model).is_absolute() else model


def save_adapter(model: Any, folder: str | os.PathLike[str], name: str = "default") -> Path:
    """Save an adapter in PEFT's two files, whole or not at all, and return the folder's full path.

    adapter_config.json names the base without its path, for other machines: give PEFT the base yourself.
    Raises ValueError without that adapter, FileExistsError if the folder holds anything but an adapter.
    """
    folder = Path(folder).expanduser().absolute()
    check_name(model, name)
    with replaced(folder, [*FILES, "README.md"]) as new:
        # The class's own method: Unsloth puts another on the instance. TRL's "ref" stays out.
        PeftModel.save_pretrained(model, str(new), selected_adapters=[name], save_embedding_layers=False)
        (new / "README.md").unlink(missing_ok=True)  # an empty form
        if name != "default":  # PEFT's own habit
            for file in FILES:
                (new / name / file).replace(new / file)
            (new / name).rmdir()
        config = json.loads((new / FILES[0]).read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = base_name(config["base_model_name_or_path"])
        if isinstance(config["target_modules"], list):
            config["target_modules"].sort()
        (new / FILES[0]).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def read_saved(path: str | os.PathLike[str], base: str | None = None, reward=False) -> tuple[Path, dict[str, Any]]:
    """The full path of a saved adapter's folder, and its adapter_config.json; reward: of a reward model's. Warns if
    that names another base than this one, which it is to go on. Raises FileNotFoundError, or ValueError for another
    kind, what cannot work, an init that rewrites the base, or weights that are cut off.
    """
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no adapter {str(path)!r}: {folder} is no folder")
    file = _check_holds(folder, "an adapter", *FILES) / FILES[0]
    config = _read_config(file)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {config.get('peft_type')!r}, it must be 'LORA'")
    if (config.get("task_type") == "SEQ_CLS") != reward:
        says = "no reward model's, which is SEQ_CLS" if reward else "a reward model's: give it where rewards go"
        raise ValueError(f"{file}: task_type is {config.get('task_type')!r}, so this is {says}")
    targets = config.get("target_modules")
    try:
        LoRA(config.get("r"), config.get("lora_alpha"), targets="all-linear" if isinstance(targets, str) else targets)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    check_init(config.get("init_lora_weights"), f"{file}: init_lora_weights")
    trained_on = base_name(config.get("base_model_name_or_path") or "")
    if base and trained_on and Path(trained_on).name != Path(base).name:
        warnings.warn(f"{folder} was trained on {trained_on}, not on {base}", stacklevel=4)
    check_whole(folder)
    return folder, config


def check_whole(folder: Path) -> None:
    """Raise ValueError with its name for a file of weights that is cut off, or is something else."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is not whole: {error}. Copy it again") from error


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    check_fields(config, {}, str(file))
    return config


def load_weights(model: Any, folder: Path, name: str, trainable: bool) -> None:
    """Read a saved adapter into the model, under a name that may be there already.

    Raises ValueError, and takes a new name away again, if the file's weights are not the model's.
    """
    new = name not in model.peft_config
    try:
        result = model.load_adapter(str(folder), name, is_trainable=trainable)
        # PEFT lists every key that holds the name, so that "sft" finds fault with "sft2".
        missing = [key for key in result.missing_keys if name in key.split(".")[-2:]]
        for where, keys in (("the file", missing), ("this base", result.unexpected_keys)):
            if keys:
                raise RuntimeError(f"{where} has no {keys[0]}")
    except (RuntimeError, ValueError) as error:  # or PEFT's, which lists the sizes
        if new and name in model.peft_config:
            model.delete_adapter(name)
        raise ValueError(f"{folder / FILES[1]} is for another base or not whole: {error}") from error


def check_name(model: Any, name: str) -> None:
    """Raise ValueError if the model has no adapter of that name."""
    there = model.peft_config if isinstance(model, PeftModel) else {}
    if name not in there:
        raise ValueError(f"the model has no adapter {name!r}: it has {', '.join(there) or 'none'}")


def _check_holds(folder: Path, what: str, *patterns: str) -> Path:
    for pattern in patterns:
        if not any(folder.glob(pattern)):
            there = ", ".join(sorted(file.name for file in folder.glob("*"))) or "nothing"
            raise FileNotFoundError(f"{folder} is not {what}: there is no {pattern} among {there}")
    return folder


@contextmanager
def replaced(folder: Path, files: Iterable[str]) -> Iterator[Path]:
    """Yields a new folder to write into, which then takes the folder's place: whole or not at all. Raises
    FileExistsError if that holds anything but these files, which are patterns.
    """
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file: name a folder")
    others = [f.name for f in folder.glob("*") if not any(fnmatch(f.name, pattern) for pattern in files)]
    if others:
        raise FileExistsError(f"{folder} holds other files ({', '.join(others)}): name another folder")
    new, old = (folder.with_name(f".{folder.name}.{end}") for end in (os.getpid(), "old"))
    try:
        new.mkdir(parents=True)
        yield new
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():  # no call replaces a full folder, so that one steps aside
            folder.replace(old)
        new.replace(folder)
    finally:
        if old.exists() and not folder.exists():
            old.replace(folder)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(new, ignore_errors=True)
