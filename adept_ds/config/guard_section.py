"""The section `guard`: what is done when training makes general text worse (docs/guard.md)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from adept_ds.config.section import Section


class GuardSection(Section):
    """With it, evaluations during training tell how far general text has risen, and with what confidence."""

    max_general_rise: float = Field(
        0.0,
        ge=0,
        le=100,
        description="nats per token: a general source is forgotten when its loss has risen by more than this above the "
        "base's, at the lower limit of the rise",
    )
    confidence: float = Field(0.95, ge=0.5, le=0.999, description="of that limit, which is one-sided")
    action: Literal["warn", "slow", "stop"] = Field(
        "warn",
        description="each time a source is found forgotten; warn: say so; slow: multiply all multipliers by slow_by; "
        "stop: end training, and export the best checkpoint before",
    )
    slow_by: float = Field(0.5, gt=0, lt=1, description="action: slow")

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> GuardSection:
        if "slow_by" in self.model_fields_set and self.action != "slow":
            raise ValueError(
                f"slow_by: {self.slow_by} belongs to action: slow, but action is {self.action}: remove slow_by or set "
                "action: slow"
            )
        return self

    @model_serializer(mode="wrap")
    def _what_has_an_effect(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As in `LrPolicySection`."""
        tree: dict[str, Any] = serialize(self)
        return {key: value for key, value in tree.items() if key != "slow_by" or self.action == "slow"}
