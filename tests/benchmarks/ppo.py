"""What a step of PPO costs on the practice model.

    python -m tests.benchmarks.ppo                            # on an idle machine
    OMP_NUM_THREADS=1 python -m tests.benchmarks.ppo --cpu-time   # on a busy one
    python -m tests.benchmarks.ppo --profile                  # the operations that take most time

A step is 64 rollouts of at most 64 tokens and 4 epochs on them, LoRA of rank 16, bfloat16 autocast.
Rounds are interleaved, so that a noisy machine is noisy for all; seconds are the least of the rounds.
"""

import argparse
import tempfile
import time
from statistics import mean

from rlnb.data import shapes
from rlnb.model import LoRA, load_model
from rlnb.task import problems, rewards
from rlnb.train import ppo

import torch

WAYS = {  # changes of the usual settings
    "usual": {},
    "float32": {"bf16": False},
    "pieces of 32": {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 2},
    "pieces of 16": {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4},
    "pieces of 8": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 8},
    "4 mini-batches": {"num_mini_batches": 4},
}


def trainer(steps: int, **settings: object) -> ppo.PPOTrainer:
    usual = {
        "per_device_train_batch_size": 64, "max_completion_length": 64, "learning_rate": 1e-3,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": True,
        "disable_tqdm": True, "lr_scheduler_type": "linear", "warmup_steps": min(5, steps // 4),
    }  # fmt: skip
    model, tokenizer = load_model("abacus-3m", lora=LoRA(rank=16))
    return ppo.PPOTrainer(
        model,
        ppo.PPOConfig(tempfile.mkdtemp(), max_steps=steps, **usual | settings),
        [rewards.correctness, rewards.format_reward],
        shapes.prompts(problems.load("train")),
        tokenizer,
    )


def cost(rounds: int, chosen: dict[str, dict]) -> None:
    """Seconds of a step for each way, least of the rounds; the first step of each warms up."""
    seconds = {way: [] for way in chosen}
    for _ in range(rounds):
        for way, settings in chosen.items():
            run = trainer(3, **settings)
            run.train()
            rows = [row for row in run.state.log_history if "loss" in row][1:]
            seconds[way] += [row["step_time"] for row in rows]
            tokens = mean(row["completions/mean_length"] for row in rows)
    print(f"{'':28}{'step':>11}   ({tokens:.0f} tokens each)")
    for way, found in seconds.items():
        print(f"{way:28}{min(found):11.2f}", flush=True)


def profile() -> None:
    run = trainer(3)
    run.train()
    rows = [run.train_dataset[i] for i in range(64)]
    batch = run._roll_out(rows)
    run._score(batch, rows)
    pieces = list(batch.length_B.argsort().split(run.micro_batch_size))
    with torch.profiler.profile() as found:
        run._measure(batch, pieces)
        run._estimate_advantages(batch)
        run._backward(run.actor_critic, batch, pieces)
    print(
        found.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="some of the ways, by their names")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, not wall seconds")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    if options.cpu_time:
        ppo.trainer.time.perf_counter = time.process_time
    if options.profile:
        profile()
    else:
        cost(
            options.rounds, {w: s for w, s in WAYS.items() if not options.only or w in options.only}
        )


if __name__ == "__main__":
    main()
