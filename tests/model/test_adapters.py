"""rlnb.model.adapters and folders on a random tiny model: saving, switching, combining, merging."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlnb.model import LoRA, adapters, backend, folders, load_model, sampling, save_adapter
from rlnb.model.lora import ATTENTION, lora_layers

SHAPES = {  # adapters that differ in all that PEFT scales and places them by
    "sft": LoRA(rank=8, alpha=8),
    "dpo": LoRA(rank=2, alpha=8, targets=ATTENTION),
    "grpo": LoRA(rank=4, alpha=2),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny")


def make(base, lora, seed=0, **options):
    """A model whose adapter changes the outputs."""
    model, tokenizer = load_model(base, lora, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model, tokenizer


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """A folder for each of SHAPES."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: save_adapter(make(base, lora, seed)[0], root / name)
        for seed, (name, lora) in enumerate(SHAPES.items())
    }


@pytest.fixture
def model(base, saved):
    """Trains "sft", as "default"; has "dpo" and "grpo" beside it."""
    model, _ = load_model(base, saved["sft"])
    for name in ("dpo", "grpo"):
        adapters.add(model, name, saved[name])
    return model


def logits(model):
    ids = torch.arange(4, 24).reshape(2, 10)
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad():
        out = model.eval()(input_ids=ids).logits
    for module, mode in modes:
        module.training = mode
    return out


def state(model):
    """All that a switch could leave behind: weights, what trains, modes, what is in use."""
    layers = lora_layers(model).values()
    return (
        {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()},
        [p.requires_grad for p in model.parameters()],
        [module.training for module in model.modules()],
        model.active_adapter,
        [
            (layer.active_adapters, layer.disable_adapters, layer.merged_adapters)
            for layer in layers
        ],
    )


def check_unchanged(model, before):
    now = state(model)
    assert now[1:] == before[1:]
    assert now[0].keys() == before[0].keys()
    for name, (pointer, value) in now[0].items():
        assert pointer == before[0][name][0]
        assert value.equal(before[0][name][1]), name


# --- on disk -------------------------------------------------------------------------------------


def test_the_saved_config_knows_no_path_and_is_the_same_every_time(base, saved, tmp_path):
    folder = saved["sft"]
    text = (folder / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] == "tiny"
    assert "/" not in text
    model, _ = make(base, SHAPES["sft"])
    again = save_adapter(model, tmp_path / "deep" / "again")
    for name in folders.FILES:
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert sorted(file.name for file in again.parent.iterdir()) == ["again"]


def test_a_model_is_named_without_its_path(base):
    assert folders.base_name(str(base)) == "tiny"
    assert folders.base_name("owner/name") == "owner/name"


def test_an_interrupted_save_leaves_the_old_adapter_whole(base, saved, tmp_path, monkeypatch):
    folder = shutil.copytree(saved["sft"], tmp_path / "sft")
    old = {file.name: file.read_bytes() for file in folder.iterdir()}
    other, _ = load_model(base, LoRA(rank=2))

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folders, "base_name", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_adapter(other, folder)
    with pytest.raises(FileNotFoundError), folders.replaced(folder, folders.FILES) as new:
        new.rmdir()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == old
    assert [file.name for file in tmp_path.iterdir()] == ["sft"]
    save_adapter(other, folder)
    assert folders.read_saved(folder)[1]["r"] == 2
    assert [file.name for file in tmp_path.iterdir()] == ["sft"]


