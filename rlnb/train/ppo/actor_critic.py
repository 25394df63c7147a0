"""Policy, value, reference and reward on one frozen base: what PPO runs forward.

The base is in memory once. The policy is the adapter "default", the reference the same weights with
the adapter off (or with a frozen copy of the adapter that the policy started from), the value a head
on the policy's last hidden state (or on that of an adapter of its own), and a reward model may be
one more adapter with a score head.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

POLICY, REFERENCE, VALUE, REWARD = "default", "ref", "value", "reward"  # names of adapters
LOGITS_AT_ONCE = 2**25  # numbers: 128 MiB in float32


# --- adapters ------------------------------------------------------------------------------------


def has_adapter(model: Any) -> bool:
    """Whether this is a PEFT model, so that its base is frozen and shared."""
    return bool(getattr(model, "peft_config", None)) and hasattr(model, "get_base_model")


def causal_lm(model: Any) -> Any:
    """The transformers model itself, without PEFT around it."""
    return model.get_base_model() if has_adapter(model) else model


@contextmanager
def use_adapter(model: Any, name: str | None) -> Iterator[None]:
    """Run with another adapter, or with none, and leave everything as it was.

    PEFT's switches also decide which adapters train, and forget it: that is put back here.
    """
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = model.active_adapter
    try:
        if name is None:
            with model.disable_adapter():
                yield
        else:
            model.set_adapter(name)
            yield
    finally:
        model.set_adapter(active)
        for parameter, flag in trains:
            parameter.requires_grad_(flag)


def is_empty(model: Any, name: str = POLICY) -> bool:
    """Whether an adapter changes nothing: a new LoRA, whose B is all zeros."""
    own = [(n, p) for n, p in model.named_parameters() if f".{name}." in n]
    factors = all("lora_A" in n or "lora_B" in n for n, _ in own)
    return factors and not any(p.any() for n, p in own if "lora_B" in n)


def copy_adapter(model: Any, name: str, trains: bool) -> None:
    """Add a copy of the policy's adapter, in the place of an older one of that name."""
    if name in model.peft_config:
        model.delete_adapter(name)
    config = copy.deepcopy(model.peft_config[POLICY])
    # PiSSA and its kin would take the new adapter out of the base's weights.
    config.init_lora_weights, config.lora_dropout = True, 0.0
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with torch.random.fork_rng():
        model.add_adapter(name, config)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    for old, parameter in list(model.named_parameters()):
        if f".{POLICY}." in old:
            new = model.get_parameter(old.replace(f".{POLICY}.", f".{name}."))
            new.data.copy_(parameter.data)
            new.requires_grad_(trains)


def load_adapter(model: Any, weights: dict[str, Tensor], name: str, source: Any) -> None:
    """Fill an adapter that is there. Raises ValueError, which names `source`, if it does not fit."""
    from peft import set_peft_model_state_dict

    try:
        found = set_peft_model_state_dict(model, weights, adapter_name=name)
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit the model: {error}") from error
    missing = [key for key in found.missing_keys if f".{name}." in key]
    if missing or found.unexpected_keys:
        raise ValueError(
            f"{source} does not fit the model: {(missing or found.unexpected_keys)[0]} is "
            f"{'missing' if missing else 'left over'}"
        )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: with it, old and new policy would differ without any update."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)


# --- policy and value ----------------------------------------------------------------------------


