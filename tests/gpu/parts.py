"""The parts of a slot. Each checks one thing and returns its figures; slot.py starts a process for each."""

import functools
import importlib.util
import json
import math
import os
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

DRY = bool(os.environ.get("SLOT_DRY"))
PRACTICE, STEPS = "abacus-3m", 3 if DRY else 20
APART = 0.02  # nats: more than rounding between a policy and its reference before the first step
SHAPE = dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24)  # as Qwen2.5-0.5B; fewer words
METHODS = ("sft", "dpo", "kto", "orpo", "reward_model", "rloo", "grpo", "ppo")
HAS_VLLM = importlib.util.find_spec("vllm") is not None


def skip(why: str) -> None:
    """There is nothing to do on this machine."""
    print(why)
    sys.exit(77)


def sft_model() -> tuple[Any, Any]:
    """The practice model with the adapter of an SFT run, made once for all parts, and its tokenizer."""
    from rlnb.model import load_model
    from rlnb.train import find_or_train_sft

    return load_model(PRACTICE, find_or_train_sft().adapter)


def prompts(n: int) -> list[Any]:
    from rlnb.task import problems

    return [problems.prompt(p) for p in problems.load("validation")[: 4 if DRY else n]]


def digits(completions: list, **columns: Any) -> list[float]:
    """A reward that differs from one completion to the next, whatever a model can do."""
    return [sum(map(str.isdigit, completion[0]["content"])) / 10 for completion in completions]


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(4, 132, device=model.device).reshape(4, 32)).logits.float().cpu()


def off_by(found: Any, expected: Any) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def loading() -> dict[str, Any]:
    """A new adapter, a saved one, everything; ranks are refused before any memory is taken."""
    import pytest
    from rlnb.model import LoRA, backend, load_model, trainable
    from torch import cuda

    assert DRY or backend() == "unsloth-gpu", backend()
    before = cuda.memory_allocated()
    for fast in (False, True):
        with pytest.raises(ValueError, match="rank 32 is above max_lora_rank 16"):
            load_model(PRACTICE, LoRA(rank=32), max_lora_rank=16, fast_inference=fast)
    assert cuda.memory_allocated() == before
    if not DRY and not HAS_VLLM:
        with pytest.raises(ImportError, match="needs vllm"):
            load_model(PRACTICE, LoRA(), fast_inference=True)
    models = {"full": load_model(PRACTICE)[0], "new": load_model(PRACTICE, LoRA(rank=4))[0], "saved": sft_model()[0]}
    return {name: [*trainable(model), str(next(model.parameters()).dtype)] for name, model in models.items()}


def kernels(way: str) -> dict[str, Any]:
    """The same adapter through Unsloth's kernels, and, in the part after this, through transformers and PEFT."""
    import torch
    from rlnb.model import LoRA, load_model

    (model, _), draw = load_model(PRACTICE, LoRA()), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    found, file = logits(model), Path(os.environ["RLNB_RUNS"]).parent / "logits"
    if way == "unsloth":
        torch.save(found, file)
    error = off_by(torch.load(file), found)
    assert error < 0.05, error  # rounding to 16 bits, 4 layers
    return {"error": error}


def sampling() -> dict[str, Any]:
    """Greedy against one token after the other without a cache; the model's switches stay as they were."""
    import torch
    from rlnb.model import sampling as ours

    (model, tokenizer), asked, limit, same = sft_model(), prompts(16), 32, 0
    for training in (True, False):
        model.train(training)
        states = [[(m.training, getattr(m, "gradient_checkpointing", None)) for m in model.modules()]]
        found = [ids for [ids] in ours.sample(model, tokenizer, asked, temperature=0, max_new_tokens=limit).ids]
        states += [[(m.training, getattr(m, "gradient_checkpointing", None)) for m in model.modules()]]
        assert states[0] == states[1], f"a model with training={training} came back in another state"
    for ids, answer in zip(ours.tokenize(tokenizer, asked), found, strict=True):
        plain: list[int] = []
        with torch.no_grad():
            while len(plain) < limit and plain[-1:] != [tokenizer.eos_token_id]:
                scores = model(input_ids=torch.tensor([ids + plain], device=model.device)).logits[0, -1]
                plain.append(int(scores.argmax()))
        same += plain == answer
    assert same >= 0.8 * len(asked), same  # two tokens may be almost equally likely
    return {"same": same, "of": len(asked)}


