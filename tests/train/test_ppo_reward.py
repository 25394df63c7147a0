"""What PPO takes as a reward: weighed, checked, and an adapter that says what its own model says."""

import json
import shutil

import pytest

from rlnb.model import LoRA, reward_model, save_adapter, sampling
from rlnb.task import rewards
from tests import tiny
from tests.train.ppo_tiny import (
    WORDS, assert_same, batch_of, build, digits, length, load, log, prompts, spread, weights,
)  # fmt: skip

import peft
import torch
import transformers
from datasets import Dataset
from trl import RewardConfig, RewardTrainer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny")


def test_rewards_are_weighed_and_none_counts_as_nothing(base, tmp_path):
    def half(completions, number, log_metric, **columns):
        log_metric("numbers", sum(number) / len(number))
        return [None if n % 2 else 3.0 for n in number]

    trainer = build(
        load(base), tmp_path, [length, half], prompts(8), reward_weights=[2.0, 0.5], kl_coef=0.0
    )
    trainer.train()
    (row,) = log(trainer)
    mean = row["rewards/length/mean"]
    assert row["completions/mean_length"] / 6 == pytest.approx(mean)
    assert row["rewards/half/mean"] == 3.0
    assert row["reward"] == pytest.approx(2 * mean + 0.5 * 3.0 / 2, rel=1e-6)
    assert row["numbers"] == 3.5


@pytest.mark.parametrize("returned, match", (
    (lambda n: 1 / 0, "raised ZeroDivisionError"),
    (lambda n: [float("nan")] * n, "returned nan for completion 0"),
    (lambda n: [1.0], "returned 1 values for 8"),
    (lambda n: [None] * n, "no reward judged the completion"),
))  # fmt: skip
def test_a_bad_reward_function_is_named_before_the_first_update(base, tmp_path, returned, match):
    def broken(completions, **columns):
        return returned(len(completions))

    trainer = build(load(base), tmp_path, broken)
    before = weights(trainer)
    with pytest.raises(rewards.RewardError, match=match):
        trainer.train()
    assert_same(weights(trainer), before)


def test_a_reward_that_fails_late_leaves_the_checkpoints(base, tmp_path):
    def moody(completions, trainer_state, **columns):
        if trainer_state.global_step == 2:
            raise OSError("the judge is away")
        return digits(completions)

    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(rewards.RewardError, match=r"moody.* raised OSError: the judge is away"):
        build(load(base), tmp_path, moody, **settings).train()
    trainer = build(load(base), tmp_path, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [row["step"] for row in log(trainer)] == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def judge(base, tmp_path_factory):
    """A classifier with LoRA on the same base, and its adapter's folder."""
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    lora = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["score"]
    )
    classifier = peft.get_peft_model(classifier, lora).eval()
    spread(classifier, seed=5, std=0.3)
    folder = tmp_path_factory.mktemp("reward") / "judge"
    classifier.save_pretrained(folder)
    return classifier, folder


def test_a_reward_adapter_says_what_its_own_model_says(base, tmp_path, judge):
    classifier, folder = judge
    model, tokenizer = load(base, "trained")
    size = sum(p.numel() for p in model.parameters())
    trainer = build((model, tokenizer), tmp_path, [folder, digits], reward_weights=[1.0, 0.0])
    own = sum(p.numel() for n, p in model.named_parameters() if ".reward." in n or ".ref." in n)
    assert sum(p.numel() for p in model.parameters()) == size + own  # no second base
    assert own < size / 4
    batch = batch_of(trainer, advantages=False)
    for row, size_, found in zip(batch.ids_BL, batch.length_B, batch.scores_BR[:, 0], strict=True):
        with torch.no_grad():
            expected = classifier(input_ids=row[None, :size_]).logits[0, 0].item()
        assert found.item() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert batch.scores_BR[:, 0].std() > 1e-3
    frozen = {n: p.clone() for n, p in model.named_parameters() if ".reward." in n}
    trainer.train()
    assert_same({n: p for n, p in model.named_parameters() if ".reward." in n}, frozen)
    assert log(trainer)[0]["rewards/judge/mean"] == pytest.approx(log(trainer)[0]["reward"])


