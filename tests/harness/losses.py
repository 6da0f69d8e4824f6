"""What losses are counted over."""

from __future__ import annotations

import torch

from adept_ds.models.head_loss import IGNORED_LABEL


def count_predicted(labels: torch.Tensor) -> int:
    """Number of tokens that are predicted, over the batch."""
    return int((labels[:, 1:] != IGNORED_LABEL).sum())
