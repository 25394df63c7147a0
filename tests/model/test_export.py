"""rlnb.model.export on a random tiny model: the check of a merge, the export, the model card."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch

from rlnb.model import adapters, export, sampling
from rlnb.model.load import load_model
from rlnb.model.lora import LoRA

PROMPTS = [
    [{"role": "user", "content": f"Anna has {n} apples and buys 5 more. How many?"}]
    for n in range(3, 9)
]


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
    checks = export.check_merge(model, tokenizer, PROMPTS, dtype=dtype, max_new_tokens=16)
    assert [check.dtype for check in checks] == ["float32", dtype]
    for check in checks:
        assert check.ok, str(check)
        assert 0 < check.difference <= check.tolerance == export.TOLERANCE[check.dtype]
    assert checks[0].same == checks[0].texts == len(PROMPTS)
    assert f"same greedy text on {checks[1].same} of 6 prompts" in str(checks[1])
    assert all(p.equal(before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_merge_into_a_16_bit_base_is_rounded_once(base, dtype):
    """W + s B A is added up in float32, whatever the base's type is, and not by way of that."""
    model, tokenizer = with_an_adapter(base, dtype="bfloat16")
    checks = export.check_merge(model, tokenizer, PROMPTS, dtype=dtype, max_new_tokens=16)
    assert all(check.ok for check in checks), str(checks)
    assert [check.tolerance for check in checks] == [export.TOLERANCE["bfloat16"]] * 2


WRONG = {"a wrong scale": (0.99, False), "the adapter left out": (0, False), "a layer left out": (0, True)}


def merge_wrongly(patch, model, factor, one_layer, on_disk_alone):
    """Multiplies what a merge adds, to all layers or to the last of fourteen."""
    from peft.tuners.lora import Linear

    last = list(adapters.lora_layers(model).values())[-1]
    right, write = Linear.get_delta_weight, export._write

    def update(layer, name):
        return right(layer, name) * (factor if layer is last or not one_layer else 1)

    def write_wrongly(*arguments):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Linear, "get_delta_weight", update)
            write(*arguments)

    if on_disk_alone:
        patch.setattr(export, "_write", write_wrongly)
    else:
        patch.setattr(Linear, "get_delta_weight", update)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("error", WRONG)
