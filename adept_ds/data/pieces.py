"""Documents in pieces: memory and tokenising are bounded by bytes, whatever the length of a document.

A piece carries a little of the text around it, so that its tokens come out as they would in the whole document. It is
cut where tokenizers begin a new token anyway: behind a line break, or else before a word.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAX_PIECE_CHARACTERS = 1 << 18
"""Of a piece with its context: 256 KiB of ASCII, 1 MiB at most."""

_CONTEXT = 1 << 12
"""Characters on either side, at most."""

_PART = MAX_PIECE_CHARACTERS - 2 * _CONTEXT
"""Characters of the part itself, at most; the last one of a document may have the unused context too."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of one that is too long to be tokenised at once."""

    text: str
    """The part with its context: what is around it in the document."""
    start: int
    """`text[start:stop]` is the part."""
    stop: int
    begins: bool
    """A document begins with it."""
    ends: bool
    place: str
    """Where its document is, for messages: "'FILE' line 12"."""
    following: tuple[int, int] = (0, 0)
    """What comes after its document: index of the file, and of the record in it; to go on from with `skip`."""
    document_id: int = 0
    """Of the document, on its last piece (see `id_of`)."""


def id_of(digest: bytes) -> int:
    """What a document is known by: the first 8 bytes of the SHA-256 digest of its text, as a signed integer."""
    return int.from_bytes(digest[:8], "big", signed=True)


def document_id(text: str) -> int:
    """As `id_of`, of a text."""
    return id_of(hashlib.sha256(text.encode()).digest())


def cut_document(chunks: Iterable[str], place: str, following: tuple[int, int]) -> Iterator[Piece]:
    """The pieces of a document that comes in chunks of any size; the same ones however these are cut."""
    text, start, begins, digest = "", 0, True, hashlib.sha256()
    for chunk in chunks:
        text += chunk
        digest.update(chunk.encode())
        while len(text) - start > _PART + _CONTEXT:
            stop = _boundary(text, start + _PART // 2, start + _PART)
            after = _boundary(text, stop + _CONTEXT // 2, stop + _CONTEXT)
            yield Piece(text[:after], start, stop, begins, False, place, following)
            before = _boundary(text, stop - _CONTEXT, stop - _CONTEXT // 2)
            text, start, begins = text[before:], stop - before, False
    yield Piece(text, start, len(text), begins, True, place, following, id_of(digest.digest()))


def pieces_of(text: str, place: str, following: tuple[int, int]) -> Iterator[Piece]:
    """The pieces of a document that is in memory."""
    if len(text) <= _PART:  # as most are
        yield Piece(text, 0, len(text), True, True, place, following, document_id(text))
        return
    step = MAX_PIECE_CHARACTERS
    chunks = (text[first : first + step] for first in range(0, len(text), step))
    yield from cut_document(chunks, place, following)


def _boundary(text: str, low: int, high: int) -> int:
    """The last place in `low` < place <= `high` < len(text) at which a token is likely to begin."""
    place = high
    while (place := text.rfind("\n", low, place)) >= 0:
        if not text[place + 1].isspace():
            return place + 1
    low = max(low, high - _CONTEXT)
    for place in range(high, low, -1):
        if text[place].isspace() and not text[place - 1].isspace():
            return place
    for place in range(high, low, -1):
        if not _continues(text[place]) and not _continues(text[place - 1]):
            return place
    return high


def _continues(char: str) -> bool:
    """Whether it belongs to its neighbour: combining marks, joiners, selectors of variants."""
    return unicodedata.category(char) in {"Mn", "Mc", "Me", "Cf"}
