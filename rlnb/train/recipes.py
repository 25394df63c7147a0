"""Settings of every method, one frozen dataclass each, in three profiles.

A profile changes sizes and the model, never the code that a reader sees:
``cpu`` (the practice model in minutes on two cores), ``gpu`` (a real small model), ``smoke`` (seconds, for CI).
Everything that matters is passed to TRL by name, because Unsloth rewrites TRL's defaults on a GPU and
not on a CPU.
"""

import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

from rlnb.task import problems

PROFILES = ("cpu", "gpu", "smoke")


@cache
def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def profile() -> str:
    """$RLNB_PROFILE, else "gpu" where there is a CUDA device, else "cpu"."""
    name = os.environ.get("RLNB_PROFILE") or ("gpu" if _has_cuda() else "cpu")
    if name not in PROFILES:
        raise ValueError(f"RLNB_PROFILE is {name!r}; the profiles are {', '.join(PROFILES)}.")
    return name


def model_name(name: str | None = None) -> str:
    """$RLNB_MODEL, else the practice model, or on the gpu profile a real small one from the hub."""
    default = "Qwen/Qwen2.5-0.5B-Instruct" if (name or profile()) == "gpu" else "abacus-3m"
    return os.environ.get("RLNB_MODEL") or default


def system(name: str | None = None) -> str | None:
    """The instruction that a real model gets. The practice model has never seen one and gets none."""
    return None if model_name(name) == "abacus-3m" else problems.SYSTEM


