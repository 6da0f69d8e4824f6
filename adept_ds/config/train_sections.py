"""The sections `train` and `export`."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, Tag, model_serializer, model_validator

from adept_ds.config.section import NUMBER, WORD, Beta, Count, Section, Seed


class TrainSection(Section):
    """The training loop."""

    steps: Count = Field(1000, description="optimizer steps")
    lr: float = Field(2e-4, gt=0, le=10, description="base learning rate")
    global_batch_size: Count = Field(8, description="sequences per optimizer step, over all ranks")
    micro_batch_size: Count = Field(1, description="sequences per forward pass of a rank")
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="of the learning rate after warmup; wsd: flat, then linear to 0 (docs/training.md)"
    )
    weight_decay: float = Field(0.1, ge=0, le=100)
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), strict=False)  # a list, in YAML
    eps: float = Field(1e-8, gt=0, le=1)
    clip_grad_norm: float = Field(1.0, ge=0, le=1e30, description="0 switches clipping off")
    seed: Seed = Field(0, description="of the order of training data and of dropout, and of nothing else")
    checkpoint_every: Count = 500
    keep_checkpoints: Count = Field(
        2,
        description="the newest so many checkpoints stay, two at least: the weights of the last may prove broken; see "
        "checkpoint.keep_every",
    )
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
    kernels: Literal["auto", "torch", "liger"] = Field(
        "auto",
        description="what computes the head's loss, norms, rotary positions and SwiGLU: PyTorch's operations, or those "
        "of liger-kernel; auto: these where it is installed and the device is a CUDA one",
    )
    compile: Literal["off", "auto"] = Field(
        "off",
        description="auto: torch.compile makes kernels of the decoder layers where the device is a CUDA one and ZeRO "
        "splits no weights (stages 1 and 2)",
    )
    warmup_steps: int | None = Field(
        None, ge=0, le=10**9, description="instead of warmup_ratio: optimizer steps of warmup, however long the run is"
    )
    decay_ratio: float = Field(
        0.2, gt=0, lt=1, description="schedule: wsd: share of the steps, at the end, in which the rate falls to 0"
    )
    writer_lr_ratio: float = Field(
        1.0,
        gt=0,
        le=1e6,
        description="learning rate of what a copy writes with, its silent factors, over that of the rest of it",
    )
    copy_dropout: float = Field(
        0.0, ge=0, lt=1, description="probability with which a training step goes around a copy; all ranks alike"
    )

    max_skipped: Count = Field(
        10,
        description="so many steps in a row that are skipped, since their loss or gradient is no number, end the run",
    )
    spike_sigma: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="skip a step whose loss, or norm of the gradient, is so many standard deviations above the mean of "
        "the last spike_window steps, such as 6; absent: only what is no number is skipped",
    )
    spike_window: int = Field(128, ge=2, le=10**6, description="spike_sigma: steps that a step is compared with")

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> TrainSection:
        if "spike_window" in self.model_fields_set and self.spike_sigma is None:
            raise ValueError(
                f"spike_window: {self.spike_window} has no effect without spike_sigma: remove it, or set spike_sigma, "
                "such as 6"
            )
        if "decay_ratio" in self.model_fields_set and self.schedule != "wsd":
            raise ValueError(
                f"decay_ratio: {self.decay_ratio} belongs to schedule: wsd, but schedule is {self.schedule}: "
                "remove decay_ratio or set schedule: wsd"
            )
        if self.warmup_steps is not None and "warmup_ratio" in self.model_fields_set:
            raise ValueError("warmup_steps and warmup_ratio exclude each other: remove one of them")
        return self

    @model_serializer(mode="wrap")
    def _what_has_an_effect(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As in `LrPolicySection`."""
        tree: dict[str, Any] = serialize(self)
        unused = {"warmup_steps"} if self.warmup_steps is None else {"warmup_ratio"}
        unused |= set() if self.schedule == "wsd" else {"decay_ratio"}
        unused |= {"spike_sigma", "spike_window"} if self.spike_sigma is None else set()
        return {key: value for key, value in tree.items() if key not in unused}

    @property
    def num_warmup_steps(self) -> int:
        return math.ceil(self.warmup_ratio * self.steps) if self.warmup_steps is None else self.warmup_steps

    @property
    def flat_until(self) -> int:
        """schedule: wsd: after this step the rate begins to fall; where a long warmup reaches into the decay, after it.

        The last ceil(decay_ratio * steps) steps decay. Computed exactly: `steps_if_decayed_from` inverts it.
        """
        return max(math.floor(self.steps * self._share_before_decay), self.num_warmup_steps)

    def steps_if_decayed_from(self, step: int) -> int:
        """How long the run is whose flat part ends after `step`: the shortest one."""
        return math.ceil(step / self._share_before_decay)

    @property
    def _share_before_decay(self) -> Fraction:
        return 1 - Fraction(str(self.decay_ratio))  # 0.2 is a fifth, not the float next to it


class ExportSection(Section):
    """The exported checkpoint."""

    dtype: Literal["source", "float32", "bfloat16"] = Field("source", description="source: as the base model")
