"""Unit-wise learning rates on a DeepSpeed engine: bind multipliers to the partitions, refresh them, compare ranks.

Works alone, with any model and optimizer (see docs/unit_lr.md):

    units = UnitLR(engine, {"model.embed_tokens.weight": "embeddings", ...})
    units.set({"embeddings": 0.1, ...})
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch

from adept_ds.base.errors import InputError, UnitMismatchError
from adept_ds.config.deepspeed import unsupported_feature
from adept_ds.config.rate_sections import LrPolicySection
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.groups import joined
from adept_ds.units.adamw import UnitAdamW
from adept_ds.units.lr_policy import multipliers_from_importance, smooth
from adept_ds.units.multipliers import attach_multipliers
from adept_ds.units.registry import UnitRegistry
from adept_ds.units.segments import UnitSlice
from adept_ds.zero.engine import Engine, client_optimizer, ds_config, parameter_shapes
from adept_ds.zero.layout import Fragment, partition_layout

OTHERS = "others"
"""The unit of trainable parameters that a mapping leaves out: their multiplier is 1 unless it is set."""


class UnitLR:
    """The multipliers of one training run.

    Args:
        engine: from `deepspeed.initialize`, ZeRO stage 1, 2 or 3. With `UnitAdamW` as its optimizer multipliers cost
            next to nothing; on any other they cost a transient copy of what is stepped.
        units: a registry, or {full name of a parameter: unit}.
        policy: how `refresh` maps importances to multipliers.
        ranks: of the run; None for those of the process group that there is.
        lr_ratios: by full name of a parameter, its learning rate over that of its units, beside whatever multipliers
            these have; 1 for those that are not named.

    Raises:
        InputError: the engine uses a feature of DeepSpeed under which multipliers would not hold.
        LayoutError: DeepSpeed lays out partitions in another way than `zero` was written for.
        ValueError: `units` names a parameter that the model has not, or `lr_ratios` one that belongs to no unit.
    """

    def __init__(
        self,
        engine: Engine,
        units: UnitRegistry | Mapping[str, str],
        policy: LrPolicySection | None = None,
        ranks: Ranks | None = None,
        lr_ratios: Mapping[str, float] | None = None,
    ) -> None:
        refusal = unsupported_feature(ds_config(engine))
        if refusal:
            raise InputError(f"deepspeed: {refusal}")
        self.registry = units if isinstance(units, UnitRegistry) else _registry_of(engine, units)
        self._policy = policy or LrPolicySection()
        self._ranks = ranks or joined()
        self._lr_ratios = dict(lr_ratios or {})
        unknown = self._lr_ratios.keys() - self.registry.placements.keys()
        if unknown:
            raise ValueError(f"parameter '{min(unknown)}' has a ratio of learning rates and belongs to no unit")
        client = client_optimizer(engine)
        self._multipliers = client.multipliers if isinstance(client, UnitAdamW) else attach_multipliers(client)
        self._multipliers.name_units(self.registry.names)
        for partition in partition_layout(engine):
            slices = [unit_slice for fragment in partition.fragments for unit_slice in self._slices_of(fragment)]
            self._multipliers.bind(partition.tensor, slices)

    @property
    def multipliers(self) -> list[float]:
        """In registry order."""
        return self._multipliers.in_order

    @property
    def map_bytes(self) -> int:
        """Memory that this rank uses to know which element belongs to which unit."""
        return self._multipliers.map_bytes

    def set(self, multipliers: Mapping[str, float]) -> None:
        """Put multipliers into effect; units that are not named keep theirs.

        Raises:
            ValueError: an unknown unit.
            UnitMismatchError: another rank was given other multipliers.
        """
        self._multipliers.set(self._multipliers.values | dict(multipliers))
        self.check_ranks_agree()

    def refresh(self, importance: Sequence[float], domain: Sequence[float] | None = None) -> list[float]:
        """Map importances (registry order) to multipliers, put them into effect, and check that all ranks agree.

        Args:
            importance: for general competence.
            domain: for the domain; the map `ratio` needs both.
        """
        if self._policy.smoothing:
            smoothed = smooth(
                self._multipliers.smoothed_importance, [*importance, *(domain or ())], self._policy.smoothing
            )
            self._multipliers.smoothed_importance = smoothed
            importance, domain = smoothed[: len(importance)], smoothed[len(importance) :] if domain else None
        self._multipliers.vector = multipliers_from_importance(importance, self.registry.units, self._policy, domain)
        self.check_ranks_agree()
        return self.multipliers

    def check_ranks_agree(self) -> None:
        """Raises `UnitMismatchError`, naming the unit, if a rank holds another multiplier than rank 0.

        A digest travels; the multipliers themselves only to say who disagrees.
        """
        if self._ranks.all_equal(_digest(self._multipliers.vector)):
            return
        held = self._ranks.gather(self.multipliers)
        for rank, multipliers in enumerate(held):
            for unit, value, expected in zip(self.registry.names, multipliers, held[0], strict=True):
                if value != expected:
                    raise UnitMismatchError(
                        f"unit '{unit}' has multiplier {value!r} on rank {rank} but {expected!r} on rank 0; "
                        "every rank must compute or set the same"
                    )

    def _slices_of(self, fragment: Fragment) -> Iterator[UnitSlice]:
        end, ratio = fragment.param_start + fragment.numel, self._lr_ratios.get(fragment.parameter, 1.0)
        for part, first, last, offset in self.registry.parts(fragment.parameter, fragment.param_start, end):
            start = fragment.flat_start + offset
            yield UnitSlice(start, start + last - first, part, first, ratio)


def _registry_of(engine: Engine, unit_of: Mapping[str, str]) -> UnitRegistry:
    shapes = parameter_shapes(engine.module)
    trainable = {name: OTHERS for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    return UnitRegistry.from_mapping(trainable | dict(unit_of), shapes)


def _digest(values: torch.Tensor) -> float:
    """48 bits of a hash, which a float64 holds exactly."""
    return float(int.from_bytes(hashlib.sha256(values.numpy().tobytes()).digest()[:6], "big"))
