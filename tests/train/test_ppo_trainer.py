"""PPOTrainer on tiny models: exactness at the first update, closed forms, masks, what is refused."""

import pytest

from rlnb.train import ppo
from tests import tiny
from tests.train.ppo_tiny import (
    END, adapted, assert_same, batch_of, build, config, digits, load, log, naive_log_probs, of_make,
    prompts, script, spread, weights,
)  # fmt: skip

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize("bf16", (False, True))
@pytest.mark.parametrize("start", ("new", "trained"))
def test_at_the_first_update_the_ratio_is_1_and_the_kl_0(base, tmp_path, start, bf16):
    loaded = load(base, start, dropout=0.5)
    trainer = build(
        loaded, tmp_path, rollout=None, bf16=bf16, num_mini_batches=1, per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    trainer.train()
    (row,) = log(trainer)
    assert row["policy/ratio"] == 1.0
    assert row["policy/approx_kl"] == row["policy/clipfrac"] == 0.0
    assert row["kl"] == row["kl/sequence"] == 0.0
    assert row["reward"] > 0 and row["grad_norm"] > 0


def test_advantages_are_white_before_the_updates(base, tmp_path):
    batch = batch_of(build(load(base), tmp_path))
    real = batch.advantages_BT[batch.mask_BT]
    assert real.mean().item() == pytest.approx(0, abs=1e-6)
    assert real.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert not batch.advantages_BT[~batch.mask_BT].any()


def test_lambda_1_with_a_critic_at_zero_is_reinforce_with_a_baseline(base, tmp_path):
    """Williams 1992: the gradient of -mean of (R_t - b) log p(token), R_t the reward to go."""
    grads = {}

    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            grads.update(
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            )

    loaded = load(base, "trained")
    trainer = build(
        loaded, tmp_path, callbacks=[Keep()], vf_coef=0.0, lam=1.0, gamma=1.0, kl_coef=0.0,
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


def test_gradients_of_the_whole_loss_are_finite_differences(tmp_path):
    """On GPT-2, which computes in float64 throughout if asked to; Llama's norms don't."""
    tokenizer = tiny.tokenizer()
    trainer = build(
        (adapted(of_make("gpt2", len(tokenizer))), tokenizer), tmp_path, vf_coef=0.5,
        cliprange=5.0, cliprange_value=5.0, kl_coef=0.0,
    )  # fmt: skip
    spread(trainer.model)
    torch.nn.init.normal_(trainer.actor_critic.value_head.weight)
    rows, batch = torch.arange(8), batch_of(trainer)
    actor = trainer.actor_critic.double()
    for name, x in vars(batch).items():
        if torch.is_tensor(x) and x.is_floating_point():
            setattr(batch, name, x.double() + (0.1 if name == "log_probs_BT" else 0.0))

    def loss():
        return trainer._losses(actor, batch, rows)[0].mean()

    loss().backward()
    for name in ("h.0.attn.c_attn.lora_A.default.weight", "h.1.mlp.c_fc.lora_B.default.weight", "value_head.weight"):
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


def toy(words=("<pad>", "<end>", "a", "b"), width=32):
    """A language of four words: a bandit with four arms."""
    inner = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )
    torch.manual_seed(3)
    shape = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=width, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=16, eos_token_id=1, pad_token_id=0,
        bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return adapted(transformers.LlamaForCausalLM(shape), rank=width), tokenizer


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


def test_the_critic_learns_what_the_prompt_says_of_the_reward(base, tmp_path):
    """The reward is told by the prompt alone, so V can explain all of it."""
    data = prompts(16).add_column("pay", [float(i % 2) for i in range(16)])
    questions = [[{"role": "user", "content": f"{w}?"}] for w in ("34", "pens")] * 8
    data = data.remove_columns("prompt").add_column("prompt", questions)
    trainer = build(
        load(base), tmp_path, lambda completions, pay, **_: pay, data, max_steps=30, lam=1.0,
        per_device_train_batch_size=16, vf_coef=1.0, num_ppo_epochs=2, kl_coef=0.0, cliprange_value=1e6,
        whiten_advantages=False, learning_rate=1e-3, value_learning_rate=1e-2,
    )  # fmt: skip
    trainer.train()
    assert log(trainer)[0]["value/explained_variance"] == pytest.approx(0, abs=1e-6)
    assert log(trainer)[-1]["value/explained_variance"] > 0.9


def test_neither_padding_nor_pieces_change_a_step(base, tmp_path):
    """Rows one at a time have no padding at all."""
    found = []
    for size in (8, 4, 1):
        trainer = build(
            load(base, "trained"), tmp_path, data=prompts(8), max_steps=2,
            per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
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
        trainer = build(loaded, tmp_path, data=prompts(8), max_steps=2)
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
    assert row["completions/clipped_ratio"] == pytest.approx(1 - sum(ended) / 8)
    assert row["num_tokens"] == sum(sizes) + sum(map(len, found["prompt_ids"]))


def test_a_step_on_a_real_rollout_has_all_the_figures(base, tmp_path):
    trainer = build(load(base), tmp_path, rollout=None, num_ppo_epochs=2, num_mini_batches=2)
    trainer.train()
    row = trainer.state.log_history[0]
    for name in (
        "loss", "grad_norm", "learning_rate", "num_tokens", "completions/mean_length",
        "completions/clipped_ratio", "reward", "reward_std", "rewards/digits/mean", "kl", "kl/sequence",
        "entropy", "policy/loss", "policy/approx_kl", "policy/clipfrac", "policy/ratio", "value/loss",
        "value/explained_variance",
        "step_time",
    ):  # fmt: skip
        assert isinstance(row[name], float), name
    assert 4 < row["entropy"] <= torch.tensor(trainer.model.config.vocab_size).log()


def test_the_critic_has_a_learning_rate_of_its_own(base, tmp_path):
    trainer = build(load(base, "trained"), tmp_path, value_learning_rate=0.0, max_steps=2)
    trainer.train()
    assert not trainer.actor_critic.value_head.weight.any()
    trainer = build(load(base, "trained"), tmp_path, learning_rate=0.0, value_learning_rate=0.1)
    before = weights(trainer)
    trainer.train()
    changed = {n for n, p in weights(trainer).items() if not torch.equal(p, before[n])}
    assert changed == {"value_head.weight", "value_head.bias"}


def test_gradient_checkpointing_changes_nothing(base, tmp_path):
    """The value's gradient reaches the trunk, and the reference and a recompute switch adapters in turn."""
    found, grads = [], []

    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            grads[-1] |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    for on in (False, True):
        trainer = build(
            load(base, "trained"), tmp_path, data=prompts(8), gradient_checkpointing=on, vf_coef=5.0,
            max_steps=2, callbacks=[Keep()],
        )  # fmt: skip
        torch.nn.init.ones_(trainer.actor_critic.value_head.weight)
        grads.append({})
        trainer.train()
        assert trainer.model.is_gradient_checkpointing is on
        found.append(weights(trainer))
    assert_same(*grads, rtol=1e-4, atol=1e-6)
    assert all(g.any() for n, g in grads[1].items())
    assert_same(*found, rtol=1e-5, atol=1e-6)


def test_callbacks_see_one_step_per_batch_and_the_language_model(base, tmp_path):
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.append((state.global_step, "default" in model.peft_config))

    trainer = build(
        load(base), tmp_path, callbacks=[Watch()], max_steps=3, num_ppo_epochs=2, num_mini_batches=4
    )
    trainer.train()
    assert seen == [(1, True), (2, True), (3, True)]


def test_of_trainer_only_what_is_meant_is_overridden():
    """A helper that happens to have the name of one of Trainer's breaks what is not tested here."""
    own = set(vars(ppo.PPOTrainer))
    shared = {n for n in own & set(dir(transformers.Trainer)) if not n.startswith("__")}
    assert shared == {
        "training_step", "create_optimizer", "log", "_wrap_model", "_save", "_load_from_checkpoint",
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
    line = "--output_dir x --reward_weights 1 0.5 --use_cpu --value_learning_rate 0.01"
    (found,) = parser.parse_args_into_dataclasses(line.split())
    assert (found.value_learning_rate, found.reward_weights) == (0.01, [1.0, 0.5])
    assert found.cliprange == 0.2


@pytest.mark.parametrize("settings, match", (
    ({"gamma": 1.5}, "gamma is 1.5: it must be a number from 0 to 1"),
    ({"lam": -0.1}, "lam is -0.1"),
    ({"lam": float("nan")}, "lam is nan"),
    ({"cliprange": 0.0}, "cliprange is 0.0: it must be a number from 1e-06 to inf"),
    ({"cliprange_value": -1.0}, "cliprange_value is -1.0"),
    ({"temperature": 0.0}, "temperature is 0.0"),
    ({"vf_coef": -1.0}, "vf_coef is -1.0"),
    ({"vf_coef": None}, "vf_coef is None"),
    ({"kl_coef": "0.1"}, "kl_coef is '0.1'"),
    ({"num_ppo_epochs": 0}, "num_ppo_epochs is 0: it must be a whole number of at least 1"),
    ({"num_ppo_epochs": True}, "num_ppo_epochs is True"),
    ({"num_mini_batches": 3}, "num_mini_batches is 3, which does not divide the 8 rollouts"),
    ({"max_completion_length": 0}, "max_completion_length is 0"),
))  # fmt: skip
def test_settings_that_cannot_work_are_refused(tmp_path, settings, match):
    with pytest.raises(ValueError, match=match):
        config(tmp_path, **settings)


@pytest.mark.parametrize("settings, match", (
    ({"data": prompts(7)}, "and 7 rows: it needs a column 'prompt', and a step takes 8 rows"),
    ({"data": prompts().rename_column("prompt", "question")}, "the columns .*question.* needs a column 'prompt'"),
    ({"reward_weights": [1.0, 2.0]}, r"reward_weights is \[1.0, 2.0\]: give a number for each reward, \['digits'\]"),
    ({"reward": [digits, digits]}, "and each a name of its own"),
))  # fmt: skip
def test_what_does_not_fit_is_refused_before_the_first_step(base, tmp_path, settings, match):
    with pytest.raises(ValueError, match=match):
        build(load(base), tmp_path, **settings)
