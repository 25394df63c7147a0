"""GGUF files: what a small one of every kind becomes, and what is refused. The real one: tests/real."""

import json
import warnings

import gguf as package
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlnb.model import gguf, load_model, resolve
from tests import tiny

TYPES = package.GGMLQuantizationType


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A random Llama in float32, whose tokenizer cuts each digit alone."""
    return tiny.make(tmp_path_factory.mktemp("source"), hidden_size=128)


def write(source, file, kind=TYPES.Q8_0, leave_out=(), template=tiny.TEMPLATE, **others):
    """The model as llama.cpp writes it, matrices of a kind; others: fields that differ. Returns the weights that the
    file holds, by the names of transformers.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer, config = AutoTokenizer.from_pretrained(source), model.config
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer = package.GGUFWriter(file, others.pop("architecture", "llama"))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model(others.pop("model", "gpt2"))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in tiny.SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    if template:
        writer.add_chat_template(template)
    fields = {"pre": "smollm", "eos_token_id": 1, "bos_token_id": 2, "padding_token_id": 1} | others
    for name, value in fields.items():
        key = name if "." in name else f"tokenizer.ggml.{name}"
        if value is not None:
            writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    names, held = package.get_tensor_name_map(package.MODEL_ARCH.LLAMA, config.num_hidden_layers), {}
    for name, weight in model.state_dict().items():
        if (name == "lm_head.weight" and config.tie_word_embeddings) or name in leave_out:
            continue
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        rows = weight.numpy()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp turns pairs that lie side by side
            rows = rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        own = kind if rows.ndim == 2 else TYPES.F32
        packed = package.quants.quantize(np.ascontiguousarray(rows), own)
        writer.add_tensor(names.get_name(name, (".weight",)), packed, raw_dtype=own)
        back = package.quants.dequantize(packed, own)
        if "q_proj" in name or "k_proj" in name:
            back = back.reshape(heads, -1, 2, back.shape[1]).swapaxes(1, 2).reshape(back.shape)
        held[name] = torch.from_numpy(np.array(back))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "BF16", "F16", "F32"])
def test_the_folder_has_the_weights_of_the_file(kind, source, tmp_path):
    held = write(source, tmp_path / "tiny.gguf", TYPES[kind])
    folder = gguf.convert(tmp_path / "tiny.gguf", tmp_path / "tiny")
    dtype = torch.float32 if kind == "F32" else torch.bfloat16
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.") and "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in held.items():
        assert torch.equal(model.state_dict()[name], weight.to(dtype)), name
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    reference.load_state_dict(held, strict=False)
    ids = torch.arange(4, 68).reshape(2, 32)
    with torch.no_grad():
        ours, its = model.float()(ids).logits, reference(ids).logits
    assert torch.allclose(ours, its, atol=1e-5 if kind == "F32" else 0.02 * float(its.std()))


def test_the_tokenizer_ends_pads_and_cuts_digits(source, tmp_path):
    write(source, tmp_path / "tiny.gguf")
    tokenizer = AutoTokenizer.from_pretrained(gguf.convert(tmp_path / "tiny.gguf", tmp_path / "tiny"))
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|end|>", "<|pad|>", "<|user|>")
    assert tokenizer.padding_side == "left" and tokenizer.chat_template == tiny.TEMPLATE
    for name in ("config.json", "generation_config.json"):
        ids = json.loads((tmp_path / "tiny" / name).read_text())
        assert (ids["eos_token_id"], ids["pad_token_id"], ids["bos_token_id"]) == (1, 0, 2), name
    own = AutoTokenizer.from_pretrained(source)
    for text in (*tiny.CORPUS, "<|user|>1234.5 pens!<|end|>", " a  b\n\n\tc ü 日本 1٣½", ""):
        assert tokenizer.encode(text) == own.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode(i) for i in tokenizer.encode("1234")] == list("1234")


