"""Text that is tokenised while it is trained on: the same whatever was interrupted, lost or kept."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from harness.marks import slow
from harness.packing import byte_ids, stream, text_source, tokenisation, write_texts

from adept_ds.base.errors import InputError
from adept_ds.data.packing import Packing
from adept_ds.data.streaming import StreamedCorpus, StreamedSource, WindowMaker
from adept_ds.ranks.collectives import Ranks

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WINDOW = 40
"""Tokens: four documents or so, five blocks."""


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """26 documents of 3 to 11 tokens in two files: letters of one kind each."""
    texts = [letter * (2 + number % 9) for number, letter in enumerate(LETTERS)]
    return [write_texts(tmp_path / "1.jsonl", *texts[:15]), write_texts(tmp_path / "2.jsonl", *texts[15:])]


def open_stream(
    files: list[Path], tokenizer_dir: Path, cache: Path, *, documents: bool = False, weights: tuple[float, ...] = (1.0,)
) -> StreamedCorpus:
    """One source for each weight: all files, or each file."""
    packing = Packing(8, documents=documents)
    parts = [files] if len(weights) == 1 else [[file] for file in files]

    def maker(part: list[Path]) -> WindowMaker:
        return WindowMaker(text_source(part), tokenisation(tokenizer_dir, cache), packing, window_tokens=WINDOW)

    sources = [
        StreamedSource(lambda part=part: maker(part), packing, number, None, Ranks())  # type: ignore[misc]
        for number, part in enumerate(parts)
    ]
    return StreamedCorpus(sources, weights)


def let_it_end(corpus: StreamedCorpus) -> None:
    """As the process that makes windows would."""
    for source in corpus._sources:
        if source._maker is not None and source._maker._coming is not None:
            source._maker._coming.result()


def steps_of(corpus: StreamedCorpus, steps: range, size: int = 3) -> list[list[list[int]]]:
    """The rows of each step."""
    found = []
    for step in steps:
        batch = corpus.batch(corpus.drawn(step * size, size, seed=5))
        found.append([row[label != -100].tolist() for row, label in zip(batch.input_ids, batch.labels, strict=True)])
    return found


def test_streamed_blocks_are_those_of_the_endless_text_shuffled_within_windows(
    tmp_path: Path, tokenizer_dir: Path, corpus: list[Path]
) -> None:
    """Not a token is left out, whatever windows end with; every pass comes in another order."""
    text = stream([letter * (2 + number % 9) for number, letter in enumerate(LETTERS)], byte_ids(tokenizer_dir))
    endless = text * 8
    expected = [tuple(endless[start : start + 8]) for start in range(0, len(endless) - 7, 8)]
    rows = [
        tuple(row)
        for step in steps_of(open_stream(corpus, tokenizer_dir, tmp_path / "cache"), range(50))
        for row in step
    ]
    assert rows != expected[: len(rows)], "shuffled"
    blocks_a_pass = len(text) // 8
    windows = -(-WINDOW // 8) + 2
    for count in range(windows, len(rows)):
        # Any stretch from the start holds the blocks of that stretch, but for those of the window that it cuts.
        missing = Counter(expected[:count]) - Counter(rows[:count])
        assert sum(missing.values()) <= windows, count
    assert rows[:blocks_a_pass] != rows[blocks_a_pass : 2 * blocks_a_pass]


@pytest.mark.parametrize("documents", [False, True], ids=["concat", "documents"])
@pytest.mark.parametrize("weights", [slow((1.0,)), (2.0, 1.0)], ids=["one source", "two sources"])
@pytest.mark.parametrize("lost", ["nothing", "windows", "everything"])
def test_a_run_that_goes_on_sees_what_it_would_have_seen(
    tmp_path: Path,
    tokenizer_dir: Path,
    corpus: list[Path],
    documents: bool,
    weights: tuple[float, ...],
    lost: str,
) -> None:
    options = {"documents": documents, "weights": weights}
    expected = steps_of(open_stream(corpus, tokenizer_dir, tmp_path / "whole", **options), range(40))  # type: ignore[arg-type]
    cache = tmp_path / "cut"
    interrupted = open_stream(corpus, tokenizer_dir, cache, **options)  # type: ignore[arg-type]
    first = steps_of(interrupted, range(17))
    let_it_end(interrupted)
    if lost == "everything":
        shutil.rmtree(cache)
    elif lost == "windows":
        for window in cache.glob("stream_*/window_*"):
            shutil.rmtree(window)
    rest = steps_of(open_stream(corpus, tokenizer_dir, cache, **options), range(17, 40))  # type: ignore[arg-type]
    assert first + rest == expected


def test_little_more_than_the_present_window_lies_on_disk(
    tmp_path: Path, tokenizer_dir: Path, corpus: list[Path]
) -> None:
    source = open_stream(corpus, tokenizer_dir, tmp_path / "cache")
    for step in range(60):
        source.drawn(3 * step, 3, seed=0)
        assert len(list((tmp_path / "cache").glob("stream_*/window_*"))) <= 4


def test_documents_of_a_streamed_block_restart_positions(
    tmp_path: Path, tokenizer_dir: Path, corpus: list[Path]
) -> None:
    source = open_stream(corpus, tokenizer_dir, tmp_path / "cache", documents=True)
    batch = source.batch(source.drawn(0, 30, seed=0))
    assert batch.positions is not None
    assert bool(((batch.positions == 0) & (batch.input_ids != 0)).sum(1).gt(1).any()), "several in one row"
    assert torch.equal(batch.labels == -100, batch.positions == 0)


def test_a_corpus_of_less_than_one_block_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    corpus = write_texts(tmp_path / "c.jsonl", "abc")
    with pytest.raises(InputError, match=r"^data\.domain: .*c\.jsonl has 4 tokens, less than one block of 8; add text"):
        open_stream([corpus], tokenizer_dir, tmp_path / "cache").drawn(0, 1, seed=0)


def test_a_mistake_in_the_text_is_said_where_it_is_reached(
    tmp_path: Path, tokenizer_dir: Path, corpus: list[Path]
) -> None:
    """In the background, and so by the step that needs the window."""
    corpus[1].write_text(corpus[1].read_text() + "{broken\n")
    source = open_stream(corpus, tokenizer_dir, tmp_path / "cache")
    with pytest.raises(InputError, match=r"^data\.domain: .*2\.jsonl' line 12"):
        steps_of(source, range(12))
