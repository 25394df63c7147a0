"""Speed and memory on a GPU: TRL + PEFT alone, with Unsloth, and with Unsloth and vLLM.

    python tests/gpu/bench_gpu.py [--repeats 3] [--steps 12]

The model has the shape of Qwen2.5-0.5B and random weights, made on the spot. Every backend runs in a
process of its own on the same batches, lengths and steps, and the backends take turns. The rows go to
data/results/gpu/speed.csv, one per process.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib import metadata, util
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
TABLE = ROOT / "data" / "results" / "gpu" / "speed.csv"
BACKENDS = ("trl+peft", "unsloth", "unsloth+vllm")
PACKAGES = ("torch", "transformers", "trl", "peft", "unsloth", "vllm")
SHAPE = {  # Qwen2.5-0.5B
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
RANK = 32
WARM_UP = 2  # steps that are not counted: compilation, the allocator's first blocks
SFT = {"batch": 16, "length": 512}  # sequences per step, tokens of each
GRPO = {"batch": 64, "length": 256}  # completions per step in groups of 8, new tokens of each


def make_model(folder: Path) -> None:
    """A Qwen2 of SHAPE with random weights in bfloat16, and the tests' tokenizer."""
    import tiny
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokens = tiny.tokenizer()
    ends = {"eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True, **ends))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokens.save_pretrained(folder)


def measure(backend: str, method: str, folder: str, steps: int) -> dict:
    """Train one backend here: median seconds per step, peak bytes that torch held, the last loss."""
    if backend == "trl+peft":
        sys.modules["unsloth"] = None  # as if it were not installed: rlnb takes its plain path
    from rlnb.model import LoRA, load_model

    lora = LoRA(rank=RANK, alpha=RANK)
    vllm = backend == "unsloth+vllm"
    model, tokenizer = load_model(folder, lora, fast_inference=vllm, max_lora_rank=RANK)
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        ends: list[float] = []  # noqa: RUF012  one clock per process

        def on_step_end(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    trainer = (_sft if method == "sft" else _grpo)(model, tokenizer, steps)
    trainer.add_callback(Clock())
    trainer.train()
    took = [after - before for before, after in zip(Clock.ends, Clock.ends[1:], strict=False)]
    return {
        "seconds_per_step": statistics.median(took[WARM_UP - 1 :]),
        "peak_memory_bytes": torch.cuda.max_memory_reserved(),
        "loss": next(r["loss"] for r in reversed(trainer.state.log_history) if "loss" in r),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _arguments(batch: int, steps: int) -> dict:
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "optim": "adamw_torch",
        "bf16": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def _sft(model, tokenizer, steps: int):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [  # random ids, all of the same length: no padding in any backend
        {"input_ids": [4 + (7 * i + j * j) % 300 for j in range(SFT["length"])]}
        for i in range(SFT["batch"] * steps)
    ]
    config = SFTConfig(
        **_arguments(SFT["batch"], steps), max_length=SFT["length"], packing=False, loss_type="nll"
    )
    data = Dataset.from_list(rows)
    return SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer)


def _grpo(model, tokenizer, steps: int):
    from trl import GRPOConfig, GRPOTrainer

    from rlnb.data import shapes
    from rlnb.task import problems

    config = GRPOConfig(
        **_arguments(GRPO["batch"], steps),
        num_generations=8,
        max_completion_length=GRPO["length"],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        loss_type="dapo",
        scale_rewards="group",
    )
    return GRPOTrainer(
        model,
        reward_funcs=lambda completion_ids, **_: [float(ids[0] % 7) for ids in completion_ids],
        args=config,
        train_dataset=shapes.prompts(problems.generate("train", 8 * steps)),
        processing_class=tokenizer,
    )


def run_backend(backend: str, method: str, folder: Path, steps: int) -> dict:
    """``measure`` in a process of its own, which prints the row as its only line of JSON."""
    command = [sys.executable, __file__, "--backend", backend, "--method", method, "--model", str(folder)]
    done = subprocess.run([*command, "--steps", str(steps)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{backend} {method} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"')))


def compare(repeats: int, steps: int) -> list[dict]:
    """One row per repeat, method and backend; the backends take turns."""
    have_vllm = util.find_spec("vllm") is not None
    versions = {name: metadata.version(name) for name in PACKAGES if util.find_spec(name)}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for repeat in range(repeats):
            for method, size in (("sft", SFT), ("grpo", GRPO)):
                for backend in BACKENDS[: 3 if have_vllm and method == "grpo" else 2]:
                    row = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "repeat": repeat}
                    row |= {"method": method, "backend": backend, **size, "rank": RANK, "steps": steps}
                    row |= run_backend(backend, method, Path(folder), steps)
                    rows.append(row | {name: versions.get(name, "") for name in PACKAGES})
                    print(f"{method} {backend}: {row['seconds_per_step']:.3f} s a step", flush=True)
    return rows


def show(rows: list[dict]) -> None:
    """A table of medians, with the ratio to TRL + PEFT and the range over the repeats."""
    print(f"\n{'method':8}{'backend':14}{'s/step':>8}{'range':>16}{'ratio':>7}{'peak GiB':>10}")
    for method in ("sft", "grpo"):
        plain = None
        for backend in BACKENDS:
            mine = [row for row in rows if (row["method"], row["backend"]) == (method, backend)]
            if not mine:
                continue
            times = [row["seconds_per_step"] for row in mine]
            median = statistics.median(times)
            plain = plain or median
            peak = max(row["peak_memory_bytes"] for row in mine) / 2**30
            spread = f"{min(times):.3f}-{max(times):.3f}"
            print(f"{method:8}{backend:14}{median:8.3f}{spread:>16}{median / plain:7.2f}{peak:10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    for hidden in ("--backend", "--method", "--model"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.backend:
        row = measure(options.backend, options.method, options.model, options.steps)
        print(json.dumps(row))
        return
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("bench_gpu needs a CUDA device, and there is none here")
    rows = compare(options.repeats, options.steps)
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    partial = TABLE.with_suffix(".tmp")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(TABLE)
    show(rows)
    print(f"\n{len(rows)} rows in {TABLE}")


if __name__ == "__main__":
    main()
