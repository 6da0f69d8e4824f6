"""How corpora are named in the configuration: files, and sources of files with a weight."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from adept_ds.config.paths import UserPath
from adept_ds.config.section import FILE, PART, Section


def _title(text: str) -> str:
    """Raises `ValueError`: it cannot stand in a table."""
    if not text.strip() or not text.isprintable() or len(text) > 100:
        raise ValueError(f"{text[:100]!r} is no name; write one line of at most 100 characters")
    return text


Format = Literal["auto", "jsonl", "text", "parquet", "dataset"]


class CorpusFiles(Section):
    """Files that are read alike."""

    files: list[UserPath] = Field(
        min_length=1, description="files, directories of them, patterns such as 'part-*.jsonl'"
    )
    format: Format | None = Field(None, description="as data.format, for these files")
    text_key: str | None = Field(None, min_length=1, description="as data.text_key, for these files")
    name: Annotated[str, AfterValidator(_title)] | None = Field(
        None, description="for messages and results; by default that of the first file"
    )

    @property
    def title(self) -> str:
        return self.name or self.files[0].stem


class CorpusSource(CorpusFiles):
    """A part of a corpus that is sampled, and counted, by its weight."""

    weight: float = Field(1.0, gt=0, le=1e9, description="share of the sequences, relative to other sources")


CorpusEntry = Annotated[
    Annotated[UserPath, Tag(FILE)] | Annotated[CorpusSource, Tag(PART)],
    Discriminator(lambda value: PART if isinstance(value, dict | CorpusSource) else FILE),
]


HeldOutEntry = Annotated[
    Annotated[UserPath, Tag(FILE)] | Annotated[CorpusFiles, Tag(PART)],
    Discriminator(lambda value: PART if isinstance(value, dict | CorpusFiles) else FILE),
]


def corpus_sources(entries: typing.Sequence[Path | CorpusFiles]) -> list[CorpusSource]:
    """What a corpus is mixed of: all plain files together are one source, the first."""
    plain = [entry for entry in entries if isinstance(entry, Path)]
    together = [CorpusSource(files=plain)] if plain else []
    parts = [entry for entry in entries if isinstance(entry, CorpusFiles)]
    return together + [part if isinstance(part, CorpusSource) else CorpusSource(**dict(part)) for part in parts]


def twice_named(entries: typing.Sequence[Path | CorpusFiles]) -> str | None:
    """A name that two sources share."""
    names = [source.title for source in corpus_sources(entries)]
    return next((name for name in names if names.count(name) > 1), None)
