"""Definitions of diseases: the MONDO ontology, as the package `cellxgene-ontology-guide` has it.

Monarch Initiative, Mondo Disease Ontology. A text is 'label: definition'. Synonyms stay out: most repeat the label in
another spelling, or are symbols of genes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
from demo.prepare import Record
from demo.study.packages import member
from demo.study.texts import distinct_texts

TERMS = "cellxgene_ontology_guide/data/MONDO-ontology-v2026-05-05.json.zst"
"""The newest of four that the package has."""


def diseases(archive: Path) -> list[Record]:
    """One text for each disease that has a definition; a definition that several share counts for the first."""
    return distinct_texts(_definitions(member(archive, TERMS)))


def _definitions(compressed: bytes) -> Iterator[Record]:
    terms = json.load(pyarrow.input_stream(pyarrow.py_buffer(compressed), compression="zstd"))
    known: set[str] = set()
    for identifier, term in sorted(terms.items()):
        definition = " ".join((term.get("description") or "").split())
        if definition and not term["deprecated"] and definition not in known:
            known.add(definition)
            yield Record(f"{term['label']}: {definition}", f"mondo/{identifier}")
