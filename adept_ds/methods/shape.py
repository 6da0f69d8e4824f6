"""The one shape that every method of adaptation has: what starts, what trains, by which rates and terms, what is kept.

A method is one file of this package: a subclass of `Method` whose fields are its keys in the configuration
(`method: {name: ..., key: ...}`). It is found by being there (see `config.known_methods`); CONTRIBUTING.md says
how to write one. Importing it imports no torch: what is heavy is imported by the functions that need it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from adept_ds.config.method import MethodSection

if TYPE_CHECKING:
    import torch

    from adept_ds.config.schema import Config
    from adept_ds.models.directory import ModelDirectory
    from adept_ds.models.frozen_prefix import FrozenPrefix
    from adept_ds.models.loading import Trains
    from adept_ds.ranks.collectives import Ranks
    from adept_ds.ranks.unfinished import LongWork
    from adept_ds.training.rule import TrainingRule
    from adept_ds.units.registry import UnitRegistry
    from adept_ds.units.unit_lr import UnitLR
    from adept_ds.units.unit_sums import GradientBatches
    from adept_ds.zero.engine import Engine


@dataclass(frozen=True)
class Start:
    """The model that training starts from."""

    model: ModelDirectory
    layers: tuple[int, ...]
    """The decoder layers of it that the method is about, ascending: copies, chosen layers, or all."""
    base: ModelDirectory
    """The user's model."""
    sources: tuple[int, ...]
    """The layers of `base` that `layers` came from, in the same order."""


class TextSample(Protocol):
    """Text for gradients outside training, always the same; as many sequences, in batches of as many, as are asked for,
    or as the section `importance` says."""

    def __call__(self, sequences: int | None = None, batch_sequences: int | None = None) -> GradientBatches: ...


class PrefixOf(Protocol):
    """Of the layers below the lowest trainable one, for a text that is one of so many which share
    `importance.prefix_cache_mib` evenly."""

    def __call__(self, batches: GradientBatches, sharing: int = 1) -> FrozenPrefix: ...


@dataclass(frozen=True)
class Training:
    """What a rule may be made of: an engine that is ready to train, and what belongs to it."""

    config: Config
    start: Start
    engine: Engine
    unit_lr: UnitLR
    ranks: Ranks
    prepared: Any
    """What `Method.prepare` returned; None where training goes on from a checkpoint."""
    general_text: TextSample
    """Of `probe.corpus`."""
    domain_text: TextSample
    """Of `data.domain`; not where it is streamed."""
    frozen_prefix: PrefixOf
    together: LongWork
    """For what comes before the first step."""

    @property
    def registry(self) -> UnitRegistry:
        return self.unit_lr.registry


@dataclass(frozen=True)
class Preparation:
    """What may be computed before the engine that trains is there: beside it, there would be no memory for another."""

    config: Config
    start: Start
    make_engine: Callable[[ModelDirectory, Trains], Engine]
    """An engine for gradients alone."""
    general_text: TextSample
    """Of `probe.corpus`."""
    domain_text: TextSample
    """Of `data.domain`; not where it is streamed."""
    ranks: Ranks
    announce: Callable[[str], None]
    together: LongWork


class Method(MethodSection):
    """A way to adapt a model. The defaults are those of a method that trains whole parameters in place."""

    @property
    def dial(self) -> Literal["copies", "interpolation"]:
        """How what was learned is turned down: by what copies write, or by interpolation with the base (WiSE-FT)."""
        return "copies" if self.makes_copies else "interpolation"

    learns_new_parameters: ClassVar[bool] = False
    """Whether what trains is no parameter of the model that training starts from."""

    def trains(self, config: Config, start: Start) -> Trains:
        """What of the loaded model trains."""
        from adept_ds.models.loading import layers_train

        return layers_train(start.model.family, start.layers)

    def units(
        self, config: Config, start: Start, shapes: dict[str, tuple[int, ...]], model_config: Any
    ) -> UnitRegistry:
        """What has a learning rate, and a record of its movement, of its own.

        Args:
            shapes: of all parameters of the model that trains, by name.
        """
        from adept_ds.units.registry import build_registry

        granularity = config.importance.granularity
        return build_registry(start.model.family, shapes, start.layers, granularity, model_config)

    def prepare(self, preparation: Preparation) -> Any:
        """Whatever has to be computed before training begins; for `rule`."""
        return None

    def rule(self, training: Training) -> TrainingRule:
        """What is added to plain training."""
        from adept_ds.training.rule import TrainingRule

        return TrainingRule()

    def learned(
        self, trained: Mapping[str, torch.Tensor], model: ModelDirectory, checkpoint: Path
    ) -> Mapping[str, torch.Tensor]:
        """The parameters that the export replaces, under the names that they have in the model.

        Each is asked for when it is written, so that a mapping that makes them one by one never holds all.

        Args:
            trained: of a checkpoint, fp32, by the name that they have in training; read when it is asked for.
            model: that training started from.
        """
        return trained


def method_of(config: Config) -> Method:
    """The method that a configuration chose."""
    assert isinstance(config.method, Method)
    return config.method
