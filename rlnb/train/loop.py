"""The one training loop around a trainer: what a notebook's cell, the command line, the panel and the
experiments all call.

    trainer = DPOTrainer(model=model, args=args, train_dataset=pairs, processing_class=tokenizer)
    run = fit("dpo", trainer, pairs, start=sft_run)
"""

import hashlib
import inspect
import json
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from rlnb import machine
from rlnb.measure import evaluate
from rlnb.model.folders import base_name, load_weights, save_adapter, weights
from rlnb.record import progress, runs
from rlnb.record.values import jsonable, number
from rlnb.task.problems import Problem
from rlnb.task.rewards import RewardError, checked
from rlnb.train import preflight

import torch
from peft.helpers import disable_input_dtype_casting
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

LARGE = 50_000_000  # parameters, from which on a CPU's training keeps large blocks of memory
TRIM, TRIM_LARGE = 0.5, 20.0  # seconds: how often at most a training gives freed memory back
SAVE = 60.0  # seconds between checkpoints
ALL_CUT = 10  # steps in a row without one completion that ended, after which a training is given up
# What transformers' own arguments say of learning; the others are about folders, logs and devices.
SHARED = ("learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size",
          "gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay",
          "max_grad_norm", "bf16", "fp16")  # fmt: skip


def fit(
    method: str, trainer: Trainer, data: Any = None, *, start: runs.Run | str | Path | None = None,
    before: evaluate.Report | None = None, problems: Sequence[Problem] | None = None, check: bool = True,
    resume: runs.Run | str | bool = False,
) -> runs.Run:  # fmt: skip
    """Check, train, save the adapter, measure, and keep a record of it all. Returns the run, done.

    method: the run's name in the registry. trainer: of TRL, or PPOTrainer, made but not yet trained.
    data: what it was given to learn from, default its train_dataset: to count rows that it left out.
    start: what its adapter came from; None: the base. before: the start's report, for the record.
    problems: to measure greedy answers on, default ``evaluate.held_out()``; () measures nothing. The
        report is in ``run.report``. check: False trains even what the checks refuse, to see why they do.
    resume: a run of the same settings and data that ended early, or its id: goes on from its newest
        checkpoint. One is written about every minute, and deleted when the run is done. True: the newest run of
        this very training goes on, and if it is done it is returned, with its weights in the model.

    Raises ValueError before anything is spent for what ``preflight.check`` finds, RewardError for a
    reward that is no number. Ctrl-C, and what else asks the process to end, keeps what was learnt.
    """
    # 1. check
    if check:
        preflight.check(trainer, data)
    _guard_rewards(trainer)
    # 2. train
    model = trainer.model
    data = trainer.train_dataset if data is None else data
    asked = _asked(method, trainer, data, start)
    earlier = _earlier(asked)
    if resume is True and earlier and earlier.status == "done":
        load_weights(model, earlier.adapter, "default", trainable=True)
        return earlier
    labels = 0 if preflight.samples(trainer) else len(data)
    record, checkpoint = _record(asked, labels, earlier, resume)
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
    large = trainer.model.device.type == "cpu" and trainer.model.num_parameters() > LARGE
    trainer.add_callback(recorder := Recorder(run, TRIM_LARGE if large else TRIM))
    if checkpoint and hasattr(trainer.model, "peft_config"):
        # transformers 5.17 reads the adapters in folders below a checkpoint, such as DPO's "ref", and then leaves
        # out the policy's own, which lies in the checkpoint itself.
        load_weights(trainer.model, checkpoint, "default", trainable=True)
    # Autocast casts what LoRA reads, and PEFT need not. A base in 16 bits is also sampled from without autocast.
    low = (trainer.args.bf16 or trainer.args.fp16) and trainer.model.dtype == torch.float32
    memory = machine.hold() if large else nullcontext()
    with run.timer("train"), _ended_by_signals(), memory, disable_input_dtype_casting(trainer.model, low):
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    trainer.remove_callback(recorder)
    if trainer.args.save_strategy == "no":  # else somebody asked for them
        for folder in run.folder.glob("checkpoint-*"):
            shutil.rmtree(folder)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """What asks a process to end (a scheduler's SIGTERM, a terminal's SIGHUP) acts as Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():  # only there can it be set
        names = []
    before = {name: signal.signal(getattr(signal, name), stop) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


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


def _earlier(asked: dict[str, Any]) -> runs.Run | None:
    """The newest run of the same training that is done, or that ended early and left a checkpoint."""
    for run in runs.find(method=asked["method"], model=asked["model"], seed=asked["seed"]):
        kept = run.adapter.is_dir() if run.status == "done" else run.checkpoint and run.status != "running"
        if kept and not _differs(run, asked):
            return run
    return None


def _record(
    asked: dict[str, Any], labels: int, earlier: runs.Run | None, resume: runs.Run | str | bool
) -> tuple[AbstractContextManager, Path | None]:
    """A new run, or one that goes on, to be entered; and the checkpoint to go on from."""
    if resume is True:
        resume = earlier if earlier and earlier.checkpoint else False
    if not resume:
        if earlier and earlier.status != "done" and earlier.checkpoint:
            step = earlier.checkpoint.name.rpartition("-")[2]
            print(f"Run {earlier.id} ended early: fit(..., resume={earlier.id!r}) goes on from its step {step}.")
        return runs.start(**asked, labels=labels), None
    run = runs.load(resume) if isinstance(resume, str) else resume
    if run.checkpoint is None:
        raise ValueError(f"run {run.id} is {run.status} and has no checkpoint to go on from: train anew")
    if other := _differs(run, asked):
        raise ValueError(f"this is not the training that {run.id} began: {other}")
    return runs.go_on(run, int(run.checkpoint.name.rpartition("-")[2])), run.checkpoint


def _guard_rewards(trainer: Trainer) -> None:
    """Let no NaN and no missing number into a training unseen. PPOTrainer guards its own."""
    rewards = getattr(trainer, "reward_funcs", [])
    for i, reward in enumerate(rewards):
        if not isinstance(reward, torch.nn.Module) and not inspect.iscoroutinefunction(reward):
            rewards[i] = checked(reward)
    calculate = getattr(trainer, "_calculate_rewards", None)  # TRL's, which takes None from all of them for a 0

    def judged(inputs: list, prompts: list, completions: list, *rest: Any) -> torch.Tensor:
        found = calculate(inputs, prompts, completions, *rest)  # (rows, functions), NaN for None
        if unjudged := found.isnan().all(1).nonzero().flatten().tolist():
            text = f"{completions[unjudged[0] % len(completions)]!r:.60}"
            raise RewardError(f"no reward judged the completion {text}: each returned None. Let one of them judge all")
        return found

    if calculate:
        trainer._calculate_rewards = judged


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
    """Save what was learnt in the run's folder, or where there is room if that has none."""
    save = save_adapter if hasattr(model, "peft_config") else type(model).save_pretrained
    try:
        save(model, run.adapter if save is save_adapter else run.folder / "model")
    except OSError as error:
        spare = Path(tempfile.mkdtemp(prefix=f"rlnb-{run.id}-"), "adapter")
        save(model, spare)
        raise OSError(f"{run.folder} took no files ({error}): what was learnt is in {spare}") from error


