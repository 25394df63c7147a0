"""What training with LoRA costs in memory, in bytes, predicted from a model's config alone."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig

from rlnb.model import attention
from rlnb.model.folders import resolve
from rlnb.model.lora import LoRA, check_positive_int, skeleton, target_layers, vllm_rank

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

    @property
    def peak(self) -> int:
        """What training needs in all, without vLLM: at the start of the backward pass."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def predict(
    model: str | os.PathLike[str] | Any, lora: LoRA | None = None, *, batch: int, length: int,
    dtype: str = "float32", autocast: bool = True, checkpointing: bool = False, max_lora_rank: int = 64,
    load_in_4bit: bool = False,
) -> Prediction:  # fmt: skip
    """The memory that training with torch's Adam takes, for a decoder of Llama's kind. No weights are read.

    model: as ``load_model`` takes it, or a config. lora: None is full fine-tuning.
    batch: sequences per forward pass, of `length` tokens each, prompt and padding included.
    dtype: of the weights; an adapter is in float32. autocast: matrix products in bfloat16 (bf16=True).
    checkpointing: keep each layer's input alone, and compute the rest again in the backward pass.
    max_lora_rank: for vLLM, which takes the next of its own ranks. load_in_4bit: all linear layers but the output
        layer, at 4.13 bits a weight (QLoRA's double quantization). Raises ValueError for a config of no causal LM.
    """
    if dtype not in BYTES:
        raise ValueError(f"dtype is {dtype!r}: it must be one of {', '.join(BYTES)}")
    check_positive_int("batch", batch)
    check_positive_int("length", length)
    config = AutoConfig.from_pretrained(resolve(model)) if isinstance(model, str | os.PathLike) else model
    empty, autocast = skeleton(config), autocast and dtype == "float32"
    total = sum(parameter.numel() for parameter in empty.parameters())  # tied ones count once
    linear, layers = target_layers(empty, "all-linear"), target_layers(empty, lora.targets) if lora else {}
    added = lora.rank * _widths(layers) if lora else 0  # A is (rank, inputs), B is (outputs, rank)
    quantized = sum(inputs * outputs for inputs, outputs in linear.values()) if load_in_4bit else 0
    trainable, width = (added, 4) if lora else (total, BYTES[dtype])
    copies = 2 * sum(inputs * outputs for inputs, outputs in linear.values()) if autocast else 0
    ranks, heads = lora.rank * len(layers) if lora else 0, config.num_attention_heads
    saved = activations(config, ranks, autocast, checkpointing) * BYTES[dtype] // 4
    low = autocast or dtype != "float32"
    if not torch.cuda.is_available() and attention.is_plain(batch, heads, length, length, low):
        # the softmax in float32, and in 16 bits; fused attention keeps no weights
        saved += (1 if checkpointing else config.num_hidden_layers) * heads * length * 6
    return Prediction(
        parameters=total + added, trainable=trainable, adapter_file=4 * added,
        weights=(total - quantized) * BYTES[dtype] + int(quantized * 4.127 / 8) + added * 4 + copies,
        gradients=trainable * width, optimizer=trainable * width * 2, activations=batch * length * saved,
        logits=batch * length * config.vocab_size * (16 if autocast else 12),
        vllm=2 * vllm_rank(max_lora_rank) * _widths(linear),  # in 16 bits, on every linear layer
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
