"""PPO for language models with LoRA: one frozen base is policy, reference, critic and reward model.

PPO (Schulman et al. 2017, arXiv 1707.06347) as RLHF uses it (Stiennon et al. 2020, arXiv 2009.01325;
Ouyang et al. 2022, arXiv 2203.02155). One step:

1. roll out: sample a completion for each prompt of the batch;
2. judge: the reward of each whole completion, from functions or reward models;
3. measure: log-probabilities under the policy and the reference, values of the critic;
4. estimate advantages: token rewards (score at the end, KL penalty everywhere), then GAE;
5. update: several epochs of clipped gradient steps on the same batch.

What is around it (optimizer, schedule, checkpoints, callbacks, several processes) is transformers'
Trainer. TRL has had no PPOTrainer since 1.13. The mathematics is in maths.py, what runs forward in
model.py, rewards in reward.py. Untested on a GPU until tests/gpu has run on one.
"""

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from rlnb.train.ppo import checks, maths, reward
from rlnb.train.ppo.base import ActorCriticTrainer
from rlnb.train.ppo.config import PPOConfig
from rlnb.train.ppo.model import VALUE, ActorCritic, Reference, copy_adapter, disable_dropout
from rlnb.train.ppo.rollouts import Rollouts, put, rollouts, summary, table

from accelerate.utils import set_seed
from transformers.trainer_utils import EvalLoopOutput

UPDATE_METRICS = (
    "loss", "policy/loss", "policy/approx_kl", "policy/clipfrac", "policy/ratio", "value/loss",
    "value/clipfrac",
)  # fmt: skip


