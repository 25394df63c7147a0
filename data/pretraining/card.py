"""The folder of a practice model: its weights, and the card with what it can do."""

import json
import shutil
from pathlib import Path
from typing import Any

from rlnb import files
from rlnb.measure import evaluate
from rlnb.model import load_model
from rlnb.task import problems

import torch

KS, N, COUNT = (1, 8, 32), 32, 240  # pass@k of n samples, on the first problems of each test split
MARK = "## Measured\n"  # in README.md: what stands above it was written by hand and stays
COLUMNS = (*(f"pass@{k}, any style" for k in KS), "pass@1, strict", "pass@32, strict")
HEAD = f"| split | problems | {' | '.join(COLUMNS)} |\n{'|---' * 7}|\n"


def save(model: Any, tokenizer: Any, facts: dict, out: Path) -> None:
    """Writes safetensors in bf16, tokenizer, config and facts, each file whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for file in partial.iterdir():
        file.replace(out / file.name)
    partial.rmdir()
    (out / "resume.pt").unlink(missing_ok=True)


def write(folder: Path) -> None:
    """Measures the model in ``folder`` and writes that into its README.md."""
    readme = folder / "README.md"
    by_hand = readme.read_text(encoding="utf-8").partition(MARK)[0] if readme.exists() else f"# {folder.name}\n\n"
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    model, tokenizer = load_model(folder)
    found = {
        split: evaluate.passes(model, tokenizer, problems.load(split)[:COUNT], N, KS, progress=split)
        for split in problems.TEST_SPLITS
    }
    made = "{parameters:,} parameters, trained with seed {seed} on {tokens:,} tokens in {minutes} minutes."
    text = f"{by_hand}{MARK}\n{made.format(**facts)}\n\n{HEAD}" + "".join(_line(s, p) for s, p in found.items())
    files.write(readme, text)
    print(text)


def _line(split: str, passes: evaluate.Passes) -> str:
    loose, strict = passes.correct, passes.strict
    cells = [str(loose[k]) for k in KS] + [str(strict[k]) for k in (1, 32)]
    return f"| {split} | {len(passes.rows)} | {' | '.join(cells)} |\n"
