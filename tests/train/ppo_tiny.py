"""Tiny models, prompts and scripted completions for the tests of PPO.

Completions come from `script` wherever sampling is not the point: a function of the prompt alone, so that
whatever else differs between two runs, the batches are the same.
"""

import random

from rlnb.model import LoRA, load_model, sampling
from rlnb.task import rewards
from rlnb.train import ppo
from rlnb.train.ppo.rollouts import lay_out

import peft
import torch
import transformers
from datasets import Dataset

WORDS = ("apples", "pens", "boxes", "12", "5", "34", "more", "left", "7 boxes", "Anna has 12")
QUESTIONS = [f"{a} {b}?" for a in WORDS for b in WORDS[: 1 + len(a) % 4]]  # of many lengths
END, PAD = 1, 0

transformers.utils.logging.disable_progress_bar()


def prompts(n=24, chat=True):
    texts = [QUESTIONS[i % len(QUESTIONS)] for i in range(n)]
    rows = [[{"role": "user", "content": text}] for text in texts] if chat else texts
    return Dataset.from_dict({"prompt": rows, "number": list(range(n))})


def script(texts, trainer):
    """Completions of 1 to 6 tokens: some end early, some are cut off, all follow from the prompt."""
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
    """A policy: with a new adapter, or with one that has learnt something."""
    model, tokenizer = load_model(base, lora=LoRA(rank=4, dropout=dropout))
    if start == "trained":
        spread(model)
    return model, tokenizer


def spread(model, seed=1, std=0.05):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            parameter.data.normal_(0, std, generator=generator)


def config(folder, **settings):
    usual = {
        "max_steps": 1, "per_device_train_batch_size": 8, "max_completion_length": 6,
        "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "bf16": False, "num_ppo_epochs": 1, "disable_tqdm": True, "value_learning_rate": 1e-2,
    }  # fmt: skip
    return ppo.PPOConfig(output_dir=str(folder), **usual | settings)


def build(loaded, folder, reward=digits, data=None, rollout=script, callbacks=None, **settings):
    model, tokenizer = loaded
    trainer = ppo.PPOTrainer(
        model, config(folder, **settings), reward, data or prompts(), tokenizer, callbacks=callbacks
    )
    if rollout:  # in the place of samples
        pad = trainer.processing_class.pad_token_id or 0
        trainer._roll_out = lambda rows: lay_out(
            rollout([row["prompt"] for row in rows], trainer), trainer.end_tokens, pad, trainer.accelerator.device
        )
    return trainer


def batch_of(trainer, n=8, advantages=True):
    """The first rows of the data, rolled out, scored and, if asked for, with their advantages."""
    rows = [trainer.train_dataset[i] for i in range(n)]
    batch = trainer._roll_out(rows)
    trainer._score(batch, rows)
    if advantages:
        trainer._measure(batch, [torch.arange(n)])
        trainer._estimate_advantages(batch)
    return batch


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


def naive_log_probs(model, prompt, completion):
    """One row, nothing padded, the model's own forward."""
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def of_make(kind, vocabulary=120, **more):
    """Random models of other makes: learned positions, logits that are capped."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": END, "pad_token_id": PAD,
    }  # fmt: skip
    if kind == "gpt2":
        shape = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **sizes)
    elif kind == "gemma2":
        shape = transformers.Gemma2Config(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, final_logit_softcapping=0.5, sliding_window=8, **sizes,
        )  # fmt: skip
    else:
        shape = transformers.LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, **sizes | more
        )
    model = transformers.AutoModelForCausalLM.from_config(shape).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def adapted(model, rank=8):
    """The model with a new adapter on all its linear layers."""
    lora = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora)
