"""What this machine can do: python -m rlnb doctor, or `check_machine.report()` in a notebook.

This file keeps to the standard library and to what an old Python can parse, as people ask when something is broken.
A look returns what it saw; if not all is well, also the level ("advice" or "problem") and what to do.
"""

from __future__ import annotations  # for Python 3.9: see setup.py

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from rlnb import machine
from rlnb.tools import setup as environments

GB = 2**30
MEMORY, DISK = 3, 2  # GB free: with less take care
SETUP = "python -m rlnb setup"


class Finding(NamedTuple):
    """What was seen; level is ok, advice or problem. What to do."""

    name: str
    saw: str
    level: str = "ok"
    do: str = ""

    def __str__(self) -> str:
        level = self.level.upper() if self.level == "problem" else self.level
        return f"{level:8}{self.name:9} {self.saw}" + (f". {self.do}" if self.do else "")


class Report(list):
    """Findings, shown one below the other."""

    def __repr__(self) -> str:
        return "\n".join(map(str, self))


def report() -> Report:
    """What works on this machine, a line each. It takes some seconds if it has to import Unsloth."""
    found = Report()
    for look in LOOKS:
        try:
            found.append(Finding(look.__name__, *look()))
        except Exception as error:  # whatever is broken: that is when people ask a doctor
            saw = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            found.append(Finding(look.__name__, saw, "problem", f"To mend the packages: {SETUP}"))
    return found


def space() -> tuple[str, ...]:
    place = Path(os.environ.get("RLNB_RUNS", environments.ROOT)).absolute()
    place = next(p for p in (place, *place.parents) if p.exists())
    memory, disk = machine.free_memory() / GB, shutil.disk_usage(place).free / GB
    saw = f"{memory:.1f} GB of memory and {disk:.1f} GB of disk free"
    if memory >= MEMORY and disk >= DISK:
        return (saw,)
    return saw, "advice", f"Shut down other kernels, or delete old runs in {place}"


def gpu() -> tuple[str, ...]:
    import torch

    if torch.cuda.is_available():
        free, total = (size / GB for size in torch.cuda.mem_get_info())
        return (f"{torch.cuda.get_device_name()}: {free:.1f} of {total:.1f} GB free; CUDA {torch.version.cuda}",)
    if shutil.which("nvidia-smi"):
        do = f"Look at its driver and CUDA_VISIBLE_DEVICES, or {SETUP} --kind gpu"
        return f"torch {torch.__version__} sees none, but there is nvidia-smi", "advice", do
    return ("none, and the practice model needs none",)


def backend() -> tuple[str, ...]:
    """Imports Unsloth."""
    from rlnb.model import backend

    return (backend(),)


def versions() -> tuple[str, ...]:
    """Against the requirement files of the kind of environment that this one is."""
    saw = f"Python {sys.version.split()[0]} in {sys.prefix}"
    if not (environments.ROOT / "requirements.txt").exists():
        return (f"{saw}; rlnb comes from a wheel, and pip has seen to the rest",)
    kinds = {"gpu": "vllm", "unsloth": "unsloth", "plain": "sys"}
    kind = environments.read_stamp(Path(sys.prefix))[0]
    kind = kind or next(kind for kind, mark in kinds.items() if importlib.util.find_spec(mark))
    if found := environments.differences(kind):
        other = ", ".join(f"{name} {version or 'missing'}" for name, version in found.items())
        level = "problem" if None in found.values() else "advice"
        command = SETUP + " --here --kind colab" * (kind == "colab")
        return f"{saw}; not as tested: {other}", level, f"To install the tested ones: {command}"
    return (f"{saw}, the tested packages ({kind})",)


LOOKS = (versions, space, gpu, backend)