def rollout() -> dict[str, Any]:
    """What GRPOTrainer and PPOTrainer call: the same completions for the same seed, none over the limit."""
    import torch
    from rlnb.model import sampling as ours

    model, tokenizer = sft_model()
    trainer = SimpleNamespace(
        model=model, processing_class=tokenizer, max_completion_length=16, chat_template=None, temperature=1.0,
        chat_template_kwargs={}, use_vllm=False, top_p=1.0, args=SimpleNamespace(generation_kwargs=None),
    )  # fmt: skip
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(ours.rollout(prompts(16) * 4, trainer)["completion_ids"])
    assert found[0] == found[1] != found[2] and max(map(len, found[0])) <= 16
    return {"different": len(set(map(tuple, found[0]))), "of": len(found[0])}


def vllm() -> dict[str, Any]:
    """vLLM at a rank that it rounds up: it samples from the policy, not the base, and GRPO trains with it."""
    if not HAS_VLLM:
        skip("vLLM is not installed")
    from rlnb.model import LoRA, adapters, load_model
    from rlnb.model.sampling import sample
    from rlnb.train import common, methods, recipe, train
    from trl import GRPOConfig, GRPOTrainer

    saved, how = train("sft", lora=LoRA(rank=12), problems=()).adapter, dict(temperature=0, max_new_tokens=32)
    expected = sample(*load_model(PRACTICE, saved), prompts(32), **how).ids
    model, tokenizer = load_model(PRACTICE, saved, fast_inference=True, max_lora_rank=12)
    found = sample(model, tokenizer, prompts(32), **how).ids
    with adapters.off(model):
        base = sample(model, tokenizer, prompts(32), **how).ids
    same = statistics.fmean(a == b for a, b in zip(found, expected, strict=True))
    assert same >= 0.8 and found != base, same
    args = GRPOConfig(**common(GRPOConfig, 0) | recipe("grpo") | {"max_steps": 8, "reward_weights": None})
    trainer = GRPOTrainer(model, [digits], args, methods.default_data("grpo", 0), processing_class=tokenizer)
    trainer.train()
    return {"same": same, "last": trainer.state.log_history[-2]}


def kl() -> dict[str, Any]:
    from rlnb.measure.kl import kl
    from rlnb.model import LoRA, load_model

    zero, moved = kl(*load_model(PRACTICE, LoRA()), prompts(32)), kl(*sft_model(), prompts(32))
    assert abs(zero.mean) < APART and moved.mean > zero.mean, (zero, moved)
    return {"new": zero.mean, "sft": moved.mean, "sft_k1": moved.k1}


def merges() -> dict[str, Any]:
    from rlnb.model.export import check_merge

    (model, tokenizer), found, failed = sft_model(), {}, {}
    for dtype in ("bfloat16", "float16"):
        try:
            found[dtype] = check_merge(model, tokenizer, prompts(8), dtype=dtype)
        except Exception as error:  # the other type is still to be tried
            failed[dtype] = f"{type(error).__name__}: {error}"
    assert not failed, (failed, found)
    return found


def lora_full_lora() -> dict[str, Any]:
    """A model that trains in full leaves the one with LoRA as it was, and the next gets its adapter."""
    from rlnb.model import LoRA, load_model

    first, _ = sft_model()
    before, full = logits(first), load_model(PRACTICE)[0]
    second, error = load_model(PRACTICE, LoRA(rank=4))[0], off_by(logits(first), before)
    assert error < 0.01 and all(p.requires_grad for p in full.parameters()), error
    assert all("lora_" in name for name, p in second.named_parameters() if p.requires_grad)
    return {"error": error}


