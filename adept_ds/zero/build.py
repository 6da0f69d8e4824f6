"""DeepSpeed engines: the training engine, and the forward-only one for probing and evaluation.

The user's DeepSpeed file says how memory and communication are organised; batch sizes, precision, clipping and the
optimizer follow from the run's own configuration, so that no number has to be written twice.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from adept_ds.config.checks import accumulation_steps
from adept_ds.config.deepspeed import check_deepspeed_config
from adept_ds.config.schema import Config
from adept_ds.models.device import resolve_precision
from adept_ds.models.families import Family
from adept_ds.models.loading import checkpoint_activations, load_causal_lm, make_layers_trainable
from adept_ds.ranks.collectives import rank, world_size
from adept_ds.units.adamw import UnitAdamW
from adept_ds.units.registry import UnitRegistry, build_registry
from adept_ds.zero.engine import parameter_shapes


def training_ds_config(config: Config) -> dict[str, Any]:
    """The complete DeepSpeed configuration of a run."""
    return _base_ds_config(config) | {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(config.train, world_size()),
        "gradient_clipping": config.train.clip_grad_norm,
        # Importances are differences of small numbers: gradients are averaged and accumulated in fp32.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _base_ds_config(config: Config) -> dict[str, Any]:
    """What holds with and without training."""
    user = check_deepspeed_config(config)
    precision = resolve_precision(config)
    bf16, fp16 = precision == torch.bfloat16, precision == torch.float16
    if bf16 and user["zero_optimization"]["stage"] == 1:
        # For this pair DeepSpeed takes an optimizer of another make, without ZeRO's partitions. Stage 2 computes the
        # same numbers.
        user = user | {"zero_optimization": user["zero_optimization"] | {"stage": 2}}
    return user | {"bf16": {"enabled": bf16}, "fp16": {"enabled": fp16}, "steps_per_print": 1 << 30}


def _forward_ds_config(config: Config) -> dict[str, Any]:
    """ZeRO-3 without an optimizer; batch sizes mean nothing there, but DeepSpeed wants them."""
    base = _base_ds_config(config)
    zero = {key: value for key, value in base["zero_optimization"].items() if key != "offload_optimizer"}
    return base | {"zero_optimization": zero, "train_batch_size": world_size(), "train_micro_batch_size_per_gpu": 1}


def build_forward_engine(
    config: Config, model_dir: Path, prepare: Callable[[torch.nn.Module], None] | None = None
) -> tuple[Any, torch.device]:
    """A frozen model for forward passes, partitioned under ZeRO-3 when the run uses that stage.

    Returns something callable as `model(input_ids, labels)`, and its device.

    Args:
        prepare: changes the model before DeepSpeed puts its hooks on it.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    _free_unused()
    ds_config = _forward_ds_config(config)
    is_zero3 = ds_config["zero_optimization"]["stage"] == 3 and world_size() > 1
    model = load_causal_lm(model_dir, resolve_precision(config), ds_config if is_zero3 else None)
    model.eval()
    if prepare:
        prepare(model)
    if not is_zero3:
        device = torch.device(get_accelerator().current_device_name())
        return model.to(device), device
    engine, *_ = deepspeed.initialize(model=model, config=ds_config)
    engine.eval()
    return engine, engine.device


def build_training_engine(
    config: Config, model_dir: Path, family: Family, layers: Sequence[int], *, plain_sgd: bool = False
) -> tuple[Any, Any, UnitRegistry]:
    """An engine in which `layers` train and everything else is frozen; with its optimizer and the units of `layers`.

    Args:
        plain_sgd: an optimizer without state, for an engine that only ever computes gradients.
    """
    import deepspeed

    _free_unused()
    torch.manual_seed(config.train.seed + rank())  # dropout differs between ranks
    ds_config = training_ds_config(config)
    is_zero3 = ds_config["zero_optimization"]["stage"] == 3
    model = load_causal_lm(model_dir, resolve_precision(config), ds_config if is_zero3 else None)
    model.train()
    make_layers_trainable(model, family, layers)
    if config.train.activation_checkpointing:
        checkpoint_activations(model, family, min(layers))
    registry = build_registry(family, parameter_shapes(model), layers, config.importance.granularity, model.config)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer
    if plain_sgd:
        optimizer = torch.optim.SGD(trainable, lr=0.0)
    else:
        optimizer = UnitAdamW(
            trainable,
            lr=config.train.lr,
            betas=config.train.betas,
            eps=config.train.eps,
            weight_decay=config.train.weight_decay,
        )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    return engine, optimizer, registry


def _free_unused() -> None:
    """Before a model is loaded: an engine that was released is part of reference cycles, and still holds its memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
