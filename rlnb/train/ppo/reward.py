"""What PPO takes as a reward: functions with TRL's signature, reward models, reward adapters.

Each becomes a source: an object with a name that maps a batch of completions to (rows,) numbers, NaN
where it cannot judge.
"""

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlnb.task import rewards
from rlnb.train.ppo.model import (
    REWARD, causal_lm, has_adapter, linear, load_adapter, right_pad, use_adapter,
)  # fmt: skip

ROWS_AT_ONCE = 64  # sequences that a reward model reads in one forward pass


def sources(reward_funcs: Any, model: Any, tokenizer: Any) -> list[Any]:
    """A source for each of `reward_funcs`, which may be one or a list of

    - functions with TRL's signature (`rlnb.task.rewards`),
    - sequence classification models with one label,
    - a reward adapter's folder: LoRA with a score head on the policy's base, as TRL's RewardTrainer
      saves it. It moves onto that base, which is not loaded a second time.

    Raises ValueError, TypeError or FileNotFoundError for anything else and for a reward model that
    does not read the policy's tokens.
    """
    given = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if not given:
        raise ValueError("reward_funcs is empty: give at least one reward function or model")
    found = [_source(reward, model, tokenizer, i) for i, reward in enumerate(given)]
    names = [source.name for source in found]
    if len(set(names)) < len(names):
        raise ValueError(f"rewards need names of their own, got {names}: set fn.__name__")
    return found


def _source(reward: Any, model: Any, tokenizer: Any, index: int) -> Any:
    if isinstance(reward, str | os.PathLike):
        return AdapterReward(
            model, tokenizer, Path(reward), REWARD if index == 0 else f"{REWARD}{index}"
        )
    if isinstance(reward, nn.Module):
        return ModelReward(reward, model, tokenizer)
    if callable(reward):
        return FunctionReward(reward)
    raise TypeError(
        f"reward_funcs[{index}] is {reward!r}: it must be a function, a sequence classification "
        "model, or the folder of a reward adapter"
    )


def judge(
    sources: Sequence[Any], tokenizer: Any, rows: Sequence[Mapping[str, Any]], prompt_ids: Sequence,
    completion_ids: Sequence, ends: set[int], **extra: Any,
) -> Tensor:  # fmt: skip
    """(B, rewards), NaN where a reward function gave None.

    rows: of the data set, whose columns reward functions get. extra: what else they get.
    Raises RewardError for a reward that fails and for a completion that none of them judges.
    """
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    chat, read = isinstance(rows[0]["prompt"], list), any(isinstance(s, _Scorer) for s in sources)
    suffix = _after_the_end(tokenizer, ends) if chat and read else []
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    columns |= {
        "prompts": [row["prompt"] for row in rows],
        "completions": [[{"role": "assistant", "content": t}] for t in texts] if chat else texts,
        "completion_ids": completion_ids,
        "log_extra": lambda column, values: None,  # TRL's table of completions is not made here
        **extra,
    }
    full = [
        [*p, *c, *(suffix if c[-1] in ends else [])]
        for p, c in zip(prompt_ids, completion_ids, strict=True)
    ]
    judged = torch.stack([source(full, columns) for source in sources], 1)
    unjudged = judged.isnan().all(1).nonzero()
    if len(unjudged):
        raise rewards.RewardError(
            f"no reward judged the completion {texts[int(unjudged[0])]!r}: each returned None. Let "
            "one of them judge every completion"
        )
    return judged


def _after_the_end(tokenizer: Any, ends: set[int]) -> list[int]:
    """What the chat template writes behind the end token, as a line break.

    A reward model is trained on whole conversations, and its score read there.
    """
    short = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}]
    ids = tokenizer.apply_chat_template(short, tokenize=True, return_dict=True)["input_ids"]
    return ids[max((i for i, token in enumerate(ids) if token in ends), default=len(ids)) + 1 :]


class FunctionReward:
    """A reward function. What it returns is checked, and an error names it (`rewards.checked`)."""

    def __init__(self, fn: Callable[..., list[float | None]]):
        self.fn = rewards.checked(fn)
        self.name = self.fn.__name__

    def __call__(self, rows: Sequence[Sequence[int]], columns: Mapping[str, Any]) -> Tensor:
        """rows: ids of prompt and completion. columns: what TRL passes to a reward function."""
        values = self.fn(**columns)
        return torch.tensor([float("nan") if v is None else float(v) for v in values])


class _Scorer:
    """What a model and an adapter share: one score per sequence, read off its last token.

    The last token is counted, not looked for: a model that pools at the last token which is not
    padding goes wrong where the end token pads.
    """

    pad = 0

    def __call__(self, rows: Sequence[Sequence[int]], columns: Mapping[str, Any]) -> Tensor:
        scores, device = torch.empty(len(rows)), self.module.device
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        with torch.no_grad():
            for start in range(0, len(order), ROWS_AT_ONCE):
                batch = order[start : start + ROWS_AT_ONCE]
                ids = right_pad([rows[i] for i in batch], self.pad, device)
                last = torch.tensor([len(rows[i]) - 1 for i in batch], device=device)
                scores[batch] = self.score(ids, last).float().cpu()
        if not scores.isfinite().all():
            raise rewards.RewardError(
                f"reward model {self.name!r} gave {scores[~scores.isfinite()][0].item()}: "
                "its training has diverged, or its precision is too low"
            )
        return scores


