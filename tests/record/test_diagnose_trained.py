"""What is said of runs that are really trained: tiny ones that are broken on purpose, and healthy ones.

They run on one thread, as rounding depends on their number. The model has 116,000 parameters, so that a
run takes a second.
"""

import pytest
import tiny

from rlnb.model import LoRA, load_model  # isort: skip
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import (
    DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RewardConfig,
    RewardTrainer, SFTConfig, SFTTrainer,
)  # fmt: skip
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from rlnb.data import preferences
from rlnb.model import reward_model, sampling
from rlnb.record import diagnose, runs

TINY_LORA = LoRA(rank=4, alpha=16)
WORDS = ("apples", "boxes", "pens")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that knows the pairs below by heart, so that it has something to lose."""
    return learn(tiny.make(tmp_path_factory.mktemp("diagnose") / "m"))


def learn(folder, steps=150, rate=5e-3):
    """Padding is on the right, where causal attention does not see it."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    model = AutoModelForCausalLM.from_pretrained(folder)
    texts = [[*row["prompt"], *row[side]] for row in pairs() for side in ("chosen", "rejected")]
    batch = tokenizer.apply_chat_template(
        texts, tokenize=True, return_dict=True, padding=True, return_tensors="pt"
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 10) * (1 - step / steps)
        rows = torch.arange(len(texts))[step % 3 :: 3]  # of both sides
        part = {name: values[rows] for name, values in batch.items()}
        model(**part, labels=labels[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def registry(monkeypatch, tmp_path):
    monkeypatch.setenv("RLNB_RUNS", str(tmp_path / "runs"))


def pairs(n=32, long=1):
    rows = []
    for i in range(n):
        prompt = f"Anna has {i} {WORDS[i % 3]}. " * long
        rows.append({"prompt": message("user", prompt),
                     "chosen": message("assistant", f"<answer>{i}</answer>"),
                     "rejected": message("assistant", "How many pens are left?")})  # fmt: skip
    return Dataset.from_list(rows)


def message(role, text):
    return [{"role": role, "content": text}]


def settings(config, folder, steps=24, rate=1e-3, **more):
    given = {"per_device_train_batch_size": 8, "max_steps": steps, "learning_rate": rate}
    return config(
        output_dir=str(folder), report_to="none", use_cpu=True, bf16=True, logging_steps=1,
        save_strategy="no", disable_tqdm=True, **given | more,
    )  # fmt: skip


def read(base, folder, kind, data=None, frozen=False, **given):
    """The log of a run of one of the trainers that read."""
    trainer, config = {
        "sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig), "orpo": (ORPOTrainer, ORPOConfig),
        "kto": (KTOTrainer, KTOConfig), "reward": (RewardTrainer, RewardConfig),
    }[kind]  # fmt: skip
    data = data if data is not None else pairs()
    if kind == "sft":
        data = data.remove_columns("rejected").rename_column("chosen", "completion")
    if kind == "kto":
        given["train_sampling_strategy"] = "sequential"
        data = data if "label" in data.column_names else preferences.unpair(data, 0)
    load = reward_model.load if kind == "reward" else load_model
    model, tokenizer = load(base, TINY_LORA)
    if frozen:
        model.requires_grad_(False)
    training = trainer(
        model=model, args=settings(config, folder, **given), train_dataset=data, processing_class=tokenizer
    )
    training.train()
    return training.state.log_history


def asks(completions, **_):
    """1 for the very text of the rejected sides, which the base writes now and then."""
    return [float(c[0]["content"] == "How many pens are left?") for c in completions]


def letters(completions, **_):
    """A tenth for each letter: pays for length."""
    return [sum(x.isalpha() for x in c[0]["content"]) / 10 for c in completions]


def sample(base, folder, reward_funcs, **given):
    """The log of a GRPO run."""
    model, tokenizer = load_model(base, TINY_LORA)
    size = {"num_generations": 8, "max_completion_length": 24, "per_device_train_batch_size": 32}
    args = settings(GRPOConfig, folder, **size | given)
    trainer = GRPOTrainer(
        model=model, args=args, reward_funcs=reward_funcs, train_dataset=pairs().select_columns("prompt"),
        processing_class=tokenizer, rollout_func=sampling.rollout,
    )  # fmt: skip
    trainer.train()
    return trainer.state.log_history


def names(log):
    return {finding.name for finding in diagnose.run(log)}


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "orpo", "reward"])
def test_healthy_runs_that_read_are_silent(base, tmp_path, kind):
    report = diagnose.run(read(base, tmp_path, kind))
    assert report == [] and str(report) == "nothing wrong"


def test_a_healthy_run_that_samples_is_silent(base, tmp_path):
    log = sample(base, tmp_path, asks, steps=16, beta=1.0, rate=3e-4)  # at 1e-3 a random model may come apart
    report = diagnose.run(log)
    assert report == [] and str(report) == "nothing wrong"
    assert all("kl" in row and "entropy" in row for row in log if "loss" in row)


def test_answers_that_are_cut(base, tmp_path):
    log = sample(base, tmp_path, letters, steps=8, max_completion_length=2)
    assert "cut at the limit" in names(log)


def test_a_frozen_adapter(base, tmp_path):
    assert names(read(base, tmp_path, "sft", frozen=True)) == {"nothing moved"}


@pytest.mark.parametrize("kind", ["sft", "orpo"])
def test_a_learning_rate_so_high_that_the_loss_jumps(base, tmp_path, kind):
    report = diagnose.run(read(base, tmp_path, kind, rate=1.0))
    assert "loss jumped" in {f.name for f in report}
    assert "learning rate up to 1e+00" in str(report)


def test_numbers_that_are_none(base, tmp_path):
    log = read(base, tmp_path, "orpo", pairs(long=20), max_length=64, steps=4)
    assert "not a number" in names(log)
    with runs.start("orpo") as run:  # a curve on disk has no NaN, but the word
        for row in log:
            run.log(**row)
    assert "grad_norm" in diagnose.run(run)[0].saw


def test_groups_without_variance(base, tmp_path):
    def constant(completions, **_):
        return [0.5] * len(completions)

    report = diagnose.run(sample(base, tmp_path, constant, steps=8))
    assert {f.name for f in report} == {"silent groups"}
    assert "100% of the groups" in str(report)


def test_a_policy_that_leaves_its_reference(base, tmp_path):
    log = sample(base, tmp_path, letters, steps=12, rate=3e-2, beta=1e-3)
    assert "kl runs away" in names(log)
