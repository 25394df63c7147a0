"""The checks that cost hours when they are left out: one call between a trainer and its train().

    trainer = DPOTrainer(model=model, args=..., train_dataset=pairs, processing_class=tokenizer)
    preflight.check(trainer, pairs)
    trainer.train()

It takes TRL's SFT, Reward, DPO, KTO, ORPO, GRPO and RLOO trainers and `rlnb.train.ppo.PPOTrainer`, and
leaves to them what they say well themselves, such as a batch that num_generations does not divide.
What it says of GPUs is untested until tests/gpu has run on one.
"""

import inspect
import warnings
from contextlib import suppress
from typing import Any

import numpy

from rlnb import machine
from rlnb.model import lora, memory

# What TRL passes to a reward function beside the columns of the data set.
GIVEN = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
ERROR = 0.25  # of a predicted peak, up or down: how far rlnb.model.memory may be off
MIXED = 0.5  # of the batches with both labels that shuffled rows would have
# The best rate for LoRA on Llama models is said to be 10 x 5e-5 x (2000 / width)^0.781 (documentation
# of Tinker, 2025): 2.5e-3 for the practice model, which takes 2e-3. A tenth of it for whole models,
# and a tenth for DPO and KTO, which only nudge. Three times that broke most methods of this workbook.
BASE, WIDTH, EXPONENT, HOT, COLD = 5e-4, 2000, 0.781, 3, 1 / 100


def check(trainer: Any, data: Any = None, *, max_lora_rank: int | None = None) -> None:
    """Silent when all is well. Raises one ValueError for all that is sure to fail, or to run to the
    end and teach nothing, and gives a UserWarning for each thing that is odd and may be wanted.

    data: the data set as it was given to the trainer, to count the rows that it has left out.
    max_lora_rank: of the engine that samples; by default what the model's own vLLM engine has.
    """
    flight = _Flight(trainer)
    _adapter(flight, max_lora_rank)
    _rows(flight, data)
    for look in (_settings, _labels, _rewards, _room):
        look(flight)
    if flight.wrong:
        raise ValueError("before training: " + "\nand: ".join(flight.wrong))
    for text in flight.odd:
        warnings.warn(text, stacklevel=2)


class _Flight:
    """What the checks ask of a trainer, and what they find. Tokens, or None where it cannot be told:
    (rows,) of the prompt, (rows,) of the whole with its longer completion, the longest after cuts.
    """

    def __init__(self, trainer: Any):
        self.wrong, self.odd = [], []
        self.trainer, self.args, self.model = trainer, trainer.args, trainer.model
        self.name, self.config = type(trainer).__name__, self.model.config.get_text_config()
        adapters = getattr(self.model, "peft_config", None) or {}
        self.adapter = adapters.get("default") or next(iter(adapters.values()), None)
        rows = trainer.train_dataset
        self.rows = rows if hasattr(rows, "column_names") and hasattr(rows, "__len__") else None
        self.columns = set() if self.rows is None else set(self.rows.column_names)
        self.samples = any(hasattr(trainer, kind) for kind in ("reward_funcs", "reward_sources"))
        self.limit = getattr(self.args, "max_length", None)
        if getattr(self.args, "packing", False):
            self.limit = None  # rows are joined and cut anew
        self.prompt = self.whole = self.longest = None
        if self.rows is not None and len(self.rows):
            self._measure()

    def _measure(self) -> None:
        if self.samples:
            from rlnb.model import sampling

            prompts = sorted(self.rows["prompt"], key=lambda prompt: len(str(prompt)))[-64:]
            ids = sampling.tokenize(self.trainer.processing_class, prompts)
            self.longest = max(map(len, ids)) + self.args.max_completion_length
            return
        self.prompt = self._lengths({"prompt_ids", "prompt_input_ids"})
        ends = {"chosen_ids", "rejected_ids", "completion_ids"}
        self.whole = self._lengths({"input_ids", "chosen_input_ids", "rejected_input_ids"} | ends)
        if "prompt_ids" in self.columns:  # DPO and KTO keep it apart
            self.whole = self.prompt + self.whole
        if self.whole is not None:
            self.longest = int(min(self.whole.max(), self.limit or self.whole.max()))

    def _lengths(self, columns: set[str]) -> Any:
        """(rows,) the length of each row's longest list in those of the columns that there are."""
        import pyarrow.compute as arrow

        names = sorted(columns & self.columns)
        table = self.rows.select_columns(names).with_format("arrow")[:] if names else {}
        lengths = [arrow.list_value_length(table[name]).to_numpy() for name in names]
        return numpy.maximum.reduce(lengths) if names else None


def _adapter(t: _Flight, limit: int | None) -> None:
    trains = [name for name, p in t.model.named_parameters() if p.requires_grad]
    is_lora = "LORA" in str(getattr(t.adapter, "peft_type", ""))
    if not trains or (is_lora and not any("lora_" in name for name in trains)):
        t.wrong.append(
            f"the {'adapter' if t.adapter else 'model'} is frozen, and training would change nothing. "
            "Load a saved one with models.load_model(lora=folder), or PEFT's is_trainable=True"
        )
    if any(getattr(module, "merged", False) is True for module in t.model.modules()):
        t.wrong.append("the adapter is merged into the weights: call model.unmerge_adapter() first")
    with suppress(AttributeError):  # Unsloth on a GPU has an engine: where vLLM 0.32 keeps it
        config = t.model.vllm_engine.llm_engine.vllm_config
        limit = config.lora_config.max_lora_rank if limit is None else limit
    if limit is not None and is_lora and t.adapter.r > limit:
        t.wrong.append(
            f"LoRA rank {t.adapter.r} is above max_lora_rank {limit}, which vLLM says at the first "
            f"rollout: load the model with max_lora_rank={t.adapter.r}, or lower the rank"
        )


