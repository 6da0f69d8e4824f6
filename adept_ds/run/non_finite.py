"""Where a loss is no number, the weights are asked: a tensor that holds NaN or infinity is named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from adept_ds.base.errors import InputError, NonFiniteLossError
from adept_ds.models.directory import ModelDirectory
from adept_ds.run.context import Context
from adept_ds.weights.finite import first_non_finite


@contextmanager
def naming_what_is_not_finite(run: Context, model: ModelDirectory) -> Iterator[None]:
    """For passes of a model as it lies on the disk."""
    try:
        yield
    except NonFiniteLossError as error:
        check_finite(run, model, str(error))
        raise InputError(
            f"{error}, although all weights of '{model.path}' are finite: numbers overflow on the way; "
            "set train.precision to bf16 or fp32"
        ) from None


def check_finite(run: Context, model: ModelDirectory, seen: str = "its losses are no numbers") -> None:
    """Raises `InputError`, on every rank, that names a tensor with NaN or infinity in it, if there is one.

    Args:
        seen: what is wrong where.
    """
    tensor = run.ranks.on_main(lambda: first_non_finite(model.path))
    if tensor is not None:
        raise InputError(
            f"model: '{model.path}' holds NaN or infinity in '{tensor}' ({seen}); give a model whose weights are finite"
        )
