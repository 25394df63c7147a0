"""PPO for language models with LoRA: one frozen base is policy, reference, critic and reward model.

PPO (Schulman et al. 2017, arXiv 1707.06347) as RLHF uses it (Stiennon et al. 2020, arXiv 2009.01325;
Ouyang et al. 2022, arXiv 2203.02155). `training_step` is the algorithm. Around it (optimizer, schedule,
checkpoints, callbacks, several processes) is transformers' Trainer. TRL has had no PPOTrainer since 1.13.
"""

import copy
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rlnb import files
from rlnb.model import adapters, sampling
from rlnb.model.folders import load_weights
from rlnb.train.ppo import formulas, reward
from rlnb.train.ppo.actor_critic import POLICY, REFERENCE, ActorCritic, add_reference, check_policy
from rlnb.train.ppo.config import PPOConfig
from rlnb.train.ppo.rollouts import Rollouts, lay_out, put, summary

import torch
from accelerate.utils import set_seed
from peft import PeftModel
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import Trainer
from trl.trainer.utils import disable_dropout_in_model

UPDATE_METRICS = ("loss", "policy/loss", "policy/approx_kl", "policy/clipfrac", "policy/ratio", "value/loss")
HEAD = "value_head.safetensors"  # in a checkpoint, beside the adapter


