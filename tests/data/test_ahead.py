"""The next batch is there when it is asked for: the same rows, gathered by another thread."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from harness.packing import pack, write_texts

from adept_ds.base.errors import InputError
from adept_ds.config.train_sections import TrainSection
from adept_ds.data.ahead import BatchesAhead
from adept_ds.data.blocks import Batch
from adept_ds.data.mixture import Mixture
from adept_ds.data.training_data import BatchEntry, TrainingData, micro_batches, step_batch
from adept_ds.ranks.collectives import Ranks

TRAIN = TrainSection(global_batch_size=12, micro_batch_size=2, seed=1, steps=6)
RANKS = Ranks(rank=1, world_size=2)
CPU = torch.device("cpu")


@pytest.fixture
def data(tmp_path: Path, tokenizer_dir: Path) -> TrainingData:
    def corpus(text: str, documents: bool) -> Mixture:
        file = write_texts(tmp_path / f"{text[0]}.jsonl", *text.split())
        return Mixture.of([pack([file], tokenizer_dir, tmp_path / "cache", documents=documents)])

    return TrainingData(corpus("abc defg hi jklmnop jklmnop " * 5, True), corpus("x" * 90, True), 4)


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None)


def test_micro_batches_are_those_of_their_entries_one_by_one(data: TrainingData) -> None:
    for step in range(TRAIN.steps):
        entries = data.global_batch(step, TRAIN)
        batch = step_batch(data, step, TRAIN, RANKS)
        mine = micro_batches(entries, TRAIN, 1, 2)
        for found, rows in zip(batch.micro_batches(CPU), mine, strict=True):
            alone = [data.batch([row]) for row in rows]
            wanted = Batch.joined(alone)
            assert torch.equal(found.input_ids, wanted.input_ids) and torch.equal(found.labels, wanted.labels)
            if found.positions is None:
                wanted_positions = torch.arange(8).expand(len(rows), -1)
                assert wanted.positions is not None and torch.equal(wanted.positions, wanted_positions)
            else:
                assert same(found, wanted)
        assert (batch.tokens, batch.predicted) == (data.num_tokens(entries), data.predicted_tokens(entries))
        assert batch.replay_predicted == data.predicted_tokens([entry for entry in entries if entry.replayed])
        assert (batch.replayed_rows, batch.replayed_batches, batch.sequences) == (2, 1, 12)


def test_where_no_row_is_packed_positions_need_not_be_said(data: TrainingData) -> None:
    """What attends to what is then known without looking at them."""
    said = [
        micro.positions is not None
        for step in range(TRAIN.steps)
        for micro in step_batch(data, step, TRAIN, RANKS).micro_batches(CPU)
    ]
    assert set(said) == {True, False}


def test_batches_come_in_order_and_a_thread_has_gathered_them(
    data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, gathered = list[tuple[int, str]](), list[str]()
    draw, gather = TrainingData.global_batch, TrainingData.batch

    def drawing(of: TrainingData, step: int, train: TrainSection) -> list[BatchEntry]:
        drawn.append((step, threading.current_thread().name))
        return draw(of, step, train)

    def gathering(of: TrainingData, entries: list[BatchEntry]) -> Batch:
        gathered.append(threading.current_thread().name)
        return gather(of, entries)

    wanted = [step_batch(data, step, TRAIN, RANKS) for step in range(TRAIN.steps)]
    monkeypatch.setattr(TrainingData, "global_batch", drawing)
    monkeypatch.setattr(TrainingData, "batch", gathering)
    ahead, main = BatchesAhead(data, TRAIN, RANKS, CPU), threading.current_thread().name
    for step in range(2, TRAIN.steps):
        assert same(ahead.of_step(step).rows, wanted[step].rows)
        last = min(step + 1, TRAIN.steps - 1)
        assert drawn == [(n, main) for n in range(2, last + 1)], "drawn by the main thread, and none past the end"
    assert len(gathered) == 4 and main not in gathered


def test_a_step_whose_text_cannot_be_read_is_the_one_that_fails(
    data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = TrainingData.global_batch

    def drawing(of: TrainingData, step: int, train: TrainSection) -> list[BatchEntry]:
        if step == 1:
            raise InputError("data.domain: line 7 is damaged")
        return draw(of, step, train)

    monkeypatch.setattr(TrainingData, "global_batch", drawing)
    ahead = BatchesAhead(data, TRAIN, RANKS, CPU)
    ahead.of_step(0)
    with pytest.raises(InputError, match="line 7"):
        ahead.of_step(1)
