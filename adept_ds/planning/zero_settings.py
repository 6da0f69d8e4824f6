"""What of DeepSpeed's file decides about memory and communication. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from adept_ds.planning.gathering import Windows


@dataclass(frozen=True)
class ZeroSettings:
    """Sizes are in elements; the defaults are DeepSpeed's (0.19.8, runtime/zero/config.py)."""

    stage: int
    overlap_comm: bool
    file: str
    """That says so."""
    reduce_bucket_size: int = 500_000_000
    prefetch_bucket_size: int = 50_000_000
    param_persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    memory_efficient_linear: bool = True
    """At stage 3, DeepSpeed's own linear layers, which keep their input even where their weight is frozen."""

    @classmethod
    def read(cls, deepspeed: Mapping[str, Any], file: str) -> ZeroSettings:
        """Of a DeepSpeed configuration that was checked."""
        zero = deepspeed["zero_optimization"]
        stage, overlap = int(zero["stage"]), zero.get("overlap_comm")
        keeps_inputs = zero.get("memory_efficient_linear", True) is not False
        found = cls(stage, stage == 3 if overlap is None else bool(overlap), file)
        given: dict[str, Any] = {}
        for name in cls.__dataclass_fields__.keys() - {"stage", "overlap_comm", "file", "memory_efficient_linear"}:
            for key in (name, f"stage3_{name}"):
                if isinstance(zero.get(key), int | float):  # 'auto' is none
                    given[name] = int(zero[key])
        return replace(found, memory_efficient_linear=keeps_inputs, **given)

    @property
    def windows(self) -> Windows:
        return Windows(self.prefetch_bucket_size, self.max_live_parameters, self.max_reuse_distance)


SHIPPED = {
    stage: ZeroSettings(
        stage, overlap_comm=stage > 1, file=f"ds_configs/zero{stage}.json", reduce_bucket_size=50_000_000
    )
    for stage in (1, 2, 3)
}
"""What the files of `ds_configs/` say, by stage."""


def settings_by_stage(deepspeed: Mapping[str, Any] | None, file: str = "") -> dict[int, ZeroSettings]:
    """The user's file for its own stage, the shipped ones for the others."""
    if deepspeed is None:
        return dict(SHIPPED)
    own = ZeroSettings.read(deepspeed, file)
    return SHIPPED | {own.stage: own}