@pytest.mark.parametrize(("name", "pieces"), [
    ("smollm", ["a", "Ġ", "1", "2", "3", "4"]), ("gpt-2", ["a", "Ġ1234"]), ("qwen2", ["a", "Ġ", "1", "2", "3", "4"]),
    ("llama-bpe", ["a", "Ġ", "123", "4"]),
])  # fmt: skip
def test_texts_are_cut_as_llama_cpp_names_it(name, pieces):
    inner = gguf._byte_level({"tokens": ["a"], "merges": [], "pre": name})
    assert [piece for piece, _ in inner.pre_tokenizer.pre_tokenize_str("a 1234")] == pieces


def test_what_is_not_known_of_a_tokenizer_warns_and_what_is_not_there_stays_away(source, tmp_path):
    write(source, tmp_path / "tiny.gguf", template=None, pre="klingon", bos_token_id=None)
    with pytest.warns(UserWarning, match="tokenizer.ggml.pre is 'klingon'"):
        tokenizer = AutoTokenizer.from_pretrained(gguf.convert(tmp_path / "tiny.gguf", tmp_path / "tiny"))
    assert tokenizer.chat_template is None and tokenizer.bos_token is None


@pytest.mark.parametrize(("wrong", "words"), [
    ({"architecture": "klingon"}, "klingon"),
    ({"split.count": 3}, "split.count is 3: it is one of several files, join them"),
    ({"eos_token_id": None}, "tokenizer.ggml.eos_token_id"),
    ({"llama.rope.scaling.type": "yarn"}, "leaves out llama.rope.scaling.type"),
    ({"leave_out": ["model.layers.1.mlp.up_proj.weight"]}, "leaves out model.layers.1.mlp.up_proj.weight"),
])  # fmt: skip
def test_refused(wrong, words, source, tmp_path):
    write(source, tmp_path / "tiny.gguf", **wrong)
    with pytest.raises(ValueError, match="take the model in safetensors") as error:
        gguf.convert(tmp_path / "tiny.gguf", tmp_path / "tiny")
    assert words in str(error.value) and str(tmp_path / "tiny.gguf") in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.6, 0.99])
def test_a_file_that_was_cut_off_is_refused(share, source, tmp_path):
    write(source, tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="if it was cut off"):
        gguf.convert(tmp_path / "tiny.gguf", tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()


def test_load_model_takes_a_file_and_converts_it_once(source, tmp_path, monkeypatch):
    monkeypatch.setenv("RLNB_MODELS", str(tmp_path / "models"))
    write(source, tmp_path / "tiny.gguf")
    model, tokenizer = load_model(tmp_path / "tiny.gguf")
    assert model.dtype == torch.float32 and tokenizer.pad_token == "<|pad|>"
    first = resolve(tmp_path / "tiny.gguf")
    (folder,) = (tmp_path / "models").iterdir()
    assert first == str(folder) and folder.name.startswith("tiny-")
    monkeypatch.setattr(gguf, "convert", None)
    (tmp_path / "tiny.gguf").rename(tmp_path / "again.gguf")
    (tmp_path / "again.gguf").rename(tmp_path / "tiny.gguf")
    assert resolve(str(tmp_path / "tiny.gguf")) == first


def test_another_file_of_the_name_is_another_model(source, tmp_path, monkeypatch):
    monkeypatch.setenv("RLNB_MODELS", str(tmp_path / "models"))
    found = set()
    for kind in (TYPES.Q8_0, TYPES.Q4_1):
        write(source, tmp_path / "tiny.gguf", kind)
        found.add(resolve(tmp_path / "tiny.gguf"))
    assert len(found) == 2


def test_what_is_not_there_names_the_way(tmp_path, monkeypatch):
    monkeypatch.setenv("RLNB_MODELS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="python -m rlnb fetch smollm2-135m"):
        resolve("smollm2-135m")
    with pytest.raises(FileNotFoundError, match=r"no model 'some/file\.gguf'"):
        resolve("some/file.gguf")


def test_a_model_in_the_models_folder_is_found_by_name(source, tmp_path, monkeypatch):
    monkeypatch.setenv("RLNB_MODELS", str(source.parent))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(source.name) == str(source)


def test_without_the_package_the_way_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="python -m rlnb setup"):
        gguf.convert(tmp_path / "tiny.gguf", tmp_path / "tiny")
