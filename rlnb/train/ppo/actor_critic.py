"""Policy, critic and reference on one frozen base: what PPO runs forward.

The base is in memory once. The policy is the adapter "default"; the reference a frozen copy of the adapter
as the policy started; the critic a head on the policy's last hidden state. A reward model may be one more
adapter (reward.py).
"""

import copy
from typing import Any

from rlnb.model import adapters

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.utils import checkpoint as checkpointing

POLICY, REFERENCE = "default", "ref"  # names of adapters
LOGITS_AT_ONCE = 2**25  # numbers: 128 MiB in float32


class ActorCritic(nn.Module):
    """What PPO trains: a causal language model with LoRA as the policy, and the value of each state.

    A linear head on the policy's own last hidden state gives the value, so that one forward pass serves
    both and the value's gradient reaches the policy's adapter. The head is float32 whatever the model is,
    and starts at zero: V = 0, and no gradient from it reaches the trunk before it has learnt something.
    Logits are divided by the policy's temperature everywhere.
    """

    def __init__(self, model: Any, temperature: float = 1.0):
        super().__init__()
        self.model, self.temperature = model, temperature
        width = model.config.get_text_config().hidden_size
        self.value_head = nn.Linear(width, 1, dtype=torch.float32, device=model.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.plain_head = _head_is_plain(model.get_base_model())

    def forward(self, ids_BL: Tensor, predicts_BL: Tensor, entropy: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability, entropy (if asked for) and value of each of N completion tokens, as (N,).

        ids_BL: prompt and completion padded on the right, where causal attention never looks, so that
            padding needs no mask and changes nothing.
        predicts_BL: True at each position whose next token is of the completion: the state in which that was
            chosen. N tokens are in the order of x_BL[predicts_BL].
        """
        states = predicts_BL.flatten().nonzero()[:, 0]  # index_select is faster than a mask backwards
        target_N = ids_BL.roll(-1, 1).flatten()[states]
        lm = self.model.get_base_model()
        if self.plain_head:  # logits of completion tokens alone, from the output layer
            head = lm.get_output_embeddings()
            hidden = lm.get_decoder()(input_ids=ids_BL, use_cache=False).last_hidden_state
            x = hidden = hidden.flatten(0, 1).index_select(0, states)
        else:
            out, head = lm(input_ids=ids_BL, use_cache=False, output_hidden_states=True), None
            hidden, x = (y.flatten(0, 1)[states] for y in (out.hidden_states[-1], out.logits))
        found = token_statistics(x, head, target_N, self.temperature, entropy)
        return *found, linear(self.value_head, hidden)[:, 0]


def token_statistics(
    x: Tensor, head: nn.Module | None, target_N: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor]:
    """(N,) log-probabilities of the targets and, if asked for, else zeros, (N,) entropies.

    x: (N, width) hidden states for the output layer `head`; with None (N, vocabulary) logits. The float32
    logits of a large vocabulary are computed a piece at a time, and again in the backward pass.
    """

    def piece(x: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        logits = x if head is None else linear(head, x)
        logits = (logits.float() if logits.dtype.itemsize < 4 else logits) / temperature
        log_p = logits.log_softmax(-1)
        chosen_N = log_p.gather(-1, target_N[:, None])[:, 0]
        if not entropy:
            return chosen_N, torch.zeros_like(chosen_N)
        return chosen_N, -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1)  # 0 x -inf is NaN

    size = max(1, LOGITS_AT_ONCE // (x.shape[-1] if head is None else head.weight.shape[0]))
    if len(target_N) <= size:
        found = [piece(x, target_N)]
    else:  # on a GPU Unsloth puts a function in checkpoint's place that has no use_reentrant=False
        checkpoint = getattr(checkpointing, "_unsloth_pristine_checkpoint", None) or checkpointing.checkpoint
        pieces = zip(x.split(size), target_N.split(size), strict=True)
        found = [checkpoint(piece, *each, use_reentrant=False) for each in pieces]
    return tuple(torch.cat(column) for column in zip(*found, strict=True))


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer in the precision of its weights, whatever autocast says."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(layer.weight.dtype))


def _head_is_plain(lm: Any) -> bool:
    """Whether logits are the output layer of the last hidden state and nothing else. Some models scale or cap them
    (Gemma 2, Cohere, Granite), so a glance at one short input decides.
    """
    ids = torch.arange(8, device=lm.device)[None] % lm.config.get_text_config().vocab_size
    with torch.no_grad():
        expected = lm(input_ids=ids, use_cache=False).logits
        hidden = lm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        found = lm.get_output_embeddings()(hidden)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-2, atol=1e-2)


# --- adapters ------------------------------------------------------------------------------------


def add_reference(model: Any) -> None:
    """Put a frozen copy of the policy's adapter beside it, as it is now: what KL is measured from."""
    weights = get_peft_model_state_dict(model, None, POLICY, save_embedding_layers=False)
    add_frozen(model, REFERENCE, copy.deepcopy(model.peft_config[POLICY]), weights)


def add_frozen(model: Any, name: str, config: Any, weights: dict[str, Tensor]) -> None:
    """Put an adapter beside the policy's that never trains, in the place of an older one of that name.
    ValueError if the weights do not fit.
    """
    if name in model.peft_config:
        model.delete_adapter(name)
    # PiSSA and its kin would take the new adapter out of the base's weights.
    config.init_lora_weights, config.lora_dropout = True, 0.0
    with adapters.restored(model), torch.random.fork_rng():
        model.add_adapter(name, config)
        found = set_peft_model_state_dict(model, weights, adapter_name=name)
        model.set_requires_grad(name, False)
    if left := found.unexpected_keys + [key for key in found.missing_keys if f".{name}." in key]:
        raise ValueError(f"the adapter {name!r} does not fit the model: {left[0]} is left over or missing")


def check_policy(model: Any) -> None:
    """Raise ValueError unless the model has an adapter "default", and that alone trains."""
    if not isinstance(model, PeftModel) or POLICY not in model.peft_config:
        says = "policy, critic and reference share a frozen base. Load it with load_model(..., lora=LoRA()) or a folder"
        raise ValueError(f"PPO's model is a {type(model).__name__} without an adapter {POLICY!r}: {says}")
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trains:
        raise ValueError("no parameter of the model trains: load it with load_model(..., lora=LoRA()) or a folder")
    if others := [name for name in trains if f".{POLICY}." not in f"{name}."]:
        says = "the base must be frozen, so with LoRA take bias='none', or set its requires_grad to False"
        raise ValueError(f"{others[0]} is not of the adapter {POLICY!r} and trains: {says}")
