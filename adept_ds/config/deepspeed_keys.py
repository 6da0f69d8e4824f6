"""Keys and types of DeepSpeed's configuration, as far as they can be told without importing it.

DeepSpeed checks some of its sections by classes of its own, and those are asked later (`zero.user_config`). In the
others it reads what it knows and passes over the rest, so that a misspelt key is a default without a word: their keys
stand here, read from DeepSpeed 0.19.8.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adept_ds.base.errors import InputError
from adept_ds.config.mistakes import nearest, shown

AUTO = "auto"
"""What Hugging Face's Trainer takes for "as I am told elsewhere"."""

Keys = Mapping[str, "type | types.UnionType | frozenset[str] | Keys"]
"""What a section may hold: the type of a value, or the words that it can be, or the keys of a section inside it."""

_NUMBER = int | float | str
"""Or "auto"; which number it may be, the run's configuration says."""

SECTIONS: Keys = {
    "activation_checkpointing": {
        "contiguous_memory_optimization": bool,
        "cpu_checkpointing": bool,
        "number_checkpoints": int | None,
        "partition_activations": bool,
        "profile": bool,
        "synchronize_checkpoint_boundary": bool,
    },
    "aio": {
        "block_size": int,
        "intra_op_parallelism": int,
        "overlap_events": bool,
        "queue_depth": int,
        "single_submit": bool,
        "use_gds": bool,
    },
    "autotuning": dict,
    "bf16": dict,
    "bfloat16": dict,
    "checkpoint": {
        "checkpoint_serialization": bool,
        "load_universal": bool,
        "parallel_write": {"pipeline_stage": bool},
        "tag_validation": str,
        "use_node_local_storage": bool,
        "writer": {
            "data_parallel": str,
            "decoupled": bool,
            "io_buffer_double": bool,
            "io_buffer_size": int | float,
            "io_multiplier": int,
            "show_statistics": bool,
            "type": str,
        },
    },
    "comet": dict,
    "comms_logger": dict,
    "communication_data_type": str,
    "compile": dict,
    "csv_monitor": dict,
    "data_efficiency": {"data_routing": dict, "data_sampling": dict, "enabled": bool, "seed": int},
    "data_parallel_size": int,
    "data_types": {"grad_accum_dtype": str | None},
    "dataloader_drop_last": bool,
    "disable_allgather": bool,
    "disable_python_gc": bool,
    "dump_state": bool,
    "expert_parallel": dict,
    "flops_profiler": {
        "detailed": bool,
        "enabled": bool,
        "module_depth": int,
        "output_file": str | None,
        "profile_step": int,
        "recompute_fwd_factor": int | float,
        "top_modules": int,
    },
    "fp16": dict,
    "gradient_accumulation_steps": _NUMBER,
    "gradient_allreduce_op": str,
    "gradient_clipping": _NUMBER,
    "gradient_predivide_factor": int | float,
    "hybrid_engine": dict,
    "log_level": frozenset({"critical", "debug", "error", "info", "warning"}),
    "managed_gradient_accumulation": bool,
    "memory_breakdown": bool,
    "optimizer": {"legacy_fusion": bool, "params": dict, "type": str},
    "pipeline": {
        "activation_checkpoint_interval": int,
        "grad_partitioned": bool,
        "partition": str,
        "pipe_partitioned": bool,
        "seed_layers": bool,
        "stages": str | int,
    },
    "prescale_gradients": bool,
    "scheduler": {"params": dict, "type": str},
    "seq_parallel_communication_data_type": str,
    "sequence_parallel_size": int,
    "steps_per_print": int | None,
    "tensor_parallel": dict,
    "tensorboard": dict,
    "timers": {"throughput": dict},
    "torch_autocast": {"dtype": str, "enabled": bool, "lower_precision_safe_modules": list},
    "train_batch_size": _NUMBER,
    "train_micro_batch_size_per_gpu": _NUMBER,
    "use_data_before_expert_parallelism": bool,
    "vocabulary_size": int | None,
    "wall_clock_breakdown": bool,
    "wandb": dict,
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
    "zero_optimization": dict,
}
"""`dict` are those that have a class, are compared with the run's configuration, or are refused if they are on."""


_REMEDIES: dict[type, str] = {
    bool: "use true or false",
    dict: "write an object, {...}",
    float: "write a number",
    int: "write a whole number",
    list: "write a list, [...]",
    str: "write a text, in quotes",
}
"""By what a value can be; of several, the first here."""


def without_auto(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section without the keys, at any depth, whose value is "auto": DeepSpeed leaves such keys of a section that it
    has a class of at their defaults."""
    return {
        key: without_auto(value) if isinstance(value, Mapping) else value
        for key, value in section.items()
        if value != AUTO
    }


def check_keys(path: Path, tree: Mapping[str, Any], refused: Iterable[str]) -> None:
    """Every key of a DeepSpeed configuration, read from `path`, is one, as far as can be told without DeepSpeed.

    Args:
        refused: dotted keys that somebody else looks at.

    Raises:
        InputError: an unknown key, or a value of the wrong type.
    """
    others: dict[str, Any] = {key.split(".")[0]: object for key in refused}
    _check_section(f"deepspeed: '{path}'", "", tree, {**others, **SECTIONS})


def _check_section(name: str, section: str, values: Any, keys: Keys) -> None:
    if not isinstance(values, Mapping):
        raise InputError(f"{name}: '{section}' is {shown(values)}, which is no JSON object; write {{...}}")
    for key, value in values.items():
        path, expected = f"{section}.{key}" if section else key, keys.get(key)
        if expected is None:
            valid = sorted(each for each, kind in keys.items() if kind is not object)
            raise InputError(f"{name}: unknown key '{path}'; {nearest(key, valid, section)}")
        if isinstance(expected, Mapping):
            _check_section(name, path, value, expected)
        elif not _fits(value, expected):
            raise InputError(f"{name}: '{path}' is {shown(value)}; {_remedy(expected)}")


def _fits(value: Any, expected: Any) -> bool:
    if isinstance(expected, frozenset):
        return isinstance(value, str) and value in expected
    if isinstance(value, bool):  # which to Python is a number as well
        return expected in (bool, object)
    return isinstance(value, expected) and not (isinstance(value, float) and not math.isfinite(value))


def _remedy(expected: Any) -> str:
    if isinstance(expected, frozenset):
        return f"use {', '.join(sorted(expected))}"
    kinds = typing.get_args(expected) or (expected,)
    return next(remedy for kind, remedy in _REMEDIES.items() if kind in kinds)
