"""Means over tokens, of sources and of corpora; and what is no number."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from harness.packing import made_up_blocks

from adept_ds.base.errors import NonFiniteLossError
from adept_ds.base.run_records import Accuracy
from adept_ds.data.document_rows import DocumentRows
from adept_ds.evaluation.held_out import SourceName, by_corpus, document_losses
from adept_ds.evaluation.row_losses import Evaluator
from adept_ds.ranks.collectives import Ranks

ONE, TWO, DOMAIN = SourceName("general", "one"), SourceName("general", "two"), SourceName("domain", "one")


def documents(*tokens: int) -> DocumentRows:
    """Documents of so many predicted tokens, each a row."""
    numbers = np.arange(len(tokens))
    return DocumentRows(numbers, made_up_blocks(np.zeros((len(tokens), 8), np.int32)), np.array(tokens) + 1, numbers)


HELD_OUT = {ONE: documents(1, 3), TWO: documents(6), DOMAIN: documents(2)}
LOSSES = {ONE: np.array([5.0, 7.0]), TWO: np.array([8.0]), DOMAIN: np.array([1.0])}


def test_a_token_counts_the_same_wherever_it_stands() -> None:
    found = by_corpus(HELD_OUT, LOSSES)
    assert {name: of.to_json() for name, of in found.items()} == {
        "general": {
            "loss": 2.0,
            "tokens": 10,
            "documents": 3,
            "sources": {
                "one": {"loss": 3.0, "tokens": 4, "documents": 2},
                "two": {"loss": 8 / 6, "tokens": 6, "documents": 1},
            },
        },
        "domain": {
            "loss": 0.5,
            "tokens": 2,
            "documents": 1,
            "sources": {"one": {"loss": 0.5, "tokens": 2, "documents": 1}},
        },
    }


def test_accuracies_stand_beside_the_losses_of_their_sources() -> None:
    found = Accuracy(questions=1, accuracy=1.0, accuracy_stderr=None, accuracy_norm=0.0, accuracy_norm_stderr=None)
    sources = by_corpus(HELD_OUT, LOSSES, {TWO: found})["general"].sources
    assert sources["two"].to_json() == {
        "loss": 8 / 6,
        "tokens": 6,
        "documents": 1,
        "questions": 1,
        "accuracy": 1.0,
        "accuracy_norm": 0.0,
    }
    assert sources["one"].accuracy is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_laid_to_its_corpus(value: float) -> None:
    def model(input_ids: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.full((len(input_ids),), value if input_ids.shape[1] == 3 else 1.0)  # the row of the domain

    with pytest.raises(NonFiniteLossError, match=f"^data.domain_eval: the held-out loss is {value}"):
        document_losses(Evaluator(model, "cpu", Ranks(), 1), HELD_OUT)
