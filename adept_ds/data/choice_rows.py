"""Choices of questions as rows, of which the loss of the choice alone counts.

A context and its continuation are tokenised as by lm-eval: spaces at the end of the context move to the continuation,
and its tokens are those by which both together are longer than the context alone. Where texts begin with a token of
their own (`data.bos`), so does the context.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adept_ds.base.errors import InputError
from adept_ds.data.blocks import Batch
from adept_ds.data.order import FILLER
from adept_ds.data.questions import Question
from adept_ds.data.tokenizer import Ids, TextTokenizer
from adept_ds.models.head_loss import IGNORED_LABEL


@dataclass(frozen=True)
class ChoiceRows:
    """A row for each choice of each question: the context, and behind it the choice."""

    tokens: Sequence[Ids]
    """Of each row."""
    firsts: Sequence[int]
    """Of each row, the first token that counts."""

    @property
    def lengths(self) -> np.ndarray:
        """[rows] int64: tokens of each."""
        return np.array([len(tokens) for tokens in self.tokens], np.int64)

    def batch(self, indices: Sequence[int]) -> Batch:
        """As in `document_rows.Rows`."""
        rows = {place: row for place, row in enumerate(indices) if row != FILLER}
        longest = max((len(self.tokens[row]) for row in rows.values()), default=2)
        input_ids = torch.zeros(len(indices), longest, dtype=torch.int64)
        labels = torch.full_like(input_ids, IGNORED_LABEL)
        for place, row in rows.items():
            tokens, first = torch.from_numpy(self.tokens[row].astype(np.int64)), self.firsts[row]
            input_ids[place, : len(tokens)] = tokens
            labels[place, first : len(tokens)] = tokens[first:]
        return Batch(input_ids, labels, None)

    @classmethod
    def joined(cls, parts: Sequence[ChoiceRows]) -> ChoiceRows:
        """Those of all, in order."""
        return cls([row for part in parts for row in part.tokens], [first for part in parts for first in part.firsts])

    @classmethod
    def of(cls, questions: Iterable[Question], tokenizer: TextTokenizer, max_tokens: int) -> ChoiceRows:
        """Args: max_tokens: of a row; a context that is longer loses its beginning.

        Raises:
            InputError: a choice has no tokens, or does not fit, or spells what `data.special_tokens_in_text` refuses.
        """
        encoded = [
            _encode(tokenizer, pair, max_tokens, question.place) for question in questions for pair in question.pairs()
        ]
        return cls([tokens for tokens, _ in encoded], [first for _, first in encoded])


def encode_pair(tokenizer: TextTokenizer, context: str, continuation: str) -> tuple[Ids, int]:
    """The tokens of both, int32, and how many of them are the context's, which are those that it has alone.

    Raises:
        ValueError: as `TextTokenizer.encode`.
    """
    text, stripped = context + continuation, context.rstrip()
    whole, alone = tokenizer.encode([text, stripped])
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return np.concatenate([np.array(bos, np.int32), alone, whole[len(alone) :]]), len(bos) + len(alone)


def _encode(tokenizer: TextTokenizer, pair: tuple[str, str], max_tokens: int, place: str) -> tuple[Ids, int]:
    try:
        tokens, first = encode_pair(tokenizer, *pair)
    except ValueError as error:
        raise InputError(f"{place}: {error}; correct the question") from None
    if not 0 < len(tokens) - first < max_tokens:
        what = (
            "has no token" if first >= len(tokens) else f"is longer than the {max_tokens} tokens that the model takes"
        )
        raise InputError(f"{place}: the choice {pair[1].strip()!r:.100} {what}; correct the question")
    cut = max(0, len(tokens) - max_tokens)
    return tokens[cut:], first - cut
