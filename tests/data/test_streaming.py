"""Text that is tokenised while it is trained on: the same whatever was interrupted, lost or kept."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness.marks import slow
from harness.packing import byte_ids, stream, text_source, tokenisation, write_texts

from adept_ds.base.errors import InputError
from adept_ds.data import tokenising
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
    files: list[Path],
    tokenizer_dir: Path,
    cache: Path,
    *,
    documents: bool = False,
    weights: tuple[float, ...] = (1.0,),
    max_bad_records: int = 0,
    said: list[str] | None = None,
) -> StreamedCorpus:
    """One source for each weight: all files, or each file.

    Args:
        said: what is told the user is added to it.
    """
    packing = Packing(8, documents=documents)
    parts = [files] if len(weights) == 1 else [[file] for file in files]
    refusing = tokenisation(tokenizer_dir, cache, special_tokens_in_text="error")
    telling = replace(refusing, say=([] if said is None else said).append)

    def maker(part: list[Path]) -> WindowMaker:
        source = text_source(part, max_bad_records=max_bad_records)
        return WindowMaker(source, telling, packing, window_tokens=WINDOW)

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


@pytest.fixture
def without_reading_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a corpus of a few bytes is not read to its end before its first window is there."""
    monkeypatch.setattr(tokenising, "_BATCH_CHARACTERS", 1)


def spoil(corpus: list[Path]) -> list[str]:
    """Make three records bad: one of the first window, one that the tokenizer refuses where a window begins, the last.

    Returns:
        Where they are, in order.
    """
    first, second = (file.read_text().splitlines() for file in corpus)
    first[1], second[0], second[-1] = "{broken", json.dumps({"text": "a<|end|>"}), "{broken"
    for file, lines in zip(corpus, (first, second), strict=True):
        file.write_text("".join(f"{line}\n" for line in lines))
    return ["1.jsonl' line 2", "2.jsonl' line 1:", f"2.jsonl' line {len(second)}"]


def end_of(corpus: StreamedCorpus, steps: range) -> str:
    """How a run ends in them."""
    with pytest.raises(InputError) as caught:
        steps_of(corpus, steps)
    return str(caught.value)


@pytest.mark.usefixtures("without_reading_ahead")
@pytest.mark.parametrize("allowed", [1, 2])
@pytest.mark.parametrize("documents", [False, True], ids=["concat", "documents"])
@pytest.mark.parametrize("lost", ["nothing", "windows"])
def test_bad_records_before_an_interruption_count_behind_it(
    tmp_path: Path, tokenizer_dir: Path, corpus: list[Path], allowed: int, documents: bool, lost: str
) -> None:
    """One more than is allowed ends the run with the same words, whether it was interrupted or not."""
    places = spoil(corpus)

    def run(cache: str) -> StreamedCorpus:
        return open_stream(corpus, tokenizer_dir, tmp_path / cache, documents=documents, max_bad_records=allowed)

    expected = end_of(run("whole"), range(40))
    assert f"{allowed + 1} bad records are more than data.max_bad_records ({allowed}) allows" in expected
    found = [expected.index(place) for place in places[: allowed + 1]]
    assert found == sorted(found), "in their order"
    interrupted = run("cut")
    steps_of(interrupted, range(2))
    let_it_end(interrupted)
    if lost == "windows":
        for window in (tmp_path / "cut").glob("stream_*/window_*"):
            shutil.rmtree(window)
    assert end_of(run("cut"), range(2, 40)) == expected


@pytest.mark.usefixtures("without_reading_ahead")
def test_bad_records_are_said_when_they_are_reached_and_when_a_run_goes_on(
    tmp_path: Path, tokenizer_dir: Path, corpus: list[Path]
) -> None:
    """Each number once, not again in every pass; the last one too, behind which there is no document."""
    places = spoil(corpus)

    def said(cache: Path, steps: range) -> list[int]:
        lines = list[str]()
        source = open_stream(corpus, tokenizer_dir, cache, max_bad_records=3, said=lines)
        steps_of(source, steps)
        let_it_end(source)
        assert all(re.match(rf"data\.domain: \d bad records skipped, the first: .*{places[0]}", line) for line in lines)
        return [int(line.split()[1]) for line in lines]

    in_the_first_pass, in_a_later_one = 3, 30
    assert said(tmp_path / "early", range(in_the_first_pass)) == [1]
    assert said(tmp_path / "early", range(in_the_first_pass, 60)) == [1, 2, 3]
    assert said(tmp_path / "late", range(in_a_later_one)) == [1, 2, 3]
    assert said(tmp_path / "late", range(in_a_later_one, 60))[-1] == 3


def test_windows_that_were_remembered_without_bad_records_are_as_good(
    tmp_path: Path, tokenizer_dir: Path, corpus: list[Path]
) -> None:
    """A line with the keys that it had before bad records were counted, and its digest, is what is written today."""
    source = open_stream(corpus, tokenizer_dir, tmp_path)
    steps_of(source, range(3))
    let_it_end(source)
    (remembered,) = tmp_path.glob("stream_*/windows.jsonl")
    for line in remembered.read_text().splitlines():
        window = json.loads(line)
        assert window["begins"].keys() == window["ends"].keys() == {"epoch", "file", "record", "tokens"}
        check = window.pop("check")
        unsealed = json.dumps(window | {"check": None}, sort_keys=True, separators=(",", ":"))
        assert hashlib.sha256(unsealed.encode()).hexdigest() == check


@pytest.mark.parametrize("weights", [(1.0,), (9.0, 1.0)], ids=["one source", "two sources"])
def test_only_the_first_start_begins_at_the_beginning(
    tmp_path: Path, tokenizer_dir: Path, corpus: list[Path], weights: tuple[float, ...]
) -> None:
    """A run that goes on has its windows still, and no other: nothing is tokenised twice."""

    def windows() -> dict[Path, int]:
        return {path: path.stat().st_ino for path in tmp_path.glob("stream_*/window_*")}

    *_, expected = steps_of(open_stream(corpus, tokenizer_dir, tmp_path / "whole", weights=weights), range(61))
    source = open_stream(corpus, tokenizer_dir, tmp_path, weights=weights)
    source.begin()
    assert len({path.parent for path in windows() if path.name == "window_0"}) == len(weights), "of each source"
    steps_of(source, range(60))
    let_it_end(source)
    before = windows()
    assert "window_0" not in {path.name for path in before}
    again = open_stream(corpus, tokenizer_dir, tmp_path, weights=weights)
    again.begin()
    let_it_end(again)
    assert windows() == before
    assert steps_of(again, range(60, 61)) == [expected]
    let_it_end(again)
    after = windows()
    assert all(after[path] == before[path] for path in after.keys() & before.keys())
