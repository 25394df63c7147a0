"""The settings of PPO, checked at construction."""

import math
from dataclasses import dataclass

from rlnb.model.lora import check_positive_int

from transformers import TrainingArguments  # after rlnb.model, which brings in Unsloth

WHOLE = ("max_completion_length", "num_ppo_epochs", "num_mini_batches")
RANGES = {"gamma": (0, 1), "lam": (0, 1)}  # the lowest and the highest value that can work
RANGES |= dict.fromkeys(("kl_coef", "vf_coef", "value_learning_rate"), (0, math.inf))
RANGES |= dict.fromkeys(("temperature", "cliprange", "cliprange_value"), (1e-6, math.inf))


@dataclass
class PPOConfig(TrainingArguments):
    """transformers' TrainingArguments and what PPO adds to them. Names are those of TRL.

    One step of the trainer (max_steps, save_steps, logging_steps, the learning rate's schedule) is one batch
    of rollouts and all updates on it. On each process the batch has per_device_train_batch_size *
    gradient_accumulation_steps prompts, with one completion each. It makes num_mini_batches updates in each
    of num_ppo_epochs; a mini-batch goes through the model in pieces of at most per_device_train_batch_size
    sequences. Prompts at the end of an epoch that fill no batch are left out.

        max_completion_length: tokens; where a completion has not ended by then it is cut off.
        temperature: of sampling. Log-probabilities are those at this temperature.
        reward_weights: one number per reward, default 1 each.
        kl_coef: beta, the weight of the KL penalty for each token (Ouyang et al. 2022, eq. 2; they had
            0.02). The KL is measured from where the policy starts. 0: no penalty.
        gamma: discount (GAE, 2016), 1 for texts. lam: lambda of eq. 16, from 0 (trust the critic) to 1
            (trust the rewards).
        whiten_advantages: mean 0 and variance 1 over the real tokens of the batch.
        cliprange: eps of PPO (2017), eq. 7. cliprange_value: the same for the value, in units of reward
            (Stiennon et al. 2020).
        vf_coef: weight of the value loss (c1 of PPO's eq. 9).
        value_learning_rate: of the critic's head.

    Raises ValueError for a value that cannot work.
    """

    learning_rate: float = 3e-5  # ten times that of TRL's PPO for full models, as LoRA wants it
    logging_steps: float = 10
    remove_unused_columns: bool = False  # reward functions get all columns

    max_completion_length: int = 256
    temperature: float = 1.0
    reward_weights: list[float] | None = None
    kl_coef: float = 0.05
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool = True
    num_ppo_epochs: int = 4
    num_mini_batches: int = 1
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    value_learning_rate: float = 3e-3

    def __post_init__(self):
        super().__post_init__()
        for name in WHOLE:
            check_positive_int(name, getattr(self, name))
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{name} is {value!r}: it must be a number from {low:g} to {high:g}")
        rollouts = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if rollouts % self.num_mini_batches:
            says = "of a step, per_device_train_batch_size * gradient_accumulation_steps: change one of the three"
            wrong = f"num_mini_batches is {self.num_mini_batches}, which does not divide the {rollouts} rollouts"
            raise ValueError(f"{wrong} {says}")
