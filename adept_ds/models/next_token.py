"""A model's next-token distribution, token by token, with a cache of what attention has seen."""

from __future__ import annotations

from typing import Any

import torch

from adept_ds.models.families import Family
from adept_ds.models.head_loss import head_logits


class NextToken:
    """Makes `model(input_ids)` return the logits of what follows the last token of each row. [rows, vocab] float32

    The tokens are those that follow the ones of earlier calls, since `begin`. As `install_row_losses`, it replaces the
    `forward` of the model and of its head.

    Args:
        model: made by `load_causal_lm`.
    """

    def __init__(self, model: torch.nn.Module, family: Family) -> None:
        self._model: Any = model
        self._head: Any = model.get_output_embeddings()  # type: ignore[operator]
        self._divisor, self._cap = family.logit_transform(model.config)
        self._seen: Any = None
        self._model.forward, self._head.forward = self._forward, self._of_head

    def begin(self) -> None:
        """New rows, of which no token has been seen."""
        self._seen = None

    def _forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        found = self._model.base_model(input_ids=input_ids, past_key_values=self._seen, use_cache=True)
        self._seen = found.past_key_values
        logits: torch.Tensor = self._head(found.last_hidden_state[:, -1])
        return logits

    def _of_head(self, hidden: torch.Tensor) -> torch.Tensor:
        return head_logits(hidden, self._head.weight, self._head.bias, self._divisor, self._cap)[0]
