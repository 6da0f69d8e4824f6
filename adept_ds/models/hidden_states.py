"""What a model computes below its head, without a question to the device on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import masking_utils


def final_hidden(model: Any, input_ids: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """What enters the head. [rows, tokens, dim]

    Args:
        model: a causal language model of transformers.
        positions: of tokens in their texts, where rows hold several; None: a row is one text. [rows, tokens]
    """
    with _packing_is_known(positions is not None):
        hidden: torch.Tensor = model.base_model(
            input_ids=input_ids, position_ids=positions, use_cache=False
        ).last_hidden_state
    return hidden


@contextmanager
def _packing_is_known(packed: bool) -> Iterator[None]:
    """transformers (5.23, masking_utils.py: `find_packed_sequence_indices`) looks at the positions of every forward
    pass for rows of several texts, and the host waits until the device has come so far. Here it is told.

    A transformers that has no such function is left alone: nothing but time depends on it.
    """
    name = "find_packed_sequence_indices"
    find = getattr(masking_utils, name, None)
    if find is None:
        yield
        return

    def told(position_ids: torch.Tensor) -> torch.Tensor | None:
        """[rows, tokens]: which text of its row a token is of; None: every row is one text."""
        return _numbers_of_texts(position_ids) if packed else None

    setattr(masking_utils, name, told)
    try:
        yield
    finally:
        setattr(masking_utils, name, find)


def _numbers_of_texts(positions: torch.Tensor) -> torch.Tensor:
    """A text begins where a position does not follow the one before it. [rows, tokens] int64"""
    return (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
