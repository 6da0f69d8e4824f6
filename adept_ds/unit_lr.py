"""Unit-wise learning rates on a DeepSpeed engine: bind the optimizer to the partitions, and refresh multipliers."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Any

from adept_ds import zero
from adept_ds.config import LrPolicySection
from adept_ds.distributed import all_ranks_equal, gather_objects
from adept_ds.errors import UnitMismatchError
from adept_ds.lr_policy import multipliers_from_importance
from adept_ds.optim import UnitAdamW, UnitSlice
from adept_ds.units import UnitRegistry


class UnitLR:
    """The multipliers of one training run."""

    def __init__(self, engine: Any, optimizer: UnitAdamW, registry: UnitRegistry, policy: LrPolicySection) -> None:
        self.registry = registry
        self._optimizer = optimizer
        self._policy = policy
        for partition in zero.partition_layout(engine):
            optimizer.bind(partition.tensor, [self._slice_of(piece) for piece in partition.pieces])

    @property
    def multipliers(self) -> list[float]:
        """In registry order."""
        held = self._optimizer.multipliers
        return [held[name] for name in self.registry.names]

    def refresh(self, importance: Sequence[float]) -> list[float]:
        """Map importances (registry order) to multipliers, check that all ranks agree, and put them into effect."""
        multipliers = multipliers_from_importance(importance, self.registry, self._policy)
        self._optimizer.set_multipliers(dict(zip(self.registry.names, multipliers, strict=True)))
        self.check_ranks_agree()
        return multipliers

    def check_ranks_agree(self) -> None:
        """Raises `UnitMismatchError`, naming the unit, if a rank holds another multiplier than rank 0.

        A digest travels; the multipliers themselves only to say who disagrees.
        """
        if all_ranks_equal(_digest(self.multipliers)):
            return
        held = gather_objects(self.multipliers)
        for rank, multipliers in enumerate(held):
            for unit, value, expected in zip(self.registry.names, multipliers, held[0], strict=True):
                if value != expected:
                    raise UnitMismatchError(
                        f"unit '{unit}' has multiplier {value!r} on rank {rank} but {expected!r} on rank 0; "
                        "the ranks did not compute the same importances"
                    )

    def _slice_of(self, piece: zero.Piece) -> UnitSlice:
        unit = self.registry.names[self.registry.index_of_parameter[piece.parameter]]
        return UnitSlice(piece.flat_start, piece.flat_start + piece.numel, unit)


def _digest(values: Sequence[float]) -> float:
    """48 bits of a hash, which a float64 holds exactly."""
    return float(int.from_bytes(hashlib.sha256(struct.pack(f"{len(values)}d", *values)).digest()[:6], "big"))