@pytest.mark.parametrize("on_disk_alone", [True, False])
def test_the_weights_tell_a_wrong_merge_and_nothing_is_saved(
    pair, tmp_path, monkeypatch, error, dtype, on_disk_alone
):
    merge_wrongly(monkeypatch, pair[0], *WRONG[error], on_disk_alone)
    with pytest.raises(RuntimeError, match=r"nothing is saved: .*_proj.weight on disk is not W \+ s B A"):
        export.export_merged(*pair, tmp_path / "out", PROMPTS[:2], dtype=dtype, max_new_tokens=4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", WRONG)
def test_the_logits_tell_a_wrong_merge_as_well(pair, tmp_path, monkeypatch, error):
    """In place, where float32 shows everything."""
    monkeypatch.setattr(export, "_check_weights", lambda *_: None)
    merge_wrongly(monkeypatch, pair[0], *WRONG[error], on_disk_alone=False)
    with pytest.raises(RuntimeError, match=r"nothing is saved: the merge is not base \+ adapter: float32"):
        export.export_merged(*pair, tmp_path / "out", PROMPTS, max_new_tokens=16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "dtype"),
    [
        ("the adapter left out", "float32"),
        ("the adapter left out", "float16"),
        ("the adapter left out", "bfloat16"),
        ("a layer left out", "float32"),
        ("a layer left out", "float16"),
    ],
)
def test_the_logits_tell_a_wrong_file(pair, monkeypatch, error, dtype):
    """In bfloat16 one layer of fourteen is near what rounding does: there the weights alone tell."""
    monkeypatch.setattr(export, "_check_weights", lambda *_: None)
    merge_wrongly(monkeypatch, pair[0], *WRONG[error], on_disk_alone=True)
    in_place, on_disk = export.check_merge(*pair, PROMPTS, dtype=dtype, max_new_tokens=16)
    assert in_place.ok and not on_disk.ok, str(on_disk)


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
    folder = export.export_merged(model, tokenizer, tmp_path / "out", PROMPTS, max_new_tokens=16)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said[-2:]] == ["float32", "bfloat16"]
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

    folder = export.export_merged(*pair, tmp_path / "out", PROMPTS, max_new_tokens=8)
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
    config = {"seed": 7, "output_dir": str(tmp_path), "warmup": None, "learning_rate": 2e-3}
    config |= {"beta": 0.1, "rank": 8}
    run = SimpleNamespace(
        id="20261120-sft", method="sft", seed=7, parent=None, labels=128,
        config=config | {f"other_{n}": n for n in range(40)},
        result={"strict": {"k": 130, "n": 200}, "mean_tokens": 31.25},
    )  # fmt: skip
    folder = export.export_merged(
        *pair, tmp_path / "solver", PROMPTS[:2], run=run, licence="mit", max_new_tokens=8
    )
    lines = (folder / "README.md").read_text().splitlines()
    assert lines[:6] == [
        "---", "base_model: tiny", "library_name: transformers", "pipeline_tag: text-generation",
        "license: mit", "---",
    ]  # fmt: skip
    assert "# solver" in lines
    for row in [
        "| base model | tiny |",
        "| adapter | LoRA rank 8, alpha 16, merged into the weights |",
        "| method | sft |",
        "| data | 128 labelled examples |",
        "| seed | 7 |",
        "| started from | the base model |",
        "| weights | bfloat16 |",
        "| licence | mit |",
        "## Result of run 20261120-sft",
        "| strict | 130 of 200 (65.0 %) |",
        "| mean_tokens | 31.25 |",
        "| beta | 0.1 |",
    ]:
        assert row in lines, row
    assert any(line.startswith("| merge checked | float32: logits differ") for line in lines)
    assert any(line.startswith("| made with | python ") for line in lines)
    settings = lines[lines.index("## Settings") + 4 :]
    assert settings[:2] == ["| learning_rate | 0.002 |", "| rank | 8 |"]
    assert len(settings) == 25 and not {"warmup", "output_dir"} & {row.split()[1] for row in settings}


def test_without_a_run_the_card_says_so(pair, tmp_path):
    folder = export.export_merged(
        *pair, tmp_path / "out", PROMPTS[:1], data="ten problems", max_new_tokens=4
    )
    text = (folder / "README.md").read_text()
    assert "| method | not recorded |" in text
    assert "| data | ten problems |" in text
    assert "| licence | the base model's: look there before you pass this on |" in text
    assert "license:" not in text


def test_the_practice_models_licence_is_known(pair, base, monkeypatch):
    monkeypatch.setattr(export.folders, "DATA", base.parent)
    checks = [export.Check("bfloat16", 0.0, 0.1, 1, 1)]
    assert "license: apache-2.0\n" in export._model_card(pair[0], checks, None, None, None, "x")


def test_an_interrupted_export_leaves_the_old_one_whole(pair, tmp_path, monkeypatch):
    model, tokenizer = pair
    folder = export.export_merged(model, tokenizer, tmp_path / "out", PROMPTS[:1], max_new_tokens=4)
    old = contents(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for name in ("_model_card", "_check_weights", "load_model"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(export, name, interrupted)
            export.export_merged(model, tokenizer, folder, PROMPTS[:1], max_new_tokens=4)
        assert contents(folder) == old
        assert [file.name for file in tmp_path.iterdir()] == ["out"]
    export.export_merged(model, tokenizer, folder, PROMPTS[:1], max_new_tokens=4)
    assert contents(folder)["model.safetensors"] != old["model.safetensors"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_what_is_not_exported(pair, base, tmp_path):
    model, tokenizer = pair
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"more than a merged model \(thesis.tex\)"):
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


@pytest.mark.skipif("export.backend() == 'unsloth-gpu'")
def test_gguf_names_the_other_way(pair, tmp_path):
    with pytest.raises(RuntimeError, match=r"GPU machine, and this is .*convert_hf_to_gguf\.py"):
        export.export_gguf(*pair, tmp_path)
