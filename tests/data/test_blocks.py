"""Batches of blocks: padding, fillers, and both texts of a training batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from harness.losses import count_predicted
from harness.models import save_tiny_model
from harness.packing import TEXTS, pack, stream, write_texts

from adept_ds.data.order import FILLER
from adept_ds.models.head_loss import IGNORED_LABEL, install_row_losses


def test_padding_and_fillers_never_count(tmp_path: Path, tokenizer_dir: Path, ids: dict[str, int]) -> None:
    corpus = write_texts(tmp_path / "c.jsonl", *TEXTS)
    blocks = pack([corpus], tokenizer_dir, tmp_path / "cache", keep_tail=True)
    expected = stream(TEXTS, ids)
    indices = [0, 5, FILLER]
    input_ids, labels, positions = blocks.batch(indices)
    assert positions is None
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


def test_texts_that_share_a_block_begin_anew_and_their_first_tokens_are_not_predicted(
    tmp_path: Path, tokenizer_dir: Path, ids: dict[str, int]
) -> None:
    corpus = write_texts(tmp_path / "c.jsonl", *TEXTS)
    blocks = pack([corpus], tokenizer_dir, tmp_path / "cache", seq_len=16, documents=True)
    # 22 tokens are cut into 16 and 6; these go together with 6 and 2.
    input_ids, labels, positions = blocks.batch([0, 1, 2, FILLER])
    assert positions is not None
    hello, a, norm, proof = (stream([text], ids) for text in TEXTS)
    assert input_ids[0].tolist() == norm[:16]
    assert input_ids[1, :12].tolist() == hello
    assert input_ids[2, :14].tolist() == norm[16:] + proof + a
    assert positions[1].tolist() == [*range(12), 0, 0, 0, 0]
    assert positions[2].tolist() == [*range(6), *range(6), 0, 1, 0, 0]
    no = IGNORED_LABEL
    assert labels[2].tolist() == [no, *norm[17:], no, *proof[1:], no, a[1], no, no]
    assert blocks.predicted_tokens([0, 1, 2, FILLER]) == 15 + 11 + 11 == count_predicted(labels)
    assert blocks.num_tokens([0, 1, 2, FILLER]) == 42
