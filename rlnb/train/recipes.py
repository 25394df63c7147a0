"""The settings of every method, under the names of the library that takes them.

``recipe("dpo")`` has the arguments of DPOConfig that its notebook's cell shows (a test compares the two),
``common(DPOConfig, seed)`` what is the same for all methods and no lesson. What matters is passed by name,
because Unsloth changes TRL's defaults on a GPU and not on a CPU.
"""

from collections.abc import Callable
from typing import Any

from rlnb.model import LoRA
from rlnb.profiles import PRACTICE, by, has_cuda, model_name
from rlnb.record import runs

import torch

# What no lesson is about and Unsloth sets otherwise on a GPU: the values of transformers.
TRAINING = dict(per_device_eval_batch_size=8, eval_accumulation_steps=None, torch_empty_cache_steps=None,
                logging_nan_inf_filter=True)  # fmt: skip
# TRL's own values of what Unsloth sets otherwise, by config class, and the length of a row.
DEFAULTS = {
    "SFTConfig": dict(gradient_accumulation_steps=1, max_length=None, padding_free=False),
    "RewardConfig": dict(max_length=512),
    "DPOConfig": dict(max_length=512, padding_free=False),
    "ORPOConfig": dict(max_length=512),
    # In order, because TRL pairs every completion with its neighbour's prompt to estimate the KL.
    "KTOConfig": dict(max_length=512, train_sampling_strategy="sequential"),
    "GRPOConfig": dict(epsilon_high=0.2, mask_truncated_completions=False, generation_kwargs=None,
                       router_aux_loss_coef=None, vllm_importance_sampling_correction=True),
    "RLOOConfig": dict(generation_kwargs=None),
    "PPOConfig": {},
}  # fmt: skip


def common(config: type, seed: int) -> dict[str, Any]:
    """Arguments of a config class that are no lesson's: folder, seed, schedule, precision, logging.

    The rate rises over five steps and falls in a straight line to zero. config: of TRL, or PPOConfig.
    """
    cuda = has_cuda()
    bf16 = not cuda or torch.cuda.is_bf16_supported(including_emulation=False)  # a T4 has none
    return dict(
        output_dir=str(runs.root() / ".trainer"),  # fit() moves it into the run's folder
        seed=seed,
        lr_scheduler_type="linear",
        warmup_steps=by(cpu=5, smoke=0),
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=bf16,
        fp16=not bf16,
        use_cpu=not cuda,
        gradient_checkpointing=cuda and model_name() != PRACTICE,
        dataloader_pin_memory=cuda,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,
    ) | TRAINING | DEFAULTS[config.__name__.removeprefix("Unsloth")]


def sft() -> dict[str, Any]:
    """Supervised fine-tuning on demonstrations."""
    return dict(
        learning_rate=by(cpu=2e-3, gpu=2e-4),
        max_steps=by(cpu=32, smoke=2),
        per_device_train_batch_size=16,
        completion_only_loss=True,
    )


def reward_model() -> dict[str, Any]:
    """A reward model under the Bradley-Terry model: loss -log sigmoid(r_chosen - r_rejected)."""
    return dict(
        learning_rate=by(cpu=1e-3, gpu=1e-4),
        max_steps=by(cpu=400, gpu=96, smoke=2),
        per_device_train_batch_size=by(cpu=32, gpu=8, smoke=16),
        gradient_accumulation_steps=by(cpu=1, gpu=2),
        center_rewards_coefficient=0.02,
    )


def dpo() -> dict[str, Any]:
    """Direct preference optimization (arXiv 2305.18290)."""
    return dict(
        learning_rate=by(cpu=2e-4, gpu=5e-6),
        max_steps=by(cpu=64, gpu=96, smoke=2),
        per_device_train_batch_size=by(cpu=16, gpu=8),
        gradient_accumulation_steps=by(cpu=1, gpu=2),
        beta=0.1,
        loss_type=["sigmoid"],
    )


