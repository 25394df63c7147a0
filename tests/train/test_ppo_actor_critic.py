"""Log-probabilities, values and adapters of PPO's one base: padding, other makes, large vocabularies."""

import random

import pytest

from rlnb.model import adapters, sampling
from rlnb.train.ppo import actor_critic
from rlnb.train.ppo.rollouts import lay_out
from tests import tiny
from tests.train.ppo_tiny import (
    END, PAD, adapted, assert_same, build, load, log, naive_log_probs, of_make, prompts, spread,
)  # fmt: skip

import peft
import torch
import transformers


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny")


def laid_out(prompt_ids, completion_ids, pad=PAD):
    found = {"prompt_ids": prompt_ids, "completion_ids": completion_ids}
    return lay_out(found, {END}, pad)


@pytest.mark.parametrize("kind", ("llama", "mistral", "gpt2", "gemma2"))
def test_padding_early_ends_and_truncation_leave_log_probs_as_they_are(kind):
    model, dice = of_make(kind), random.Random(0)
    cases = ((3, 5), (20, 1), (1, 6), (9, 6), (2, 2))  # tokens of prompt and completion
    rows = [[[dice.randint(2, 119) for _ in range(n)] for n in case] for case in cases]
    rows[0][1][-1] = rows[1][1][-1] = END
    with torch.no_grad():
        expected = [naive_log_probs(model, *row) for row in rows]
        actor = actor_critic.ActorCritic(adapted(model))
        assert actor.plain_head == (kind != "gemma2")
        torch.nn.init.normal_(actor.value_head.weight)
        for pad in (PAD, END, 50):
            batch = laid_out(*zip(*rows, strict=True), pad)
            found, _, values = actor(batch.ids_BL, batch.predicts_BL)
            torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)
            single = [actor(batch.ids_BL[i : i + 1, :n], batch.predicts_BL[i : i + 1, :n])
                      for i, n in enumerate(batch.length_B)]  # fmt: skip
            unpadded = torch.cat([v for _, _, v in single])
            torch.testing.assert_close(values, unpadded, rtol=1e-4, atol=1e-4)
    assert batch.finished_B.tolist() == [True, True, False, False, False]


def test_log_probs_are_those_of_the_left_padded_sampler(base):
    """Greedy decoding pads on the left; the most likely token must be so here as well."""
    model, tokenizer = load(base, "trained")
    spread(model, std=0.5)
    questions = prompts(12)["prompt"]
    found = sampling.sample(
        model, tokenizer, questions, max_new_tokens=6, temperature=0, progress=False
    )
    batch = laid_out(sampling.tokenize(tokenizer, questions), [row[0] for row in found.ids])
    actor = actor_critic.ActorCritic(model.eval())
    ends, last = batch.mask_BT.sum(1).cumsum(0) - 1, batch.length_B - 1
    with torch.no_grad():
        best, _, _ = actor(batch.ids_BL, batch.predicts_BL)
        for other in range(4, 60):
            changed = batch.ids_BL.clone()
            changed[torch.arange(12), last] = other
            lower, _, _ = actor(changed, batch.predicts_BL)
            assert (lower[ends] <= best[ends] + 1e-5).all()


def test_a_large_vocabulary_in_pieces_gives_the_same_numbers(monkeypatch):
    head = torch.nn.Linear(8, 30, bias=False)
    hidden, targets = torch.randn(50, 8), torch.randint(30, (50,))
    found = []
    for at_once in (2**25, 30 * 7):
        monkeypatch.setattr(actor_critic, "LOGITS_AT_ONCE", at_once)
        x = hidden.clone().requires_grad_()
        log_probs, entropies = actor_critic.token_statistics(x, head, targets, 0.7, entropy=True)
        (log_probs.sum() + entropies.sum()).backward()
        found.append({"log_probs": log_probs, "entropies": entropies, "gradient": x.grad})
    assert_same(*found, rtol=1e-5, atol=1e-6)
    p = (head(hidden) / 0.7).softmax(-1)
    torch.testing.assert_close(found[0]["entropies"], -(p * p.log()).sum(-1))
    chosen = p.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found[0]["log_probs"], chosen.log())


def test_the_reference_is_where_the_policy_starts(base, tmp_path):
    for start in ("new", "trained"):
        trainer = build(load(base, start), tmp_path, max_steps=3)
        trainer.train()
        assert [row["kl/sequence"] == 0 for row in log(trainer)] == [True, False, False]
        assert log(trainer)[-1]["kl"] != 0


def test_the_kl_is_measured_where_it_costs_no_reward(base, tmp_path):
    trainer = build(load(base, "trained"), tmp_path, max_steps=2, kl_coef=0.0)
    trainer.train()
    assert log(trainer)[1]["kl"] != 0


@pytest.mark.parametrize("start", ("new", "trained"))
def test_the_reference_at_work_leaves_the_policy_as_it_was(base, start):
    model, _ = load(base, start)
    actor_critic.add_reference(model.eval())
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n for n, on in flags.items() if on} == {n for n in flags if ".default." in n}
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        policy = model(input_ids=ids).logits
        with pytest.raises(KeyboardInterrupt), adapters.using(model, "ref"):
            assert torch.equal(model(input_ids=ids).logits, policy)  # it has not moved yet
            raise KeyboardInterrupt
        assert model.active_adapter == "default"
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
        spread(model, seed=2)
        moved = model(input_ids=ids).logits
        assert not torch.equal(moved, policy)
        with adapters.using(model, "ref"):
            found = model(input_ids=ids).logits
            torch.testing.assert_close(found, policy, rtol=1e-5, atol=1e-6)
        assert torch.equal(model(input_ids=ids).logits, moved)


def test_models_that_cannot_be_policies_are_refused(base, tmp_path):
    frozen = load(base)
    frozen[0].requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model trains"):
        build(frozen, tmp_path)
    with pytest.raises(ValueError, match="is a LlamaForCausalLM without an adapter"):
        build((of_make("llama"), tiny.tokenizer()), tmp_path)
    others, tokenizer = load(base)
    others.add_adapter("other", others.peft_config["default"])
    others.set_adapter("other")
    with pytest.raises(ValueError, match="is not of the adapter 'default' and trains"):
        build((others, tokenizer), tmp_path)


def test_a_base_that_trains_beside_its_adapter_is_refused(tmp_path):
    lora = peft.LoraConfig(
        r=4, target_modules=["q_proj"], bias="lora_only", task_type="CAUSAL_LM"
    )
    tokenizer = tiny.tokenizer()
    model = of_make("llama", len(tokenizer), attention_bias=True)
    with pytest.raises(ValueError, match=r"q_proj.*bias is not of the adapter 'default' and trains"):
        build((peft.get_peft_model(model, lora), tokenizer), tmp_path)


def test_an_adapter_that_has_changed_its_base_is_its_own_reference(base, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    lora = peft.LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights="olora", task_type="CAUSAL_LM"
    )
    trainer = build((peft.get_peft_model(model, lora), tiny.tokenizer()), tmp_path)
    trainer.train()
    assert log(trainer)[0]["kl"] == 0.0  # the base with the adapter off would be another model


def test_pieces_are_recomputed_by_torch_where_unsloth_has_its_own_checkpoint(monkeypatch):
    """On a GPU Unsloth replaces torch.utils.checkpoint.checkpoint by one that is always reentrant."""
    from torch.utils import checkpoint as checkpointing

    def reentrant(*args, **kwargs):
        raise AssertionError("Unsloth's checkpoint was called")

    head, target = torch.nn.Linear(4, 8, bias=False), torch.tensor([1, 2, 3])
    x = torch.randn(3, 4, requires_grad=True)
    expected, _ = actor_critic.token_statistics(x, head, target, 1.0, False)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    monkeypatch.setattr(actor_critic, "LOGITS_AT_ONCE", 8)  # a token at a time
    monkeypatch.setattr(checkpointing, "_unsloth_pristine_checkpoint", checkpointing.checkpoint, raising=False)
    monkeypatch.setattr(checkpointing, "checkpoint", reentrant)
    found, _ = actor_critic.token_statistics(x, head, target, 1.0, False)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], gradient)