def ended(texts, trainer):
    """Completions that have ended, of two words."""
    tokenizer = trainer.processing_class
    words = [f"{WORDS[i % 10]} {WORDS[i % 7]}" for i in range(len(texts))]
    ids = [[*row, tokenizer.eos_token_id] for row in tokenizer(words)["input_ids"]]
    return {"prompt_ids": sampling.tokenize(tokenizer, texts), "completion_ids": ids}


@pytest.mark.parametrize("behind", ("", "\n"))
def test_a_reward_adapter_of_trls_trainer_says_what_it_was_trained_to_say(base, tmp_path, behind):
    """behind: what the chat template writes after the end token, and RewardTrainer reads as well."""
    template = tiny.TEMPLATE.replace("<|end|>", "<|end|>" + behind)
    classifier, tokenizer = reward_model.load(base, LoRA(rank=4))
    tokenizer.chat_template = template
    pairs = [
        {"prompt": [{"role": "user", "content": f"{word}?"}],
         "chosen": [{"role": "assistant", "content": "12 apples"}],
         "rejected": [{"role": "assistant", "content": "pens"}]} for word in WORDS
    ]  # fmt: skip
    settings = RewardConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to="none", save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False,
        disable_tqdm=True,
    )  # fmt: skip
    trained = RewardTrainer(
        model=classifier, args=settings, train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )  # fmt: skip
    trained.train()
    trained.save_model(str(tmp_path / "judge"))
    policy = load(base, "trained")
    policy[1].chat_template = template
    trainer = build(
        policy, tmp_path, tmp_path / "judge", rollout=ended, max_completion_length=40
    )
    batch = batch_of(trainer, advantages=False)
    texts = tokenizer.batch_decode(batch.completion_ids, skip_special_tokens=True)
    pairs = zip(trainer.train_dataset["prompt"], texts, strict=False)
    talks = [[*prompt, {"role": "assistant", "content": text}] for prompt, text in pairs]
    classifier, _ = reward_model.load(base, tmp_path / "judge")
    expected = reward_model.score(classifier, tokenizer, talks)
    assert torch.tensor(expected).std() > 1e-2
    assert batch.scores_BR[:, 0].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_rewards_of_the_wrong_kind_are_refused(base, tmp_path, judge):
    classifier, _ = judge
    loaded = load(base)
    with pytest.raises(TypeError, match=r"reward_funcs\[0\] is a .*as_reward makes a function"):
        build(loaded, tmp_path, classifier)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        build(loaded, tmp_path, tmp_path)
    with pytest.raises(ValueError, match="give at least one"):
        build(loaded, tmp_path, [])
    with pytest.raises(TypeError, match=r"reward_funcs\[0\] is a int"):
        build(loaded, tmp_path, 3)


def changed_copy(folder, into, **changes):
    shutil.copytree(folder, into)
    file = into / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return into


def test_reward_adapters_that_do_not_fit_are_refused(base, tmp_path, judge):
    _, folder = judge
    loaded = load(base)
    other = changed_copy(folder, tmp_path / "other", base_model_name_or_path="/models/abacus-9b")
    with pytest.raises(ValueError, match=r"trained on abacus-9b, and the policy's base is tiny"):
        build(loaded, tmp_path, other)
    rank = changed_copy(folder, tmp_path / "targets", target_modules=["q_proj"])
    with pytest.raises(ValueError, match="does not fit the model: "):
        build(loaded, tmp_path, rank)
    policy = save_adapter(load(base, "trained")[0], tmp_path / "policy")
    with pytest.raises(ValueError, match="so this is no reward model's, which is SEQ_CLS"):
        build(loaded, tmp_path, policy)
    rewriting = changed_copy(folder, tmp_path / "rewriting", init_lora_weights="pissa")
    with pytest.raises(ValueError, match=r"adapter_config\.json: init_lora_weights is 'pissa', which rewrites"):
        build(loaded, tmp_path, rewriting)
