"""How a method's result is turned down: which weights the dial moves, and where they come from (see `zero.dialled`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from adept_ds.models.directory import ModelDirectory
from adept_ds.models.families import Family
from adept_ds.weights.expansion import Expansion
from adept_ds.weights.hf_directory import stored_tensors
from adept_ds.weights.start_weights import StartWeights
from adept_ds.zero.dialled import Dial

Kind = Literal["copies", "interpolation"]
"""As `methods.shape.Method.dial`."""


def dial_of(kind: Kind, model: Any, adapted: ModelDirectory, base: ModelDirectory, precision: torch.dtype) -> Dial:
    """The dial of an adapted model.

    Args:
        model: what `build_forward_engine` made of `adapted`, or a plain model of it.
        precision: that it was loaded in: both ends are rounded to it first, as loading does.
    """
    module = getattr(model, "module", model)
    trained = StartWeights(adapted, precision).elements
    names = [name for name, _ in module.named_parameters()]
    if kind == "interpolation":
        return Dial(module, names, StartWeights(base, precision).elements, trained)
    silent = adapted.family.silent
    writers = list(filter(_writes_of_a_copy(adapted), names))
    return Dial(module, writers, lambda _, start, stop: torch.full((stop - start,), silent), trained)


def alphas_by_parameter(dial: Dial, adapted: ModelDirectory, alphas: Sequence[float]) -> float | dict[str, float]:
    """What the dial of copies is turned to, so that each copy, lowest first, is at a position of its own."""
    if len(set(alphas)) == 1:
        return alphas[0]
    of_copy = dict(zip(Expansion.read(adapted.path).copy_indices, alphas, strict=True))
    places = {name: adapted.family.split_name(name) for name in dial.names}
    return {name: of_copy[place[0]] for name, place in places.items() if place is not None}


def _writes_of_a_copy(adapted: ModelDirectory) -> Callable[[str], bool]:
    """Whether a parameter of the model, by its name in it, is a factor with which a copy writes."""
    copies, stored = set(Expansion.read(adapted.path).copy_indices), stored_tensors(adapted.path)
    family = adapted.family

    def writes(parameter: str) -> bool:
        place = family.split_name(parameter)
        if place is None or place[0] not in copies:
            return False
        return any(_writes(family, name) for expert in family.stored_parts(parameter, stored) for name in expert)

    return writes


def _writes(family: Family, stored_name: str) -> bool:
    place = family.split_name(stored_name)
    return place is not None and family.writes_residual(place[1])
