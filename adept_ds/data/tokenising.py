"""Pieces of text -> arrays of tokens, in the order of the pieces, by several processes."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np

from adept_ds.base.errors import AdeptError, InputError
from adept_ds.base.lifeline import end_with
from adept_ds.data.pieces import Piece
from adept_ds.data.tokenizer import TextTokenizer

_BATCH_CHARACTERS = 1 << 20
"""Of text, in one call of the tokenizer: bounds memory, whatever the size of documents."""


_IN_FLIGHT = 2
"""Batches per process that are read ahead."""


@dataclass(frozen=True)
class TokenisedPiece:
    """A document's tokens, or those of a part of it, with the separators that belong to it."""

    tokens: np.ndarray
    """[n] int32."""
    begins: bool
    """A document begins with it."""
    ends: bool
    place: str
    """Of the text, for messages."""
    following: tuple[int, int] = (0, 0)
    """As in `Piece`."""
    refusal: str | None = None
    """Why the text cannot be tokenised; its document is a bad record."""
    document_id: int = 0
    """As in `Piece`."""


def tokenise(pieces: Iterable[Piece], tokenizer: TextTokenizer, workers: int = 1) -> Iterator[TokenisedPiece]:
    """All pieces, in their order, whatever the number of processes.

    Args:
        workers: with 1, this process does it.
    """
    batches = _batches(pieces)
    if workers == 1:
        for batch in batches:
            yield from _tokenise_batch(tokenizer, batch)
        return
    # Not forked: this process has threads (torch, DeepSpeed), which a fork would leave in any state.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _become_worker, (tokenizer, os.getpid()))
    try:
        waiting: deque[Future[list[TokenisedPiece]]] = deque()
        for batch in batches:
            waiting.append(pool.submit(_tokenise_here, batch))
            if len(waiting) > _IN_FLIGHT * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise AdeptError(
            "a process that tokenises was killed, perhaps for want of memory; set data.workers lower"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, size = list[Piece](), 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenise_batch(tokenizer: TextTokenizer, pieces: Sequence[Piece]) -> list[TokenisedPiece]:
    try:
        tokens = iter(tokenizer.encode([piece.text for piece in pieces if _is_whole(piece)]))
        return [
            _separated(tokenizer, piece, next(tokens) if _is_whole(piece) else _part(tokenizer, piece))
            for piece in pieces
        ]
    except InputError:  # about the tokenizer, not about a text
        raise
    except ValueError as error:
        if len(pieces) > 1:  # to find which it was
            return [done for piece in pieces for done in _tokenise_batch(tokenizer, [piece])]
        piece = pieces[0]
        return [_of(piece, np.empty(0, np.int32), str(error))]


def _is_whole(piece: Piece) -> bool:
    return piece.start == 0 and piece.stop == len(piece.text)


def _part(tokenizer: TextTokenizer, piece: Piece) -> np.ndarray:
    """Tokens of a part of a document: those that begin in it."""
    tokens, starts = tokenizer.encode_with_offsets(piece.text)
    return tokens[(starts >= piece.start) & (starts < piece.stop)]


def _separated(tokenizer: TextTokenizer, piece: Piece, tokens: np.ndarray) -> TokenisedPiece:
    before = [tokenizer.bos_id] if piece.begins and tokenizer.bos_id is not None and not tokenizer.per_block else []
    after = [tokenizer.eos_id] if piece.ends and tokenizer.eos_id is not None else []
    if before or after:
        tokens = np.concatenate([np.array(before, np.int32), tokens, np.array(after, np.int32)])
    return _of(piece, tokens)


def _of(piece: Piece, tokens: np.ndarray, refusal: str | None = None) -> TokenisedPiece:
    return TokenisedPiece(tokens, piece.begins, piece.ends, piece.place, piece.following, refusal, piece.document_id)


# --- in a process of the pool ---------------------------------------------------------------------------------------


_tokenizer: TextTokenizer | None = None


def _become_worker(tokenizer: TextTokenizer, parent: int) -> None:
    global _tokenizer
    _tokenizer = tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many processes as there shall be
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    end_with([parent])


def _tokenise_here(pieces: Sequence[Piece]) -> list[TokenisedPiece]:
    assert _tokenizer is not None
    return _tokenise_batch(_tokenizer, pieces)
