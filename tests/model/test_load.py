"""rlnb.model.load on a CPU with a random tiny model: checks, three modes, saving, TRL's trainers."""

import contextlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys

import httpx
import huggingface_hub
import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from rlnb.data import shapes
from rlnb.model import (
    LoRA, backend, backends, decode_cpu, folders, load, load_model, quiet, resolve, save_adapter,
    trainable,
)  # fmt: skip
from rlnb.model.lora import ALL_LINEAR, INITS, lora_layers
from rlnb.task import problems

RANKS = (1, 2, 3, 4, 7, 8, 16, 32, 64, 128, 256, 320, 512, 513)
CHAT = [{"role": "user", "content": "Anna has 12 apples and buys 5 more. How many?"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A saved adapter of rank 8 that changes the outputs, and its model."""
    model, _ = load_model(base, LoRA(rank=8, alpha=8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return save_adapter(model, tmp_path_factory.mktemp("adapters") / "sft"), model


def logits(model):
    ids = torch.arange(4, 24).reshape(2, 10)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


# --- names and folders ---------------------------------------------------------------------------


def test_names_resolve(base, tmp_path, monkeypatch):
    assert resolve(base) == str(base)
    assert resolve("Qwen/Qwen2.5-0.5B-Instruct") == "Qwen/Qwen2.5-0.5B-Instruct"
    monkeypatch.chdir(base.parent)
    assert resolve("tiny") == resolve("./tiny") == str(base)
    monkeypatch.setattr(folders, "DATA", base.parent)
    monkeypatch.chdir(tmp_path)
    assert resolve("tiny") == str(base)


@pytest.mark.parametrize("name", ["abacus-4m", "gpt2", "./a/b", "models/x", "/nowhere", "a/b/c"])
def test_a_model_that_is_not_there(base, name, monkeypatch, tmp_path):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folders, "DATA", base.parent)
    with pytest.raises(FileNotFoundError, match=f"no model '{name}': .* data/ has tiny"):
        resolve(name)


def test_a_folder_that_is_no_model(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config.json among nothing$"):
        resolve(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"no \*.safetensors among .*pytorch_model.bin$"):
        resolve(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no config.json among adapter_config.json"):
        resolve(trained[0])


def test_a_folder_that_is_no_adapter(base, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no adapter 'nowhere': /.*/nowhere is no"):
        load_model(base, "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no adapter_config.json among .*config.json"):
        load_model(base, base)
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ValueError, match="peft_type is 'IA3', it must be 'LORA'"):
        load_model(base, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"lora": LoRA(rank=65)}, "rank 65 is above max_lora_rank 64"),
        ({"lora": LoRA(rank=65), "max_lora_rank": 128}, "rank 65 is above 64, the smallest width"),
        (
            {"lora": LoRA(targets=["q_proj", "w1"])},
            "no linear layer w1 for LoRA: its layers are q_",
        ),
        ({"lora": LoRA(targets=["lm_head"])}, "lm_head is refused: TRL computes"),
        ({"lora": LoRA(), "max_lora_rank": 513, "fast_inference": True}, "513 is above 512"),
        ({"fast_inference": True}, "pass lora=LoRA"),
        ({"lora": 16}, r"lora is 16: it must be LoRA\(...\), an adapter's folder or None"),
        ({"max_seq_length": 0}, "max_seq_length is 0: it must be a whole number"),
        ({"lora": LoRA(), "dtype": "float16"}, "dtype is 'float16'"),
        ({"lora": LoRA(), "dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_checks_come_before_the_weights(base, tmp_path, arguments, says):
    shutil.copy(base / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_text("nobody can load this")
    with pytest.raises(ValueError, match=says):
        load_model(tmp_path, **arguments)


@pytest.mark.parametrize("rank", RANKS)
def test_every_rank_is_checked_before_the_weights(base, tmp_path, rank):
    """The narrowest layer is 64 wide. Without a tokenizer, no rank that fits goes any further."""
    shutil.copy(base / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_text("nobody can load this")
    for largest in (1, 8, 64, 128, 512):
        if rank <= min(largest, 64):
            continue
        limit = f"max_lora_rank {largest}" if rank > largest else "64, the smallest width"
        for fast_inference in (False, True):
            with pytest.raises(ValueError, match=f"rank {rank} is above {limit}"):
                load_model(
                    tmp_path, LoRA(rank=rank), max_lora_rank=largest, fast_inference=fast_inference
                )


def test_a_saved_rank_is_checked_too(base, trained):
    with pytest.raises(ValueError, match="rank 8 is above max_lora_rank 4"):
        load_model(base, trained[0], max_lora_rank=4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"init_lora_weights": "pissa_niter_4"},
            "adapter_config.json: init_lora_weights is 'pissa",
        ),
        ({"target_modules": ["q_proj", "w1"]}, "no linear layer w1 for LoRA"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head is refused"),
    ],
)
def test_a_saved_adapter_is_checked_before_the_weights(base, trained, tmp_path, change, says):
    shutil.copy(base / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_text("nobody can load this")
    adapter = shutil.copytree(trained[0], tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with (
        pytest.warns(UserWarning, match="trained on tiny") if "target_modules" in change
        else contextlib.nullcontext(),
        pytest.raises(ValueError, match=says),
    ):  # fmt: skip
        load_model(tmp_path, adapter)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ({"intermediate_size": 128}, r"size mismatch .*down_proj"),
        ({"num_hidden_layers": 1}, r"this base has no .*layers\.1"),
    ],
)
def test_an_adapter_of_another_shape_is_refused(trained, tmp_path, shape, says):
    other = tiny.make(tmp_path / "tiny", **shape)
    with pytest.raises(ValueError, match=f"(?s)sft.adapter_model.safetensors is for another base.*{says}"):
        load_model(other, trained[0])


# --- the three modes -----------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing_yet_and_trains_alone(base, capsys):
    full, _ = load_model(base)
    capsys.readouterr()
    model, tokenizer = load_model(base, LoRA(rank=4))
    out, err = capsys.readouterr()
    count, total = trainable(model)
    what = f"{total:,} parameters, {count:,} train (LoRA rank 4), {backend()}, float32"
    assert (out, err) == (f"tiny: {what}\n", "")
    shapes = [module.weight.shape for n, module in full.named_modules() if n.endswith("_proj")]
    assert count == 4 * sum(rows + columns for rows, columns in shapes)
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    assert torch.equal(logits(model), logits(full))
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.apply_chat_template(CHAT, tokenize=False).startswith("<|user|>Anna")


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_the_seed_fixes_the_start_as_in_stock_peft(base, init):
    first, again, other = (
        load_model(base, LoRA(rank=4, init=init), seed=seed)[0].state_dict() for seed in (5, 5, 6)
    )
    stock = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, target_modules=list(ALL_LINEAR), init_lora_weights=INITS[init])
    stock = peft.get_peft_model(stock, config).state_dict()
    assert first.keys() == stock.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], stock[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_with_the_adapter_off_the_model_is_the_base(base, init):
    """Also after a step, which is what makes it a reference."""
    model, _ = load_model(base, LoRA(rank=4, init=init))
    plain = logits(load_model(base)[0])
    assert torch.allclose(logits(model), plain, atol=1e-5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert not torch.allclose(logits(model), plain, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "up_proj"]])
def test_targets_and_scale_reach_peft(base, targets):
    model, _ = load_model(base, LoRA(rank=4, alpha=8, targets=targets))
    names = ALL_LINEAR if targets == "all-linear" else targets
    assert model.peft_config["default"].target_modules == set(names)
    layers = list(lora_layers(model).values())
    assert len(layers) == 2 * len(names)
    assert {module.scaling["default"] for module in layers} == {2.0}


def test_full_fine_tuning_trains_everything(base, capsys):
    model, _ = load_model(base)
    count, total = trainable(model)
    assert count == total == sum(parameter.numel() for parameter in model.parameters())
    assert "(full fine-tuning, which has no rank)" in capsys.readouterr().out


def test_a_saved_adapter_goes_on_training_at_its_own_rank(base, trained, capsys):
    folder, model = trained
    again, _ = load_model(base, folder, seed=9)
    assert "(LoRA rank 8 from sft)" in capsys.readouterr().out
    assert trainable(again) == trainable(model)
    assert again.peft_config["default"].lora_alpha == 8
    assert torch.equal(logits(again), logits(model))
    assert not torch.allclose(logits(again), logits(load_model(base)[0]))


def test_stock_peft_reads_the_adapter(base, trained):
    folder, model = trained
    stock = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    assert torch.equal(logits(stock), logits(model))


def test_an_adapter_of_another_base_is_pointed_out(trained, tmp_path):
    other = tiny.make(tmp_path / "other")
    with pytest.warns(UserWarning, match="sft was trained on tiny, not on .*other"):
        load_model(other, trained[0])


def test_an_adapter_with_missing_weights_is_refused(base, trained, tmp_path):
    weights = load_file(trained[0] / "adapter_model.safetensors")
    name = next(iter(weights))
    weights.pop(name)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    shutil.copy(trained[0] / "adapter_config.json", tmp_path)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is .* not whole: the file has no .*lora_"):
        load_model(base, tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_type_of_the_weights_can_be_named(base, dtype, capsys):
    load_model(base, LoRA(), dtype=dtype)
    assert f"{backend()}, {dtype}\n" in capsys.readouterr().out


# --- backends, rollouts, padding -----------------------------------------------------------------


def test_a_wide_model_keeps_its_16_bits_on_a_cpu_that_computes_in_them(tmp_path, monkeypatch):
    wide = tiny.make(tmp_path / "wide", hidden_size=512, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(wide)
    model.to(torch.bfloat16).save_pretrained(wide)
    for flags, lora, kind in (
        ({"amx_bf16"}, LoRA(4), torch.bfloat16), (set(), LoRA(4), torch.float32), (None, LoRA(4), torch.float32),
        ({"amx_bf16"}, None, torch.float32),
    ):  # fmt: skip
        monkeypatch.setattr(load.machine, "cpu_bf16", lambda flags=flags: flags)
        model, tokenizer = load_model(wide, lora)
        assert model.dtype == kind
        if lora and kind == torch.bfloat16:  # what samples has LoRA in 16 bits, what trains does not
            for layer in lora_layers(model).values():
                torch.nn.init.normal_(layer.lora_B["default"].weight)
            copy = decode_cpu.view(model)
            assert {p.dtype for p in copy.parameters()} == {torch.bfloat16}
            assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
            ids = torch.tensor([tokenizer("12 + 5")["input_ids"]])
            with torch.no_grad():
                own, seen = model.eval()(input_ids=ids).logits, copy(input_ids=ids).logits
            assert (own - seen).abs().mean() < 0.02 * own.std()


def test_nothing_is_looked_up_outside(base, monkeypatch):
    lookups = []

    def refused(*arguments, **_):
        lookups.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    load_model(base, LoRA())
    assert not lookups
    with pytest.raises(httpx.ConnectError):
        huggingface_hub.model_info("nobody/nothing")
    assert lookups  # so a look-up would have been noticed
    assert os.environ["UNSLOTH_DISABLE_STATISTICS"] == os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert os.environ["TRL_EXPERIMENTAL_SILENCE"] == "1"


def test_fast_inference_on_a_cpu_is_said_once(base, capsys):
    backends.say_once.cache_clear()
    for _ in range(2):
        load_model(base, LoRA(), fast_inference=True, max_lora_rank=20)
    out = capsys.readouterr().out
    assert out.count("rollouts use transformers here") == 1


def test_a_gpu_without_vllm_is_told_the_way_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"needs (unsloth|vllm), .* --kind gpu, or pass"):
        load._vllm_works("unsloth-gpu")


def test_without_unsloth_the_plain_path_gives_the_same(base, trained, monkeypatch, capsys):
    new = load_model(base, LoRA(rank=4), seed=3)[0].state_dict()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setitem(sys.modules, "unsloth", None)
    backend.cache_clear()
    backends.say_once.cache_clear()
    try:
        capsys.readouterr()
        plain = load_model(base, LoRA(rank=4), seed=3)[0].state_dict()
        assert "Unsloth is not installed, or this is macOS: models load with plain" in capsys.readouterr().out
        assert plain.keys() == new.keys()
        assert all(torch.equal(plain[name], new[name]) for name in new)
        saved, tokenizer = load_model(base, trained[0], max_seq_length=99)
        assert torch.equal(logits(saved), logits(trained[1]))
        assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 99)
        count, total = trainable(load_model(base)[0])
        assert count == total
        assert capsys.readouterr().out.count("plain transformers") == 0
    finally:
        backend.cache_clear()


@pytest.mark.skipif(sys.platform == "darwin", reason="Unsloth is not used on macOS")
def test_an_unsloth_that_does_not_import_is_reported(tmp_path):
    (tmp_path / "unsloth").mkdir()
    (tmp_path / "unsloth" / "__init__.py").write_text(
        "print('a banner')\nraise ImportError('libcuda.so.1: broken')"
    )
    code = "import rlnb.model"
    paths = os.pathsep.join([str(tmp_path), str(folders.DATA.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert done.returncode == 1
    assert "does not import here: ImportError: libcuda.so.1: broken. Repair it" in done.stderr
    assert "a banner" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(backend() == "plain", reason="there is no Unsloth here")
@pytest.mark.parametrize("early", ["", "transformers", "peft"])
def test_what_comes_before_unsloth_is_pointed_out(early):
    imports = f"import {early}\n" if early else ""
    done = subprocess.run(
        [sys.executable, "-c", f"{imports}import rlnb.model"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(folders.DATA.parent)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")
    assert ("Unsloth should be imported before" in done.stderr) == bool(early), done.stderr


def test_quiet_holds_back_what_is_printed_and_shows_it_on_an_error(capsys):
    with quiet():
        print("a banner")
        print("a bar", file=sys.stderr)
    assert capsys.readouterr() == ("", "a bar\n")
    with pytest.raises(ZeroDivisionError), quiet():
        print("a banner")
        _ = 1 / 0
    assert capsys.readouterr() == ("", "a banner\n")


def test_padding_is_never_the_end_token(base):
    class Model:
        config = AutoConfig.from_pretrained(base)

    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right")
    tokenizer.pad_token = tokenizer.eos_token
    load._set_padding(Model, tokenizer)
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<|pad|>", "left")
    assert Model.config.pad_token_id == tokenizer.pad_token_id == 0
    tokenizer.eos_token = "<|pad|>"
    with pytest.warns(UserWarning, match="no token to pad with but the end"):
        load._set_padding(Model, tokenizer)


# --- TRL's trainers ------------------------------------------------------------------------------


def arguments(folder):
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 1,
    }


def adapter_and_base(model):
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return [{n: v for n, v in weights.items() if ("lora_" in n) is on} for on in (True, False)]


def check_trained(model, before, log, key):
    after = adapter_and_base(model)
    assert any(not torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert all(torch.equal(value, after[1][name]) for name, value in before[1].items())
    values = [row[key] for row in log if key in row]
    assert len(values) == 2
    assert all(math.isfinite(value) for value in values)


@pytest.mark.parametrize("mode", ["new", "saved"])
def test_sft_runs(base, trained, tmp_path, mode):
    model, tokenizer = load_model(base, LoRA(rank=4) if mode == "new" else trained[0])
    before = adapter_and_base(model)
    trainer = SFTTrainer(
        model,
        SFTConfig(**arguments(tmp_path), max_length=None),
        train_dataset=shapes.prompt_completion(problems.generate("train", 8)),
        processing_class=tokenizer,
    )
    trainer.train()
    check_trained(model, before, trainer.state.log_history, "loss")
    # TRL's own columns are there: Unsloth's chunked loss for a CPU would drop this one.
    assert "mean_token_accuracy" in trainer.state.log_history[0]


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_grpo_runs_with_and_without_a_reference(base, trained, tmp_path, beta):
    """The model is a PeftModel already, so with beta > 0 TRL adds a frozen copy, "ref"."""
    model, tokenizer = load_model(base, trained[0])
    before = adapter_and_base(model)
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda completions, answer, **_: [
            len(completion[0]["content"]) + value % 7
            for completion, value in zip(completions, answer, strict=True)
        ],
        args=GRPOConfig(
            **arguments(tmp_path), num_generations=4, max_completion_length=8, beta=beta
        ),
        train_dataset=shapes.prompts(problems.generate("train", 4)),
        processing_class=tokenizer,
    )
    trainer.train()
    log = trainer.state.log_history
    check_trained(model, before, log, "reward")
    assert ("kl" in log[0]) == (beta > 0)
    saved = save_adapter(model, tmp_path / "adapter")
    assert sorted(file.name for file in saved.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    if beta:
        reference = {n: v for n, v in model.state_dict().items() if ".ref." in n}
        assert reference
        for name, value in reference.items():
            assert value.equal(before[0][name.replace(".ref.", ".default.")])


@pytest.mark.parametrize("lora", [LoRA(), None])
def test_four_bits_are_refused_where_they_cannot_be(lora):
    with pytest.raises(ValueError, match="load_in_4bit=True needs Unsloth on a GPU"):
        load_model("abacus-3m", lora, load_in_4bit=True)
