"""Four ways to tell how much general competence needs a layer (paper, section 3.1 and appendix E; docs/probing.md).

    mask      delta_i = loss(layer i bypassed) - loss                 one sweep of forward passes (see `sweep`)
    taylor    delta_i ~ -<dL/dh_out, h_out - h_in> at layer i         one forward and one backward pass per sequence
    gradient  sum over the layer's parameters of |w * dL/dw|          the same, per global batch
    fisher    sum of (dL/dw)^2

No gradient is ever gathered. `taylor` needs those of activations only, which belong to the rank that has the sequence;
weights are frozen. For `gradient` and `fisher` DeepSpeed reduces each gradient to the rank that owns that slice of the
weight, the slice is summed there, and one vector of M numbers per batch is all-reduced.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adept_ds.config.layer_sections import ExpandSection, ProbeSection
from adept_ds.data.blocks import Batch
from adept_ds.data.mixture import Sample
from adept_ds.data.order import FILLER, rank_batches
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.families import Family
from adept_ds.models.loading import layers_train
from adept_ds.probing.passes import PassProgress, check_losses, table_by_sequence
from adept_ds.probing.scores import LayerScores
from adept_ds.probing.selection import Cost
from adept_ds.probing.sweep import bypass_losses, install_layer_sweep
from adept_ds.probing.taps import install_taps
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.unfinished import Work
from adept_ds.units.registry import UnitRegistry
from adept_ds.units.unit_sums import GradientBatches, Score, UnitSums, grad_squared, weight_times_grad
from adept_ds.zero.build import EngineSettings, build_forward_engine, build_training_engine
from adept_ds.zero.engine import parameter_shapes, release
from adept_ds.zero.gathered import gather_layers_whole
from adept_ds.zero.gradients import gradients_outside_training


@dataclass(frozen=True)
class Probe:
    """A model, the text that it is probed on, and how."""

    engines: EngineSettings
    section: ProbeSection
    expand: ExpandSection
    seed: int
    model: ModelDirectory
    sample: Sample
    cost: Cost | None = None
    """Of training, where some is planned."""

    @property
    def ranks(self) -> Ranks:
        return self.engines.ranks

    @property
    def batches(self) -> GradientBatches:
        """Global batches, for estimators that need gradients of weights."""
        section, sample = self.section, self.sample
        return GradientBatches(sample.blocks, sample.indices, section.batch_sequences, section.micro_batch_size)


Passes = tuple[torch.Tensor, torch.Tensor]
"""Losses [sequences] and scores [sequences or batches, layers], float64."""


class Estimator(ABC):
    """One way to score layers; to add one, see CONTRIBUTING.md."""

    measures: str
    """What a layer's score is, for the axis of a figure."""
    by_sequence = True
    """Scores belong to single sequences; otherwise to global batches."""
    in_nats = True
    """A score is what the mean token loss would rise by."""
    depends_on: tuple[str, ...] = ()
    """Keys of the section `probe`, beyond those that all share, with which scores change."""

    def score(self, probe: Probe, progress: PassProgress, work: Work) -> LayerScores:
        """What this says about every layer; the same on every rank.

        Args:
            work: where the passes are kept, so that what was begun goes on.
        """
        losses, scores = self.passes(probe, progress, work)
        sample = probe.sample
        return LayerScores(
            method=name_of(self),
            by_sequence=self.by_sequence,
            seconds=work.seconds,
            losses=losses.numpy(),
            tokens=torch.tensor(sample.tokens(), dtype=torch.float64).numpy(),
            sources=torch.tensor(sample.sources, dtype=torch.int64).numpy(),
            weights=torch.tensor(sample.weights, dtype=torch.float64).numpy(),
            scores=scores.numpy(),
        )

    @abstractmethod
    def passes(self, probe: Probe, progress: PassProgress, work: Work) -> Passes:
        """Run the model over the sample; every rank gets the whole tables."""


class Mask(Estimator):
    """The definition: the loss with each layer bypassed, in one sweep."""

    measures = "delta loss (nats) with layer bypassed"

    def passes(self, probe: Probe, progress: PassProgress, work: Work) -> Passes:
        section, family = probe.section, probe.model.family

        def prepare(model: torch.nn.Module) -> None:
            install_layer_sweep(model, family, section.max_stack_tokens, progress.layer)
            gather_layers_whole(model, family.layer_modules(model))

        model, device = build_forward_engine(probe.engines, probe.model, prepare)
        losses = bypass_losses(
            model,
            probe.model.num_layers,
            probe.sample,
            probe.ranks,
            micro_batch_size=section.micro_batch_size,
            device=device,
            progress=progress,
            work=work,
        )
        release(model)
        return losses[:, 0], losses[:, 1:] - losses[:, :1]


class Taylor(Estimator):
    """The first-order estimate of what `Mask` measures."""

    measures = "delta loss (nats), first-order estimate"

    def passes(self, probe: Probe, progress: PassProgress, work: Work) -> Passes:
        products: dict[int, torch.Tensor] = {}
        family, num_layers = probe.model.family, probe.model.num_layers

        def prepare(model: torch.nn.Module) -> None:
            install_taps(model, family, products)
            gather_layers_whole(model, family.layer_modules(model))

        model, device = build_forward_engine(probe.engines, probe.model, prepare)
        # The engine of a model without optimizer refuses backward passes. The hooks that gather weights, for a backward
        # pass too, are on the modules inside it, and nothing else is needed where no weight has a gradient.
        inner = getattr(model, "module", model)

        def forward(batch: Batch) -> torch.Tensor:
            losses = inner(*batch)
            losses.sum().backward()
            return torch.stack([losses.detach().double(), *(products.pop(i) for i in range(num_layers))], dim=1)

        table = table_by_sequence(
            forward,
            probe.sample,
            num_layers + 1,
            probe.ranks,
            micro_batch_size=probe.section.micro_batch_size,
            device=device,
            progress=progress,
            work=work,
        )
        release(model)
        return table[:, 0], table[:, 1:]


class WeightGradients(Estimator):
    """The sum of a score of weights and their gradients over each layer."""

    by_sequence = False
    in_nats = False
    depends_on = ("batch_sequences",)

    def __init__(self, element_score: Score, measures: str) -> None:
        self._element_score, self.measures = element_score, measures

    def passes(self, probe: Probe, progress: PassProgress, work: Work) -> Passes:
        layers = layers_train(probe.model.family, range(probe.model.num_layers))
        engine = build_training_engine(probe.engines, probe.model, layers, seed=probe.seed)
        registry = _layers_as_units(probe.model.family, engine.module)
        unit_sums = UnitSums(engine, registry, probe.ranks, self._element_score)
        batches, global_batches = probe.batches, probe.batches.global_batches()
        losses = work.tensor("losses", len(probe.sample))
        sums = work.tensor("sums", len(global_batches), len(registry))
        with gradients_outside_training(engine):
            for number, scores, row_losses in unit_sums.of_batches(batches, work, progress.batch):
                if number == 0:
                    check_losses(row_losses, probe.ranks)
                sums[number] = scores
                first, count = number * batches.batch_sequences, len(global_batches[number])
                positions = _rows_of_rank(first, count, batches.micro_batch_size, probe.ranks)
                for position, loss in zip(positions, row_losses, strict=True):
                    if position != FILLER:
                        losses[position] = loss.double()
        release(engine)
        return probe.ranks.sum(losses), probe.ranks.sum(sums)


ESTIMATORS: dict[str, Estimator] = {
    "mask": Mask(),
    "taylor": Taylor(),
    "gradient": WeightGradients(weight_times_grad, "sum of |weight x gradient|"),
    "fisher": WeightGradients(grad_squared, "sum of squared gradients"),
}
"""By the value of `probe.method`."""


def name_of(estimator: Estimator) -> str:
    return next(name for name, known in ESTIMATORS.items() if known is estimator)


def _layers_as_units(family: Family, model: torch.nn.Module) -> UnitRegistry:
    """One unit per layer, lowest first."""
    shapes = parameter_shapes(model)
    places = {name: family.split_name(name) for name in shapes}
    layer_of = {name: place[0] for name, place in places.items() if place is not None}
    ordered = sorted(layer_of, key=lambda name: layer_of[name])
    return UnitRegistry.from_mapping({name: f"layers.{layer_of[name]}" for name in ordered}, shapes)


def _rows_of_rank(first: int, count: int, micro_batch_size: int, ranks: Ranks) -> Sequence[int]:
    """Positions in the sample of this rank's rows of a global batch that begins at `first`, fillers included."""
    batches = rank_batches(range(first, first + count), ranks.rank, ranks.world_size, micro_batch_size)
    return [position for batch in batches for position in batch]
