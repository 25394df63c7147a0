"""From an adapter to a model that others run: merge, check the merge, write a folder with a model card."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from rlnb import files, machine
from rlnb.model import adapters, folders, sampling
from rlnb.model.load import backend, load_model, quiet

# How far the logits may be off, relative to their own size. Rounding changes a weight by up to 2**-24, 2**-11
# or 2**-8 of itself, and the layers add that up: right merges of trained and of random models were off by up
# to 3e-6, 2e-3 and 4e-2. A trained adapter whose scale is wrong by 1 % is off by 6e-3, one left out by 0.4.
TOLERANCE = {"float32": 5e-5, "float16": 1e-2, "bfloat16": 1e-1}
FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "README.md",
    "tokenizer*", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """How far a merged model is from base + adapter, over the tokens of its own greedy answers.

    difference: root mean square over all logits, divided by that of the logits of base + adapter.
    tolerance: of the coarser type, the merged model's or the one that base + adapter runs in.
    same: how many of `texts` answers base + adapter writes too. It decides nothing: in 16 bits answers may part
        where two tokens are almost equally likely.
    """

    dtype: str
    difference: float
    tolerance: float
    same: int
    texts: int

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        return (f"{self.dtype}: logits differ by {self.difference:.1e} of their size (allowed {self.tolerance:.0e}), "
                f"same greedy text on {self.same} of {self.texts} prompts")  # fmt: skip


def check_merge(
    model: Any, tokenizer: Any, prompts: Sequence[sampling.Prompt], *,
    dtype: str = "bfloat16", max_new_tokens: int = 64,
) -> list[Check]:  # fmt: skip
    """Compare the merged model with base + adapter: its weights, its logits and its greedy text on the prompts.

    Twice: merged in place, in the type of the model's weights, and written to disk in `dtype` and loaded again.
    Raises RuntimeError if a weight on disk is not W + s B A rounded once, TypeError or ValueError where there is
    nothing to merge. Whether the logits agree is each Check's `ok`.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _write_checked(model, tokenizer, Path(folder), prompts, dtype, max_new_tokens)


