"""transformers' Trainer for a model with a critic beside it: what PPO does not want to think about."""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rlnb import files
from rlnb.model import sampling
from rlnb.train.ppo import checks
from rlnb.train.ppo.maths import RunningMoments
from rlnb.train.ppo.model import POLICY, REFERENCE, VALUE, ActorCritic, has_adapter, load_adapter

from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer

STATE, HEAD = "ppo_state.json", "value_head.safetensors"  # in a checkpoint, beside the adapter


class ActorCriticTrainer(Trainer):
    """Optimizer, checkpoints and logs for `self.actor_critic`, whose policy is `self.model`.

    Callbacks, checkpoints and the user see self.model, a transformers or PEFT model. The `model` in
    Trainer's loop is the actor-critic, so that gradients of both are clipped and, over several
    processes, averaged together.
    """

    actor_critic: ActorCritic
    kl_coef: float
    reward_moments: RunningMoments

    def __init__(self, args: Any, **arguments: Any):
        # Rows of text go from the data to each process: they cannot be sent on as tensors.
        args.accelerator_config = replace(args.accelerator_config, dispatch_batches=False)
        super().__init__(args=args, **arguments)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or args.n_gpu > 1:
            raise ValueError(
                "PPOTrainer works on one device, or on several with one process and a whole model on "
                "each (accelerate launch): not with DeepSpeed, FSDP or DataParallel"
            )
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._from_rewards: dict[str, list[float]] = defaultdict(list)

    def set_up_sampling(self, rollout_func: Callable | None) -> None:
        """What `sampling.rollout` and others of its kind ask a trainer for."""
        args, tokenizer = self.args, self.processing_class
        self.rollout_func = rollout_func or sampling.rollout
        self.max_completion_length = args.max_completion_length
        self.temperature, self.top_p = args.temperature, args.top_p
        self.chat_template, self.use_vllm = None, False
        self.chat_template_kwargs, args.generation_kwargs = args.chat_template_kwargs or {}, None
        ends = self.model.generation_config.eos_token_id or []
        ends = {tokenizer.eos_token_id, *([ends] if isinstance(ends, int) else ends)}
        self.eos_token_ids = ends - {None}

    # --- what Trainer's loop calls ---------------------------------------------------------------

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        if not training or model is not self.model:
            return model
        return self.accelerator.prepare(self.actor_critic)

    def create_optimizer(self, model: Any = None) -> Any:
        """Trainer's optimizer, with the critic's parameters in a group of their own."""
        if self.optimizer is not None:
            return self.optimizer
        super().create_optimizer(model)
        critic = self.actor_critic.critic_parameters()
        own = set(map(id, critic))
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in own]
        if critic:
            rate = self.args.value_learning_rate
            rate = self.args.learning_rate if rate is None else rate
            self.optimizer.add_param_group({"params": critic, "lr": rate, "weight_decay": 0.0})
        return self.optimizer

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Training leaves out an incomplete batch, evaluation doesn't."""
        self.args.dataloader_drop_last = False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = True

    def step_optimizer(self, model: Any) -> None:
        """An update within a step; the loop makes the last one of each."""
        if self.args.max_grad_norm and self.args.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        model.zero_grad()

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.accelerator.reduce(x, "sum")

    # --- logs ------------------------------------------------------------------------------------

    def record(self, metrics: dict[str, float]) -> None:
        """Keep figures for the next log, which has their means."""
        for name, value in metrics.items():
            self._metrics[name].append(value)

    def log_metric(self, name: str, value: float) -> None:
        """What reward functions are passed under this name, as TRL's are."""
        self._from_rewards[name].append(float(value))

    def metrics_of_rewards(self) -> dict[str, float]:
        """Means of what they have passed to it since the last call, over all processes."""
        found = {}
        for name in sorted(set(gather_object(list(self._from_rewards)))):
            values = gather_object(list(self._from_rewards.get(name, [])))
            found[name] = sum(values) / len(values)
        self._from_rewards.clear()
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **{name: sum(v) / len(v) for name, v in self._metrics.items()}}
            self._metrics.clear()
        super().log(logs, start_time)

    # --- checkpoints -----------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, or go on from a checkpoint: its folder, or True for the last whole one in output_dir.

        A run that was killed and goes on equals, step by step, one that was not, if model, settings
        and data are given in the same way again.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(checks.last_checkpoint(Path(self.args.output_dir)))
        self._metrics.clear()  # of steps after the last log of an earlier call
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The adapter in PEFT's format, or the whole model; beside it what training needs to go on."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if has_adapter(self.model):
            from peft import PeftModel

            # The class's own method: Unsloth puts another on the instance.
            PeftModel.save_pretrained(
                self.model, str(folder), selected_adapters=self._adapters(),
                save_embedding_layers=False,
            )  # fmt: skip
            self.processing_class.save_pretrained(folder)
        else:
            super()._save(str(folder), state_dict)
        if (head := self.actor_critic.value_head) is not None:
            save_file({k: v.detach().cpu() for k, v in head.state_dict().items()}, folder / HEAD)
        state = {
            "kl_coef": self.kl_coef, "reward_moments": asdict(self.reward_moments),
            "value_model": self.args.value_model, "adapters": self._adapters(),
        }  # fmt: skip
        files.write(folder / STATE, json.dumps(state, indent=1) + "\n")

    def _adapters(self) -> list[str]:
        """The names of those that a checkpoint holds."""
        there = getattr(self.model, "peft_config", {})
        return [name for name in (POLICY, REFERENCE, VALUE) if name in there]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if not (folder / STATE).is_file():
            raise FileNotFoundError(f"{folder} is no checkpoint of PPOTrainer: it has no {STATE}")
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        checks.check_checkpoint(folder, state, self.args.value_model, self._adapters())
        if has_adapter(self.model):
            for name in self._adapters():
                file = (folder if name == POLICY else folder / name) / "adapter_model.safetensors"
                load_adapter(self.model, load_file(file), name, file)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if (head := self.actor_critic.value_head) is not None:
            head.load_state_dict(load_file(folder / HEAD))
        self.kl_coef = state["kl_coef"]
        self.reward_moments = RunningMoments(**state["reward_moments"])

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
