"""The texts of a study by what they are used for; in it, every entry of a list is a source of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adept_ds.base.errors import InputError
from adept_ds.comparison.trials import ROLES
from adept_ds.config.corpus_entries import CorpusFiles, CorpusSource, corpus_sources
from adept_ds.study.schema import Study

VALIDATION, TEST = ROLES


@dataclass(frozen=True)
class Texts:
    """What the configurations of cells name."""

    train: tuple[CorpusSource, ...]
    """Of the domain."""
    general: tuple[CorpusSource, ...]
    """To be replayed, probed, anchored to."""
    domain_eval: tuple[CorpusSource, ...]
    """Held-out sources carry their role in their name, 'validation/NAME' or 'test/NAME'."""
    general_eval: tuple[CorpusSource, ...]


def texts_of(study: Study, domain: Mapping[str, Sequence[CorpusSource]] | None = None) -> Texts:
    """All of them.

    Args:
        domain: sources of the domain after they were split, by 'train' and role; None: not split yet, and so all three
            are the whole, which is enough for checking a plan.

    Raises:
        InputError: two sources of a role have one name.
    """
    whole = sources_of("domain.sources", study.domain.sources)
    split = domain or {"train": whole, VALIDATION: whole, TEST: whole}
    roles = {VALIDATION: study.general.validation, TEST: study.general.test}
    general = {role: sources_of(f"general.{role}", entries) for role, entries in roles.items()}
    return Texts(
        train=tuple(split["train"]),
        general=tuple(sources_of("general.train", study.general.train)),
        domain_eval=tuple(_in_role(role, source) for role in ROLES for source in split[role]),
        general_eval=tuple(_in_role(role, source) for role in ROLES for source in general[role]),
    )


def sources_of(key: str, entries: Sequence[Path | CorpusFiles]) -> list[CorpusSource]:
    """Raises `InputError`: two have one name."""
    sources = [
        source.model_copy(update={"name": source.title}) for entry in entries for source in corpus_sources([entry])
    ]
    names = [source.title for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(
            f"{key}: two sources are named '{twice}'; give one of them another, {{files: [...], name: ...}}"
        )
    return sources


def _in_role(role: str, source: CorpusSource) -> CorpusSource:
    return source.model_copy(update={"name": f"{role}/{source.title}"})


def held_out_tree(sources: Sequence[CorpusSource]) -> list[dict[str, object]]:
    """As data.general_eval and data.domain_eval have it: without weights."""
    return [source.model_dump(mode="json", exclude={"weight"}, exclude_none=True) for source in sources]


def corpus_tree(sources: Sequence[CorpusSource]) -> list[dict[str, object]]:
    """As data.domain, data.replay and probe.corpus have it."""
    return [source.model_dump(mode="json", exclude_none=True) for source in sources]