def kto() -> dict[str, Any]:
    """Kahneman-Tversky optimization (arXiv 2402.01306); a batch counts labelled completions."""
    return dict(
        learning_rate=by(cpu=1e-4, gpu=5e-6),
        max_steps=by(cpu=64, gpu=96, smoke=2),
        per_device_train_batch_size=by(cpu=32, gpu=8, smoke=16),
        gradient_accumulation_steps=by(cpu=1, gpu=2),
        beta=0.1,
        desirable_weight=1.0,
        undesirable_weight=1.0,
    )


def orpo() -> dict[str, Any]:
    """Odds ratio preference optimization (arXiv 2403.07691); beta is the paper's lambda."""
    return dict(
        learning_rate=by(cpu=2e-3, gpu=5e-5),
        max_steps=by(cpu=64, gpu=96, smoke=2),
        per_device_train_batch_size=by(cpu=16, gpu=8),
        gradient_accumulation_steps=by(cpu=1, gpu=2),
        beta=0.1,
    )


def ppo() -> dict[str, Any]:
    """Proximal policy optimization with a critic (arXiv 1707.06347, as arXiv 2203.02155 uses it)."""
    return dict(
        learning_rate=by(cpu=3e-4, gpu=1e-5),
        value_learning_rate=by(cpu=1e-2, gpu=1e-4),
        max_steps=by(cpu=40, gpu=150, smoke=2),
        per_device_train_batch_size=by(cpu=64, gpu=16, smoke=16),
        gradient_accumulation_steps=by(cpu=1, gpu=4),
        max_completion_length=by(cpu=64, gpu=256, smoke=32),
        temperature=1.0,
        kl_coef=0.05,
        num_ppo_epochs=2,
        num_mini_batches=1,
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=0.1,
        gamma=1.0,
        lam=0.95,
        whiten_advantages=True,
    )


def rloo() -> dict[str, Any]:
    """REINFORCE with the other completions of the prompt as baseline (arXiv 2402.14740)."""
    return dict(
        learning_rate=by(cpu=5e-4, gpu=1e-5),
        max_steps=by(cpu=40, gpu=150, smoke=2),
        per_device_train_batch_size=by(cpu=64, gpu=16, smoke=16),
        gradient_accumulation_steps=by(cpu=1, gpu=4),
        num_generations=4,
        max_completion_length=by(cpu=64, gpu=256, smoke=32),
        temperature=1.0,
        beta=0.05,
    )


def grpo() -> dict[str, Any]:
    """Group relative policy optimization (arXiv 2402.03300); a batch counts completions."""
    return dict(
        learning_rate=by(cpu=2e-3, gpu=2e-5),
        max_steps=by(cpu=90, gpu=150, smoke=2),
        per_device_train_batch_size=by(cpu=64, gpu=16, smoke=16),
        gradient_accumulation_steps=by(cpu=1, gpu=4),
        num_generations=by(cpu=8, smoke=4),
        max_completion_length=by(cpu=64, gpu=256, smoke=32),
        temperature=1.0,
        beta=0.0,
        epsilon=0.2,
        loss_type="dapo",
        scale_rewards="group",
        reward_weights=[1.0, 0.25],
    )


def grpo_from_base() -> dict[str, Any]:
    """The same without demonstrations before it: more steps."""
    return grpo() | dict(max_steps=by(cpu=110, gpu=200, smoke=2))


RECIPES: dict[str, Callable[[], dict[str, Any]]] = {
    f.__name__: f for f in (sft, reward_model, ppo, rloo, dpo, kto, orpo, grpo, grpo_from_base)
}


def recipe(method: str) -> dict[str, Any]:
    """The settings of a method in the profile in force. Raises ValueError for an unknown method."""
    if method not in RECIPES:
        raise ValueError(f"no recipe for {method!r}; there are {', '.join(RECIPES)}.")
    return RECIPES[method]()


def adapter(method: str) -> LoRA:
    """The new adapter that a method starts with."""
    if method == "reward_model":
        return LoRA(rank=by(cpu=64, gpu=32), alpha=by(cpu=128, gpu=32))
    return LoRA(rank=by(cpu=16, gpu=32), alpha=32)
