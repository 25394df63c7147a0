"""PPOTrainer on tiny models: exactness at the first update, closed forms, masks, rewards, resuming.

Completions come from `script` wherever sampling is not the point: a function of the prompt alone, so
that whatever else differs between two runs, the batches are the same.
"""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlnb.train import ppo
from rlnb.model import load as models, reward_model as reward_models
from rlnb.task import rewards
from rlnb.train.ppo import base as ppo_base
from rlnb.train.ppo import model as ppo_model
from rlnb.train.ppo.rollouts import rollouts
from tests import tiny

import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file

WORDS = ("apples", "pens", "boxes", "12", "5", "34", "more", "left", "7 boxes", "Anna has 12")
QUESTIONS = [f"{a} {b}?" for a in WORDS for b in WORDS[: 1 + len(a) % 4]]  # of many lengths
END, PAD = 1, 0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def quiet(capsys):
    transformers.utils.logging.disable_progress_bar()


def prompts(n=24, chat=True):
    texts = [QUESTIONS[i % len(QUESTIONS)] for i in range(n)]
    rows = [[{"role": "user", "content": text}] for text in texts] if chat else texts
    return Dataset.from_dict({"prompt": rows, "number": list(range(n))})


def script(texts, trainer):
    """Completions of 1 to 6 tokens: some end early, some are cut off, all follow from the prompt."""
    from rlnb.model import sampling

    prompt_ids = sampling.tokenize(trainer.processing_class, texts)
    completion_ids = []
    for ids in prompt_ids:
        dice = random.Random(str(ids))
        longest = trainer.max_completion_length
        size = dice.choice([1, 2, 4, longest, longest])
        row = [dice.randint(4, 100) for _ in range(size)]
        if size < longest or dice.random() < 0.3:
            row[-1] = trainer.processing_class.eos_token_id
        completion_ids.append(row)
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}


def length(completions, completion_ids, **columns):
    return [len(ids) / 6 for ids in completion_ids]


def digits(completions, **columns):
    return [sum(c.isdigit() for c in rewards.text(completion)) / 4 for completion in completions]


def load(base, start="new", dropout=0.0):
    """A policy: with a new adapter, with one that has learnt something, or trained whole."""
    lora = None if start == "whole" else models.LoRA(rank=4, dropout=dropout)
    model, tokenizer = models.load_model(base, lora=lora)
    if start == "trained":
        spread(model)
    return model, tokenizer


def spread(model, seed=1, std=0.05):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, std, generator=generator)


def config(folder, **settings):
    usual = {
        "max_steps": 1, "per_device_train_batch_size": 8, "max_completion_length": 6,
        "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "bf16": False, "num_ppo_epochs": 1, "disable_tqdm": True,
    }  # fmt: skip
    return ppo.PPOConfig(output_dir=str(folder), **usual | settings)


def build(loaded, folder, reward=digits, data=None, rollout=script, callbacks=None, **settings):
    model, tokenizer = loaded
    return ppo.PPOTrainer(
        model, config(folder, **settings), reward, data or prompts(), tokenizer,
        rollout_func=rollout, callbacks=callbacks,
    )  # fmt: skip


def log(trainer):
    """The rows of training, without the times."""
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return [{k: v for k, v in row.items() if not k.startswith("step_time")} for row in rows]


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.actor_critic.named_parameters()}


def assert_same(found, expected, **tolerance):
    """Two dicts of numbers or tensors."""
    assert found.keys() == expected.keys()
    for name in expected:
        one, other = (torch.as_tensor(x[name]).double() for x in (found, expected))
        if tolerance:
            torch.testing.assert_close(one, other, msg=lambda m, n=name: f"{n}: {m}", **tolerance)
        else:
            assert torch.equal(one, other), name


# --- the first update ----------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", (False, True))
@pytest.mark.parametrize("start, value_model", (
    ("new", "trunk"), ("trained", "adapter"), ("whole", "none"),
))  # fmt: skip
def test_at_the_first_update_the_ratio_is_1_and_the_kl_0(base, tmp_path, start, value_model, bf16):
    loaded = load(base, start, dropout=0.0 if start == "whole" else 0.5)
    loaded[0].config.attention_dropout = 0.5
    trainer = build(
        loaded, tmp_path, rollout=None, bf16=bf16, value_model=value_model, num_mini_batches=1,
        per_device_train_batch_size=4, gradient_accumulation_steps=4,
    )  # fmt: skip
    trainer.train()
    (row,) = log(trainer)
    assert row["policy/ratio"] == 1.0
    assert row["policy/approx_kl"] == row["policy/clipfrac"] == 0.0
    assert row["kl"] == row["kl/sequence"] == 0.0
    assert row["reward"] > 0 and row["grad_norm"] > 0


def test_advantages_are_white_before_the_updates(base, tmp_path):
    trainer = build(load(base), tmp_path)
    batch = trainer._roll_out([trainer.train_dataset[i] for i in range(8)])
    trainer._measure(batch, [torch.arange(8)])
    trainer._estimate_advantages(batch)
    real = batch.advantages[batch.mask]
    assert real.mean().item() == pytest.approx(0, abs=1e-6)
    assert real.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert not batch.advantages[~batch.mask].any()


def test_lambda_1_without_a_critic_is_reinforce_with_a_baseline(base, tmp_path):
    """Williams 1992: the gradient of -mean of (R_t - b) log p(token), R_t the reward to go."""
    grads = {}

    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            grads.update(
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            )

    loaded = load(base, "trained")
    trainer = build(
        loaded, tmp_path, callbacks=[Keep()], value_model="none", lam=1.0, gamma=1.0, kl_coef=0.0,
        max_grad_norm=0.0, learning_rate=0.0, data=prompts(8), weight_decay=0.0,
    )  # fmt: skip
    trainer.train()
    model, tokenizer = loaded
    model.zero_grad()
    found = script(prompts(8)["prompt"], trainer)
    texts = tokenizer.batch_decode(found["completion_ids"], skip_special_tokens=True)
    scores = [r for r, ids in zip(digits(texts), found["completion_ids"], strict=True) for _ in ids]
    scores = torch.tensor(scores)
    advantages = (scores - scores.mean()) / scores.std(correction=0)
    pairs = zip(found["prompt_ids"], found["completion_ids"], strict=True)
    log_probs = torch.cat([naive_log_probs(model, *pair) for pair in pairs])
    (-(advantages * log_probs).mean()).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same(grads, expected, rtol=1e-3, atol=1e-6)
    assert any(g.abs().max() > 1e-4 for g in grads.values())


