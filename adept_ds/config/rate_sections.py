"""The sections `importance` and `lr_policy`: which units matter, and what follows for their learning rates."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from adept_ds.config.section import Count, Section


class ImportanceSection(Section):
    """Stage two: how unit importance is estimated, and how often."""

    source: Literal["corpus", "online"] = Field(
        "corpus",
        description="text that importance is estimated on: probe.corpus, in passes of its own; or the sequences of "
        "data.replay that each training batch holds, without further passes",
    )
    every: Count = Field(500, description="optimizer steps between refreshes")
    sequences: Count = Field(
        32,
        description="sequences of general text per refresh, over all ranks; lr_policy.map: ratio takes as many of the "
        "domain's",
    )
    batch_sequences: Count = Field(8, description="sequences per global batch, whatever the number of ranks")
    granularity: Literal["matrix", "module", "fine"] = Field(
        "matrix", description="units: projections; attention and MLP; or attention heads and MLP neurons"
    )
    initial: Literal["source", "ones"] = Field("source", description="multipliers before the first refresh")
    prefix_cache_mib: int = Field(
        512,
        ge=0,
        le=2**30,
        description="host memory per rank for what the layers below the lowest copy compute for these sequences, "
        "which never changes; 0 computes it at every refresh",
    )


_MAP_OF_PARAMETER = {
    "power": "power",
    "temperature": "exponential",
    "threshold": "step",
    "low": "step",
    "high": "step",
    "ratio_power": "ratio",
}
"""Keys of `lr_policy` that belong to one map only."""

_DEFAULTS_OF_MAP: dict[str, dict[str, Any]] = {
    "ratio": {"preserve_mean": True, "min_multiplier": 0.25, "max_multiplier": 4.0}
}
"""Of keys that belong to all maps, where a map has others."""


class LrPolicySection(Section):
    """How importance becomes a learning-rate multiplier; formulas and advice are in docs/lr_policy.md."""

    preset: Literal["official"] | None = Field(
        None, description="official: as the paper's published implementation; no other key of this section may be set"
    )
    map: Literal["linear", "power", "exponential", "step", "rank", "ratio", "constant"] = Field(
        "linear",
        description="from scaled importance s in [0, 1] to a multiplier; ratio: by importance for the domain over that "
        "for general competence; constant: plain training of the copies",
    )
    power: float = Field(2.0, gt=0, le=1e6, description="power: exponent p of 2 (1 - s)^p")
    temperature: float = Field(
        2.0, gt=0, le=1e6, description="exponential: shape t of the decay; close to 0 it is linear"
    )
    threshold: float = Field(0.5, ge=0, le=1, description="step: scaled importance at which the step is")
    low: float = Field(0.0, ge=0, le=1e6, description="step: multiplier at and above the threshold")
    high: float = Field(2.0, ge=0, le=1e6, description="step: multiplier below the threshold")
    scope: Literal["all", "norms_apart", "per_kind", "per_layer"] = Field(
        "norms_apart", description="units whose importances are scaled together"
    )
    preserve_mean: bool = Field(
        False, description="scale multipliers to mean 1 by parameter, in each scope; ratio: always"
    )
    min_multiplier: float = Field(0.0, ge=0, le=1e6, description="smaller multipliers are raised to this; ratio: 0.25")
    max_multiplier: float | None = Field(
        None, ge=0, le=1e6, description="larger multipliers are lowered to this; ratio: 4"
    )
    smoothing: float = Field(0.0, ge=0, lt=1, description="share of its previous value that an importance keeps")
    ratio_power: float = Field(0.5, gt=0, le=1e6, description="ratio: exponent p of (I_domain / (I_general + eps))^p")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_map(cls, value: Any) -> Any:
        chosen = value.get("map") if isinstance(value, dict) else None
        return _DEFAULTS_OF_MAP.get(chosen, {}) | value if isinstance(chosen, str) else value

    @model_validator(mode="after")
    def _preset_stands_alone(self) -> LrPolicySection:
        others = [f"{key}: {getattr(self, key)}" for key in self._given() if key != "preset"]
        if self.preset is not None and others:
            raise ValueError(
                f"preset: {self.preset} leaves nothing to choose, but {', '.join(others)} is set too: remove one "
                f"or the other ('lr_policy={{preset: {self.preset}}}' replaces the whole section)"
            )
        return self

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> LrPolicySection:
        for key in self._given():
            owner = _MAP_OF_PARAMETER.get(key, self.map)
            if owner != self.map:
                raise ValueError(
                    f"{key}: {getattr(self, key)} belongs to map: {owner}, but map is {self.map}: "
                    f"remove {key} or set map: {owner}"
                )
        if self.map == "constant":
            for key in ("preserve_mean", "min_multiplier", "max_multiplier", "smoothing"):
                if getattr(self, key) != LrPolicySection.model_fields[key].default:
                    raise ValueError(
                        f"{key}: {getattr(self, key)} has no place beside map: constant, where every multiplier is 1: "
                        f"remove {key} or choose another map"
                    )
        return self

    @model_validator(mode="after")
    def _a_ratio_has_mean_1_within_its_limits(self) -> LrPolicySection:
        if self.map != "ratio":
            return self
        if not self.preserve_mean:
            raise ValueError(
                f"preserve_mean: {self.preserve_mean} has no place beside map: ratio, where the mean decides what is "
                "fast: remove it or choose another map"
            )
        if self.min_multiplier > 1:
            raise ValueError(
                f"min_multiplier: {self.min_multiplier} leaves no mean of 1, which map: ratio keeps: "
                "lower it to 1 or less"
            )
        if self.max_multiplier is not None and self.max_multiplier < 1:
            raise ValueError(
                f"max_multiplier: {self.max_multiplier} leaves no mean of 1, which map: ratio keeps: "
                "raise it to 1 or more"
            )
        return self

    @model_validator(mode="after")
    def _limits_are_in_order(self) -> LrPolicySection:
        if self.low > self.high:
            raise ValueError(f"low: {self.low} is above high: {self.high}; lower low or raise high")
        if self.max_multiplier is not None and self.min_multiplier > self.max_multiplier:
            raise ValueError(
                f"min_multiplier: {self.min_multiplier} is above max_multiplier: {self.max_multiplier}; "
                "lower min_multiplier or raise max_multiplier"
            )
        return self

    @model_serializer(mode="wrap")
    def _what_has_an_effect(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keys without effect stay out of a dump, which is thus a section that may be written in a file."""
        if self.preset is not None:
            return {"preset": self.preset}
        tree: dict[str, Any] = serialize(self)
        return {key: value for key, value in tree.items() if _MAP_OF_PARAMETER.get(key, self.map) == self.map}

    def _given(self) -> list[str]:
        """Keys that the user wrote, in the order of the schema."""
        return [key for key in LrPolicySection.model_fields if key in self.model_fields_set]
