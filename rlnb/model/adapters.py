"""Adapters at work: several on one base, switched live, combined and merged. Whatever is done is undone exactly: the
weights of the base come back bit for bit, and what trained before trains again.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.utils import ModulesToSaveWrapper

from rlnb.model.folders import check_name, load_weights, read_saved
from rlnb.model.lora import lora_layers


def add(model: Any, name: str, folder: str | os.PathLike[str]) -> None:
    """Put a saved adapter beside the ones that the model has. It is frozen, and not yet in use. Raises
    ValueError for a name that is taken, an adapter of another base, or one whose init rewrites the base.
    """
    path, _ = read_saved(folder, base=model.get_base_model().name_or_path)
    _check_new_name(model, name)
    with restored(model):
        load_weights(model, path, name, trainable=False)


@contextmanager
def using(model: Any, name: str) -> Iterator[Any]:
    """Inside, the model runs with this adapter alone; after that as before.

    What trains, trains inside too: PEFT's own switches also set that, and forget what it was.
    Raises ValueError for a name that is not there, RuntimeError inside `merged`.
    """
    check_name(model, name)
    with restored(model) as layers:
        model.active_adapter = model.base_model.active_adapter = name
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = [name], False
        yield model


@contextmanager
def off(model: Any) -> Iterator[Any]:
    """Inside, the model is its base; after that as before. RuntimeError inside `merged`."""
    with restored(model) as layers:
        for layer in layers:
            layer._disable_adapters = True
        yield model


def combine(model: Any, name: str, weights: Mapping[str, float]) -> None:
    """A new adapter, the weighted sum of others: its update is sum_i w_i s_i B_i A_i, exactly, and its rank
    the sum of the ranks. It is frozen, and not yet in use.

    Raises ValueError for a name that is not there or taken, no weights, and adapters that PEFT's
    add_weighted_adapter sums up wrongly: the new adapter takes over what the first one is beside LoRA.
    """
    _check_new_name(model, name)
    if not weights or not isinstance(weights, Mapping):
        raise ValueError(f"weights is {weights!r}: name the adapters to combine, as {{'sft': 0.5}}")
    for other, weight in weights.items():
        check_name(model, other)
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"the weight of {other!r} is {weight!r}: it must be a finite number")
        config = model.peft_config[other]
        if config.use_rslora or config.use_dora or config.lora_bias:
            says = "has use_rslora, use_dora or lora_bias: only plain LoRA can be combined"
            raise ValueError(f"adapter {other!r} {says}")
    with restored(model):
        model.add_weighted_adapter(list(weights), list(weights.values()), name, combination_type="cat")


@contextmanager
def merged(model: Any) -> Iterator[Any]:
    """Inside, the adapter in use is folded into the weights, W + s B A; after that it is not.

    The sum is done in float32 and rounded once to the weights' type. W comes back from a copy, bit for
    bit: subtracting what was added would leave rounding behind. Inside, neither train nor switch.
    Raises TypeError for what has no exact merge here (DoRA), ValueError where no adapter is in use.
    """
    for name, layer in lora_layers(model).items():
        special = layer.lora_variant or any(layer.lora_bias.get(active) for active in layer.active_adapters)
        if type(layer) is not Linear or special:
            raise TypeError(f"{name} is {type(layer).__name__}, not plain LoRA: merge it with PEFT")
    if any(isinstance(module, ModulesToSaveWrapper) for module in model.modules()):
        raise TypeError("the adapter has modules_to_save, not LoRA alone: merge it with PEFT")
    if all(layer.disable_adapters for layer in lora_layers(model).values()):
        raise ValueError("no adapter is in use: there is nothing to merge")
    with restored(model) as layers, torch.no_grad():
        copies = [layer.get_base_layer().weight.detach().clone() for layer in layers]
    try:
        with torch.no_grad():
            for layer in layers:
                names = [name for name in layer.active_adapters if name in layer.lora_A]
                weight = layer.get_base_layer().weight
                weight.copy_(weight.float() + sum(layer.get_delta_weight(name).float() for name in names))
                layer.merged_adapters.extend(names)
        yield model
    finally:
        with torch.no_grad():
            for layer, before in zip(layers, copies, strict=True):
                layer.get_base_layer().weight.copy_(before)
                layer.merged_adapters.clear()


@contextmanager
def restored(model: Any) -> Iterator[list[Any]]:
    """Yields the layers that adapters are on. Afterwards what is in use, what trains and all modes are as before."""
    layers = list(lora_layers(model).values())
    if any(layer.merged for layer in layers):
        raise RuntimeError("the adapter is merged into the weights: leave adapters.merged first")
    active = model.active_adapter, model.base_model.active_adapter
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield layers
    finally:
        model.active_adapter, model.base_model.active_adapter = active
        for layer, names, disabled in before:
            layer._active_adapter, layer._disable_adapters = names, disabled
        for parameter, flag in trains:
            parameter.requires_grad = flag
        for module, training in modes:
            module.training = training


def _check_new_name(model: Any, name: str) -> None:
    if name in model.peft_config or not name or "." in name:
        there = ", ".join(model.peft_config)
        raise ValueError(f"adapter name {name!r} is empty, has a dot or is taken: there are {there}")