class Recorder(TrainerCallback):
    """Puts what is logged into the run's curve and on the screen, and lets the screen stop a training."""

    def __init__(self, run: runs.Run, trim: float = TRIM):
        self.trim, self.run, self.screen = trim, run, progress.current_screen()
        self.rows = [row for row in run.curve() if progress.metrics(row)]  # of a run that goes on
        self.cut = 0  # steps in a row whose completions were all cut off
        self.began = self.trimmed = self.saved = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter() - (self.rows[-1]["seconds"] if self.rows else 0.0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        numbers = {k: plain for k, v in (logs or {}).items() if (plain := number(v)) is not None}
        self.run.log(state.global_step, **numbers)
        self.cut = self.cut + 1 if numbers.get("completions/clipped_ratio") == 1 else 0
        if self.cut == ALL_CUT:
            raise ValueError(
                f"all completions of {ALL_CUT} steps were cut off at max_completion_length, at "
                f"{numbers.get('completions/mean_length', 0):.0f} tokens: rewards judge half an answer. Raise it, or "
                "teach the model to end first, with SFT"
            )
        if progress.metrics(numbers):
            spent = time.perf_counter() - self.began
            self.rows.append({"step": state.global_step, "seconds": spent, **numbers})
            self.screen.show(self.rows, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        if time.perf_counter() - self.trimmed > self.trim:  # else a run's memory grows step by step
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
