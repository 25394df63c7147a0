"""What a run is told of the machine and of its own process, in MB of 2**20 bytes.

The doctor reads this on an old Python without packages: so each is imported where it is needed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from rlnb import __version__

PACKAGES = ("torch", "transformers", "trl", "peft", "unsloth", "unsloth_zoo", "datasets", "accelerate", "vllm")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def versions() -> dict[str, str]:
    """Name -> version of Python, rlnb and what is installed of PACKAGES. Imports none of them."""
    found = {"python": platform.python_version(), "rlnb": __version__}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def describe() -> dict[str, Any]:
    """The operating system and the number of logical CPUs."""
    return {"platform": platform.platform(), "cpus": os.cpu_count()}


def process() -> dict[str, Any]:
    """This process, for `alive` to recognise: its birth tells it from a later one of the same number."""
    return {"pid": os.getpid(), "host": platform.node(), "born": _born(os.getpid())}


def alive(process: dict[str, Any]) -> bool:
    """Whether a process still lives; one of another machine gets the benefit of the doubt."""
    if process.get("host") != platform.node():
        return True
    return process.get("born") is not None and _born(process["pid"]) == process["born"]


def _born(pid: int) -> str | None:
    if boot := _words("/proc/sys/kernel/random/boot_id"):  # Linux: ticks since that boot, whatever the clock does
        with suppress(OSError):
            state, *stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return None if state in "ZX" else f"{boot[0]}:{stat[18]}"
        return None
    import psutil

    return f"{psutil.Process(pid).create_time():.0f}" if psutil.pid_exists(pid) else None


def reset_peak_memory() -> None:
    """Starts `peak_memory_mb` (on Linux) and `gpu` anew: a kernel may hold several runs."""
    with suppress(OSError):  # no such file elsewhere, and not everywhere may it be written
        Path("/proc/self/clear_refs").write_text("5")
    if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def hold() -> Iterator[None]:
    """Large blocks of memory stay with this process while inside: glibc would give each one back to the system and
    fetch it anew, page by page, which takes a fifth of a training step of 135M parameters. Nothing elsewhere.
    """
    tune = getattr(ctypes.CDLL(None) if sys.platform == "linux" else None, "mallopt", lambda *_: None)
    tune(M_MMAP_MAX, 0)
    tune(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        tune(M_MMAP_MAX, 65536)  # as at the start, but that glibc adapts its thresholds no further once one is set
        tune(M_TRIM_THRESHOLD, 2**17)
        trim()


def trim() -> None:
    """Gives freed memory back to the system, which glibc holds: some 20 ms, and nothing elsewhere."""
    with suppress(OSError, AttributeError, TypeError):  # a C library without it; Windows, which has none of this name
        ctypes.CDLL(None).malloc_trim(0)


def linux_memory() -> dict[str, int]:
    """This process's memory in bytes by Linux's names: RssAnon, RssFile, VmHWM (the peak); {} elsewhere."""
    file = Path("/proc/self/status")
    rows = [row.split() for row in file.read_text().splitlines()] if file.is_file() else []
    return {row[0].rstrip(":"): 1024 * int(row[1]) for row in rows if row[-1] == "kB"}


def peak_memory_mb() -> float:
    """The most memory that this process has held: since the reset on Linux, else since it began."""
    if peak := linux_memory().get("VmHWM"):  # getrusage would give a child its parent's
        return round(peak / 2**20, 1)
    import psutil

    used = psutil.Process().memory_info()
    return round(getattr(used, "peak_wset", used.rss) / 2**20, 1)  # Windows has a peak; macOS what it holds now


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
    words = _words(f"/sys/fs/cgroup/{name}")
    return [int(word) for word in words] if all(map(str.isdigit, words)) else []


def cpu_bf16() -> set[str] | None:
    """The CPU's instructions for bf16, by name; None where the system does not tell."""
    words = _words("/proc/cpuinfo")
    return {"amx_bf16", "avx512_bf16", "bf16"} & set(words) if words else None


def _words(file: str) -> list[str]:
    return Path(file).read_text().split() if Path(file).is_file() else []
