"""The domain's documents fall to three parts by hash: properties that make the split one that can be trusted."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from adept_ds.base.digests import FileDigests
from adept_ds.base.errors import InputError
from adept_ds.base.terminal import Terminal
from adept_ds.config.corpus_entries import CorpusSource
from adept_ds.config.data_section import DataSection
from adept_ds.data.pieces import MAX_PIECE_CHARACTERS
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.stopping import StopRequest
from adept_ds.run.identity import Identity
from adept_ds.run.progress import StageProgress
from adept_ds.study.schema import DomainTexts
from adept_ds.study.splitting import PARTS, part_of, split_domain

TEXTS = [f"document number {number}" for number in range(2000)]


def write(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def split(folder: Path, *files: Path, data: DataSection | None = None) -> dict[str, list[CorpusSource]]:
    terminal = Terminal(None)
    identity = Identity(FileDigests(folder / "digests.json"), StageProgress(terminal, StopRequest(), Ranks()))
    return split_domain(DomainTexts(sources=list(files)), data or DataSection(), folder, identity, terminal)


def texts_in(parts: dict[str, list[CorpusSource]]) -> dict[str, list[str]]:
    return {
        part: [json.loads(line)["text"] for source in sources for line in source.files[0].read_text().splitlines()]
        for part, sources in parts.items()
    }


def test_every_document_falls_to_one_part_in_its_order(tmp_path: Path) -> None:
    found = texts_in(split(tmp_path, write(tmp_path / "d.jsonl", TEXTS)))
    assert sorted(itertools.chain(*found.values())) == sorted(TEXTS)
    for part, texts in found.items():
        assert texts == [text for text in TEXTS if part_of(text, 0.1, 0.1) == part]


def test_shares_are_those_that_were_asked_for(tmp_path: Path) -> None:
    """Within five standard deviations of a binomial count."""
    found = texts_in(split(tmp_path, write(tmp_path / "d.jsonl", TEXTS)))
    spread = 5 * (2000 * 0.1 * 0.9) ** 0.5
    assert abs(len(found["validation"]) - 200) < spread
    assert abs(len(found["test"]) - 200) < spread


def test_a_document_stays_where_it_is_whatever_stands_around_it(tmp_path: Path) -> None:
    """The corpus reversed, with copies, and twice as large: no document changes its part, and copies fall together."""
    grown = [*reversed(TEXTS), *TEXTS[:50], *(f"more {number}" for number in range(2000))]
    (tmp_path / "b").mkdir()
    one = texts_in(split(tmp_path, write(tmp_path / "a.jsonl", TEXTS)))
    other = texts_in(split(tmp_path / "b", write(tmp_path / "b.jsonl", grown)))
    for part in PARTS:
        assert set(one[part]) == set(other[part]) & set(TEXTS)
    assert not set(other["train"]) & (set(other["validation"]) | set(other["test"]))


def test_every_format_is_split_alike_and_long_documents_stay_whole(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    long = ["word " * (MAX_PIECE_CHARACTERS // 2) + str(number) for number in range(3)]
    texts = [*TEXTS[:300], *long]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "d.parquet")
    (tmp_path / "b").mkdir()
    one = texts_in(split(tmp_path, write(tmp_path / "d.jsonl", texts)))
    assert one == texts_in(split(tmp_path / "b", tmp_path / "d.parquet"))
    assert set(long) <= set(itertools.chain(*one.values()))


def test_it_is_written_once_and_anew_when_a_text_changes(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", TEXTS)
    first = split(tmp_path, file)
    written = first["train"][0].files[0].stat()
    assert split(tmp_path, file) == first
    assert first["train"][0].files[0].stat() == written
    second = split(tmp_path, write(file, [*TEXTS, "one more"]))
    assert second["train"][0].files[0] != first["train"][0].files[0]
    assert first["train"][0].files[0].is_file()


def test_sources_keep_name_and_weight(tmp_path: Path) -> None:
    weighted = CorpusSource(files=[write(tmp_path / "b.jsonl", TEXTS[1000:])], weight=3.0, name="b side")
    terminal = Terminal(None)
    identity = Identity(FileDigests(tmp_path / "digests.json"), StageProgress(terminal, StopRequest(), Ranks()))
    domain = DomainTexts(sources=[write(tmp_path / "a.jsonl", TEXTS[:1000]), weighted])
    found = split_domain(domain, DataSection(), tmp_path, identity, terminal)
    assert [(source.title, source.weight) for source in found["train"]] == [("a", 1.0), ("b side", 3.0)]


def test_a_source_too_small_to_be_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"domain.sources: of the 1 documents of 'd' none falls to"):
        split(tmp_path, write(tmp_path / "d.jsonl", ["alone"]))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
