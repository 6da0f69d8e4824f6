"""The domain's documents fall to training, validation and test by the hash of their text.

Not by their place: a corpus that grows, or is sorted otherwise, keeps every document where it was, and copies of a
document fall together. With h the first 8 bytes of SHA-256(SALT + text) as a number below 2^64, a document is held out
for validation if h / 2^64 < validation, for test if it is below validation + test, and trained on otherwise.

    data/<of what, in 12 digits>/NAME.train.jsonl, NAME.validation.jsonl, NAME.test.jsonl, split.json
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from adept_ds.base.digests import json_digest
from adept_ds.base.errors import InputError
from adept_ds.base.files import new_directory
from adept_ds.base.progress import Meter
from adept_ds.base.records import Record
from adept_ds.base.terminal import Terminal
from adept_ds.config.corpus_entries import CorpusSource
from adept_ds.config.data_section import DataSection
from adept_ds.data.documents import TextSource, read_pieces
from adept_ds.data.pieces import Piece
from adept_ds.run.identity import Identity
from adept_ds.study.naming import slug
from adept_ds.study.schema import DomainTexts
from adept_ds.study.texts import TEST, VALIDATION, sources_of

SALT = "adept-ds study split 1\n"

TRAIN = "train"
PARTS = (TRAIN, VALIDATION, TEST)

_KEY = "domain.sources"
_RECORD = "split.json"


class SplitSource(Record):
    """A source of the domain, split."""

    name: str
    weight: float
    files: dict[str, str]
    """By part, relative to the record."""
    documents: dict[str, int]
    """By part."""


class Split(Record):
    """split.json"""

    salt: str = SALT
    made_of: Any
    """Texts, and how they were read and shared out."""
    sources: list[SplitSource]

    @classmethod
    def remedy(cls) -> str:
        return "move its folder away; it is made again"


def split_domain(
    domain: DomainTexts, data: DataSection, folder: Path, identity: Identity, terminal: Terminal
) -> dict[str, list[CorpusSource]]:
    """The sources of the domain by part; written once, and found again as long as texts and shares are the same.

    Args:
        data: how texts are read.

    Raises:
        InputError: a text cannot be read, or no document of a source falls to one of the parts.
    """
    sources = sources_of(_KEY, domain.sources)
    made_of = {
        "texts": identity.corpus(_KEY, sources),
        "reading": data.model_dump(mode="json", include={"format", "text_key", "question_template", "max_bad_records"}),
        "shares": [domain.validation, domain.test],
        "names": [source.title for source in sources],
        "salt": SALT,
    }
    place = folder / json_digest(made_of)[:12]
    if not (place / _RECORD).is_file():
        with new_directory(place) as fresh, terminal.progress("splitting the domain") as bar:
            total = sum(TextSource.of(_KEY, source, data).num_bytes for source in sources)
            meter = Meter(total, bar)
            found = [_split(domain, source, TextSource.of(_KEY, source, data), fresh, meter) for source in sources]
            Split(made_of=made_of, sources=found).save(fresh / _RECORD)
    split = Split.load(place / _RECORD)
    return {part: [_source(source, part, place) for source in split.sources] for part in PARTS}


def part_of(text: str, validation: float, test: float) -> str:
    """Where a document falls; shares of all documents."""
    digest = hashlib.sha256(SALT.encode() + text.encode("utf-8", "surrogatepass")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return VALIDATION if place < validation else TEST if place < validation + test else TRAIN


def documents_of(source: TextSource, meter: Meter | None = None) -> Iterator[str]:
    """The whole text of each document, in their order."""
    parts = list[str]()
    for piece in read_pieces(source, meter.advance if meter else None):
        parts.append(_own_text(piece))
        if piece.ends:
            yield "".join(parts)
            parts = []


def _own_text(piece: Piece) -> str:
    """Without the context that is carried along."""
    return piece.text[piece.start : piece.stop]


def _split(domain: DomainTexts, source: CorpusSource, texts: TextSource, folder: Path, meter: Meter) -> SplitSource:
    files = {part: f"{slug(source.title)}.{part}.jsonl" for part in PARTS}
    if (folder / files[TRAIN]).exists():
        raise InputError(f"{_KEY}: '{source.title}' makes files of the same names as another source; rename one")
    counts = dict.fromkeys(PARTS, 0)
    with ExitStack() as stack:
        opened = {
            part: stack.enter_context((folder / name).open("w", encoding="utf-8")) for part, name in files.items()
        }
        for text in documents_of(texts, meter):
            part = part_of(text, domain.validation, domain.test)
            counts[part] += 1
            opened[part].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    empty = next((part for part, count in counts.items() if not count), None)
    if empty is not None:
        raise InputError(
            f"{_KEY}: of the {sum(counts.values())} documents of '{source.title}' none falls to {empty}; "
            "give more documents, or larger domain.validation and domain.test"
        )
    return SplitSource(name=source.title, weight=source.weight, files=files, documents=counts)


def _source(source: SplitSource, part: str, place: Path) -> CorpusSource:
    return CorpusSource(
        files=[place / source.files[part]], format="jsonl", text_key="text", name=source.name, weight=source.weight
    )
