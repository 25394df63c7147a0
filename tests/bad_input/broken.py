"""Models and adapters that are broken, each in one way, in folders named after it."""

import json
import shutil
from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file, save_file

from rlnb.model import LoRA, load_model, reward_model, save_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Of adapters: what their adapter_config.json has instead.
CONFIGS = {
    "alpha-zero": {"lora_alpha": 0}, "alpha-nan": {"lora_alpha": float("nan")}, "alpha-text": {"lora_alpha": "16"},
    "alpha-none": {"lora_alpha": None}, "rank-zero": {"r": 0}, "rank-text": {"r": "4"}, "rank-wide": {"r": 128},
    "ia3": {"peft_type": "IA3"}, "untyped": {"peft_type": None}, "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"}, "pissa-steps": {"init_lora_weights": "pissa_niter_16"},
    "targets-gone": {"target_modules": ["wq", "wv"]}, "targets-none": {"target_modules": None},
    "targets-head": {"target_modules": ["lm_head"]}, "classifier": {"task_type": "SEQ_CLS"},
    "halved": {"r": 2},
}  # fmt: skip


def _first(weights, change):
    name = sorted(weights)[-1]
    return weights | {name: change(weights[name])}


# Of adapters: what becomes of the weights.
CHANGES = {
    "nan": lambda w: _first(w, lambda x: x.fill_(float("nan"))),
    "inf": lambda w: _first(w, lambda x: x.fill_(float("inf"))),
    "narrowed": lambda w: {name: x for name, x in w.items() if "v_proj" not in name},
    "half": lambda w: {name: x for name, x in w.items() if "lora_A" in name},
    "empty": lambda w: {},
    "more": lambda w: w | {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(4, 64)},
    "foreign": lambda w: {f"other.{name}": x for name, x in w.items()},
    "score-head": lambda w: w | {"base_model.model.score.weight": torch.ones(1, 64)},
    "flat": lambda w: _first(w, lambda x: x.flatten()),
    "zero": lambda w: {name: x * ("lora_A" in name) for name, x in w.items()},
}


def move_b(model) -> None:
    """A trained adapter: its B is no longer zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.normal_(std=0.02)


def adapters(folder: Path, good: Path, base: Path) -> None:
    """Broken adapters in the folder, from a good one."""
    config, weights = json.loads((good / CONFIG).read_text()), load_file(good / WEIGHTS)
    for name in (*CONFIGS, *CHANGES, "cut", "text", "listed", "bare", "alone", "configless", "bytes"):
        shutil.copytree(good, folder / name)
    for name, changed in CONFIGS.items():
        (folder / name / CONFIG).write_text(json.dumps(config | changed))
    for name, change in CHANGES.items():
        copies = {key: x.clone() for key, x in weights.items()}
        save_file(change(copies), folder / name / WEIGHTS, {"format": "pt"})
    (folder / "cut" / WEIGHTS).write_bytes((good / WEIGHTS).read_bytes()[:-100])
    (folder / "bytes" / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (folder / "text" / CONFIG).write_text('{"r": 4,')
    (folder / "listed" / CONFIG).write_text("[]")
    (folder / "bare" / CONFIG).write_text('{"peft_type": "LORA"}')
    (folder / "alone" / WEIGHTS).unlink()
    (folder / "configless" / CONFIG).unlink()
    model, _ = reward_model.load(base, LoRA(rank=4, alpha=8))
    move_b(model)
    model.save_pretrained(folder / "reward")
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    model.save_pretrained(folder / "reward-nan")


def models(folder: Path, base: Path) -> None:
    """Broken models in the folder, from a good one."""
    config, weights = json.loads((base / "config.json").read_text()), load_file(base / "model.safetensors")
    names = ("text", "listed", "untyped", "unknown", "deeper", "wider", "cut", "nan", "tokenless", "pickle", "partial")
    for name in names:
        shutil.copytree(base, folder / name)
    for name, text in {"text": '{"model_type": "llama",', "listed": "[]", "untyped": "{}"}.items():
        (folder / name / "config.json").write_text(text)
    changed = {"unknown": {"model_type": "nosuch"}, "deeper": {"num_hidden_layers": 4}, "wider": {"hidden_size": 128}}
    for name, change in changed.items():
        (folder / name / "config.json").write_text(json.dumps(config | change))
    (folder / "cut" / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-100])
    save_file(_first({k: x.clone() for k, x in weights.items()}, lambda x: x.fill_(float("nan"))),
              folder / "nan" / "model.safetensors", {"format": "pt"})  # fmt: skip
    save_file({k: x for k, x in weights.items() if "layers.1" not in k}, folder / "partial" / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    for file in (folder / "tokenless").glob("*token*"):
        file.unlink()
    (folder / "pickle" / "model.safetensors").rename(folder / "pickle" / "pytorch_model.bin")


def house(folder: Path) -> None:
    """base, good (an adapter on it), other (a wider base), and the broken ones below bad/ and models/."""
    base = tiny.make(folder / "base")
    tiny.make(folder / "other", hidden_size=128)
    model, _ = load_model(base, LoRA(rank=4, alpha=8))
    move_b(model)
    save_adapter(model, folder / "good")
    other, _ = load_model(folder / "other", LoRA(rank=4, alpha=8))
    move_b(other)
    save_adapter(other, folder / "bad" / "wider")
    adapters(folder / "bad", folder / "good", base)
    models(folder / "models", base)
