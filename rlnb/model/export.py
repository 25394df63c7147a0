"""From an adapter to a model that others run: merge, check the merge, write a folder with a model card."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlnb import machine
from rlnb.model import adapters, folders, sampling
from rlnb.model.backends import quiet
from rlnb.model.lora import lora_layers

from transformers import AutoModelForCausalLM

# How far the logits may be off, relative to their own size. Rounding changes a weight by up to 2**-24, 2**-11
# or 2**-8 of itself, and the layers add that up: right merges of trained and of random models were off by up
# to 3e-6, 2e-3 and 4e-2. A trained adapter whose scale is wrong by 1 % is off by 3e-3, one left out by 0.2.
TOLERANCE = {"float32": 5e-5, "float16": 1e-2, "bfloat16": 1e-1}
FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "README.md",
    "tokenizer*", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip


def check_merge(model: Any, tokenizer: Any, prompts: Sequence[sampling.Prompt], *, dtype: str = "bfloat16") -> str:
    """Write the merged model to disk in `dtype`, load it again and compare it with base + adapter. Returns
    what was found, in words.

    Raises RuntimeError if a weight on disk is not W + s B A rounded once, or if the logits on the prompts differ by
    more than TOLERANCE allows; TypeError or ValueError where there is nothing to merge.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _write_checked(model, tokenizer, Path(folder), prompts, dtype)


def export_merged(
    model: Any, tokenizer: Any, folder: str | os.PathLike[str], prompts: Sequence[sampling.Prompt], *,
    dtype: str = "bfloat16", run: Any = None, data: str = "not recorded",
) -> Path:  # fmt: skip
    """Write the merged model with tokenizer and model card, once it has passed `check_merge` on the prompts.

    The folder is what transformers, vLLM and llama.cpp's converter read. It appears whole or not at all, and
    replaces an earlier export. dtype: "bfloat16", "float16" or "float32". For the model card: run, a Run; data, in
    words what the adapter was trained on.
    Raises what `check_merge` does, FileExistsError for a folder of other files.
    """
    folder = Path(folder).expanduser().absolute()
    with folders.replaced(folder, FILES) as new:
        card = folder / "README.md"
        if folder.exists() and not (card.is_file() and "| merge checked |" in card.read_text(encoding="utf-8")):
            raise FileExistsError(f"{folder} holds a model that is no export: name another folder")
        checked = _write_checked(model, tokenizer, new, prompts, dtype)
        (new / "README.md").write_text(_model_card(model, checked, run, data, folder.name), encoding="utf-8")
    print(checked)
    return folder


def _write_checked(model: Any, tokenizer: Any, folder: Path, prompts: Any, dtype: str) -> str:
    """Write the merged model to the folder, and compare what was written with base + adapter."""
    if dtype not in TOLERANCE:
        raise ValueError(f"dtype is {dtype!r}: it must be one of {', '.join(TOLERANCE)}")
    if not prompts:
        raise ValueError(f"prompts is {prompts!r}: give some to compare the logits on")
    _write(model, tokenizer, folder, dtype)
    # A CPU does not compute in float16; float32 holds the same weights.
    kind = "float32" if (dtype, model.device.type) == ("float16", "cpu") else dtype
    with quiet(bars=False):
        # transformers' own: Unsloth would take its patches off every other model of this family.
        written = AutoModelForCausalLM.from_pretrained(folder, dtype=kind).to(model.device)
    _check_weights(model, written, dtype)
    expected, found = (_logits(each, tokenizer, prompts) for each in (model, written))
    difference = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    own = str(next(model.parameters()).dtype).removeprefix("torch.")
    allowed = max(TOLERANCE[own], TOLERANCE[dtype])
    says = f"{dtype}: logits differ by {difference:.1e} of their size (allowed {allowed:.0e})"
    if not difference <= allowed:
        raise RuntimeError(f"nothing is saved: the merge is not base + adapter: {says}")
    return says


def _write(model: Any, tokenizer: Any, folder: Path, dtype: str) -> None:
    """Write the merged weights, rounded to this type, config and tokenizer."""
    rounded = {}  # tied weights stay one tensor: transformers writes them once
    with adapters.merged(model):
        base = model.get_base_model()
        state = {n.replace(".base_layer", ""): t for n, t in base.state_dict().items() if ".lora_" not in n}
        for name, weight in state.items():
            kind = getattr(torch, dtype) if weight.is_floating_point() else weight.dtype
            state[name] = rounded.setdefault(weight.data_ptr(), weight.to(kind, copy=True))
    with quiet(bars=False):
        # The class's own method: Unsloth puts another on the instance.
        type(base).save_pretrained(base, folder, state_dict=state, max_shard_size="5GB")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)


def _check_weights(model: Any, written: Any, dtype: str) -> None:
    """Raise RuntimeError unless each weight on disk is W + s B A, worked out anew and rounded: to the bit."""
    base = model.get_base_model()
    expected = {name.replace(".base_layer", ""): weight for name, weight in base.state_dict().items()}
    for name, layer in lora_layers(base).items():
        weight = expected[f"{name}.weight"]
        for adapter in set(layer.active_adapters) & layer.lora_A.keys():
            update = layer.lora_B[adapter].weight.float() @ layer.lora_A[adapter].weight.float()
            update = layer.scaling[adapter] * (update.T if layer.fan_in_fan_out else update)
            expected[f"{name}.weight"] = (weight.float() + update).to(weight.dtype)
    for name, found in written.named_parameters():
        if not torch.equal(expected[name].to(getattr(torch, dtype)).to(found.dtype), found):
            raise RuntimeError(f"nothing is saved: {name} on disk is not W + s B A")


def _logits(model: Any, tokenizer: Any, prompts: Any) -> torch.Tensor:
    """(N, vocabulary) float32 logits at the N tokens of the prompts."""
    # The inner model runs: a trainer may have left its autocast on the outer one.
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    rows = [torch.tensor([ids], device=inner.device) for ids in sampling.tokenize(tokenizer, prompts)]
    with torch.no_grad(), sampling.switched(inner):
        return torch.cat([inner(input_ids=ids).logits[0].float() for ids in rows])


def _model_card(model: Any, checked: str, run: Any, data: str, name: str) -> str:
    """What the model was made from and how, and what is known of its quality, in Markdown."""
    base = folders.base_name(model.get_base_model().name_or_path)
    licence = "apache-2.0" if (folders.DATA / base).is_dir() else None  # known of the practice model
    adapter = model.peft_config[model.active_adapter]
    facts = {
        "base model": base,
        "adapter": f"LoRA rank {adapter.r}, alpha {adapter.lora_alpha}, merged into the weights",
        "data": data,
        "merge checked": f"every weight is W + s B A, rounded once; {checked}",
        "licence": licence or "the base model's: look there before you pass this on",
        "made with": ", ".join(f"{package} {version}" for package, version in machine.versions().items()),
    }
    if run:
        facts["run"] = f"{run.id}, method {run.method}, seed {run.seed}, started from {run.parent}"
        shares = {name: of for name, of in run.result.items() if isinstance(of, dict) and set(of) == {"k", "n"}}
        facts |= {name: f"{of['k']} of {of['n']}" for name, of in shares.items()}
    head = [f"base_model: {base}", "library_name: transformers", "pipeline_tag: text-generation"]
    head += [f"license: {licence}"] if licence else []
    rows = [f"| {key} | {value} |" for key, value in facts.items()]
    return "\n".join(["---", *head, "---", "", f"# {name}", "", "| | |", "|---|---|", *rows]) + "\n"
