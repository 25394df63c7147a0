"""What cannot work together is said before PPO samples anything."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlnb.model import sampling
from rlnb.measure.kl import REWRITES_BASE
from rlnb.train.ppo.config import PPOConfig
from rlnb.train.ppo.model import POLICY, causal_lm, has_adapter


def check_model(model: Any, args: PPOConfig) -> None:
    """The model trains, and has the adapters that the settings ask for."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is {model!r}: load it first, with rlnb.model.load.load_model")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "no parameter of the model trains: attach an adapter (load_model(..., lora=LoRA())), or "
            "load a saved one with is_trainable=True"
        )
    if not has_adapter(model):
        if args.value_model == "adapter":
            raise ValueError(
                'value_model="adapter" needs a model with LoRA: take value_model="trunk"'
            )
        if args.reference not in (None, "start", "base"):
            raise ValueError(
                f"reference is {args.reference!r}, and the model has no adapters: take 'start', which "
                "keeps a copy of the model"
            )
        return
    configs = model.peft_config
    if model.active_adapter != POLICY or POLICY not in configs:
        raise ValueError(
            f"the policy must be the active adapter {POLICY!r}: active is {model.active_adapter!r}, "
            f"there are {', '.join(configs)}"
        )
    if configs[POLICY].is_prompt_learning:
        raise ValueError(
            f"PEFT's {configs[POLICY].peft_type} is no adapter inside layers: take LoRA"
        )
    _check_frozen(model)
    _check_reference(args.reference, configs)


def _check_frozen(model: Any) -> None:
    """Nothing of the base trains: turning the adapter off would not turn that off."""
    names = [f".{name}" for name in model.peft_config]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not any(f"{part}." in f"{name}." for part in names):
            raise ValueError(
                f"{name} is of the base, which must be frozen, and trains: with LoRA take bias='none', "
                "or set its requires_grad to False"
            )


def _check_reference(reference: str | None, configs: dict[str, Any]) -> None:
    if reference == "base":
        init = str(getattr(configs[POLICY], "init_lora_weights", "")).lower()
        if init.startswith(REWRITES_BASE):
            raise ValueError(
                f"reference is 'base', and the adapter's start {init!r} has changed the base's weights: "
                "take 'start'"
            )
    elif reference not in (None, "start") and (reference not in configs or reference == POLICY):
        others = [name for name in configs if name != POLICY]
        raise ValueError(
            f"reference is {reference!r}: it must be 'start', 'base', None or another adapter of the "
            f"model, which has {', '.join(others) or 'none'}"
        )


def check_prompts(dataset: Any, model: Any, tokenizer: Any, args: PPOConfig, what: str) -> None:
    """Prompts are there, are of one kind and leave room for a completion."""
    if dataset is None:
        return
    if isinstance(dataset, dict):
        for name, part in dataset.items():
            check_prompts(part, model, tokenizer, args, f"{what}[{name!r}]")
        return
    columns = getattr(dataset, "column_names", None)
    if columns is not None and "prompt" not in columns:
        raise ValueError(f"{what} needs a column 'prompt', and has {', '.join(columns)}")
    if not hasattr(dataset, "__len__"):
        return  # read as it comes: sampling checks every batch
    prompts = list(dataset["prompt"]) if columns else [row["prompt"] for row in dataset]
    limit = getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None)
    room = None if limit is None else limit - args.max_completion_length
    if room is not None and room < 1:
        raise ValueError(
            f"max_completion_length is {args.max_completion_length}, and the model has {limit} "
            "positions in all: lower it"
        )
    longest = min(filter(None, (room, args.max_prompt_length)), default=None)
    template = args.chat_template_kwargs or {}
    for i, ids in enumerate(sampling.tokenize(tokenizer, prompts, **template)):
        if longest is not None and len(ids) > longest:
            why = "max_prompt_length" if longest == args.max_prompt_length else (
                f"the model's {limit} positions less max_completion_length {args.max_completion_length}"
            )  # fmt: skip
            raise ValueError(
                f"{what}, row {i}: the prompt has {len(ids)} tokens, the limit is {longest} ({why}). "
                f"Leave it out or change the limit: {str(prompts[i])[:80]}"
            )


def check_size(dataset: Any, args: PPOConfig) -> None:
    """There is a whole batch in the data."""
    batch = args.per_device_train_batch_size * args.world_size
    if hasattr(dataset, "__len__") and len(dataset) < batch:
        raise ValueError(
            f"train_dataset has {len(dataset)} prompts, and a step takes {batch} "
            "(per_device_train_batch_size * gradient_accumulation_steps * processes): lower those"
        )


def reward_weights(args: PPOConfig, names: Sequence[str]) -> torch.Tensor:
    """(rewards,), from args.reward_weights or all 1."""
    weights = args.reward_weights or [1.0] * len(names)
    if len(weights) != len(names):
        raise ValueError(
            f"reward_weights has {len(weights)} numbers for the {len(names)} rewards {', '.join(names)}"
        )
    return torch.tensor(weights, dtype=torch.float32)


def check_rollout(prompts: Sequence, found: dict[str, list], limit: int) -> None:
    """What a rollout function has returned."""
    for key in ("prompt_ids", "completion_ids"):
        if len(found[key]) != len(prompts):
            raise ValueError(
                f"rollout_func returned {len(found[key])} {key} for {len(prompts)} prompts: PPO takes "
                "one completion of each"
            )
    for i, ids in enumerate(found["prompt_ids"]):
        if not len(ids):
            raise ValueError(f"rollout_func returned a prompt of 0 tokens (row {i})")
    for i, ids in enumerate(found["completion_ids"]):
        if not 1 <= len(ids) <= limit:
            raise ValueError(
                f"rollout_func returned a completion of {len(ids)} tokens (row {i}): it must have 1 to "
                f"max_completion_length {limit}, the end token included"
            )


def check_checkpoint(folder: Path, state: dict[str, Any], value: str, adapters: list[str]) -> None:
    """A run goes on from a checkpoint that has what it trains, and nothing else."""
    for what, theirs, ours in (
        ("value_model", state["value_model"], value),
        ("adapters", state["adapters"], adapters),
    ):
        if theirs != ours:
            raise ValueError(
                f"{folder} was made with {what} {theirs!r}, and this trainer has {ours!r}: give model, "
                "reference and value_model as they were then"
            )


def last_checkpoint(folder: Path, last_file: str = "trainer_state.json") -> Path:
    """The newest checkpoint that was written to the end. FileNotFoundError if there is none."""
    found = [path for path in folder.glob("checkpoint-*") if (path / last_file).is_file()]
    steps = {int(path.name.rpartition("-")[2]): path for path in found if path.name[11:].isdigit()}
    if not steps:
        raise FileNotFoundError(
            f"{folder} holds no whole checkpoint to resume from: set save_strategy and save_steps"
        )
    return steps[max(steps)]
