"""Full continual pretraining (the paper's PT-Full): every parameter trains, embeddings and head too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from adept_ds.config.section import Count
from adept_ds.methods.shape import Method, Start

if TYPE_CHECKING:
    from adept_ds.config.schema import Config
    from adept_ds.models.loading import Trains
    from adept_ds.units.registry import UnitRegistry


class WholeModel(Method):
    """A base of methods in which every parameter trains."""

    def trains(self, config: Config, start: Start) -> Trains:
        from adept_ds.models.loading import everything_trains

        return everything_trains()

    def units(
        self, config: Config, start: Start, shapes: dict[str, tuple[int, ...]], model_config: Any
    ) -> UnitRegistry:
        from adept_ds.units.registry import build_registry

        granularity = config.importance.granularity
        return build_registry(start.model.family, shapes, start.layers, granularity, model_config, outside=True)


class WithGeneralText(WholeModel):
    """A base of those that estimate something on general text, once, before training."""

    needs_general_text: ClassVar[bool] = True
    sequences: Count = Field(32, description="sequences of general text (probe.corpus), over all ranks")
    batch_sequences: Count = Field(2, description="sequences per gradient, whatever the number of ranks")

    def check(self, config: Config) -> None:
        sources = len(config.probe.sources)
        if self.sequences < sources:
            raise ValueError(
                f"method.sequences: {self.sequences} leaves none for some of the {sources} sources of probe.corpus: "
                f"raise it to at least {sources}"
            )


class Full(WholeModel):
    """Everything at one learning rate, on domain text alone."""

    name: Literal["full"] = "full"

    def check(self, config: Config) -> None:
        if config.data.replay:
            raise ValueError("data.replay: method: full reads domain text alone; write method: replay, or remove it")
