"""Batches of blocks: padding, fillers, and both texts of a training batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness.losses import count_predicted
from harness.models import save_tiny_model
from harness.packing import TEXTS, pack, stream, write_texts

from adept_ds.config.schema import TrainSection
from adept_ds.data.blocks import BatchEntry, TrainingData
from adept_ds.data.order import FILLER, global_batch
from adept_ds.models.head_loss import IGNORED_LABEL, install_row_losses


def test_padding_and_fillers_never_count(tmp_path: Path, tokenizer_dir: Path, ids: dict[str, int]) -> None:
    corpus = write_texts(tmp_path / "c.jsonl", *TEXTS)
    blocks = pack([corpus], tokenizer_dir, tmp_path / "cache", keep_tail=True)
    expected = stream(TEXTS, ids)
    indices = [0, 5, FILLER]
    input_ids, labels = blocks.batch(indices)
    assert input_ids.shape == labels.shape == (3, 8)
    assert input_ids.dtype == labels.dtype == torch.int64
    assert input_ids[0].tolist() == labels[0].tolist() == expected[:8]
    assert labels[1].tolist() == expected[40:] + [IGNORED_LABEL] * 6
    assert input_ids[1, :2].tolist() == expected[40:]
    assert labels[2].tolist() == [IGNORED_LABEL] * 8
    assert blocks.predicted_tokens(indices) == 7 + 1 + 0 == count_predicted(labels)


def test_the_loss_of_a_padded_block_is_that_of_its_tokens_alone(
    tmp_path: Path, tokenizer_dir: Path, ids: dict[str, int]
) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model"))
    text = TEXTS[2]
    alone = torch.tensor([stream([text], ids)])
    expected = model(input_ids=alone, labels=alone).loss
    blocks = pack(
        [write_texts(tmp_path / "c.jsonl", text)], tokenizer_dir, tmp_path / "cache", seq_len=32, keep_tail=True
    )
    model.requires_grad_(False)
    install_row_losses(model)
    losses = model(*blocks.batch([0, FILLER]))
    # float32 sums of 21 token losses in another order
    torch.testing.assert_close(losses[0] / blocks.predicted_tokens([0]), expected, rtol=1e-5, atol=0.0)
    assert float(losses[1]) == 0.0


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("replayed", [0, 4, 5])
def test_a_batch_is_the_same_at_every_number_of_ranks_and_replayed_sequences_come_first(
    tmp_path: Path, tokenizer_dir: Path, world_size: int, replayed: int
) -> None:
    domain = pack([write_texts(tmp_path / "d.jsonl", "x" * 200)], tokenizer_dir, tmp_path / "cache")
    general = pack([write_texts(tmp_path / "g.jsonl", "y" * 130)], tokenizer_dir, tmp_path / "cache")
    data = TrainingData(domain, general if replayed else None, replayed)
    train = TrainSection(global_batch_size=12, micro_batch_size=1, seed=1)
    for step in range(5):
        ranks = [data.micro_batches(step, train, rank, world_size) for rank in range(world_size)]
        rows = [row for batches in ranks for batch in batches for row in batch]
        assert {len(batches) for batches in ranks} == {12 // world_size}
        assert sorted(row.index for row in rows if row.replayed) == sorted(
            global_batch(step, replayed, len(general), 1)
        )
        mine = [row.index for row in rows if not row.replayed]
        assert sorted(mine) == sorted(global_batch(step, 12 - replayed, len(domain), 1))
        for batches in ranks:
            kinds = [row.replayed for batch in batches for row in batch]
            assert kinds == sorted(kinds, reverse=True)
            assert replayed % world_size or sum(kinds) == replayed // world_size


def test_a_micro_batch_of_both_texts_has_each_rows_own_tokens(tmp_path: Path, tokenizer_dir: Path) -> None:
    domain, general = (
        pack([write_texts(tmp_path / "d.jsonl", "x" * 200)], tokenizer_dir, tmp_path / "cache"),
        pack([write_texts(tmp_path / "g.jsonl", "y" * 130)], tokenizer_dir, tmp_path / "cache"),
    )
    data = TrainingData(domain, general, 1)
    input_ids, labels = data.batch([BatchEntry(1, replayed=True), BatchEntry(2, replayed=False)])
    assert torch.equal(input_ids, torch.cat([general.batch([1])[0], domain.batch([2])[0]]))
    assert torch.equal(labels, input_ids)
