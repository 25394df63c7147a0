"""The pre-flight: silent before every trainer that can go, and clear before those that cannot."""

import warnings

import pytest
import tiny

from rlnb import machine
from rlnb.data import preferences
from rlnb.model import LoRA, load_model, reward_model, sampling
from rlnb.train import preflight
from rlnb.train.methods import METHODS

from datasets import Dataset, concatenate_datasets

LORA = LoRA(rank=4, alpha=16)
TRAINERS = {"reward" if method == "reward_model" else method: spec for method, spec in METHODS.items()}
SAMPLES = ("grpo", "rloo", "ppo")
RATE = {"dpo": 5e-4, "kto": 5e-4}  # the others: 5e-3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("preflight") / "m")


def pairs(n=16, long=1):
    """Pairs of which every other prompt is `long` times as long."""
    def message(role, text):
        return [{"role": role, "content": text}]

    return Dataset.from_list([
        {"prompt": message("user", f"Anna has {i} pens. " * (long if i % 2 else 1)),
         "chosen": message("assistant", f"<answer>{i}</answer>"),
         "rejected": message("assistant", "How many?"), "answer": str(i)}
        for i in range(n)
    ])  # fmt: skip


def shaped(kind, data, apart=True):
    if kind == "sft" and "input_ids" in data.column_names:
        return data
    if kind == "sft":
        return data.remove_columns("rejected").rename_column("chosen", "completion")
    if kind == "kto" and "label" not in data.column_names and apart:
        return preferences.unpair(data, 0)
    return data.select_columns(["prompt", "answer"]) if kind in SAMPLES else data


def reward(completions, answer, **_):
    return [float(a in c[0]["content"]) for c, a in zip(completions, answer, strict=True)]


@pytest.fixture
def make(base, tmp_path):
    def make(kind, data=None, lora=LORA, reward_funcs=reward, apart=True, **given):
        config, trainer = TRAINERS[kind].classes()
        load = reward_model.load if kind == "reward" else load_model
        model, tokenizer = load(base, lora)
        own, more = {}, {}
        if kind in SAMPLES:
            more["reward_funcs"] = reward_funcs
            own["max_completion_length"] = 8
        if kind in ("grpo", "rloo"):
            own["num_generations"] = 4
        if kind == "grpo":
            more["rollout_func"] = sampling.rollout
        if kind == "kto":
            own["train_sampling_strategy"] = "sequential"
        settings = {
            "output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": True,
            "max_steps": 2, "learning_rate": RATE.get(kind, 5e-3), "save_strategy": "no",
            "per_device_train_batch_size": 8, "disable_tqdm": True,
        }  # fmt: skip
        return trainer(
            model=model, args=config(**settings | own | given), processing_class=tokenizer,
            train_dataset=shaped(kind, data if data is not None else pairs(), apart), **more,
        )  # fmt: skip

    return make


def warned(trainer, data=None):
    """The words of the one warning that the pre-flight gives."""
    with pytest.warns(UserWarning) as found:
        preflight.check(trainer, data)
    assert len(found) == 1
    return str(found[0].message)


def refused(trainer, data=None):
    with pytest.raises(ValueError) as found:
        preflight.check(trainer, data)
    return str(found.value)


@pytest.mark.parametrize("kind", TRAINERS)
def test_it_is_silent_when_all_is_well(make, kind):
    trainer = make(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preflight.check(trainer, shaped(kind, pairs()))


# --- the model and the settings ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sft", "reward", "grpo"])
def test_a_frozen_adapter_is_refused(make, kind):
    trainer = make(kind)
    trainer.model.requires_grad_(False)
    assert "the adapter is frozen" in refused(trainer)


def test_a_score_head_that_trains_beside_a_frozen_adapter_is_no_excuse(make):
    trainer = make("reward")
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad = "score" in name and "modules_to_save" in name
    assert "the adapter is frozen" in refused(trainer)


def test_a_merged_adapter_is_refused(make):
    trainer = make("sft")
    trainer.model.merge_adapter()
    assert "unmerge_adapter" in refused(trainer)


def test_answers_that_do_not_end_are_advised_against(make):
    def trainer():
        return make("sft", Dataset.from_list(rows), completion_only_loss=True)

    rows = [{"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]} for _ in range(16)]
    rows[3]["input_ids"][1] = end = make("sft").processing_class.eos_token_id  # it ends a turn before the answer
    assert "no answer holds <|end|>, so no end is learnt" in warned(trainer())
    rows[3]["input_ids"][3] = end
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preflight.check(trainer())


def test_one_token_for_padding_and_end_is_advised_against(make):
    trainer = make("sft")
    trainer.processing_class.pad_token = trainer.processing_class.eos_token
    assert "<|end|> ends and pads" in warned(trainer)


@pytest.mark.parametrize("kind, rate, side", [("sft", 1e-1, "break"), ("dpo", 1e-6, "teach too little"),
                                              ("dpo", 5e-2, "break"), ("grpo", 1e-6, "teach too little")])  # fmt: skip
def test_an_unusual_learning_rate_is_said(make, kind, rate, side):
    words = warned(make(kind, learning_rate=rate))
    assert f"learning_rate {rate:.1e} may {side}" in words and "try about" in words


def test_a_whole_model_takes_a_tenth_of_the_rate(make):
    assert "try about 7e-04" in warned(make("sft", lora=None, learning_rate=5e-3))


def test_bf16_without_instructions_is_said_where_there_are_none(make):
    trainer = make("sft")
    flags = machine.cpu_bf16()
    if flags is None:
        pytest.skip("the system does not tell")
    trainer.args.bf16 = True  # Unsloth has set it by these very instructions
    if flags:
        preflight.check(trainer)
    else:
        assert "no instructions for bf16" in warned(trainer)


# --- the data ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, given", [("sft", 16), ("reward", 16), ("dpo", 16), ("kto", 32)])
def test_rows_left_out_are_counted(make, kind, given):
    data = pairs(long=20)
    trainer = make(kind, data, max_length=64)
    assert f"{given // 2} of {given} rows are left out" in warned(trainer, shaped(kind, data))
    assert len(trainer.train_dataset) == given // 2


def test_pairs_that_kto_takes_apart_count_twice(make):
    data = pairs(long=20)
    trainer = make("kto", preferences.unpair(data, 0), max_length=64)
    assert "16 of 32 rows are left out" in warned(trainer, data)


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "orpo"])
def test_rows_that_will_be_cut_are_counted(make, kind):
    words = warned(make(kind, max_length=18))
    assert "rows reach max_length 18" in words


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_nothing_left_is_refused(make, kind):
    words = refused(make(kind, max_length=4), pairs())
    assert "no row is left: all are too long for max_length 4" in words


def test_prompts_that_leave_no_room_are_refused_where_the_loss_would_be_none(make):
    assert "8 of 16 prompts fill max_length 64 alone" in refused(make("orpo", pairs(long=20), max_length=64))


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_too_few_prompts_for_a_batch_are_refused(make, kind):
    words = refused(make(kind, pairs(1)))
    assert "a batch takes 2 prompts" in words and "there are 1" in words


def test_kto_needs_both_kinds_of_labels_in_its_batches(make):
    both = preferences.unpair(pairs(), 0)
    good, bad = (both.filter(lambda row, label=label: row["label"] is label) for label in (True, False))
    assert "all labels are False" in refused(make("kto", bad))
    assert "all labels are True" in warned(make("kto", good))
    in_order = make("kto", concatenate_datasets([good, bad]))
    assert "0% of the batches have both labels" in warned(in_order)
    pairs_as_they_are = make("kto", shaped("dpo", pairs()), apart=False)  # TRL takes them apart
    assert "0% of the batches have both labels" in warned(pairs_as_they_are)


def test_columns_that_a_reward_function_misses_are_named(make):
    def wants(completions, solution, weight=1.0, **_):
        return [0.0] * len(completions)

    def closed(prompts, completions):
        return [0.0] * len(completions)

    assert "reward function wants asks for solution" in refused(make("grpo", reward_funcs=wants))
    assert "reward function wants asks for solution" in refused(make("ppo", reward_funcs=wants))
    words = refused(make("grpo", reward_funcs=[reward, closed]))
    assert "closed is passed answer, completion_ids" in words and "**kwargs" in words
    words = refused(make("grpo", remove_unused_columns=True))
    assert "asks for answer: set remove_unused_columns=False" in words


def test_a_weight_that_is_no_number_is_refused(make):
    assert "reward_weights is [nan]" in refused(make("grpo", reward_weights=[float("nan")]))


# --- room ----------------------------------------------------------------------------------------


def test_more_tokens_than_positions_are_refused(make):
    assert "512 positions" in refused(make("rloo", max_completion_length=510))
    assert "lower max_length" in refused(make("sft", pairs(long=99), max_length=None))


def test_a_batch_that_will_not_fit_is_refused_and_a_tight_one_is_said(make, monkeypatch):
    trainer = make("orpo")
    need = preflight.memory_needed(preflight._Checked(trainer), 8)
    assert need > 0
    monkeypatch.setattr(machine, "free_memory", lambda: need // 2)
    words = refused(trainer)
    assert "8 x " in words and "halve per_device_train_batch_size" in words
    monkeypatch.setattr(machine, "free_memory", lambda: need)
    assert "gradient_checkpointing=True" in warned(trainer)
    monkeypatch.setattr(machine, "free_memory", lambda: 2 * need)
    preflight.check(trainer)


def test_a_batch_of_a_million_rows_does_not_fit_on_any_machine(make):
    trainer = make("dpo")
    trainer.args.per_device_train_batch_size = 10**9
    assert "MB are free" in refused(trainer)


def test_all_that_cannot_work_is_said_at_once(make):
    trainer = make("grpo", pairs(1), max_completion_length=510)
    trainer.model.requires_grad_(False)
    words = refused(trainer)
    assert words.startswith("before training: ") and words.count("\nand: ") == 2


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("sft", {"max_steps": 0}, "max_steps is 0: give 1 or more"),
        ("sft", {"max_steps": -5}, "max_steps is -5"),
        ("dpo", {"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs above 0"),
        ("sft", {"learning_rate": 0.0}, "learning_rate is 0.0: it must be at least"),
        ("sft", {"learning_rate": float("nan")}, "learning_rate is nan"),
        ("dpo", {"learning_rate": -1e-4}, "learning_rate is -0.0001"),
        ("dpo", {"beta": -0.1}, "beta is -0.1: it must be at least 0"),
        ("orpo", {"beta": float("inf")}, "beta is inf"),
        ("sft", {"max_length": 0}, "max_length is 0: it must be at least 1"),
    ],
)  # fmt: skip
def test_settings_that_cannot_teach_are_refused(make, kind, given, words):
    assert words in refused(make(kind, **given))


def test_a_parameter_that_is_no_number_is_refused(make):
    trainer = make("sft")
    next(p for n, p in trainer.model.named_parameters() if "lora_A" in n).data[0, 0] = float("nan")
    assert "lora_A.default.weight holds NaN or infinity" in refused(trainer)


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_sampler_that_is_not_the_policy_is_found(make, monkeypatch, kind):
    """As an engine without the adapter would be: it samples from another model."""
    trainer, other = make(kind), make(kind).model
    for name, parameter in other.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=2.0)
    sample = sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda model, *a, **k: sample(other, *a, **k))
    assert "what samples is not the policy" in refused(trainer)


def test_a_kl_from_the_base_where_the_policy_starts_from_an_adapter_is_told(make):
    """As in Unsloth's GRPOTrainer for GPUs, which takes the copy out: tests/train/test_unsloth_generated.py."""
    trainer = make("grpo", beta=0.1)
    preflight.check(trainer)
    trainer.model.delete_adapter("ref")
    preflight.check(trainer)  # a new adapter: the base is where it starts
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    assert "measures the KL from the base" in warned(trainer)
