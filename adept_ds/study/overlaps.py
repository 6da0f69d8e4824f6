"""Held-out documents that are elsewhere too, word for word: nothing is done about them but to say so on the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from adept_ds.base.digests import json_digest
from adept_ds.base.files import read_json, write_json
from adept_ds.base.terminal import Terminal
from adept_ds.config.corpus_entries import CorpusSource
from adept_ds.config.data_section import DataSection
from adept_ds.data.documents import TextSource
from adept_ds.data.pieces import document_id
from adept_ds.run.identity import Identity, reading_settings
from adept_ds.study.splitting import documents_of
from adept_ds.study.texts import Texts


def overlaps_of(
    texts: Texts,
    others: Mapping[str, CorpusSource],
    data: DataSection,
    folder: Path,
    identity: Identity,
    terminal: Terminal,
) -> list[str]:
    """A sentence for each pair of sources that have documents in common.

    Args:
        others: that single methods or settings read (see `roles.texts_of_variants`).

    All texts are read for this once; what was found is kept in `folder`.
    """
    held_out = {source.title: source for source in (*texts.domain_eval, *texts.general_eval)}
    trained = {f"{source.title} (trained on)": source for source in texts.train}
    general = {f"{source.title} (replayed, probed)": source for source in texts.general}
    sources = trained | general | dict(others) | held_out
    made_of = {name: identity.corpus(name, [source]) for name, source in sources.items()}
    known = folder / f"overlaps_{json_digest([made_of, reading_settings(data)])[:12]}.json"
    if not known.is_file():
        with terminal.console.status("looking for held-out documents elsewhere"):
            write_json(known, _found(sources, list(held_out), data))
    return [str(sentence) for sentence in read_json(known)]


def _found(sources: Mapping[str, CorpusSource], held_out: Sequence[str], data: DataSection) -> list[str]:
    wanted = {name: Counter(_ids(name, sources[name], data)) for name in held_out}
    found = []
    for number, (name, source) in enumerate(sources.items()):
        there = wanted[name].keys() if name in wanted else set(_ids(name, source, data))
        for other in held_out:
            earlier = list(sources).index(other) <= number  # of two that are held out, each is one of a pair once
            if name == other or (name in wanted and earlier):
                continue
            common = sum(count for document, count in wanted[other].items() if document in there)
            if common:
                total = wanted[other].total()
                found.append(f"{common} of {total} documents of {other} are in {name} too, word for word.")
    return found


def _ids(name: str, source: CorpusSource, data: DataSection) -> list[int]:
    return [document_id(text) for text in documents_of(TextSource.of(name, source, data))]
