"""rlnb.model.lora: the rank rules on a table, targets, inits, RLinf's keys. No weights are read."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from rlnb.model import lora
from rlnb.model.lora import ALL_LINEAR, ATTENTION, MLP, LoRA

# rank -> the least that vLLM can set aside for it; None: vLLM has no such rank.
TABLE = {1: 1, 2: 8, 3: 8, 4: 8, 7: 8, 8: 8, 16: 16, 32: 32, 64: 64, 128: 128, 256: 256, 320: 320,
         512: 512, 513: None}  # fmt: skip


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory):
    """The skeleton of the tiny model: 2 layers, hidden 64, MLP 96, q and k 128 and 64 wide."""
    folder = tiny.make(tmp_path_factory.mktemp("models") / "tiny")
    return lora.skeleton(AutoConfig.from_pretrained(folder))


# --- ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", TABLE)
def test_the_rank_fits_or_the_error_has_both_numbers_and_both_ways_out(rank):
    allowed = []
    for largest in range(1, 513):
        if rank <= largest:
            lora.check_rank(rank, largest)
            allowed.append(lora.vllm_rank(largest))
            continue
        with pytest.raises(ValueError) as error:
            lora.check_rank(rank, largest)
        assert str(error.value) == (
            f"LoRA rank {rank} is above max_lora_rank {largest}: lower the rank, or pass "
            f"max_lora_rank={rank} to load_model, which costs memory for rollouts with vLLM"
        )
    assert min(allowed, default=None) == TABLE[rank]


def test_vllm_rounds_up_and_has_a_limit():
    for largest in range(1, 513):
        served = lora.vllm_rank(largest)
        assert served >= largest
        assert served in lora.VLLM_RANKS
        assert not [rank for rank in lora.VLLM_RANKS if largest <= rank < served]
    with pytest.raises(ValueError, match="max_lora_rank 513 is above 512, the most that vLLM"):
        lora.vllm_rank(513)


@pytest.mark.parametrize("value", [0, -1, 2.0, "8", True, None])
def test_a_rank_is_a_whole_number(value):
    calls = [
        lambda: LoRA(rank=value),
        lambda: lora.check_rank(value, 64),
        lambda: lora.check_rank(8, value),
        lambda: lora.from_rlinf({"is_lora": True, "lora_rank": value}),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"is {value!r}: it must be a whole number"):
            call()


def test_a_rank_above_the_smallest_width_is_useless():
    lora.check_rank(128, 512, smallest_width=128)
    with pytest.raises(ValueError, match="rank 129 is above 128, the smallest width"):
        lora.check_rank(129, 512, smallest_width=128)


def test_an_update_has_no_more_rank_than_the_smallest_width():
    product = torch.randn(5, 40) @ torch.randn(40, 30)  # rank 40 asked for, 5 outputs
    assert torch.linalg.matrix_rank(product) == 5
    assert lora.smallest_width({"a": (30, 5), "b": (8, 9)}) == 5


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"alpha": 0}, "alpha is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"targets": ()}, r'targets is \(\): it takes .* targets "all-linear" or names'),
        ({"targets": "q_proj"}, "targets is 'q_proj'"),
        ({"init": "normal"}, "init is 'normal': it takes .*init one of default, gaussian"),
        ({"init": "pissa"}, "LoRA init is 'pissa', which rewrites the base's weights"),
    ],
)
def test_a_lora_that_cannot_work(fields, says):
    with pytest.raises(ValueError, match=says):
        LoRA(**fields)


def test_a_list_of_targets_becomes_a_tuple():
    assert LoRA(targets=["q_proj"]).targets == ("q_proj",)
    assert LoRA(targets="all-linear").targets == "all-linear"


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_inits_that_rewrite_the_base_are_refused_with_the_reason(init):
    with pytest.raises(ValueError, match=f"'{init}', which rewrites .* off the model is no longer"):
        lora.check_init(init)


@pytest.mark.parametrize("init", [True, False, None, "default", "gaussian", "orthogonal", "eva"])
def test_inits_that_leave_the_base_alone_pass(init):
    lora.check_init(init)


# --- targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [ALL_LINEAR, ATTENTION, MLP, ("k_proj",), "all-linear"])
def test_the_layers_are_those_that_peft_adapts(skeleton, targets):
    found = lora.target_layers(skeleton, targets)
    names = targets if isinstance(targets, str) else list(targets)
    with torch.device("meta"):
        model = get_peft_model(lora.skeleton(skeleton.config), LoraConfig(r=3, target_modules=names))
    theirs = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default"): module
        for name, module in model.named_modules()
        if name.endswith("lora_A.default")
    }
    assert found.keys() == theirs.keys()
    assert all(module.in_features == found[name][0] for name, module in theirs.items())
    assert lora.target_layers(skeleton, r"model\.layers\.1\..*(q|v)_proj").keys() == {
        "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj",
    }  # fmt: skip


@pytest.mark.parametrize("targets", [["q_proj", "w_q", "w_k"], ["embed_tokens"], "no such .*"])
def test_an_unknown_layer_is_named_beside_those_there_are(skeleton, targets):
    unknown = [targets] if isinstance(targets, str) else [t for t in targets if t != "q_proj"]
    with pytest.raises(ValueError) as error:
        lora.target_layers(skeleton, targets)
    way_out = ", and text is a regular expression: give names in a list" if isinstance(targets, str) else ""
    assert str(error.value) == (
        f"the model has no linear layer {', '.join(unknown)} for LoRA: its layers are "
        f"q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj{way_out}"
    )


def test_the_output_layer_is_refused_with_the_reason(skeleton):
    with pytest.raises(ValueError, match="lm_head is refused: TRL computes log-probabilities"):
        lora.target_layers(skeleton, ("q_proj", "lm_head"))


# --- RLinf's keys --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"is_lora": False}, None),
        ({"is_lora": False, "lora_rank": 32, "lora_path": None}, None),
        ({"is_lora": False, "lora_path": "runs/sft"}, None),
        ({"is_lora": True, "lora_rank": 8}, LoRA(rank=8, alpha=8, init="gaussian")),
        ({"is_lora": True, "lora_rank": 8, "lora_path": None}, LoRA(rank=8, alpha=8, init="gaussian")),
        ({"is_lora": True, "lora_path": "runs/sft"}, "runs/sft"),
        ({"is_lora": True, "lora_rank": 8, "lora_path": "runs/sft"}, "runs/sft"),
    ],
)
def test_rlinfs_keys_are_read(keys, expected):
    assert lora.from_rlinf(keys) == expected


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, "is_lora is None: it must be true or false"),
        ({"is_lora": "yes"}, "is_lora is 'yes': it must be true or false"),
        ({"is_lora": True}, "lora_rank is None: it must be a whole number"),
        ({"is_lora": True, "lora_rank": "16"}, "lora_rank is '16': it must be a whole number"),
    ],
)
def test_rlinfs_keys_that_make_no_sense(keys, says):
    with pytest.raises(ValueError, match=says):
        lora.from_rlinf(keys)


def test_a_rank_that_one_layer_alone_has_counts():
    """PEFT's rank_pattern: the engine has to hold the largest."""
    from peft import LoraConfig

    assert lora.largest_rank(LoraConfig(r=8)) == 8
    assert lora.largest_rank(LoraConfig(r=8, rank_pattern={"q_proj": 128})) == 128
