"""From tokens to blocks: as one stream, or as whole documents."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from harness.packing import TEXTS, block_tokens, pack, stream, tokenised, write_texts

from adept_ds.data.packing import WholeDocuments, whole_documents
from adept_ds.ranks.collectives import Ranks


def test_packing_keeps_every_token_in_order_with_separators(
    tmp_path: Path, tokenizer_dir: Path, ids: dict[str, int]
) -> None:
    first, second = write_texts(tmp_path / "1.jsonl", *TEXTS[:3]), write_texts(tmp_path / "2.jsonl", *TEXTS[3:])
    expected = stream(TEXTS, ids)
    assert len(expected) == 42
    whole = block_tokens(pack([first, second], tokenizer_dir, tmp_path / "cache", keep_tail=True))
    assert [len(block) for block in whole] == [8, 8, 8, 8, 8, 2]
    assert [token for block in whole for token in block] == expected
    cut = block_tokens(pack([first, second], tokenizer_dir, tmp_path / "cache"))
    assert cut == whole[:5], "training drops the tail and nothing else"


def test_a_tail_of_one_token_predicts_nothing_and_is_left_out(tmp_path: Path, tokenizer_dir: Path) -> None:
    corpus = write_texts(tmp_path / "c.jsonl", "12345678")  # nine tokens with the separator
    blocks = pack([corpus], tokenizer_dir, tmp_path / "cache", keep_tail=True)
    assert [len(block) for block in block_tokens(blocks)] == [8]


def test_a_token_at_the_beginning_of_every_block_takes_a_place_in_it(
    tmp_path: Path, tokenizer_dir: Path, ids: dict[str, int]
) -> None:
    corpus, expected = write_texts(tmp_path / "c.jsonl", *TEXTS), stream(TEXTS, ids)
    blocks = block_tokens(pack([corpus], tokenizer_dir, tmp_path / "cache", keep_tail=True, bos_id=7))
    assert all(block[0] == 7 and len(block) <= 8 for block in blocks)
    assert [token for block in blocks for token in block[1:]] == expected


# --- whole documents ------------------------------------------------------------------------------------------------


def packed_lengths(lengths: list[int], block_tokens: int) -> list[list[int]]:
    segments = segments_by_block(WholeDocuments.of(np.cumsum(lengths), block_tokens))
    return [[stop - start for start, stop in of_block] for of_block in segments]


def segments_by_block(layout: WholeDocuments) -> list[list[tuple[int, int]]]:
    bounds, numbers = layout.segments(np.arange(len(layout)))
    return [[(start, stop) for start, stop in bounds[numbers == block].tolist()] for block in range(len(layout))]


@pytest.mark.parametrize("seed", range(5))
def test_every_document_stands_whole_in_one_block_and_every_token_once(seed: int) -> None:
    generator = np.random.default_rng(seed)
    lengths = generator.geometric(1 / 9, size=500)
    layout = WholeDocuments.of(np.cumsum(lengths), 16)
    found = [segment for of_block in segments_by_block(layout) for segment in of_block]
    assert all(sum(stop - start for start, stop in of_block) <= 16 for of_block in segments_by_block(layout))
    counted = Counter(token for start, stop in found for token in range(start, stop))
    assert set(counted.values()) == {1}
    ends = np.cumsum(lengths)
    for start, end in zip(ends - lengths, ends, strict=True):
        mine = sorted(segment for segment in found if start <= segment[0] < end)
        expected = [(at, min(at + 16, end)) for at in range(start, end, 16)]
        assert mine == [segment for segment in expected if segment[1] - segment[0] > 1], "cut only where it must be"


def test_documents_go_into_the_fullest_block_that_has_room() -> None:
    # Longest first: 9, 7 and 6 begin a block each; 4 fills the room of 4 behind 6, and 3 that of 3 behind 7.
    assert packed_lengths([6, 3, 9, 4, 7], 10) == [[9], [7, 3], [6, 4]]


def test_blocks_are_as_full_as_documents_allow() -> None:
    """Best fit leaves less than 1.25 blocks for one that is needed; on mixed lengths next to no padding."""
    lengths = np.random.default_rng(1).integers(2, 200, size=2000).tolist()
    assert len(packed_lengths(lengths, 256)) <= 1.02 * sum(lengths) / 256 + 1


def test_the_fit_is_kept_and_made_again_where_it_is_damaged(tmp_path: Path, tokenizer_dir: Path) -> None:
    file = tokenised([write_texts(tmp_path / "c.jsonl", *TEXTS)], tokenizer_dir, tmp_path / "cache")
    first = whole_documents(file, 8, Ranks())
    (kept,) = file.directory.glob("documents_8*")
    stamp = kept.stat().st_mtime_ns
    assert np.array_equal(whole_documents(file, 8, Ranks()).parts, first.parts)
    assert kept.stat().st_mtime_ns == stamp
    kept.write_bytes(kept.read_bytes()[:-40])
    assert np.array_equal(whole_documents(file, 8, Ranks()).parts, first.parts)
