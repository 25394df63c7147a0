"""transformers' Trainer for a model with a critic beside it: what PPO does not want to think about."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from rlnb import files
from rlnb.model.folders import load_weights
from rlnb.train.ppo.actor_critic import POLICY, REFERENCE, ActorCritic, has_adapter

from peft import PeftModel
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import Trainer

HEAD = "value_head.safetensors"  # in a checkpoint, beside the adapter


class ActorCriticTrainer(Trainer):
    """Optimizer, checkpoints and logs for `self.actor_critic`, whose policy is `self.model`.

    Callbacks, checkpoints and the user see self.model, a transformers or PEFT model. The `model` in
    Trainer's loop is the actor-critic, so that gradients of both are clipped and, over several processes,
    averaged together.
    """

    actor_critic: ActorCritic

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or self.args.n_gpu > 1:
            says = "one device, or several with one process and a complete model on each (accelerate launch)"
            raise ValueError(f"PPOTrainer works on {says}: not with DeepSpeed, FSDP or DataParallel")
        self._metrics: dict[str, list[float]] = defaultdict(list)

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        return self.accelerator.prepare(self.actor_critic) if model is self.model else model

    def create_optimizer(self, model: Any = None) -> Any:
        """Trainer's optimizer, with the critic's head in a group of its own."""
        if self.optimizer is None:
            super().create_optimizer(model)
            rate, head = self.args.value_learning_rate, list(self.actor_critic.value_head.parameters())
            self.optimizer.add_param_group({"params": head, "lr": rate, "weight_decay": 0.0})
        return self.optimizer

    def step_optimizer(self, model: Any) -> None:
        """An update within a step; Trainer's loop makes the last one of each."""
        if self.args.max_grad_norm:
            self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        model.zero_grad()

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.accelerator.reduce(x, "sum")

    # --- logs ------------------------------------------------------------------------------------

    def record(self, metrics: dict[str, float]) -> None:
        """Figures for the next log, which has their means."""
        for name, value in metrics.items():
            self._metrics[name].append(float(value))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **{name: sum(v) / len(v) for name, v in self._metrics.items()}}
            self._metrics.clear()
        super().log(logs, start_time)

    # --- checkpoints -----------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._metrics.clear()  # of steps after the last log of an earlier call
        return super().train(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Policy and reference in PEFT's format, or the full model; beside it the critic's head."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if has_adapter(self.model):
            # The class's own method: Unsloth puts another on the instance.
            PeftModel.save_pretrained(
                self.model, str(folder), selected_adapters=[POLICY, REFERENCE], save_embedding_layers=False
            )
            self.processing_class.save_pretrained(folder)
        else:
            super()._save(str(folder), state_dict)
        head = self.actor_critic.value_head.state_dict()
        files.write(folder / HEAD, save({name: x.detach().cpu() for name, x in head.items()}))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if not (folder / HEAD).is_file():
            raise FileNotFoundError(f"{folder} is no checkpoint of PPOTrainer: it has no {HEAD}")
        if has_adapter(self.model):
            load_weights(self.model, folder, POLICY, trainable=True)
            load_weights(self.model, folder / REFERENCE, REFERENCE, trainable=False)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.actor_critic.value_head.load_state_dict(load_file(folder / HEAD))
