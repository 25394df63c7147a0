"""PPO here against the PPOTrainer that TRL had until 1.12: seconds a step and growth of memory.

    python -m tests.benchmarks.ppo_trl                        # five minutes on an idle machine
    python -m tests.benchmarks.ppo_trl --dtype float32        # the same without autocast
    python -m tests.benchmarks.ppo_trl --at-once 16           # four pieces of 16 sequences

TRL 1.12 gets an environment of its own, .venv-trl112, with the torch, transformers and PEFT of this
one. The two run in turn, each time in a new process, on the same work: the practice model with LoRA
of rank 16, the same 64 prompts every step, 48 new tokens each, 4 epochs of one mini-batch, bfloat16
autocast, one reward model. Writes a row per process to data/results/ppo_trl.csv; exits with status 1
if a target is missed. A step's seconds are the time between the ends of two steps, the first of a
process left out. Growth is the peak of resident memory less what the process had after its imports.

What is made equal: ours has no end token, TRL's no stop token, so that each of the 64 x 48 tokens is
drawn and trained on. The reward model is one LoRA adapter with a score head: we take its folder, TRL
the merged model, as it reads `.score` off a plain one. TRL gets ref_model=None, with which it turns
the adapter off. Its own mixed precision is set through accelerate's environment variable: with
transformers 5 bf16=True does not reach its Accelerator.

What is not: TRL requires a value model, a second whole network, and trains all of it; ours is a head
on the policy. TRL pads all prompts to the longest, we sort
by length. TRL takes the old log-probabilities from generation, we compute them again, with values
and entropies. TRL's loop computes the metrics that it logs, we compute ours.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rlnb import files, machine
from rlnb.data import shapes
from rlnb.model import LoRA, load_model, memory, reward_model
from rlnb.task import problems
from rlnb.tools import setup as bootstrap
from tests.benchmarks import memory as peak

import pandas as pd

ROOT = Path(__file__).parents[2]
VENV, OUT = ROOT / ".venv-trl112", ROOT / "data" / "results" / "ppo_trl.csv"
SAME = ("torch", "transformers", "peft", "datasets", "accelerate", "tokenizers", "safetensors",
        "numpy", "psutil")  # fmt: skip
MODEL, EPISODES, TOKENS, EPOCHS = "abacus-3m", 64, 48, 4
TARGETS = {"step_seconds": 1 / 3, "growth_mb": 0.6}  # ours as a part of TRL's, at most


# --- what both train -----------------------------------------------------------------------------


def settings(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Arguments that both trainers know by the same name."""
    return {
        "output_dir": folder, "per_device_train_batch_size": options.at_once,
        "gradient_accumulation_steps": EPISODES // options.at_once, "num_ppo_epochs": EPOCHS,
        "num_mini_batches": 1, "learning_rate": 3e-5, "temperature": 1.0, "kl_coef": 0.05,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "use_cpu": True, "bf16": options.dtype == "bfloat16", "gradient_checkpointing": False, "seed": 0,
    }  # fmt: skip


def make_reward_adapter(folder: Path) -> None:
    """A reward adapter of random weights: what it says does not matter here, what it costs does."""
    model, _ = reward_model.load(MODEL, LoRA(rank=16))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    model.save_pretrained(folder)


def ours(options: argparse.Namespace, folder: str, clock: Any) -> tuple[Any, Any]:
    """The trainer, and a function that says how many tokens a step drew."""
    from rlnb.train import ppo

    model, tokenizer = load_model(MODEL, LoRA(rank=16))
    tokenizer.eos_token = model.generation_config.eos_token_id = None
    args = ppo.PPOConfig(
        **settings(options, folder), max_completion_length=TOKENS, max_steps=options.steps,
    )  # fmt: skip
    trainer = ppo.PPOTrainer(
        model, args, options.reward, shapes.prompts(problems.load("train")[:EPISODES]), tokenizer,
        callbacks=[clock],
    )  # fmt: skip

    def drawn() -> float:
        rows = [row for row in trainer.state.log_history if "loss" in row]
        return max(EPISODES * row["completions/mean_length"] for row in rows)

    return trainer, drawn