class PPOTrainer(ActorCriticTrainer):
    """Proximal policy optimization with a critic, for causal language models with or without LoRA.

    model: a PEFT model, whose adapter "default" trains (`rlnb.model.load.load_model`), or a model that
        trains whole. It gets an adapter "ref" if it starts from a trained adapter, and one named
        "value" or "reward" where the settings ask for one. Its dropout is set to 0.
    args: see PPOConfig.
    reward_funcs: one or a list, see `reward.sources`; args.reward_weights weighs them.
    train_dataset: with a column "prompt" of strings or of messages. Other columns go to the reward
        functions.
    processing_class: the tokenizer.
    eval_dataset: prompts for trainer.evaluate(), which samples with args.seed each time.
    rollout_func: (prompts, trainer) -> {"prompt_ids": ..., "completion_ids": ...}, as TRL's
        GRPOTrainer takes it. The settings of sampling are attributes of the trainer.

    Raises ValueError or TypeError, before anything is sampled, for what cannot work together.
    """

    def __init__(
        self,
        model: Any,
        args: PPOConfig,
        reward_funcs: Any,
        train_dataset: Any,
        processing_class: Any,
        eval_dataset: Any = None,
        callbacks: list | None = None,
        rollout_func: Callable[[list, Any], dict[str, list]] | None = None,
    ):
        checks.check_model(model, args)
        checks.check_prompts(train_dataset, model, processing_class, args, "train_dataset")
        checks.check_prompts(eval_dataset, model, processing_class, args, "eval_dataset")
        disable_dropout(model)
        self.reward_sources = reward.sources(reward_funcs, model, processing_class)
        self.reward_names = [source.name for source in self.reward_sources]
        self.reward_weights = checks.reward_weights(args, self.reward_names)
        self.micro_batch_size = args.per_device_train_batch_size
        # For Trainer's loop a batch of rollouts is one step. It is cut into pieces here.
        args = copy.copy(args)
        args.per_device_train_batch_size = args.rollouts_per_device
        args.gradient_accumulation_steps, args.dataloader_drop_last = 1, True
        args.data_seed = args.seed if args.data_seed is None else args.data_seed
        checks.check_size(train_dataset, args)
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset,
            data_collator=list, processing_class=processing_class, callbacks=callbacks,
        )  # fmt: skip
        self._set_up_models()
        self.set_up_sampling(rollout_func)
        set_seed(args.seed, device_specific=True)  # each process samples in its own way
        self.kl_coef = args.kl_coef
        self.reward_moments = maths.RunningMoments()

    def _set_up_models(self) -> None:
        """Adapters or copies for the reference and the critic, and the module that trains."""
        model, args = self.model, self.args
        if args.value_model == "adapter":
            copy_adapter(model, VALUE, trains=True)
        self.actor_critic = ActorCritic(model, args.value_model, args.temperature)
        self.reference = Reference(self.actor_critic, args.reference) if args.reference else None
        if self.reference and self.reference.copy and self.is_world_process_zero():
            size = sum(p.numel() * p.element_size() for p in self.reference.copy.parameters()) / 1e6
            print(f"The whole model trains, so the reference is a copy of it: {size:,.0f} MB.")

    # --- one step --------------------------------------------------------------------------------

    def training_step(
        self, model: Any, inputs: list[dict], num_items_in_batch: Any = None
    ) -> Tensor:
        """Everything of a step but the last update's optimizer step, which Trainer's loop makes.

        model: the actor-critic as accelerate has wrapped it. inputs: rows of the data set. Returns
        the mean loss of the updates.
        """
        args, start = self.args, time.perf_counter()
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        batch = self._roll_out(inputs)
        rolled_out = time.perf_counter()
        updates = maths.plan_updates(
            batch.lengths.cpu(), args.num_ppo_epochs, args.num_mini_batches, self.micro_batch_size
        )
        first_epoch = [rows for update in updates[: args.num_mini_batches] for rows in update]
        self._measure(batch, first_epoch)
        self._estimate_advantages(batch)
        self._record_rollouts(batch)
        measured = time.perf_counter()
        loss = self._update(model, batch, updates)
        end = time.perf_counter()
        self.record({
            "step_time": end - start, "step_time/rollout": rolled_out - start,
            "step_time/measure": measured - rolled_out, "step_time/update": end - measured,
        })  # fmt: skip
        return loss

    def _roll_out(self, rows: list[dict]) -> Rollouts:
        """Sample a completion for each row, and let the rewards judge it."""
        prompts = [row["prompt"] for row in rows]
        found = self.rollout_func(prompts, self)
        checks.check_rollout(prompts, found, self.max_completion_length)
        prompt_ids, completion_ids = found["prompt_ids"], found["completion_ids"]
        with self.accelerator.autocast():
            judged = reward.judge(
                self.reward_sources, self.processing_class, rows, prompt_ids, completion_ids,
                self.eos_token_ids, trainer_state=self.state, log_metric=self.log_metric,
            ).to(self.accelerator.device)  # fmt: skip
        return rollouts(
            prompt_ids, completion_ids, judged,
            reward=(judged * self.reward_weights.to(judged.device)).nansum(1),
            ends=self.eos_token_ids, pad=self.processing_class.pad_token_id or 0,
        )  # fmt: skip

    @torch.no_grad()
    def _measure(self, batch: Rollouts, pieces: Sequence[Tensor]) -> None:
        """Fill in what policy, critic and reference say before the first update.

        pieces: the first epoch's micro-batches. There the same numbers come out again to the last
        bit, so that the ratio of the first update is exactly 1.
        """
        log_probs, entropies, values = torch.zeros(3, *batch.mask.shape, device=batch.ids.device)
        for rows in pieces:
            found = self._forward(self.actor_critic, batch, rows, entropy=True)
            for target, flat in zip((log_probs, entropies, values), found, strict=True):
                if flat is not None:
                    put(target, rows, batch.mask, flat)
        batch.log_probs, batch.entropies, batch.values = log_probs, entropies, values
        if self.reference is None:
            return
        batch.reference = torch.zeros_like(log_probs)
        with self.reference.at_work() as reference:
            for rows in pieces:
                flat, _, _ = self._forward(reference, batch, rows, value=False)
                put(batch.reference, rows, batch.mask, flat)

    def _forward(self, model: Any, batch: Rollouts, rows: Tensor, **asked: bool) -> tuple:
        """Log-probabilities, entropies and values of some rows' tokens, as (N,)."""
        width = int(batch.lengths[rows].max())
        with self.accelerator.autocast():
            return model(batch.ids[rows, :width], batch.predicts[rows, :width], **asked)

    def _estimate_advantages(self, batch: Rollouts) -> None:
        """Scores, token rewards and GAE."""
        args, mask, scores = self.args, batch.mask, batch.reward
        if args.normalize_rewards:
            self.reward_moments.update(self.accelerator.gather(scores))
            scores = self.reward_moments.normalise(scores)
        if args.reward_clip_range is not None:
            scores = scores.clamp(*args.reward_clip_range)
        if args.missing_eos_penalty is not None:
            scores = scores - args.missing_eos_penalty * ~batch.finished
        kl = torch.zeros_like(batch.log_probs)
        if batch.reference is not None:
            kl = maths.kl_estimate(batch.log_probs, batch.reference, args.kl_estimator)
        batch.rewards = token_rewards = maths.token_rewards(scores, kl, mask, self.kl_coef)
        if args.whiten_rewards:
            token_rewards = maths.whiten(token_rewards, mask, shift=False, total=self.total)
        batch.advantages, batch.returns = maths.gae(
            token_rewards, batch.values, mask, args.gamma, args.lam
        )
        if args.whiten_advantages:
            batch.advantages = maths.whiten(batch.advantages, mask, total=self.total)

    def _update(self, model: Any, batch: Rollouts, updates: list[list[Tensor]]) -> Tensor:
        """The gradient of each update; an optimizer step after all but the last. Returns the mean loss."""
        limit, found = self.args.early_stop_kl, []
        for pieces in updates:
            if found:
                self.step_optimizer(model)
            statistics = self._backward(model, batch, pieces)
            if found and limit is not None and statistics["policy/approx_kl"] > limit:
                # Without gradients the loop's own step does nothing. float16's scaler insists on some.
                if self.accelerator.scaler is None:
                    model.zero_grad()
                break
            found.append(statistics)
        means = {name: sum(f[name] for f in found) / len(found) for name in found[0]}
        loss = means.pop("loss")
        if self.args.value_model == "none":
            means = {name: x for name, x in means.items() if not name.startswith("value/")}
        self.record({**means, "policy/updates": len(found)})
        return torch.tensor(loss, device=self.args.device)

    def _backward(self, model: Any, batch: Rollouts, pieces: list[Tensor]) -> dict[str, float]:
        """The gradient of a mini-batch's loss, added up piece by piece. Returns its statistics.

        PPO (2017), eq. 9: L = L_clip + vf_coef L_value - ent_coef H, as a mean over all tokens of the
        mini-batch on all processes, so that it does not matter how they are cut into pieces.
        """
        count = self.total(torch.stack([batch.mask[rows].sum() for rows in pieces]).sum())
        sums = torch.zeros(len(UPDATE_METRICS), dtype=torch.float64, device=batch.ids.device)
        for i, rows in enumerate(pieces):
            last = i == len(pieces) - 1
            with nullcontext() if last else self.accelerator.no_sync(model):
                losses, statistics = self._losses(model, batch, rows)
                # DDP takes the mean of the processes' gradients, which are parts of one sum.
                self.accelerator.backward(losses.sum() * (self.accelerator.num_processes / count))
            sums += torch.stack([x.double().sum() for x in (losses.detach(), *statistics)])
        return dict(zip(UPDATE_METRICS, (self.total(sums) / count).tolist(), strict=True))

    def _losses(self, model: Any, batch: Rollouts, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(N,) losses of some rows' tokens, and as much of each of UPDATE_METRICS after the first."""
        args, mask = self.args, batch.mask[rows]
        old, advantages = batch.log_probs[rows][mask], batch.advantages[rows][mask]
        log_probs, entropies, values = self._forward(model, batch, rows, entropy=args.ent_coef != 0)
        losses, held = maths.policy_loss(log_probs, old, advantages, args.cliprange)
        with torch.no_grad():
            change = log_probs - old
            statistics = [losses, torch.expm1(change) - change, held, change.exp()]
        if values is None:
            statistics += [torch.zeros_like(old)] * 2
        else:
            before, returns = batch.values[rows][mask], batch.returns[rows][mask]
            errors, held = maths.value_loss(values, before, returns, args.cliprange_value)
            losses = losses + args.vf_coef * errors
            statistics += [errors, held]
        if entropies is not None:
            losses = losses - args.ent_coef * entropies
        return losses, [x.detach() for x in statistics]

    # --- metrics ---------------------------------------------------------------------------------

    def _record_rollouts(self, batch: Rollouts) -> None:
        """Log a batch, and move the KL coefficient for the next one."""
        rows = table(
            batch, self.reward_names, self.args.kl_estimator, self.accelerator.gather
        )
        self.state.num_input_tokens_seen += int(rows["read"].sum())
        self.record(summary(rows, self.args.value_model != "none") | self.metrics_of_rewards())
        self.record({"num_tokens": float(self.state.num_input_tokens_seen)})
        if self.args.reference is not None:
            self.record({"kl/coef": self.kl_coef})
        if self.args.kl_target is not None:
            kl, episodes = rows["k1"].mean().item(), len(rows["k1"])
            self.kl_coef = maths.adapted_kl_coef(
                self.kl_coef, kl, self.args.kl_target, episodes, self.args.kl_horizon
            )

    def evaluation_loop(
        self, dataloader: Any, description: str = "", prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:  # fmt: skip
        """Reward, KL, entropy and lengths on the evaluation prompts. The same seed each time, and the
        random state of training stays as it is.
        """
        found = []
        with torch.random.fork_rng():
            torch.manual_seed(self.args.seed + self.args.process_index)
            for rows in dataloader:
                batch = self._roll_out(rows)
                self._measure(batch, batch.lengths.argsort().split(self.micro_batch_size))
                found.append(table(
                    batch, self.reward_names, self.args.kl_estimator,
                    self.accelerator.gather_for_metrics,
                ))  # fmt: skip
        rows = {name: torch.cat([columns[name] for columns in found]) for name in found[0]}
        metrics = summary(rows, False) | self.metrics_of_rewards()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(None, None, metrics, len(rows["tokens"]))
