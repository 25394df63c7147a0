"""What training with LoRA costs in memory: predicted from a model's config alone, then measured. In bytes; MB is
2**20 of them, as in the registry of runs.
"""

import gc
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig

from rlnb import machine
from rlnb.model import attention
from rlnb.model.folders import resolve
from rlnb.model.load import load_model
from rlnb.model.lora import LoRA, skeleton, target_layers, vllm_rank

MB = 2**20
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Prediction:
    """Bytes, but for the first two. These and vllm are exact; the sum of weights to logits is the peak."""

    parameters: int  # with the adapter's
    trainable: int
    adapter_file: int  # adapter_model.safetensors without its header of some kB
    weights: int
    gradients: int
    optimizer: int
    activations: int  # what the forward pass keeps for the backward pass
    logits: int  # float32 logits, log-softmax and gradient; with autocast 16-bit ones as well
    vllm: int  # set aside for adapters when the engine starts, whatever the adapter's rank
    vllm_short: int  # the formula that circulates, which is right for square layers only

    @property
    def peak(self) -> int:
        """What training needs in all, without vLLM: at the start of the backward pass."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def predict(
    model: str | os.PathLike[str] | Any, lora: LoRA | None = None, *, batch: int, length: int,
    dtype: str = "float32", autocast: bool = True, checkpointing: bool = False, max_lora_rank: int = 64,
) -> Prediction:  # fmt: skip
    """The memory that training with torch's Adam takes, for a decoder of Llama's kind. No weights are read.

    model: as ``load_model`` takes it, or a config of transformers. lora: None is full fine-tuning.
    batch: sequences per forward pass, of `length` tokens each, prompt and padding included.
    dtype: of the weights; an adapter is in float32. autocast: matrix products in bfloat16 (bf16=True).
    checkpointing: keep each layer's input alone, and compute the rest again in the backward pass.
    max_lora_rank: for vLLM, which takes the next of its own ranks. Raises ValueError for a config of no causal LM.
    """
    if dtype not in BYTES:
        raise ValueError(f"dtype is {dtype!r}: it must be one of {', '.join(BYTES)}")
    config = AutoConfig.from_pretrained(resolve(model)) if isinstance(model, str | os.PathLike) else model
    if (empty := skeleton(config)) is None:
        raise ValueError(f"{type(config).__name__} is the config of no causal LM of transformers")
    autocast = autocast and dtype == "float32"
    total = sum(parameter.numel() for parameter in empty.parameters())  # tied ones count once
    linear, layers = target_layers(empty, "all-linear"), target_layers(empty, lora.targets) if lora else {}
    added = lora.rank * _widths(layers) if lora else 0  # A is (rank, inputs), B is (outputs, rank)
    trainable, width = (added, 4) if lora else (total, BYTES[dtype])
    copies = 2 * sum(inputs * outputs for inputs, outputs in linear.values()) if autocast else 0
    ranks, heads = lora.rank * len(layers) if lora else 0, config.num_attention_heads
    saved = activations(config, ranks, autocast, checkpointing) * BYTES[dtype] // 4
    low = autocast or dtype != "float32"
    if not torch.cuda.is_available() and attention.is_plain(batch, heads, length, length, low):
        # the softmax in float32, and in 16 bits; fused attention keeps no weights
        saved += (1 if checkpointing else config.num_hidden_layers) * heads * length * 6
    served = vllm_rank(max_lora_rank)  # in 16 bits, on every linear layer, at the cost of the KV cache
    return Prediction(
        parameters=total + added, trainable=trainable, adapter_file=4 * added,
        weights=total * BYTES[dtype] + added * 4 + copies,
        gradients=trainable * width, optimizer=trainable * width * 2, activations=batch * length * saved,
        logits=batch * length * config.vocab_size * (16 if autocast else 12),
        vllm=2 * served * _widths(linear), vllm_short=2 * served * 2 * config.hidden_size * len(linear),
    )  # fmt: skip


def _widths(layers: dict[str, tuple[int, int]]) -> int:
    return sum(inputs + outputs for inputs, outputs in layers.values())


def activations(config: Any, ranks: int, autocast: bool, checkpointing: bool) -> int:
    """Bytes per token that the forward pass keeps for the backward pass, without the logits.

    A layer of width d, with q and k wide queries and keys and i in its MLP, keeps in float32: 5 d (the inputs
    of both norms and what goes into q_proj, o_proj and gate_proj), q + 2 k (attention), 4 i (gate, its SiLU,
    up, their product). Each adapter keeps the r numbers of A x. With autocast all but the norms' inputs has
    2 bytes, but each layer makes its own copy of what it reads in float32: 6 d instead of 3.
    ranks: the sum of the ranks of all adapted layers.
    """
    d, i, n = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or d // config.num_attention_heads
    q, k = head * config.num_attention_heads, head * config.num_key_value_heads
    layer = 4 * (5 * d + q + 2 * k + 4 * i)
    if autocast:
        layer = 4 * 2 * d + 2 * (6 * d + q + 2 * k + 4 * i)
    width = 2 if autocast else 4
    if checkpointing:  # every layer's input, and everything of the one that is at work
        return n * 4 * d + layer + width * ranks // n
    return n * layer + width * ranks


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
    model, _ = load_model(name, lora, dtype="float32", max_lora_rank=512)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(model.config.vocab_size, (batch, length), device=model.device)
    for _ in range(3):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