def theirs(options: argparse.Namespace, folder: str, clock: Any) -> tuple[Any, Any]:
    """The same of TRL 1.12."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    sizes, generate = [], ppo_trainer.batch_generation

    def counted(model: Any, queries: Any, *rest: Any) -> Any:
        found = generate(model, queries, *rest)
        sizes.append(len(queries) * (found[0].shape[1] - queries.shape[1]))
        return found

    ppo_trainer.batch_generation = counted
    model, tokenizer = load_model(MODEL, LoRA(rank=16))
    reward, value = (reward_model.load(MODEL, options.reward)[0].merge_and_unload() for _ in "rv")
    args = PPOConfig(
        **settings(options, folder), response_length=TOKENS, total_episodes=options.steps * EPISODES,
        num_sample_generations=0,
    )  # fmt: skip
    rows = shapes.prompts(problems.load("train")[:EPISODES])
    rows = rows.map(
        lambda row: tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=True
        ),
        remove_columns=rows.column_names,
    )
    trainer = PPOTrainer(
        args, tokenizer, model, ref_model=None, reward_model=reward, train_dataset=rows,
        value_model=value.requires_grad_(True), callbacks=[clock],
    )  # fmt: skip
    if trainer.accelerator.mixed_precision != ("bf16" if args.bf16 else "no"):
        raise RuntimeError(f"TRL trains with {trainer.accelerator.mixed_precision!r}, not as asked")
    return trainer, lambda: max(sizes)


def warm_up() -> None:
    """The first step of all imports half of torch, and the first model half of transformers."""
    import torch
    reward_model.load(MODEL, LoRA(rank=1))
    model, _ = load_model(MODEL, LoRA(rank=1))
    model(input_ids=torch.ones(1, 2, dtype=torch.long)).logits.sum().backward()
    torch.optim.AdamW(model.parameters()).step()


MAKES = {"ours": (ours, "rlnb.train.ppo"), "TRL": (theirs, "trl.experimental.ppo")}


# --- one process ---------------------------------------------------------------------------------


def child(options: argparse.Namespace) -> None:
    """Trains, and prints what was measured as JSON."""
    import torch
    from transformers import TrainerCallback

    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.process_time() if options.cpu_time else time.perf_counter())

    make, module = MAKES[options.child]
    import_module(module)
    warm_up()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        drawn = []

        def work() -> None:
            trainer, tokens = make(options, folder, Clock())
            trainer.train()
            drawn.append(tokens())

        found = peak.measure(work)
    print(json.dumps({
        "step_seconds": [b - a for a, b in pairwise(ends)],
        "growth_mb": found.ram / memory.MB, "tokens": drawn[0],
        "threads": torch.get_num_threads(), **{name: version(name) for name in SAME[:4]},
    }))  # fmt: skip


# --- all of them ---------------------------------------------------------------------------------


def environment() -> Path:
    """The interpreter of TRL 1.12's environment, which is made if it is not there."""
    pins = [f"{name}=={version(name).partition('+')[0]}" for name in SAME] + ["trl==1.12.0"]
    python, stamp = bootstrap.interpreter(VENV), VENV / "pins.txt"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8").split() != pins:
        print(f"Making {VENV.name}; this takes minutes the first time.", flush=True)
        shutil.rmtree(VENV, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *pins], check=True)
        files.write(stamp, "\n".join(pins) + "\n")
    return python


def measure(which: str, python: Path | str, arguments: list[str], dtype: str) -> dict[str, Any]:
    """What one process found."""
    own = {
        "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "ACCELERATE_MIXED_PRECISION": "bf16" if dtype == "bfloat16" else "no",
    }  # fmt: skip
    done = subprocess.run(
        [str(python), "-m", "tests.benchmarks.ppo_trl", "--child", which, *arguments],
        cwd=ROOT, env=os.environ | own, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{which} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(rows: list[dict[str, Any]], steps: dict[str, list[float]]) -> bool:
    """Prints the figures and the ratios. Whether both targets are met."""
    found = {
        "step_seconds": {which: median(values) for which, values in steps.items()},
        "growth_mb": {w: median(r["growth_mb"] for r in rows if r["trainer"] == w) for w in steps},
    }
    met = True
    for name, of in found.items():
        ratio = of["ours"] / of["TRL"]
        met &= ratio <= TARGETS[name]
        print(f"{name:14} ours {of['ours']:9.2f}   TRL 1.12 {of['TRL']:9.2f}   "
              f"ratio {ratio:.3f} (target: {TARGETS[name]:.3f} at most)")  # fmt: skip
    return met


def sentence(rows: list[dict[str, Any]]) -> str:
    """What the README says of them: medians of the rounds."""
    def middle(which: str, name: str) -> float:
        return median(float(row[name]) for row in rows if row["trainer"] == which)

    (time, theirs), (grown, more) = (
        [middle(which, name) for which in ("ours", "TRL")] for name in ("step_seconds", "growth_mb")
    )
    return (
        f"On the same work a step of PPO takes {time:.1f} s here and {theirs:.1f} s in TRL 1.12, the last "
        f"that had it, and memory grows by {grown:,.0f} MB instead of {more:,.0f} MB."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="in each process, one to warm up")
    parser.add_argument(
        "--at-once", type=int, default=EPISODES, help="sequences in one forward pass"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, for a busy machine")
    parser.add_argument("--no-write", action="store_true", help="leave the table as it is")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--reward", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    pythons = {"ours": sys.executable, "TRL": environment()}
    rows, steps = [], {which: [] for which in pythons}
    with tempfile.TemporaryDirectory() as folder:
        make_reward_adapter(Path(folder) / "judge")
        arguments = ["--reward", str(Path(folder) / "judge")]
        arguments += ["--cpu-time"] * options.cpu_time
        for name in ("steps", "at_once", "dtype"):
            arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        for turn in range(options.rounds):
            for which, python in pythons.items():
                found = measure(which, python, arguments, options.dtype)
                steps[which] += (times := found.pop("step_seconds"))
                rows.append({"trainer": which, "round": turn, "step_seconds": round(median(times), 3),
                             "growth_mb": round(found.pop("growth_mb"), 1), "dtype": options.dtype,
                             "at_once": options.at_once, "cpus": machine.describe()["cpus"],
                             **found})  # fmt: skip
                print(rows[-1], flush=True)
    met = report(rows, steps)
    if not options.no_write:
        files.write(OUT, pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))
    sys.exit(not met)


if __name__ == "__main__":
    main()
