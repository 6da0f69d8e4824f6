"""LoRA (Hu et al. 2021, arXiv 2106.09685) by the `peft` library: W + (alpha / rank) B A, merged at export.

A begins at random and B as zero, so that the start is the base; both train beside every linear projection of the
decoder, unless `targets` names fewer. With `dora` (Liu et al. 2024, arXiv 2402.09353) the length of each row of the sum
is trained apart from its direction. `lr_ratio` is LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns so many times
faster than A, here as a multiplier of its units, weight decay included. Merging is peft's own, in fp32.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from adept_ds.config.section import PART, WORD
from adept_ds.methods.shape import Method, Start, Training
from adept_ds.models.adapter_spec import AdapterSpec, LoraSpec, adapter_multipliers, adapter_units, check_adapters

if TYPE_CHECKING:
    import torch

    from adept_ds.config.schema import Config
    from adept_ds.models.directory import ModelDirectory
    from adept_ds.models.loading import Trains
    from adept_ds.models.weight_files import Shapes
    from adept_ds.training.rule import TrainingRule
    from adept_ds.units.registry import UnitRegistry

Targets = Annotated[
    Annotated[Literal["all"], Tag(WORD)] | Annotated[list[str], Field(min_length=1), Tag(PART)],
    Discriminator(lambda value: PART if isinstance(value, list) else WORD),
]

TARGETS = "projections by their path in a layer, [self_attn.q_proj, ...]; all: every linear one but experts'"


class Adapters(Method):
    """A base of methods that train adapters beside frozen weights, and merge them at export."""

    learns_new_parameters: ClassVar[bool] = True

    @property
    @abstractmethod
    def spec(self) -> AdapterSpec:
        """What is put beside which projections."""

    def check_model(self, model: ModelDirectory, shapes: Callable[[], Shapes]) -> None:
        check_adapters(self.spec, model, shapes())

    def trains(self, config: Config, start: Start) -> Trains:
        from adept_ds.models.adapters import adapters_train

        return adapters_train(start.model.family, self.spec, config.train.seed)

    def units(
        self, config: Config, start: Start, shapes: dict[str, tuple[int, ...]], model_config: Any
    ) -> UnitRegistry:
        from adept_ds.units.registry import UnitRegistry

        return UnitRegistry.from_mapping(adapter_units(start.model.family, shapes), shapes)

    def learned(
        self, trained: Mapping[str, torch.Tensor], model: ModelDirectory, checkpoint: Path
    ) -> Mapping[str, torch.Tensor]:
        from adept_ds.weights.merging import MergedWeights

        return MergedWeights(self.spec, model, trained)


class Lora(Adapters):
    """Low-rank adapters."""

    name: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1, le=2**16)
    alpha: float = Field(32.0, gt=0, le=1e6, description="numerator of the scale")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the adapters' inputs")
    dora: bool = Field(False, description="train lengths and directions of rows apart")
    rank_stabilised: bool = Field(False, description="scale by alpha / sqrt(rank) instead of alpha / rank")
    lr_ratio: float = Field(1.0, gt=0, le=1e6, description="LoRA+: rate of B over that of A")
    targets: Targets = Field("all", description=TARGETS)

    @property
    def spec(self) -> LoraSpec:
        return LoraSpec(
            self.rank,
            self.alpha,
            self.dropout,
            self.dora,
            self.rank_stabilised,
            self.targets if self.targets == "all" else tuple(self.targets),
        )

    def rule(self, training: Training) -> TrainingRule:
        training.unit_lr.set(adapter_multipliers(training.registry.names, self.lr_ratio))
        return super().rule(training)
