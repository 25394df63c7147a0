"""From an adapter to a model that others run: export it with a card, once the merge is checked.

The way to GGUF is untested on a GPU until tests/gpu has run on one.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlnb import files
from rlnb import machine
from rlnb.model import folders, load as models
from rlnb.model.merging import Check, check_folder, check_in_place, write_merged
from rlnb.model.sampling import Prompt

if TYPE_CHECKING:
    from rlnb.record.runs import Run

FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "tokenizer*", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "README.md",
)  # fmt: skip


def export_merged(
    model: Any,
    tokenizer: Any,
    folder: str | os.PathLike[str],
    prompts: Sequence[Prompt],
    *,
    dtype: str = "bfloat16",
    run: "Run | None" = None,
    data: str | None = None,
    licence: str | None = None,
    max_new_tokens: int = 64,
) -> Path:
    """Write the merged model in 16 bits, with tokenizer and card, once it has passed the check.

    The folder is what transformers, vLLM and llama.cpp's converter read (the converter knows a list
    of tokenizers, and the practice model's is not on it). It appears whole or not at all; an
    earlier export there is replaced. prompts: what the check runs on, see ``merging.check_merge``.
    run, data, licence: for the card. data says in words what the adapter was trained on; the
    practice model is Apache-2.0, and of another base the licence is asked for.

    Raises RuntimeError if the merged model is not base + adapter, FileExistsError if the folder
    holds anything but a model, TypeError or ValueError where there is nothing to merge.
    """
    folder = Path(folder).expanduser().absolute()
    if dtype not in ("bfloat16", "float16"):
        raise ValueError(f'dtype is {dtype!r}: it must be "bfloat16" or "float16"')
    new = folders.replacement(folder, "a merged model", FILES)
    try:
        new.mkdir(parents=True)
        checks = [check_in_place(model, tokenizer, prompts, max_new_tokens)]
        write_merged(model, tokenizer, new, dtype)
        checks += [check_folder(model, new, prompts, dtype, max_new_tokens)]
        if bad := [check for check in checks if not check.ok]:
            raise RuntimeError(f"nothing is saved: the merge is not base + adapter: {bad[0]}")
        files.write(new / "README.md", card(model, checks, run, data, licence, folder.name))
        folders.swap(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    print(*checks, sep="\n")
    return folder


def card(
    model: Any,
    checks: Sequence[Check],
    run: "Run | None",
    data: str | None,
    licence: str | None,
    name: str,
) -> str:
    """The model card: what the model was made from and how, and what is known of its quality."""
    base = folders.base_name(model.get_base_model().name_or_path)
    ours = licence is None and (folders.DATA / base).is_dir()
    licence = "apache-2.0" if ours else licence
    adapter = model.peft_config[model.active_adapter]
    rows = {
        "base model": base,
        "adapter": f"LoRA rank {adapter.r}, alpha {adapter.lora_alpha}, merged into the weights",
        "method": run.method if run else "not recorded",
        "data": data
        or (f"{run.labels} labelled examples" if run and run.labels else "not recorded"),
        "seed": run.seed if run else "not recorded",
        "started from": run.parent if run and run.parent else "the base model",
        "weights": checks[-1].dtype,
        "merge checked": "; ".join(map(str, checks)),
        "licence": licence or "the base model's: look there before you pass this on",
        "made with": ", ".join(f"{n} {v}" for n, v in machine.versions().items()),
    }
    lines = ["---", f"base_model: {base}", "library_name: transformers"]
    lines += [f"license: {licence}"] if licence else []
    lines += ["pipeline_tag: text-generation", "---", "", f"# {name}", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in rows.items()]
    if run:
        lines += ["", f"## Result of run {run.id}", "", "| | |", "|---|---|"]
        lines += [f"| {key} | {_figure(value)} |" for key, value in run.result.items()]
        lines += ["", "## Settings", "", "| | |", "|---|---|"]
        lines += [f"| {key} | {value} |" for key, value in run.config.items()]
    return "\n".join(lines) + "\n"


def _figure(value: Any) -> str:
    if isinstance(value, dict) and set(value) == {"k", "n"} and value["n"]:
        return f"{value['k']} of {value['n']} ({100 * value['k'] / value['n']:.1f} %)"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def export_gguf(
    model: Any, tokenizer: Any, folder: str | os.PathLike[str], quantization: str = "q8_0"
) -> list[Path]:
    """Write GGUF files for llama.cpp through Unsloth, and return their paths. Needs a GPU machine,
    where Unsloth builds llama.cpp first. RuntimeError elsewhere, which names the other way.
    """
    if (kind := models.backend()) != "unsloth-gpu":
        raise RuntimeError(
            f"GGUF is written through Unsloth on a GPU machine, and this is {kind}. Elsewhere: "
            "ship.export_merged(model, tokenizer, FOLDER, prompts), then, in a checkout of "
            f"llama.cpp, python convert_hf_to_gguf.py FOLDER --outtype {quantization}"
        )
    written = model.save_pretrained_gguf(str(folder), tokenizer, quantization_method=quantization)
    return [Path(file) for file in written["gguf_files"]]
