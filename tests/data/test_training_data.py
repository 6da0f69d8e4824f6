"""Batches of training: both texts in each, the same on every number of ranks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from harness.packing import pack, write_texts

from adept_ds.config.train_sections import TrainSection
from adept_ds.data.mixture import Mixture
from adept_ds.data.training_data import BatchEntry, TrainingData, micro_batches


def corpus(tmp_path: Path, tokenizer_dir: Path, text: str, *, documents: bool = False) -> Mixture:
    file = write_texts(tmp_path / f"{text[0]}.jsonl", *text.split())
    return Mixture.of([pack([file], tokenizer_dir, tmp_path / "cache", documents=documents)])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("replayed", [0, 4, 5])
def test_a_batch_is_the_same_at_every_number_of_ranks_and_replayed_sequences_come_first(
    tmp_path: Path, tokenizer_dir: Path, world_size: int, replayed: int
) -> None:
    domain = corpus(tmp_path, tokenizer_dir, "x" * 200)
    general = corpus(tmp_path, tokenizer_dir, "y" * 130)
    data = TrainingData(domain, general if replayed else None, replayed)
    train = TrainSection(global_batch_size=12, micro_batch_size=1, seed=1)
    for step in range(5):
        entries = data.global_batch(step, train)
        ranks = [micro_batches(entries, train, rank, world_size) for rank in range(world_size)]
        rows = [row for batches in ranks for batch in batches for row in batch]
        assert {len(batches) for batches in ranks} == {12 // world_size}
        size = 12 - replayed
        assert [row.index for row in entries if row.replayed] == general.drawn(step * replayed, replayed, 1)
        assert [row.index for row in entries if not row.replayed] == domain.drawn(step * size, size, 1)
        assert Counter(rows) == Counter(entries)
        for batches in ranks:
            kinds = [row.replayed for batch in batches for row in batch]
            assert kinds == sorted(kinds, reverse=True)
            assert replayed % world_size or sum(kinds) == replayed // world_size


def test_a_micro_batch_of_both_texts_has_each_rows_own_tokens(tmp_path: Path, tokenizer_dir: Path) -> None:
    domain, general = corpus(tmp_path, tokenizer_dir, "x" * 200), corpus(tmp_path, tokenizer_dir, "y" * 130)
    data, rows = TrainingData(domain, general, 1), [BatchEntry(1, replayed=True), BatchEntry(2, replayed=False)]
    input_ids, labels, positions = data.batch(rows)
    assert torch.equal(input_ids, torch.cat([general.batch([1]).input_ids, domain.batch([2]).input_ids]))
    assert torch.equal(labels, input_ids)
    assert positions is None
    assert (data.num_tokens(rows), data.predicted_tokens(rows)) == (16, 14)


def test_tokens_of_whole_documents_are_counted_one_by_one(tmp_path: Path, tokenizer_dir: Path) -> None:
    domain = corpus(tmp_path, tokenizer_dir, "abc defg hi jklmno", documents=True)  # 4, 5, 3, 7 with separators
    data, rows = TrainingData(domain), [BatchEntry(block, replayed=False) for block in range(3)]
    assert data.num_tokens(rows) == 4 + 5 + 3 + 7
    assert data.predicted_tokens(rows) == 3 + 4 + 2 + 6
    batch = data.batch(rows)
    assert batch.positions is not None
    assert int((batch.positions > 0).sum()) == 15
