"""Where parameters lie in DeepSpeed's flat partitions.

Written against DeepSpeed 0.19.8 (runtime/zero/stage3.py, stage_1_and_2.py). None of what is read here is documented
interface, so `partition_layout` checks every assumption at start and refuses with a `LayoutError` rather than multiply
a wrong element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from adept_ds.base.errors import LayoutError
from adept_ds.zero.assumptions import layout_complaint
from adept_ds.zero.engine import Engine, zero_stage


@dataclass(frozen=True)
class Fragment:
    """A run of one parameter's elements that lies contiguously in this rank's flat partition."""

    parameter: str
    flat_start: int
    """First element in the flat fp32 partition."""
    param_start: int
    """First element in the flattened parameter."""
    numel: int

    @property
    def flat(self) -> slice:
        """Where it lies in the partition."""
        return slice(self.flat_start, self.flat_start + self.numel)

    @property
    def param_stop(self) -> int:
        return self.param_start + self.numel


@dataclass(frozen=True)
class FlatPartition:
    """One tensor that DeepSpeed hands to the optimizer: this rank's part of many parameters, back to back."""

    tensor: torch.Tensor
    fragments: tuple[Fragment, ...]


def partition_layout(engine: Engine) -> list[FlatPartition]:
    """Where each trainable parameter lies in this rank's flat fp32 partitions; padding belongs to no fragment.

    Raises:
        LayoutError: DeepSpeed lays partitions out in another way than this module was written for.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    try:
        layout = _layout_stage3(engine, names) if zero_stage(engine) == 3 else _layout_stage12(engine, names)
    except (AttributeError, KeyError, TypeError) as error:
        raise LayoutError(layout_complaint(f"{type(error).__name__}: {error}")) from error
    for partition in layout:
        end = 0
        for fragment in partition.fragments:
            if fragment.flat_start < end or fragment.flat_start + fragment.numel > partition.tensor.numel():
                raise LayoutError(
                    layout_complaint(f"'{fragment.parameter}' overlaps its neighbour or the end of its partition")
                )
            end = fragment.flat_start + fragment.numel
    return layout


def trained_weights_are_finite(engine: Engine) -> bool:
    """Whether the weights that this rank steps are numbers; waits for the device.

    Padding does not count: stage 3 leaves in it whatever the memory held.
    """
    layout = partition_layout(engine)
    weights = [partition.tensor[fragment.flat] for partition in layout for fragment in partition.fragments]
    largest = [torch.linalg.vector_norm(weight, math.inf) for weight in weights]
    return not largest or bool(torch.stack(largest).isfinite().all())


def _layout_stage3(engine: Engine, names: dict[int, str]) -> list[FlatPartition]:
    """Stage 3 cuts each parameter separately; the last rank's part of it ends in padding."""
    import deepspeed.comm as dist

    zero = engine.optimizer
    layout = []
    for index, group in enumerate(zero.fp16_groups):
        flat, fragments, total = zero.fp32_partitioned_groups_flat[index], [], 0
        for parameter in group:
            _, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
            start = dist.get_rank(group=parameter.ds_process_group) * padded
            real = max(0, min(padded, parameter.ds_numel - start))
            total += padded
            if real:
                fragments.append(Fragment(names[id(parameter)], offset, start, real))
        if total != flat.numel():
            raise LayoutError(
                layout_complaint(f"sub-group {index} has {flat.numel()} elements, its parameters {total}")
            )
        layout.append(FlatPartition(flat, tuple(fragments)))
    return layout


def _layout_stage12(engine: Engine, names: dict[int, str]) -> list[FlatPartition]:
    """Stages 1 and 2 cut the concatenation of all parameters, so a boundary falls inside at most one per rank."""
    zero = engine.optimizer
    layout = []
    for index, group in enumerate(zero.bit16_groups):
        fragments = []
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                flat, part = mapping.hp_fragment_address, mapping.lp_fragment_address
                fragments.append(Fragment(names[id(parameter)], flat.start, part.start, part.numel))
        flat_tensor = zero.single_partition_of_fp32_groups[index]
        layout.append(FlatPartition(flat_tensor, tuple(sorted(fragments, key=lambda fragment: fragment.flat_start))))
    return layout
