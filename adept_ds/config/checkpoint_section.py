"""The section `checkpoint`: how checkpoints are written, and which ones stay, besides those that `train` says."""

from __future__ import annotations

from pydantic import Field

from adept_ds.config.section import Section


class CheckpointSection(Section):
    """Nothing here changes what training computes."""

    background: bool = Field(
        False,
        description="write checkpoints while training goes on, from a copy in the host's memory: up to 16 bytes for "
        "each trained element, over all ranks",
    )
    keep_every: int = Field(
        0,
        ge=0,
        le=10**9,
        description="besides the newest train.keep_checkpoints every so-many-th stays, those of steps that "
        "keep_every * train.checkpoint_every divides; 0: none",
    )