# --- log-probabilities ---------------------------------------------------------------------------


def naive_log_probs(model, prompt, completion):
    """One row, nothing padded, the model's own forward."""
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def of_make(kind, vocabulary=120, **more):
    """Random models of other makes: learned positions, logits that are capped."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": vocabulary,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": PAD,
    }
    if kind == "gpt2":
        made = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **sizes)
    elif kind == "gemma2":
        made = transformers.Gemma2Config(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, final_logit_softcapping=0.5, sliding_window=8, **sizes,
        )  # fmt: skip
    else:
        made = transformers.LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            **sizes | more,
        )
    model = transformers.AutoModelForCausalLM.from_config(made).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


@pytest.mark.parametrize("kind", ("llama", "mistral", "gpt2", "gemma2"))
def test_padding_early_ends_and_truncation_leave_log_probs_as_they_are(kind):
    model, dice = of_make(kind), random.Random(0)
    cases = ((3, 5), (20, 1), (1, 6), (9, 6), (2, 2))  # tokens of prompt and completion
    rows = [[[dice.randint(2, 119) for _ in range(n)] for n in case] for case in cases]
    rows[0][1][-1] = rows[1][1][-1] = END
    with torch.no_grad():
        expected = [naive_log_probs(model, *row) for row in rows]
        actor = ppo_model.ActorCritic(model, "trunk")
        assert actor.plain_head == (kind != "gemma2")
        torch.nn.init.normal_(actor.value_head.weight)
        for pad in (PAD, END, 50):
            batch = rollouts(*zip(*rows, strict=True), None, torch.zeros(5), {END}, pad)
            found, _, values = actor(batch.ids, batch.predicts)
            torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)
            alone = [actor(batch.ids[i : i + 1, :n], batch.predicts[i : i + 1, :n])
                     for i, n in enumerate(batch.lengths)]  # fmt: skip
            torch.testing.assert_close(
                values, torch.cat([v for _, _, v in alone]), rtol=1e-4, atol=1e-4
            )
    assert batch.finished.tolist() == [True, True, False, False, False]


def test_log_probs_are_those_of_the_left_padded_sampler(base):
    """Greedy decoding pads on the left; the most likely token must be so here as well."""
    from rlnb.model import sampling

    model, tokenizer = load(base, "trained")
    spread(model, std=0.5)
    asked = prompts(12)["prompt"]
    found = sampling.sample(
        model, tokenizer, asked, max_new_tokens=6, temperature=0, progress=False
    )
    ids = [row[0] for row in found.ids]
    batch = rollouts(
        sampling.tokenize(tokenizer, asked), ids, None, torch.zeros(12), {END}, PAD
    )
    actor = ppo_model.ActorCritic(model.eval())
    with torch.no_grad():
        best, _, _ = actor(batch.ids, batch.predicts)
        for other in range(4, 60):
            changed = batch.ids.clone()
            last = batch.lengths - 1
            changed[torch.arange(12), last] = other
            lower, _, _ = actor(changed, batch.predicts)
            ends = batch.mask.sum(1).cumsum(0) - 1
            assert (lower[ends] <= best[ends] + 1e-5).all()


def test_a_large_vocabulary_in_pieces_gives_the_same_numbers(monkeypatch):
    head = torch.nn.Linear(8, 30, bias=False)
    hidden, targets = torch.randn(50, 8), torch.randint(30, (50,))
    found = []
    for at_once in (2**25, 30 * 7):
        monkeypatch.setattr(ppo_model, "LOGITS_AT_ONCE", at_once)
        x = hidden.clone().requires_grad_()
        log_probs, entropies = ppo_model.token_statistics(x, head, targets, 0.7, entropy=True)
        (log_probs.sum() + entropies.sum()).backward()
        found.append({"log_probs": log_probs, "entropies": entropies, "gradient": x.grad})
    assert_same(*found, rtol=1e-5, atol=1e-6)
    p = (head(hidden) / 0.7).softmax(-1)
    torch.testing.assert_close(found[0]["entropies"], -(p * p.log()).sum(-1))
    chosen = p.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found[0]["log_probs"], chosen.log())


def test_gradients_of_the_whole_loss_are_finite_differences(tmp_path):
    """On GPT-2, which computes in float64 throughout if asked to; Llama's norms don't."""
    tokenizer = tiny.tokenizer()
    trainer = build(
        (of_make("gpt2", len(tokenizer)), tokenizer), tmp_path, ent_coef=0.03, vf_coef=0.5,
        cliprange=5.0, cliprange_value=5.0, reference=None, kl_coef=0.0,
    )  # fmt: skip
    torch.nn.init.normal_(trainer.actor_critic.value_head.weight)
    rows = torch.arange(8)
    batch = trainer._roll_out([trainer.train_dataset[i] for i in range(8)])
    trainer._measure(batch, [rows])
    trainer._estimate_advantages(batch)
    actor = trainer.actor_critic.double()
    for name, x in vars(batch).items():
        if torch.is_tensor(x) and x.is_floating_point():
            setattr(batch, name, x.double() + (0.1 if name == "log_probs" else 0.0))

    def loss():
        return trainer._losses(actor, batch, rows)[0].mean()

    loss().backward()
    for name in ("h.0.attn.c_attn.weight", "h.1.mlp.c_fc.bias", "wte.weight", "value_head.weight"):
        (parameter,) = (p for n, p in actor.named_parameters() if n.endswith(name))
        index = parameter.grad.abs().argmax().item()
        exact, flat, h = parameter.grad.flatten()[index].item(), parameter.data.view(-1), 1e-5
        with torch.no_grad():
            flat[index] += h
            above = loss().item()
            flat[index] -= 2 * h
            below = loss().item()
            flat[index] += h
        assert abs(exact) > 1e-3
        assert exact == pytest.approx((above - below) / (2 * h), rel=1e-5), name


# --- it learns what theory says ------------------------------------------------------------------


def toy(words=("<pad>", "<end>", "a", "b"), width=32):
    """A language of four words: a bandit with four arms."""
    from tokenizers import Tokenizer
    from tokenizers import models as kinds

    inner = Tokenizer(kinds.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )
    torch.manual_seed(3)
    made = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=width, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=16, eos_token_id=1, pad_token_id=0,
        bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(made), tokenizer


def test_a_bandit_ends_at_the_optimum_of_the_kl_regularised_objective(tmp_path):
    """max E[r] - beta KL(p || q) has the solution p ~ q exp(r / beta) (Ziegler et al. 2019, 2.1)."""
    pay, beta = {"a": 1.0, "b": 0.6, "": 0.0}, 0.5
    model, tokenizer = toy()
    prompt = torch.tensor([tokenizer("a")["input_ids"]])

    def policy():
        with torch.no_grad():
            return model(prompt).logits[0, -1].softmax(-1)

    before = policy()
    optimum = before * torch.tensor([0.0, 0.0, 1.0, 0.6]).div(beta).exp()
    optimum /= optimum.sum()
    assert 0.5 * (optimum - before).abs().sum() > 0.2  # far to go
    trainer = build(
        (model, tokenizer), tmp_path, lambda completions, **_: [pay[c.strip()] for c in completions],
        prompts(64, chat=False).map(lambda row: {"prompt": "a"}), rollout=None, max_steps=80,
        per_device_train_batch_size=64, max_completion_length=1, kl_coef=beta, learning_rate=1e-2,
        whiten_advantages=False, num_ppo_epochs=2, vf_coef=0.5, logging_steps=80,
    )  # fmt: skip
    trainer.train()
    assert 0.5 * (policy() - optimum).abs().sum() < 0.04
    assert log(trainer)[-1]["kl/coef"] == beta


def test_the_critic_learns_what_the_prompt_says_of_the_reward(base, tmp_path):
    """The reward is told by the prompt alone, so V can explain all of it."""
    data = prompts(16).add_column("pay", [float(i % 2) for i in range(16)])
    questions = [[{"role": "user", "content": f"{w}?"}] for w in ("34", "pens")] * 8
    data = data.remove_columns("prompt").add_column("prompt", questions)
    trainer = build(
        load(base), tmp_path, lambda completions, pay, **_: pay, data, max_steps=30, lam=1.0,
        per_device_train_batch_size=16, vf_coef=1.0, num_ppo_epochs=2, kl_coef=0.0, cliprange_value=None,
        value_model="adapter", learning_rate=0.0, value_learning_rate=1e-2,
    )  # fmt: skip
    trainer.train()
    assert log(trainer)[0]["value/explained_variance"] == pytest.approx(0, abs=1e-6)
    assert log(trainer)[-1]["value/explained_variance"] > 0.9


# --- masks ---------------------------------------------------------------------------------------


def test_neither_padding_nor_pieces_change_a_step(base, tmp_path):
    """Rows one at a time have no padding at all."""
    found = []
    for size in (8, 3, 1):
        trainer = build(
            load(base, "trained"), tmp_path, data=prompts(8), per_device_train_batch_size=size if size != 3 else 4,
            gradient_accumulation_steps={8: 1, 3: 2, 1: 8}[size], max_steps=2, ent_coef=0.01,
            normalize_rewards=True, whiten_rewards=True,
        )  # fmt: skip
        trainer.train()
        found.append((log(trainer), weights(trainer)))
    for rows, trained in found[1:]:
        for row, expected in zip(rows, found[0][0], strict=True):
            assert_same(row, expected, rtol=1e-3, atol=1e-5)
        assert_same(trained, found[0][1], rtol=1e-2, atol=1e-4)


def test_the_end_token_may_pad(base, tmp_path):
    found = []
    for pad in ("<|pad|>", "<|end|>"):
        loaded = load(base, "trained")
        loaded[1].pad_token = pad
        loaded[0].config.pad_token_id = loaded[1].pad_token_id
        trainer = build(loaded, tmp_path, data=prompts(8), max_steps=2, missing_eos_penalty=1.0)
        trainer.train()
        found.append((log(trainer), weights(trainer)))
    assert found[0][0] == found[1][0]
    assert_same(found[0][1], found[1][1])


def test_lengths_and_ends_are_counted(base, tmp_path):
    trainer = build(load(base), tmp_path, data=prompts(8))
    trainer.train()
    (row,) = log(trainer)
    found = script(prompts(8)["prompt"], trainer)
    sizes = [len(ids) for ids in found["completion_ids"]]
    ended = [ids[-1] == END for ids in found["completion_ids"]]
    assert 0 < sum(ended) < 8 and min(sizes) == 1  # the script has all cases
    assert row["completions/mean_length"] == pytest.approx(sum(sizes) / 8)
    assert (row["completions/min_length"], row["completions/max_length"]) == (
        min(sizes),
        max(sizes),
    )
    assert row["completions/clipped_ratio"] == pytest.approx(1 - sum(ended) / 8)
    assert row["num_tokens"] == sum(sizes) + sum(map(len, found["prompt_ids"]))


def test_a_step_on_a_real_rollout_has_all_the_figures(base, tmp_path):
    trainer = build(load(base), tmp_path, rollout=None, num_ppo_epochs=2, num_mini_batches=2)
    trainer.train()
    row = trainer.state.log_history[0]
    for name in (
        "loss", "grad_norm", "learning_rate", "num_tokens", "completions/mean_length",
        "completions/clipped_ratio", "reward", "reward_std", "rewards/digits/mean", "kl", "kl/sequence",
        "kl/coef", "entropy", "objective/rlhf_reward", "policy/loss", "policy/approx_kl",
        "policy/clipfrac", "policy/ratio", "value/loss", "value/clipfrac", "value/explained_variance",
        "step_time", "step_time/rollout",
    ):  # fmt: skip
        assert isinstance(row[name], float), name
    assert row["policy/updates"] == 4
    assert 4 < row["entropy"] <= torch.tensor(trainer.model.config.vocab_size).log()


# --- rewards -------------------------------------------------------------------------------------


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
    assert row["rewards/half/mean"] == 3.0 and row["rewards/half/std"] == 0.0
    assert row["reward"] == pytest.approx(2 * mean + 0.5 * 3.0 / 2, rel=1e-6)
    assert row["numbers"] == 3.5
    assert row["objective/rlhf_reward"] == pytest.approx(row["reward"])


def test_scores_are_clipped_and_unfinished_completions_pay(base, tmp_path):
    trainer = build(
        load(base), tmp_path, length, prompts(8), kl_coef=0.0, reward_clip_range=(0.3, 0.8),
        missing_eos_penalty=2.0,
    )  # fmt: skip
    trainer.train()
    (row,) = log(trainer)
    found = script(prompts(8)["prompt"], trainer)["completion_ids"]
    scores = [min(max(len(ids) / 6, 0.3), 0.8) - 2.0 * (ids[-1] != END) for ids in found]
    assert row["objective/rlhf_reward"] == pytest.approx(sum(scores) / 8, rel=1e-5)
    assert row["reward"] == pytest.approx(sum(len(ids) / 6 for ids in found) / 8, rel=1e-5)


def test_normalised_rewards_have_mean_0_and_deviation_1(base, tmp_path):
    def huge(completions, completion_ids, **columns):
        return [1000 + 300 * len(ids) for ids in completion_ids]

    trainer = build(load(base), tmp_path, huge, normalize_rewards=True, whiten_advantages=False)
    batch = trainer._roll_out([trainer.train_dataset[i] for i in range(8)])
    trainer._measure(batch, [torch.arange(8)])
    trainer._estimate_advantages(batch)
    scores = batch.rewards.sum(1)  # the KL is 0 here
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-4)


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
    trainer.train(resume_from_checkpoint=True)
    assert [row["step"] for row in log(trainer)] == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def reward_model(base, tmp_path_factory):
    """A classifier with LoRA on the same base, and its adapter's folder."""
    import peft

    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    lora = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["score"]
    )
    classifier = peft.get_peft_model(classifier, lora).eval()
    spread(classifier, seed=5, std=0.3)
    folder = tmp_path_factory.mktemp("reward") / "judge"
    classifier.save_pretrained(folder)
    return classifier, folder


