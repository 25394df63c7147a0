"""rlnb.model.export on a random tiny model: the check of a merge, the export, the model card."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch

from rlnb.model import adapters, export, sampling
from rlnb.model.load import load_model
from rlnb.model.lora import LoRA, lora_layers

PROMPTS = [
    [{"role": "user", "content": f"Anna has {n} apples and buys 5 more. How many?"}]
    for n in range(3, 9)
]
FOUND = {
    dtype: re.compile(rf"{dtype}: logits differ by ([\d.e-]+) of their size \(allowed ([\d.e-]+)\)")
    for dtype in export.TOLERANCE
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def pair(base):
    return with_an_adapter(base)


def with_an_adapter(base, std=0.1, **options):
    """A model whose adapter changes the outputs, and its tokenizer."""
    model, tokenizer = load_model(base, LoRA(rank=8, alpha=16), **options)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std)
    return model, tokenizer


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- the check -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("name", "std"), [("tiny", 0.01), ("tiny", 0.5), ("abacus-3m", 0.002), ("abacus-3m", 0.05)]
)
def test_a_right_merge_passes(base, name, std, dtype):
    model, tokenizer = with_an_adapter(base if name == "tiny" else name, std)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = export.check_merge(model, tokenizer, PROMPTS, dtype=dtype)
    difference, allowed = FOUND[dtype].fullmatch(found).groups()
    assert 0 < float(difference) < float(allowed) == export.TOLERANCE[dtype]
    assert all(p.equal(before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_merge_into_a_16_bit_base_has_its_tolerance(base, dtype):
    model, tokenizer = with_an_adapter(base, dtype="bfloat16")
    assert "(allowed 1e-01)" in export.check_merge(model, tokenizer, PROMPTS, dtype=dtype)


def test_of_a_model_in_training_nothing_is_changed(base):
    """Dropout is off for the comparison, and on again after it."""
    model, tokenizer = load_model(base, LoRA(rank=8, dropout=0.5))
    model.train()
    modes = [module.training for module in model.modules()]
    assert "logits differ by" in export.check_merge(model, tokenizer, PROMPTS[:2])
    assert modes == [module.training for module in model.modules()]


WRONG = {"a wrong scale": (0.99, False), "the adapter left out": (0, False), "a layer left out": (0, True)}


def merge_wrongly(patch, model, factor, one_layer):
    """Multiplies what a merge adds, to all layers or to the last of fourteen."""
    from peft.tuners.lora import Linear

    last, right = list(lora_layers(model).values())[-1], Linear.get_delta_weight

    def update(layer, name):
        return right(layer, name) * (factor if layer is last or not one_layer else 1)

    patch.setattr(Linear, "get_delta_weight", update)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("error", WRONG)
def test_the_weights_tell_a_wrong_merge_and_nothing_is_saved(pair, tmp_path, monkeypatch, error, dtype):
    merge_wrongly(monkeypatch, pair[0], *WRONG[error])
    with pytest.raises(RuntimeError, match=r"nothing is saved: .*_proj.weight on disk is not W \+ s B A"):
        export.export_merged(*pair, tmp_path / "out", PROMPTS[:2], dtype=dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "dtype"),
    [
        ("a wrong scale", "float32"),
        ("the adapter left out", "float32"),
        ("the adapter left out", "float16"),
        ("the adapter left out", "bfloat16"),
        ("a layer left out", "float32"),
        ("a layer left out", "float16"),
    ],
)
def test_the_logits_tell_a_wrong_merge_as_well(pair, tmp_path, monkeypatch, error, dtype):
    """In bfloat16 one layer of fourteen is near what rounding does: there the weights alone tell."""
    monkeypatch.setattr(export, "_check_weights", lambda *_: None)
    merge_wrongly(monkeypatch, pair[0], *WRONG[error])
    with pytest.raises(RuntimeError, match=rf"nothing is saved: the merge is not base \+ adapter: {dtype}"):
        export.export_merged(*pair, tmp_path / "out", PROMPTS, dtype=dtype)
    assert not list(tmp_path.iterdir())


# --- export --------------------------------------------------------------------------------------

STOCK = """
import sys
sys.modules["rlnb"] = sys.modules["unsloth"] = sys.modules["peft"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, out = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
assert model.dtype == torch.bfloat16, model.dtype
chat = [{"role": "user", "content": "Anna has 3 apples and buys 5 more. How many?"}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
with torch.no_grad():
    text = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    logits = model(input_ids=torch.arange(4, 24).reshape(2, 10)).logits
save_file({"text": text, "logits": logits}, out)
"""


def test_the_merged_model_loads_in_stock_transformers(pair, tmp_path, capsys):
    from safetensors.torch import load_file

    model, tokenizer = pair
    folder = export.export_merged(model, tokenizer, tmp_path / "out", PROMPTS)
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("bfloat16: logits differ by ")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    out = tmp_path / "found.safetensors"
    done = subprocess.run(
        [sys.executable, "-I", "-c", STOCK, str(folder), str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    stock = load_file(out)
    shipped, tokens = load_model(folder, dtype="bfloat16")
    ids = torch.arange(4, 24).reshape(2, 10)
    with torch.no_grad():
        expected, ours = model.eval()(input_ids=ids).logits, shipped.eval()(input_ids=ids).logits
    assert (stock["logits"].float() - ours.float()).abs().max() < 1e-2
    assert (stock["logits"].float() - expected).abs().max() < 0.1
    answer = sampling.sample(
        shipped, tokens, PROMPTS[:1], max_new_tokens=16, temperature=0, progress=False
    ).ids[0][0]
    assert stock["text"][0].tolist()[-len(answer) :] == answer


def test_what_is_exported_is_16_bit_without_lora_and_without_a_path(pair, base, tmp_path):
    from safetensors.torch import load_file

    folder = export.export_merged(*pair, tmp_path / "out", PROMPTS)
    weights = load_file(folder / "model.safetensors")
    original = load_file(base / "model.safetensors")
    assert weights.keys() == original.keys()
    assert {str(weight.dtype) for weight in weights.values()} == {"torch.bfloat16"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    for name, content in contents(folder).items():
        assert str(base.parent).encode() not in content, name
        assert str(tmp_path).encode() not in content, name
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} < set(
        contents(folder)
    )


def test_the_card_says_what_the_model_is_made_of(pair, tmp_path):
    strict = {"k": 130, "n": 200}
    run = SimpleNamespace(
        id="20261120-sft", method="sft", seed=7, parent="20261119-sft",
        result={"strict": strict, "mean_tokens": 31.25, "start": {"strict": strict}},
    )  # fmt: skip
    folder = export.export_merged(*pair, tmp_path / "solver", PROMPTS[:2], run=run)
    lines = (folder / "README.md").read_text().splitlines()
    assert lines[:7] == [
        "---", "base_model: tiny", "library_name: transformers", "pipeline_tag: text-generation",
        "---", "", "# solver",
    ]  # fmt: skip
    for row in [
        "| base model | tiny |",
        "| adapter | LoRA rank 8, alpha 16, merged into the weights |",
        "| data | not recorded |",
        "| run | 20261120-sft, method sft, seed 7, started from 20261119-sft |",
        "| strict | 130 of 200 |",
    ]:
        assert row in lines, row
    assert any(line.startswith("| merge checked | every weight is W + s B A") for line in lines)
    assert any("; bfloat16: logits differ by " in line for line in lines)
    assert any(line.startswith("| made with | python ") for line in lines)


def test_without_a_run_the_card_says_so(pair, tmp_path):
    folder = export.export_merged(*pair, tmp_path / "out", PROMPTS[:1], data="ten problems")
    text = (folder / "README.md").read_text()
    assert "method" not in text
    assert "| data | ten problems |" in text
    assert "| licence | the base model's: look there before you pass this on |" in text
    assert "license:" not in text


def test_the_practice_models_licence_is_known(pair, base, monkeypatch):
    monkeypatch.setattr(export.folders, "DATA", base.parent)
    assert "license: apache-2.0\n" in export._model_card(pair[0], "checked", None, "", "x")


def test_an_interrupted_export_leaves_the_old_one_whole(pair, tmp_path, monkeypatch):
    model, tokenizer = pair
    folder = export.export_merged(model, tokenizer, tmp_path / "out", PROMPTS[:1])
    old = contents(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for name in ("_model_card", "_check_weights", "_logits"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(export, name, interrupted)
            export.export_merged(model, tokenizer, folder, PROMPTS[:1])
        assert contents(folder) == old
        assert [file.name for file in tmp_path.iterdir()] == ["out"]
    export.export_merged(model, tokenizer, folder, PROMPTS[:1])
    assert contents(folder)["model.safetensors"] != old["model.safetensors"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_what_is_not_exported(pair, base, tmp_path):
    model, tokenizer = pair
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds other files \(thesis.tex\)"):
        export.export_merged(model, tokenizer, tmp_path, PROMPTS)
    with pytest.raises(ValueError, match="dtype is 'int8': it must be one of float32, "):
        export.export_merged(model, tokenizer, tmp_path / "out", PROMPTS, dtype="int8")
    with pytest.raises(ValueError, match="no adapter is in use"):
        export.export_merged(*load_model(base), tmp_path / "out", PROMPTS)
    with (
        adapters.off(model),
        pytest.raises(ValueError, match="no adapter is in use: there is nothing to merge"),
    ):
        export.export_merged(model, tokenizer, tmp_path / "out", PROMPTS)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
