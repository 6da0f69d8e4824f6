"""Loading models: straight into ZeRO-3 partitions where that stage is asked for, and what may train in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adept_ds.config import Config
from adept_ds.errors import InputError
from adept_ds.families import Family, family_of
from adept_ds.loss import install_row_losses


def resolve_precision(config: Config) -> torch.dtype:
    """`auto` is bf16 on an accelerator, where it is fast, and fp32 on a CPU, where it is emulated.

    Raises:
        InputError: the device cannot train in this precision.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator, precision = get_accelerator(), config.train.precision
    if precision == "auto":
        return torch.float32 if accelerator.device_name() == "cpu" else torch.bfloat16
    if precision == "fp16" and not accelerator.is_fp16_supported():
        raise InputError(
            f"train.precision: DeepSpeed does not train in fp16 on this device ({accelerator.device_name()}); "
            "use bf16 or fp32"
        )
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def load_causal_lm(model_dir: Path, dtype: torch.dtype, ds_config: dict[str, Any] | None = None) -> torch.nn.Module:
    """A frozen causal language model whose `forward(input_ids, labels)` returns summed losses per row.

    Args:
        ds_config: with ZeRO stage 3, each rank keeps only its partition from the first tensor on; None loads the
            whole model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    # Exists for as long as loading takes: transformers asks it whether to partition while it reads.
    zero3 = HfDeepSpeedConfig(ds_config) if ds_config is not None else None
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, local_files_only=True)
    del zero3
    model.requires_grad_(False)
    model.config.use_cache = False
    install_row_losses(model, *family_of(model_dir).logit_transform(model.config))
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
