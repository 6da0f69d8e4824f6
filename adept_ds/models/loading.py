"""Loading models: straight into ZeRO-3 partitions where that stage is asked for, and what may train in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adept_ds.models.directory import ModelDirectory
from adept_ds.models.families import Family
from adept_ds.models.head_loss import install_row_losses


def load_causal_lm(
    source: ModelDirectory, dtype: torch.dtype, ds_config: dict[str, Any] | None = None
) -> torch.nn.Module:
    """A frozen causal language model whose `forward(input_ids, labels)` returns summed losses per row.

    Args:
        ds_config: with ZeRO stage 3, each rank keeps only its partition from the first tensor on; None loads the
            whole model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    # Exists for as long as loading takes: transformers asks it whether to partition while it reads.
    zero3 = HfDeepSpeedConfig(ds_config) if ds_config is not None else None
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype, local_files_only=True)
    del zero3
    model.requires_grad_(False)
    model.config.use_cache = False
    install_row_losses(model, *source.family.logit_transform(model.config))
    return model


def make_layers_trainable(model: torch.nn.Module, family: Family, layers: Sequence[int]) -> None:
    """Unfreeze whole decoder layers; everything else keeps requires_grad=False."""
    modules = family.layer_modules(model)
    for layer in layers:
        modules[layer].requires_grad_(True)


def checkpoint_activations(model: torch.nn.Module, family: Family, lowest: int) -> None:
    """Recompute the activations of every layer from `lowest` up in the backward pass.

    All of them, frozen ones too: a frozen layer above a trainable one keeps its activations as well. Layers below
    `lowest` have no backward pass and keep nothing anyway.
    """
    import functools

    from torch.utils.checkpoint import checkpoint

    for layer in family.layer_modules(model)[lowest:]:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
