"""The next batch, prepared by a thread while this one computes.

What a batch consists of is asked for by the main thread, since a stream may have to speak with the other ranks; its
tokens, which may have to come from the disk, are gathered by the thread, into memory that the device copies from by
itself.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace

import torch

from adept_ds.base.background import at_once, in_background
from adept_ds.config.train_sections import TrainSection
from adept_ds.data.training_data import StepBatch, TrainingData, share_of
from adept_ds.ranks.collectives import Ranks


class BatchesAhead:
    """One rank's batches of a training run, which are asked for in order of steps, by every rank alike.

    Args:
        device: that computes on them.
    """

    def __init__(self, data: TrainingData, train: TrainSection, ranks: Ranks, device: torch.device) -> None:
        self._data, self._train, self._ranks, self._device = data, train, ranks, device
        self._coming: tuple[int, Future[StepBatch]] | None = None

    def of_step(self, step: int) -> StepBatch:
        """That of optimizer step `step` (from 0); that of the next one is begun, if there is a next one.

        Raises:
            InputError: the text of this step cannot be read; on every rank.
        """
        coming = self._coming[1] if self._coming and self._coming[0] == step else self._begin(step)
        batch = coming.result()
        self._coming = (step + 1, self._begin(step + 1)) if step + 1 < self._train.steps else None
        return batch

    def _begin(self, step: int) -> Future[StepBatch]:
        drawn = at_once(lambda: self._data.global_batch(step, self._train))

        def prepare() -> StepBatch:
            batch = share_of(drawn.result(), self._data, self._train, self._ranks)
            return replace(batch, rows=batch.rows.pinned(self._device))

        return in_background(prepare)
