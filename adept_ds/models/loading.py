"""Loading models: straight into ZeRO-3 partitions where that stage is asked for, and what may train in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adept_ds.base.errors import InputError
from adept_ds.models.attention import use_products
from adept_ds.models.completeness import SAVE_AGAIN, complete_weights
from adept_ds.models.device import device_name
from adept_ds.models.directory import ModelDirectory, understood_by_transformers
from adept_ds.models.families import Family
from adept_ds.models.head_loss import install_row_losses
from adept_ds.models.liger import Liger


def load_causal_lm(
    source: ModelDirectory, dtype: torch.dtype, ds_config: dict[str, Any] | None = None, liger: Liger | None = None
) -> torch.nn.Module:
    """A frozen causal language model whose `forward(input_ids, labels)` returns summed losses per row.

    Args:
        ds_config: with ZeRO stage 3, each rank keeps only its partition from the first tensor on; None loads the
            whole model.
        liger: kernels to compute with; None: PyTorch's.

    Raises:
        InputError: the files and the architecture do not agree; seen before any weight is read.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    check_architecture(source)
    # Exists for as long as loading takes: transformers asks it whether to partition while it reads.
    zero3 = HfDeepSpeedConfig(ds_config) if ds_config is not None else None
    model = AutoModelForCausalLM.from_pretrained(
        source.path, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    del zero3
    model.requires_grad_(False)
    model.config.use_cache = False
    if device_name() == "cpu":
        use_products(model)
    if liger:
        liger.put_into(model)
    install_row_losses(model, *source.family.logit_transform(model.config), liger)
    return model


def check_architecture(source: ModelDirectory) -> None:
    """Load a model's tensors without their content, and see that they are all that there must be, and no others.

    transformers itself says what it would make up, drop or reshape; what it drops on purpose (rotary buffers, a tied
    head that is stored twice) is no mistake. Reads headers alone.

    Raises:
        InputError: naming a tensor that is missing, too many or of another shape; or config.json cannot be understood.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    entries = {name: entry for of in complete_weights(source).values() for name, entry in of.items()}
    contentless = {name: torch.empty(entry.shape, device="meta") for name, entry in entries.items()}
    with understood_by_transformers(source.path):
        config = AutoConfig.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
        _, found = AutoModelForCausalLM._model_mapping[type(config)].from_pretrained(
            None,
            config=config,
            state_dict=contentless,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    where, other = f"model: '{source.path}'", "give the config.json that belongs to these weights"
    for name in sorted(found["missing_keys"]):
        raise InputError(f"{where} lacks '{name}', which would be random numbers; {SAVE_AGAIN}")
    for name, shape, wanted in sorted(found["mismatched_keys"]):
        raise InputError(f"{where} holds '{name}' of shape {tuple(shape)}, where {tuple(wanted)} is needed; {other}")
    for name in sorted(found["unexpected_keys"]):
        raise InputError(
            f"{where} holds '{name}', which the architecture of config.json has not; {other}, "
            "or save the language model alone"
        )


@dataclass(frozen=True)
class Trains:
    """What of a loaded model trains, and how it is made to."""

    prepare: Callable[[torch.nn.Module], None]
    """Takes the loaded model, in which everything is frozen, and unfreezes what trains; it may add adapters inside
    modules, under ZeRO-3 before DeepSpeed partitions them. To be called alike on every rank."""
    lowest_trainable_layer: int
    """The lowest decoder layer that gradients pass: 0 where the embedding trains."""


def layers_train(family: Family, layers: Sequence[int]) -> Trains:
    """Whole decoder layers train, nothing else."""
    return Trains(lambda model: make_layers_trainable(model, family, layers), min(layers))


def everything_trains() -> Trains:
    """Every parameter trains, embedding and head too."""
    return Trains(make_all_trainable, 0)


def make_layers_trainable(model: torch.nn.Module, family: Family, layers: Sequence[int]) -> None:
    """Unfreeze whole decoder layers; everything else stays as it is."""
    modules = family.layer_modules(model)
    for layer in layers:
        modules[layer].requires_grad_(True)


def make_all_trainable(model: torch.nn.Module) -> None:
    """Unfreeze every parameter; a tied head is one with the embedding."""
    model.requires_grad_(True)


def compile_layers(model: torch.nn.Module, family: Family, backend: str = "inductor") -> None:
    """Let torch.compile make kernels of every layer, for passes that gradients are wanted of.

    One graph serves all layers that are alike in what trains and what gradients pass; passes without gradients, whose
    texts are of any length, stay with PyTorch's operations. Nothing may hook into a layer's modules, as ZeRO-3 does.
    """
    for layer in family.layer_modules(model):
        layer.forward = _compiled(layer.forward, backend)


def _compiled(forward: Callable[..., Any], backend: str) -> Callable[..., Any]:
    compiled = torch.compile(forward, backend=backend)

    def either(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else forward)(*args, **kwargs)

    return either


def checkpoint_activations(model: torch.nn.Module, family: Family, lowest: int) -> None:
    """Recompute the activations of every layer from `lowest` up in the backward pass.

    All of them, frozen ones too: a frozen layer above a trainable one keeps its activations as well. Layers below
    `lowest` have no backward pass and keep nothing anyway.
    """
    import functools

    from torch.utils.checkpoint import checkpoint

    for layer in family.layer_modules(model)[lowest:]:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
