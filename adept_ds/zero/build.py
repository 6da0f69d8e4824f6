"""DeepSpeed engines: for training, for gradients alone, and for forward passes alone.

The user's DeepSpeed file says how memory and communication are organised; batch sizes, precision, clipping and the
optimizer follow from the run's own configuration, so that no number has to be written twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adept_ds.models.device import current_device, free_unused
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.liger import Liger
from adept_ds.models.loading import Trains, checkpoint_activations, compile_layers, load_causal_lm
from adept_ds.ranks.collectives import Ranks
from adept_ds.zero.assumptions import check_assumptions
from adept_ds.zero.engine import Engine

MakeOptimizer = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
"""From the trainable parameters to the optimizer that steps their partitions."""


@dataclass(frozen=True)
class EngineSettings:
    """What all engines of a run have in common."""

    deepspeed: Mapping[str, Any]
    """The user's DeepSpeed configuration, merged with the run's (`config.deepspeed_merge.deepspeed_of_run`)."""
    precision: torch.dtype
    ranks: Ranks
    liger: Liger | None = None
    """Kernels, where they are not PyTorch's."""


@dataclass(frozen=True)
class StepShape:
    """How much one optimizer step takes in."""

    global_batch_size: int
    """Sequences of all micro-batches of all ranks."""
    micro_batch_size: int
    accumulation_steps: int
    clip_grad_norm: float = 0.0

    @classmethod
    def without_steps(cls, ranks: Ranks) -> StepShape:
        """For an engine that only ever computes gradients: what DeepSpeed needs to be told, and nothing uses."""
        return cls(ranks.world_size, 1, 1)


def without_state(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer for engines that never step."""
    return torch.optim.SGD(parameters, lr=0.0)


def build_training_engine(
    settings: EngineSettings,
    model_dir: ModelDirectory,
    trains: Trains,
    make_optimizer: MakeOptimizer = without_state,
    shape: StepShape | None = None,
    *,
    seed: int = 0,
    recompute_activations: bool = False,
    compiled: bool = False,
) -> Engine:
    """An engine in which that trains of the model which `trains` says, and everything else is frozen.

    Args:
        trains: `models.loading.layers_train(family, layers)`, `everything_trains()`, or a method's own.
        shape: of an optimizer step; None if none will be taken.
        seed: of dropout, which differs between ranks.
        recompute_activations: in the backward pass, from the lowest layer that gradients pass up.
        compiled: layers are (not under ZeRO-3).

    Raises:
        LayoutError: the installed DeepSpeed is not what this package was written against.
    """
    import deepspeed

    free_unused()
    torch.manual_seed(seed + settings.ranks.rank)
    config = training_ds_config(settings, shape or StepShape.without_steps(settings.ranks))
    is_zero3 = config["zero_optimization"]["stage"] == 3
    model = load_causal_lm(model_dir, settings.precision, config if is_zero3 else None, settings.liger)
    model.train()
    trains.prepare(model)
    if compiled:
        compile_layers(model, model_dir.family)
    if recompute_activations:
        checkpoint_activations(model, model_dir.family, trains.lowest_trainable_layer)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(trainable), config=config)
    built: Engine = engine
    check_assumptions(built)
    return built


def build_forward_engine(
    settings: EngineSettings, model_dir: ModelDirectory, prepare: Callable[[torch.nn.Module], None] | None = None
) -> tuple[Any, torch.device]:
    """A frozen model for forward passes, partitioned under ZeRO-3 when the run uses that stage.

    Returns something callable as `model(input_ids, labels)`, and its device.

    Args:
        prepare: changes the model before DeepSpeed puts its hooks on it.
    """
    import deepspeed

    free_unused()
    config = _forward_ds_config(settings)
    is_zero3 = config["zero_optimization"]["stage"] == 3 and settings.ranks.world_size > 1
    model = load_causal_lm(model_dir, settings.precision, config if is_zero3 else None, settings.liger)
    model.eval()
    if prepare:
        prepare(model)
    if not is_zero3:
        device = current_device()
        return model.to(device), device
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine, engine.device


def training_ds_config(settings: EngineSettings, shape: StepShape) -> dict[str, Any]:
    """The complete DeepSpeed configuration of an engine with an optimizer."""
    return _common_ds_config(settings) | {
        "train_batch_size": shape.global_batch_size,
        "train_micro_batch_size_per_gpu": shape.micro_batch_size,
        "gradient_accumulation_steps": shape.accumulation_steps,
        "gradient_clipping": shape.clip_grad_norm,
        # Importances are differences of small numbers: gradients are averaged and accumulated in fp32.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _forward_ds_config(settings: EngineSettings) -> dict[str, Any]:
    """ZeRO-3 without an optimizer; batch sizes mean nothing there, but DeepSpeed wants them."""
    common = _common_ds_config(settings)
    zero = {key: value for key, value in common["zero_optimization"].items() if key != "offload_optimizer"}
    batch = {"train_batch_size": settings.ranks.world_size, "train_micro_batch_size_per_gpu": 1}
    return common | {"zero_optimization": zero} | batch


def _common_ds_config(settings: EngineSettings) -> dict[str, Any]:
    """What holds with and without training."""
    user = dict(settings.deepspeed)
    bf16, fp16 = settings.precision == torch.bfloat16, settings.precision == torch.float16
    if bf16 and user["zero_optimization"]["stage"] == 1:
        # For this pair DeepSpeed takes an optimizer of another make, without ZeRO's partitions. Stage 2 computes the
        # same numbers.
        user["zero_optimization"] = user["zero_optimization"] | {"stage": 2}
    # DeepSpeed's own clock makes the host wait for the device twice in every micro-batch; the trainer has another.
    user["timers"] = {"throughput": {"enabled": False}} | user.get("timers", {})
    user.setdefault("steps_per_print", 1 << 30)
    user["bf16"] = user.pop("bfloat16", {}) | user.get("bf16", {})  # of two names, the old one
    return user | {
        # Whether the norm is a number is asked in every step; at stages 1 and 2 DeepSpeed would ask once more.
        "bf16": user["bf16"] | {"enabled": bf16, "check_grad_overflow": False},
        "fp16": user.get("fp16", {}) | {"enabled": fp16},
    }
