"""A GGUF file, llama.cpp's format, as the folder that transformers, PEFT, Unsloth and vLLM read."""

import warnings
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig, PreTrainedTokenizerFast
from transformers import modeling_gguf_pytorch_utils as reading
from transformers.integrations.gguf import GGUF_ARCHS

from rlnb.files import replaced

FILES = ("*.json", "*.safetensors", "*.jinja")  # of the folder
PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")
CONTROL, USER_DEFINED = 3, 4  # the types of tokens that no merge makes
# How a byte-level tokenizer cuts a text before it merges, by llama.cpp's name: each digit alone, like GPT-2, or by the
# pattern below with this many digits in a piece.
EACH_DIGIT = ("smollm", "starcoder", "refact", "command-r")
LIKE_GPT2 = ("default", "gpt-2")
BY_PATTERN = {"qwen2": 1, "llama-bpe": 3}
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip


def convert(file: Path, folder: Path) -> Path:
    """Write the folder, whole or not at all, and return it. Raises ValueError for what transformers does not read.

    The weights are bfloat16: that loses little beside the 4 to 8 bits of a quantized file, and takes half of float32.
    A file of float32 alone stays float32. The chat template is kept as the file has it.
    """
    if not find_spec("gguf"):
        raise ImportError(f"{file} needs the package gguf, which is not installed: python -m rlnb setup brings it")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        about = {name: field.contents() for name, field in reader.fields.items()}
        if about.get("split.count", 1) > 1:
            way = "join them with llama.cpp's gguf-split --merge"
            raise ValueError(f"split.count is {about['split.count']}: it is one of several files, {way}")
        tokenizer = _tokenizer(file, about)
        model = _model(file, reader.tensors, about)
    except (ValueError, KeyError, IndexError, RuntimeError) as error:  # whatever the libraries say
        says = f"{type(error).__name__}: {error}. Copy it again if it was cut off, or take the model in safetensors"
        raise ValueError(f"{file} cannot be converted: {says}") from error
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.config.update(ids)
    model.generation_config = GenerationConfig(**ids)
    with replaced(folder, FILES) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    return folder


def _model(file: Path, tensors: list[Any], about: dict[str, Any]) -> Any:
    """The model, its weights unpacked: else it counts as quantized, and neither trains nor is saved."""
    whole = all(tensor.tensor_type.name == "F32" for tensor in tensors)
    model, found = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32 if whole else torch.bfloat16, output_loading_info=True,
    )  # fmt: skip
    architecture = about["general.architecture"]
    left = [*found["missing_keys"], *found["unexpected_keys"]]
    if architecture not in GGUF_ARCHS:  # the older of transformers' two readers passes over what it does not know
        processor = reading.TENSOR_PROCESSORS.get(architecture, reading.TensorProcessor)(model.config.to_dict())
        known = reading.get_gguf_hf_weights_map(model, processor)
        left += [tensor.name for tensor in tensors if tensor.name not in known]
        if about.get(f"{architecture}.rope.scaling.type", "none") != "none" and architecture != "gpt-oss":
            left.append(f"{architecture}.rope.scaling.type")
    if left:
        raise ValueError(f"transformers leaves out {left[0]}, so it would be another model")
    return model


def _tokenizer(file: Path, about: dict[str, Any]) -> PreTrainedTokenizerFast:
    """With the file's own begin, end and padding, which transformers' reader of GGUF mixes up."""
    about = {name.removeprefix("tokenizer.").removeprefix("ggml."): value for name, value in about.items()}
    if about["model"] == "gpt2":
        inner = _byte_level(about)
    else:
        inner = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).backend_tokenizer
    named = {}
    for ours, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token := about.get(f"{key}_token_id")) is not None:
            named[f"{ours}_token"] = about["tokens"][token]
    if "eos_token" not in named:
        raise ValueError("it has no tokenizer.ggml.eos_token_id, so no answer would end")
    if named.get("pad_token") in (None, named["eos_token"]):
        named["pad_token"] = spare_padding(about["tokens"], named["eos_token"])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, chat_template=about.get("chat_template"), padding_side="left", **named,
        add_bos_token=about.get("add_bos_token", about["model"] == "llama"), clean_up_tokenization_spaces=False,
        model_max_length=about[f"{about['general.architecture']}.context_length"],
    )  # fmt: skip


def spare_padding(tokens: Collection[str], end: str) -> str | None:
    """A token to pad with that is not the end, up to which lengths are counted; None if there is none."""
    return next((token for token in PAD_TOKENS if token in tokens and token != end), None)


def _byte_level(about: dict[str, Any]) -> Tokenizer:
    tokens, name = about["tokens"], about.get("pre", "default")
    merges = [tuple(merge.split(" ")) for merge in about["merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    inner = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name == "llama-bpe"))
    if name not in (*EACH_DIGIT, *LIKE_GPT2, *BY_PATTERN):
        warnings.warn(f"tokenizer.ggml.pre is {name!r}, which is not known here: texts are cut like GPT-2's, "
                      "and may become other tokens than the model has learnt", stacklevel=4)  # fmt: skip
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name not in BY_PATTERN)]
    if name in EACH_DIGIT:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif name in BY_PATTERN:
        steps.insert(0, pre_tokenizers.Split(Regex(PATTERN % BY_PATTERN[name]), "isolated"))
    if name == "qwen2":
        inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    for kind in (CONTROL, USER_DEFINED):
        added = [token for token, its in zip(tokens, about.get("token_type", ()), strict=False) if its == kind]
        inner.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL) for token in added])
    return inner
