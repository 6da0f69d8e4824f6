"""What evaluation must find, in plain PyTorch: of one document, or one choice of a question, at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import oracle
import torch
from harness.packing import byte_ids, stream

CONTEXT = "Question: {}\nAnswer:"
"""What stands before a choice."""


def document_sums(
    model_dir: Path, tokenizer_dir: Path, texts: Sequence[str], seq_len: int, max_tokens: int | None = None
) -> list[float]:
    """Sums of each document's token losses: of its sequences, each alone.

    Args:
        max_tokens: of each document, at most; None: all.
    """
    model, ids = oracle.load(model_dir), byte_ids(tokenizer_dir)
    with torch.no_grad():
        return [_loss(model, stream([text], ids)[:max_tokens], seq_len) for text in texts]


def _loss(model: Any, tokens: Sequence[int], seq_len: int) -> float:
    rows = [torch.tensor([tokens[start : start + seq_len]]) for start in range(0, len(tokens), seq_len)]
    return sum(float(oracle.mean_loss(model, [(row, row)])) * (row.shape[1] - 1) for row in rows if row.shape[1] > 1)


def chosen(model_dir: Path, tokenizer_dir: Path, questions: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Of each question, the choice that is likeliest, and the one that is by character."""
    model, ids = oracle.load(model_dir), byte_ids(tokenizer_dir)

    def likelihood(question: str, choice: str) -> float:
        before, after = ([ids[letter] for letter in text] for text in (CONTEXT.format(question), f" {choice}"))
        tokens = torch.tensor([before + after])
        with torch.no_grad():
            logarithms = model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
        return float(logarithms.gather(1, tokens[0, 1:, None])[-len(after) :].sum())

    found = []
    for question in questions:
        values = [likelihood(question["question"], choice) for choice in question["choices"]]
        by_length = [value / len(choice) for value, choice in zip(values, question["choices"], strict=True)]
        found.append((values.index(max(values)), by_length.index(max(by_length))))
    return found
