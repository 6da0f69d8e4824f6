"""Orthogonal fine-tuning (Qiu et al. 2023, arXiv 2306.07280) by the `peft` library, merged at export.

The input of each linear projection is rotated, block by block; each rotation is the Cayley transform of a trained
skew-symmetric matrix that begins as zero (in five terms of its Neumann series, arXiv 2506.19847, as is peft's default).
Angles and lengths of the rows of a weight stay what they were.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from adept_ds.methods.lora import TARGETS, Adapters, Targets
from adept_ds.models.adapter_spec import OftSpec


class Oft(Adapters):
    """Rotations of what projections read."""

    name: Literal["oft"] = "oft"
    block_size: int = Field(32, ge=2, le=2**16, description="inputs that one rotation mixes; divides every target's")
    targets: Targets = Field("all", description=TARGETS)

    @property
    def spec(self) -> OftSpec:
        return OftSpec(self.block_size, self.targets if self.targets == "all" else tuple(self.targets))
