"""Adapters at work: several on one base, switched live, combined and merged.

Whatever is done here is undone exactly: the weights of the base come back bit for bit, and what
trained before trains again.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

from rlnb.model.folders import (
    DATA, FILES, base_name, check_fits, check_name, load_weights, read_saved, resolve, save_adapter,
)  # fmt: skip
from rlnb.model.lora import lora_layers, rewrites_base

__all__ = [
    "DATA", "add", "base_name", "combine", "load_weights", "lora_layers", "merged", "off", "read_saved",
    "resolve", "save_adapter", "using",
]  # fmt: skip


def add(model: Any, name: str, folder: str | os.PathLike[str]) -> None:
    """Put a saved adapter beside the ones that the model has. It is frozen, and not yet in use.

    Raises ValueError for a name that is taken or has a dot, for an adapter of another base, and where
    an adapter's init rewrites the base, which the others stand on.
    """
    path, config = read_saved(folder)
    _check_new_name(model, name)
    inits = {f"adapter {other!r}": own.init_lora_weights for other, own in model.peft_config.items()}
    inits[f"{path / FILES[0]}"] = config.get("init_lora_weights")
    for where, init in inits.items():
        if rewrites_base(init):
            raise ValueError(
                f"{where}: init_lora_weights is {init!r}, which rewrites the base's weights, and adapters "
                "share their base: load it alone, with load_model(..., reference=False)"
            )
    check_fits(path, config, model.get_base_model().name_or_path, model.get_base_model())
    with _unchanged(model):
        load_weights(model, path, name, trainable=False)


@contextmanager
def using(model: Any, name: str) -> Iterator[Any]:
    """Inside, the model runs with this adapter alone; after that as before.

        with adapters.using(model, "dpo"):
            sampling.sample(model, ...)

    What trains, trains inside too: PEFT's own switches also set that, and forget what it was.
    Raises ValueError for a name that is not there, RuntimeError inside `merged`.
    """
    check_name(model, name)
    with _restored(model) as parts:
        model.active_adapter = model.base_model.active_adapter = name
        for part in parts:
            part._active_adapter, part._disable_adapters = [name], False
        yield model


@contextmanager
def off(model: Any) -> Iterator[Any]:
    """Inside, the model is its base; after that as before. RuntimeError inside `merged`."""
    with _restored(model) as parts:
        for part in parts:
            part._disable_adapters = True
        yield model


def combine(model: Any, name: str, weights: Mapping[str, float]) -> None:
    """A new adapter, the weighted sum of others: its update is sum_i w_i s_i B_i A_i, exactly.

    It gets there by stacking: B = [B_1 B_2 ...] and A = [w_1 s_1 A_1; w_2 s_2 A_2; ...], so its rank is the
    sum of the ranks. (PEFT's add_weighted_adapter takes over the first one's use_rslora, which scales the
    sum wrongly.) It is frozen, and not yet in use.
    Raises ValueError for a name that is not there, one that is taken, or a weight that is no number.
    """
    _check_new_name(model, name)
    for other, weight in weights.items():
        check_name(model, other)
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"the weight of {other!r} is {weight!r}: it must be a finite number")
    if not weights:
        raise ValueError("weights is empty: name the adapters to combine, as {'sft': 0.5}")
    layers = {n: m for n, m in lora_layers(model).items() if weights.keys() & m.lora_A.keys()}
    rank = max(sum(m.r[other] for other in weights if other in m.r) for m in layers.values())
    ends = sorted({layer.split(".")[-1] for layer in layers})
    with _unchanged(model), torch.no_grad():
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=ends, task_type="CAUSAL_LM")
        model.add_adapter(name, config)
        for layer in lora_layers(model).values():
            if name not in layer.lora_A:
                continue
            a, b, start = layer.lora_A[name].weight.zero_(), layer.lora_B[name].weight.zero_(), 0
            for other in [other for other in weights if other in layer.lora_A]:
                rows = slice(start, start := start + layer.r[other])
                a[rows] = weights[other] * layer.scaling[other] * layer.lora_A[other].weight
                b[:, rows] = layer.lora_B[other].weight


@contextmanager
def merged(model: Any) -> Iterator[Any]:
    """Inside, the adapter in use is folded into the weights, W + s B A; after that it is not.

    The sum is done in float32 and rounded once to the weights' type. W comes back from a copy, bit
    for bit: subtracting what was added would leave rounding behind. Costs a copy of every weight
    that an adapter is on. Inside, neither train nor switch.

    Raises TypeError for what has no exact merge here (DoRA, quantised weights), ValueError where no
    adapter is in use.
    """
    layers = _mergeable(model)
    _check_not_merged(layers)
    if not layers or layers[0].disable_adapters:
        raise ValueError("no adapter is in use: there is nothing to merge")
    copies = []
    try:
        with torch.no_grad():
            for layer in layers:
                names = [name for name in layer.active_adapters if name in layer.lora_A]
                weight = layer.get_base_layer().weight
                copies.append((layer, weight, weight.detach().clone()))
                update = sum(layer.get_delta_weight(name).float() for name in names)
                weight.copy_(weight.float() + update)
                layer.merged_adapters.extend(names)
        yield model
    finally:
        with torch.no_grad():
            for layer, weight, before in copies:
                weight.copy_(before)
                layer.merged_adapters.clear()


def _mergeable(model: Any) -> list[Any]:
    if not hasattr(model, "peft_config"):
        raise TypeError("the model has no adapter to merge")
    layers = lora_layers(model)
    for name, layer in layers.items():
        special = any(n in layer.lora_variant or layer.lora_bias.get(n) for n in layer.active_adapters)
        if type(layer) is not Linear or special:
            raise TypeError(f"{name} is {type(layer).__name__}, not plain LoRA: merge it with PEFT")
    if any(isinstance(module, ModulesToSaveWrapper) for module in model.modules()):
        raise TypeError("the adapter has modules_to_save, not LoRA alone: merge it with PEFT")
    return list(layers.values())


@contextmanager
def _restored(model: Any) -> Iterator[list[Any]]:
    """Yields the parts of the model that adapters are on. Afterwards the adapter in use is as before."""
    parts = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    _check_not_merged(parts)
    active = model.active_adapter, model.base_model.active_adapter
    before = [(part, part._active_adapter, part._disable_adapters) for part in parts]
    try:
        yield parts
    finally:
        model.active_adapter, model.base_model.active_adapter = active
        for part, names, disabled in before:
            part._active_adapter, part._disable_adapters = names, disabled


@contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """PEFT adds an adapter inside; what was there before is in use, trains and is in the mode as before."""
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    with _restored(model):
        try:
            yield
        finally:
            for parameter, flag in trains:
                parameter.requires_grad = flag
            for module, training in modes:
                module.training = training


def _check_not_merged(layers: list[Any]) -> None:
    if any(getattr(layer, "merged", False) for layer in layers):
        raise RuntimeError("the adapter is merged into the weights: leave adapters.merged first")


def _check_new_name(model: Any, name: str) -> None:
    there, why = ", ".join(model.peft_config), None
    parts = {part for key, _ in model.named_parameters() for part in key.split(".")}
    if name in model.peft_config:
        why = "is taken"
    # PEFT keeps the parts of an adapter in a ModuleDict: no name of its methods goes in.
    elif not name or "." in name or name in "lora_" or hasattr(torch.nn.ModuleDict(), name) or name in parts:
        why = "is one that PEFT would mix up with the model's own names"
    if why:
        raise ValueError(f"adapter name {name!r} {why}: choose another; there are {there}")
