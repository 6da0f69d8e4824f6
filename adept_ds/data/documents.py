"""Corpus files -> documents, in bounded memory: JSON lines, Parquet, plain text, on-disk datasets; see docs/data.md."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from adept_ds.base.errors import InputError
from adept_ds.config.corpus_entries import CorpusFiles, Format, corpus_sources
from adept_ds.config.corpus_files import find_files
from adept_ds.config.data_section import DataSection
from adept_ds.data.formats import WORDS, Found, format_of
from adept_ds.data.open_files import BUFFER_BYTES, open_bytes
from adept_ds.data.pieces import Piece, cut_document, document_id, pieces_of
from adept_ds.data.questions import Question
from adept_ds.data.record_text import MAX_LINE_BYTES, RecordText, parse_line
from adept_ds.data.tables import dataset_rows, disk_bytes, parquet_rows
from adept_ds.data.text_files import decoded

T = TypeVar("T")

Place = tuple[int, int]
"""A file of a source, and a record in it."""

_PLACES = 3
"""Bad records that are named."""

_LOOKED_AT = 200
"""Files of a directory that are looked at beforehand, evenly spread."""


@dataclass(frozen=True)
class TextSource:
    """Files that are read alike, one after another."""

    key: str
    """Of the configuration, for messages."""
    files: tuple[Path, ...]
    """Also directories, of on-disk datasets (see `find_files`)."""
    format: Format
    text_key: str
    question_template: str
    max_bad_records: int

    @classmethod
    def of(cls, key: str, files: CorpusFiles, data: DataSection) -> TextSource:
        """As it is configured. Raises `InputError`: as `find_files`."""
        return cls(
            key,
            find_files(key, files.files),
            files.format or data.format,
            files.text_key or data.text_key,
            data.question_template,
            data.max_bad_records,
        )

    @property
    def num_bytes(self) -> int:
        """As they lie on the disk."""
        return sum(map(disk_bytes, self.files))


class BadRecords:
    """Records of a source that could not be read: counted and skipped, as long as there are few.

    Args:
        count: of those that were found before.
        first: of these; see `up_to`.
    """

    def __init__(self, source: TextSource, count: int = 0, first: Sequence[tuple[Place, str]] = ()) -> None:
        self._key, self._allowed = source.key, source.max_bad_records
        self.count = count
        self._first = list(first)
        self._found: list[Place] = []

    @property
    def places(self) -> list[str]:
        """The first of them, each with what was found."""
        return [text for _, text in self._first]

    def add(self, place: str, reason: str, following: Place = (0, 0)) -> None:
        """One more.

        Args:
            following: what comes after it, as in `Piece`.

        Raises:
            InputError: this is one more than `data.max_bad_records` allows.
        """
        self.count += 1
        self._found.append(following)
        text = f"{place}: {reason if len(reason) <= 300 else reason[:297] + '...'}"
        insort(self._first, (following, text), key=itemgetter(0))
        del self._first[_PLACES:]
        if self.count <= self._allowed:
            return
        if not self._allowed:
            raise InputError(f"{self._key}: {self.places[0]}; or raise data.max_bad_records, to skip such records")
        raise InputError(
            f"{self._key}: {self.count} bad records are more than data.max_bad_records ({self._allowed}) allows; "
            f"the first: {' | '.join(self.places)}"
        )

    def up_to(self, place: Place) -> tuple[int, list[tuple[Place, str]]]:
        """How many there are before this place, and the first of them: reading is ahead of what is done with it."""
        ahead = sum(following > place for following in self._found)
        return self.count - ahead, [entry for entry in self._first if entry[0] <= place]


def read_pieces(
    source: TextSource,
    on_bytes: Callable[[int], None] | None = None,
    skip: tuple[int, int] = (0, 0),
    bad: BadRecords | None = None,
) -> Iterator[Piece]:
    """The documents of a source in their order, those that are long in several pieces.

    Args:
        on_bytes: called with numbers of bytes of the files as they lie on the disk, `source.num_bytes` in the end.
        skip: where to begin: a file, and a record (line, row) of it; see `Piece.following`.
        bad: counts what is skipped.

    Raises:
        InputError: a file that cannot be read, or one more bad record than allowed; the message names the place.
    """
    bad = BadRecords(source) if bad is None else bad
    for number in range(skip[0], len(source.files)):
        yield from _FileReader(source, number, bad, on_bytes).pieces(skip[1] if number == skip[0] else 0)


def read_questions(source: TextSource) -> Iterator[tuple[int, Question | None]]:
    """Of each document of a source: what it is known by, and its question, where it is one that can be asked.

    Raises:
        InputError: as `read_pieces`.
    """
    bad = BadRecords(source)
    for number in range(len(source.files)):
        yield from _FileReader(source, number, bad).questions()


def check_corpus(key: str, corpus: Sequence[Path | CorpusFiles], data: DataSection) -> None:
    """Look at the formats and the first records of a corpus: where most mistakes show, within milliseconds.

    Raises:
        InputError: as `read_pieces`; or what a directory or a pattern stands for is text in part, records in part.
    """
    for source in corpus_sources(corpus):
        for entry in source.files:
            formats = _look_at(TextSource.of(key, source.model_copy(update={"files": [entry]}), data))
            text, other = formats.pop("text", None), next(iter(formats.items()), None)
            if text and other:
                raise InputError(
                    f"{key}: '{entry}' stands for plain text ('{text}') and for {WORDS[other[0]]} ('{other[1]}'); "
                    "give a pattern such as '*.jsonl' that leaves one of both out, or name the files one by one"
                )


def _look_at(source: TextSource) -> dict[Found, Path]:
    """A file of each format."""
    bad, found = BadRecords(source), dict[Found, Path]()
    for number in range(0, len(source.files), -(-len(source.files) // _LOOKED_AT)):
        file = _FileReader(source, number, bad)
        next(file.pieces(), None)
        found[file.format] = file.path
    return found


@dataclass(frozen=True)
class _FileReader:
    """Reads one file of a source."""

    source: TextSource
    number: int
    bad: BadRecords
    on_bytes: Callable[[int], None] | None = None

    @property
    def path(self) -> Path:
        return self.source.files[self.number]

    @cached_property
    def format(self) -> Found:
        return format_of(self.source.key, self.path, self.source.format)

    def pieces(self, skip: int = 0) -> Iterator[Piece]:
        """From record `skip` on."""
        if self.format == "text":
            yield from self._text() if not skip else ()
            return
        text_of = self._record_text.of_record
        for place, index, text in self._records(skip, lambda record, _: text_of(record)):
            yield from pieces_of(text, place, (self.number, index + 1))

    def questions(self) -> Iterator[tuple[int, Question | None]]:
        """Of each document, in order, what it is known by, and the question that it is, if it is one."""
        if self.format == "text":
            yield from ((piece.document_id, None) for piece in self._text() if piece.ends)
            return
        record_text = self._record_text

        def convert(record: Mapping[str, Any], place: str) -> tuple[int, Question | None]:
            known_by = document_id(record_text.of_record(record))
            return known_by, Question.of(record, place) if record_text.is_question(record) else None

        for _, _, found in self._records(0, convert):
            yield found

    @property
    def _record_text(self) -> RecordText:
        return RecordText(self.source.text_key, self.source.question_template)

    def _records(self, skip: int, convert: Callable[[Mapping[str, Any], str], T]) -> Iterator[tuple[str, int, T]]:
        """Places and numbers of records, and what `convert` makes of them."""
        unit, records, parse = self._unparsed(skip)
        prefix = f"'{self.path}' {unit} "
        for index, record in records:
            place = f"{prefix}{index + 1}"
            try:
                converted = convert(parse(record), place)
            except ValueError as error:
                self.bad.add(place, str(error), (self.number, index + 1))
                continue
            yield place, index, converted

    def _unparsed(self, skip: int) -> tuple[str, Iterator[tuple[int, Any]], Callable[[Any], Mapping[str, Any]]]:
        """What a record is called, all of them with their numbers, and how to read one."""
        if self.format == "jsonl":
            return "line", self._lines(skip), parse_line
        rows = parquet_rows if self.format == "parquet" else dataset_rows
        return "row", rows(self.source.key, self.path, self.source.text_key, skip, self.on_bytes), lambda row: row

    def _lines(self, skip: int) -> Iterator[tuple[int, bytes]]:
        """With their numbers, from 0; of one that is too long, the beginning. Blank ones are counted, and left out."""
        with open_bytes(self.source.key, self.path, self.on_bytes) as file:
            index = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                if index >= skip and not line.isspace():
                    yield index, line
                if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                    _pass_line_end(file)
                index += 1

    def _text(self) -> Iterator[Piece]:
        place, following = f"'{self.path}'", (self.number + 1, 0)
        with open_bytes(self.source.key, self.path, self.on_bytes) as file:
            yield from cut_document(decoded(self.source.key, self.path, file), place, following)


def _pass_line_end(file: BinaryIO) -> None:
    while (part := file.readline(BUFFER_BYTES)) and not part.endswith(b"\n"):
        pass
