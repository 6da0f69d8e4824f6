"""The user's DeepSpeed file before DeepSpeed's own classes: at the start, instead of in the middle of a run."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime.config import DeepSpeedConfig, HybridEngineConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, ValidationError

from adept_ds.base.errors import InputError
from adept_ds.config.deepspeed_keys import AUTO
from adept_ds.config.deepspeed_merge import check_precision
from adept_ds.config.mistakes import Mistake, mistakes_in, nearest, shown
from adept_ds.models.device import device_name, name_of_precision, resolve_precision

CLASSES: dict[str, type[BaseModel]] = {
    "bf16": DeepSpeedBF16Config,
    "bfloat16": DeepSpeedBF16Config,
    "comet": CometConfig,
    "comms_logger": CommsLoggerConfig,
    "compile": CompileConfig,
    "csv_monitor": CSVConfig,
    "fp16": DeepSpeedFP16Config,
    "hybrid_engine": HybridEngineConfig,
    "tensor_parallel": TPTrainingConfig,
    "tensorboard": TensorBoardConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
    "wandb": WandbConfig,
    "zero_optimization": DeepSpeedZeroConfig,
}
"""By section."""


def check_user_config(path: Path, tree: Mapping[str, Any], precision: str = AUTO) -> None:
    """DeepSpeed takes the configuration, on this device.

    Args:
        path: where it was read, for messages.
        tree: as `config.deepspeed_merge.deepspeed_of_run` returned it.
        precision: `train.precision`.

    Raises:
        InputError: it does not; one line with the key, the value and what it should be.
    """
    check_on_any_device(path, tree)
    _check_device(path, tree, precision)


def check_on_any_device(path: Path, tree: Mapping[str, Any]) -> None:
    """As far as it does not depend on the device; raises as `check_user_config`."""
    name = f"deepspeed: '{path}'"
    for section, of_class in CLASSES.items():
        values: Any = tree
        for key in section.split("."):
            values = values.get(key, {})
        _check_by_class(name, section, values, of_class)
    _check_whole(name, tree)


def _check_device(path: Path, tree: Mapping[str, Any], precision: str) -> None:
    """What only a process with torch can tell."""
    device, zero = device_name(), DeepSpeedZeroConfig(**tree["zero_optimization"])
    if zero.zero_quantized_weights and device != "cuda":
        raise InputError(
            f"deepspeed: '{path}': 'zero_optimization.zero_quantized_weights' is True, which needs DeepSpeed's kernels "
            f"for CUDA, but this device is '{device}'; remove it"
        )
    if precision == AUTO:
        here = name_of_precision(resolve_precision(AUTO))
        check_precision(path, tree, here, f"auto, which is {here} on this device ('{device}')")


def _check_by_class(name: str, section: str, values: Mapping[str, Any], of_class: type[BaseModel]) -> None:
    try:
        of_class(**values)
    except ValidationError as error:
        raise InputError(f"{name}: {_described(mistakes_in(error)[0], section, of_class)}") from None
    except Exception as error:  # its checks of what goes together raise what they like
        raise InputError(f"{name}: DeepSpeed refuses '{section}': {error}; correct it") from None
    for path, value in _booleans(values):
        if bool not in _types_at(of_class, path):
            raise InputError(f"{name}: '{section}.{'.'.join(path)}' is {value!r}; write a number or a text")


def _described(mistake: Mistake, section: str, of_class: type[BaseModel]) -> str:
    inner = [str(part) for part in mistake.location]
    key = ".".join([section, *inner])
    if mistake.kind == "extra_forbidden":
        siblings = _fields_at(of_class, inner[:-1])
        return f"unknown key '{key}'; {nearest(inner[-1], siblings, '.'.join([section, *inner[:-1]]))}"
    if mistake.kind in ("model_type", "model_attributes_type"):
        return f"'{key}' is {shown(mistake.value)}, which is no JSON object; write {{...}}"
    if mistake.kind == "value_error":
        return f"'{key}': {mistake.message}; correct it"
    return f"'{key}' is {shown(mistake.value)}, which is not possible: {mistake.message}"


def _check_whole(name: str, tree: Mapping[str, Any]) -> None:
    """What DeepSpeed checks of the whole, with batch sizes that fit any number of ranks."""
    try:
        DeepSpeedConfig(dict(tree) | {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1})
    except Exception as error:  # of many kinds
        reason = str(error) or type(error).__name__
        raise InputError(f"{name}: DeepSpeed refuses it: {reason}; correct it") from None


def _fields_at(of_class: type[BaseModel], path: Sequence[str]) -> dict[str, Any]:
    """Annotation by key, aliases included, of a section inside a section."""
    fields: dict[str, Any] = {}
    for name, field in of_class.model_fields.items():
        fields |= dict.fromkeys((key for key in (name, field.alias) if key), field.annotation)
    if not path:
        return fields
    inner = [each for each in _alternatives(fields.get(path[0])) if _is_model(each)]
    return _fields_at(inner[0], path[1:]) if inner else {}


def _types_at(of_class: type[BaseModel], path: list[str]) -> tuple[Any, ...]:
    return _alternatives(_fields_at(of_class, path[:-1]).get(path[-1], bool))


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) or (annotation,)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _booleans(values: Mapping[str, Any]) -> Iterable[tuple[list[str], bool]]:
    """Where a section, or one inside it, has true or false: to DeepSpeed's classes they are numbers as well."""
    for key, value in values.items():
        if isinstance(value, bool):
            yield [key], value
        elif isinstance(value, Mapping):
            yield from (([key, *path], inner) for path, inner in _booleans(value))
