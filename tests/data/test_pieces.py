"""Long documents in pieces: nothing is lost, memory is bounded, and tokens are those of the whole."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterator

import pytest
from harness.reading import joined
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from adept_ds.data import pieces
from adept_ds.data.pieces import Piece, cut_document, document_id, pieces_of

WORDS = ["matrix", "the", "of", "ä", "Übung", "数学", "e\u0301te\u0301", "👩‍🔬", "x", "12,5"]


def prose(seed: int, words: int, separators: str = "    \n\n.") -> str:
    generator = random.Random(seed)
    return "".join(generator.choice(WORDS) + generator.choice(separators) for _ in range(words))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of at most 200 characters."""
    monkeypatch.setattr(pieces, "MAX_PIECE_CHARACTERS", 200)
    monkeypatch.setattr(pieces, "_CONTEXT", 40)
    monkeypatch.setattr(pieces, "_PART", 120)


TEXTS = {
    "prose": prose(1, 500),
    "lines": "a line of text\n" * 90,
    "no spaces": "数学" * 700,
    "marks only": "\u0301" * 900,
    "spaces only": "a" + " " * 1000 + "b",
    "indented": "\n    x" * 200,
    "just above the limit": "word " * 41,
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", TEXTS)
def test_pieces_are_the_document_and_none_is_long(name: str) -> None:
    text = TEXTS[name]
    found = list(pieces_of(text, "'f' line 1", (0, 1)))
    assert joined(found) == [text]
    assert [piece.begins for piece in found] == [True] + [False] * (len(found) - 1)
    assert [piece.ends for piece in found] == [False] * (len(found) - 1) + [True]
    assert all(len(piece.text) <= 200 for piece in found)
    assert all((piece.place, piece.following) == ("'f' line 1", (0, 1)) for piece in found)
    assert len(found) > len(text) / 200


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("size", [1, 7, 119, 120, 121, 5000])
def test_pieces_do_not_depend_on_how_the_document_is_read(size: int) -> None:
    text = prose(2, 300)

    def chunks() -> Iterator[str]:
        for first in range(0, len(text), size):
            yield text[first : first + size]

    assert list(cut_document(chunks(), "p", (1, 0))) == list(pieces_of(text, "p", (1, 0)))


@pytest.mark.usefixtures("small")
def test_context_is_what_stands_beside_the_part() -> None:
    text = prose(3, 300)
    first = 0
    for piece in pieces_of(text, "p", (0, 1)):
        assert text[first - piece.start :].startswith(piece.text)
        assert piece.begins or piece.start >= 20
        assert piece.ends or len(piece.text) - piece.stop >= 20
        first += piece.stop - piece.start


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("name", "cut_before"),
    [("lines", "a"), ("prose", None), ("no spaces", "数学")],
    ids=["behind a line break", "before a space", "between characters"],
)
def test_a_document_is_cut_where_a_token_begins(name: str, cut_before: str | None) -> None:
    for piece in list(pieces_of(TEXTS[name], "p", (0, 1)))[1:]:
        before, after = piece.text[piece.start - 1], piece.text[piece.start]
        if cut_before is not None:
            assert after in cut_before
        assert before == "\n" or after.isspace() or cut_before == "数学"
        assert after not in "\u0301\u200d"


def trained(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """Of merges that go as far as the pre-tokenizer lets them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([prose(seed, 400) for seed in range(5)], trainer)
    return tokenizer


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["words", "metaspace"])
def test_tokens_that_begin_in_parts_are_those_of_the_whole(kind: str) -> None:
    """Byte pairs within words, as in GPT-2 and Llama 3, and across them, as in Llama 2."""
    if kind == "words":
        tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    else:
        tokenizer = trained(pre_tokenizers.Metaspace(prepend_scheme="first", split=False))
    for seed in (1, 2, 3):
        text = prose(seed, 600)
        found = list[int]()
        for piece in pieces_of(text, "p", (0, 1)):
            encoding = tokenizer.encode(piece.text)
            starts = [start for start, _ in encoding.offsets]
            found += [
                token for token, start in zip(encoding.ids, starts, strict=True) if piece.start <= start < piece.stop
            ]
        assert found == tokenizer.encode(text).ids


def test_a_short_document_is_one_piece_without_context() -> None:
    (piece,) = pieces_of("hello", "'f' line 3", (2, 3))
    assert piece == Piece("hello", 0, 5, True, True, "'f' line 3", (2, 3), document_id("hello"))


@pytest.mark.parametrize("step", [1000, 300_000, 700_001])
def test_a_document_is_known_by_the_digest_of_its_text_however_it_comes(step: int) -> None:
    """The first 8 bytes of SHA-256, big-endian, as a signed integer."""
    text = prose(5, 6000) * 20 + "ä"
    (known_by,) = struct.unpack(">q", hashlib.sha256(text.encode()).digest()[:8])
    chunks = (text[start : start + step] for start in range(0, len(text), step))
    *before, last = cut_document(chunks, "p", (0, 1))
    assert len(before) > 0 and last.document_id == document_id(text) == known_by
    assert [piece.document_id for piece in before] == [0] * len(before)
