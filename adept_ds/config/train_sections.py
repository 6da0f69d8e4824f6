"""The sections `train` and `export`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from adept_ds.config.section import NUMBER, WORD, Beta, Count, Section, Seed


class TrainSection(Section):
    """The training loop."""

    steps: Count = Field(1000, description="optimizer steps")
    lr: float = Field(2e-4, gt=0, le=10, description="base learning rate")
    global_batch_size: Count = Field(8, description="sequences per optimizer step, over all ranks")
    micro_batch_size: Count = Field(1, description="sequences per forward pass of a rank")
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(0.1, ge=0, le=100)
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), strict=False)  # a list, in YAML
    eps: float = Field(1e-8, gt=0, le=1)
    clip_grad_norm: float = Field(1.0, ge=0, le=1e30, description="0 switches clipping off")
    seed: Seed = Field(0, description="of the order of training data and of dropout, and of nothing else")
    checkpoint_every: Count = 500
    keep_checkpoints: Count = Field(2, description="the newest so many checkpoints stay")
    eval_every: int = Field(
        500,
        ge=0,
        le=10**9,
        description="steps between evaluations of held-out text, one at the start, one at the end; "
        "0: none while training",
    )
    activation_checkpointing: bool = Field(False, description="from the lowest copy up")
    keep_gathered_gib: (
        Annotated[Annotated[float, Field(ge=0, le=2**20)], Tag(NUMBER)] | Annotated[Literal["auto"], Tag(WORD)]
    ) = Field(
        "auto",
        description="GiB of frozen weights that ZeRO-3 keeps whole on every rank, so that it need not gather them "
        "again and again; auto: up to half of the memory that the first step left free",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on an accelerator, else fp32; fp16 scales losses dynamically"
    )


class ExportSection(Section):
    """The exported checkpoint."""

    dtype: Literal["source", "float32", "bfloat16"] = Field("source", description="source: as the base model")