def test_a_reward_adapter_says_what_its_own_model_says(base, tmp_path, reward_model):
    classifier, folder = reward_model
    model, tokenizer = load(base, "trained")
    size = sum(p.numel() for p in model.parameters())
    trainer = build((model, tokenizer), tmp_path, [folder, classifier], reward_weights=[1.0, 0.0])
    own = sum(p.numel() for n, p in model.named_parameters() if ".reward." in n or ".ref." in n)
    assert sum(p.numel() for p in model.parameters()) == size + own  # no second base
    assert own < size / 4
    batch = trainer._roll_out([trainer.train_dataset[i] for i in range(8)])
    for row, length_, (by_adapter, by_model) in zip(
        batch.ids, batch.lengths, batch.judged.tolist(), strict=True
    ):
        with torch.no_grad():
            expected = classifier(input_ids=row[None, :length_]).logits[0, 0].item()
        assert by_adapter == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert by_model == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert batch.judged[:, 0].std() > 1e-3
    frozen = {n: p.clone() for n, p in model.named_parameters() if ".reward." in n}
    trainer.train()
    assert_same({n: p for n, p in model.named_parameters() if ".reward." in n}, frozen)
    assert log(trainer)[0]["rewards/judge/mean"] == pytest.approx(log(trainer)[0]["reward"])


