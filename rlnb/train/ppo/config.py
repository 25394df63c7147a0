"""The settings of PPO, checked as they are made."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from rlnb.model import load as models

models.backend()  # Unsloth before transformers

from transformers import TrainingArguments  # noqa: E402


@dataclass
class PPOConfig(TrainingArguments):
    """transformers' TrainingArguments and what PPO adds to them. Names are those of TRL.

    One step of the trainer (max_steps, save_steps, logging_steps, the learning rate's schedule) is one
    batch of rollouts and all updates on it. On each process the batch has per_device_train_batch_size *
    gradient_accumulation_steps prompts, with one completion each. It makes num_mini_batches updates in
    each of num_ppo_epochs; a mini-batch goes through the model in pieces of at most
    per_device_train_batch_size sequences. Prompts at the end of an epoch that make no whole batch are
    left out.

    Rollouts:
        max_completion_length: tokens; where a completion has not ended by then it is cut off.
        max_prompt_length: None, or the longest prompt in tokens that is let in: a longer one is an
            error. Prompts are never cut.
        temperature, top_p: of sampling. Log-probabilities are those at this temperature.
        chat_template_kwargs: further arguments of the tokenizer's chat template.

    Reward:
        reward_weights: one number per reward, default 1 each.
        normalize_rewards: subtract the mean of all scores so far, divide by their deviation.
        reward_clip_range: (low, high) for a completion's score, after normalising.
        missing_eos_penalty: taken off the score of a completion that has not ended (Stiennon et al. 2020
            kept summaries short of the limit in this way; TRL's name).
        kl_coef: beta, weight of the KL penalty for each token (Ouyang et al. 2022, eq. 2; they had 0.02).
        kl_estimator: "k1" or "k3", see `maths.kl_estimate`.
        kl_target: None keeps kl_coef as it is. A number, in nats per sequence, moves it so that the KL
            comes to that (Ziegler et al. 2019, 2.2), over kl_horizon completions.
        reference: what KL is measured from. "start": where the policy starts, which is the base with
            the adapter off if the adapter is new, else a frozen copy of the adapter (for a full
            fine-tuning, of the model). "base": the base in any case. Another name: that adapter of the
            model. None: no KL at all, and no forward pass for it.
        whiten_rewards: scale the rewards of tokens to variance 1 before the advantages are computed.

    Advantages (GAE, 2016):
        gamma: discount, 1 for texts. lam: lambda, from 0 (trust the critic) to 1 (trust the rewards).
        whiten_advantages: mean 0 and variance 1 over the real tokens of the batch.

    Updates (PPO, 2017):
        num_ppo_epochs, num_mini_batches: see above.
        cliprange: eps of eq. 7. cliprange_value: the same for the value, in units of reward; None: no clip.
        vf_coef: weight of the value loss (c1 of eq. 9). ent_coef: of the entropy bonus (c2).
        early_stop_kl: None, or how far in nats per token the policy may move on one batch: an update
            that finds it further away than that is dropped, and so are the rest of the batch's (in
            float16 that one is made, because the gradient's scaler insists on one).

    Critic:
        value_model: "trunk" (a head on the policy's hidden states), "adapter" (a head on an adapter of
            its own) or "none" (no critic: with lam=1, REINFORCE with the batch's mean as baseline).
        value_learning_rate: of the head and of that adapter; default: learning_rate.

    Raises ValueError for a value that cannot work.
    """

    _VALID_DICT_FIELDS: ClassVar = [*TrainingArguments._VALID_DICT_FIELDS, "chat_template_kwargs"]

    learning_rate: float = 3e-5  # ten times that of TRL's PPO for whole models, as LoRA wants it
    logging_steps: float = 10
    remove_unused_columns: bool = False  # reward functions get all columns
    per_device_eval_batch_size: int = 64

    max_completion_length: int = 256
    max_prompt_length: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    chat_template_kwargs: dict[str, Any] | str | None = None

    reward_weights: list[float] | None = None
    normalize_rewards: bool = False
    reward_clip_range: list[float] | None = None
    missing_eos_penalty: float | None = None
    kl_coef: float = 0.05
    kl_estimator: str = "k1"
    kl_target: float | None = None
    kl_horizon: float = 10_000
    reference: str | None = "start"
    whiten_rewards: bool = False

    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool = True

    num_ppo_epochs: int = 4
    num_mini_batches: int = 1
    cliprange: float = 0.2
    cliprange_value: float | None = 0.2
    vf_coef: float = 0.1
    ent_coef: float = 0.0
    early_stop_kl: float | None = None

    value_model: str = "trunk"
    value_learning_rate: float | None = None

    def __post_init__(self):
        super().__post_init__()
        for name, (low, high, what) in _RANGES.items():
            _check_number(name, getattr(self, name), low, high, what)
        for name in _WHOLE:
            _check_whole(name, getattr(self, name))
        _check_choice("kl_estimator", self.kl_estimator, ("k1", "k3"))
        _check_choice("value_model", self.value_model, ("trunk", "adapter", "none"))
        self._check_reward()
        self._check_together()

    @property
    def rollouts_per_device(self) -> int:
        """Completions of one step on one process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def _check_reward(self) -> None:
        if self.reward_clip_range is not None:
            try:
                low, high = map(float, self.reward_clip_range)
            except (TypeError, ValueError):
                low, high = math.nan, math.nan
            if not low < high:
                raise ValueError(
                    f"reward_clip_range is {self.reward_clip_range!r}: it must be two numbers, the lower "
                    "first, as (-1.0, 1.0)"
                )
            self.reward_clip_range = [low, high]
        for weight in self.reward_weights or []:
            _check_number("reward_weights", weight, -math.inf, math.inf, "finite numbers")

    def _check_together(self) -> None:
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size changes what a step is: set gradient_accumulation_steps higher to "
                "save memory"
            )
        rollouts = self.rollouts_per_device
        if rollouts % self.num_mini_batches:
            raise ValueError(
                f"num_mini_batches is {self.num_mini_batches}, which does not divide the "
                f"{rollouts} rollouts of a step (per_device_train_batch_size "
                f"{self.per_device_train_batch_size} * gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}): change one of the three"
            )
        if self.reference is None and (self.kl_coef or self.kl_target is not None):
            raise ValueError(
                f"reference is None, and kl_coef {self.kl_coef} with kl_target {self.kl_target} need "
                'one: set kl_coef=0.0, or reference="start"'
            )
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError(
                f"kl_target is {self.kl_target} and kl_coef 0: the target multiplies kl_coef, so start "
                "above 0, as with kl_coef=0.05"
            )
        if self.value_model == "adapter" and self.gradient_checkpointing:
            raise ValueError(
                'value_model="adapter" and gradient_checkpointing=True: what is recomputed in the '
                'backward pass would use the wrong adapter. Take value_model="trunk", or no checkpointing'
            )


_RANGES = {  # name: lowest, highest, in words; None is let through where the default is None
    "temperature": (1e-6, math.inf, "above 0: sampling that learns needs chance"),
    "top_p": (1e-6, 1.0, "above 0 and at most 1"),
    "missing_eos_penalty": (0.0, math.inf, "0 or more: it is subtracted"),
    "kl_coef": (0.0, math.inf, "0 or more"),
    "kl_target": (1e-6, math.inf, "above 0, in nats per sequence"),
    "kl_horizon": (1.0, math.inf, "1 or more completions"),
    "gamma": (0.0, 1.0, "from 0 to 1"),
    "lam": (0.0, 1.0, "from 0 to 1"),
    "cliprange": (1e-6, math.inf, "above 0, as 0.2"),
    "cliprange_value": (1e-6, math.inf, "above 0, or None for no clipping"),
    "vf_coef": (0.0, math.inf, '0 or more (no critic is value_model="none")'),
    "ent_coef": (-math.inf, math.inf, "a number"),
    "early_stop_kl": (1e-9, math.inf, "above 0, in nats per token"),
    "value_learning_rate": (0.0, math.inf, "0 or more"),
}
_OPTIONAL = ("missing_eos_penalty", "kl_target", "cliprange_value", "early_stop_kl",
             "value_learning_rate", "max_prompt_length")  # fmt: skip
_WHOLE = ("max_completion_length", "max_prompt_length", "num_ppo_epochs", "num_mini_batches")


def _check_number(name: str, value: Any, low: float, high: float, what: str) -> None:
    if value is None and name in _OPTIONAL:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}: it must be {what}")


def _check_whole(name: str, value: Any) -> None:
    if value is None and name in _OPTIONAL:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}: it must be a whole number of at least 1")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(choices)}")
