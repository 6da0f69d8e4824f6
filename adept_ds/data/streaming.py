"""Text that is tokenised while it is trained on: a window of blocks at a time, for what shall not lie on disk twice.

Rank 0 makes the windows, the next one in the background while the present one is trained on; all ranks map them, as
they map whole corpora. Blocks are shuffled within a window. A window ends with a block, near the end of a document, and
near that of the corpus at the latest, so that the next pass over it is shuffled anew.

Which blocks a window has follows from the text alone, so training is the same wherever it was interrupted and on any
number of ranks. Where each window began is remembered (`windows.jsonl`), and which records before it were bad, so that
going on does not mean reading all again.
"""

from __future__ import annotations

import itertools
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import NonNegativeInt, PositiveInt, SerializerFunctionWrapHandler, ValidationError, model_serializer

from adept_ds.base.background import in_background
from adept_ds.base.errors import InputError
from adept_ds.base.files import new_directory, write_text
from adept_ds.base.proofs import Sealed
from adept_ds.base.records import Record
from adept_ds.data.blocks import Batch, Blocks
from adept_ds.data.documents import BadRecords, Place, TextSource, read_pieces
from adept_ds.data.mixture import shares_before
from adept_ds.data.order import endless_order
from adept_ds.data.packing import Packing, fit_documents
from adept_ds.data.tokenising import TokenisedPiece, tokenise
from adept_ds.data.tokens import TokenFile, Tokenisation, TokenWriter, is_there
from adept_ds.ranks.collectives import Ranks

_WINDOW_TOKENS = 1 << 25
"""So many are shuffled together: 128 MiB on disk."""

_WINDOW, _REMEMBERED = "window_", "windows.jsonl"


