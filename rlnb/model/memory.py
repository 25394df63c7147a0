"""What training with LoRA costs in memory: predicted from a model's config alone, then measured.

MB is 2**20 bytes, as in the registry of runs. The GPU part is untested on a GPU until tests/gpu has
run on one.
"""

import contextlib
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlnb import machine
from rlnb.model import attention
from rlnb.model.folders import resolve
from rlnb.model.lora import LoRA, skeleton, target_layers, vllm_rank, whole

MB = 2**20
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
Layers = Mapping[str, tuple[int, int]]  # name -> (inputs, outputs), as lora.target_layers


@dataclass(frozen=True)
class Prediction:
    """Bytes, but for the first two. Exact are parameters, trainable, adapter_file and vllm; the
    rest is what training holds at its peak, at the start of the backward pass.
    """

    parameters: int  # with the adapter's
    trainable: int
    adapter_file: int  # adapter_model.safetensors, whole
    weights: int
    gradients: int
    optimizer: int
    activations: int  # what the forward pass keeps for the backward pass
    logits: int  # float32 logits, log-softmax and gradient; with autocast 16-bit ones as well
    vllm: int  # set aside for adapters when the engine starts, whatever the adapter's rank
    vllm_short: int  # the formula that circulates, which is right for square layers only

    @property
    def peak(self) -> int:
        """What training needs in all, without vLLM."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations", "logits", "peak")
        lines = [f"{self.parameters:,} parameters, {self.trainable:,} train"]
        lines += [f"  {part:12}{getattr(self, part) / MB:10.1f} MB" for part in parts]
        lines += [f"adapter file {self.adapter_file:,} bytes"]
        lines += [f"vLLM {self.vllm / MB:.1f} MB (short formula {self.vllm_short / MB:.1f} MB)"]
        return "\n".join(lines)


def predict(
    model: str | os.PathLike[str] | Any,
    lora: LoRA | None = None,
    *,
    batch: int,
    length: int,
    dtype: str = "float32",
    autocast: bool = True,
    checkpointing: bool = False,
    max_lora_rank: int = 64,
    fused: bool | None = None,
) -> Prediction:
    """The memory that training takes, for a decoder of Llama's kind. No weights are read.

    model: as ``load_model`` takes it, or a config of transformers. lora: None is full fine-tuning.
    batch: sequences per forward pass, of `length` tokens each, prompt and padding included.
    dtype: of the weights. autocast: matrix products in bfloat16, as the recipes train (bf16=True).
    checkpointing: keep each layer's input alone, and compute the rest again in the backward pass.
    max_lora_rank: for vLLM, which takes the next of its own ranks.
    fused: attention that keeps no weights; default: on a GPU, and where rlnb.model.attention is.

    The optimizer is torch's Adam: two numbers for each trainable parameter, in its type.
    Raises ValueError for a value out of range and for a config of no causal LM.
    """
    whole("batch", batch)
    whole("length", length)
    if dtype not in BYTES:
        raise ValueError(f"dtype is {dtype!r}: it must be one of {', '.join(BYTES)}")
    config, bones = _read(model)
    total = sum(parameter.numel() for parameter in bones.parameters())  # tied ones count once
    layers = {} if lora is None else target_layers(bones, lora.targets)
    added = lora_parameters(layers, lora.rank) if lora else 0
    trainable = added if lora else total
    # PEFT keeps the adapter in float32, whatever the weights are.
    each = 4 if lora else BYTES[dtype]
    engine = target_layers(bones, "all-linear")
    autocast = autocast and dtype == "float32"
    casts = 2 * sum(a * b for a, b in engine.values()) if autocast else 0
    tokens, rank = batch * length, lora.rank if lora else 0
    heads = getattr(config, "num_attention_heads", 0)
    if fused is None:
        import torch

        low = autocast or dtype != "float32"
        plain = attention.is_plain(batch, heads, length, length, low)
        fused = torch.cuda.is_available() or not plain
    kept = activations(config, rank * len(layers), autocast, checkpointing) * BYTES[dtype] // 4
    if not fused:  # the softmax in float32, and in 16 bits
        kept += (1 if checkpointing else config.num_hidden_layers) * heads * length * 6
    return Prediction(
        parameters=total + added,
        trainable=trainable,
        adapter_file=adapter_file_bytes(layers, lora.rank) if lora else 0,
        weights=total * BYTES[dtype] + added * 4 + casts,
        gradients=trainable * each,
        optimizer=trainable * each * 2,
        activations=tokens * kept,
        logits=tokens * config.vocab_size * (16 if autocast else 12),
        vllm=vllm_bytes(engine, max_lora_rank),
        vllm_short=vllm_bytes_short(config, len(engine), max_lora_rank),
    )


def lora_parameters(layers: Layers, rank: int) -> int:
    """rank x (inputs + outputs), summed over the target layers: A is (rank, in), B is (out, rank)."""
    return rank * sum(inputs + outputs for inputs, outputs in layers.values())


def adapter_file_bytes(layers: Layers, rank: int) -> int:
    """The size of PEFT's adapter_model.safetensors in float32, to the byte.

    A safetensors file is the length of its header in 8 bytes, the header, a JSON that is filled up
    with spaces to a multiple of 8, and the numbers.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    shapes = {}
    for name, (inputs, outputs) in layers.items():
        shapes[f"base_model.model.{name}.lora_A.weight"] = [rank, inputs]
        shapes[f"base_model.model.{name}.lora_B.weight"] = [outputs, rank]
    for name, (rows, columns) in sorted(shapes.items()):
        start, end = end, end + 4 * rows * columns
        header[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + end


def vllm_bytes(layers: Layers, max_lora_rank: int, adapters: int = 1, each: int = 2) -> int:
    """What vLLM sets aside for adapters: adapters x r_max x sum of (in + out) x bytes.

    For every linear layer it knows, whether or not the adapter is on it, and for r_max even if the
    adapter's rank is 1. On one device; the memory is taken from the KV cache.
    """
    return adapters * each * lora_parameters(layers, vllm_rank(max_lora_rank))


def vllm_bytes_short(config: Any, modules: int, max_lora_rank: int, each: int = 2) -> int:
    """2 x r_max x hidden size x bytes for each module: right only where every layer is square."""
    return 2 * vllm_rank(max_lora_rank) * config.hidden_size * modules * each


def activations(config: Any, ranks: int, autocast: bool, checkpointing: bool = False) -> int:
    """Bytes per token that the forward pass keeps for the backward pass, without the logits.

    A layer of width d, with q and k wide queries and keys and i in its MLP, keeps in float32:
    5 d (the inputs of both norms and what goes into q_proj, o_proj and gate_proj), q + 2 k
    (attention), 4 i (gate, its SiLU, up, their product). Each adapter keeps the r numbers of A x.
    With autocast all but the norms' inputs has 2 bytes, but each layer makes its own copy of what
    it reads in float32: 6 d instead of 3. ranks: the sum of the ranks of all adapted layers.
    """
    d, i, n = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or d // config.num_attention_heads
    q, k = head * config.num_attention_heads, head * config.num_key_value_heads
    if autocast:
        layer, each = 4 * 2 * d + 2 * (6 * d + q + 2 * k + 4 * i), 2
    else:
        layer, each = 4 * (5 * d + q + 2 * k + 4 * i), 4
    if checkpointing:  # every layer's input, and everything of the one that is at work
        return n * 4 * d + layer + each * ranks // n
    return n * layer + each * ranks


def _read(model: Any) -> tuple[Any, Any]:
    """The config and the skeleton of a model."""
    if isinstance(model, str | os.PathLike):
        from transformers import AutoConfig

        model = AutoConfig.from_pretrained(resolve(model))
    bones = skeleton(model)
    if bones is None:
        raise ValueError(f"{type(model).__name__} is the config of no causal LM of transformers")
    return model, bones


# --- measured ------------------------------------------------------------------------------------


@dataclass
class Measured:
    """Bytes, once `measured` is left: how much the process grew to at its peak (None but on Linux),
    and by how much torch's allocator on a GPU did (None without one).
    """

    ram: int | None = None
    gpu: int | None = None


@contextlib.contextmanager
def measured() -> Iterator[Measured]:
    """Measures the peak of what runs inside. Import and warm up first: imports take memory too.

    with memory.measured() as found:
        trainer.train()
    found.ram, found.gpu
    """
    found = Measured()
    gc.collect()
    machine.trim()  # else freed memory is used again, and nothing grows
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    on_gpu = cuda is not None and cuda.is_initialized()
    machine.reset_peak_memory()
    before, gpu = _status(), cuda.memory_allocated() if on_gpu else 0
    try:
        yield found
    finally:
        if after := _status():
            # Pages of files, a library's code above all, come and go: they are not counted.
            found.ram = after["VmHWM"] - after["RssFile"] - before["RssAnon"]
        if cuda is not None and cuda.is_initialized():
            found.gpu = cuda.max_memory_allocated() - gpu


def _status() -> dict[str, int]:
    """Memory of this process in bytes, {} where there is no such file. VmHWM is the peak.

    getrusage's peak is none of use: it outlives the reset and exec, so that a child would start
    with that of its parent, a large notebook kernel for one.
    """
    names = "VmHWM", "RssAnon", "RssFile"
    with contextlib.suppress(OSError):
        text = Path("/proc/self/status").read_text(encoding="ascii")
        found = re.findall(rf"({'|'.join(names)}):\s+(\d+) kB", text)
        return {name: 1024 * int(kib) for name, kib in found} if len(found) == 3 else {}
    return {}


def try_out(
    name: str | os.PathLike[str] = "abacus-3m",
    lora: LoRA | None = None,
    *,
    batch: int = 16,
    length: int = 128,
    autocast: bool = True,
    steps: int = 3,
) -> tuple[Prediction, Measured]:
    """Train on random tokens for a few steps, and return what was predicted and what it took.

    In a process of its own, since memory that this one holds already would be used again. There
    glibc is told to give large blocks back at once: by itself it keeps much of what is freed, and
    holds about twice what is in use. RuntimeError with the process's last words if it fails.
    """
    settings = {"name": str(name), "lora": lora and asdict(lora), "batch": batch, "length": length,
                "autocast": autocast, "steps": steps}  # fmt: skip
    predicted = predict(name, lora, batch=batch, length=length, autocast=autocast)
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "PYTHONPATH": os.pathsep.join(paths)}
    code = "import sys; from rlnb.model import memory; memory._try_out(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(settings)],
        capture_output=True, text=True, env=os.environ | own,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the training to measure failed: {done.stderr[-2000:]}")
    return predicted, Measured(**json.loads(done.stdout.splitlines()[-1]))


def _try_out(settings: str) -> None:
    """The child's side of `try_out`: prints what it measured as JSON."""
    from rlnb.model import load as models

    models.backend()
    import torch

    s = json.loads(settings)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lora = LoRA(**s["lora"]) if s["lora"] else None

    def train(batch: int, length: int) -> None:
        model, _ = models.load_model(s["name"], lora, dtype="float32", max_lora_rank=512)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        ids = torch.randint(model.config.vocab_size, (batch, length), device=device)
        for _ in range(s["steps"]):
            with torch.autocast(device, torch.bfloat16, enabled=s["autocast"]):
                loss = model.train()(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    train(1, 2)  # what is imported and compiled at first use stays, whatever is trained
    with measured() as found:
        train(s["batch"], s["length"])
    print(json.dumps(asdict(found)))