def export_merged(
    model: Any, tokenizer: Any, folder: str | os.PathLike[str], prompts: Sequence[sampling.Prompt], *,
    dtype: str = "bfloat16", run: Any = None, data: str | None = None, licence: str | None = None,
    max_new_tokens: int = 64,
) -> Path:  # fmt: skip
    """Write the merged model with tokenizer and model card, once it has passed `check_merge` on the prompts.

    The folder is what transformers, vLLM and llama.cpp's converter read. It appears whole or not at all, and
    replaces an earlier export. dtype: "bfloat16", "float16" or "float32". For the model card: run, a Run; data, in
    words what the adapter was trained on; licence, known for the practice model.
    Raises what `check_merge` does, RuntimeError too if the logits differ, FileExistsError for a folder of other files.
    """
    folder = Path(folder).expanduser().absolute()
    new = folders.replacement(folder, "a merged model", FILES)
    try:
        new.mkdir(parents=True)
        checks = _write_checked(model, tokenizer, new, prompts, dtype, max_new_tokens)
        if bad := [check for check in checks if not check.ok]:
            raise RuntimeError(f"nothing is saved: the merge is not base + adapter: {bad[0]}")
        files.write(new / "README.md", _model_card(model, checks, run, data, licence, folder.name))
        folders.swap(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    print(*checks, sep="\n")
    return folder


def export_gguf(model: Any, tokenizer: Any, folder: str | os.PathLike[str], kind: str = "q8_0") -> list[Path]:
    """Write GGUF files for llama.cpp through Unsloth, which builds llama.cpp first, and return their paths.

    kind: the quantization. RuntimeError where this is no GPU machine, which names the other way.
    """
    if backend() != "unsloth-gpu":
        raise RuntimeError("GGUF is written through Unsloth on a GPU machine. Elsewhere: export_merged, then, in a "
                           f"checkout of llama.cpp, python convert_hf_to_gguf.py FOLDER --outtype {kind}")  # fmt: skip
    written = model.save_pretrained_gguf(str(folder), tokenizer, quantization_method=kind)
    return [Path(file) for file in written["gguf_files"]]


# --- merge and check -----------------------------------------------------------------------------


def _write_checked(
    model: Any, tokenizer: Any, folder: Path, prompts: Any, dtype: str, max_new_tokens: int
) -> list[Check]:
    """Write the merged model to the folder, and check it in place and as it was written."""
    if dtype not in TOLERANCE:
        raise ValueError(f"dtype is {dtype!r}: it must be one of {', '.join(TOLERANCE)}")
    own = str(next(model.parameters()).dtype).removeprefix("torch.")
    with adapters.merged(model):
        in_place = _answers(model, tokenizer, prompts, max_new_tokens)
    _write(model, tokenizer, folder, dtype)
    # A CPU does not compute in float16; float32 holds the same weights.
    kind = "float32" if (dtype, model.device.type) == ("float16", "cpu") else dtype
    with quiet(bars=False):
        written, _ = load_model(folder, dtype=kind)
    _check_weights(model, written, dtype)
    on_disk = _answers(written, tokenizer, prompts, max_new_tokens)
    return [_compare(model, own, TOLERANCE[own], *in_place),
            _compare(model, dtype, max(TOLERANCE[own], TOLERANCE[dtype]), *on_disk)]  # fmt: skip


def _merged_weights(model: Any, update: Callable[[Any, str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The base's weights by name, in float32 plus update(layer, adapter) where an adapter is in use."""
    base = model.get_base_model()
    state = {n.replace(".base_layer", ""): t for n, t in base.state_dict().items() if ".lora_" not in n}
    for name, layer in adapters.lora_layers(base).items():
        for adapter in set(layer.active_adapters) & layer.lora_A.keys():
            state[f"{name}.weight"] = state[f"{name}.weight"].float() + update(layer, adapter).detach().float()
    return state


def _write(model: Any, tokenizer: Any, folder: Path, dtype: str) -> None:
    """Write the merged weights, added up in float32 and rounded once to this type, config and tokenizer."""
    base, rounded = model.get_base_model(), {}  # tied weights stay one tensor: transformers writes them once
    state = _merged_weights(model, lambda layer, adapter: layer.get_delta_weight(adapter))
    for name, weight in state.items():
        kind = getattr(torch, dtype) if weight.is_floating_point() else weight.dtype
        state[name] = rounded.setdefault(weight.data_ptr(), weight.to(kind))
    with quiet(bars=False):
        # The class's own method: Unsloth puts another on the instance.
        type(base).save_pretrained(base, folder, state_dict=state, max_shard_size="5GB")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"dtype": dtype}
    files.write(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(folder)


def _check_weights(model: Any, written: Any, dtype: str) -> None:
    """Raise RuntimeError unless each weight on disk is W + s B A, worked out anew and rounded once: to the bit."""

    def update(layer: Any, adapter: str) -> torch.Tensor:
        found = layer.scaling[adapter] * (layer.lora_B[adapter].weight.float() @ layer.lora_A[adapter].weight.float())
        return found.T if layer.fan_in_fan_out else found

    expected = _merged_weights(model, update)
    for name, found in written.named_parameters():
        if not torch.equal(expected[name].to(getattr(torch, dtype)).to(found.dtype), found):
            raise RuntimeError(f"nothing is saved: {name} on disk is not W + s B A")


def _answers(model: Any, tokenizer: Any, prompts: Any, max_new_tokens: int) -> tuple[list, torch.Tensor]:
    """The token ids of each prompt and of its greedy answer, and the `_logits` of the answers."""
    options = dict(max_new_tokens=max_new_tokens, temperature=0, progress=False)
    answers = [answer for [answer] in sampling.sample(model, tokenizer, prompts, **options).ids]
    rows = list(zip(sampling.tokenize(tokenizer, prompts), answers, strict=True))
    return rows, _logits(model, rows)


def _logits(model: Any, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """(N, vocabulary) float32 logits that predict the N tokens of the answers, in their order."""
    # The inner model runs: a trainer may have left its autocast on the outer one.
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    ids = pad_sequence([torch.tensor(p + a) for p, a in rows], batch_first=True)  # on the right
    modes = [(module, module.training) for module in inner.modules()]
    try:
        with torch.no_grad():
            logits = inner.eval()(input_ids=ids.to(inner.device)).logits.float().cpu()
    finally:
        for module, training in modes:
            module.training = training
    return torch.cat([row[len(p) - 1 : len(p) + len(a) - 1] for row, (p, a) in zip(logits, rows, strict=True)])


def _compare(model: Any, dtype: str, tolerance: float, rows: list, found: torch.Tensor) -> Check:
    """found: (N, vocabulary), the merged model's logits at the N tokens of its answers."""
    expected = _logits(model, rows)
    difference = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    own = expected.argmax(-1).split([len(answer) for _, answer in rows])
    same = sum(tokens.tolist() == answer for tokens, (_, answer) in zip(own, rows, strict=True))
    return Check(dtype, float(difference), tolerance, same, len(rows))


# --- the model card ------------------------------------------------------------------------------


def _model_card(model: Any, checks: Any, run: Any, data: str | None, licence: str | None, name: str) -> str:
    """What the model was made from and how, and what is known of its quality, in Markdown."""
    base = folders.base_name(model.get_base_model().name_or_path)
    licence = licence or ("apache-2.0" if (folders.DATA / base).is_dir() else None)
    adapter = model.peft_config[model.active_adapter]
    facts = {
        "base model": base,
        "adapter": f"LoRA rank {adapter.r}, alpha {adapter.lora_alpha}, merged into the weights",
        "data": data or "not recorded",
        "weights": checks[-1].dtype,
        "merge checked": "; ".join(map(str, checks)),
        "licence": licence or "the base model's: look there before you pass this on",
        "made with": ", ".join(f"{package} {version}" for package, version in machine.versions().items()),
    }
    head = [f"base_model: {base}", "library_name: transformers", "pipeline_tag: text-generation"]
    head += [f"license: {licence}"] if licence else []
    lines = ["---", *head, "---", "", f"# {name}", *_table(facts)]
    if run:
        facts = {"method": run.method, "seed": run.seed, "started from": run.parent, "labels": run.labels}
        plain = {key: value for key, value in run.config.items() if isinstance(value, int | float | str)}
        plain = {key: value for key, value in plain.items() if not Path(str(value)).is_absolute()}
        lines += ["", f"## Run {run.id}", *_table(facts | run.result), "", "## Settings", *_table(plain)]
    return "\n".join(lines) + "\n"


def _table(rows: dict[str, Any]) -> list[str]:
    lines = ["", "| | |", "|---|---|"]
    for key, value in rows.items():
        if isinstance(value, dict) and set(value) == {"k", "n"} and value["n"]:
            value = f"{value['k']} of {value['n']} ({100 * value['k'] / value['n']:.1f} %)"
        lines.append(f"| {key} | {f'{value:.4g}' if isinstance(value, float) else value} |")
    return lines