class Cursor(Record):
    """A place in the endless text."""

    epoch: NonNegativeInt = 0
    file: NonNegativeInt = 0
    record: NonNegativeInt = 0
    tokens: NonNegativeInt = 0
    """So many of the document that begins there are behind."""
    skipped: NonNegativeInt = 0
    """Bad records of this pass that are behind."""
    skipped_first: tuple[tuple[Place, str], ...] = ()
    """See `BadRecords.up_to`."""

    @property
    def place(self) -> Place:
        return self.file, self.record

    @model_serializer(mode="wrap")
    def _as_it_always_was(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Where nothing was skipped, no word of it: windows of older runs were sealed so."""
        tree: dict[str, Any] = serialize(self)
        return {key: value for key, value in tree.items() if self.skipped or not key.startswith("skipped")}


class Window(Sealed):
    """A stretch of blocks of the endless text."""

    number: NonNegativeInt
    first: NonNegativeInt
    """Its first block."""
    blocks: PositiveInt
    begins: Cursor
    ends: Cursor

    def __contains__(self, block: int) -> bool:
        return self.first <= block < self.first + self.blocks


class _EndlessText:
    """The tokens of a source from a cursor on, pass after pass over it."""

    def __init__(self, source: TextSource, tokenisation: Tokenisation, begins: Cursor, least_tokens: int) -> None:
        """Args:
        least_tokens: that a whole pass must have.
        """
        self._source, self._tokenisation, self._least = source, tokenisation, least_tokens
        self.bad = {begins.epoch: BadRecords(source, begins.skipped, begins.skipped_first)}
        """Of each pass that the last window has a part of."""
        self._pieces = self._passes(begins)
        self._documents = deque([(-begins.tokens, begins.model_copy(update={"tokens": 0}))])
        self._kept: np.ndarray = np.empty(0, np.int32)
        self._behind = begins.tokens

    def write(self, writer: TokenWriter, enough: int, block_tokens: int) -> Cursor:
        """Write on, up to the end of the document that reaches `enough` tokens, or of the corpus if it is a block.

        Returns:
            Where the next call goes on: behind the last whole block of `block_tokens`.
        """
        epoch = self._documents[0][1].epoch
        self.bad = {later: bad for later, bad in self.bad.items() if later >= epoch}
        if len(self._kept):
            writer.add(TokenisedPiece(self._kept, begins=True, ends=False, place=""))
        for epoch, piece in self._pieces:
            start, following = self._documents[-1]
            if piece is None:
                # Behind bad records that no document follows.
                self._documents[-1] = start, Cursor(epoch=epoch, file=len(self._source.files))
                if writer.num_tokens >= block_tokens:
                    break
                continue
            writer.bad, writer.begins = self.bad[epoch], following.place if following.epoch == epoch else (0, 0)
            writer.add(self._not_behind(piece))
            if piece.ends:
                file, record = piece.following
                self._documents.append((writer.num_tokens, Cursor(epoch=epoch, file=file, record=record)))
                while self._documents[1][0] <= writer.num_tokens - block_tokens:
                    self._documents.popleft()
                if writer.num_tokens >= enough:
                    break
        return self._keep(writer, block_tokens)

    def _keep(self, writer: TokenWriter, block_tokens: int) -> Cursor:
        """Take what is left of a block to the next call."""
        used = writer.num_tokens // block_tokens * block_tokens
        self._kept = writer.last_tokens(writer.num_tokens - used)
        while len(self._documents) > 1 and self._documents[1][0] <= used:
            self._documents.popleft()
        self._documents = deque((start - used, cursor) for start, cursor in self._documents)
        start, cursor = self._documents[0]
        skipped, first = self.bad[cursor.epoch].up_to(cursor.place)
        return cursor.model_copy(update={"tokens": -start, "skipped": skipped, "skipped_first": tuple(first)})

    def _not_behind(self, piece: TokenisedPiece) -> TokenisedPiece:
        behind = min(self._behind, len(piece.tokens))
        self._behind -= behind
        return replace(piece, tokens=piece.tokens[behind:]) if behind else piece

    def _passes(self, begins: Cursor) -> Iterator[tuple[int, TokenisedPiece | None]]:
        """Pieces with the number of their pass; None where one ends."""
        skip, workers = (begins.file, begins.record), self._tokenisation.workers_for(self._source.num_bytes)
        for epoch in itertools.count(begins.epoch):
            bad = self.bad.setdefault(epoch, BadRecords(self._source))
            pieces, num_tokens = read_pieces(self._source, skip=skip, bad=bad), 0
            for piece in tokenise(pieces, self._tokenisation.tokenizer, workers):
                num_tokens += len(piece.tokens)
                yield epoch, piece
            if skip == (0, 0) and num_tokens < self._least:
                raise InputError(
                    f"{self._source.key}: {', '.join(map(str, self._source.files))} has {num_tokens} tokens, less than "
                    f"one block of {self._least}; add text or lower the sequence length"
                )
            yield epoch, None
            skip = (0, 0)


class WindowMaker:
    """Makes the windows of one source, on rank 0.

    Args:
        window_tokens: a window ends with the document that reaches so many.
    """

    def __init__(
        self,
        source: TextSource,
        tokenisation: Tokenisation,
        packing: Packing,
        window_tokens: int = _WINDOW_TOKENS,
    ) -> None:
        self._source, self._tokenisation, self._packing = source, tokenisation, packing
        self._room, self._window_tokens = packing.room(tokenisation.bos_of_blocks), window_tokens
        kind = f"{self._room}_{'documents' if packing.documents else 'concat'}_{window_tokens}"
        self.directory = tokenisation.cache / f"stream_{tokenisation.name_of(source)}_{kind}"
        self._windows = self._remembered()
        self._text: _EndlessText | None = None
        self._at: Cursor | None = None
        self._coming: Future[Window] | None = None
        self._said = 0

    @property
    def has_begun(self) -> bool:
        """Whether a window was made, in this process or before."""
        return bool(self._windows)

    def covering(self, block: int) -> Window:
        """The window that holds a block, made if need be; the one after it is begun."""
        if self._coming is not None:
            self._coming.result()
        while not any(block in window for window in self._windows):
            self._make_next()
        window = next(window for window in self._windows if block in window)
        if not is_there(self.path(window), self._tokenisation):
            self._write(window.number, window.first, window.begins)
        self._say_skipped(window)
        self._remove_all_but(range(window.number - 1, window.number + 2))
        if window.number + 1 == len(self._windows):
            self._coming = in_background(self._make_next)
        return window

    def path(self, window: Window) -> Path:
        return self.directory / f"{_WINDOW}{window.number}"

    def _say_skipped(self, window: Window) -> None:
        """Bad records, when there are more of them than in any pass, or part of one, that was spoken of."""
        known = [(window.ends.skipped, [text for _, text in window.ends.skipped_first])]
        known += [(bad.count, bad.places) for bad in self._text.bad.values()] if self._text is not None else []
        skipped, places = max(known, key=lambda found: found[0])
        if skipped > self._said:
            self._said = skipped
            self._tokenisation.say(f"{self._source.key}: {skipped} bad records skipped, the first: {places[0]}")

    def _remove_all_but(self, numbers: range) -> None:
        """What others have mapped stays readable."""
        kept = {f"{_WINDOW}{number}" for number in numbers}
        for directory in self.directory.glob(f"{_WINDOW}*"):
            if directory.name not in kept:
                shutil.rmtree(directory)

    def _make_next(self) -> Window:
        last = self._windows[-1] if self._windows else None
        first = last.first + last.blocks if last else 0
        window = self._write(len(self._windows), first, last.ends if last else Cursor())
        self._windows.append(window)
        write_text(self.directory / _REMEMBERED, "".join(w.model_dump_json() + "\n" for w in self._windows))
        return window

    def _write(self, number: int, first: int, begins: Cursor) -> Window:
        if self._text is None or begins != self._at:
            self._text = _EndlessText(self._source, self._tokenisation, begins, self._room)
        # Whole documents leave nothing over.
        unit = 1 if self._packing.documents else self._room
        shutil.rmtree(
            self.directory / f"{_WINDOW}{number}", ignore_errors=True
        )  # of a run that ended before it counted
        with new_directory(self.directory / f"{_WINDOW}{number}") as folder:
            with TokenWriter(folder, BadRecords(self._source)) as writer:
                self._at = self._text.write(writer, self._window_tokens, unit)
                writer.finish()
            file = TokenFile.open(folder)
            whole = len(fit_documents(file, self._room)) if self._packing.documents else file.manifest.tokens // unit
        return Window(number=number, first=first, blocks=whole, begins=begins, ends=self._at).sealed()

    def _remembered(self) -> list[Window]:
        """Those that were made before, from the first on; what is damaged is found out again."""
        path, windows = self.directory / _REMEMBERED, list[Window]()
        if not path.is_file():
            return windows
        for line in path.read_bytes().splitlines():
            try:
                window = Window.model_validate_json(line)
            except ValidationError:
                window = None
            expected = (len(windows), sum(known.blocks for known in windows))
            if window is None or (window.number, window.first) != expected:
                self._tokenisation.say(f"'{path}' line {len(windows) + 1} is damaged: found out again")
                break
            windows.append(window)
        return windows


@dataclass(frozen=True)
class _Mapped:
    window: Window
    blocks: Blocks


class StreamedSource:
    """The endless blocks of one source, on every rank.

    Args:
        maker: makes what makes them; used on rank 0 alone.
        number: of the source in its corpus.
        bos_id: the first token of every block, if it is not among the tokens of the source.
    """

    def __init__(
        self, maker: Callable[[], WindowMaker], packing: Packing, number: int, bos_id: int | None, ranks: Ranks
    ) -> None:
        self._ranks, self._packing, self._bos_id, self._number = ranks, packing, bos_id, number
        self._maker: WindowMaker | None = None
        self._make_maker = maker
        self._mapped: list[_Mapped] = []

    def begin(self) -> None:
        """Make the first window, where most mistakes show, unless that was done at an earlier start: then the present
        one is asked for first. Collective."""
        if not self._ranks.on_main(lambda: self._on_main.has_begun):
            self._covering(0)

    def order(self, first: int, last: int, seed: int) -> list[int]:
        """Blocks at positions `first` to `last` of training; collective where they are in a new window."""
        found = list[int]()
        position = first
        while position < last:
            mapped = self._covering(position)
            window = mapped.window
            stop = min(last, window.first + window.blocks)
            inside = endless_order(
                position - window.first, stop - window.first, window.blocks, seed + window.number, self._number
            )
            found += [window.first + block for block in inside]
            position = stop
        self._mapped = [mapped for mapped in self._mapped if mapped.window.first + mapped.window.blocks > first]
        return found

    def blocks_at(self, block: int) -> tuple[Blocks, int]:
        """Where a block of the present step is: blocks, and its index in them."""
        mapped = next(mapped for mapped in self._mapped if block in mapped.window)
        return mapped.blocks, block - mapped.window.first

    def _covering(self, position: int) -> _Mapped:
        for mapped in self._mapped:
            if position in mapped.window:
                return mapped

        def make() -> tuple[Window, str]:
            window = self._on_main.covering(position)
            return window, str(self._on_main.path(window))

        window, path = self._ranks.on_main(make)
        remedy = f"all hosts must see '{path}': use a file system that they share"
        file = self._ranks.on_each(lambda: TokenFile.open(Path(path)), remedy)
        self._mapped.append(_Mapped(window, Blocks.of(file, self._packing, self._bos_id, self._ranks)))
        return self._mapped[-1]

    @property
    def _on_main(self) -> WindowMaker:
        """Of rank 0."""
        if self._maker is None:
            self._maker = self._make_maker()
        return self._maker


class StreamedCorpus:
    """Weighted sources that training draws from, as from a `Mixture`."""

    def __init__(self, sources: Sequence[StreamedSource], weights: Sequence[float]) -> None:
        self._sources, self._weights = sources, weights

    def begin(self) -> None:
        """As `StreamedSource.begin`, of all sources."""
        for source in self._sources:
            source.begin()

    def drawn(self, first: int, count: int, seed: int) -> list[int]:
        """As `Mixture.drawn`; every rank has to ask for the same ones."""
        before, after = (shares_before(number, self._weights) for number in (first, first + count))
        return [
            block * len(self._sources) + number
            for number, source in enumerate(self._sources)
            for block in source.order(before[number], after[number], seed)
        ]

    def batch(self, indices: Sequence[int]) -> Batch:
        together = itertools.groupby(self._found(indices), key=lambda found: id(found[0]))
        parts = [list(of_window) for _, of_window in together]
        return Batch.joined([part[0][0].batch([block for _, block in part]) for part in parts])

    def num_tokens(self, indices: Sequence[int]) -> int:
        return sum(blocks.num_tokens([block]) for blocks, block in self._found(indices))

    def predicted_tokens(self, indices: Sequence[int]) -> int:
        return sum(blocks.predicted_tokens([block]) for blocks, block in self._found(indices))

    def _found(self, indices: Sequence[int]) -> Iterator[tuple[Blocks, int]]:
        for index in indices:
            block, number = divmod(index, len(self._sources))
            yield self._sources[number].blocks_at(block)
