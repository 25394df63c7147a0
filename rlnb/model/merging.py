"""Is the merged model the same model? Its weights, its logits and its greedy text say so."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlnb import files
from rlnb.model import adapters, load as models, sampling

if TYPE_CHECKING:
    import torch

SIGNIFICANT_BITS = {"float32": 24, "float16": 11, "bfloat16": 8}
# The probe rounds weights alone. Where activations are rounded too, up to 2.8 times as much was seen.
MARGIN = 6
UNDECIDED = 0.5  # nats: the second token has over 60 % of the first one's probability


@dataclass(frozen=True)
class Check:
    """How far a merged model is from base + adapter, over the tokens of its own greedy answers.

    difference: root mean square, over all logits. tolerance: MARGIN times what rounding to this type
    does to the same logits, see ``rounding``. same: in how many of `texts` answers base + adapter
    picks the very same tokens. gap: where the others part, how much surer it is of its own token, in
    nats; the largest.
    """

    dtype: str
    difference: float
    tolerance: float
    same: int
    texts: int
    gap: float = 0.0

    @property
    def ok(self) -> bool:
        """Logits within the tolerance, and in float32 the same texts. In 16 bits a text may part
        where base + adapter is undecided itself: rounding then decides.
        """
        allowed = 0.0 if self.dtype == "float32" else UNDECIDED
        return self.difference <= self.tolerance and self.gap <= allowed

    def __str__(self) -> str:
        parted = f", the rest part at {self.gap:.2g} nats" if self.same < self.texts else ""
        return (
            f"{self.dtype}: logits differ by {self.difference:.2g} (rounding explains "
            f"{self.tolerance:.2g}), same greedy text on {self.same} of {self.texts} prompts{parted}"
        )


@contextmanager
def rounding(model: Any, dtype: str) -> Iterator[None]:
    """Inside, every matrix has a random error as large as rounding to this type makes it: up to
    2**-bits of each weight. Afterwards the weights are as before, bit for bit.

    How much the logits move is what rounding does to this very model: a trained one can amplify it
    a hundredfold, so that no formula of its depth and width is of use.
    """
    import torch

    unit, kept = 2.0 ** -SIGNIFICANT_BITS[dtype], []
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() > 1 and ".lora_" not in name:
                    kept.append((weight, weight.detach().clone()))
                    error = 2 * torch.rand(weight.shape, generator=generator) - 1
                    weight.mul_(1 + unit * error.to(weight.device))
        yield
    finally:
        with torch.no_grad():
            for weight, before in kept:
                weight.copy_(before)


def check_merge(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[sampling.Prompt],
    *,
    dtype: str = "bfloat16",
    max_new_tokens: int = 64,
) -> list[Check]:
    """Compare the merged model with base + adapter, on logits and greedy text.

    Twice: merged in place, in the type that the weights have (float32 on a CPU), and written to
    disk in a 16-bit type and loaded again, as `export_merged` does. Prompts as `sample` takes them.
    """
    with tempfile.TemporaryDirectory() as folder:
        in_place = check_in_place(model, tokenizer, prompts, max_new_tokens)
        write_merged(model, tokenizer, Path(folder), dtype)
        return [in_place, check_folder(model, Path(folder), prompts, dtype, max_new_tokens)]


def check_in_place(model: Any, tokenizer: Any, prompts: Any, max_new: int) -> Check:
    with adapters.merged(model):
        rows = _greedy(model, tokenizer, prompts, max_new)
        found = _logits(model, rows)
    own = str(next(model.parameters()).dtype).removeprefix("torch.")
    return _compare(model, rows, found, own)


def check_folder(model: Any, folder: Path, prompts: Any, dtype: str, max_new: int) -> Check:
    # A CPU does not compute in float16; float32 holds the same weights.
    kind = "float32" if (dtype, model.device.type) == ("float16", "cpu") else dtype
    with models.quiet(bars=False):
        shipped, tokenizer = models.load_model(folder, dtype=kind)
    _check_weights(model, shipped, dtype)
    rows = _greedy(shipped, tokenizer, prompts, max_new)
    return _compare(model, rows, _logits(shipped, rows), dtype)


def _check_weights(model: Any, shipped: Any, dtype: str) -> None:
    """Raise RuntimeError unless each weight on disk is W + s B A, rounded once: to the bit."""
    import torch

    found = dict(shipped.named_parameters())
    for name, layer in adapters.lora_layers(model.get_base_model()).items():
        weight = layer.get_base_layer().weight.detach().float()
        for one in set(layer.active_adapters) & layer.lora_A.keys():
            update = layer.lora_B[one].weight.detach().float() @ layer.lora_A[one].weight.float()
            update = update.T if layer.fan_in_fan_out else update
            weight = weight + layer.scaling[one] * update
        written = found[f"{name}.weight"]
        if not torch.equal(weight.to(getattr(torch, dtype)).to(written.dtype), written):
            raise RuntimeError(f"nothing is saved: {name}.weight is not W + s B A")


def _compare(model: Any, rows: list, found: "torch.Tensor", dtype: str) -> Check:
    """found: (N, vocabulary), the merged model's logits at the N tokens of its answers."""
    expected = _logits(model, rows)
    with rounding(model, dtype):
        probe = _logits(model, rows)
    answers = [answer for _, answer in rows]
    each = expected.split([len(answer) for answer in answers])
    gaps = [_gap(logits, answer) for logits, answer in zip(each, answers, strict=True)]
    return Check(
        dtype, _rms(found - expected), MARGIN * _rms(probe - expected),
        same=gaps.count(0.0), texts=len(rows), gap=max(gaps),
    )  # fmt: skip


