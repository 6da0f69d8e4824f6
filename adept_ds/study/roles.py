"""No text has two roles: what is learned, what is replayed or probed, what is chosen by, and what is reported."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adept_ds.base.digests import FileDigests
from adept_ds.base.errors import InputError
from adept_ds.config.corpus_entries import CorpusFiles, CorpusSource, corpus_sources
from adept_ds.config.corpus_files import find_files
from adept_ds.config.layer_sections import Stability
from adept_ds.config.schema import Config
from adept_ds.data.tables import disk_bytes
from adept_ds.study.schema import Study
from adept_ds.study.texts import TEST, VALIDATION, texts_of
from adept_ds.study.variants import Variant

_DOMAIN, _GENERAL = "training", "replay and probing"
"""Roles beside validation and test."""


@dataclass(frozen=True)
class Use:
    """What a key of the study names, and what for."""

    role: str
    key: str
    entries: Sequence[Path | CorpusFiles]

    def files(self) -> list[Path]:
        """Raises `InputError`: see `find_files`."""
        entries = (entry.files if isinstance(entry, CorpusFiles) else [entry] for entry in self.entries)
        return [file for paths in entries for file in find_files(self.key, paths)]


def uses_of(study: Study) -> list[Use]:
    """What the study itself names."""
    general = study.general
    return [
        Use(_DOMAIN, "domain.sources", study.domain.sources),
        Use(_GENERAL, "general.train", general.train),
        Use(VALIDATION, "general.validation", general.validation),
        Use(TEST, "general.test", general.test),
    ]


def uses_of_variants(study: Study, examples: Sequence[tuple[Variant, Config]]) -> list[Use]:
    """What methods and settings name beside that; each with a configuration."""
    shared = corpus_sources(texts_of(study).general)
    return [
        Use(_GENERAL, f"{variant.origin}: {key}", corpus)
        for variant, config in examples
        for key, corpus in _general_texts(config).items()
        if corpus_sources(corpus) != shared
    ]


def texts_of_variants(study: Study, examples: Sequence[tuple[Variant, Config]]) -> dict[str, CorpusSource]:
    """Sources that methods and settings name beside those of the study, each once, by what they are and for whom."""
    found, known = dict[str, CorpusSource](), list(texts_of(study).general)
    for variant, config in examples:
        for key, corpus in _general_texts(config).items():
            for source in corpus_sources(corpus):
                if source not in known:
                    known.append(source)
                    found[f"{source.title} ({key} of {variant.name})"] = source
    return found


def check_roles(uses: Sequence[Use], digests: FileDigests) -> None:
    """Raises `InputError`: a file, or another with the same content, is in two roles."""
    alike: dict[tuple[bool, int], list[tuple[Use, Path]]] = {}
    for use in uses:
        for file in use.files():
            alike.setdefault((file.is_dir(), disk_bytes(file)), []).append((use, file))
    for found in alike.values():  # of another size, nothing has to be read
        for (use, file), (other, its) in itertools.combinations(found, 2):
            if use.role != other.role and (file.samefile(its) or _content(file, digests) == _content(its, digests)):
                what = "is" if file.samefile(its) else "has the same content as"
                raise InputError(
                    f"{other.key}: '{its}' {what} '{file}' of {use.key}; a text is either for {use.role} or for "
                    f"{other.role}: give each another file"
                )


def _general_texts(config: Config) -> dict[str, Sequence[Path | CorpusFiles]]:
    stability = config.probe.stability
    other = stability.corpus if isinstance(stability, Stability) else None
    found: dict[str, Sequence[Path | CorpusFiles]] = {
        "data.replay": config.data.replay,
        "probe.corpus": config.probe.corpus,
        "probe.stability.corpus": other or [],
        "anchor.corpus": config.anchor.corpus if config.anchor else [],
    }
    return {key: corpus for key, corpus in found.items() if corpus}


def _content(file: Path, digests: FileDigests) -> str:
    return digests.tree(file) if file.is_dir() else digests.file(file)
