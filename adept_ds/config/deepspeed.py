"""DeepSpeed's configuration: how it is read, and what is refused.

Refused, with the reason, are features under which unit-wise learning rates would be wrong, or are not known to be
right; read from DeepSpeed 0.19.8 (runtime/config.py, runtime/zero/config.py and what they switch on). Imports neither
torch nor DeepSpeed: a configuration is checked before both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hjson

from adept_ds.base.errors import InputError
from adept_ds.config.deepspeed_keys import check_keys, without_auto
from adept_ds.config.files import read_small_file
from adept_ds.config.mistakes import shown


def read_deepspeed_config(path: Path | None) -> dict[str, Any]:
    """DeepSpeed's configuration as a dictionary (comments allowed, as in DeepSpeed itself)."""
    if path is None:
        return {"zero_optimization": {"stage": 3}}
    text = read_small_file(path, f"deepspeed: '{path}'", "give a file such as ds_configs/zero3.json")
    try:
        tree = hjson.loads(text, object_pairs_hook=_without_twins)
    except RecursionError:
        raise InputError(f"deepspeed: '{path}' is nested too deeply; write it flat") from None
    except Exception as error:  # its parser has more than one kind of them for odd texts
        raise InputError(f"deepspeed: '{path}' is not valid JSON: {error}; correct it") from None
    if not isinstance(tree, dict):
        raise InputError(f"deepspeed: '{path}' holds no JSON object; give a file such as ds_configs/zero3.json")
    return tree


def _without_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Raises `ValueError`: a key stands twice, of which the last would win."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        twin = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key '{twin}' stands twice in one object")
    return dict(pairs)


@dataclass(frozen=True)
class Unsupported:
    """A setting that is refused."""

    key: str
    """Dotted, in DeepSpeed's JSON."""
    reason: str
    off: tuple[Any, ...] = (None, False)
    """Values with which the feature is not used."""
    stages: tuple[int, ...] = (1, 2, 3)
    """Of ZeRO, at which it matters."""
    run_only: bool = False
    """Harmless to `UnitLR` on an engine of the user's own; a run cannot take it."""


_QUANTISED = "forward passes would see rounded weights, so that an expanded model is not the same function"


_WHOLE_WEIGHTS = "weights are split at stage 3 only, and it would have no effect"


_LOW_MASTERS = "steps of small multipliers would be rounded away without fp32 master weights"


_SAMPLERS = "it changes what a batch is, by its own sampler or by dropping tokens"


_LEAF = "a leaf module that reads nothing but frozen layers is released before its own backward pass"


_RENAMED = "rank 0 renames a checkpoint once it is saved, and sees no other host's disk"


_WRITTEN = "a run writes the files of checkpoints itself, and says in a manifest what they are"


_REMOVED = "DeepSpeed has removed it, and refuses to start while it is there"


_MOE_BLOCKS = [
    "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
    "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
    "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
]
"""DeepSpeed's default for leaf modules."""


