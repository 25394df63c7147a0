"""What adapters cost in time on the practice model: python -m tests.benchmarks.adapters

Medians and least of the rounds, in milliseconds, on an idle machine; --cpu-time on a busy one. The
targets are 100 ms for attaching, checking and switching, and 2 s for merging with its checks.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from rlnb.model import LoRA, adapters, backend, load, load_model, lora, quiet, resolve, save_adapter
from rlnb.model.export import check_merge
from rlnb.task import problems

from transformers import AutoConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, not wall seconds")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    base, config = resolve("abacus-3m"), LoRA(rank=16)
    prompts = [problems.prompt(problem) for problem in problems.load("id")[:16]]
    with quiet(), tempfile.TemporaryDirectory() as root:
        model, tokenizer = load_model(base, config)
        saved = save_adapter(model, Path(root) / "saved")
        for name in ("one", "two"):
            adapters.add(model, name, saved)
        bare = iter([load_model(base)[0] for _ in range(options.rounds + 1)])
        settings = {"use_gradient_checkpointing": False, "random_state": 0}
        numbers = iter(range(10**6))

        def check() -> None:
            layers = lora.target_layers(lora.skeleton(AutoConfig.from_pretrained(base)), config.targets)
            lora.check_rank(config.rank, 64, lora.smallest_width(layers))

        def attach() -> None:
            shape, _ = load._adapter(config, base, AutoConfig.from_pretrained(base), 64)
            load._attach(next(bare), shape, backend(), settings)

        def switch() -> None:
            with adapters.using(model, "one"):
                pass

        cases: dict[str, tuple[Callable[[], object], float]] = {
            "check, without weights": (check, 100),
            "check and attach a new adapter": (attach, 100),
            "switch, and back": (switch, 100),
            "merge and verify": (lambda: check_merge(model, tokenizer, prompts), 2000),
            "add a saved adapter": (lambda: adapters.add(model, f"more{next(numbers)}", saved), 100),
        }
        rows = []
        for name, (run, target) in cases.items():
            run()  # the first call imports
            taken = []
            for _ in range(options.rounds):
                start = clock()
                run()
                taken.append(1000 * (clock() - start))
            rows.append(f"{name:34}{median(taken):9.1f}{min(taken):9.1f}{target:9.0f}")
    print(f"{'ms':34}{'median':>9}{'least':>9}{'target':>9}", *rows, sep="\n")


if __name__ == "__main__":
    main()
