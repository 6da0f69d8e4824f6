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
from adept_ds.ranks.unfinished import State, Unfinished, Work
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
    unfinished: Unfinished | None = None,
) -> PlaceScores:
    """Gain and harm at every place; the same on every rank, and to rounding at any number of ranks.

    Args:
        micro_batch_size: sequences per rank that pass together.
        check, move: see `PassProgress`.
        unfinished: where what was done of either text is kept, gradients included.

    Raises:
        NonFiniteLossError: a loss or a gradient is no number.
    """
    ranks, num_layers = engines.ranks, model_dir.num_layers
    unfinished = unfinished or Unfinished()
    of_domain_text, of_general_text = unfinished.work("domain text"), unfinished.work("general text")
    places = _Places(num_layers, ranks, of_domain_text.state, of_general_text.state)

    def prepare(model: torch.nn.Module) -> None:
        imagine_copies(model, model_dir.family, places.take)
        gather_layers_whole(model, model_dir.family.layer_modules(model))

    model, device = build_forward_engine(engines, model_dir, prepare)
    inner = getattr(model, "module", model)  # as in `estimators.Taylor`

    def forward(batch: Batch) -> torch.Tensor:
        losses: torch.Tensor = inner(*batch)
        losses.sum().backward()
        return losses.detach().unsqueeze(1)

    def passed(sample: Sample, work: Work, title: str, begin: float) -> TextRecord:
        progress = PassProgress(num_layers, _half(check, begin, title), _half(move, begin, title))
        losses = table_by_sequence(
            forward, sample, 1, ranks, micro_batch_size=micro_batch_size, device=device, progress=progress, work=work
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

    try:
        of_domain = passed(domain, of_domain_text, "domain text", 0.0)
        gains = places.gains(device) / of_domain.tokens
        of_general = passed(general, of_general_text, "general text", 0.5)
        harms = places.harms() / of_general.tokens
    finally:
        release(model)
    if not (gains.isfinite().all() and harms.isfinite().all()):
        raise NonFiniteLossError("probe: a gradient of a silent copy is NaN or infinite")
    return PlaceScores(
        domain=of_domain,
        general=of_general,
        gains=tuple(gains.tolist()),
        harms=tuple(harms.tolist()),
        seconds=of_domain_text.seconds + of_general_text.seconds,
    )


def _half(report: ProgressCallback, begin: float, title: str) -> ProgressCallback:
    def reported(share: float, text: str) -> None:
        report(begin + share / 2, f"{title}, {text}")

    return reported


class _Places:
    """Sums over the gradients of silent copies, slice by slice: first those of the domain, then of general text."""

    def __init__(self, num_layers: int, ranks: Ranks, sums: State, products: State) -> None:
        """Args:
        sums, products: where they are kept, "layer 0" and so on.
        """
        self._layers, self._ranks = [f"layer {layer}" for layer in range(num_layers)], ranks
        self._sums = sums
        """By layer: this rank's slice of the gradient of the domain's summed loss, [slice] float32."""
        self._signs: dict[str, torch.Tensor] = {}
        """[slice] int8"""
        self._products = products
        """<sign(g_d), g_g> over this rank's slice, of the summed loss; scalars, float64."""
        self._use: Callable[[str, torch.Tensor], None] = self._add

    def take(self, layer: int, gradient: torch.Tensor) -> None:
        """Of one micro-batch's summed loss, on every rank: [elements] float32."""
        self._use(self._layers[layer], self._ranks.slice_of_sum(gradient))

    def gains(self, device: torch.device | str) -> torch.Tensor:
        """|g|_1 of the summed loss by layer, [layers] float64. What comes in afterwards is general text's."""
        found = []
        for layer in self._layers:
            whole = self._sums.pop(layer).to(device)  # one by one: signs and sums are never there all at once
            found.append(whole.abs().sum(dtype=torch.float64))
            self._signs[layer] = whole.sign().to(torch.int8)
        self._use = self._multiply
        return self._ranks.sum(torch.stack(found))

    def harms(self) -> torch.Tensor:
        """-<sign(g_d), g> of the summed loss by layer, [layers] float64."""
        return -self._ranks.sum(torch.stack([self._products[layer] for layer in self._layers]))

    def _add(self, layer: str, part: torch.Tensor) -> None:
        known = self._sums.get(layer)
        self._sums[layer] = part if known is None else known.to(part.device).add_(part)

    def _multiply(self, layer: str, part: torch.Tensor) -> None:
        product = (self._signs[layer] * part).sum(dtype=torch.float64)
        known = self._products.get(layer)
        self._products[layer] = product if known is None else known.to(part.device) + product
