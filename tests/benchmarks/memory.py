"""Predicted and measured memory of training the practice model: python -m tests.benchmarks.memory

Prints both columns and their ratio; exits with status 1 if a peak is off by more than 25 %. Figures are in bytes.
"""

import argparse
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from rlnb import machine
from rlnb.model import load_model, memory, quiet
from rlnb.model.lora import MLP, LoRA
from rlnb.model.memory import Prediction, predict

import torch

CASES = {
    "LoRA rank 16, bf16 autocast": (LoRA(), True),
    "LoRA rank 16, float32": (LoRA(), False),
    "LoRA rank 64, bf16 autocast": (LoRA(rank=64), True),
    "LoRA rank 16 on the MLP, float32": (LoRA(targets=MLP), False),
    "full fine-tuning, bf16 autocast": (None, True),
}


@dataclass(frozen=True)
class Measured:
    """Bytes: what the process grew by at its peak (None but on Linux), and torch's allocator on a GPU."""

    ram: int | None
    gpu: int | None


def measure(work: Callable[[], Any]) -> Measured:
    """How much memory `work` takes at its peak. Import and warm up first: that takes memory too."""
    gc.collect()
    machine.trim()  # else freed memory is used again, and nothing grows
    machine.reset_peak_memory()
    held = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
    before = machine.linux_memory()
    work()
    after = machine.linux_memory()
    # Pages of files, a library's code above all, come and go: they are not counted.
    ram = after["VmHWM"] - after["RssFile"] - before["RssAnon"] if after else None
    return Measured(ram, torch.cuda.max_memory_allocated() - held if torch.cuda.is_initialized() else None)


def try_out(
    name: str | os.PathLike[str] = "abacus-3m", lora: LoRA | None = None, *,
    batch: int = 16, length: int = 128, autocast: bool = True,
) -> tuple[Prediction, Measured]:  # fmt: skip
    """Train on random tokens for three steps, and return what was predicted and what it took.

    In a process of its own, since memory that this one holds would be used again. There glibc is told to give
    large blocks back at once: by itself it holds about twice what is in use.
    """
    predicted = predict(name, lora, batch=batch, length=length, autocast=autocast)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # read when a process starts
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return predicted, pool.submit(_train_measured, name, lora, batch, length, autocast).result()
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def _train_measured(name: str, lora: LoRA | None, batch: int, length: int, autocast: bool) -> Measured:
    _train(name, lora, 1, 2, autocast)  # what is imported and compiled at first use stays
    return measure(lambda: _train(name, lora, batch, length, autocast))


def _train(name: str, lora: LoRA | None, batch: int, length: int, autocast: bool) -> None:
    with quiet():
        model, _ = load_model(name, lora, dtype="float32", max_lora_rank=512)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(model.config.vocab_size, (batch, length), device=model.device)
    for _ in range(3):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="abacus-3m")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()
    worst = 0.0
    print(f"{options.model}, batch {options.batch} x {options.length} tokens, MB of 2**20 bytes")
    print(f"{'':34}{'predicted':>10}{'measured':>10}{'ratio':>8}")
    for name, (lora, autocast) in CASES.items():
        predicted, found = try_out(
            options.model, lora, batch=options.batch, length=options.length, autocast=autocast
        )
        peak = found.ram if found.gpu is None else found.gpu
        ratio = predicted.peak / peak
        worst = max(worst, abs(ratio - 1))
        mb = f"{predicted.peak / memory.MB:10.1f}{peak / memory.MB:10.1f}"
        print(f"{name:34}{mb}{ratio:8.2f}", flush=True)
    sys.exit(worst > 0.25)


if __name__ == "__main__":
    main()