class ModelReward(_Scorer):
    """A sequence classification model with one label, kept frozen."""

    def __init__(self, reward: nn.Module, model: Any, tokenizer: Any):
        config = reward.config
        self.name = Path(getattr(config, "_name_or_path", "") or type(reward).__name__).name
        if getattr(config, "num_labels", 1) != 1:
            raise ValueError(
                f"reward model {self.name!r} has {config.num_labels} labels: a reward is one number, "
                "so load it with num_labels=1"
            )
        _check_vocabulary(self.name, config, model)
        _check_tokenizer(self.name, getattr(config, "_name_or_path", ""), tokenizer)
        self.module = reward.eval().requires_grad_(False)
        self.pad = tokenizer.pad_token_id or 0

    def score(self, ids: Tensor, last: Tensor) -> Tensor:
        inner = causal_lm(self.module)
        head = getattr(inner, "score", None)
        if head is None:  # an encoder, which pools in its own way and is told what is padding
            there = torch.arange(ids.shape[1], device=ids.device) <= last[:, None]
            return self.module(input_ids=ids, attention_mask=there.long()).logits[:, 0]
        hidden = getattr(inner, inner.base_model_prefix)(input_ids=ids).last_hidden_state
        hidden = hidden[torch.arange(len(ids), device=ids.device), last]
        return linear(head, hidden)[:, 0]


class AdapterReward(_Scorer):
    """A LoRA adapter with a score head, on the policy's own frozen base."""

    def __init__(self, model: Any, tokenizer: Any, folder: Path, adapter: str):
        from peft import LoraConfig
        from safetensors.torch import load_file

        self.name, self.module, self.adapter = folder.name, model, adapter
        config, weights = _read(folder)
        if not has_adapter(model):
            raise ValueError(
                f"{folder} is an adapter, which needs a frozen base, and the policy's trains whole: "
                "load it onto a sequence classification model and pass that"
            )
        _check_base(folder, config, model)
        _check_tokenizer(self.name, folder, tokenizer)
        weights = load_file(weights)
        heads = {key: weights.pop(key) for key in list(weights) if key.endswith("score.weight")}
        if len(heads) != 1 or next(iter(heads.values())).shape[0] != 1:
            shapes = {key: tuple(head.shape) for key, head in heads.items()}
            raise ValueError(
                f"{folder} has no score head with one output but {shapes or 'none'}: train it with "
                'LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"]) and num_labels=1'
            )
        config = LoraConfig.from_pretrained(str(folder))
        config.modules_to_save, config.task_type, config.inference_mode = None, "CAUSAL_LM", True
        config.init_lora_weights, config.lora_dropout = True, 0.0
        flags = [(p, p.requires_grad) for p in model.parameters()]
        if adapter in model.peft_config:
            model.delete_adapter(adapter)
        with torch.random.fork_rng():
            model.add_adapter(adapter, config)
        load_adapter(model, weights, adapter, folder / "adapter_model.safetensors")
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name:
                parameter.requires_grad_(False)
        score = next(iter(heads.values()))
        self.head = nn.Linear(score.shape[1], 1, bias=False, dtype=torch.float32)
        self.head.weight.data.copy_(score)
        self.head.requires_grad_(False)
        self.pad = tokenizer.pad_token_id or 0

    def score(self, ids: Tensor, last: Tensor) -> Tensor:
        with use_adapter(self.module, self.adapter):
            decoder = causal_lm(self.module).get_decoder()
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
        return linear(
            self.head.to(ids.device), hidden[torch.arange(len(ids), device=ids.device), last]
        )[:, 0]


# --- checks --------------------------------------------------------------------------------------


def _read(folder: Path) -> tuple[dict[str, Any], Path]:
    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for needed in (file, weights):
        if not needed.is_file():
            raise FileNotFoundError(
                f"{folder} is no reward adapter: it has no {needed.name}. A reward model that is not "
                "an adapter goes in as a loaded AutoModelForSequenceClassification"
            )
    return json.loads(file.read_text(encoding="utf-8")), weights


def _check_base(folder: Path, config: Mapping[str, Any], model: Any) -> None:
    trained_on = Path(config.get("base_model_name_or_path") or "").name
    policy = Path(causal_lm(model).config._name_or_path or "").name
    if trained_on and policy and trained_on != policy:
        raise ValueError(
            f"{folder} was trained on {trained_on}, and the policy's base is {policy}: a reward "
            "adapter works on its own base only"
        )


def _check_vocabulary(name: str, config: Any, model: Any) -> None:
    theirs = getattr(config.get_text_config(), "vocab_size", None)
    ours = causal_lm(model).config.get_text_config().vocab_size
    if theirs != ours:
        raise ValueError(_other_tokenizer(name, f"a vocabulary of {theirs}, the policy of {ours}"))


def _check_tokenizer(name: str, source: str | os.PathLike[str], tokenizer: Any) -> None:
    """Compares vocabularies, if there is a tokenizer in the folder, or in the cache of the hub's."""
    folder = Path(source)
    if not source or (folder.is_dir() and not (folder / "tokenizer_config.json").is_file()):
        return
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(str(source), local_files_only=True).get_vocab()
    except (OSError, ValueError) as error:
        warnings.warn(f"the tokenizer of {source} was not compared: {error}", stacklevel=2)
        return
    ours = tokenizer.get_vocab()
    odd = next((token for token, i in ours.items() if theirs.get(token) != i), None)
    if odd is not None:
        there = theirs.get(odd, "missing")
        raise ValueError(
            _other_tokenizer(name, f"token {odd!r} as {there}, the policy as {ours[odd]}")
        )


def _other_tokenizer(name: str, difference: str) -> str:
    return (
        f"reward model {name!r} has another tokenizer: {difference}. It would read the policy's "
        "tokens as other words. Put it into a reward function that tokenises the text itself"
    )
