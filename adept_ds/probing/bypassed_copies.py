"""What each copy of an adapted model does to a text: the loss without it, and what it writes (docs/diagnosis.md).

    harm_c = loss(adapted model) - loss(adapted model with copy c bypassed)

All losses come out of one sweep (see `sweep`) in which a variant goes around each copy, and a last one around all of
them, which is the base. The unchanged rows of the same sweep tell what a layer writes to the residual stream: the
difference w_t = h_out - h_in of its hidden states at token t. Everything is kept by sequence, in float64, and a
sequence is computed by one rank alone, so sums do not depend on the number of ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adept_ds.base.progress import ProgressCallback
from adept_ds.data.blocks import Batch
from adept_ds.data.mixture import Sample
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.head_loss import IGNORED_LABEL
from adept_ds.probing.passes import PassProgress, table_by_sequence
from adept_ds.probing.sweep import install_layer_sweep, stacks
from adept_ds.ranks.unfinished import Work
from adept_ds.zero.build import EngineSettings, build_forward_engine
from adept_ds.zero.engine import release
from adept_ds.zero.gathered import gather_layers_whole


@dataclass(frozen=True)
class Written:
    """What a layer writes to the residual stream, by sequence; of a text's tokens all but the first, float64.

    A first token is left out because models use it as a place to put attention: its hidden state is often a hundred
    times as long as all others, and means nothing.
    """

    squares: torch.Tensor
    """Sum over tokens of |w_t|^2. [sequences]"""
    stream_squares: torch.Tensor
    """Sum over tokens of |h_t|^2, below the layer. [sequences]"""
    share_squares: torch.Tensor
    """Sum over tokens of |w_t|^2 / |h_t|^2. [sequences]"""
    sums: torch.Tensor
    """Sum over tokens of w_t. [sequences, dim]"""


@dataclass(frozen=True)
class CopyPasses:
    """What one sweep over a text found, by sequence."""

    tokens: torch.Tensor
    """Predicted tokens. [sequences] float64"""
    with_all: torch.Tensor
    """Summed token losses of the adapted model. [sequences] float64"""
    without: torch.Tensor
    """The same with one copy bypassed, in the order of the copies. [sequences, copies] float64"""
    without_any: torch.Tensor
    """The same with all bypassed. [sequences] float64"""
    written: dict[int, Written]
    """By layer: of each copy, and of the layer below it."""


class CopySweep:
    """An adapted model on an engine for sweeps; every rank makes one, and closes it at the end.

    Args:
        copies: their layers in the adapted model, ascending.
    """

    def __init__(
        self, engines: EngineSettings, model_dir: ModelDirectory, copies: Sequence[int], *, max_stack_tokens: int
    ) -> None:
        self._ranks, self._num_layers = engines.ranks, model_dir.num_layers
        # All are bypassed from the lowest on: that variant joins where the first single one does.
        self._bypasses = [{copies[0]}, set(copies), *({copy} for copy in copies[1:])]
        self._taps = _Taps(sorted({layer for copy in copies for layer in (copy - 1, copy)}))
        self._progress: PassProgress | None = None

        def prepare(model: torch.nn.Module) -> None:
            config: Any = model.config
            self._hidden_size: int = config.hidden_size
            layers = model_dir.family.layer_modules(model)
            install_layer_sweep(model, model_dir.family, max_stack_tokens, self._on_layer, self._bypasses)
            self._taps.install(layers)
            gather_layers_whole(model, layers)

        self._model, self._device = build_forward_engine(engines, model_dir, prepare)

    def over(
        self,
        sample: Sample,
        *,
        micro_batch_size: int,
        check: ProgressCallback,
        move: ProgressCallback,
        work: Work | None = None,
    ) -> CopyPasses:
        """One sweep over a text; the same on every rank.

        Args:
            micro_batch_size: sequences per rank that are swept together.
            check, move: see `PassProgress`.
            work: where the passes are kept.

        Raises:
            NonFiniteLossError: the adapted model's loss is no number.
        """
        of_layers = stacks(self._num_layers, self._bypasses)
        progress = PassProgress(self._num_layers, check, move, [len(stack.through) for stack in of_layers])
        num_variants, width = 1 + len(self._bypasses), self._taps.width(self._hidden_size)

        def forward(batch: Batch) -> torch.Tensor:
            self._taps.begin(batch)
            losses = self._model(*batch).view(num_variants, len(batch.input_ids)).T
            return torch.cat([losses.double(), self._taps.take()], dim=1)

        self._progress = progress
        with torch.no_grad():
            table = table_by_sequence(
                forward,
                sample,
                num_variants + width,
                self._ranks,
                micro_batch_size=micro_batch_size,
                device=self._device,
                progress=progress,
                work=work,
            )
        losses = table[:, :num_variants]
        return CopyPasses(
            tokens=torch.tensor(sample.tokens(), dtype=torch.float64),
            with_all=losses[:, 0],
            without=losses[:, [1, *range(3, num_variants)]],
            without_any=losses[:, 2],
            written=self._taps.written(table[:, num_variants:]),
        )

    def close(self) -> None:
        release(self._model)

    def _on_layer(self, position: int) -> None:
        if self._progress:
            self._progress.layer(position)


class _Taps:
    """Sums over what some layers write in the rows of the unchanged model, which are the first of the stack."""

    def __init__(self, layers: Sequence[int]) -> None:
        self._layers = tuple(layers)
        self._counted = torch.empty(0)
        self._found: dict[int, torch.Tensor] = {}

    def install(self, layers: Sequence[torch.nn.Module]) -> None:
        for position in self._layers:
            layers[position].register_forward_hook(functools.partial(self._record, position))

    def width(self, hidden_size: int) -> int:
        return len(self._layers) * (3 + hidden_size)

    def begin(self, batch: Batch) -> None:
        """Of which tokens what is written counts: those that are predicted."""
        self._counted = (batch.labels != IGNORED_LABEL).clone()
        self._counted[:, 0] = False

    def take(self) -> torch.Tensor:
        """Of the batch. [rows, width] float64"""
        return torch.cat([self._found.pop(position) for position in self._layers], dim=1)

    def written(self, table: torch.Tensor) -> dict[int, Written]:
        """From the columns of a table [sequences, width]."""
        parts = dict(zip(self._layers, table.chunk(len(self._layers), dim=1), strict=True))
        return {layer: Written(part[:, 0], part[:, 1], part[:, 2], part[:, 3:]) for layer, part in parts.items()}

    def _record(self, position: int, _: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        counted = self._counted.unsqueeze(-1)
        rows = len(counted)
        stream = inputs[0][:rows].double()
        # What does not count becomes 0: padding may hold anything.
        write = torch.where(counted, output[:rows].double() - stream, 0.0)
        square, stream_square = write.square().sum(-1), torch.where(counted, stream, 0.0).square().sum(-1)
        share = torch.where(stream_square > 0, square / stream_square, 0.0)
        sums = torch.stack([square.sum(1), stream_square.sum(1), share.sum(1)], dim=1)
        self._found[position] = torch.cat([sums, write.sum(1)], dim=1)