def ended(texts, trainer):
    """Completions that have ended, of two words."""
    from rlnb.model import sampling

    tokenizer = trainer.processing_class
    words = [f"{WORDS[i % 10]} {WORDS[i % 7]}" for i in range(len(texts))]
    ids = [[*row, tokenizer.eos_token_id] for row in tokenizer(words)["input_ids"]]
    return {"prompt_ids": sampling.tokenize(tokenizer, texts), "completion_ids": ids}


@pytest.mark.parametrize("behind", ("", "\n"))
def test_a_reward_adapter_of_trls_trainer_says_what_it_was_trained_to_say(base, tmp_path, behind):
    """behind: what the chat template writes after the end token, and RewardTrainer reads as well."""
    from trl import RewardConfig, RewardTrainer

    template = tiny.TEMPLATE.replace("<|end|>", "<|end|>" + behind)
    judge, tokenizer = reward_models.load(base, models.LoRA(rank=4))
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
        model=judge, args=settings, train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )  # fmt: skip
    trained.train()
    trained.save_model(str(tmp_path / "judge"))
    policy = load(base, "trained")
    policy[1].chat_template = template
    trainer = build(
        policy, tmp_path, tmp_path / "judge", rollout=ended, max_completion_length=40
    )
    rows = [trainer.train_dataset[i] for i in range(8)]
    batch = trainer._roll_out(rows)
    ids = ended([row["prompt"] for row in rows], trainer)["completion_ids"]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    talks = [r["prompt"] + [{"role": "assistant", "content": t}] for r, t in zip(rows, texts, strict=True)]
    judge, _ = reward_models.load(base, tmp_path / "judge")
    expected = reward_models.score(judge, tokenizer, talks)
    assert torch.tensor(expected).std() > 1e-2
    assert batch.judged[:, 0].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_an_encoder_judges_as_well(base, tmp_path):
    model, tokenizer = load(base)
    made = transformers.BertConfig(
        vocab_size=model.config.vocab_size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=1,
    )  # fmt: skip
    encoder = transformers.BertForSequenceClassification(made).eval()
    trainer = build((model, tokenizer), tmp_path, encoder)
    batch = trainer._roll_out([trainer.train_dataset[i] for i in range(8)])
    row, size = batch.ids[3], int(batch.lengths[3])
    with torch.no_grad():
        expected = encoder(input_ids=row[None, :size]).logits[0, 0].item()
    assert batch.judged[3, 0].item() == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_reward_models_that_do_not_fit_are_refused(base, tmp_path, reward_model):
    _, folder = reward_model
    loaded = load(base)
    make = transformers.AutoModelForSequenceClassification
    with pytest.raises(ValueError, match="2 labels"):
        build(loaded, tmp_path, make.from_pretrained(base, num_labels=2))
    made = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        num_labels=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="another tokenizer: a vocabulary of 99, the policy of"):
        build(loaded, tmp_path, make.from_config(made))
    with pytest.raises(ValueError, match="needs a frozen base"):
        build(load(base, "whole"), tmp_path, folder)
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        build(loaded, tmp_path, tmp_path)
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        build(loaded, tmp_path, [])
    with pytest.raises(TypeError, match=r"reward_funcs\[0\] is 3"):
        build(loaded, tmp_path, 3)


