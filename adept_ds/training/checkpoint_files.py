"""The files of a checkpoint: collected where training stands still, written by the same thread or another."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file

from adept_ds.base.files import share, sync, write_json, writing
from adept_ds.base.proofs import FileProof

T = TypeVar("T")


class CheckpointFiles:
    """What a rank writes into a checkpoint.

    Args:
        copied: what is added is copied to the host's memory at once: training may change it before it is written.
    """

    def __init__(self, *, copied: bool) -> None:
        self._copied = copied
        self._writes: dict[str, Callable[[Path], None]] = {}

    def add_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """As a safetensors file."""
        self._add(name, tensors, _save_tensors)

    def add_state(self, name: str, state: Any) -> None:
        """As `torch.save` writes it."""
        self._add(name, state, _save_state)

    def add_json(self, name: str, value: Any) -> None:
        self._add(name, value, lambda tree, path: write_json(path, tree))

    def write(self, folder: Path) -> dict[str, FileProof]:
        """Bring all of them to the disk; what each is, by name.

        Raises:
            MachineError: one cannot be written; the message names it and says why.
        """
        return {name: _written(folder / name, write) for name, write in self._writes.items()}

    def _add(self, name: str, content: T, write: Callable[[T, Path], None]) -> None:
        kept = on_host(content) if self._copied else content
        self._writes[name] = lambda path: write(kept, path)


def on_host(value: T) -> T:
    """A copy of nested containers and objects, all tensors in them copied to the host; the same tensor stays one."""
    copies: dict[int, Any] = {id(tensor): tensor.detach().to("cpu", copy=True) for tensor in _tensors(value)}
    return copy.deepcopy(value, copies)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _written(path: Path, write: Callable[[Path], None]) -> FileProof:
    with writing(path):
        write(path)
        sync(path)
        return FileProof.of(path)


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path)
    share(path)


def _save_state(state: Any, path: Path) -> None:
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # all that torch says of a full disk is that positions do not fit
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