def _settings(t: _Flight) -> None:
    tokenizer, rate = t.trainer.processing_class, t.args.learning_rate
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        end = tokenizer.eos_token
        t.odd.append(
            f"{end} ends and pads: where padding is masked, no end is learnt. Pad with another"
        )
    if t.args.bf16 and t.model.device.type == "cuda":
        import torch

        if not torch.cuda.is_bf16_supported(including_emulation=False):
            t.odd.append("this GPU only emulates bf16: set bf16=False, fp16=True")
    elif t.args.bf16 and machine.cpu_bf16() == set():
        t.odd.append("this CPU has no instructions for bf16: set bf16=False, which is faster here")
    usual = BASE * (WIDTH / t.config.hidden_size) ** EXPONENT
    usual *= (1 if t.adapter else 0.1) * (0.1 if "DPO" in t.name or "KTO" in t.name else 1)
    if rate > HOT * usual:
        t.odd.append(f"learning_rate {rate:.1e} may break the model: try about {usual:.0e}")
    elif rate < COLD * usual:
        t.odd.append(f"learning_rate {rate:.1e} may teach too little: try about {usual:.0e}")


def _rows(t: _Flight, data: Any) -> None:
    """Rows that the trainer has left out, or will cut."""
    if t.rows is None:
        return
    left = len(t.rows)
    given = left if data is None else len(data)
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


def _labels(t: _Flight) -> None:
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


def _rewards(t: _Flight) -> None:
    """Whole groups of prompts, and the columns that the reward functions ask for."""
    if not t.samples or t.rows is None:
        return
    group, batch = (
        getattr(t.args, "num_generations", 1),
        getattr(t.args, "generation_batch_size", 0),
    )
    if len(t.rows) < batch // group:
        t.wrong.append(
            f"a batch takes {batch // group} prompts (generation_batch_size {batch} / num_generations "
            f"{group}), and there are {len(t.rows)}: training would end without a step. Lower the batch"
        )
    closed = t.args.remove_unused_columns
    passed = GIVEN | ((set() if closed else t.columns) - {"prompt", "completion", "completion_ids"})
    sources = [getattr(s, "fn", None) for s in getattr(t.trainer, "reward_sources", ())]
    for fn in getattr(t.trainer, "reward_funcs", sources):
        if not callable(fn) or hasattr(fn, "forward"):
            continue  # a model
        what = f"the reward function {getattr(fn, '__name__', fn)}"
        asked = inspect.signature(fn).parameters.values()
        named = {p.name for p in asked if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        missing = {p.name for p in asked if p.default is p.empty} & named - passed
        if missing:
            there = f"the data set has {', '.join(sorted(t.columns))}"
            why = "set remove_unused_columns=False" if closed else there
            t.wrong.append(f"{what} asks for {', '.join(sorted(missing))}: {why}")
        elif passed - named and not any(p.kind == p.VAR_KEYWORD for p in asked):
            extra = ", ".join(sorted(passed - named))
            t.wrong.append(f"{what} is passed {extra} too: give it **kwargs")


def _room(t: _Flight) -> None:
    """Positions, and memory, without what rollouts cache and what reward models take."""
    if not t.longest:
        return
    size = getattr(t.trainer, "micro_batch_size", t.args.per_device_train_batch_size)  # PPO's own
    positions = getattr(t.config, "max_position_embeddings", None)
    if positions and t.longest > positions:
        knob = "max_completion_length" if t.samples else "max_length"
        what = f"up to {t.longest} tokens in a row, and the model has {positions} positions"
        t.wrong.append(f"{what}, beyond which it writes nonsense: lower {knob}")
    need, free = _need(t, size), _free(t.model.device)
    if need > (1 - ERROR) * free:
        (t.wrong if need * (1 - ERROR) > free else t.odd).append(
            f"a batch of {size} x {t.longest} tokens takes about {need / memory.MB:,.0f} MB more, and "
            f"{free / memory.MB:,.0f} MB are free: halve per_device_train_batch_size and double "
            "gradient_accumulation_steps, or set gradient_checkpointing=True"
        )


def _need(t: _Flight, size: int) -> int:
    """Bytes that training adds to what the model holds; 0 for an architecture not predicted."""
    targets = getattr(t.adapter, "target_modules", None)
    targets = tuple(targets) if targets and not isinstance(targets, str) else "all-linear"
    sides = 2 if any(kind in t.name for kind in ("DPO", "ORPO", "Reward")) else 1
    parameters = list(t.model.parameters())
    try:
        predicted = memory.predict(
            t.config, t.adapter and lora.LoRA(t.adapter.r, t.adapter.lora_alpha, targets=targets),
            batch=sides * size, length=t.longest, checkpointing=t.args.gradient_checkpointing,
            dtype=str(parameters[0].dtype).removeprefix("torch."), autocast=t.args.bf16 or t.args.fp16,
        )  # fmt: skip
    except (AttributeError, ValueError):
        return 0
    held = sum(p.numel() * p.element_size() for p in parameters)
    # ORPO holds all logits at once; the others take the head in pieces, or score one token.
    return predicted.peak - held - (0 if "ORPO" in t.name else predicted.logits)


def _free(device: Any) -> int:
    if device.type != "cuda":
        return machine.free_memory()
    import torch

    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept
