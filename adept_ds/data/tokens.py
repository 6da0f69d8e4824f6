"""Texts -> tokens: one flat file for each source of a corpus, made once and memory-mapped.

A corpus may be larger than memory, and is held once per host. What is cut of the tokens (see `packing`) costs nothing,
so one file serves every sequence length.

    tokens.bin     int32: document after document, each with its separators
    ends.bin       int64: where each document ends in it
    ids.bin        int64: what each document is known by, whatever its tokens (see `pieces.id_of`)
    manifest.json  written last
    so_far.json    while it is made: up to where, so that a command that was stopped goes on there
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from pydantic import Field, NonNegativeInt

from adept_ds.base.digests import Digest, FileDigests, sha256_of
from adept_ds.base.errors import DamagedError, InputError, StopRequestedError
from adept_ds.base.files import sync, sync_tree, writing
from adept_ds.base.progress import ProgressCallback
from adept_ds.base.proofs import DigestOf, FileProof, InnerName, Sealed, check_file, check_size
from adept_ds.base.records import Record
from adept_ds.data.documents import BadRecords, Place, TextSource, read_pieces
from adept_ds.data.tokenising import TokenisedPiece, tokenise
from adept_ds.data.tokenizer import TextTokenizer
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.unfinished import EVERY

_TOKENS, _ENDS, _IDS, _MANIFEST, _SO_FAR = "tokens.bin", "ends.bin", "ids.bin", "manifest.json", "so_far.json"
_TOKEN, _END, _ID = np.dtype("<i4"), np.dtype("<i8"), np.dtype("<i8")


_SERIAL_BYTES = 4 << 20
"""Of text: less is tokenised before other processes would have started."""


class TokensManifest(Sealed):
    """What a tokenised source says of itself."""

    tokens: int
    documents: int
    skipped: int
    """Records that could not be read."""
    skipped_places: tuple[str, ...]
    """What the first of them were."""
    sha256: dict[InnerName, Digest] = Field(default_factory=dict)
    """Of the other files; older ones have none."""


class TokensSoFar(Record):
    """What stands in files that are still written."""

    tokens: NonNegativeInt = 0
    documents: NonNegativeInt = 0
    document_start: NonNegativeInt = 0
    """First token of the document that the next piece is of, where it is not the first one of it."""
    dropping: bool = False
    """Whether that document is a bad record."""
    begins: Place = (0, 0)
    """Where it begins in the source."""
    pieces: NonNegativeInt = 0
    """Of it, that are behind."""
    skipped: NonNegativeInt = 0
    skipped_first: tuple[tuple[Place, str], ...] = ()

    @classmethod
    def of(cls, directory: Path) -> TokensSoFar:
        """The beginning, if there is none or it is damaged."""
        try:
            return cls.load(directory / _SO_FAR)
        except InputError:
            return cls()


@dataclass(frozen=True)
class TokenFile:
    """A tokenised source."""

    directory: Path
    manifest: TokensManifest

    @classmethod
    def open(cls, directory: Path) -> TokenFile:
        """Raises `InputError`: it is damaged."""
        return cls(directory, TokensManifest.load(directory / _MANIFEST))

    @cached_property
    def tokens(self) -> np.ndarray:
        """[tokens] int32."""
        return _mapped(self.directory / _TOKENS, _TOKEN, self.manifest.tokens)

    @cached_property
    def ends(self) -> np.ndarray:
        """[documents] int64: the first token after each document."""
        return _mapped(self.directory / _ENDS, _END, self.manifest.documents)

    @cached_property
    def ids(self) -> np.ndarray:
        """[documents] int64: see `pieces.id_of`."""
        return _mapped(self.directory / _IDS, _ID, self.manifest.documents)

    def check(self, digest_of: DigestOf) -> None:
        """Its files are as they were written. Raises `DamagedError`."""
        tokens, documents = self.manifest.tokens, self.manifest.documents
        expected = {
            _TOKENS: tokens * _TOKEN.itemsize,
            _ENDS: documents * _END.itemsize,
            _IDS: documents * _ID.itemsize,
        }
        for name, size in expected.items():
            check_size(self.directory, name, size)
        for name, digest in self.manifest.sha256.items():
            check_file(self.directory, name, FileProof(size=expected.get(name, 0), sha256=digest), digest_of)


def _mapped(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    """[count]; an empty file cannot be mapped."""
    return np.memmap(path, dtype, "r", shape=(count,)) if count else np.empty(0, dtype)


class TokenWriter:
    """Writes a `TokenFile`, piece by piece, in bounded memory.

    Args:
        so_far: what of it is there.
    """

    def __init__(self, directory: Path, bad: BadRecords, so_far: TokensSoFar | None = None) -> None:
        self._directory, self.bad, so_far = directory, bad, so_far or TokensSoFar()
        self._tokens = _opened(directory / _TOKENS, so_far.tokens * _TOKEN.itemsize)
        self._ends = _opened(directory / _ENDS, so_far.documents * _END.itemsize)
        self._ids = _opened(directory / _IDS, so_far.documents * _ID.itemsize)
        self.num_tokens, self._documents = so_far.tokens, so_far.documents
        self._document_start, self._dropping = so_far.document_start, so_far.dropping
        self.begins, self._pieces = so_far.begins, so_far.pieces
        """Where the document of the next piece begins in the source, and its pieces that are behind."""

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tokens.close()
        self._ends.close()
        self._ids.close()

    def add(self, piece: TokenisedPiece) -> None:
        """Append a piece; one that was refused takes the whole of its document with it."""
        if piece.begins:
            self._document_start, self._dropping = self.num_tokens, False
        begins = self.begins
        self.begins, self._pieces = (piece.following, 0) if piece.ends else (begins, self._pieces + 1)
        if piece.refusal is not None and not self._dropping:
            self.bad.add(piece.place, piece.refusal, begins)
            self._tokens.seek(self._document_start * _TOKEN.itemsize)
            self._tokens.truncate()
            self.num_tokens, self._dropping = self._document_start, True
        if self._dropping:
            return
        self._tokens.write(piece.tokens.astype(_TOKEN, copy=False).tobytes())
        self.num_tokens += len(piece.tokens)
        if piece.ends:
            self._end_document(piece.document_id)

    def keep(self) -> None:
        """Bring what was written to the disk, and how far that is."""
        for file in (self._tokens, self._ends, self._ids):
            file.flush()
            os.fsync(file.fileno())
        skipped, first = self.bad.up_to(self.begins)
        TokensSoFar(
            tokens=self.num_tokens,
            documents=self._documents,
            document_start=self._document_start,
            dropping=self._dropping,
            begins=self.begins,
            pieces=self._pieces,
            skipped=skipped,
            skipped_first=tuple(first),
        ).save(self._directory / _SO_FAR)

    def finish(self) -> None:
        """After the last piece. The whole is there only when its directory is published."""
        if self.num_tokens > self._document_start and not self._dropping:
            self._end_document(0)  # cut off: a part of a text is known by nothing
        for file in (self._tokens, self._ends, self._ids):
            file.flush()
        manifest = TokensManifest(
            tokens=self.num_tokens,
            documents=self._documents,
            skipped=self.bad.count,
            skipped_places=tuple(self.bad.places),
            sha256={name: sha256_of(self._directory / name) for name in (_TOKENS, _ENDS, _IDS)},
        )
        manifest.sealed().save(self._directory / _MANIFEST)
        (self._directory / _SO_FAR).unlink(missing_ok=True)

    def last_tokens(self, count: int) -> np.ndarray:
        """Of those that were written."""
        self._tokens.seek((self.num_tokens - count) * _TOKEN.itemsize)
        return np.frombuffer(self._tokens.read(), _TOKEN)

    def _end_document(self, document_id: int) -> None:
        self._ends.write(np.array(self.num_tokens, _END).tobytes())
        self._ids.write(np.array(document_id, _ID).tobytes())
        self._documents += 1
        self._document_start = self.num_tokens


def _opened(path: Path, size: int) -> BinaryIO:
    """To be written after its first `size` bytes."""
    path.touch()
    file = path.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file


@dataclass(frozen=True)
class Tokenisation:
    """How sources become tokens, and where these are kept."""

    tokenizer: TextTokenizer
    cache: Path
    digests: FileDigests
    workers: int | None = None
    """Processes; None: one per CPU that this process may use."""
    say: Callable[[str], None] = lambda line: None
    """Is told what was damaged, and is made again."""

    @property
    def unfinished(self) -> Path:
        """Beside the others; of one process at a time, which holds the lock of the run."""
        return self.cache.with_name("unfinished") / "tokens"

    @property
    def bos_of_blocks(self) -> int | None:
        """The first token of every block, where it is none of the first of every document."""
        return self.tokenizer.bos_id if self.tokenizer.per_block else None

    def name_of(self, source: TextSource) -> str:
        """The same for the same tokens: it depends on contents, not on where files lie or when they were written."""
        described = [
            [self.digests.tree(path) if path.is_dir() else self.digests.file(path) for path in source.files],
            [source.format, source.text_key, source.question_template, source.max_bad_records],
            self.tokenizer.fingerprint(),
        ]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]

    def workers_for(self, num_bytes: int) -> int:
        if num_bytes < _SERIAL_BYTES and self.workers is None:
            return 1
        return self.workers or len(os.sched_getaffinity(0))


def tokens_of(
    source: TextSource, tokenisation: Tokenisation, ranks: Ranks, progress: ProgressCallback | None = None
) -> TokenFile:
    """The tokens of a source: rank 0 makes them, unless they are there; the others wait, and map them.

    What was made when this was stopped, or killed, is not made again.

    Raises:
        InputError: a file that cannot be read, or more bad records than are allowed.
    """

    def make() -> str:
        name = tokenisation.name_of(source)
        target, folder = tokenisation.cache / name, tokenisation.unfinished / name
        if not is_there(target, tokenisation):
            if not folder.is_dir():
                shutil.rmtree(tokenisation.unfinished, ignore_errors=True)  # of a text that is another one now
                folder.mkdir(parents=True)
            try:
                with writing(target):
                    _write(folder, source, tokenisation, progress)
            except InputError:
                shutil.rmtree(folder)
                raise
            sync_tree(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(target)
            sync(target.parent)
        return str(target)

    target = Path(ranks.on_main(make))
    remedy = f"all hosts must see '{tokenisation.cache}': use a file system that they share"
    return ranks.on_each(lambda: TokenFile.open(target), remedy)


def is_there(target: Path, tokenisation: Tokenisation) -> bool:
    """Whether a `TokenFile` is, and whole; what is damaged is taken away, for it can be made again."""
    if not target.is_dir():
        return False
    try:
        TokenFile.open(target).check(tokenisation.digests.file)
        return True
    except DamagedError as error:
        tokenisation.say(f"{error.reason}: tokenised again")
    shutil.rmtree(target)
    return False


def _write(folder: Path, source: TextSource, tokenisation: Tokenisation, progress: ProgressCallback | None) -> None:
    total = source.num_bytes
    done = shown = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes

    so_far = TokensSoFar.of(folder)
    bad = BadRecords(source, so_far.skipped, so_far.skipped_first)
    pieces = itertools.islice(read_pieces(source, advance, so_far.begins, bad), so_far.pieces, None)
    kept = time.monotonic()
    with TokenWriter(folder, bad, so_far) as writer:
        for piece in tokenise(pieces, tokenisation.tokenizer, tokenisation.workers_for(total)):
            writer.add(piece)
            if time.monotonic() - kept > EVERY:
                writer.keep()
                kept = time.monotonic()
            if progress and done > shown:  # files are read in larger steps than documents
                try:
                    progress(min(1.0, done / max(total, 1)), piece.place)
                except StopRequestedError:
                    writer.keep()
                    raise
                shown = done
        writer.finish()
