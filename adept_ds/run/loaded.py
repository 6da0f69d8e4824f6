"""Models that are loaded to be evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from adept_ds.evaluation.dials import dial_of
from adept_ds.evaluation.row_losses import Evaluator
from adept_ds.methods.shape import method_of
from adept_ds.models.directory import ModelDirectory
from adept_ds.run.context import Context
from adept_ds.zero.build import build_forward_engine
from adept_ds.zero.engine import release


@contextmanager
def evaluator_of(run: Context, model_dir: ModelDirectory) -> Iterator[Evaluator]:
    """A model as it lies on the disk, loaded as a user would."""
    model, device = build_forward_engine(run.engines, model_dir)
    config = run.settings.config
    try:
        yield Evaluator(model, device, run.ranks, config.train.micro_batch_size * config.data.seq_len)
    finally:
        release(model)


def turned(
    run: Context, evaluator: Evaluator, adapted: ModelDirectory, title: str, positions: Sequence[float]
) -> Iterator[str]:
    """Turns the dial to each position (1: the adapted model as it is), and gives a title of what the model is then."""
    dial = None
    for alpha in positions:
        if alpha != 1:
            kind, base = method_of(run.settings.config).dial, run.settings.model
            dial = dial or dial_of(kind, evaluator.model, adapted, base, run.precision)
        if dial is not None:
            dial.turn(alpha)
        yield title if alpha == 1 else f"{title} at alpha={alpha:g}"