def _gap(logits: "torch.Tensor", answer: list[int]) -> float:
    """By how many nats the first token is preferred that differs from the answer's; 0 if none is."""
    for position, token in zip(logits, answer, strict=True):
        if position.argmax() != token:
            return float(position.max() - position[token])
    return 0.0


def _rms(difference: "torch.Tensor") -> float:
    return float(difference.square().mean().sqrt())


def _greedy(model: Any, tokenizer: Any, prompts: Any, max_new: int) -> list[tuple[list, list]]:
    """The token ids of each prompt and of its greedy answer."""
    answers = sampling.sample(
        model, tokenizer, prompts, max_new_tokens=max_new, temperature=0, progress=False
    )
    return list(
        zip(sampling.tokenize(tokenizer, prompts), (ids for [ids] in answers.ids), strict=True)
    )


def _logits(model: Any, rows: list[tuple[list, list]]) -> "torch.Tensor":
    """(N, vocabulary) float32 logits that predict the N tokens of the answers, in their order.

    The inner model runs: a trainer may have left its autocast on the outer one.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    modes = [(module, module.training) for module in inner.modules()]
    ids = pad_sequence([torch.tensor(p + a) for p, a in rows], batch_first=True)  # on the right
    try:
        with torch.no_grad():
            logits = inner.eval()(input_ids=ids.to(inner.device)).logits.float().cpu()
    finally:
        for module, training in modes:
            module.training = training
    cuts = [slice(len(prompt) - 1, len(prompt) + len(answer) - 1) for prompt, answer in rows]
    return torch.cat([row[cut] for row, cut in zip(logits, cuts, strict=True)])


def write_merged(model: Any, tokenizer: Any, folder: Path, dtype: str) -> None:
    """The merged weights in this type, config and tokenizer."""
    import torch

    with adapters.merged(model), models.quiet(bars=False):
        base, state, cast = model.get_base_model(), {}, {}
        for name, tensor in base.state_dict().items():
            if ".lora_" not in name:
                kind = getattr(torch, dtype) if tensor.is_floating_point() else tensor.dtype
                # Tied weights stay one tensor, so that transformers writes them once.
                one = cast.setdefault(tensor.data_ptr(), tensor.to(kind))
                state[name.replace(".base_layer", "")] = one
        # The class's own method: Unsloth puts another on the instance.
        type(base).save_pretrained(base, folder, state_dict=state, max_shard_size="5GB")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = dtype
    files.write(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(folder)
