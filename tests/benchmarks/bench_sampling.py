"""How fast sampling is, against transformers' generate in one process, and what each part saves.

    python -m tests.benchmarks.bench_sampling                           # on an idle machine
    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_sampling --cpu-time   # on a busy one

Rounds are interleaved, so that a noisy machine is noisy for all. Tokens are those of completions,
the end token included; seconds are the least of the rounds and their median, ratios of the least.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from rlnb.model import LoRA, decode_cpu, load_model, sampling
from rlnb.task import problems

import torch

CASES = {  # prompts, completions of each, temperature
    "GRPO rollout": (8, 8, 1.0),
    "pass@32": (16, 32, 1.0),
    "greedy accuracy": (256, 1, 0),
}
WITHOUT = {
    "without merging LoRA": ("lora_layers", lambda model: {}),
    "without sharing the cache of heads": ("attention", SimpleNamespace(use=lambda model: None)),
    "without leaving the batch": ("COMPACT", 0),
    "with all prompts read at once": ("READ_AT_ONCE", 256),
}


def by_generate(model: Any, tokenizer: Any, prompts: list, n: int, temperature: float) -> list:
    """transformers' generate as TRL calls it: a row per completion, in batches of 256."""
    rows = [ids for ids in sampling.tokenize(tokenizer, prompts) for _ in range(n)]
    settings = sampling._settings(model, tokenizer, 64, temperature, 1.0, seed=0)
    with torch.inference_mode():
        return sampling._generate(model, rows, settings, lambda _: None)


def by_sample(model: Any, tokenizer: Any, prompts: list, n: int, temperature: float) -> list:
    found = sampling.sample(model, tokenizer, prompts, n, temperature=temperature, progress=False)
    return [ids for group in found.ids for ids in group]


def ways(*arguments: Any) -> dict[str, Callable[[], list]]:
    def ablated(name: str, value: Any) -> list:
        with patch.object(decode_cpu, name, value):
            return by_sample(*arguments)

    found = {"generate": lambda: by_generate(*arguments), "rlnb": lambda: by_sample(*arguments)}
    for label, (name, value) in WITHOUT.items():
        found[label] = lambda name=name, value=value: ablated(name, value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, not wall seconds")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    model, tokenizer = load_model("abacus-3m", LoRA(rank=16))
    model.eval()
    test = problems.load("id")
    for case, (count, n, temperature) in CASES.items():
        prompts = [problems.prompt(problem) for problem in test[:count]]
        chosen = ways(model, tokenizer, prompts, n, temperature)
        seconds, tokens = {way: [] for way in chosen}, {}
        for _ in range(options.rounds):
            for way, run in chosen.items():
                start = clock()
                completions = run()
                seconds[way].append(clock() - start)
                tokens[way] = sum(map(len, completions))
        print(f"\n{case}: {count} prompts x {n}, {tokens['rlnb'] / (count * n):.0f} tokens each")
        slowest = tokens["generate"] / min(seconds["generate"])
        for way, taken in seconds.items():
            speed = tokens[way] / min(taken)
            print(
                f"  {way:36}{speed:7,.0f} tokens/s   {speed / slowest:5.2f} x generate"
                f"   {min(taken):6.2f} s (median {median(taken):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
