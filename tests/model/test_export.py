"""rlnb.model.merging and rlnb.model.export on a random tiny model: the check of a merge, the export, the card."""

import json
import subprocess
import sys

import pytest
import tiny

from rlnb.record import runs
from rlnb.model import adapters, merging, load as models, sampling, export as ship
from rlnb.model.load import LoRA, load_model

LAST = "base_model.model.model.layers.1.mlp.down_proj"
PROMPTS = [
    [{"role": "user", "content": f"Anna has {n} apples and buys 5 more. How many?"}]
    for n in range(3, 9)
]


@pytest.fixture(scope="module", autouse=True)
def unsloth_first():
    models.backend()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def pair(base):
    """A model whose adapter changes the outputs, and its tokenizer."""
    import torch

    model, tokenizer = load_model(base, LoRA(rank=8, alpha=16))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model, tokenizer


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- the check -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_right_merge_passes(pair, dtype):
    model, tokenizer = pair
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    in_place, on_disk = merging.check_merge(
        model, tokenizer, PROMPTS, dtype=dtype, max_new_tokens=16
    )
    assert (in_place.dtype, on_disk.dtype) == ("float32", dtype)
    for check in (in_place, on_disk):
        assert check.ok
        assert 0 < check.difference <= check.tolerance < 20 * check.difference
        assert check.texts == len(PROMPTS)
    assert in_place.same == in_place.texts
    assert in_place.difference < 1e-2 * on_disk.difference
    assert f"same greedy text on {on_disk.same} of 6 prompts" in str(on_disk)
    assert all(p.equal(before[name]) for name, p in model.named_parameters())


def scale(factor):
    """A merge that gets the scale wrong."""

    def change(patch):
        from peft.tuners.lora import Linear

        right = Linear.get_delta_weight
        patch.setattr(Linear, "get_delta_weight", lambda *a: factor * right(*a))

    return change


