"""Set-up with the standard library only: an environment, the packages, a stamp that says "done".

    python -m rlnb setup                .venv with Unsloth (without on macOS: it has no torch there)
    python -m rlnb setup --kind plain   .venv without Unsloth, with a TRL that trains on a CPU alone
    python -m rlnb setup --kind gpu     .venv with vLLM and what else Unsloth uses on a CUDA machine
    python -m rlnb setup --here         the same in the Python that runs this: conda; Colab with --kind colab

The other commands call `ensure` first. This file, __init__.py, __main__.py and check_machine.py keep to
what an old Python can parse, so that it gets as far as the message about its version.
"""

from __future__ import annotations  # for Python 3.9, still the system's own on some machines

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
PYTHONS = ("3.11", "3.12", "3.13")
STAMP = "rlnb-setup"  # in the environment's folder: its kind, then a fingerprint or UNFINISHED
UNFINISHED = "unfinished"
_PLAIN = (("-r", "requirements.txt"),)
_UNSLOTH = (*_PLAIN, ("--no-deps", "-r", "requirements-unsloth.txt"))
# What each kind of environment asks of pip.
WHOLE = {"plain": _PLAIN, "unsloth": _UNSLOTH, "gpu": (*_UNSLOTH, ("-r", "requirements-gpu.txt"))}
STEPS = WHOLE | {"colab": (("--no-deps", "-r", "requirements-colab.txt"),)}  # what Google Colab lacks
FILES = (*(f"requirements{of}.txt" for of in ("", "-unsloth", "-gpu", "-colab")), "pyproject.toml")


def ensure(arguments: list[str]) -> None:
    """Returns if this Python has the packages; else goes on as `python -m rlnb` in .venv.

    arguments: of the command line, for the new process. Sets .venv up first where that is needed.
    """
    if not (ROOT / "requirements.txt").exists():
        return  # installed from a wheel: pip has seen to the packages
    kind, state = read_stamp(Path(sys.prefix))
    if (kind and state == _fingerprint(kind, _version(sys.executable))) or not all(map(differences, WHOLE)):
        return
    become([str(setup(VENV)), "-m", "rlnb", *arguments])


def become(command: list[str]) -> NoReturn:
    """Ends this process and runs a command in its place, with rlnb on its path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if os.name == "nt":  # where exec would hand the prompt back at once
        sys.exit(subprocess.call(command, env=environment))
    os.execve(command[0], command, environment)


def setup(prefix: Path | None, kind: str | None = None) -> Path:
    """Completes an environment and returns its interpreter; if nothing changed, in a moment.

    prefix: the folder of a virtual environment, made if need be; None: the Python that runs this.
    kind: a key of STEPS; None keeps the environment's own, "unsloth" for a new one.
    What was interrupted or is of another kind starts from an empty folder, because pip takes a
    half copied package for an installed one; what it has downloaded stays in its cache.
    """
    began = time.monotonic()
    folder = prefix or Path(sys.prefix)
    python = interpreter(prefix) if prefix else Path(sys.executable)
    version, (was, state) = _version(python), read_stamp(folder)
    kind = kind or was or "unsloth"
    if (was, state) == (kind, _fingerprint(kind, version)):
        _add_to_path(python)  # again, for a checkout that has moved
        return python
    afresh = prefix and (version not in PYTHONS or state == UNFINISHED or was not in (None, kind))
    version = _version(sys.executable) if afresh else version
    if version not in PYTHONS:
        sys.exit(f"rlnb needs Python {PYTHONS[0]} to {PYTHONS[-1]}: this is {version}. Install one and use it, "
                 "as in `make PYTHON=python3.12 run`, or: conda env create -f environment.yml")
    print(f"Setting up {folder} ({kind}); this takes minutes the first time.", flush=True)
    if afresh:
        _make(folder, kind)
    (folder / STAMP).write_text(f"{kind} {UNFINISHED}")  # now, for what is killed halfway
    for step in STEPS[kind]:
        command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *step]
        if subprocess.call(command, cwd=ROOT):
            sys.exit(f"{' '.join(command)}\nfailed: see above.")
    _add_to_path(python)
    (folder / STAMP).write_text(f"{kind} {_fingerprint(kind, version)}")
    print(f"Ready after {time.monotonic() - began:.0f} s.", flush=True)
    return python


def _make(folder: Path, kind: str) -> None:
    """A virtual environment of this Python, in the place of the one that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    old = [path for path in folder.iterdir() if path.name != STAMP]
    if old and not any((folder / name).exists() for name in ("pyvenv.cfg", STAMP)):
        sys.exit(f"{folder} holds other files: give --venv a new or an empty folder.")
    (folder / STAMP).write_text(f"{kind} {UNFINISHED}")
    for path in old:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    base = getattr(sys, "_base_executable", sys.executable)  # not the one that was in the folder
    # Its output is held: on Ctrl-C it would tell of its own interrupt with a traceback.
    made = subprocess.run([base, "-m", "venv", str(folder)], capture_output=True, text=True)
    if made.returncode:
        sys.exit(f"{base} could not make {folder}:\n{made.stdout}{made.stderr}"
                 "An environment of your own will do too: python -m rlnb setup --here")


def interpreter(prefix: Path) -> Path:
    """Where a virtual environment has its Python."""
    return prefix / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _version(python: Path | str) -> str | None:
    """Asks an interpreter for its version, "3.11"; None if there is none or it does not run."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        return subprocess.check_output([str(python), "-c", code], stderr=-3, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_stamp(folder: Path) -> tuple[str | None, str | None]:
    """Kind and state; (None, None) if the stamp is missing or cut off, so that pip looks again."""
    try:
        kind, state = (folder / STAMP).read_text().split()
    except (OSError, ValueError):
        return None, None
    return (kind, state) if kind in STEPS else (None, None)


def _fingerprint(kind: str, version: str | None) -> str:
    digest = hashlib.sha256(f"{kind} {version}".encode())
    for name in FILES:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def differences(kind: str) -> dict[str, str | None]:
    """Package -> version here, None if there is none, where it is not that of a kind of environment."""
    from importlib import metadata  # 30 ms, and seldom needed

    found: dict[str, str | None] = {}
    texts = ((ROOT / step[-1]).read_text(encoding="utf-8") for step in STEPS[kind])
    pins = {name: pin for text in texts for name, pin in re.findall(r"(?m)^([\w.-]+)==([\w.]+)", text)}
    for name, pin in pins.items():  # of the later file, as with pip
        try:
            here = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            here = None
        if here != pin:
            found[name] = here
    return found


def _add_to_path(python: Path) -> None:
    """Lets what runs in an environment import rlnb from any folder: a kernel of VS Code's, say."""
    code = (  # for the environment's own Python, which knows where and how it reads such a file
        "import pathlib, sys, sysconfig\n"
        "file = pathlib.Path(sysconfig.get_path('purelib'), 'rlnb.pth')\n"
        "if not file.exists() or file.read_text() != sys.argv[1]: file.write_text(sys.argv[1])"
    )
    subprocess.run([str(python), "-c", code, f"{ROOT}\n"], check=True)