def changed_copy(folder, into, **changes):
    import shutil

    shutil.copytree(folder, into)
    file = into / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return into


def test_reward_adapters_that_do_not_fit_are_refused(base, tmp_path, reward_model):
    _, folder = reward_model
    loaded = load(base)
    other = changed_copy(folder, tmp_path / "other", base_model_name_or_path="/models/abacus-9b")
    with pytest.raises(ValueError, match=r"trained on abacus-9b, and the policy's base is tiny"):
        build(loaded, tmp_path, other)
    rank = changed_copy(folder, tmp_path / "targets", target_modules=["q_proj"])
    with pytest.raises(ValueError, match="does not fit the model: "):
        build(loaded, tmp_path, rank)
    policy = models.save_adapter(load(base, "trained")[0], tmp_path / "policy")
    with pytest.raises(ValueError, match="no score head with one output but none"):
        build(loaded, tmp_path, policy)
    strange = changed_copy(folder, tmp_path / "strange")
    words = tiny.tokenizer()
    words.add_tokens(["<new>"])
    words.save_pretrained(strange)
    loaded[1].add_tokens(["<other>"])
    with pytest.raises(ValueError, match="another tokenizer: token '<other>' as missing"):
        build(loaded, tmp_path, strange)


def test_the_tokenizer_of_a_model_of_the_hub_is_compared(base, tmp_path, monkeypatch):
    import huggingface_hub

    files = tmp_path / "models--org--judge"
    words = tiny.tokenizer()
    words.add_tokens(["<new>"])
    words.save_pretrained(files / "snapshots" / "1")
    load(base)[0].config.save_pretrained(files / "snapshots" / "1")
    (files / "refs").mkdir()
    (files / "refs" / "main").write_text("1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    make = transformers.AutoModelForSequenceClassification
    classifier = make.from_pretrained(base, num_labels=1)
    loaded = load(base)
    loaded[1].add_tokens(["<other>"])
    classifier.config._name_or_path = "org/judge"
    with pytest.raises(ValueError, match="another tokenizer: token '<other>' as missing"):
        build(loaded, tmp_path, classifier)
    classifier.config._name_or_path = "org/absent"
    with pytest.warns(UserWarning, match="the tokenizer of org/absent was not compared"):
        build(loaded, tmp_path, classifier)


# --- reference and critic ------------------------------------------------------------------------


def test_the_reference_is_where_the_policy_starts(base, tmp_path):
    for start, adapter in (("new", None), ("trained", "ref")):
        trainer = build(load(base, start), tmp_path, max_steps=3)
        assert trainer.reference.adapter == adapter and trainer.reference.copy is None
        trainer.train()
        assert [row["kl/sequence"] == 0 for row in log(trainer)] == [True, False, False]
        assert log(trainer)[-1]["kl"] != 0


def test_the_base_may_be_the_reference_of_a_trained_adapter(base, tmp_path):
    trainer = build(load(base, "trained"), tmp_path, reference="base")
    trainer.train()
    assert "ref" not in trainer.model.peft_config
    assert log(trainer)[0]["kl/sequence"] != 0


def test_without_a_reference_there_is_no_kl(base, tmp_path):
    trainer = build(load(base, "trained"), tmp_path, reference=None, kl_coef=0.0)
    trainer.train()
    assert not [name for name in log(trainer)[0] if name.startswith("kl")]


def test_full_fine_tuning_copies_the_model_and_says_so(base, tmp_path, capsys):
    trainer = build(load(base, "whole"), tmp_path, max_steps=2, learning_rate=1e-3)
    assert "the reference is a copy of it" in capsys.readouterr().out
    start = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert_same(dict(trainer.reference.copy.model.named_parameters()), start)
    assert all(not torch.equal(p, start[n]) for n, p in trainer.model.named_parameters())
    assert log(trainer)[0]["kl"] == 0 and log(trainer)[1]["kl"] != 0


def test_a_critic_of_its_own_leaves_the_policy_alone(base, tmp_path):
    """With advantages of zero all gradient comes from the value's loss."""
    trainer = build(load(base, "trained"), tmp_path, value_model="adapter", kl_coef=0.0)
    torch.nn.init.normal_(trainer.actor_critic.value_head.weight)
    rows = torch.arange(8)
    batch = trainer._roll_out([trainer.train_dataset[i] for i in range(8)])
    trainer._measure(batch, [rows])
    trainer._estimate_advantages(batch)
    batch.advantages.zero_()
    trainer._losses(trainer.actor_critic, batch, rows)[0].mean().backward()
    grads = {n: p.grad for n, p in trainer.actor_critic.named_parameters() if p.requires_grad}
    for name, grad in grads.items():
        assert (grad is not None and bool(grad.any())) == (".default." not in name), name
    assert not any(".ref." in name for name in grads)
    trainer.model.zero_grad()
    assert len(trainer.actor_critic.critic_parameters()) > 2


def test_the_critic_has_a_learning_rate_of_its_own(base, tmp_path):
    trainer = build(load(base, "trained"), tmp_path, value_learning_rate=0.0, max_steps=2)
    trainer.train()
    assert not trainer.actor_critic.value_head.weight.any()
    trainer = build(load(base, "trained"), tmp_path, learning_rate=0.0, value_learning_rate=0.1)
    before = weights(trainer)
    trainer.train()
    changed = {n for n, p in weights(trainer).items() if not torch.equal(p, before[n])}
    assert changed == {"value_head.weight", "value_head.bias"}


def test_switching_adapters_leaves_what_trains_as_it_was(base):
    model, _ = load(base, "trained")
    for name, trains in (("ref", False), ("value", True)):
        ppo_model.copy_adapter(model, name, trains)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n for n, on in flags.items() if on} == {
        n for n in flags if ".default." in n or ".value." in n
    }
    for name in (None, "ref", "value", "default"):
        with pytest.raises(KeyboardInterrupt), ppo_model.use_adapter(model, name):
            raise KeyboardInterrupt
        assert model.active_adapter == "default"
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        policy = model.eval()(input_ids=ids).logits
        with ppo_model.use_adapter(model, "ref"):
            assert torch.equal(model(input_ids=ids).logits, policy)
        with ppo_model.use_adapter(model, None):
            assert not torch.equal(model(input_ids=ids).logits, policy)


# --- updates -------------------------------------------------------------------------------------


def test_an_update_that_finds_the_policy_too_far_away_is_dropped(base, tmp_path):
    found = []
    for settings in ({"num_ppo_epochs": 1}, {"num_ppo_epochs": 4, "early_stop_kl": 1e-6}):
        trainer = build(load(base, "trained"), tmp_path, data=prompts(8), **settings)
        trainer.train()
        assert log(trainer)[0]["policy/updates"] == 1
        found.append(weights(trainer))
    assert_same(*found)


@pytest.mark.parametrize("horizon, factor", ((80, 1 - 0.2 * 8 / 80), (1, 0.8)))
def test_the_kl_coefficient_adapts(base, tmp_path, horizon, factor):
    """A horizon shorter than a step moves it no further, and never below 0."""
    trainer = build(
        load(base), tmp_path, max_steps=3, kl_coef=0.1, kl_target=5.0, kl_horizon=horizon,
        learning_rate=0.0,
    )  # fmt: skip
    trainer.train()
    found = [row["kl/coef"] for row in log(trainer)]
    assert found == pytest.approx([0.1 * factor**k for k in range(3)])


def test_figures_of_an_earlier_training_are_not_in_the_next(base, tmp_path):
    trainer = build(load(base), tmp_path, length, max_steps=3, logging_steps=2, learning_rate=0.0)
    trainer.train()  # the third step is not logged
    trainer.args.logging_steps = 1
    trainer.train()
    (first, *_), sizes = log(trainer), []
    for row in trainer.get_train_dataloader():
        found = script([r["prompt"] for r in row], trainer)["completion_ids"]
        sizes.append(sum(map(len, found)) / len(found))
    assert any(first["completions/mean_length"] == pytest.approx(size) for size in sizes)


def test_callbacks_see_one_step_per_batch_and_the_language_model(base, tmp_path):
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.append((state.global_step, "default" in model.peft_config))

    build(
        load(base), tmp_path, callbacks=[Watch()], max_steps=3, num_ppo_epochs=2, num_mini_batches=4
    ).train()
    assert seen == [(1, True), (2, True), (3, True)]


def test_of_trainer_only_what_is_meant_is_overridden():
    """A helper that happens to have the name of one of Trainer's breaks what is not tested here."""
    own = {name for kind in (ppo.PPOTrainer, ppo_base.ActorCriticTrainer) for name in vars(kind)}
    shared = {n for n in own & set(dir(transformers.Trainer)) if not n.startswith("__")}
    assert shared == {
        "training_step", "evaluation_loop", "get_eval_dataloader", "create_optimizer", "train", "log",
        "_wrap_model", "_save", "_load_from_checkpoint", "_load_best_model",
    }  # fmt: skip


def test_training_may_be_called_again(base, tmp_path):
    trainer = build(load(base), tmp_path, max_steps=2)
    trainer.train()
    once = weights(trainer)
    trainer.train()
    assert len(log(trainer)) == 2  # Trainer begins a new history
    assert any(not torch.equal(p, once[n]) for n, p in weights(trainer).items())


def test_settings_come_from_the_command_line():
    parser = transformers.HfArgumentParser(ppo.PPOConfig)
    (found,) = parser.parse_args_into_dataclasses(
        ["--output_dir", "x", "--kl_target", "6", "--reward_weights", "1", "0.5", "--use_cpu",
         "--reward_clip_range", "-1", "2", "--chat_template_kwargs", '{"enable_thinking": false}']
    )  # fmt: skip
    assert found.reward_clip_range == [-1.0, 2.0]
    assert found.chat_template_kwargs == {"enable_thinking": False}
    assert (found.kl_target, found.reward_weights, found.cliprange) == (6.0, [1.0, 0.5], 0.2)


def test_gradient_checkpointing_changes_nothing(base, tmp_path):
    found = []
    for on in (False, True):
        trainer = build(load(base, "trained"), tmp_path, data=prompts(8), gradient_checkpointing=on)
        trainer.train()
        found.append(weights(trainer))
    assert_same(*found, rtol=1e-5, atol=1e-7)


def test_evaluation_is_the_same_each_time_and_leaves_training_alone(base, tmp_path):
    def run(evaluate):
        trainer = ppo.PPOTrainer(
            (loaded := load(base))[0],
            config(tmp_path, max_steps=2, eval_strategy="steps" if evaluate else "no", eval_steps=1,
                   per_device_eval_batch_size=3),
            length, prompts(), loaded[1], eval_dataset=prompts(7),
        )  # fmt: skip
        trainer.train()
        return trainer

    with_it, without = run(True), run(False)
    scripted = build(load(base), tmp_path, length, per_device_eval_batch_size=3)
    found = script(prompts(7)["prompt"], scripted)["completion_ids"]
    metrics = scripted.evaluate(prompts(7))  # before any training
    assert metrics["eval_reward"] == pytest.approx(sum(map(len, found)) / 6 / 7)
    assert metrics["eval_completions/max_length"] == 6
    assert_same(weights(with_it), weights(without))
    first, again = with_it.evaluate(), with_it.evaluate()
    assert first["eval_reward"] == again["eval_reward"] > 0
    assert first["eval_kl"] == again["eval_kl"] != 0
    rows = [row for row in with_it.state.log_history if "eval_reward" in row]
    assert [row["step"] for row in rows] == [1, 2, 2, 2]


def test_the_best_checkpoint_comes_back(base, tmp_path):
    model, tokenizer = load(base, "trained")
    settings = config(
        tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_first_reward", learning_rate=0.1,
    )  # fmt: skip
    held_out = {"first": prompts(7), "second": prompts(3)}
    trainer = ppo.PPOTrainer(model, settings, length, prompts(), tokenizer, eval_dataset=held_out)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "eval_first_reward" in row]
    best = max(rows, key=lambda row: row["eval_first_reward"])["step"]
    assert best < 3  # the reward is too wild for that to be the last
    saved = load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors")
    own = {n.replace(".default", ""): p for n, p in model.named_parameters() if ".default." in n}
    assert_same({n: p for n, p in own.items() if n in saved}, saved)
    assert "eval_second_reward" in set().union(*trainer.state.log_history)


