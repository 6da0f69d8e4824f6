"""What of DeepSpeed's file decides about memory and communication. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from adept_ds.base.errors import InputError
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
    optimizer_on_host: bool = False
    weights_on_host: bool = False
    """At stage 3 (offload_optimizer, offload_param)."""

    @classmethod
    def read(cls, deepspeed: Mapping[str, Any], file: str) -> ZeroSettings:
        """Of a DeepSpeed configuration that was checked.

        Raises:
            InputError: it changes what is held or sent in a way that a plan does not know.
        """
        zero = deepspeed["zero_optimization"]
        _refuse_unknown(zero, file)
        stage, overlap = int(zero["stage"]), zero.get("overlap_comm")
        keeps_inputs = zero.get("memory_efficient_linear", True) is not False
        found = cls(stage, stage == 3 if overlap is None else bool(overlap), file)
        given: dict[str, Any] = {}
        for name in _SIZES:
            for key in (name, f"stage3_{name}"):
                if isinstance(zero.get(key), int | float):  # 'auto' is none
                    given[name] = int(zero[key])
        given |= {part: _is_offloaded(zero, key) for part, key in _OFFLOADS.items()}
        return replace(found, memory_efficient_linear=keeps_inputs, **given)

    @property
    def windows(self) -> Windows:
        return Windows(self.prefetch_bucket_size, self.max_live_parameters, self.max_reuse_distance)


_SIZES = (
    "reduce_bucket_size",
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
)
_OFFLOADS = {"optimizer_on_host": "offload_optimizer", "weights_on_host": "offload_param"}


def _is_offloaded(zero: Mapping[str, Any], key: str) -> bool:
    return bool((zero.get(key) or {}).get("device", "none") != "none")


def _refuse_unknown(zero: Mapping[str, Any], file: str) -> None:
    stage = int(zero["stage"])
    if stage == 3 and (zero.get("zero_hpz_partition_size") or 1) > 1:
        size = zero["zero_hpz_partition_size"]
        raise InputError(
            f"deepspeed: '{file}' says zero_hpz_partition_size: {size}, and a plan does not know what a second "
            "partition holds and saves; plan with ds_configs/zero3.json, which holds less and sends more"
        )
    if stage == 3 and zero.get("zero_quantized_weights"):
        raise InputError(
            f"deepspeed: '{file}' says zero_quantized_weights: true, and a plan does not know what that saves; "
            "plan with ds_configs/zero3.json, which sends more"
        )
    if stage < 3 and _is_offloaded(zero, "offload_optimizer"):
        raise InputError(
            f"deepspeed: '{file}' says offload_optimizer at stage {stage}, and a plan knows it at stage 3 only; plan "
            "with ds_configs/zero3_offload.json"
        )


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
