"""The parts of a slot. Each checks one thing and returns its figures; slot.py starts a process for each.

    SLOT_DRY=1 python -m tests.gpu.parts sampling     # one part, tiny, on a CPU
"""

import functools
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

DRY = bool(os.environ.get("SLOT_DRY"))
PRACTICE, STEPS = "abacus-3m", 3 if DRY else 20
APART = 0.02  # nats: more than rounding between a policy and its reference before the first step
SHAPE = dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
             num_key_value_heads=2, vocab_size=151_936, max_position_embeddings=2048)  # Qwen2.5-0.5B's  # fmt: skip
METHODS = ("sft", "dpo", "kto", "orpo", "reward_model", "rloo", "grpo", "ppo")
PLAIN = """import sys; sys.modules['unsloth'] = None; sys.path.insert(0, sys.argv[1])
import parts; from rlnb.model import load_model; from safetensors.torch import save_file
save_file({'x': parts.logits(load_model(parts.PRACTICE, sys.argv[2])[0])}, sys.argv[3])"""


class Skip(Exception):
    """There is nothing to do on this machine."""


def sft_model() -> tuple[Any, Any]:
    """The practice model with the adapter of an SFT run, made once for all parts, and its tokenizer."""
    from rlnb.model import load_model
    from rlnb.train import find_or_train_sft

    return load_model(PRACTICE, find_or_train_sft().adapter)


def prompts(n: int) -> list[Any]:
    from rlnb.task import problems

    return [problems.prompt(p) for p in problems.load("validation")[: 4 if DRY else n]]


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(4, 132, device=model.device).reshape(4, 32)).logits.float().cpu()


def off_by(found: Any, expected: Any) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# --- loading, sampling, merging ------------------------------------------------------------------


def backend() -> dict[str, Any]:
    began = time.monotonic()
    from rlnb.model import backend

    import torch

    assert DRY or (backend() == "unsloth-gpu" and torch.cuda.is_available()), backend()
    return {"backend": backend(), "import_seconds": time.monotonic() - began, "cuda": torch.version.cuda}


def loading() -> dict[str, Any]:
    """A new adapter, a saved one, everything; ranks are refused before any memory is taken."""
    import pytest
    import torch
    from rlnb.model import LoRA, load_model, trainable

    for fast in (False, True):
        with pytest.raises(ValueError, match="rank 32 is above max_lora_rank 16"):
            load_model(PRACTICE, LoRA(rank=32), max_lora_rank=16, fast_inference=fast)
    if torch.cuda.is_available():
        assert torch.cuda.memory_allocated() == 0
        if importlib.util.find_spec("vllm") is None:
            with pytest.raises(ImportError, match="needs vllm"):
                load_model(PRACTICE, LoRA(), fast_inference=True)
    models = {"full": load_model(PRACTICE)[0], "new": load_model(PRACTICE, LoRA(rank=4))[0], "saved": sft_model()[0]}
    return {name: [*trainable(model), str(next(model.parameters()).dtype)] for name, model in models.items()}


def kernels() -> dict[str, Any]:
    """Unsloth's kernels against transformers and PEFT, which run in another process."""
    from rlnb.model import LoRA, load_model, save_adapter
    from safetensors.torch import load_file

    model, _ = load_model(PRACTICE, LoRA())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, Path(folder, "adapter"))
        places = [str(Path(__file__).parent), f"{folder}/adapter", f"{folder}/plain"]
        subprocess.run([sys.executable, "-c", PLAIN, *places], check=True)
        error = off_by(logits(model), load_file(places[2])["x"])
    assert error < 0.05, error  # rounding to 16 bits, 4 layers
    return {"error": error}


def sampling() -> dict[str, Any]:
    """Greedy against one token after the other without a cache; the model's switches stay as they were."""
    import torch
    from rlnb.model import sampling as ours

    (model, tokenizer), asked, limit, same = sft_model(), prompts(16), 32, 0
    for training in (True, False):
        model.train(training)
        before = [(m.training, getattr(m, "gradient_checkpointing", None)) for m in model.modules()]
        found = [ids for [ids] in ours.sample(model, tokenizer, asked, temperature=0, max_new_tokens=limit).ids]
        after = [(m.training, getattr(m, "gradient_checkpointing", None)) for m in model.modules()]
        assert before == after, f"a model with training={training} came back in another state"
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
    if importlib.util.find_spec("vllm") is None:
        raise Skip("vLLM is not installed")
    from rlnb.model import LoRA, adapters, load_model, sampling
    from rlnb.task.rewards import correctness, format_reward
    from rlnb.train import common, methods, recipe, train
    from trl import GRPOConfig, GRPOTrainer

    saved, how = train("sft", lora=LoRA(rank=12), problems=()).adapter, dict(temperature=0, max_new_tokens=32)
    plain, tokenizer = load_model(PRACTICE, saved)
    expected = sampling.sample(plain, tokenizer, prompts(32), **how).ids
    model, _ = load_model(PRACTICE, saved, fast_inference=True, max_lora_rank=12)
    found = sampling.sample(model, tokenizer, prompts(32), **how).ids
    with adapters.off(model):
        base = sampling.sample(model, tokenizer, prompts(32), **how).ids
    same = statistics.fmean(a == b for a, b in zip(found, expected, strict=True))
    assert same >= 0.8 and found != base, same
    args = GRPOConfig(**common(GRPOConfig, 0) | recipe("grpo") | {"max_steps": 8})
    data = methods.default_data("grpo", 0)
    trainer = GRPOTrainer(model, [correctness, format_reward], args, data, processing_class=tokenizer)
    trainer.train()
    times = [row["step_time"] for row in trainer.state.log_history if "reward" in row]
    return {"same": same, "seconds_per_step": statistics.median(times)}


