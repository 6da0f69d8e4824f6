"""Stands for an engine where it is told to save."""

from __future__ import annotations

from typing import Any

import torch


class OneTensor:
    """Has a state of one tensor, where an engine of DeepSpeed's has many."""

    def __init__(self, error: Exception | None = None) -> None:
        self.checkpoint_engine: Any = None
        self.weight, self.error = torch.zeros(1000), error

    def save_checkpoint(self, save_dir: str, tag: str, client_state: dict[str, Any], **options: Any) -> None:
        self.checkpoint_engine.makedirs(save_dir)
        self.checkpoint_engine.save({"weight": self.weight, **client_state}, f"{save_dir}/{tag}/states.pt")
        if self.error:
            raise self.error
