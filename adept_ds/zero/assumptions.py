"""What this package takes for granted of DeepSpeed's inside, and whether the installed one is like that.

Written against DeepSpeed 0.19.8 (runtime/engine.py, runtime/zero/stage3.py, stage_1_and_2.py, partition_parameters.py,
partitioned_param_coordinator.py). None of it is documented interface. Of a name that is no longer read by DeepSpeed,
setting it would go unnoticed: so all of them are looked for when an engine is made, before anything is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter

from adept_ds.base.errors import LayoutError
from adept_ds.zero.engine import Engine, zero_stage

WRITTEN_AGAINST = "0.19.8"

_OF_THE_ENGINE = (
    "_is_gradient_accumulation_boundary",
    "_copy_recovery_script",
    "checkpoint_engine.save",
    "optimizer.optimizer.state",
    "optimizer.loss_scale",
    "optimizer.zero_grad",
    "optimizer.state_dict",
    "optimizer.load_state_dict",
    "optimizer.set_gradient_accumulation_boundary",
    "optimizer._global_grad_norm",
    "optimizer._epilogue_ran_this_backward",
)
_OF_STAGES_1_AND_2 = (
    "optimizer.bit16_groups",
    "optimizer.single_partition_of_fp32_groups",
    "optimizer.averaged_gradients",
    "optimizer.all_grad_tensors",
    "optimizer.scaled_global_norm",
    "optimizer.update_lp_params",
)
_OF_STAGE_3 = (
    "optimizer.fp16_groups",
    "optimizer.fp32_partitioned_groups_flat",
    "optimizer.grad_position",
    "optimizer.get_param_id",
    "optimizer.grad_partitions_flat_buffer",
    "optimizer.micro_step_id",
    "optimizer.offload_optimizer",
    "optimizer.reset_cpu_buffers",
    "optimizer._get_norm_groups",
    "optimizer.checkpoint_event_prologue",
    "optimizer.checkpoint_event_epilogue",
    "optimizer.parameter_offload.partition_all_parameters",
    "optimizer.parameter_offload.persistent_parameters",
    "optimizer.parameter_offload.get_param_coordinator",
    "optimizer.parameter_offload.param_coordinator.is_invalid_trace",
    "optimizer.parameter_offload.param_coordinator._invalidate_trace",
    "optimizer.parameter_offload.param_coordinator._clear_trace_structures",
)
OF_ENGINES: Mapping[int, tuple[str, ...]] = {
    1: _OF_THE_ENGINE + _OF_STAGES_1_AND_2,
    2: _OF_THE_ENGINE + _OF_STAGES_1_AND_2,
    3: _OF_THE_ENGINE + _OF_STAGE_3,
}
"""By ZeRO stage, from an engine that trains."""

_OF_WHOLE_PARAMETERS = ("_hp_mapping",)
_OF_PARTITIONED_PARAMETERS = (
    "ds_id",
    "ds_numel",
    "ds_shape",
    "ds_tensor",
    "ds_secondary_tensor",
    "ds_status",
    "ds_persist",
    "ds_process_group",
    "ds_zero_param_process_group",
    "all_gather",
    "partition",
)
OF_PARAMETERS: Mapping[int, tuple[str, ...]] = {
    1: _OF_WHOLE_PARAMETERS,
    2: _OF_WHOLE_PARAMETERS,
    3: _OF_PARTITIONED_PARAMETERS,
}
"""By ZeRO stage, from a parameter that trains."""

OF_FRAGMENTS = ("_index_in_param_group", "_hp_mapping.lp_fragment_address", "_hp_mapping.hp_fragment_address")
"""At stages 1 and 2, from a parameter of which this rank steps something."""


def check_assumptions(engine: Engine) -> None:
    """Of an engine that trains, before its first pass.

    Raises:
        LayoutError: the installed DeepSpeed lacks something that training would look at or set.
    """
    stage = zero_stage(engine)
    _need(engine, OF_ENGINES[stage])
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            _need(parameter, OF_PARAMETERS[stage])
            if stage != 3 and attrgetter("_hp_mapping")(parameter) is not None:
                _need(parameter, OF_FRAGMENTS)


def _need(of: object, names: tuple[str, ...]) -> None:
    for name in names:
        try:
            attrgetter(name)(of)
        except AttributeError as error:
            raise LayoutError(layout_complaint(f"no {name}: {error}")) from error


def layout_complaint(detail: str) -> str:
    """Of a `LayoutError`."""
    import deepspeed

    return (
        f"DeepSpeed {deepspeed.__version__} is not inside as {WRITTEN_AGAINST}, which adept-ds was written against "
        f"({detail}); install deepspeed=={WRITTEN_AGAINST}"
    )
