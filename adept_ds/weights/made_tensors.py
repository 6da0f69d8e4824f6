"""Tensors that are made when they are asked for: of a model that is read by name, few are in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch


class MadeTensors(Mapping[str, torch.Tensor]):
    """Tensors by name; each is made whenever it is asked for, and not kept."""

    def __init__(self, makes: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        self._makes = makes

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._makes[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makes)

    def __len__(self) -> int:
        return len(self._makes)

    def __contains__(self, name: object) -> bool:
        """Without making it."""
        return name in self._makes

    def __or__(self, other: MadeTensors) -> MadeTensors:
        return MadeTensors({**self._makes, **other._makes})