def paces(run: Any) -> dict[str, Any]:
    """Seconds of a step, without the first, which compiles; the most that torch held, with vLLM its cache too."""
    from torch import cuda

    ends = [row["seconds"] for row in run.curve() if "loss" in row]
    held = cuda.max_memory_reserved() if cuda.is_available() else None
    return {"seconds_per_step": statistics.median(b - a for a, b in pairwise(ends)), "reserved_bytes": held}


def method(name: str) -> dict[str, Any]:
    """Some steps from an SFT adapter: numbers, gradients, a policy that begins as its reference and with ratio 1."""
    from rlnb.train import methods, train

    more = {"ppo": dict(num_ppo_epochs=1, num_mini_batches=1), "grpo": dict(reward=digits), "rloo": dict(reward=digits)}
    run = train(name, problems=(), max_steps=STEPS, **more.get(name, {}))
    rows = [row for row in run.curve() if "loss" in row]
    assert len(rows) == STEPS and all(math.isfinite(row["loss"]) for row in rows)
    assert all(math.isfinite(row["grad_norm"]) for row in rows) and any(row["grad_norm"] > 0 for row in rows)
    first = rows[0]
    if name not in (*methods.FROM_BASE, "orpo"):  # ORPO has no reference
        apart = {key: first[key] for key in ("kl", "rewards/chosen", "rewards/rejected") if key in first}
        assert all(abs(value) < APART for value in apart.values()), apart
    if name == "ppo":
        assert abs(first["policy/ratio"] - 1) < 1e-3 and first["policy/approx_kl"] < 1e-4, first
    assert name != "sft" or rows[-1]["loss"] < first["loss"], rows
    return paces(run) | {"first": first, "last": rows[-1]}


def resume() -> dict[str, Any]:
    """A run that breaks and goes on from its checkpoint ends as one that did not, to the bit."""
    import pytest

    assert not pytest.main(["-q", "tests/train/test_resume.py", "-k", "broken_run and (sft or dpo or grpo)"])
    return {}


def memory() -> dict[str, Any]:
    """What three steps take, against the prediction."""
    from rlnb.model import LoRA
    from tests.benchmarks.memory import try_out

    predicted, measured = try_out(PRACTICE, LoRA(), batch=16 if DRY else 64, length=128 if DRY else 256)
    took = measured.gpu or measured.ram
    assert 0.7 < took / predicted.peak < 1.4, (took, predicted)
    return {"measured": took, "predicted": predicted.peak}


def speed(name: str, way: str) -> dict[str, Any]:
    """Eight steps on random weights, whose completions end by chance or at the limit."""
    from rlnb.data import shapes
    from rlnb.task import problems
    from rlnb.train import train
    from tests import tiny
    from trl import __version__

    if way == "plain" and DRY and __version__.startswith("1.15."):
        skip("TRL 1.15 without Unsloth needs a GPU")
    data = {"sft": shapes.prompt_completion, "grpo": shapes.prompts}[name](problems.load("train"))
    given = dict(per_device_train_batch_size=8 if DRY else 64, max_steps=3 if DRY else 8)
    if name == "grpo":
        given |= dict(max_completion_length=16 if DRY else 256, num_generations=8, reward=digits)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RLNB_MODEL"] = str(tiny.make(Path(folder), **({} if DRY else SHAPE)))
        return paces(train(name, start="base", data=data, problems=(), check=False, **given))


# By name: the limit in seconds on a device, and what to do.
PARTS = {
    "loading": (150, loading), "sampling": (90, sampling), "rollout": (60, rollout),
    **{f"kernels {way}": (90, functools.partial(kernels, way)) for way in ("unsloth", "plain")},
    "vllm": (300, vllm), "kl": (60, kl), "merges": (90, merges), "lora, full, lora": (90, lora_full_lora),
    **{name: (120, functools.partial(method, name)) for name in METHODS},
    "resume": (120, resume), "memory": (90, memory),
    **{f"speed {name} {way}": (150, functools.partial(speed, name, way))
       for name in ("sft", "grpo") for way in ("plain", "unsloth")},
}  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1].endswith(" plain"):
        sys.modules["unsloth"] = None  # type: ignore[assignment]  as if it were not installed
    print("figures: " + json.dumps(PARTS[sys.argv[1]][1]()))