UNSUPPORTED = (
    Unsupported("zero_optimization.zenflow", "it steps chosen gradients apart from the others, outside the optimizer"),
    Unsupported("zero_optimization.offload_optimizer.super_offload", "it steps in another process, with its own Adam"),
    Unsupported("zero_optimization.offload_optimizer.ratio", "part of the optimizer stays on the device", (None, 1)),
    Unsupported("zero_optimization.cpu_offload", "it is an old name; write offload_optimizer: {device: cpu}"),
    Unsupported("zero_optimization.cpu_offload_param", "it is an old name; write offload_param: {device: cpu}"),
    Unsupported(
        "zero_optimization.round_robin_gradients",
        "DeepSpeed records where parameters lie as if it had not reordered them",
        stages=(1, 2),
    ),
    Unsupported("zero_optimization.zero_quantized_gradients", "importances are products with exact gradients"),
    Unsupported("zero_optimization.zero_quantized_nontrainable_weights", "frozen weights would be kept rounded alone"),
    Unsupported("zero_optimization.zero_quantized_weights", _WHOLE_WEIGHTS, stages=(1, 2)),
    Unsupported("zero_optimization.zero_hpz_partition_size", _WHOLE_WEIGHTS, (None, 0, 1), (1, 2)),
    Unsupported(
        "zero_optimization.elastic_checkpoint",
        "it saves an optimizer without its parameter groups, which hold the multipliers",
    ),
    Unsupported(
        "zero_optimization.load_from_fp32_weights",
        "steps of small multipliers would be lost where weights come back in low precision",
        (None, True),
        stages=(1, 2),
    ),
    Unsupported("fp16.fp16_master_weights_and_grads", _LOW_MASTERS),
    Unsupported("bf16.bf16_master_weights_and_grads", _LOW_MASTERS),
    Unsupported("bfloat16.bf16_master_weights_and_grads", _LOW_MASTERS),
    Unsupported("bf16.bf16_optimizer_states", _LOW_MASTERS),
    Unsupported("bfloat16.bf16_optimizer_states", _LOW_MASTERS),
    Unsupported("weight_quantization", _QUANTISED),
    Unsupported("torch_autocast.enabled", "it decides precision by operation; precision is set for the whole model"),
    Unsupported("compile.deepcompile", "it reduces gradients in a graph of its own, where they cannot be read"),
    Unsupported(
        "zero_optimization.compute_grad_norm", "the norm is in the log of each step", (None, True), run_only=True
    ),
    Unsupported("gradient_allreduce_op", "importances take gradients for means over ranks", (None, "mean")),
    Unsupported(
        "gradient_predivide_factor",
        "stage 3 does not undo it where it equals the number of ranks, and gradients come out too small",
        (None, 1),
        stages=(3,),
    ),
    Unsupported("managed_gradient_accumulation", "a refresh must say itself where an accumulation ends", (None, True)),
    Unsupported("tensor_parallel.autotp_size", "parameters are cut along a second axis", (None, 0, 1)),
    Unsupported("tensor_parallel.tp.tp_size", "parameters are cut along a second axis", (None, 0, 1)),
    Unsupported("expert_parallel.enabled", "ranks would hold different parameters"),
    Unsupported("sequence_parallel_size", "ranks would share sequences, not batches", (None, 0, 1)),
    Unsupported("data_efficiency.enabled", _SAMPLERS),
    Unsupported("data_efficiency.data_sampling.curriculum_learning.enabled", _SAMPLERS),  # DeepSpeed asks for no other
    Unsupported("data_efficiency.data_routing.random_ltd.enabled", _SAMPLERS),
    Unsupported("hybrid_engine.enabled", "it replaces the engine"),
    Unsupported("checkpoint.writer.decoupled", "a checkpoint would be published before it is whole"),
    Unsupported("checkpoint.writer", _WRITTEN, (None, {}), run_only=True),
    Unsupported("checkpoint.checkpoint_serialization", _WRITTEN, (None, True), run_only=True),
    Unsupported("datastates_ckpt", "a checkpoint would be published before it is whole"),
    Unsupported("checkpoint.use_node_local_storage", _RENAMED, run_only=True),
    Unsupported("checkpoint.load_universal", "a run resumes from its own checkpoints as they are", run_only=True),
    Unsupported("autotuning.enabled", "it ends the process after a few steps", run_only=True),
    Unsupported("zero_optimization.leaf_module.classes", _LEAF, (None, [], _MOE_BLOCKS), (3,), run_only=True),
    Unsupported("zero_optimization.leaf_module.names", _LEAF, (None, []), (3,), run_only=True),
    Unsupported("zero_optimization.leaf_module.name_suffixes", _LEAF, (None, []), (3,), run_only=True),
    Unsupported("zero_optimization.module_granularity_threshold", _LEAF, (None, 0), (3,), run_only=True),
    Unsupported("zero_optimization.stage3_module_granularity_threshold", _LEAF, (None, 0), (3,), run_only=True),
    *(
        Unsupported(key, _REMOVED, (None,))
        for key in (
            "amp",
            "compression_training",
            "curriculum_learning",
            "eigenvalue",
            "elasticity",
            "graph_harvesting",
            "nebula",
            "progressive_layer_drop",
            "quantize_training",
            "sparse_attention",
            "sparse_gradients",
            "zero_optimization.mics_hierarchical_params_gather",
            "zero_optimization.mics_shard_size",
            "zero_optimization.zeropp_loco_param",
        )
    ),
)


