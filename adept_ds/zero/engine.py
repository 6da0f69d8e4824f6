"""What is asked of a DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from adept_ds.config.deepspeed import read_deepspeed_config


class Engine(Protocol):
    """A DeepSpeed engine for training, as far as this program uses it. Everything but the last four is public."""

    module: torch.nn.Module
    device: torch.device
    micro_steps: int
    config: Any
    """DeepSpeed's configuration: a dictionary, or the path of its file."""

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any: ...
    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool = True) -> Any: ...
    def step(self) -> Any: ...
    def get_global_grad_norm(self) -> Any: ...
    def gradient_accumulation_steps(self) -> int: ...
    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None: ...
    def is_gradient_accumulation_boundary(self) -> bool: ...
    def zero_optimization_stage(self) -> int: ...
    def zero_offload_param(self) -> Any: ...
    def save_checkpoint(self, save_dir: str, tag: str, **options: Any) -> Any: ...
    def destroy(self) -> None: ...

    optimizer: Any
    """ZeRO's optimizer, which this package alone looks into."""
    _is_gradient_accumulation_boundary: bool | None
    checkpoint_engine: Any
    """What writes the files of a checkpoint."""
    _copy_recovery_script: Any


def zero_stage(engine: Engine) -> int:
    return int(engine.zero_optimization_stage())


def ds_config(engine: Engine) -> dict[str, Any]:
    """The configuration that the engine was made with, which may have been given as a file."""
    config = engine.config
    return dict(config) if isinstance(config, Mapping) else read_deepspeed_config(Path(config))


def client_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """The optimizer that steps this rank's partitions."""
    optimizer: torch.optim.Optimizer = engine.optimizer.optimizer
    return optimizer


def set_learning_rate(engine: Engine, lr: float) -> None:
    for group in client_optimizer(engine).param_groups:
        group["lr"] = lr


def parameter_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by full name, also of partitioned ones."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) elements, also when they are partitioned."""
    sizes = [(p.requires_grad, getattr(p, "ds_numel", p.numel())) for p in model.parameters()]
    return sum(size for trains, size in sizes if trains), sum(size for _, size in sizes)


def release(engine: Engine | torch.nn.Module) -> None:
    """Take DeepSpeed's hooks off an engine that is no longer used; its memory follows with the last reference.

    hpZ's groups of ranks go with it: DeepSpeed makes them for each model that it loads, and refuses to while there are
    others (0.19.8: utils/groups.py, _create_zero_param_parallel_group).
    """
    if not hasattr(engine, "destroy"):
        return
    module: Any = engine.module
    groups = {getattr(parameter, "ds_zero_param_process_group", None) for parameter in module.parameters()} - {None}
    engine.destroy()  # type: ignore[operator]
    for group in groups:
        import deepspeed.comm as dist

        dist.destroy_process_group(group)