def test_only_adapters_are_saved_and_only_adapters_replaced(base, model, tmp_path):
    with pytest.raises(ValueError, match="no adapter 'default': it has none"):
        save_adapter(load_model(base)[0], tmp_path / "full")
    with pytest.raises(ValueError, match="no adapter 'ppo': it has default, dpo, grpo"):
        save_adapter(model, tmp_path / "ppo", "ppo")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds other files \(thesis.tex\)"):
        save_adapter(model, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_adapter_of_any_name_is_saved_the_same_way(model, saved, tmp_path):
    for name in ("dpo", "grpo"):
        folder = save_adapter(model, tmp_path / name, name)
        for file in folders.FILES:
            assert (folder / file).read_bytes() == (saved[name] / file).read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dpo", "grpo"]


STOCK = """
import sys
sys.modules["rlnb"] = sys.modules["unsloth"] = None
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

base, out, *folders = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
chat = [{"role": "user", "content": "Anna has 12 apples and buys 5 more. How many?"}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
found = {}
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        found[folder] = model(input_ids=torch.arange(4, 24).reshape(2, 10)).logits
        found[folder + "text"] = model.generate(**prompt, max_new_tokens=20, do_sample=False)
save_file(found, out)
"""


def test_stock_peft_in_a_fresh_process_gives_the_same(base, model, saved, tmp_path):
    """No rlnb and no Unsloth there: the same logits and the same greedy text."""
    adapters.combine(model, "mix", {"default": 0.5, "grpo": 0.5})
    saved = saved | {"mix": save_adapter(model, tmp_path / "mix", "mix")}
    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-I", "-c", STOCK, str(base), str(out), *map(str, saved.values())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, tokenizer = load_file(out), AutoTokenizer.from_pretrained(base)
    chat = [{"role": "user", "content": "Anna has 12 apples and buys 5 more. How many?"}]
    for name, folder in saved.items():
        with adapters.using(model, "default" if name == "sft" else name):
            assert (logits(model) - theirs[str(folder)]).abs().max() < 1e-5
            ours = sampling.sample(
                model, tokenizer, [chat], max_new_tokens=20, temperature=0, progress=False
            ).ids[0][0]
        assert theirs[str(folder) + "text"][0].tolist()[-len(ours) :] == ours


# --- several on one base -------------------------------------------------------------------------


def test_each_adapter_gives_what_it_gives_alone(base, saved, model):
    alone = {name: logits(load_model(base, folder)[0]) for name, folder in saved.items()}
    plain = logits(load_model(base)[0])
    model.train()
    before = state(model)
    for name in ("dpo", "grpo", "default", "dpo"):
        with adapters.using(model, name) as inside:
            assert inside is model
            assert torch.equal(logits(model), alone["sft" if name == "default" else name])
            assert state(model)[1] == before[1]  # what trains trains inside too
            with adapters.off(model):
                assert torch.equal(logits(model), plain)
                with adapters.using(model, "grpo"):
                    assert torch.equal(logits(model), alone["grpo"])
                assert torch.equal(logits(model), plain)
            assert torch.equal(logits(model), alone["sft" if name == "default" else name])
        check_unchanged(model, before)
    assert torch.equal(logits(model), alone["sft"])


def test_an_error_inside_changes_nothing(model):
    before = state(model)
    for context in (adapters.using(model, "dpo"), adapters.off(model), adapters.merged(model)):
        with pytest.raises(ZeroDivisionError), context:
            _ = 1 / 0
        check_unchanged(model, before)


def test_what_peft_left_in_use_is_in_use_again(base):
    """Two at once, and adapters that are off."""
    config = LoraConfig(target_modules=["q_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.base_model.set_adapter(["default", "second"])
    before, both = state(model), logits(model)
    with adapters.using(model, "second"):
        assert not torch.allclose(logits(model), both, atol=1e-3)
    check_unchanged(model, before)
    with model.disable_adapter():
        off = logits(model)
        with adapters.using(model, "default"):
            assert not torch.allclose(logits(model), off, atol=1e-3)
        assert torch.equal(logits(model), off)
    assert torch.equal(logits(model), both)


def test_a_switch_lets_gradients_through(model):
    """A second adapter that trains, as PPO's value: its gradient is that of the adapter in use alone."""
    ids, grads = torch.arange(4, 24).reshape(2, 10), {}
    trained = {n: p for n, p in model.named_parameters() if ".dpo." in n}
    for parameter in trained.values():
        parameter.requires_grad = True
    with adapters.using(model, "dpo"):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {n for n, p in model.named_parameters() if p.grad is not None}
    assert grads == set(trained)


def test_what_trained_goes_on_training(model):
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trains
    assert all(".default." in name for name in trains)
    with adapters.using(model, "grpo"):
        pass
    ids = torch.arange(4, 24).reshape(2, 10)
    model(input_ids=ids, labels=ids).loss.backward()
    with_gradient = [name for name, p in model.named_parameters() if p.grad is not None]
    assert with_gradient == trains


def test_adapters_that_cannot_be_added(base, saved, model, tmp_path):
    before = state(model)
    for name in ("dpo", "v1.2", ""):
        with pytest.raises(ValueError, match=f"'{name}' is .*dot or is taken: there are default, dpo, grpo"):
            adapters.add(model, name, saved["dpo"])
    with pytest.raises(FileNotFoundError, match="there is no adapter 'nowhere'"):
        adapters.add(model, "new", "nowhere")
    wide = tiny.make(tmp_path / "wide" / "tiny", intermediate_size=128)
    other = save_adapter(load_model(wide, LoRA())[0], tmp_path / "other")
    with pytest.raises(ValueError, match=r"(?s)is for another base .*size mismatch"):
        adapters.add(model, "new", other)
    broken = shutil.copytree(saved["dpo"], tmp_path / "broken")
    weights = load_file(broken / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, broken / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is .* the file has no .*lora_"):
        adapters.add(model, "new", broken)
    check_unchanged(model, before)
    assert list(model.peft_config) == ["default", "dpo", "grpo"]


def changed_copy(folder, into, **changes):
    shutil.copytree(folder, into)
    file = into / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return into


def test_an_adapter_that_rewrites_the_base_shares_it_with_no_other(saved, model, tmp_path):
    folder, before = changed_copy(saved["dpo"], tmp_path / "pissa", init_lora_weights="pissa"), state(model)
    with pytest.raises(ValueError, match=r"pissa/adapter_config\.json: init_lora_weights is 'pissa', which rewrites"):
        adapters.add(model, "new", folder)
    check_unchanged(model, before)


def test_names_that_hold_each_other_are_kept_apart(model, saved, tmp_path):
    for name in ("dpo2", "dp", "default_2"):
        adapters.add(model, name, saved["dpo"])
        folder = save_adapter(model, tmp_path / name, name)
        for file in folders.FILES:
            assert (folder / file).read_bytes() == (saved["dpo"] / file).read_bytes()
    folder = save_adapter(model, tmp_path / "sft")
    assert (folder / folders.FILES[1]).read_bytes() == (
        saved["sft"] / folders.FILES[1]
    ).read_bytes()


def test_an_adapter_of_another_base_is_pointed_out(base, saved, tmp_path):
    other = tiny.make(tmp_path / "other")
    model, _ = load_model(other, LoRA())
    with pytest.warns(UserWarning, match="dpo was trained on tiny, not on .*other"):
        adapters.add(model, "dpo", saved["dpo"])


def test_names_that_are_not_there(base, model):
    with (
        pytest.raises(ValueError, match="no adapter 'ppo': it has default, dpo, grpo"),
        adapters.using(model, "ppo"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="no adapter 'ppo': it has none"),
        adapters.using(load_model(base)[0], "ppo"),
    ):
        pass


# --- weighted combinations -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights",
    [{"default": 1.0}, {"default": 0.5, "dpo": 0.5}, {"grpo": 2.0, "dpo": -1, "default": 0.25}],
)
def test_a_combination_is_the_weighted_sum_of_the_updates(model, weights):
    model.train()
    before = state(model)
    adapters.combine(model, "mix", weights)
    names = dict(model.named_parameters())
    assert not any(names[name].requires_grad for name in names if ".mix." in name)
    for layer in lora_layers(model).values():
        parts = {name: w for name, w in weights.items() if name in layer.lora_A}
        expected = sum(w * layer.get_delta_weight(name) for name, w in parts.items())
        if parts:
            assert torch.allclose(layer.get_delta_weight("mix"), expected, atol=1e-6)
        else:
            assert "mix" not in layer.lora_A or not layer.get_delta_weight("mix").any()
    ranks = {"default": 8, "dpo": 2, "grpo": 4}
    assert model.peft_config["mix"].r == sum(ranks[name] for name in weights)
    model.delete_adapter("mix")
    check_unchanged(model, before)


def test_weights_move_the_outputs_from_one_adapter_to_the_other(model):
    for weight, name in [(1.0, "dpo"), (0.0, "grpo")]:
        adapters.combine(model, f"mix{name}", {"dpo": weight, "grpo": 1 - weight})
        with adapters.using(model, f"mix{name}"):
            mixed = logits(model)
        with adapters.using(model, name):
            assert torch.allclose(mixed, logits(model), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "weights", "says"),
    [
        ("dpo", {"grpo": 1.0}, "name 'dpo' is .* taken"),
        ("mix", {"ppo": 1.0}, "no adapter 'ppo': it has default, dpo, grpo"),
        ("mix", {}, r"weights is \{\}"),
    ],
)
def test_combinations_that_make_no_sense(model, name, weights, says):
    with pytest.raises(ValueError, match=says):
        adapters.combine(model, name, weights)


def test_only_plain_lora_is_combined(saved, model, tmp_path):
    """PEFT would give the sum the first one's use_rslora, and so scale it by the root of its rank."""
    adapters.add(model, "rs", changed_copy(saved["dpo"], tmp_path / "rs", use_rslora=True))
    before = state(model)
    with pytest.raises(ValueError, match=r"adapter 'rs' has use_rslora, .*only plain LoRA can be combined"):
        adapters.combine(model, "mix", {"dpo": 0.5, "rs": 0.5})
    check_unchanged(model, before)


# --- merged --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["default", "dpo", "grpo"])
def test_merged_is_base_plus_adapter_and_comes_off_bit_for_bit(base, saved, dtype, name):
    model, _ = load_model(base, saved["sft"], dtype=dtype)
    for other in ("dpo", "grpo"):
        adapters.add(model, other, saved[other])
    before, plain = state(model), {n: p.clone() for n, p in model.named_parameters()}
    with adapters.using(model, name):
        expected, in_use = logits(model).float(), state(model)
        with adapters.merged(model) as inside:
            assert inside is model
            found = logits(model).float()
            for path, layer in lora_layers(model).items():
                if name in layer.lora_A:
                    weight = plain[f"{path}.base_layer.weight"].float()
                    update = layer.lora_B[name].weight @ layer.lora_A[name].weight
                    weight = (weight + layer.scaling[name] * update).to(getattr(torch, dtype))
                    assert torch.allclose(layer.base_layer.weight, weight, rtol=1e-6, atol=1e-7)
        check_unchanged(model, in_use)
    check_unchanged(model, before)
    assert (found - expected).abs().max() < (1e-5 if dtype == "float32" else 0.1)


def test_inside_merged_nothing_is_switched(model):
    with adapters.merged(model):
        for context in (adapters.off(model), adapters.using(model, "dpo"), adapters.merged(model)):
            with pytest.raises(RuntimeError, match=r"leave adapters.merged first"), context:
                pass


def test_what_cannot_be_merged(base, model):
    def refused(model, error, says):
        with pytest.raises(error, match=says), adapters.merged(model):
            pass

    refused(load_model(base)[0], ValueError, "no adapter is in use")
    with adapters.off(model):
        refused(model, ValueError, "no adapter is in use")
    for settings, says in [
        ({"use_dora": True}, "q_proj is Linear, not plain LoRA: merge it with PEFT"),
        ({"lora_bias": True}, "q_proj is Linear, not plain LoRA"),
        ({"modules_to_save": ["norm"]}, "has modules_to_save"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens is Embedding, not plain"),
    ]:
        config = LoraConfig(**{"target_modules": ["q_proj"]} | settings)
        other = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        refused(other, TypeError, says)


def test_an_adapter_trained_with_another_backend_switches_too(base, saved, monkeypatch):
    """Without Unsloth the same code runs."""
    expected = logits(load_model(base, saved["dpo"])[0])
    monkeypatch.setitem(sys.modules, "unsloth", None)
    backend.cache_clear()
    try:
        plain, _ = load_model(base, saved["sft"])
        adapters.add(plain, "dpo", saved["dpo"])
        with adapters.using(plain, "dpo"):
            assert torch.equal(logits(plain), expected)
    finally:
        backend.cache_clear()


def test_nothing_of_this_machine_is_in_a_saved_adapter(saved):
    for folder in saved.values():
        for file in folder.iterdir():
            assert os.fsencode(str(folder.parent)) not in file.read_bytes()
