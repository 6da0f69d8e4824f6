"""What a copy at each place would do for the domain and to general text, to first order (docs/choosing_layers.md).

g_d and g_g are the gradients of the mean token loss over a domain and over a general text by the silent factors of a
copy (see `silent_copies`). AdamW's first step moves each element by the learning rate against the sign of g_d; weight
decay does nothing to zeros. So per unit of learning rate, in nats:

    what the domain's loss falls by      gain = -<g_d, -sign(g_d)> = |g_d|_1
    what the general loss rises by       harm = <g_g, -sign(g_d)> = -<sign(g_d), g_g>

Each text is one global batch. The absolute value and the sign are of its whole gradient, so they are taken when all
sequences have passed on all ranks; harm is linear in g_g, so of that nothing is kept. Each rank keeps a slice of the
domain's gradients, M * (elements of a layer's silent factors) / ranks, in float32, and of those one byte an element
while general text passes; beside that, one layer's gradient at a time is whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from adept_ds.base.errors import NonFiniteLossError
from adept_ds.base.progress import ProgressCallback
from adept_ds.data.blocks import Batch
from adept_ds.data.mixture import Sample
from adept_ds.models.directory import ModelDirectory
from adept_ds.probing.passes import PassProgress, table_by_sequence
from adept_ds.probing.places import PlaceScores, TextRecord
from adept_ds.probing.result import SourceRecord
from adept_ds.probing.silent_copies import imagine_copies
from adept_ds.ranks.collectives import Ranks
from adept_ds.zero.build import EngineSettings, build_forward_engine
from adept_ds.zero.engine import release
from adept_ds.zero.gathered import gather_layers_whole


def weigh_places(
    engines: EngineSettings,
    model_dir: ModelDirectory,
    domain: Sample,
    general: Sample,
    *,
    micro_batch_size: int,
    check: ProgressCallback,
    move: ProgressCallback,
) -> PlaceScores:
    """Gain and harm at every place; the same on every rank, and to rounding at any number of ranks.

    Args:
        micro_batch_size: sequences per rank that pass together.
        check, move: see `PassProgress`.

    Raises:
        NonFiniteLossError: a loss or a gradient is no number.
    """
    ranks, num_layers = engines.ranks, model_dir.num_layers
    places = _Places(num_layers, ranks)

    def prepare(model: torch.nn.Module) -> None:
        imagine_copies(model, model_dir.family, places.take)
        gather_layers_whole(model, model_dir.family.layer_modules(model))

    model, device = build_forward_engine(engines, model_dir, prepare)
    inner = getattr(model, "module", model)  # as in `estimators.Taylor`

    def forward(batch: Batch) -> torch.Tensor:
        losses: torch.Tensor = inner(*batch)
        losses.sum().backward()
        return losses.detach().unsqueeze(1)

    def passed(sample: Sample, title: str, begin: float) -> TextRecord:
        progress = PassProgress(num_layers, _half(check, begin, title), _half(move, begin, title))
        losses = table_by_sequence(
            forward, sample, 1, ranks, micro_batch_size=micro_batch_size, device=device, progress=progress
        )
        if not losses.isfinite().all():
            raise NonFiniteLossError(f"probe: the model's loss on the {title} is NaN or infinite")
        tokens = sum(sample.tokens())
        return TextRecord(
            loss=float(losses.sum()) / tokens,
            tokens=tokens,
            sequences=len(sample),
            sources=tuple(SourceRecord(**facts) for facts in sample.facts()),
        )

    start = time.perf_counter()
    try:
        of_domain = passed(domain, "domain text", 0.0)
        gains = places.gains() / of_domain.tokens
        of_general = passed(general, "general text", 0.5)
        harms = places.harms() / of_general.tokens
        seconds = time.perf_counter() - start
    finally:
        release(model)
    if not (gains.isfinite().all() and harms.isfinite().all()):
        raise NonFiniteLossError("probe: a gradient of a silent copy is NaN or infinite")
    return PlaceScores(
        domain=of_domain, general=of_general, gains=tuple(gains.tolist()), harms=tuple(harms.tolist()), seconds=seconds
    )


def _half(report: ProgressCallback, begin: float, title: str) -> ProgressCallback:
    def reported(share: float, text: str) -> None:
        report(begin + share / 2, f"{title}, {text}")

    return reported


class _Places:
    """Sums over the gradients of silent copies, slice by slice: first those of the domain, then of general text."""

    def __init__(self, num_layers: int, ranks: Ranks) -> None:
        self._layers, self._ranks = range(num_layers), ranks
        self._sums: dict[int, torch.Tensor] = {}
        """By layer: this rank's slice of the gradient of the domain's summed loss, [slice] float32."""
        self._signs: dict[int, torch.Tensor] = {}
        """[slice] int8"""
        self._products: dict[int, torch.Tensor] = {}
        """<sign(g_d), g_g> over this rank's slice, of the summed loss; scalars on the device, float64."""
        self._use: Callable[[int, torch.Tensor], None] = self._add

    def take(self, layer: int, gradient: torch.Tensor) -> None:
        """Of one micro-batch's summed loss, on every rank: [elements] float32."""
        self._use(layer, self._ranks.slice_of_sum(gradient))

    def gains(self) -> torch.Tensor:
        """|g|_1 of the summed loss by layer, [layers] float64. What comes in afterwards is general text's."""
        found = torch.stack([self._sums[layer].abs().sum(dtype=torch.float64) for layer in self._layers])
        # Popped one by one: signs and sums are never there all at once.
        self._signs = {layer: self._sums.pop(layer).sign().to(torch.int8) for layer in self._layers}
        self._use = self._multiply
        return self._ranks.sum(found)

    def harms(self) -> torch.Tensor:
        """-<sign(g_d), g> of the summed loss by layer, [layers] float64."""
        return -self._ranks.sum(torch.stack([self._products[layer] for layer in self._layers]))

    def _add(self, layer: int, part: torch.Tensor) -> None:
        if layer in self._sums:
            self._sums[layer] += part
        else:
            self._sums[layer] = part

    def _multiply(self, layer: int, part: torch.Tensor) -> None:
        product = (self._signs[layer] * part).sum(dtype=torch.float64)
        self._products[layer] = self._products[layer] + product if layer in self._products else product