def test_prompts_may_stream(base, tmp_path):
    streamed, listed = (
        build(load(base), tmp_path, length, data, per_device_eval_batch_size=3, max_steps=3)
        for data in (prompts().to_iterable_dataset(), prompts())
    )
    streamed.train()
    assert [row["step"] for row in log(streamed)] == [1, 2, 3]
    found = [trainer.evaluate(prompts(7).to_iterable_dataset()) for trainer in (streamed, listed)]
    assert found[0]["eval_reward"] == found[1]["eval_reward"] == listed.evaluate(prompts(7))["eval_reward"]


# --- killed and resumed --------------------------------------------------------------------------


class Killed(Exception):
    pass


class Kill(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise Killed


@pytest.mark.parametrize("start, value_model, at", (
    ("trained", "trunk", 2), ("trained", "adapter", 3), ("new", "none", 1), ("whole", "trunk", 2),
))  # fmt: skip
def test_resumed_equals_never_stopped(base, tmp_path, start, value_model, at):
    """24 prompts in batches of 8: step 3 ends the epoch."""
    settings = {
        "value_model": value_model, "max_steps": 5, "num_ppo_epochs": 2, "num_mini_batches": 2,
        "learning_rate": 3e-3, "kl_target": 0.5, "kl_horizon": 100, "normalize_rewards": True,
        "warmup_steps": 2, "rollout": None,
    }  # fmt: skip
    whole = build(load(base, start), tmp_path / "whole", **settings)
    whole.train()
    settings |= {"save_strategy": "steps", "save_steps": at}
    with pytest.raises(Killed):
        build(load(base, start), tmp_path / "cut", callbacks=[Kill()], **settings).train()
    for later in (tmp_path / "cut").glob("checkpoint-*"):
        if int(later.name[11:]) > at:  # killed while it wrote this one
            (later / "trainer_state.json").unlink()
    resumed = build(load(base, start), tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert [row["step"] for row in log(resumed)] == [1, 2, 3, 4, 5]
    assert log(resumed) == log(whole)
    assert_same(weights(resumed), weights(whole))
    assert resumed.kl_coef == whole.kl_coef != 0.05


def test_a_checkpoint_is_an_adapter_that_others_load(base, tmp_path):
    trainer = build(load(base, "trained"), tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    model, _ = models.load_model(base, lora=checkpoint)
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        assert torch.equal(model.eval()(input_ids=ids).logits, expected)
    assert not list(checkpoint.rglob("*reward*"))
    assert load_file(checkpoint / "value_head.safetensors")["weight"].shape == (1, 64)


def test_a_checkpoint_of_another_trainer_is_refused(base, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    trainer = build(load(base), tmp_path)
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(
        FileNotFoundError, match=r"no checkpoint of PPOTrainer: it has no ppo_state\.json"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("then, match", (
    ({"value_model": "adapter"}, "value_model 'trunk', and this trainer has 'adapter'"),
    ({"value_model": "none"}, "value_model 'trunk', and this trainer has 'none'"),
    ({"start": "new"}, r"adapters \['default', 'ref'\], and this trainer has \['default'\]"),
    ({"rank": 8}, "(?s)does not fit the model: .*size mismatch"),
    ({"targets": models.ATTENTION}, "does not fit the model: .* is left over"),
    ({"targets": "all-linear", "made": models.ATTENTION}, "does not fit the model: .* is missing"),
))  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused(base, tmp_path, then, match):
    def run(start="trained", rank=4, targets=models.ALL_LINEAR, **settings):
        loaded = models.load_model(base, lora=models.LoRA(rank=rank, targets=targets))
        if start == "trained":
            spread(loaded[0])
        return build(loaded, tmp_path, max_steps=2, **settings)

    made = {"targets": then.pop("made")} if "made" in then else {}
    run(save_strategy="steps", save_steps=1, **made).train()
    with pytest.raises(ValueError, match=match):
        run(**then).train(resume_from_checkpoint=tmp_path / "checkpoint-1")


SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from rlnb.train import ppo
from rlnb.model import load as models
from tests import test_ppo as t
base, folder, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
kill, resume, rollout = (settings.pop(k, None) for k in ("kill", "resume", "rollout"))
class Kill(t.transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == kill:
            os.kill(os.getpid(), signal.SIGKILL)
trainer = t.build(
    t.load(base, "trained"), folder, callbacks=[Kill()], rollout=t.script if rollout else None,
    reward=[t.length, t.digits], **settings)
trainer.train(resume_from_checkpoint=resume)
index, judged = trainer.args.process_index, trainer.evaluate(t.prompts(7))
judged = {k: v for k, v in judged.items() if not k.endswith(("_runtime", "_per_second"))}
t.torch.save({"weights": t.weights(trainer), "log": t.log(trainer), "eval": judged},
             folder / f"result_{index}.pt")
"""


def launch(base, folder, *command, **settings):
    """A run in a process of its own."""
    folder.mkdir(exist_ok=True)
    file = folder / "run.py"
    file.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, *command, str(file), str(base), str(folder), json.dumps(settings)],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def result(folder, process=0):
    return torch.load(folder / f"result_{process}.pt", weights_only=True)


def test_a_killed_process_goes_on_where_it_was(base, tmp_path):
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "num_ppo_epochs": 2,
        "kl_target": 1.0,
    }
    killed = launch(base, tmp_path / "cut", kill=3, **settings)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "cut" / "result_0.pt").exists()
    resumed = launch(base, tmp_path / "cut", resume=True, **settings)
    assert resumed.returncode == 0, resumed.stderr
    never = launch(base, tmp_path / "never", **settings)
    assert never.returncode == 0, never.stderr
    found, expected = result(tmp_path / "cut"), result(tmp_path / "never")
    assert found["log"] == expected["log"]
    assert_same(found["weights"], expected["weights"])


def test_two_processes_do_what_one_does(base, tmp_path):
    """Half of each batch on each: statistics and gradients are those of the whole batch."""
    settings = {
        "max_steps": 3, "rollout": True, "num_ppo_epochs": 2, "normalize_rewards": True,
        "whiten_rewards": True, "kl_target": 1.0, "kl_horizon": 50, "early_stop_kl": 10.0,
        "per_device_eval_batch_size": 2,
    }  # fmt: skip
    one = launch(base, tmp_path / "one", per_device_train_batch_size=8, **settings)
    assert one.returncode == 0, one.stderr
    # accelerate's name for a launch through torchrun; use_cpu=True puts both on the CPU.
    command = (
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no",
    )  # fmt: skip
    two = launch(base, tmp_path / "two", *command, per_device_train_batch_size=4,
                 ddp_backend="gloo", **settings)  # fmt: skip
    assert two.returncode == 0, two.stderr
    first, second = (result(tmp_path / "two", process) for process in (0, 1))
    assert_same(first["weights"], second["weights"])
    expected = result(tmp_path / "one")
    for row, other in zip(first["log"], expected["log"], strict=True):
        assert_same(row, other, rtol=2e-3, atol=2e-5)
    assert_same(first["eval"], second["eval"])
    assert_same(first["eval"], expected["eval"], rtol=2e-3, atol=2e-5)  # 7 rows, in batches of 4
    assert_same(first["weights"], expected["weights"], rtol=1e-2, atol=1e-4)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, match", (
    ({"gamma": 1.5}, "gamma is 1.5: it must be from 0 to 1"),
    ({"lam": -0.1}, "lam is -0.1"),
    ({"lam": float("nan")}, "lam is nan"),
    ({"cliprange": 0.0}, "cliprange is 0.0: it must be above 0"),
    ({"cliprange_value": -1.0}, "cliprange_value is -1.0"),
    ({"temperature": 0.0}, "temperature is 0.0: it must be above 0"),
    ({"top_p": 0.0}, "top_p is 0.0"),
    ({"vf_coef": -1.0}, "vf_coef is -1.0"),
    ({"kl_coef": "0.1"}, "kl_coef is '0.1'"),
    ({"kl_estimator": "k2"}, "kl_estimator is 'k2': it must be one of k1, k3"),
    ({"kl_target": 0.0}, "kl_target is 0.0"),
    ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_target is 6.0 and kl_coef 0"),
    ({"reference": None}, "reference is None, and kl_coef 0.05"),
    ({"value_model": "head"}, "value_model is 'head'"),
    ({"num_ppo_epochs": 0}, "num_ppo_epochs is 0"),
    ({"num_ppo_epochs": True}, "num_ppo_epochs is True"),
    ({"num_mini_batches": 3}, "num_mini_batches is 3, which does not divide the 8 rollouts"),
    ({"max_completion_length": 0}, "max_completion_length is 0"),
    ({"missing_eos_penalty": -1.0}, "missing_eos_penalty is -1.0: it must be 0 or more"),
    ({"reward_clip_range": (1.0, 1.0)}, r"reward_clip_range is \(1.0, 1.0\)"),
    ({"reward_clip_range": 5}, "reward_clip_range is 5"),
    ({"reward_weights": [float("inf")]}, "reward_weights is inf"),
    ({"early_stop_kl": 0.0}, "early_stop_kl is 0.0"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size changes what a step is"),
    ({"value_model": "adapter", "gradient_checkpointing": True}, "would use the wrong adapter"),
))  # fmt: skip
def test_settings_that_cannot_work_are_refused(tmp_path, settings, match):
    with pytest.raises(ValueError, match=match):
        config(tmp_path, **settings)


@pytest.mark.parametrize("settings, match", (
    ({"data": prompts(7)}, "train_dataset has 7 prompts, and a step takes 8"),
    ({"data": prompts().rename_column("prompt", "question")}, "needs a column 'prompt', and has"),
    ({"data": Dataset.from_dict({"prompt": ["pens " * 600] * 8})}, r"row 0: the prompt has \d+ tokens"),
    ({"max_prompt_length": 2}, r"the limit is 2 \(max_prompt_length\)"),
    ({"max_completion_length": 512}, "max_completion_length is 512, and the model has 512 positions"),
    ({"reference": "sft"}, "reference is 'sft': it must be 'start', 'base', None or another adapter"),
    ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 numbers for the 1 rewards digits"),
    ({"reward": [digits, digits]}, "rewards need names of their own"),
))  # fmt: skip
def test_what_does_not_fit_is_refused_before_the_first_step(base, tmp_path, settings, match):
    with pytest.raises(ValueError, match=match):
        build(load(base), tmp_path, **settings)


def test_models_that_cannot_be_policies_are_refused(base, tmp_path):
    with pytest.raises(TypeError, match="load it first"):
        build(("abacus-3m", None), tmp_path)
    frozen = load(base)
    frozen[0].requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model trains"):
        build(frozen, tmp_path)
    for settings, match in (
        ({"value_model": "adapter"}, "needs a model with LoRA"),
        ({"reference": "sft"}, "the model has no adapters"),
    ):
        with pytest.raises(ValueError, match=match):
            build(load(base, "whole"), tmp_path, **settings)


def test_a_base_that_trains_beside_its_adapter_is_refused(tmp_path):
    import peft

    made = peft.LoraConfig(
        r=4, target_modules=["q_proj"], bias="lora_only", task_type="CAUSAL_LM",
    )  # fmt: skip
    tokenizer = tiny.tokenizer()
    model = of_make("llama", len(tokenizer), attention_bias=True)
    with pytest.raises(ValueError, match=r"q_proj.*bias is of the base, which must be frozen"):
        build((peft.get_peft_model(model, made), tokenizer), tmp_path)


def test_a_base_that_its_adapter_has_changed_is_no_reference(base, tmp_path):
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    made = peft.LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights="olora", task_type="CAUSAL_LM"
    )
    loaded = peft.get_peft_model(model, made), tiny.tokenizer()
    with pytest.raises(ValueError, match="'olora' has changed the base's weights"):
        build(loaded, tmp_path, reference="base")
    trainer = build(loaded, tmp_path)  # the start, a copy of the adapter, is right
    trainer.train()
    assert log(trainer)[0]["kl"] == 0.0


@pytest.mark.parametrize("change, match", (
    (lambda f: f["completion_ids"].pop(), "7 completion_ids for 8 prompts"),
    (lambda f: f["completion_ids"][2].clear(), r"a completion of 0 tokens \(row 2\)"),
    (lambda f: f["prompt_ids"][1].clear(), r"a prompt of 0 tokens \(row 1\)"),
    (lambda f: f["completion_ids"][5].extend([7] * 9), "max_completion_length 6"),
))  # fmt: skip
def test_a_rollout_function_that_fails_is_told_so(base, tmp_path, change, match):
    def broken(texts, trainer):
        found = script(texts, trainer)
        change(found)
        return found

    with pytest.raises(ValueError, match=match):
        build(load(base), tmp_path, rollout=broken).train()
