"""Plain matrix products against PyTorch's fused attention on a CPU: python -m tests.benchmarks.bench_attention

Milliseconds of a layer of the practice model, forwards and backwards, the least of the rounds; rounds
are interleaved. The last column is fused over plain.
"""

import time

from rlnb.model import attention

import torch
from transformers.integrations.sdpa_attention import repeat_kv

HEADS, SHARED, SIZE = 4, 2, 64
CASES = ((16, 110), (32, 110), (64, 140), (64, 200))  # rows, length
ROUNDS = 20


def fused(query, key, value, mask):
    groups = HEADS // SHARED
    return torch.nn.functional.scaled_dot_product_attention(
        query, repeat_kv(key, groups), repeat_kv(value, groups), attn_mask=mask
    ).transpose(1, 2)


def seconds(way, tensors, mask) -> float:
    began = time.perf_counter()
    way(*tensors, mask).contiguous().sum().backward()
    return time.perf_counter() - began


def main() -> None:
    print("rows  length  type         fused   plain  ratio")
    for rows, length in CASES:
        for dtype in (torch.bfloat16, torch.float32):
            shapes = [(rows, heads, length, SIZE) for heads in (HEADS, SHARED, SHARED)]
            tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
            mask = torch.ones(rows, 1, length, length, dtype=torch.bool).tril()
            spent = {fused: [], attention.plain: []}
            for _ in range(ROUNDS):
                for way, times in spent.items():
                    times.append(1000 * seconds(way, tensors, mask))
            a, b = (min(times) for times in spent.values())
            name = str(dtype).removeprefix("torch.")
            print(f"{rows:4}{length:8}  {name:9}{a:9.1f}{b:8.1f}{a / b:7.2f}", flush=True)


if __name__ == "__main__":
    main()
