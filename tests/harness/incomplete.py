"""A model whose files lack a tensor, hold one too many, or one of another shape."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], object]


def with_tensors(model: Path, copy: Path, change: Change) -> Path:
    """A copy of a model of one file (or the same), with tensors that `change` mutates."""
    if copy != model:
        shutil.copytree(model, copy)
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_tensors(copy, tensors)
    return copy


def save_tensors(model: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, model / "model.safetensors")


def without(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


def holding(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Change:
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=dtype)})