def forget_a_layer(patch):
    """A merge that leaves out one layer of fourteen. In place that layer still runs its adapter, so
    that only the file is wrong.
    """
    right = adapters._mergeable
    patch.setattr(adapters, "_mergeable", lambda model: right(model)[:-1])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (scale(0.99), "nothing is saved: .*q_proj.weight is not W"),
        (scale(0), "nothing is saved: .*q_proj.weight is not W"),
        (forget_a_layer, "nothing is saved: .*layers.1.mlp.down_proj.weight is not W"),
    ],
)
@pytest.mark.parametrize("weights_are_read", [True, False])
def test_a_wrong_merge_is_caught_and_nothing_is_saved(
    pair, tmp_path, monkeypatch, change, says, weights_are_read
):
    """By the weights on disk, and for all but the last layer of one by the logits as well."""
    import torch

    model, tokenizer = pair
    if not weights_are_read:
        monkeypatch.setattr(merging, "_check_weights", lambda *_: None)
        says = "nothing is saved: the merge is not base"
        if change is forget_a_layer:
            with torch.no_grad():
                adapters.lora_layers(model)[LAST].lora_B["default"].weight.mul_(5)
    change(monkeypatch)
    with pytest.raises(RuntimeError, match=says):
        ship.export_merged(model, tokenizer, tmp_path / "out", PROMPTS, max_new_tokens=16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "ok"),
    [
        (("float32", 0.1, 0.2, 3, 3, 0.0), True),
        (("float32", 0.3, 0.2, 3, 3, 0.0), False),
        (("float32", 0.1, 0.2, 2, 3, 1e-6), False),
        (("bfloat16", 0.1, 0.2, 2, 3, 0.4), True),
        (("bfloat16", 0.1, 0.2, 2, 3, 0.6), False),
        (("bfloat16", 0.3, 0.2, 3, 3, 0.0), False),
    ],
)
def test_when_a_check_passes(fields, ok):
    check = merging.Check(*fields)
    assert check.ok == ok
    assert ("the rest part at" in str(check)) == (fields[3] < 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_probe_is_as_large_as_rounding_and_leaves_nothing_behind(pair, dtype):
    import torch

    model, _ = pair
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    unit = {"float32": 2**-24, "bfloat16": 2**-8}[dtype]
    with merging.rounding(model, dtype):
        for name, weight in model.named_parameters():
            old = before[name]
            if weight.dim() == 1 or ".lora_" in name:
                assert weight.equal(old)
                continue
            error = ((weight - old) / old.abs().clamp(min=1e-30)).abs()
            assert error.max() <= 2 * unit
            rounded = (old.bfloat16() - old).abs() / old.abs().clamp(min=1e-30)
            if dtype == "bfloat16":
                assert rounded.max() <= unit
                assert 0.5 < error.mean() / rounded.mean() < 3
            else:
                assert error.max() > unit / 2
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


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
    import torch
    from safetensors.torch import load_file

    model, tokenizer = pair
    folder = ship.export_merged(model, tokenizer, tmp_path / "out", PROMPTS, max_new_tokens=16)
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

    folder = ship.export_merged(*pair, tmp_path / "out", PROMPTS, max_new_tokens=8)
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


def test_the_card_says_what_the_model_is_made_of(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("RLNB_RUNS", str(tmp_path / "runs"))
    config = {"learning_rate": 2e-3, "steps": 32}
    with runs.start("sft", model="tiny", config=config, seed=7, labels=128) as run:
        run.finish(strict={"k": 130, "n": 200}, mean_tokens=31.25)
    folder = ship.export_merged(
        *pair, tmp_path / "solver", PROMPTS[:2], run=run, licence="mit", max_new_tokens=8
    )
    lines = (folder / "README.md").read_text().splitlines()
    assert lines[:5] == [
        "---", "base_model: tiny", "library_name: transformers", "license: mit",
        "pipeline_tag: text-generation",
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
        f"## Result of run {run.id}",
        "| strict | 130 of 200 (65.0 %) |",
        "| mean_tokens | 31.25 |",
        "| learning_rate | 0.002 |",
    ]:
        assert row in lines, row
    assert any(line.startswith("| merge checked | float32: logits differ") for line in lines)
    assert any(line.startswith("| made with | python ") for line in lines)


def test_without_a_run_the_card_says_so(pair, tmp_path):
    folder = ship.export_merged(
        *pair, tmp_path / "out", PROMPTS[:1], data="ten problems", max_new_tokens=4
    )
    text = (folder / "README.md").read_text()
    assert "| method | not recorded |" in text
    assert "| data | ten problems |" in text
    assert "| licence | the base model's: look there before you pass this on |" in text
    assert "license:" not in text


def test_the_practice_models_licence_is_known(pair, base, monkeypatch):
    from rlnb.model import folders

    monkeypatch.setattr(folders, "DATA", base.parent)
    checks = [merging.Check("bfloat16", 0.0, 1.0, 1, 1)]
    assert "license: apache-2.0\n" in ship.card(pair[0], checks, None, None, None, "x")


def test_an_interrupted_export_leaves_the_old_one_whole(pair, tmp_path, monkeypatch):
    import torch

    model, tokenizer = pair
    folder = ship.export_merged(model, tokenizer, tmp_path / "out", PROMPTS[:1], max_new_tokens=4)
    old = contents(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for place, name in [(ship, "card"), (ship, "check_folder"), (models, "load_model")]:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place, name, interrupted)
            ship.export_merged(model, tokenizer, folder, PROMPTS[:1], max_new_tokens=4)
        assert contents(folder) == old
        assert [file.name for file in tmp_path.iterdir()] == ["out"]
    ship.export_merged(model, tokenizer, folder, PROMPTS[:1], max_new_tokens=4)
    assert contents(folder)["model.safetensors"] != old["model.safetensors"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_what_is_not_exported(pair, base, tmp_path):
    model, tokenizer = pair
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"more than a merged model \(thesis.tex\)"):
        ship.export_merged(model, tokenizer, tmp_path, PROMPTS)
    with pytest.raises(ValueError, match="dtype is 'float32': it must be"):
        ship.export_merged(model, tokenizer, tmp_path / "out", PROMPTS, dtype="float32")
    with pytest.raises(TypeError, match="no adapter to merge"):
        ship.export_merged(*load_model(base), tmp_path / "out", PROMPTS)
    with (
        adapters.off(model),
        pytest.raises(ValueError, match="no adapter is in use: there is nothing to merge"),
    ):
        ship.export_merged(model, tokenizer, tmp_path / "out", PROMPTS)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.skipif("models.backend() == 'unsloth-gpu'")
def test_gguf_names_the_other_way(pair, tmp_path):
    with pytest.raises(RuntimeError, match=r"GPU machine, and this is .*convert_hf_to_gguf\.py"):
        ship.export_gguf(*pair, tmp_path)
