"""What PPO takes as a reward: functions with TRL's signature, and reward adapters. Each becomes a source, which
has a name and maps a batch of completions to (B,) numbers, NaN where it cannot judge.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlnb.model import adapters
from rlnb.model.folders import read_saved
from rlnb.task import rewards
from rlnb.train.ppo.actor_critic import add_frozen, linear
from rlnb.train.ppo.rollouts import Rollouts, right_pad

import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn

ROWS_AT_ONCE = 64  # sequences that a reward adapter reads in one forward pass


def sources(reward_funcs: Any, model: Any, tokenizer: Any) -> list[Any]:
    """A source for each of `reward_funcs`, which may be one or a list of

    - functions with TRL's signature (`rlnb.task.rewards`),
    - a reward adapter's folder: LoRA with a score head on the policy's base, as TRL's RewardTrainer
      saves it. It moves onto that base, which is not loaded a second time.

    Raises ValueError, TypeError or FileNotFoundError for anything else and for a reward adapter of another base.
    """
    given = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    found = []
    for i, reward in enumerate(given):
        if isinstance(reward, str | os.PathLike):
            name = f"reward{i}" if i else "reward"
            found.append(AdapterReward(model, tokenizer, Path(reward), name))
        elif callable(reward) and not isinstance(reward, nn.Module):
            found.append(FunctionReward(reward))
        else:
            says = "a function or the folder of a reward adapter. reward_model.as_reward makes a function of a model"
            raise TypeError(f"reward_funcs[{i}] is a {type(reward).__name__}: it must be {says}")
    names = [source.name for source in found]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"reward_funcs has the names {names}: give at least one, and each a name of its own")
    return found


def score(
    sources: Sequence[Any], tokenizer: Any, batch: Rollouts, rows: Sequence[Mapping[str, Any]],
    ends: set[int], **extra: Any,
) -> Tensor:  # fmt: skip
    """scores_BR, one column a source, NaN where a reward function gave None.

    rows: of the data set, whose columns reward functions get. extra: what else they get.
    Raises RewardError for a reward that fails and for a completion that none of them judges.
    """
    texts = tokenizer.batch_decode(batch.completion_ids, skip_special_tokens=True)
    chat = isinstance(rows[0]["prompt"], list)
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    columns |= {
        "prompts": [row["prompt"] for row in rows],
        "completions": [[{"role": "assistant", "content": t}] for t in texts] if chat else texts,
        "completion_ids": batch.completion_ids,
        "log_extra": lambda column, values: None,  # TRL's table of completions is not made here
        **extra,
    }
    behind = _behind_the_end(tokenizer, ends) if chat else []
    pairs = zip(batch.prompt_ids, batch.completion_ids, strict=True)
    ids = [[*prompt, *c, *(behind if c[-1] in ends else [])] for prompt, c in pairs]
    scores_BR = torch.stack([source(ids, columns) for source in sources], 1)
    for row in scores_BR.isnan().all(1).nonzero():
        says = "each returned None. Let one of them judge every completion"
        raise rewards.RewardError(f"no reward judged the completion {texts[int(row)]!r}: {says}")
    return scores_BR


def _behind_the_end(tokenizer: Any, ends: set[int]) -> list[int]:
    """What the chat template writes behind the end token, as a line break: a reward model is trained on complete
    conversations, and its score read there.
    """
    short = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}]
    ids = tokenizer.apply_chat_template(short, tokenize=True, return_dict=True)["input_ids"]
    return ids[max((i for i, token in enumerate(ids) if token in ends), default=len(ids)) + 1 :]


class FunctionReward:
    """A reward function. What it returns is checked, and an error names it (`rewards.checked`)."""

    def __init__(self, fn: Callable[..., list[float | None]]):
        self.fn = rewards.checked(fn)
        self.name = self.fn.__name__

    def __call__(self, ids: Sequence[Sequence[int]], columns: Mapping[str, Any]) -> Tensor:
        values = self.fn(**columns)
        return torch.tensor([float("nan") if v is None else float(v) for v in values])


class AdapterReward:
    """A LoRA adapter with a score head, on the policy's own frozen base."""

    def __init__(self, model: Any, tokenizer: Any, folder: Path, adapter: str):
        self.name, self.model, self.adapter, self.pad = folder.name, model, adapter, tokenizer.pad_token_id or 0
        folder, _ = read_saved(folder, reward=True)
        lora = LoraConfig.from_pretrained(str(folder))
        names = [Path(name or "").name for name in (lora.base_model_name_or_path, model.get_base_model().name_or_path)]
        if all(names) and len(set(names)) > 1:
            raise ValueError(f"{folder} was trained on {names[0]}, and the policy's base is {names[1]}: take its own")
        weights = load_file(folder / "adapter_model.safetensors")
        heads = [weights.pop(key) for key in list(weights) if key.endswith("score.weight")]
        if [len(head) for head in heads] != [1]:
            says = 'LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"]) and num_labels=1'
            shapes = [tuple(head.shape) for head in heads] or "none"
            raise ValueError(f"{folder} has no score head with one output but {shapes}: train it with {says}")
        lora.modules_to_save, lora.task_type, lora.inference_mode = None, "CAUSAL_LM", True
        add_frozen(model, adapter, lora, weights)
        (head,) = heads
        self.head = nn.Linear(head.shape[1], 1, bias=False, device=model.device, dtype=torch.float32)
        self.head.requires_grad_(False).weight.copy_(head)

    @torch.no_grad()
    def __call__(self, ids: Sequence[Sequence[int]], columns: Mapping[str, Any]) -> Tensor:
        """Scores of prompt and completion, read off the last token. That is counted, not looked for: a model that
        pools at the last token which is not padding goes wrong where the end token pads.
        """
        score_B, device = torch.empty(len(ids)), self.model.device
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        decoder = self.model.get_base_model().get_decoder()
        with adapters.using(self.model, self.adapter):
            for start in range(0, len(order), ROWS_AT_ONCE):
                rows = order[start : start + ROWS_AT_ONCE]
                batch = right_pad([ids[i] for i in rows], self.pad, device)
                last = torch.tensor([len(ids[i]) - 1 for i in rows], device=device)
                hidden = decoder(input_ids=batch, use_cache=False).last_hidden_state
                hidden = hidden[torch.arange(len(rows), device=device), last]
                score_B[rows] = linear(self.head, hidden)[:, 0].float().cpu()
        if not score_B.isfinite().all():
            says = f"gave {score_B[~score_B.isfinite()][0].item()}: its training has diverged"
            raise rewards.RewardError(f"reward adapter {self.name!r} {says}")
        return score_B
