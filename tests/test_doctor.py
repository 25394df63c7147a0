"""The doctor: tiny runs that are broken on purpose and really trained, and healthy ones beside them.

The model is random and has 116,000 parameters, so a run takes a second.
"""

import ast
import os
import subprocess
import sys

import pytest
import tiny

from rlnb import __main__, bootstrap, checkup, doctor, models, preferences, runs

models.backend()
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from trl import (  # noqa: E402
    DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RewardConfig,
    RewardTrainer, SFTConfig, SFTTrainer,
)  # fmt: skip
from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # noqa: E402

from rlnb import reward_models, sampling  # noqa: E402

LORA = models.LoRA(rank=4, alpha=16)
WORDS = ("apples", "boxes", "pens")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that knows the pairs below by heart, so that it has something to lose."""
    return learn(tiny.make(tmp_path_factory.mktemp("doctor") / "m"))


def learn(folder, steps=150):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    texts = [[*row["prompt"], *row[side]] for row in pairs() for side in ("chosen", "rejected")]
    batch = tokenizer.apply_chat_template(
        texts, tokenize=True, return_dict=True, padding=True, return_tensors="pt"
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(steps):
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
    load = reward_models.load if kind == "reward" else models.load_model
    model, tokenizer = load(base, LORA)
    if frozen:
        model.requires_grad_(False)
    made = trainer(model=model, args=settings(config, folder, **given), train_dataset=data,
                   processing_class=tokenizer)  # fmt: skip
    made.train()
    return made.state.log_history


def digits(completions, **_):
    """The share of digits among the characters: a reward that a random model can climb."""
    texts = [c[0]["content"] for c in completions]
    return [sum(x.isdigit() for x in text) / max(1, len(text)) for text in texts]


def sample(base, folder, reward_funcs, schedule=None, **given):
    """The log of a GRPO run."""
    model, tokenizer = models.load_model(base, LORA)
    size = {"num_generations": 8, "max_completion_length": 12, "per_device_train_batch_size": 32}
    args = settings(GRPOConfig, folder, **size | given)
    optimizer = scheduler = None
    if schedule:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    trainer = GRPOTrainer(
        model=model, args=args, reward_funcs=reward_funcs, train_dataset=pairs().select_columns("prompt"),
        processing_class=tokenizer, rollout_func=sampling.rollout, optimizers=(optimizer, scheduler),
    )  # fmt: skip
    trainer.train()
    return trainer.state.log_history


def names(log):
    return {finding.name for finding in doctor.run(log)}


# --- runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "orpo", "reward"])
def test_healthy_runs_that_read_are_silent(base, tmp_path, kind):
    report = doctor.run(read(base, tmp_path, kind))
    assert report == [] and str(report) == "nothing wrong in 24 logs" and report.works




def test_answers_that_are_cut(base, tmp_path):
    log = sample(base, tmp_path, digits, steps=8, max_completion_length=2)
    assert "cut at the limit" in names(log)


def test_a_frozen_adapter(base, tmp_path):
    assert names(read(base, tmp_path, "sft", frozen=True)) == {"nothing moved"}


def test_a_saved_adapter_that_never_moved(base):
    with runs.start("sft", model="m") as run:
        model, _ = models.load_model(base, LORA)
        models.save_adapter(model, run.adapter)
    assert [f.name for f in doctor.run(run)] == ["nothing moved"]
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n)[0, 0] = 1.0
    models.save_adapter(model, run.adapter)
    assert doctor.run(run) == []


@pytest.mark.parametrize("kind", ["sft", "orpo"])
def test_a_learning_rate_so_high_that_the_loss_jumps(base, tmp_path, kind):
    report = doctor.run(read(base, tmp_path, kind, rate=1.0))
    assert "loss jumped" in {f.name for f in report} and not report.works
    assert "learning rate up to 1e+00" in str(report)


def test_a_learning_rate_so_low_that_nothing_is_learnt(base, tmp_path):
    report = doctor.run(read(base, tmp_path, "dpo", rate=1e-8))
    assert [(f.name, f.level) for f in report] == [("hardly moved", "advice")]
    assert report.works




def test_kto_with_one_class(base, tmp_path):
    both = preferences.unpair(pairs(), 0)
    good = both.filter(lambda row: row["label"])
    report = doctor.run(read(base, tmp_path, "kto", good, steps=8))
    assert [f.name for f in report] == ["one class"]
    assert report[0].saw == "of 8 logs, 8 have desirable rows and 0 undesirable ones"


def test_numbers_that_are_none(base, tmp_path):
    log = read(base, tmp_path, "orpo", pairs(long=20), max_length=64, steps=4)
    assert "not a number" in names(log)
    with runs.start("orpo") as run:  # a curve on disk has no NaN, but the word
        for row in log:
            run.log(**row)
    assert "grad_norm" in doctor.run(run)[0].saw


def test_groups_without_variance(base, tmp_path):
    def constant(completions, **_):
        return [0.5] * len(completions)

    report = doctor.run(sample(base, tmp_path, constant, steps=8))
    assert {f.name for f in report} == {"silent groups"}
    assert "100% of the groups" in str(report)








def test_held_out_accuracy_is_compared_with_the_start_or_the_parent():
    with runs.start("sft") as parent:
        parent.finish(strict={"k": 60, "n": 100})
    with runs.start("dpo", parent=parent) as worse:
        worse.finish(strict={"k": 40, "n": 100})
    with runs.start("dpo", parent=parent) as same:  # within two standard errors
        same.finish(strict={"k": 55, "n": 100})
    with runs.start("grpo") as hacked:
        for step in range(12):
            hacked.log(step, loss=0.0, reward=step / 12)
        hacked.finish(strict={"k": 0, "n": 100}, start={"strict": {"k": 10, "n": 100}})
    assert doctor.run(worse)[0].saw == "held out, strict: 60% -> 40% of 100"
    assert doctor.run(same) == []
    assert "while the reward rose" in doctor.run(hacked)[0].saw


def test_runs_that_did_not_end_by_themselves():
    with pytest.raises(KeyboardInterrupt), runs.start("sft", config={"steps": 9}) as stopped:
        stopped.log(4, loss=1.0)
        raise KeyboardInterrupt
    with pytest.raises(ValueError), runs.start("sft") as failed:
        raise ValueError("no such row")
    assert doctor.run(stopped)[0].saw.startswith("interrupted, 4 of 9 steps logged, no adapter")
    assert "no such row" in doctor.run(failed)[0].saw
    code = "import os; from rlnb import runs; run = runs.start('sft'); run.__enter__(); os._exit(1)"
    subprocess.run([sys.executable, "-c", code], env=here())
    assert doctor.run(runs.latest(status="lost"))[0].saw.startswith("lost")


def test_a_short_or_empty_log_says_nothing():
    assert doctor.run([]) == []
    assert doctor.run([{"loss": 1.0, "grad_norm": 1.0}, {"loss": 9.0, "grad_norm": 1.0}]) == []


# --- the machine ---------------------------------------------------------------------------------


def here(**more):
    return {**os.environ, "PYTHONPATH": str(bootstrap.ROOT), **more}


def test_the_command_looks_at_everything_and_finds_that_it_works():
    done = subprocess.run([sys.executable, "-m", "rlnb", "doctor"], capture_output=True, text=True,
                          env=here(), timeout=300)  # fmt: skip
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines] == [look.__name__ for look in checkup.LOOKS]
    assert done.returncode == 0 and "PROBLEM" not in done.stdout


def test_the_command_takes_a_run(capsys):
    with runs.start("sft") as run:
        run.log(1, loss=float("nan"))
    assert __main__.main(["doctor", run.id]) == 1
    assert "not a number: loss at step 1" in capsys.readouterr().out


def test_broken_packages_are_what_it_reports(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: not found')")
    path = os.pathsep.join([str(tmp_path), str(bootstrap.ROOT)])
    done = subprocess.run([sys.executable, "-m", "rlnb", "doctor"], capture_output=True, text=True,
                          env=here(PYTHONPATH=path), timeout=300)  # fmt: skip
    assert done.returncode == 1 and not done.stderr
    for look in ("cores", "gpu", "bf16", "backend"):
        line = next(line for line in done.stdout.splitlines() if line.split()[1] == look)
        assert line.startswith("PROBLEM") and "libcudart.so.13" in line


def test_missing_packages_are_what_it_reports():
    code = f"import sys; sys.path.insert(0, {str(bootstrap.ROOT)!r}); from rlnb import doctor; sys.exit(doctor.main())"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stderr
    assert "missing: torch, transformers" in done.stdout


def test_versions_are_held_against_the_requirement_files(monkeypatch, tmp_path):
    for step in bootstrap.STEPS["gpu"]:
        (tmp_path / step[-1]).write_text("")
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    (tmp_path / "requirements.txt").write_text("psutil==0.0.1  # reads memory\n")
    saw, level, do = checkup.versions()
    assert "tested 0.0.1" in saw and level == "advice" and "setup" in do
    (tmp_path / "requirements.txt").write_text("no-such-package==1  # is not there\n")
    assert checkup.versions()[:2] == ("missing: no-such-package", "problem")




def test_more_threads_than_cores_are_seen():
    before = torch.get_num_threads()
    torch.set_num_threads(4 * os.cpu_count())
    try:
        assert checkup.cores()[1] == "advice"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["doctor", "checkup"])
def test_an_old_python_gets_as_far_as_the_message(name):
    text = (bootstrap.ROOT / "rlnb" / f"{name}.py").read_text(encoding="utf-8")
    ast.parse(text, feature_version=(3, 9))