def kl() -> dict[str, Any]:
    from rlnb.measure.kl import kl
    from rlnb.model import LoRA, load_model

    zero, moved = kl(*load_model(PRACTICE, LoRA()), prompts(32)), kl(*sft_model(), prompts(32))
    assert abs(zero.mean) < APART and moved.mean > zero.mean, (zero, moved)
    return {"new": zero.mean, "sft": moved.mean, "sft_k1": moved.k1}


def merges() -> dict[str, Any]:
    from rlnb.model.export import check_merge

    (model, tokenizer), found = sft_model(), {}
    for dtype in ("bfloat16", "float16"):
        try:
            found[dtype] = [check.difference for check in check_merge(model, tokenizer, prompts(8), dtype=dtype)]
        except Exception as error:  # the other type is still to be tried
            found[dtype] = f"{type(error).__name__}: {error}"
    assert all(isinstance(checks, list) for checks in found.values()), found
    return found


def lora_full_lora() -> dict[str, Any]:
    """A model that trains in full leaves the one with LoRA as it was, and the next gets its adapter."""
    from rlnb.model import LoRA, load_model

    first, _ = sft_model()
    before = logits(first)
    models = [load_model(PRACTICE)[0], load_model(PRACTICE, LoRA(rank=4))[0]]
    error = off_by(logits(first), before)
    assert error < 0.01, error
    assert all("lora_" in name for name, p in models[1].named_parameters() if p.requires_grad)
    return {"error": error}


# --- training ------------------------------------------------------------------------------------


def method(name: str) -> dict[str, Any]:
    """Some steps from an SFT adapter: numbers, gradients, a policy that begins as its reference and with ratio 1."""
    from rlnb.train import methods, train

    more = {"num_ppo_epochs": 1, "num_mini_batches": 1} if name == "ppo" else {}
    run = train(name, problems=(), max_steps=STEPS, **more)
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


def paces(run: Any) -> dict[str, Any]:
    """Seconds of a step, without the first, which compiles; the most that torch held, with vLLM its cache too."""
    import torch

    ends = [row["seconds"] for row in run.curve() if "loss" in row]
    held = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None
    return {"seconds_per_step": statistics.median(b - a for a, b in pairwise(ends)), "reserved_bytes": held}


def checkpointing() -> dict[str, Any]:
    """Gradients with and without it, which the practice model alone does not use."""
    from rlnb.train import train

    found: dict[str, Any] = {}
    for name in ("sft", "dpo", "ppo"):
        runs = [train(name, problems=(), max_steps=1, gradient_checkpointing=on) for on in (False, True)]
        found[name] = [run.curve()[0]["grad_norm"] for run in runs]
        assert name == "ppo" or abs(found[name][0] - found[name][1]) < 0.05 * found[name][0], found
    return found


def memory() -> dict[str, Any]:
    """What three steps take, against the prediction."""
    from rlnb.measure.peak import try_out
    from rlnb.model import LoRA

    predicted, measured = try_out(PRACTICE, LoRA(), batch=16 if DRY else 64, length=128 if DRY else 256)
    took = measured.gpu or measured.ram
    assert 0.7 < took / predicted.peak < 1.4, (took, predicted)
    return {"measured": took, "predicted": predicted.peak}


def speed(name: str, way: str) -> dict[str, Any]:
    """Eight steps on random weights of Qwen2.5-0.5B's shape, with rows and completions that end where they may."""
    import torch
    from rlnb.data import shapes
    from rlnb.model import resolve
    from rlnb.task import problems
    from rlnb.train import train
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    from trl import __version__

    if way == "plain" and not torch.cuda.is_available() and __version__.startswith("1.15."):
        raise Skip("TRL 1.15 without Unsloth needs a GPU")
    with tempfile.TemporaryDirectory() as folder:
        if not DRY:
            tokens = AutoTokenizer.from_pretrained(resolve(PRACTICE))
            ends = {"eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id}
            torch.manual_seed(0)
            model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, **ends, tie_word_embeddings=True))
            model.to(torch.bfloat16).save_pretrained(folder)
            tokens.save_pretrained(folder)
            os.environ["RLNB_MODEL"] = folder
        data = {"sft": shapes.prompt_completion, "grpo": shapes.prompts}[name](problems.load("train"))
        sizes = dict(per_device_train_batch_size=8 if DRY else 64, max_steps=3 if DRY else 8)
        sizes |= dict(max_completion_length=16 if DRY else 256, num_generations=8) if name == "grpo" else {}
        return paces(train(name, start="base", data=data, problems=(), check=False, **sizes))


# By name: the limit in seconds on a device, and what to do.
PARTS = {
    "backend": (90, backend), "loading": (120, loading), "kernels": (90, kernels), "sampling": (90, sampling),
    "rollout": (60, rollout), "vllm": (300, vllm), "kl": (60, kl), "merges": (90, merges),
    "lora, full, lora": (90, lora_full_lora), **{name: (120, functools.partial(method, name)) for name in METHODS},
    "checkpointing": (90, checkpointing), "memory": (90, memory),
    **{f"speed {name} {way}": (150, functools.partial(speed, name, way))
       for name in ("sft", "grpo") for way in ("plain", "unsloth")},
}  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1].endswith(" plain"):
        sys.modules["unsloth"] = None  # type: ignore[assignment]  as if it were not installed
    try:
        print("figures: " + json.dumps(PARTS[sys.argv[1]][1]()))
    except Skip as why:
        print(why)
        sys.exit(77)
