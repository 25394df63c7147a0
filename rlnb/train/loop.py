"""The one training loop around a trainer: what a notebook's cell, the command line, the panel and the
experiments all call.

    trainer = DPOTrainer(model=model, args=args, train_dataset=pairs, processing_class=tokenizer)
    run = fit("dpo", trainer, pairs, start=sft_run)
"""

import hashlib
import inspect
import json
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import Any

from rlnb import machine
from rlnb.measure import evaluate
from rlnb.model.folders import base_name, load_weights, save_adapter, weights
from rlnb.record import progress, runs
from rlnb.record.values import jsonable, number
from rlnb.task.problems import Problem
from rlnb.task.rewards import checked
from rlnb.train import preflight

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

TRIM = 0.5  # seconds: how often at most a training gives freed memory back
SAVE = 60.0  # seconds between checkpoints
# What transformers' own arguments say of learning; the others are about folders, logs and devices.
SHARED = ("learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size",
          "gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay",
          "max_grad_norm", "bf16", "fp16")  # fmt: skip


def fit(
    method: str, trainer: Trainer, data: Any = None, *, start: runs.Run | str | Path | None = None,
    before: evaluate.Report | None = None, problems: Sequence[Problem] | None = None, check: bool = True,
    resume: runs.Run | str | None = None,
) -> runs.Run:  # fmt: skip
    """Check, train, save the adapter, measure, and keep a record of it all. Returns the run, done.

    method: the run's name in the registry. trainer: of TRL, or PPOTrainer, made but not yet trained.
    data: what it was given to learn from, default its train_dataset: to count rows that it left out.
    start: what its adapter came from; None: the base. before: the start's report, for the record.
    problems: to measure greedy answers on, default ``evaluate.held_out()``; () measures nothing. The
        report is in ``run.report``. check: False trains even what the checks refuse, to see why they do.
    resume: a run of the same settings and data that ended early, or its id: goes on from its newest
        checkpoint. One is written about every minute, and deleted when the run is done.

    Raises ValueError before anything is spent for what ``preflight.check`` finds, RewardError for a
    reward that is no number. Ctrl-C keeps what was learnt.
    """
    # 1. check
    if check:
        preflight.check(trainer, data)
    _guard_rewards(trainer)
    # 2. train
    model, checkpoint = trainer.model, None
    data = trainer.train_dataset if data is None else data
    asked = _asked(method, trainer, data, start)
    if resume is None:
        _offer(asked)
        record = runs.start(**asked, labels=0 if preflight.samples(trainer) else len(data))
    else:
        record, checkpoint = _resumed(asked, resume)
    with record as run:
        run.on_interrupt = lambda: _save(model, run)
        _train(trainer, run, checkpoint)
        # 3. save
        _save(model, run)
        # 4. measure
        problems = evaluate.held_out() if problems is None else problems
        if len(problems):
            run.report = evaluate.accuracy(model, trainer.processing_class, problems)
            started = {} if before is None else {"start": before.summary()}
            run.finish(**run.report.summary(), **started)
    return run


def _train(trainer: Trainer, run: runs.Run, checkpoint: Path | None) -> None:
    trainer.args.output_dir, trainer.args.save_total_limit = str(run.folder), trainer.args.save_total_limit or 1
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
    recorder = Recorder(run)
    trainer.add_callback(recorder)
    if checkpoint and hasattr(trainer.model, "peft_config"):
        # transformers 5.17 reads the adapters in folders below a checkpoint, such as DPO's "ref", and then leaves
        # out the policy's own, which lies in the checkpoint itself.
        load_weights(trainer.model, checkpoint, "default", trainable=True)
    with run.timer("train"):
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    trainer.remove_callback(recorder)
    if trainer.args.save_strategy == "no":  # else somebody asked for them
        for folder in run.folder.glob("checkpoint-*"):
            shutil.rmtree(folder)


# --- resuming ------------------------------------------------------------------------------------


def _asked(method: str, trainer: Trainer, data: Any, start: Any) -> dict[str, Any]:
    """What a run is known by, as ``runs.start`` takes it."""
    model = trainer.model
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    return dict(
        method=method, model=base_name(base.name_or_path), config=jsonable(settings(trainer, data)),
        seed=trainer.args.seed, parent=start.id if isinstance(start, runs.Run) else start and str(start),
    )  # fmt: skip


def _differs(run: runs.Run, asked: dict[str, Any]) -> str:
    """The first thing in which a run is another one; "" where it is the same."""
    mine = asked | asked["config"]
    return next((f"{name} is {value!r:.60} here and {run.get(name)!r:.60} in {run.id}" for name, value in mine.items()
                 if name != "config" and run.get(name) != value), "")  # fmt: skip


