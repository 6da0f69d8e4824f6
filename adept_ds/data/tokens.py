"""Texts -> tokens: one flat file for each source of a corpus, made once and memory-mapped.

A corpus may be larger than memory, and is held once per host. What is cut of the tokens (see `packing`) costs nothing,
so one file serves every sequence length.

    tokens.bin     int32: document after document, each with its separators
    ends.bin       int64: where each document ends in it
    ids.bin        int64: what each document is known by, whatever its tokens (see `pieces.id_of`)
    manifest.json  written last
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np
from pydantic import Field

from adept_ds.base.digests import Digest, FileDigests, sha256_of
from adept_ds.base.errors import DamagedError, InputError
from adept_ds.base.files import new_directory
from adept_ds.base.progress import ProgressCallback
from adept_ds.base.proofs import DigestOf, FileProof, InnerName, Sealed, check_file, check_size
from adept_ds.data.documents import BadRecords, TextSource, read_pieces
from adept_ds.data.tokenising import TokenisedPiece, tokenise
from adept_ds.data.tokenizer import TextTokenizer
from adept_ds.ranks.collectives import Ranks

_TOKENS, _ENDS, _IDS, _MANIFEST = "tokens.bin", "ends.bin", "ids.bin", "manifest.json"
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
    """Writes a `TokenFile`, piece by piece, in bounded memory."""

    def __init__(self, directory: Path, bad: BadRecords) -> None:
        self._directory, self.bad = directory, bad
        self._tokens = (directory / _TOKENS).open("w+b")
        self._ends, self._ids = (directory / _ENDS).open("wb"), (directory / _IDS).open("wb")
        self.num_tokens = self._documents = self._document_start = 0
        self._dropping = False

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
        if piece.refusal is not None and not self._dropping:
            self.bad.add(piece.place, piece.refusal)
            self._tokens.seek(self._document_start * _TOKEN.itemsize)
            self._tokens.truncate()
            self.num_tokens, self._dropping = self._document_start, True
        if self._dropping:
            return
        self._tokens.write(piece.tokens.astype(_TOKEN, copy=False).tobytes())
        self.num_tokens += len(piece.tokens)
        if piece.ends:
            self._end_document(piece.document_id)

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

    def last_tokens(self, count: int) -> np.ndarray:
        """Of those that were written."""
        self._tokens.seek((self.num_tokens - count) * _TOKEN.itemsize)
        return np.frombuffer(self._tokens.read(), _TOKEN)

    def _end_document(self, document_id: int) -> None:
        self._ends.write(np.array(self.num_tokens, _END).tobytes())
        self._ids.write(np.array(document_id, _ID).tobytes())
        self._documents += 1
        self._document_start = self.num_tokens


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

    Raises:
        InputError: a file that cannot be read, or more bad records than are allowed.
    """

    def make() -> str:
        target = tokenisation.cache / tokenisation.name_of(source)
        if not is_there(target, tokenisation):
            try:
                with new_directory(target) as folder:
                    _write(folder, source, tokenisation, progress)
            except InputError:
                if not is_there(target, tokenisation):  # else another command on this run was faster
                    raise
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

    bad = BadRecords(source)
    pieces = read_pieces(source, advance, bad=bad)
    with TokenWriter(folder, bad) as writer:
        for piece in tokenise(pieces, tokenisation.tokenizer, tokenisation.workers_for(total)):
            writer.add(piece)
            if progress and done > shown:  # files are read in larger steps than documents
                progress(min(1.0, done / max(total, 1)), piece.place)
                shown = done
        writer.finish()
