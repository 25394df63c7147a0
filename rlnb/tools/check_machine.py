"""The doctor's looks at this machine. Each returns what it saw; if not all is well, also how bad it
is ("advice" or "problem") and what to do.

People ask when something is broken: so this file keeps to the standard library and to what an old
Python can parse, and every look imports what it needs by itself. What it says of GPUs is untested
until tests/gpu has run on one.
"""

from __future__ import annotations  # for Python 3.9: see bootstrap

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from rlnb import machine
from rlnb.tools import setup as bootstrap

GB = 2**30
MEMORY, DISK = (
    (1, 3),
    (0.2, 2),
)  # GB free: below the first it won't work, below the second take care
PATCHED = ("trl", "transformers", "peft")  # by Unsloth, so it has to be imported first
SETUP = "python -m rlnb setup"

# --- the machine ---------------------------------------------------------------------------------


def python() -> tuple[str, ...]:
    saw = f"{sys.version.split()[0]} in {sys.prefix}"
    if f"{sys.version_info[0]}.{sys.version_info[1]}" not in bootstrap.PYTHONS:
        return saw, "problem", f"rlnb needs {bootstrap.PYTHONS[0]} to {bootstrap.PYTHONS[-1]}"
    return (saw,)


def cores() -> tuple[str, ...]:
    import torch

    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = machine.container("cpu.max")
    if len(quota) == 2:
        count = min(count, max(1, quota[0] // quota[1]))
    threads, asked = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    saw = f"{threads} threads of torch on {count} cores"
    if threads > count:
        return saw, "advice", f"They are in each other's way: set OMP_NUM_THREADS={count}"
    if asked and 2 * threads <= count:
        return saw, "advice", f"OMP_NUM_THREADS={asked} leaves cores idle"
    return (saw,)


def memory() -> tuple[str, ...]:
    import psutil

    total = psutil.virtual_memory().total / GB
    return _enough(machine.free_memory() / GB, f"of {total:.1f} GB free", MEMORY, "Shut down other kernels")


def disk() -> tuple[str, ...]:
    place = Path(os.environ.get("RLNB_RUNS", bootstrap.ROOT)).absolute()
    place = next(p for p in (place, *place.parents) if p.exists())
    free = shutil.disk_usage(place).free / GB
    return _enough(free, "GB free for runs", DISK, f"Delete old runs in {place}, or set RLNB_RUNS")


def _enough(free: float, saw: str, limits: tuple[float, float], do: str) -> tuple[str, ...]:
    saw = f"{free:.1f} {saw}"
    return (saw,) if free >= limits[1] else (saw, "problem" if free < limits[0] else "advice", do)


def gpu() -> tuple[str, ...]:
    card = _nvidia()
    import torch

    build = f"torch is built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPUs'}"
    if torch.cuda.is_available():
        free, total = (size / GB for size in torch.cuda.mem_get_info())
        name = card or torch.cuda.get_device_name()
        return (f"{name}: {free:.1f} of {total:.1f} GB free; {build}",)
    if not card:
        return (f"none, and the practice model needs none; {build}",)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    do = "CUDA_VISIBLE_DEVICES hides it" if hidden else f"Look at the driver, or {SETUP} --kind gpu"
    return f"{card}, unused; {build}", "advice", do


def _nvidia() -> str:
    """Name and driver of each card, "" without one."""
    if not shutil.which("nvidia-smi"):
        return ""
    ask = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(ask, capture_output=True, text=True, timeout=20)
    return "; ".join(done.stdout.replace(",", " with driver").splitlines())


def bf16() -> tuple[str, ...]:
    import torch

    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return ("in the GPU's hardware",)
        return "not in the GPU's hardware", "advice", "Train with bf16=False, fp16=True"
    half, single = _gflops("bfloat16"), _gflops("float32")
    names = ", ".join(sorted(machine.cpu_bf16() or ["no instructions known"]))
    saw = f"{names}: {half:.0f} GFLOP/s, float32 {single:.0f}"
    if half < single:
        return saw, "advice", "Slower than float32: train with bf16=False, as Unsloth does here"
    return (saw,)


def _gflops(dtype: str, size: int = 512, seconds: float = 0.1) -> float:
    """What matrix products of a type reach, measured; the first one sets things up."""
    import torch

    a, count = torch.ones(size, size, dtype=getattr(torch, dtype)), 0
    a @ a
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        a @ a
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - began) / 1e9


# --- the packages --------------------------------------------------------------------------------


def backend() -> tuple[str, ...]:
    """Imports Unsloth: here if it already is here, else in another process, which may crash."""
    if "unsloth" in sys.modules:
        from rlnb.model import load as models

        return (models.backend(),)
    ask = (
        "import torch; from rlnb.model import load; print(load.backend(), torch.cuda.is_available())"
    )
    path = os.pathsep.join(filter(None, [str(bootstrap.ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        return last[:300], "problem", f"To set it up anew: {SETUP}"
    kind, cuda = done.stdout.split()[-2:]
    if kind == "plain" and cuda == "False" and metadata.version("trl").startswith("1.15."):
        saw = f"plain, with trl {metadata.version('trl')}"
        return saw, "problem", f"On a CPU that trains with Unsloth only: {SETUP} --kind plain"
    return (kind,)


def vllm() -> tuple[str, ...]:
    if importlib.util.find_spec("vllm"):
        return (metadata.version("vllm"),)
    if _nvidia():
        return "not installed", "advice", f"It samples much faster: {SETUP} --kind gpu"
    return ("not installed, and not used without a GPU",)


def versions() -> tuple[str, ...]:
    """Against the requirement files of the kind of environment that this one is."""
    if not (bootstrap.ROOT / "requirements.txt").exists():
        return ("rlnb comes from a wheel, and pip has seen to the rest",)
    kinds = {"gpu": "vllm", "unsloth": "unsloth", "plain": "sys"}
    kind = next(kind for kind, mark in kinds.items() if importlib.util.find_spec(mark))
    tested = {}
    for step in bootstrap.STEPS[kind]:
        text = (bootstrap.ROOT / step[-1]).read_text(encoding="utf-8")
        tested.update(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE))
    missing, other = [], []
    for name, version in tested.items():
        try:
            found = metadata.version(name).split("+")[0]
            other += [f"{name} {found}, tested {version}"] if found != version else []
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return f"missing: {', '.join(missing)}", "problem", f"To install them: {SETUP}"
    if other:
        return "; ".join(other), "advice", f"If something fails, take the tested ones: {SETUP}"
    return (f"the {len(tested)} tested ones ({kind})",)


def imports() -> tuple[str, ...]:
    # In order. A package's own entry may be put in anew when its import ends; its parts stay.
    families = (name.split(".")[0] for name in sys.modules)
    loaded = [name for name in families if name in (*PATCHED, "unsloth")]
    if not importlib.util.find_spec("unsloth") or not loaded:
        return ("nothing yet that minds the order",)
    if loaded[0] == "unsloth":
        return ("unsloth first, as it has to be",)
    do = "Restart the kernel, and call rlnb.model.load.backend() above the other imports"
    return f"{loaded[0]} before unsloth, which patches it", "advice", do


LOOKS = (python, cores, memory, disk, gpu, bf16, backend, vllm, versions, imports)
