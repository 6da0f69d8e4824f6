"""Held-out documents in rows of their own: which are evaluated, how long ones are cut, and what each is known by."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from harness.packing import END, stream, tokenised, write_texts

from adept_ds.data.document_rows import DocumentRows, JoinedRows, token_shares
from adept_ds.data.order import FILLER
from adept_ds.data.tokens import TokenFile
from adept_ds.models.head_loss import IGNORED_LABEL

TEXTS = ("hello world", "a", "the norm of x is zero", "proof")  # 12 + 2 + 22 + 6 tokens with their ends
BOS = 7


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> TokenFile:
    folder = tmp_path_factory.mktemp("rows")
    return tokenised([write_texts(folder / "c.jsonl", *TEXTS)], tokenizer_dir, folder)


def rows_of(documents: DocumentRows) -> list[list[int]]:
    """Every row's own tokens, from a batch of all."""
    ids = documents.blocks.batch(range(len(documents.blocks))).input_ids
    return [row[:length].tolist() for row, length in zip(ids, documents.lengths, strict=True)]


@pytest.mark.parametrize("bos", [None, BOS])
def test_every_document_is_a_row_and_long_ones_are_cut(file: TokenFile, ids: dict[str, int], bos: int | None) -> None:
    """A row has 8 tokens, and begins with the token of the family, which is one of them."""
    documents, first = DocumentRows.of(file, 1000, 8, bos), [] if bos is None else [bos]
    room, tokens = 8 - len(first), [stream([text], ids) for text in TEXTS]
    parts = [[*range(0, len(of), room)] for of in tokens]
    expected = [
        (number, first + of[start : start + room])
        for number, of in enumerate(tokens)
        for start in parts[number]
        if len(of[start : start + room]) > 1  # a single token is left out: nothing of the text predicts it
    ]
    assert rows_of(documents) == [row for _, row in expected]
    assert documents.document_of.tolist() == [number for number, _ in expected]
    predicted = [sum(len(row) - 1 for of, row in expected if of == number) for number in range(len(TEXTS))]
    assert documents.tokens.tolist() == predicted


def test_documents_are_known_by_the_digests_of_their_texts(file: TokenFile) -> None:
    digests = [hashlib.sha256(text.encode()).digest()[:8] for text in TEXTS]
    assert DocumentRows.of(file, 1000, 8, None).ids.astype(">i8").tobytes() == b"".join(digests)


@pytest.mark.parametrize(
    ("budget", "count", "tokens"),
    [
        (1000, 4, None),
        (42, 4, None),
        (41, 3, None),
        (36, 3, None),
        (35, 2, None),
        (12, 1, None),
        (11, 1, 11),
        (3, 1, 8),
    ],
)
def test_as_many_whole_documents_as_fit_and_of_a_first_that_does_not_a_part(
    file: TokenFile, budget: int, count: int, tokens: int | None
) -> None:
    documents = DocumentRows.of(file, budget, 8, None)
    assert len(documents.ids) == count
    assert documents.lengths.sum() == (tokens or [12, 14, 36, 42][count - 1])


def test_the_budget_is_shared_in_proportion_to_the_tokens_of_sources(
    file: TokenFile, tmp_path: Path, tokenizer_dir: Path
) -> None:
    small = tokenised([write_texts(tmp_path / "s.jsonl", "x" * 20)], tokenizer_dir, tmp_path)
    assert token_shares(21, [file, small]) == [14, 7]
    assert token_shares(1000, [file, small]) == [42, 21]


def test_rows_of_several_sources_make_batches_as_long_as_their_longest(file: TokenFile, ids: dict[str, int]) -> None:
    parts = DocumentRows.of(file, 14, 64, None), DocumentRows.of(file, 1000, 64, None)
    rows = JoinedRows(parts)
    assert rows.lengths.tolist() == [12, 2, 12, 2, 22, 6]
    assert [part.tolist() for part in rows.split(np.arange(6))] == [[0, 1], [2, 3, 4, 5]]
    input_ids, labels, positions = rows.batch([5, FILLER, 3])
    assert positions is None and input_ids.shape == labels.shape == (3, 6)
    assert input_ids[0].tolist() == labels[0].tolist() == stream(["proof"], ids)
    assert input_ids[2, :2].tolist() == [ids["a"], END]
    assert labels[1:, 2:].unique().tolist() == [IGNORED_LABEL]
    assert rows.batch([FILLER]).input_ids.shape == (1, 2)
