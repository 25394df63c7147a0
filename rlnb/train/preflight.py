"""The checks that cost hours when they are left out, between a trainer and its train(). ``fit`` calls them.

They take TRL's SFT, Reward, DPO, KTO, ORPO, GRPO and RLOO trainers and PPOTrainer, and leave to them what
they say well themselves, such as a batch that num_generations does not divide.
"""

import inspect
import warnings
from dataclasses import dataclass, field
from typing import Any

from rlnb import machine
from rlnb.model import memory, sampling
from rlnb.model.lora import LoRA

import numpy as np
import pyarrow.compute as arrow
import torch

# What TRL passes to a reward function beside the columns of the data set.
PASSED = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
ERROR = 0.25  # of a predicted peak, up or down: how far rlnb.model.memory may be off
MIXED = 0.5  # of the batches with both labels that shuffled rows would have
LEAST = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "num_generations": 2, "temperature": 1e-6,
         "max_completion_length": 1, "max_length": 1, "beta": 0.0, "learning_rate": 1e-12}  # fmt: skip
# The best rate for LoRA on Llama models is said to be 10 x 5e-5 x (2000 / width)^0.781 (documentation
# of Tinker, 2025): 2.5e-3 for the practice model, which takes 2e-3. A tenth of it for whole models,
# and a tenth for DPO and KTO, which only nudge. Three times that broke most methods of this workbook.
BASE, WIDTH, EXPONENT, HOT, COLD = 5e-4, 2000, 0.781, 3, 1 / 100


def check(trainer: Any, data: Any = None) -> None:
    """Silent when all is well. Raises one ValueError for all that is sure to fail, or to run to the
    end and teach nothing, and gives a UserWarning for each thing that is odd and may be wanted.

    data: the data set as it was given to the trainer, to count the rows that it has left out.
    """
    checked = _Checked(trainer)
    for look in (_adapter, _reference, _settings, _labels, _rewards, _room, _sampler):
        look(checked)
    _rows(checked, data)
    if checked.wrong:
        raise ValueError("before training: " + "\nand: ".join(checked.wrong))
    for text in checked.odd:
        warnings.warn(text, stacklevel=3)


def samples(trainer: Any) -> bool:
    """Whether a trainer learns from completions that it samples: GRPO, RLOO, PPO."""
    return hasattr(trainer, "reward_funcs") or hasattr(trainer, "reward_sources")


@dataclass
class _Checked:
    """A trainer, what it is about to read, and what the checks find. Lengths are in tokens, (rows,) or None:
    of the prompt, and of the whole with its longer completion. longest: of all, after cuts.
    """

    trainer: Any
    wrong: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    prompt: np.ndarray | None = None
    whole: np.ndarray | None = None
    longest: int | None = None

    def __post_init__(self):
        trainer = self.trainer
        self.args, self.model, self.name = trainer.args, trainer.model, type(trainer).__name__
        adapters = getattr(self.model, "peft_config", None) or {}
        self.adapter = adapters.get("default") or next(iter(adapters.values()), None)
        rows = trainer.train_dataset
        self.rows = rows if hasattr(rows, "column_names") and hasattr(rows, "__len__") else None
        self.columns = set() if self.rows is None else set(self.rows.column_names)
        packing = getattr(self.args, "packing", False)  # rows are joined and cut anew
        self.limit = None if packing else getattr(self.args, "max_length", None)
        if not self.rows:
            return
        if samples(trainer):
            prompts = sorted(self.rows["prompt"], key=lambda prompt: len(str(prompt)))[-64:]
            ids = sampling.tokenize(trainer.processing_class, prompts)
            self.longest = max(map(len, ids)) + self.args.max_completion_length
            return
        self.prompt = self._lengths("prompt_ids", "prompt_input_ids")
        self.whole = self._lengths("input_ids", "chosen_input_ids", "rejected_input_ids", "chosen_ids",
                                   "rejected_ids", "completion_ids")  # fmt: skip
        if "prompt_ids" in self.columns:  # DPO and KTO keep it apart
            self.whole = self.prompt + self.whole
        if self.whole is not None:
            self.longest = int(min(self.whole.max(), self.limit or self.whole.max()))

    def _lengths(self, *names: str) -> np.ndarray | None:
        """(rows,) the length of each row's longest list in those of the columns that there are."""
        names = [name for name in names if name in self.columns]
        table = self.rows.select_columns(names).with_format("arrow")[:] if names else {}
        lengths = [arrow.list_value_length(table[name]).to_numpy() for name in names]
        return np.maximum.reduce(lengths) if names else None


def _adapter(t: _Checked) -> None:
    trains = [name for name, p in t.model.named_parameters() if p.requires_grad]
    is_lora = "LORA" in str(getattr(t.adapter, "peft_type", ""))
    if not trains or (is_lora and not any("lora_" in name for name in trains)):
        t.wrong.append(
            f"the {'adapter' if t.adapter else 'model'} is frozen, and training would change nothing. "
            "Load a saved one with load_model(name, folder), or PEFT's is_trainable=True"
        )
    if any(getattr(module, "merged", False) is True for module in t.model.modules()):
        t.wrong.append("the adapter is merged into the weights: call model.unmerge_adapter() first")


