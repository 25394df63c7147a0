"""What a run is told of the machine and of its own process, in MB of 2**20 bytes.

The doctor reads this on an old Python without packages: so it imports each where it needs it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlnb import __version__

PACKAGES = ("torch", "transformers", "trl", "peft", "unsloth", "unsloth_zoo", "datasets", "accelerate",
            "vllm")  # fmt: skip
BF16 = {"amx_bf16", "avx512_bf16", "bf16"}  # what CPUs call their instructions for it


def versions() -> dict[str, str]:
    """Name -> version of Python, rlnb and what is installed of PACKAGES. Imports none of them."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "rlnb": __version__}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def describe() -> dict[str, Any]:
    """The operating system and the number of logical CPUs."""
    return {"platform": platform.platform(), "cpus": os.cpu_count()}


def process() -> dict[str, Any]:
    """This process, for `alive` to recognise."""
    return {"pid": os.getpid(), "host": platform.node(), "born": _born(os.getpid())}


def alive(process: Mapping[str, Any]) -> bool:
    """Whether a process still lives; one of another machine gets the benefit of the doubt."""
    if process.get("host") != platform.node():
        return True
    return process.get("born") is not None and _born(process["pid"]) == process["born"]


def _born(pid: int) -> str | None:
    """When a process started, which tells it from a later one of the same number; None if dead."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if boot.is_file():  # Linux: ticks since a named boot, so a changed clock does not matter
        with suppress(OSError):
            state, *stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return None if state in "ZX" else f"{boot.read_text().strip()}:{stat[18]}"
        return None
    import psutil

    with suppress(psutil.Error):
        return f"{psutil.Process(pid).create_time():.0f}"
    return None


def reset_peak_memory() -> None:
    """Starts `peak_memory_mb` (on Linux) and `gpu` anew: a kernel may hold several runs."""
    with suppress(OSError):  # no such file elsewhere, and not everywhere may it be written
        Path("/proc/self/clear_refs").write_text("5")
    if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def trim() -> None:
    """Gives freed memory back to the system, which glibc keeps: some 20 ms, and nothing elsewhere."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a C library without it
            ctypes.CDLL(None).malloc_trim(0)


def linux_memory() -> dict[str, int]:
    """This process's memory in bytes by Linux's names: RssAnon, RssFile, VmHWM (the peak); {} elsewhere."""
    file = Path("/proc/self/status")
    rows = [row.split() for row in file.read_text().splitlines()] if file.is_file() else []
    return {row[0].rstrip(":"): 1024 * int(row[1]) for row in rows if row[-1] == "kB"}


def peak_memory_mb() -> float:
    """The most memory that this process has held: since the reset on Linux, else since it began."""
    if peak := linux_memory().get("VmHWM"):  # a child would take over its parent's peak from getrusage
        return round(peak / 2**20, 1)
    if sys.platform == "win32":
        import psutil

        return round(psutil.Process().memory_info().peak_wset / 2**20, 1)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)  # bytes there, else KiB


def gpu() -> tuple[float | None, str | None]:
    """(peak MB of torch's allocator, name of the GPU), without importing torch or waking CUDA."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None, None
    return round(torch.cuda.max_memory_allocated() / 2**20, 1), torch.cuda.get_device_name()


def free_memory() -> int:
    """Bytes that this process can still get: of the machine, or of its container if that has less."""
    import psutil

    limit, used = container("memory.max"), container("memory.current")
    free = psutil.virtual_memory().available
    return min(free, limit[0] - used[0]) if limit and used else free


def container(name: str) -> list[int]:
    """The numbers in a file of cgroup v2; [] where there is no limit and outside of containers."""
    file = Path("/sys/fs/cgroup", name)
    words = file.read_text().split() if file.is_file() else []
    return [int(word) for word in words] if all(map(str.isdigit, words)) else []


def cpu_bf16() -> set[str] | None:
    """The CPU's instructions for bf16, by name; None where the system does not tell."""
    file = Path("/proc/cpuinfo")
    return BF16 & set(file.read_text().split()) if file.is_file() else None
