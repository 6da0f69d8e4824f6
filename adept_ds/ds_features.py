"""Features of DeepSpeed under which unit-wise learning rates would be wrong, or are not known to be right.

Read from DeepSpeed 0.19.8 (runtime/config.py, runtime/zero/config.py and what they switch on). Refused at start, with
the reason, rather than trained with. Imports neither torch nor DeepSpeed: a configuration is checked before both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Unsupported:
    """A setting that is refused."""

    key: str
    """Dotted, in DeepSpeed's JSON."""
    reason: str
    off: tuple[Any, ...] = (None, False)
    """Values with which the feature is not used."""


_QUANTISED = "forward passes would see rounded weights, so that an expanded model is not the same function"
_UNTRIED = "nothing was ever trained with it here"

UNSUPPORTED = (
    Unsupported("zero_optimization.zenflow", "it steps chosen gradients apart from the others, outside the optimizer"),
    Unsupported("zero_optimization.offload_optimizer.super_offload", "it steps in another process, with its own Adam"),
    Unsupported("zero_optimization.offload_optimizer.ratio", "part of the optimizer stays on the device", (None, 1)),
    Unsupported("zero_optimization.cpu_offload", "it is an old name; write offload_optimizer: {device: cpu}"),
    Unsupported("zero_optimization.cpu_offload_param", "it is an old name; write offload_param: {device: cpu}"),
    Unsupported("zero_optimization.round_robin_gradients", "gradients lie in another order than their parameters"),
    Unsupported("zero_optimization.zero_quantized_gradients", "importances are products with exact gradients"),
    Unsupported("zero_optimization.zero_quantized_weights", _QUANTISED),
    Unsupported("zero_optimization.zero_quantized_nontrainable_weights", _QUANTISED),
    Unsupported("zero_optimization.zero_hpz_partition_size", _UNTRIED, (None, 0, 1)),
    Unsupported("weight_quantization", _QUANTISED),
    Unsupported("torch_autocast.enabled", "it decides precision by operation; precision is set for the whole model"),
    Unsupported("compile.deepcompile", "it reduces gradients in a graph of its own, where they cannot be read"),
    Unsupported("gradient_allreduce_op", "importances take gradients for means over ranks", (None, "mean")),
    Unsupported("managed_gradient_accumulation", "a refresh must say itself where an accumulation ends", (None, True)),
    Unsupported("tensor_parallel.autotp_size", "parameters are cut along a second axis", (None, 0, 1)),
    Unsupported("tensor_parallel.tp.tp_size", "parameters are cut along a second axis", (None, 0, 1)),
    Unsupported("expert_parallel.enabled", "ranks would hold different parameters"),
    Unsupported("sequence_parallel_size", "ranks would share sequences, not batches", (None, 0, 1)),
    Unsupported("data_efficiency.enabled", "it changes what a batch is, by its own sampler or by dropping tokens"),
    Unsupported("hybrid_engine.enabled", "it replaces the engine"),
    Unsupported("checkpoint.writer.decoupled", "a checkpoint would be published before it is whole"),
    Unsupported("datastates_ckpt", "a checkpoint would be published before it is whole"),
)

_OPTIMIZERS = {
    "onebitadam": "ranks exchange rounded momentum, and no rank ever holds the gradient",
    "zerooneadam": "ranks exchange rounded momentum, and no rank ever holds the gradient",
    "onebitlamb": "ranks exchange rounded momentum, and no rank ever holds the gradient",
    "muon": "DeepSpeed writes its update where the gradient lay, which is then no gradient",
}
"""By lower-case `optimizer.type`. Of any other kind, realised steps are rescaled (see `optim.attach_multipliers`)."""


def unsupported_feature(ds_config: Mapping[str, Any]) -> str | None:
    """What a DeepSpeed configuration asks for that cannot be had, in one line; None if there is nothing."""
    for feature in UNSUPPORTED:
        value = _lookup(ds_config, feature.key)
        if not any(value is off or (value == off and type(value) is not bool) for off in feature.off):
            return f"'{feature.key}' is {value!r}, which is not supported: {feature.reason}; remove it"
    for key in ("offload_optimizer", "offload_param"):
        path = f"zero_optimization.{key}.device"
        if _lookup(ds_config, path) == "nvme":
            return f"'{path}' is 'nvme', which is not supported: partitions are read in place; use 'cpu'"
    stage, device = (_lookup(ds_config, f"zero_optimization.{key}") for key in ("stage", "offload_optimizer.device"))
    if stage != 3 and device not in (None, "none"):
        return "'zero_optimization.offload_optimizer' is supported with stage 3 only; set stage to 3"
    optimizer = str(_lookup(ds_config, "optimizer.type")).lower()
    if optimizer in _OPTIMIZERS:
        return f"'optimizer.type' is '{optimizer}', which is not supported: {_OPTIMIZERS[optimizer]}; use AdamW"
    return None


def _lookup(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree
