"""Four ways to tell how much general competence needs a layer (paper, section 3.1 and appendix E; docs/probing.md).

    mask      delta_i = loss(layer i bypassed) - loss                 one sweep of forward passes (see `probing`)
    taylor    delta_i ~ -<dL/dh_out, h_out - h_in> at layer i         one forward and one backward pass per sequence
    gradient  sum over the layer's parameters of |w * dL/dw|          the same, per global batch
    fisher    sum of (dL/dw)^2

No gradient is ever gathered. `taylor` needs those of activations only, which belong to the rank that has the sequence;
weights are frozen. For `gradient` and `fisher` DeepSpeed reduces each gradient to the rank that owns that slice of the
weight, the slice is summed there, and one vector of M numbers per batch is all-reduced.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adept_ds.config.schema import Config
from adept_ds.data.mixture import Sample
from adept_ds.data.order import FILLER, rank_batches
from adept_ds.models.directory import layer_count
from adept_ds.models.families import Family
from adept_ds.probing.scores import LayerScores
from adept_ds.probing.sweep import PassProgress, bypass_losses, install_layer_sweep, table_by_sequence
from adept_ds.ranks.collectives import rank, sum_over_ranks, world_size
from adept_ds.units.registry import UnitRegistry
from adept_ds.units.unit_sums import ProbeBatches, batch_sums, grad_squared, parameters_of, weight_times_grad
from adept_ds.zero.build import build_forward_engine, build_training_engine
from adept_ds.zero.engine import parameter_shapes, release
from adept_ds.zero.gathered import gather_layers_whole
from adept_ds.zero.gradients import probing_gradients

METHODS = ("mask", "taylor", "gradient", "fisher")


@dataclass(frozen=True)
class Probe:
    """A model, and the text that it is probed on."""

    config: Config
    model_dir: Path
    family: Family
    sample: Sample

    @property
    def num_layers(self) -> int:
        return layer_count(self.model_dir)

    @property
    def batches(self) -> ProbeBatches:
        """Global batches, for methods that need gradients of weights."""
        section = self.config.probe
        return ProbeBatches(
            self.sample.blocks, self.sample.indices, section.gradient_batch_sequences, section.batch_sequences
        )


def score_layers(probe: Probe, method: str, progress: PassProgress) -> LayerScores:
    """What `method` says about every layer; the same on every rank."""
    passes = {"mask": _mask, "taylor": _taylor, "gradient": _gradients, "fisher": _gradients}
    losses, scores, seconds = passes[method](probe, method, progress)
    sample = probe.sample
    return LayerScores(
        method=method,
        seconds=seconds,
        losses=losses.numpy(),
        tokens=torch.tensor(sample.tokens(), dtype=torch.float64).numpy(),
        sources=torch.tensor(sample.sources, dtype=torch.int64).numpy(),
        weights=torch.tensor(sample.weights, dtype=torch.float64).numpy(),
        scores=scores.numpy(),
    )


Passes = tuple[torch.Tensor, torch.Tensor, float]
"""Losses [sequences] and scores [sequences or batches, layers], float64, and the seconds that the passes took."""


def _mask(probe: Probe, method: str, progress: PassProgress) -> Passes:
    section = probe.config.probe

    def prepare(model: torch.nn.Module) -> None:
        install_layer_sweep(model, probe.family, section.max_stack_tokens, progress.layer)
        gather_layers_whole(model, probe.family.layer_modules(model))

    model, device = build_forward_engine(probe.config, probe.model_dir, prepare)
    start = time.perf_counter()
    losses = bypass_losses(
        model,
        probe.num_layers,
        probe.sample,
        batch_size=section.batch_sequences,
        device=device,
        progress=progress,
    )
    seconds = time.perf_counter() - start
    release(model)
    return losses[:, 0], losses[:, 1:] - losses[:, :1], seconds


# --- taylor ---------------------------------------------------------------------------------------------------------


def _taylor(probe: Probe, method: str, progress: PassProgress) -> Passes:
    products: dict[int, torch.Tensor] = {}

    def prepare(model: torch.nn.Module) -> None:
        install_taps(model, probe.family, products)
        gather_layers_whole(model, probe.family.layer_modules(model))

    model, device = build_forward_engine(probe.config, probe.model_dir, prepare)
    # The engine of a model without optimizer refuses backward passes. The hooks that gather weights, for a backward
    # pass too, are on the modules inside it, and nothing else is needed where no weight has a gradient.
    inner = getattr(model, "module", model)

    def forward(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = inner(input_ids, labels)
        losses.sum().backward()
        return torch.stack([losses.detach().double(), *(products.pop(i) for i in range(probe.num_layers))], dim=1)

    start = time.perf_counter()
    table = table_by_sequence(
        forward,
        probe.sample,
        probe.num_layers + 1,
        batch_size=probe.config.probe.batch_sequences,
        device=device,
        progress=progress,
    )
    seconds = time.perf_counter() - start
    release(model)
    return table[:, 0], table[:, 1:], seconds


def install_taps(model: torch.nn.Module, family: Family, products: dict[int, torch.Tensor]) -> None:
    """Make a backward pass leave -<dL/dh_out, h_out - h_in> of each row in `products`, by layer: [rows] float64.

    Gradients begin at what enters the lowest layer: the embedding has no backward pass. Replaces the instance's
    `forward`, so DeepSpeed's hooks stay around the layer's call.
    """
    layers = family.layer_modules(model)
    # A hook, not part of `forward`: only where its input has a gradient does DeepSpeed let go of a layer again.
    layers[0].register_forward_pre_hook(lambda _, inputs: (inputs[0].detach().requires_grad_(), *inputs[1:]))
    for position, layer in enumerate(layers):
        layer.forward = functools.partial(_tapped, layer.forward, products, position)


def _tapped(
    forward: Callable[..., Any],
    products: dict[int, torch.Tensor],
    position: int,
    hidden: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    output = forward(hidden, *args, **kwargs)
    if isinstance(output, tuple):
        return (_Tap.apply(output[0], hidden, products, position), *output[1:])
    return _Tap.apply(output, hidden, products, position)


class _Tap(torch.autograd.Function):
    """The identity; its backward pass takes the inner product of each row.

    Keeps no copy: both tensors are alive anyway, since the norms that follow need them for their own backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, after: torch.Tensor, before: torch.Tensor, products: dict[int, torch.Tensor], position: int
    ) -> torch.Tensor:
        ctx.save_for_backward(after, before)
        ctx.products, ctx.position = products, position
        return after.view_as(after)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        after, before = ctx.saved_tensors
        product = grads[0].float() * (after.float() - before.float())
        ctx.products[ctx.position] = -product.sum((1, 2), dtype=torch.float64)
        return grads[0], None, None, None


# --- gradient and fisher --------------------------------------------------------------------------------------------


def _gradients(probe: Probe, method: str, progress: PassProgress) -> Passes:
    """Losses [sequences], scores [batches, layers]."""
    engine, _, _ = build_training_engine(
        _for_gradients(probe.config), probe.model_dir, probe.family, range(probe.num_layers), plain_sgd=True
    )
    registry = _layers_as_units(probe.family, engine.module)
    parameters, batches = parameters_of(engine, registry), probe.batches
    score = grad_squared if method == "fisher" else weight_times_grad
    losses = torch.zeros(len(probe.sample), dtype=torch.float64)
    sums, count = [], len(batches.global_batches())
    start, first = time.perf_counter(), 0
    with probing_gradients(engine):
        for number, batch in enumerate(batches.global_batches()):
            progress.batch(number, count)
            scores, rows = batch_sums(engine, registry, parameters, batches, number, score=score)
            sums.append(scores)
            for position, loss in zip(_rows_of_rank(first, len(batch), batches.micro_batch_size), rows, strict=True):
                if position != FILLER:
                    losses[position] = loss.double()
            first += len(batch)
    table = sum_over_ranks(torch.stack(sums))
    seconds = time.perf_counter() - start
    release(engine)
    return sum_over_ranks(losses), table, seconds


def _for_gradients(config: Config) -> Config:
    """Batch sizes of training mean nothing here, but DeepSpeed wants them to divide."""
    train = config.train.model_copy(update={"global_batch_size": world_size(), "micro_batch_size": 1})
    return config.model_copy(update={"train": train})


def _layers_as_units(family: Family, model: torch.nn.Module) -> UnitRegistry:
    """One unit per layer, lowest first."""
    shapes = parameter_shapes(model)
    places = {name: family.split_name(name) for name in shapes}
    layer_of = {name: place[0] for name, place in places.items() if place is not None}
    ordered = sorted(layer_of, key=lambda name: layer_of[name])
    return UnitRegistry.from_mapping({name: f"layers.{layer_of[name]}" for name in ordered}, shapes)


def _rows_of_rank(first: int, count: int, micro_batch_size: int) -> Sequence[int]:
    """Positions in the sample of this rank's rows of a global batch that begins at `first`, fillers included."""
    batches = rank_batches(range(first, first + count), rank(), world_size(), micro_batch_size)
    return [position for batch in batches for position in batch]
