"""Adapters by the `peft` library, attached to single projections of a loaded model.

A projection becomes a layer of peft's that holds it, so that its own parameters are called `....base_layer.weight`; no
other parameter and no other module is touched. peft's own way through the whole model is not taken: in models with
experts it moves adapters of `gate_proj` and `up_proj`, wherever they are, to the stacks of experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from adept_ds.models.adapter_spec import AdapterSpec, LoraSpec, split_adapter_name, target_projections
from adept_ds.models.families import Family
from adept_ds.models.loading import Trains


def adapters_train(family: Family, spec: AdapterSpec, seed: int) -> Trains:
    """Adapters of the projections that `spec` names train, in every layer, and nothing else.

    Raises:
        InputError: the family has not what `spec` names.
    """
    target_projections(spec.targets, family)
    return Trains(lambda model: attach_adapters(model, family, spec, seed), 0)


def attach_adapters(model: nn.Module, family: Family, spec: AdapterSpec, seed: int) -> None:
    """Put an adapter around every target of every layer, in place; nothing but adapters trains afterwards.

    The model computes what it did before, bit for bit: every adapter begins as the identity. Adapters have the
    precision of the projection. Under ZeRO-3 the base is partitioned already; adapters are so by
    `deepspeed.initialize`.

    Args:
        seed: of the initial values; with the same one they are the same on every rank and at every stage.
    """
    paths = set(target_projections(spec.targets, family))
    model.requires_grad_(False)
    with _random_numbers_from(seed):
        for layer in family.layer_modules(model):
            for path, projection in list(layer.named_modules()):
                if path in paths:
                    with _whole(projection, needed=isinstance(spec, LoraSpec) and spec.dora):
                        adapter = adapted(projection, spec)
                    layer.set_submodule(path, adapter.train(projection.training))


def adapted(projection: nn.Module, spec: AdapterSpec, *, empty: bool = False) -> Any:
    """peft's layer around a linear layer.

    Args:
        empty: its parameters have no values yet; they are on the meta device.
    """
    from peft import inject_adapter_in_model

    holder = nn.ModuleDict({"projection": projection})
    inject_adapter_in_model(_peft_config(spec, projection), holder, low_cpu_mem_usage=empty)
    return holder["projection"]


def adapter_parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    """Factor ('lora_A', 'oft_R') -> its parameter, of one layer that `adapted` returned."""
    named = {split_adapter_name(f"projection.{name}"): parameter for name, parameter in module.named_parameters()}
    return {place[1]: parameter for place, parameter in named.items() if place}


def _peft_config(spec: AdapterSpec, projection: nn.Module) -> Any:
    from peft import LoraConfig, OFTConfig

    if isinstance(spec, LoraSpec):
        return LoraConfig(
            r=spec.rank,
            # peft types it as a whole number, and computes with any.
            lora_alpha=spec.alpha,  # type: ignore[arg-type]
            lora_dropout=spec.dropout,
            use_dora=spec.dora,
            use_rslora=spec.rank_stabilised,
            fan_in_fan_out=not isinstance(projection, nn.Linear),
            target_modules=["projection"],
        )
    return OFTConfig(oft_block_size=spec.block_size, target_modules=["projection"])


@contextmanager
def _random_numbers_from(seed: int) -> Iterator[None]:
    """What is drawn inside depends on the seed alone, and what is drawn afterwards not on what happened inside.

    New parameters are drawn on the CPU: only its generator is concerned.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield


@contextmanager
def _whole(projection: nn.Module, *, needed: bool) -> Iterator[None]:
    """Under ZeRO-3, a projection's parameters are gathered inside."""
    parameters = [parameter for parameter in projection.parameters() if hasattr(parameter, "ds_id")]
    if not needed or not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield
