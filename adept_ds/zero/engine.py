"""TODO zero.engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adept_ds.config.deepspeed import read_deepspeed_config


def zero_stage(engine: Any) -> int:
    return int(engine.zero_optimization_stage())


def ds_config(engine: Any) -> dict[str, Any]:
    """The configuration that the engine was made with, which may have been given as a file."""
    config = engine.config
    return dict(config) if isinstance(config, Mapping) else read_deepspeed_config(Path(config))


def client_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that steps this rank's partitions."""
    optimizer: torch.optim.Optimizer = engine.optimizer.optimizer
    return optimizer


def parameter_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by full name, also of partitioned ones."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}


def release(engine: Any) -> None:
    """Take DeepSpeed's hooks off an engine that is no longer used; its memory follows with the last reference."""
    if hasattr(engine, "destroy"):
        engine.destroy()


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) elements, also when they are partitioned."""
    sizes = [(p.requires_grad, getattr(p, "ds_numel", p.numel())) for p in model.parameters()]
    return sum(size for trains, size in sizes if trains), sum(size for _, size in sizes)
