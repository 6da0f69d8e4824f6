"""The weights of a forward engine between an origin and what training made of them.

    weights = origin + alpha (trained - origin)

computed in fp32 and rounded to the model's dtype; with alpha 1 they are the trained ones bit for bit, with alpha 0 the
origin's. Interpolation with the base is WiSE-FT (Wortsman et al. 2022, arXiv:2109.01903); for copies of layers the
origin is the value with which they write nothing, which again is the base's function.

Written against DeepSpeed 0.19.8 (runtime/zero/partition_parameters.py): under ZeRO-3 each rank sets its own slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from adept_ds.base.errors import LayoutError
from adept_ds.zero.assumptions import layout_complaint

Elements = Callable[[str, int, int], torch.Tensor]
"""Name of a parameter, start, stop -> elements start:stop of the flattened parameter, [stop - start] fp32."""


class Dial:
    """Sets parameters of a model that computes nothing but forward passes.

    Nothing is kept in memory: both ends are read, run by run, when the dial is turned.

    Args:
        model: a plain model, or the module of a ZeRO-3 engine.
        names: of the parameters that the dial moves.
        origin: their weights at 0.
        trained: their weights at 1.
    """

    def __init__(self, model: torch.nn.Module, names: list[str], origin: Elements, trained: Elements) -> None:
        parameters = dict(model.named_parameters())
        self._parameters = {name: parameters[name] for name in names}
        self._origin, self._trained = origin, trained

    @property
    def names(self) -> list[str]:
        """Of the parameters that it moves."""
        return list(self._parameters)

    def turn(self, alpha: float | Mapping[str, float]) -> None:
        """Set all weights; every rank has to call it.

        Args:
            alpha: from 0 to 1, the same for all parameters, or for each by its name.
        """
        for name, parameter in self._parameters.items():
            here = alpha[name] if isinstance(alpha, Mapping) else alpha
            for elements, start in held_elements(parameter):
                elements.copy_(self._values(name, start, start + elements.numel(), here))

    def _values(self, name: str, start: int, stop: int, alpha: float) -> torch.Tensor:
        """[stop - start] fp32."""
        if alpha == 1:
            return self._trained(name, start, stop)
        origin = self._origin(name, start, stop)
        return origin if alpha == 0 else origin + alpha * (self._trained(name, start, stop) - origin)


def held_elements(parameter: Any) -> Iterator[tuple[torch.Tensor, int]]:
    """What this rank holds of a parameter: flat views of it, each with the number of its first element.

    A partitioned parameter that is small stays gathered between passes: there are two of it. Under hpZ the group of
    ranks that share a host has another partition of its own, from the first pass on.
    """
    if not hasattr(parameter, "ds_tensor"):
        yield parameter.data.view(-1), 0
        return
    try:
        import deepspeed.comm as dist
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        partitions = [(parameter.ds_tensor, parameter.ds_process_group)]
        if parameter.ds_secondary_tensor is not None:
            partitions.append((parameter.ds_secondary_tensor, parameter.ds_zero_param_process_group))
        for partition, group in partitions:
            start = dist.get_rank(group=group) * partition.numel()
            real = max(0, min(partition.numel(), parameter.ds_numel - start))  # a last one ends in padding
            if real:
                yield partition.data[:real], start
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:
            yield parameter.data.view(-1), 0
    except AttributeError as error:
        raise LayoutError(layout_complaint(str(error))) from error
