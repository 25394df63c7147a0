"""Adapters at work: several on one base, switched live, combined and merged.

Whatever is done here is undone exactly: the weights of the base come back bit for bit, and what
trained before trains again.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rlnb.model.folders import (
    check_fits, check_name, load_weights, read_saved, save_adapter, warn_of_another_base,
)  # fmt: skip

__all__ = ["add", "combine", "lora_layers", "merged", "off", "save_adapter", "using"]


def add(model: Any, name: str, folder: str | os.PathLike[str]) -> None:
    """Put a saved adapter beside the ones that the model has. It is frozen, and not yet in use.

    Raises ValueError for a name that is taken or has a dot, and for an adapter of another base.
    """
    path, config = read_saved(folder)
    _check_new_name(model, name)
    warn_of_another_base(path, config, model.get_base_model().name_or_path)
    check_fits(path, model.get_base_model())
    with _unchanged(model):
        load_weights(model, path, name, trainable=False)


@contextmanager
def using(model: Any, name: str) -> Iterator[Any]:
    """Inside, the model runs with this adapter alone; after that as before.

        with adapters.using(model, "dpo"):
            sampling.sample(model, ...)

    Raises ValueError for a name that is not there, RuntimeError inside `merged`.
    """
    check_name(model, name)
    with _unchanged(model):
        model.base_model.enable_adapter_layers()
        model.set_adapter(name, inference_mode=True)
        yield model


@contextmanager
def off(model: Any) -> Iterator[Any]:
    """Inside, the model is its base; after that as before. RuntimeError inside `merged`."""
    with _unchanged(model):
        model.base_model.disable_adapter_layers()
        yield model


def combine(model: Any, name: str, weights: Mapping[str, float]) -> None:
    """A new adapter, the weighted sum of others: its update is sum_i w_i s_i B_i A_i, exactly.

    It gets there by stacking: B = [B_1 B_2 ...] and A = [w_1 s_1 A_1; w_2 s_2 A_2; ...], so its
    rank is the sum of the ranks. It is frozen, and not yet in use.
    Raises ValueError for a name that is not there, one that is taken, or a weight that is no number.
    """
    import torch
    from peft import LoraConfig

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
            parts = [(other, w) for other, w in weights.items() if other in layer.lora_A]
            a, b = layer.lora_A[name].weight.zero_(), layer.lora_B[name].weight.zero_()
            start = 0
            for other, weight in parts:
                rows = slice(start, start := start + layer.r[other])
                a[rows] = weight * layer.scaling[other] * layer.lora_A[other].weight
                b[:, rows] = layer.lora_B[other].weight


# --- merged --------------------------------------------------------------------------------------


@contextmanager
def merged(model: Any) -> Iterator[Any]:
    """Inside, the adapter in use is folded into the weights, W + s B A; after that it is not.

    The sum is done in float32 and rounded once to the weights' type. W comes back from a copy, bit
    for bit: subtracting what was added would leave rounding behind. Costs a copy of every weight
    that an adapter is on. Inside, neither train nor switch.

    Raises TypeError for what has no exact merge here (DoRA, quantised weights), ValueError where no
    adapter is in use.
    """
    import torch

    layers = _mergeable(model)
    _check_not_merged(layers)
    if not layers or layers[0].disable_adapters:
        raise ValueError("no adapter is in use: there is nothing to merge")
    kept = []
    try:
        with torch.no_grad():
            for layer in layers:
                names = [name for name in layer.active_adapters if name in layer.lora_A]
                weight = layer.get_base_layer().weight
                kept.append((layer, weight, weight.detach().clone()))
                update = sum(layer.get_delta_weight(name).float() for name in names)
                weight.copy_(weight.float() + update)
                layer.merged_adapters.extend(names)
        yield model
    finally:
        with torch.no_grad():
            for layer, weight, before in kept:
                weight.copy_(before)
                layer.merged_adapters.clear()


def lora_layers(model: Any) -> dict[str, Any]:
    """The layers of a model that have adapters, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def _mergeable(model: Any) -> list[Any]:
    from peft.tuners.lora import Linear
    from peft.utils import ModulesToSaveWrapper

    if not hasattr(model, "peft_config"):
        raise TypeError("the model has no adapter to merge")
    layers = lora_layers(model)
    for name, layer in layers.items():
        special = any(
            n in layer.lora_variant or layer.lora_bias.get(n) for n in layer.active_adapters
        )
        if type(layer) is not Linear or special:
            raise TypeError(f"{name} is {type(layer).__name__}, not plain LoRA: merge it with PEFT")
    if any(isinstance(module, ModulesToSaveWrapper) for module in model.modules()):
        raise TypeError("the adapter has modules_to_save, not LoRA alone: merge it with PEFT")
    return list(layers.values())


@contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """Whatever adapter is in use inside, afterwards it is as before, and so is what trains."""
    layers = lora_layers(model).values()
    _check_not_merged(layers)
    active, on = model.active_adapter, not any(layer.disable_adapters for layer in layers)
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        model.set_adapter(active)
        switch = model.base_model
        switch.enable_adapter_layers() if on else switch.disable_adapter_layers()
        for parameter, flag in trains:
            parameter.requires_grad = flag
        for module, training in modes:
            module.training = training


def _check_not_merged(layers: Iterable[Any]) -> None:
    if any(layer.merged for layer in layers):
        raise RuntimeError("the adapter is merged into the weights: leave adapters.merged first")


def _check_new_name(model: Any, name: str) -> None:
    from torch.nn import ModuleDict  # where PEFT keeps the parts: no name of its methods goes in

    there, why = ", ".join(model.peft_config), None
    if name in model.peft_config:
        why = "is taken"
    elif not name or "." in name or name in "lora_" or hasattr(ModuleDict(), name) or any(
        name in key.split(".") for key, _ in model.named_parameters()
    ):  # fmt: skip
        why = "is one that PEFT would mix up with the model's own names"
    if why:
        raise ValueError(f"adapter name {name!r} {why}: choose another; there are {there}")
