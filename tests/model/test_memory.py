"""rlnb.model.memory: what is said to be exact is compared; tests/benchmarks/memory.py measures the peak of a
training, which no unit test should depend on.
"""


import pytest
import tiny
import torch

from rlnb.model import memory
from rlnb.model.folders import save_adapter
from rlnb.model.load import load_model, trainable
from rlnb.model.lora import ALL_LINEAR, ATTENTION, MLP, LoRA
from rlnb.tools.setup import ROOT


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def practice(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("models") / "practice", **tiny.PRACTICE)


def llama_8b():
    """Llama-3.1-8B."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip


@pytest.mark.parametrize("targets", [ALL_LINEAR, ATTENTION, MLP, ["k_proj"], "all-linear"])
@pytest.mark.parametrize("rank", [1, 7, 64])
def test_parameters_are_exact_and_the_adapter_file_is_but_for_its_header(base, tmp_path, rank, targets):
    config = LoRA(rank=rank, targets=targets)
    predicted = memory.predict(base, config, batch=1, length=1)
    model, _ = load_model(base, config)
    assert (predicted.trainable, predicted.parameters) == trainable(model)
    folder = save_adapter(model, tmp_path / "adapter")
    header = (folder / "adapter_model.safetensors").stat().st_size - predicted.adapter_file
    assert 0 < header < 6000


def test_the_practice_model_is_predicted_from_its_config_alone(tmp_path):
    """Without weights there is nothing to read but the config."""
    source = ROOT / "data" / "abacus-3m"
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_text("nobody can load this")
    predicted = memory.predict(tmp_path, LoRA(), batch=16, length=128)
    assert predicted.trainable == 299_008
    model, _ = load_model("abacus-3m", LoRA())
    assert (predicted.trainable, predicted.parameters) == trainable(model)


def test_full_fine_tuning_trains_everything_and_writes_no_adapter(base):
    predicted = memory.predict(base, batch=1, length=1)
    model, _ = load_model(base)
    assert (predicted.trainable, predicted.parameters) == trainable(model)
    assert predicted.adapter_file == 0
    assert predicted.gradients == 4 * predicted.trainable


def test_gradients_and_optimizer_state_are_what_torch_holds(base):
    predicted = memory.predict(base, LoRA(rank=4), batch=2, length=8)
    model, _ = load_model(base, LoRA(rank=4))
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trains)
    model(input_ids=torch.ones(2, 8, dtype=torch.long)).logits.sum().backward()
    assert predicted.gradients == sum(p.grad.nbytes for p in trains)
    optimizer.step()
    held = [v for state in optimizer.state.values() for v in state.values() if v.dim()]
    assert predicted.optimizer == sum(value.nbytes for value in held)


def saved_for_backward(model, ids, autocast):
    """Bytes that autograd keeps, weights and their 16-bit copies left out."""
    weights = {p.shape for p in model.parameters()} | {p.shape[::-1] for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.shape not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model.train()(input_ids=ids, labels=ids)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rank", [4, 64])
def test_activations_are_what_autograd_keeps(practice, rank, autocast):
    model, _ = load_model(practice, LoRA(rank=rank))
    ids = torch.arange(2 * 96).reshape(2, 96) % 300
    found = saved_for_backward(model, ids, autocast)
    predicted = memory.predict(practice, LoRA(rank=rank), batch=2, length=96, autocast=autocast)
    log_softmax = 2 * 96 * model.config.vocab_size * 4
    assert predicted.activations + log_softmax == pytest.approx(found, rel=0.03)


def test_checkpointing_keeps_less():
    config = llama_8b()
    full, less = (
        memory.predict(config, LoRA(), batch=4, length=1024, checkpointing=on).activations
        for on in (False, True)
    )
    assert less < full / 8


def test_vllm_sets_aside_more_than_the_short_formula_says():
    """The figures of rlnb's notes on Llama-3.1-8B: 335.5 and 234.9 million bytes at rank 64."""
    config = llama_8b()
    predicted = memory.predict(config, LoRA(rank=1), batch=1, length=1, max_lora_rank=64)
    assert predicted.vllm == 335_544_320
    assert predicted.trainable == 1_769_472 + 851_968
    attention = memory.predict(config, LoRA(rank=64, targets=ATTENTION), batch=1, length=1)
    assert attention.vllm == predicted.vllm
    rounded = memory.predict(config, LoRA(rank=1), batch=1, length=1, max_lora_rank=65)
    assert rounded.vllm == 2 * predicted.vllm


def test_the_peak_is_the_sum_of_its_parts(practice):
    predicted = memory.predict(practice, LoRA(), batch=16, length=128)
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    assert predicted.peak == sum(getattr(predicted, part) for part in parts)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dtype": "int4"}, "dtype is 'int4': it must be one of float32, bfloat16, float16"),
        ({"lora": LoRA(targets=["w1"])}, "no linear layer w1"),
        ({"max_lora_rank": 513}, "max_lora_rank 513 is above 512"),
    ],
)
def test_what_cannot_be_predicted(base, settings, says):
    with pytest.raises(ValueError, match=says):
        memory.predict(base, **{"batch": 1, "length": 1} | settings)


def test_a_config_of_no_causal_lm():
    from transformers import ViTConfig

    with pytest.raises(ValueError, match="ViTConfig"):
        memory.predict(ViTConfig(), batch=1, length=1)