class ActorCritic(nn.Module):
    """What PPO trains: a causal language model as the policy, and the value of each state.

    value: "trunk" puts a linear head on the policy's own last hidden state, so that one forward
        pass serves both and the value's gradient reaches the policy's adapter; "adapter" puts it on
        the hidden state under the adapter "value", which costs a second pass; "none" is no critic.
    temperature: that of the policy. Logits are divided by it everywhere.

    The head is float32 whatever the model is, and starts at zero: V = 0, and no gradient from it
    reaches the trunk before it has learnt something.
    """

    def __init__(self, model: Any, value: str = "none", temperature: float = 1.0):
        super().__init__()
        self.model, self.value, self.temperature = model, value, temperature
        self.value_head = None
        if value != "none":
            width = causal_lm(model).config.get_text_config().hidden_size
            self.value_head = nn.Linear(width, 1, dtype=torch.float32, device=model.device)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        self.plain_head = _head_is_plain(causal_lm(model))

    def forward(
        self, input_ids: Tensor, predicts: Tensor, entropy: bool = False, value: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probability, entropy (if asked for) and value of each of N completion tokens, as (N,).

        input_ids: (rows, length), prompt and completion padded on the right, where causal attention
            never looks, so that padding needs no mask and changes nothing.
        predicts: the same shape, True at each position whose next token is of the completion. That
            position is the state in which the token was chosen. N tokens are in the order of
            x[predicts]: row by row.
        """
        states = predicts.flatten().nonzero()[:, 0]  # index_select is faster than a mask backwards
        targets = input_ids.roll(-1, 1).flatten()[states]
        hidden, logits = self._states(input_ids, states)
        log_probs, entropies = token_statistics(hidden, logits, targets, self.temperature, entropy)
        values = None
        if value and self.value_head is not None:
            if self.value == "adapter":
                with use_adapter(self.model, VALUE):
                    hidden, _ = self._states(input_ids, states)
            values = linear(self.value_head, hidden)[:, 0]
        return log_probs, entropies, values

    def critic_parameters(self) -> list[nn.Parameter]:
        """The head's and, if it has one of its own, the adapter's."""
        named = self.named_parameters()
        return [p for name, p in named if name.startswith("value_head.") or f".{VALUE}." in name]

    def _states(self, input_ids: Tensor, states: Tensor) -> tuple[Tensor, Any]:
        """(N, width) hidden states, and what turns them into logits: the head, or the logits."""
        lm = causal_lm(self.model)
        if self.plain_head:
            hidden = lm.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
            return hidden.flatten(0, 1).index_select(0, states), lm.get_output_embeddings()
        out = lm(input_ids=input_ids, use_cache=False, output_hidden_states=True)
        logits, hidden = (x.flatten(0, 1)[states] for x in (out.logits, out.hidden_states[-1]))
        return hidden, logits


def _head_is_plain(lm: Any) -> bool:
    """Whether logits are the output layer of the last hidden state and nothing else.

    Then logits of completion tokens alone need computing. Some models scale or cap them (Gemma 2,
    Cohere, Granite), so a glance at one short input decides.
    """
    ids = torch.arange(8, device=lm.device)[None] % lm.config.get_text_config().vocab_size
    with torch.no_grad():
        expected = lm(input_ids=ids, use_cache=False).logits
        hidden = lm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        found = lm.get_output_embeddings()(hidden)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-2, atol=1e-2)


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer in the precision of its weights, whatever autocast says."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(layer.weight.dtype))


def token_statistics(
    hidden: Tensor, head: nn.Module | Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """(N,) log-probabilities of `targets` and, if asked for, (N,) entropies.

    hidden: (N, width). head: the output layer, or (N, vocabulary) logits. The float32 logits of a
    large vocabulary are made a piece at a time, and again in the backward pass.
    """

    def piece(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = linear(head, x) if isinstance(head, nn.Module) else x
        logits = (logits.float() if logits.dtype.itemsize < 4 else logits) / temperature
        log_p = logits.log_softmax(-1)
        chosen = log_p.gather(-1, target[:, None])[:, 0]
        if not entropy:
            return chosen, chosen.detach()
        return chosen, -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1)  # 0 x -inf is NaN

    given = hidden if isinstance(head, nn.Module) else head
    vocabulary = head.weight.shape[0] if isinstance(head, nn.Module) else head.shape[-1]
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    if len(targets) <= size:
        found = [piece(given, targets)]
    else:
        pieces = zip(given.split(size), targets.split(size), strict=True)
        found = [checkpoint(piece, x, t, use_reentrant=False) for x, t in pieces]
    chosen, entropies = (torch.cat(column) for column in zip(*found, strict=True))
    return chosen, entropies if entropy else None


class Reference:
    """What KL is measured from: the model with another adapter or with none, or a frozen copy of it.

    which: "start", "base" or an adapter's name, as PPOConfig.reference has it.
    """

    def __init__(self, actor: ActorCritic, which: str):
        self.actor, model = actor, actor.model
        self.adapter: str | None = None  # None: the adapter is off
        self.copy: ActorCritic | None = None  # with LoRA the policy's own base serves
        if not has_adapter(model):
            frozen = copy.deepcopy(model).requires_grad_(False)
            self.copy = ActorCritic(frozen, temperature=actor.temperature)
        elif which == "start" and not is_empty(model):
            copy_adapter(model, REFERENCE, trains=False)
            self.adapter = REFERENCE
        elif which not in ("start", "base"):
            self.adapter = which

    @contextmanager
    def at_work(self) -> Iterator[ActorCritic]:
        """The module to run forward, as the reference while inside."""
        if self.copy is not None:
            yield self.copy
        else:
            with use_adapter(self.actor.model, self.adapter):
                yield self.actor


# --- rows ----------------------------------------------------------------------------------------


def right_pad(rows: Sequence[Sequence[int]], pad: int, device: Any = None) -> Tensor:
    """(rows, longest) ids."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)


def spans(starts: Tensor, ends: Tensor, width: int) -> Tensor:
    """(rows, width), True where starts <= position < ends; both (rows,)."""
    positions = torch.arange(width, device=starts.device)
    return (positions >= starts[:, None]) & (positions < ends[:, None])