def _reference(t: _Checked) -> None:
    """Unsloth's GRPOTrainer for GPUs takes out TRL's copy of a policy that starts from an adapter."""
    if "GRPO" not in t.name or not t.args.beta or not t.adapter or "ref" in t.model.peft_config:
        return
    if any(p.any() for name, p in t.model.named_parameters() if "lora_B." in name):
        t.odd.append(
            f"beta is {t.args.beta:g}, and this trainer measures the KL from the base, not from the adapter that the "
            "policy starts from: set beta=0.0, or train with RLOO, which keeps a copy of that adapter"
        )


def _settings(t: _Checked) -> None:
    tokenizer, rate = t.trainer.processing_class, t.args.learning_rate
    for name, least in LEAST.items():
        value = getattr(t.args, name, None)
        if isinstance(value, int | float) and not least <= value < np.inf:
            t.wrong.append(f"{name} is {value!r}: it must be at least {least:g}")
    if t.args.max_steps < 1 and (t.args.max_steps != -1 or not 0 < t.args.num_train_epochs < np.inf):
        t.wrong.append(f"max_steps is {t.args.max_steps}: give 1 or more, or -1 and num_train_epochs above 0")
    if bad := next((n for n, p in t.model.named_parameters() if not p.isfinite().all()), None):
        t.wrong.append(f"the weight {bad} holds NaN or infinity: what it was loaded from is broken")
    end = tokenizer.eos_token
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        t.odd.append(f"{end} ends and pads: where padding is masked, no end is learnt. Pad with another")
    answers = t.rows[:64]["labels"] if "labels" in t.columns else []
    whole = [answer for answer in answers if not t.limit or len(answer) < t.limit]
    if whole and not any(tokenizer.eos_token_id in answer for answer in whole):
        t.odd.append(f"no answer holds {end}, so no end is learnt: put it after each one")
    if t.args.bf16 and t.model.device.type == "cpu" and machine.cpu_bf16() == set():
        t.odd.append("this CPU has no instructions for bf16: set bf16=False, which is faster here")
    usual = BASE * (WIDTH / t.model.config.get_text_config().hidden_size) ** EXPONENT
    usual *= (1 if t.adapter else 0.1) * (0.1 if "DPO" in t.name or "KTO" in t.name else 1)
    if rate > HOT * usual:
        t.odd.append(f"learning_rate {rate:.1e} may break the model: try about {usual:.0e}")
    elif rate < COLD * usual:
        t.odd.append(f"learning_rate {rate:.1e} may teach too little: try about {usual:.0e}")


def _rows(t: _Checked, data: Any) -> None:
    """Rows that the trainer has left out, or will cut."""
    if t.rows is None:
        return
    left, given = len(t.rows), len(t.rows if data is None else data)
    if "label" in t.columns and "chosen" in getattr(data, "column_names", ()):
        given *= 2  # KTO takes pairs apart
    if not left:
        t.wrong.append(f"no row is left: all are too long for max_length {t.limit}")
    elif t.limit and left < given:
        t.odd.append(f"{given - left} of {given} rows are left out, too long for {t.limit} tokens")
    if not t.limit or t.whole is None:
        return
    if t.prompt is not None and (empty := int((t.prompt >= t.limit).sum())):
        t.wrong.append(
            f"{empty} of {left} prompts fill max_length {t.limit} alone, and without a token of "
            "completion the loss is NaN: raise it, or leave those rows out"
        )
    apart = t.columns & {"prompt_ids", "chosen_ids"}  # SFT's and ORPO's rows are cut already
    if cut := int((t.whole > t.limit).sum() if apart else (t.whole >= t.limit).sum()):
        t.odd.append(f"{cut} of {left} rows reach max_length {t.limit}: what follows is cut off")


def _labels(t: _Checked) -> None:
    """KTO reads rows in order, in batches of a fixed size."""
    if "KL_completion_ids" not in t.columns or not len(t.rows):
        return
    labels, size = list(t.rows["label"]), t.args.per_device_train_batch_size
    good = sum(labels) / len(labels)
    batches = [set(labels[i : i + size]) for i in range(0, len(labels), size)]
    mixed = sum(len(batch) == 2 for batch in batches) / len(batches)
    if good == 0:
        t.wrong.append("all labels are False: KTO would unlearn whatever it writes")
    elif good == 1:
        t.odd.append("all labels are True: KTO comes down to imitation, which SFT does better")
    elif mixed < MIXED * (1 - good**size - (1 - good) ** size):
        t.odd.append(
            f"{mixed:.0%} of the batches have both labels, and KTO reads the rows in order: shuffle "
            "them (TRL itself sorts pairs that it takes apart; preferences.unpair mixes them)"
        )