@dataclass(frozen=True)
class Recipe:
    """What all methods share. Sizes: ``batch`` in sequences per optimizer step, tokens otherwise."""

    method: ClassVar[str] = ""
    rank: int = 16
    alpha: int = 32
    learning_rate: float = 1e-3
    steps: int = 10
    batch: int = 16
    accumulate: int = 1  # the batch is cut into this many pieces to save memory
    max_new_tokens: int = 64  # a five-step solution of the practice model has some 55
    test_problems: int = 500  # held-out problems for the figure that the notebook reports
    max_lora_rank: int = 64  # the largest rank that rollouts serve

    def trl(self, folder: str | Path, seed: int) -> dict:
        """Arguments for TRL's config class. The rate falls in a straight line to zero after a short warm-up."""
        cuda = _has_cuda()
        bf16 = not cuda or _cuda_bf16()
        processes = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's and accelerate's
        if self.batch % (self.accumulate * processes):
            raise ValueError(
                f"batch={self.batch} cannot be cut into accumulate={self.accumulate} parts on each of "
                f"{processes} process(es): make it a multiple of {self.accumulate * processes}"
            )
        return dict(
            output_dir=str(folder),
            seed=seed,
            learning_rate=self.learning_rate,
            max_steps=self.steps,
            per_device_train_batch_size=self.batch // (self.accumulate * processes),
            gradient_accumulation_steps=self.accumulate,
            lr_scheduler_type="linear",
            warmup_steps=min(5, self.steps // 4),
            optim="adamw_torch",
            weight_decay=0.0,
            max_grad_norm=1.0,
            bf16=bf16,
            fp16=not bf16,  # a T4 has no bf16
            use_cpu=not cuda,
            gradient_checkpointing=cuda and model_name() != "abacus-3m",
            dataloader_pin_memory=cuda,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=False,
        )


def _cuda_bf16() -> bool:
    import torch

    return torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass(frozen=True)
class SFT(Recipe):
    """Supervised fine-tuning on demonstrations."""

    method: ClassVar[str] = "sft"
    learning_rate: float = 2e-3
    steps: int = 32
    batch: int = 16
    demonstrations: int = 128

    def trl(self, folder: str | Path, seed: int) -> dict:
        return super().trl(folder, seed) | dict(
            max_length=None, packing=False, completion_only_loss=True, loss_type="nll"
        )


@dataclass(frozen=True)
class GRPO(Recipe):
    """Group relative policy optimization (arXiv 2402.03300)."""

    method: ClassVar[str] = "grpo"
    learning_rate: float = 2e-3
    steps: int = 90
    batch: int = 64  # completions per step = prompts x group
    group: int = 8  # completions per prompt (num_generations)
    temperature: float = 1.0
    beta: float = 0.0  # weight of the KL term; 0 needs no reference
    format_weight: float = 0.25  # exact in binary: equal rewards then deviate by exactly 0

    def trl(self, folder: str | Path, seed: int) -> dict:
        if self.batch % self.group:
            raise ValueError(
                f"batch={self.batch} completions per step cannot be cut into groups of {self.group}: "
                f"make batch a multiple of group, e.g. {self.group * max(1, self.batch // self.group)}."
            )
        return super().trl(folder, seed) | dict(
            num_generations=self.group,
            generation_batch_size=self.batch,
            max_completion_length=self.max_new_tokens,
            temperature=self.temperature,
            top_p=1.0,
            top_k=0,
            beta=self.beta,
            num_iterations=1,
            epsilon=0.2,
            loss_type="dapo",
            scale_rewards="group",
            mask_truncated_completions=False,
            log_completions=False,
        )


@dataclass(frozen=True)
class Pairs(Recipe):
    """What learns from pairs of a chosen and a rejected completion. ``batch`` counts pairs."""

    pairs: int = 512

    def trl(self, folder: str | Path, seed: int) -> dict:
        return super().trl(folder, seed) | dict(max_length=512, disable_dropout=True)


@dataclass(frozen=True)
class RewardModel(Pairs):
    """A reward model under the Bradley-Terry model: loss -log sigmoid(r_chosen - r_rejected)."""

    method: ClassVar[str] = "reward_model"
    rank: int = 64
    alpha: int = 128
    learning_rate: float = 1e-3  # at 2e-3 it diverges now and then
    steps: int = 400
    batch: int = 32
    pairs: int = 4096
    center: float = 0.02  # pulls r_chosen + r_rejected to 0, so that prompts can be compared

    def trl(self, folder: str | Path, seed: int) -> dict:
        return super().trl(folder, seed) | dict(center_rewards_coefficient=self.center)


@dataclass(frozen=True)
class DPO(Pairs):
    """Direct preference optimization (arXiv 2305.18290)."""

    method: ClassVar[str] = "dpo"
    learning_rate: float = 2e-4
    steps: int = 64
    batch: int = 16
    beta: float = 0.1

    def trl(self, folder: str | Path, seed: int) -> dict:
        return super().trl(folder, seed) | dict(beta=self.beta, loss_type=["sigmoid"])


@dataclass(frozen=True)
class KTO(Pairs):
    """Kahneman-Tversky optimization (arXiv 2402.01306). ``batch`` counts labelled completions."""

    method: ClassVar[str] = "kto"
    learning_rate: float = 1e-4  # at twice this one seed gains 15 points and another loses 3
    steps: int = 64
    batch: int = 32
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def trl(self, folder: str | Path, seed: int) -> dict:
        # Sequential, because TRL pairs every completion with its neighbour's prompt to estimate the KL.
        return super().trl(folder, seed) | dict(
            beta=self.beta, loss_type="kto", desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight, train_sampling_strategy="sequential",
        )  # fmt: skip


@dataclass(frozen=True)
class ORPO(Pairs):
    """Odds ratio preference optimization (arXiv 2403.07691); beta is the paper's lambda."""

    method: ClassVar[str] = "orpo"
    learning_rate: float = 2e-3
    steps: int = 64
    batch: int = 16
    beta: float = 0.1

    def trl(self, folder: str | Path, seed: int) -> dict:
        return super().trl(folder, seed) | dict(beta=self.beta)


@dataclass(frozen=True)
class RLHF(Recipe):
    """What learns from a reward model's scores: PPO and RLOO. ``batch`` counts completions."""

    learning_rate: float = 1e-3
    steps: int = 40
    batch: int = 64
    temperature: float = 1.0
    kl_coef: float = 0.05  # nats of KL from the start that one point of reward outweighs: 1 / kl_coef

    def trl(self, folder: str | Path, seed: int) -> dict:
        return super().trl(folder, seed) | dict(
            max_completion_length=self.max_new_tokens, temperature=self.temperature, top_p=1.0
        )


@dataclass(frozen=True)
class PPO(RLHF):
    """Proximal policy optimization with a critic (arXiv 1707.06347, as arXiv 2203.02155 uses it)."""

    method: ClassVar[str] = "ppo"
    learning_rate: float = 3e-4  # at 1e-3 it is right as often, after three times the way
    epochs: int = 2  # passes over each batch of rollouts
    lam: float = 0.95
    value_model: str = "trunk"
    value_learning_rate: float = 1e-2  # the critic's head starts from nothing

    def trl(self, folder: str | Path, seed: int) -> dict:
        return super().trl(folder, seed) | dict(
            num_ppo_epochs=self.epochs, num_mini_batches=1, kl_coef=self.kl_coef, gamma=1.0,
            lam=self.lam, vf_coef=0.1, cliprange=0.2, cliprange_value=0.2, whiten_advantages=True,
            value_model=self.value_model, value_learning_rate=self.value_learning_rate,
        )  # fmt: skip


@dataclass(frozen=True)
class RLOO(RLHF):
    """REINFORCE with the other completions of the prompt as baseline (arXiv 2402.14740)."""

    method: ClassVar[str] = "rloo"
    learning_rate: float = 5e-4  # at 1e-3 it pleases the judge more, and is right less often
    group: int = 4  # completions per prompt (num_generations)

    def trl(self, folder: str | Path, seed: int) -> dict:
        return super().trl(folder, seed) | dict(
            num_generations=self.group, generation_batch_size=self.batch, top_k=0,
            beta=self.kl_coef, num_iterations=1, epsilon=0.2, normalize_advantages=False,
            mask_truncated_completions=False, log_completions=False,
        )  # fmt: skip


_GPU = dict(rank=32, alpha=32, max_new_tokens=256, test_problems=500)
_SMOKE = dict(steps=2, batch=16, test_problems=16, max_new_tokens=32)


def _profiles(method: type[Recipe], gpu: dict, smoke: dict, **cpu) -> dict[str, Recipe]:
    return {"cpu": method(**cpu), "gpu": method(**_GPU | gpu), "smoke": method(**_SMOKE | smoke)}


_GRPO_GPU = dict(learning_rate=2e-5, batch=64, accumulate=4)
_PAIRS_GPU = dict(steps=96, batch=16, accumulate=2)
_RLHF_GPU = dict(learning_rate=1e-5, steps=150, accumulate=4)
RECIPES: dict[str, dict[str, Recipe]] = {
    "sft": _profiles(SFT, dict(learning_rate=2e-4, demonstrations=256), dict(demonstrations=16)),
    "reward_model": _profiles(RewardModel, _PAIRS_GPU | dict(learning_rate=1e-4), dict(pairs=32)),
    "dpo": _profiles(DPO, _PAIRS_GPU | dict(learning_rate=5e-6), dict(pairs=32)),
    "kto": _profiles(KTO, _PAIRS_GPU | dict(learning_rate=5e-6), dict(pairs=32)),
    "orpo": _profiles(ORPO, _PAIRS_GPU | dict(learning_rate=5e-5), dict(pairs=32)),
    "ppo": _profiles(PPO, _RLHF_GPU | dict(value_learning_rate=1e-4), dict()),
    "rloo": _profiles(RLOO, _RLHF_GPU, dict()),
    "grpo_from_base": _profiles(GRPO, _GRPO_GPU | dict(steps=200), dict(group=4), steps=110),
    "grpo": _profiles(GRPO, _GRPO_GPU | dict(steps=150), dict(group=4)),
}


def recipe(method: str, name: str | None = None, **changes) -> Recipe:
    """The settings of a method in a profile, with some of them changed.

    Raises ValueError for an unknown method and TypeError for an unknown setting, listing those there are.
    """
    if method not in RECIPES:
        raise ValueError(f"no recipe for {method!r}; there are {', '.join(RECIPES)}.")
    base = RECIPES[method][name or profile()]
    if unknown := set(changes) - set(vars(base)):
        raise TypeError(
            f"{method} has no setting {sorted(unknown)}; it has {', '.join(vars(base))}."
        )
    return replace(base, **changes)