class PPOTrainer(Trainer):
    """Proximal policy optimization with a critic, for causal language models with LoRA.

    model: a PEFT model, whose adapter "default" trains (`rlnb.model.load_model`). It gets an adapter "ref",
        where it starts, and one named "reward" for a reward adapter. Its dropout is set to 0.
    reward_funcs: one or a list, see `reward.sources`; args.reward_weights weighs them.
    train_dataset: with a column "prompt" of strings or of messages. Other columns go to the reward functions.

    Callbacks, checkpoints and the user see self.model, the PEFT model. The `model` in Trainer's
    loop is the actor-critic, so that gradients of both are clipped and, over several processes, averaged together.
    Raises ValueError or TypeError, before anything is sampled, for what cannot work together.
    """

    def __init__(
        self, model: Any, args: PPOConfig, reward_funcs: Any, train_dataset: Any, processing_class: Any,
        callbacks: list | None = None,
    ):  # fmt: skip
        check_policy(model)
        self.micro_batch_size = args.per_device_train_batch_size
        # For Trainer's loop a batch of rollouts is one step. It is cut into pieces here.
        args = copy.copy(args)
        args.per_device_train_batch_size *= args.gradient_accumulation_steps
        args.gradient_accumulation_steps, args.dataloader_drop_last = 1, True
        args.data_seed = args.seed if args.data_seed is None else args.data_seed
        batch = args.per_device_train_batch_size * args.world_size
        columns, rows = train_dataset.column_names, len(train_dataset)
        if "prompt" not in columns or rows < batch:
            says = f"it needs a column 'prompt', and a step takes {batch} rows, on all processes"
            raise ValueError(f"train_dataset has the columns {columns} and {rows} rows: {says}")
        disable_dropout_in_model(model)  # with it, old and new policy would differ without any update
        self.reward_sources = reward.sources(reward_funcs, model, processing_class)
        self.reward_names = [source.name for source in self.reward_sources]
        weights = [1.0] * len(self.reward_names) if args.reward_weights is None else args.reward_weights
        if len(weights) != len(self.reward_names):
            raise ValueError(f"reward_weights is {weights}: give a number for each reward, {self.reward_names}")
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, data_collator=list,
            processing_class=processing_class, callbacks=callbacks,
        )  # fmt: skip
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or self.args.n_gpu > 1:
            says = "one device, or several with one process and a complete model on each (accelerate launch)"
            raise ValueError(f"PPOTrainer works on {says}: not with DeepSpeed, FSDP or DataParallel")
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self.reward_weights = torch.tensor(weights, device=self.accelerator.device)
        self.actor_critic = ActorCritic(model, args.temperature)
        add_reference(model)
        self.end_tokens = sampling.end_tokens(model, processing_class)
        # What `sampling.rollout` asks a trainer for:
        self.max_completion_length, self.temperature = args.max_completion_length, args.temperature
        self.chat_template, self.chat_template_kwargs = None, {}
        set_seed(args.seed, device_specific=True)  # each process samples in its own way

    def training_step(self, model: Any, inputs: list[dict], num_items_in_batch: Any = None) -> Tensor:
        """All of a step but the last update's optimizer step, which Trainer's loop makes. Returns the mean loss.

        model: the actor-critic as accelerate has wrapped it. inputs: rows of the data set.
        """
        args, began = self.args, time.perf_counter()
        model.train()

        # 1. roll out: a completion for each prompt of the batch
        batch = self._roll_out(inputs)

        # 2. score: what the rewards say of each completion
        self._score(batch, inputs)

        # 3. measure: log-probabilities under policy and reference, values of the critic
        updates = formulas.plan_updates(
            batch.length_B.cpu(), args.num_ppo_epochs, args.num_mini_batches, self.micro_batch_size
        )
        first_epoch = [rows for update in updates[: args.num_mini_batches] for rows in update]
        self._measure(batch, first_epoch)

        # 4. advantages: token rewards (score at the end, KL penalty everywhere), then GAE
        self._estimate_advantages(batch)
        self.state.num_input_tokens_seen += int(self.accelerator.gather(batch.length_B).sum())
        self.record({"num_tokens": self.state.num_input_tokens_seen})
        self.record(summary(batch, self.reward_names, self.accelerator.gather))

        # 5. update: clipped gradient steps, several epochs on the same batch
        loss = self._update(model, batch, updates)
        self.record({"step_time": time.perf_counter() - began})
        return torch.tensor(loss, device=args.device)

    def _roll_out(self, rows: list[dict]) -> Rollouts:
        prompts, pad = [row["prompt"] for row in rows], self.processing_class.pad_token_id or 0
        return lay_out(sampling.rollout(prompts, self), self.end_tokens, pad, self.accelerator.device)

    def _score(self, batch: Rollouts, rows: list[dict]) -> None:
        with self.accelerator.autocast():
            scores_BR = reward.score(
                self.reward_sources, self.processing_class, batch, rows, self.end_tokens,
                trainer_state=self.state, log_metric=lambda name, value: self.record({name: value}),
            )  # fmt: skip
        batch.scores_BR = scores_BR.to(self.accelerator.device)
        batch.score_B = (batch.scores_BR * self.reward_weights).nansum(1)

    @torch.no_grad()
    def _measure(self, batch: Rollouts, pieces: Sequence[Tensor]) -> None:
        """What policy, critic and reference say before the first update. pieces: the first epoch's micro-batches,
        where the same numbers come out again to the last bit: the ratio of the first update is exactly 1.
        """
        shape = (4, *batch.mask_BT.shape)
        log_probs_BT, entropy_BT, values_BT, reference_BT = torch.zeros(shape, device=batch.ids_BL.device)
        for rows in pieces:
            found = self._forward(self.actor_critic, batch, rows, entropy=True)
            for target_BT, flat_N in zip((log_probs_BT, entropy_BT, values_BT), found, strict=True):
                put(target_BT, rows, batch.mask_BT, flat_N)
        with adapters.using(self.model, REFERENCE):
            for rows in pieces:
                flat_N, _, _ = self._forward(self.actor_critic, batch, rows)
                put(reference_BT, rows, batch.mask_BT, flat_N)
        batch.log_probs_BT, batch.reference_BT = log_probs_BT, reference_BT
        batch.entropy_BT, batch.values_BT = entropy_BT, values_BT

    def _forward(self, model: Any, batch: Rollouts, rows: Tensor, entropy: bool = False) -> tuple:
        """Log-probabilities, entropies and values of some rows' tokens, as (N,)."""
        width = int(batch.length_B[rows].max())
        with self.accelerator.autocast():
            return model(batch.ids_BL[rows, :width], batch.predicts_BL[rows, :width], entropy)

    def _estimate_advantages(self, batch: Rollouts) -> None:
        args, mask_BT = self.args, batch.mask_BT
        kl_BT = formulas.kl_estimate(batch.log_probs_BT, batch.reference_BT)
        batch.rewards_BT = formulas.token_rewards(batch.score_B, kl_BT, mask_BT, args.kl_coef)
        batch.advantages_BT, batch.returns_BT = formulas.gae(
            batch.rewards_BT, batch.values_BT, mask_BT, args.gamma, args.lam
        )
        if args.whiten_advantages:
            batch.advantages_BT = formulas.whiten(batch.advantages_BT, mask_BT, self.total)

    def _update(self, model: Any, batch: Rollouts, updates: list[list[Tensor]]) -> float:
        """The gradient of each update; an optimizer step after all but the last. Returns the mean loss."""
        found = []
        for pieces in updates:
            if found:
                if self.args.max_grad_norm:
                    self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
                self.optimizer.step()
                model.zero_grad()
            found.append(self._backward(model, batch, pieces))
        means = {name: sum(f[name] for f in found) / len(found) for name in UPDATE_METRICS}
        loss = means.pop("loss")
        self.record(means)
        return loss

    def _backward(self, model: Any, batch: Rollouts, pieces: list[Tensor]) -> dict[str, float]:
        """The gradient of a mini-batch's loss, added up piece by piece. Returns its statistics. The loss is a mean
        over all tokens of the mini-batch on all processes: it does not matter how they are cut into pieces.
        """
        count = self.total(torch.stack([batch.mask_BT[rows].sum() for rows in pieces]).sum())
        sums = torch.zeros(len(UPDATE_METRICS), dtype=torch.float64, device=batch.ids_BL.device)
        for i, rows in enumerate(pieces):
            last = i == len(pieces) - 1
            with nullcontext() if last else self.accelerator.no_sync(model):
                loss_N, statistics = self._losses(model, batch, rows)
                # DDP takes the mean of the processes' gradients, which are parts of one sum.
                self.accelerator.backward(loss_N.sum() * (self.accelerator.num_processes / count))
            sums += torch.stack([x.detach().double().sum() for x in (loss_N, *statistics)])
        return dict(zip(UPDATE_METRICS, (self.total(sums) / count).tolist(), strict=True))

    def _losses(self, model: Any, batch: Rollouts, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The loss of some rows' tokens, and as much of each of UPDATE_METRICS after the first.

        PPO (2017), eq. 9 without its bonus for entropy: L = L_clip + vf_coef L_value.
        """
        args, mask = self.args, batch.mask_BT[rows]
        old_N, advantages_N = batch.log_probs_BT[rows][mask], batch.advantages_BT[rows][mask]
        before_N, returns_N = batch.values_BT[rows][mask], batch.returns_BT[rows][mask]
        log_probs_N, _, values_N = self._forward(model, batch, rows)
        policy_N, clipped_N = formulas.policy_loss(log_probs_N, old_N, advantages_N, args.cliprange)
        value_N = formulas.value_loss(values_N, before_N, returns_N, args.cliprange_value)
        change_N = log_probs_N.detach() - old_N
        approx_kl_N = torch.expm1(change_N) - change_N
        return policy_N + args.vf_coef * value_N, [policy_N, approx_kl_N, clipped_N, change_N.exp(), value_N]

    # --- Trainer's loop, with a critic beside its model --------------------------------------------

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        return self.accelerator.prepare(self.actor_critic) if model is self.model else model

    def create_optimizer(self, model: Any = None) -> Any:
        """Trainer's optimizer, with the critic's head in a group of its own."""
        if self.optimizer is None:
            super().create_optimizer(model)
            rate, head = self.args.value_learning_rate, list(self.actor_critic.value_head.parameters())
            self.optimizer.add_param_group({"params": head, "lr": rate, "weight_decay": 0.0})
        return self.optimizer

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

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Policy and reference in PEFT's format, beside them the critic's head."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        # The class's own method: Unsloth puts another on the instance.
        PeftModel.save_pretrained(
            self.model, str(folder), selected_adapters=[POLICY, REFERENCE], save_embedding_layers=False
        )
        self.processing_class.save_pretrained(folder)
        head = self.actor_critic.value_head.state_dict()
        files.write(folder / HEAD, save({name: x.detach().cpu() for name, x in head.items()}))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if not (folder / HEAD).is_file():
            raise FileNotFoundError(f"{folder} is no checkpoint of PPOTrainer: it has no {HEAD}")
        load_weights(self.model, folder, POLICY, trainable=True)
        load_weights(self.model, folder / REFERENCE, REFERENCE, trainable=False)
        self.actor_critic.value_head.load_state_dict(load_file(folder / HEAD))