def _rewards(t: _Checked) -> None:
    """Whole groups of prompts, finite weights, and the columns that the reward functions ask for."""
    if not samples(t.trainer) or t.rows is None:
        return
    group, batch = getattr(t.args, "num_generations", 1), getattr(t.args, "generation_batch_size", 0)
    if len(t.rows) < batch // group:
        t.wrong.append(
            f"a batch takes {batch // group} prompts (generation_batch_size {batch} / num_generations "
            f"{group}), and there are {len(t.rows)}: training would end without a step. Lower the batch"
        )
    if not np.isfinite(weights := t.args.reward_weights or [1.0]).all():
        t.wrong.append(f"reward_weights is {weights}: give finite numbers")
    closed = t.args.remove_unused_columns
    passed = PASSED | ((set() if closed else t.columns) - {"prompt", "completion", "completion_ids"})
    sources = [getattr(source, "fn", None) for source in getattr(t.trainer, "reward_sources", ())]
    for fn in getattr(t.trainer, "reward_funcs", sources):
        if not callable(fn) or isinstance(fn, torch.nn.Module):
            continue
        what = f"the reward function {getattr(fn, '__name__', fn)}"
        parameters = inspect.signature(fn).parameters.values()
        named = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        if missing := {p.name for p in parameters if p.default is p.empty} & named - passed:
            there = f"the data set has {', '.join(sorted(t.columns))}"
            why = "set remove_unused_columns=False" if closed else there
            t.wrong.append(f"{what} asks for {', '.join(sorted(missing))}: {why}")
        elif passed - named and not any(p.kind == p.VAR_KEYWORD for p in parameters):
            t.wrong.append(f"{what} is passed {', '.join(sorted(passed - named))} too: give it **kwargs")


def _room(t: _Checked) -> None:
    """Positions, and memory, without what rollouts cache and what reward models take."""
    if not t.longest:
        return
    size = getattr(t.trainer, "micro_batch_size", t.args.per_device_train_batch_size)  # PPO's own
    positions = getattr(t.model.config.get_text_config(), "max_position_embeddings", None)
    if positions and t.longest > positions:
        knob = "max_completion_length" if samples(t.trainer) else "max_length"
        what = f"up to {t.longest} tokens in a row, and the model has {positions} positions"
        t.wrong.append(f"{what}, beyond which it writes nonsense: lower {knob}")
    on_gpu = t.model.device.type == "cuda"
    need, free = memory_needed(t, size), torch.cuda.mem_get_info()[0] if on_gpu else machine.free_memory()
    if need > (1 - ERROR) * free:
        (t.wrong if need * (1 - ERROR) > free else t.odd).append(
            f"a batch of {size} x {t.longest} tokens takes about {need / memory.MB:,.0f} MB more, and "
            f"{free / memory.MB:,.0f} MB are free: halve per_device_train_batch_size and double "
            "gradient_accumulation_steps, or set gradient_checkpointing=True"
        )


def _sampler(t: _Checked) -> None:
    """What samples has to be the policy: an engine may hold the base without the adapter, or an older one."""
    if not samples(t.trainer) or not t.rows or t.wrong:
        return
    tokenizer, prompt = t.trainer.processing_class, t.rows["prompt"][:1]
    found = sampling.sample(t.model, tokenizer, prompt, max_new_tokens=8, temperature=0, progress=False)
    (prompt_ids,), ((sampled,),) = sampling.tokenize(tokenizer, prompt), found.ids
    with sampling.inference(t.model) as module:
        logits = module(input_ids=torch.tensor([prompt_ids + sampled], device=t.model.device)).logits[0]
    likeliest = logits[len(prompt_ids) - 1 : -1].argmax(-1).tolist()
    same = sum(a == b for a, b in zip(likeliest, sampled, strict=True))
    if same <= len(sampled) / 2:
        t.wrong.append(
            f"what samples is not the policy: of {len(sampled)} greedy tokens {same} are what the model itself finds "
            "likeliest. Make the trainer from the model that load_model returned, and leave its adapters alone"
        )


def memory_needed(t: _Checked, size: int) -> int:
    """Bytes that training adds to what the model holds; 0 for an architecture not predicted."""
    targets = getattr(t.adapter, "target_modules", None) or "all-linear"
    targets = "all-linear" if isinstance(targets, str) else tuple(targets)
    sides = 2 if any(kind in t.name for kind in ("DPO", "ORPO", "Reward")) else 1
    parameters = list(t.model.parameters())
    try:
        predicted = memory.predict(
            t.model.config.get_text_config(), t.adapter and LoRA(t.adapter.r, t.adapter.lora_alpha, targets=targets),
            batch=sides * size, length=t.longest, checkpointing=t.args.gradient_checkpointing,
            dtype=str(parameters[0].dtype).removeprefix("torch."), autocast=t.args.bf16 or t.args.fp16,
        )  # fmt: skip
    except (AttributeError, ValueError):
        return 0
    held = sum(p.numel() * p.element_size() for p in parameters)
    # ORPO holds all logits at once; the others take the head in pieces, or score one token.
    return predicted.peak - held - (0 if "ORPO" in t.name else predicted.logits)
