"""Tensors in what modules are given and return."""

from __future__ import annotations

from typing import Any

import torch


def tensors_of(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [tensor for value in tree.values() for tensor in tensors_of(value)]
    return [tensor for item in tree for tensor in tensors_of(item)] if isinstance(tree, list | tuple) else []