_NORMS = "it scales steps by the norm of a tensor, which under ZeRO is a slice of many parameters and padding"


_OPTIMIZERS = {
    "onebitadam": "ranks exchange rounded momentum, and no rank ever holds the gradient",
    "zerooneadam": "ranks exchange rounded momentum, and no rank ever holds the gradient",
    "onebitlamb": "ranks exchange rounded momentum, and no rank ever holds the gradient",
    "muon": "DeepSpeed writes its update where the gradient lay, which is then no gradient",
    "lamb": _NORMS,
    "adafactor": _NORMS,
}
"""By lower-case `optimizer.type`. Of any other kind, realised steps are rescaled (`attach_multipliers`)."""


def unsupported_feature(ds_config: Mapping[str, Any], *, whole_run: bool = False) -> str | None:
    """What a DeepSpeed configuration asks for that cannot be had, in one line; None if there is nothing.

    Args:
        whole_run: also what only the rest of a run cannot take (see `Unsupported.run_only`).
    """
    stage = _lookup(ds_config, "zero_optimization.stage")
    for feature in UNSUPPORTED:
        if (feature.run_only and not whole_run) or (stage in (1, 2, 3) and stage not in feature.stages):
            continue
        value = _lookup(ds_config, feature.key)
        if not any(value is off or (value == off and type(value) is not bool) for off in feature.off):
            return f"'{feature.key}' is {value!r}, which is not supported: {feature.reason}; remove it"
    for key in ("offload_optimizer", "offload_param"):
        path = f"zero_optimization.{key}"
        device = _lookup(ds_config, f"{path}.device")
        if device == "nvme":
            return f"'{path}.device' is 'nvme', which is not supported: partitions are read in place; use 'cpu'"
        if stage in (1, 2) and device not in (None, "none"):
            return f"'{path}' is supported with stage 3 only; set stage to 3"
    optimizer = str(_lookup(ds_config, "optimizer.type")).lower()
    if optimizer in _OPTIMIZERS:
        return f"'optimizer.type' is '{optimizer}', which is not supported: {_OPTIMIZERS[optimizer]}; use AdamW"
    if not stage:
        return "'zero_optimization.stage' is 0 or missing: there are no flat partitions to step; use stage 1, 2 or 3"
    accumulated = _lookup(ds_config, "data_types.grad_accum_dtype")
    bf16 = any(_lookup(ds_config, f"{section}.enabled") for section in ("bf16", "bfloat16"))
    if not whole_run and stage == 1 and bf16 and accumulated in ("fp32", "float32", "float", "torch.float32"):
        return (
            f"'data_types.grad_accum_dtype' is {accumulated!r}, for which DeepSpeed takes an optimizer without ZeRO's "
            "partitions in bf16 at stage 1; use stage 2, which computes the same"
        )
    return None


def _lookup(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def check_deepspeed_file(path: Path | None) -> dict[str, Any]:
    """The user's DeepSpeed configuration, read and checked by itself; plain ZeRO-3 without a file.

    "auto" still stands in it: see `config.deepspeed_merge`.

    Raises:
        InputError: a key that nobody knows; or a ZeRO stage or feature that is not supported.
    """
    user = read_deepspeed_config(path)
    if path is None:
        return user
    check_keys(path, user, [feature.key for feature in UNSUPPORTED])
    stage = _lookup(user, "zero_optimization.stage")
    if type(stage) is not int or stage not in (1, 2, 3):
        raise InputError(f"deepspeed: zero_optimization.stage is {shown(stage)}; adept-ds trains with stage 1, 2 or 3")
    refusal = unsupported_feature(user | {"zero_optimization": without_auto(user["zero_optimization"])}, whole_run=True)
    if refusal:
        raise InputError(f"deepspeed: '{path}': {refusal}")
    return user
