"""Predicted and measured memory of training the practice model: python -m tests.benchmarks.memory

Prints both columns and their ratio; exits with status 1 if a peak is off by more than 25 %.
"""

import argparse
import sys

from rlnb.measure.peak import try_out
from rlnb.model import memory
from rlnb.model.lora import MLP, LoRA

CASES = {
    "LoRA rank 16, bf16 autocast": (LoRA(), True),
    "LoRA rank 16, float32": (LoRA(), False),
    "LoRA rank 64, bf16 autocast": (LoRA(rank=64), True),
    "LoRA rank 16 on the MLP, float32": (LoRA(targets=MLP), False),
    "full fine-tuning, bf16 autocast": (None, True),
}


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