def _offer(asked: dict[str, Any]) -> None:
    """Say so if the same training once ended early and left a checkpoint."""
    for run in runs.find(method=asked["method"], model=asked["model"], seed=asked["seed"]):
        if run.status in ("lost", "interrupted", "failed") and run.checkpoint and not _differs(run, asked):
            step = run.checkpoint.name.rpartition("-")[2]
            print(f"Run {run.id} ended early: fit(..., resume={run.id!r}) goes on from its step {step}.")
            return


def _resumed(asked: dict[str, Any], run: runs.Run | str) -> tuple[AbstractContextManager, Path]:
    run = runs.load(run) if isinstance(run, str) else run
    if run.checkpoint is None:
        raise ValueError(f"run {run.id} is {run.status} and has no checkpoint to go on from: train anew")
    if other := _differs(run, asked):
        raise ValueError(f"this is not the training that {run.id} began: {other}")
    return runs.go_on(run, int(run.checkpoint.name.rpartition("-")[2])), run.checkpoint


def _guard_rewards(trainer: Trainer) -> None:
    """Let no NaN into a training unseen. PPOTrainer guards its own; of None for all, TRL's trainers learn nothing."""
    rewards = getattr(trainer, "reward_funcs", [])
    for i, reward in enumerate(rewards):
        if not isinstance(reward, torch.nn.Module) and not inspect.iscoroutinefunction(reward):
            rewards[i] = checked(reward)


def settings(trainer: Trainer, data: Any) -> dict[str, Any]:
    """What a trainer really uses, in its library's names; of the adapter rank, alpha and targets."""
    args, model = trainer.args, trainer.model
    own = {f.name for f in fields(args)} - {f.name for f in fields(TrainingArguments)}
    found = {name: getattr(args, name) for name in (*SHARED, *sorted(own))}
    if hasattr(trainer, "micro_batch_size"):  # PPOTrainer hands transformers' loop whole batches
        given = trainer.micro_batch_size, args.per_device_train_batch_size // trainer.micro_batch_size
        found["per_device_train_batch_size"], found["gradient_accumulation_steps"] = given
    if adapter := getattr(model, "peft_config", {}).get("default"):
        targets = adapter.target_modules
        targets = targets if isinstance(targets, str) else sorted(targets)
        found |= {"rank": adapter.r, "alpha": adapter.lora_alpha, "targets": targets}
    rewards = getattr(trainer, "reward_func_names", getattr(trainer, "reward_names", None))
    if rewards and args.reward_weights:  # others are only watched
        rewards = [name for name, weight in zip(rewards, args.reward_weights, strict=True) if weight]
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    return found | {"rewards": rewards, "data": fingerprint(data), "weights": weights(base.name_or_path)}


def fingerprint(data: Any) -> str | None:
    """Sixteen characters that differ where the rows do; None for data that is read as it comes."""
    if not hasattr(data, "__len__"):
        return None
    digest = hashlib.sha256()
    for row in data:
        digest.update(json.dumps(jsonable(row), sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _save(model: Any, run: runs.Run) -> None:
    """Save what was learnt in the run's folder."""
    if hasattr(model, "peft_config"):
        save_adapter(model, run.adapter)
    else:
        type(model).save_pretrained(model, run.folder / "model")


class Recorder(TrainerCallback):
    """Puts what is logged into the run's curve and on the screen, and lets the screen stop a training."""

    def __init__(self, run: runs.Run):
        self.run, self.screen = run, progress.current_screen()
        self.rows = [row for row in run.curve() if progress.metrics(row)]  # of a run that goes on
        self.began = self.trimmed = self.saved = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter() - (self.rows[-1]["seconds"] if self.rows else 0.0)
        self.screen.begin(state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        numbers = {k: plain for k, v in (logs or {}).items() if (plain := number(v)) is not None}
        self.run.log(state.global_step, **numbers)
        if progress.metrics(numbers):
            spent = time.perf_counter() - self.began
            self.rows.append({"step": state.global_step, "seconds": spent, **numbers})
            self.screen.show(self.rows, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        if time.perf_counter() - self.trimmed > TRIM:  # else a run's memory grows step by step
            machine.trim()
            self.trimmed = time.perf_counter()
        if time.perf_counter() - self.saved > SAVE:
            control.should_save, self.saved = True, time.perf_counter()
        control.should_training_stop |= self.screen.stopping
        control.should_save |= self.screen.stopping

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.screen.end(self.rows, state.max_steps)
        if self.screen.stopping and state.global_step < state.max_steps:
            raise progress.Stopped(f"stopped at step {state.global_step} of {state.max_steps}")
