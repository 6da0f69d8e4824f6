"""Which stage was made from which inputs: what a run need not do again.

A stage declares its inputs and its output once. Rank 0 alone looks at the disk and decides for all: with a network file
system that lags, ranks that looked by themselves would disagree, and wait for each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adept_ds.base.errors import InputError
from adept_ds.base.files import read_json, stamp_files, write_json
from adept_ds.config.schema import CorpusSource, corpus_sources
from adept_ds.models.directory import ModelDirectory
from adept_ds.ranks.collectives import Ranks
from adept_ds.weights.hf_directory import weight_files


@dataclass(frozen=True)
class Stage:
    """What is made, and of what."""

    name: str
    output: Path
    inputs: Callable[[], Any]
    """Everything that decides what the output is, as JSON; called on rank 0."""


class Ledger:
    """The record of a run's stages (stages.json)."""

    def __init__(self, file: Path, ranks: Ranks) -> None:
        self._file, self._ranks = file, ranks

    def once(self, stage: Stage, make: Callable[[], None]) -> bool:
        """Run `make`, on every rank, unless the output was made from these very inputs; whether it was run."""

        def look() -> tuple[Any, bool]:
            inputs = plain(stage.inputs())
            return inputs, self._is_recorded(stage, inputs)

        inputs, is_current = self._ranks.on_main(look)
        if is_current:
            return False
        make()
        self._ranks.on_main(lambda: write_json(self._file, self._recorded() | {stage.name: inputs}))
        return True

    def is_current(self, stage: Stage) -> bool:
        """Whether the output was made from these very inputs."""
        return self._ranks.on_main(lambda: self._is_recorded(stage, plain(stage.inputs())))

    def _is_recorded(self, stage: Stage, inputs: Any) -> bool:
        return stage.output.exists() and self._recorded().get(stage.name) == inputs

    def _recorded(self) -> dict[str, Any]:
        if not self._file.is_file():
            return {}
        try:
            record = read_json(self._file)
        except ValueError as error:
            raise self._damaged(str(error)) from None
        if not isinstance(record, dict):
            raise self._damaged("no JSON object")
        return record

    def _damaged(self, reason: str) -> InputError:
        return InputError(f"'{self._file}' is damaged ({reason}); move it away, and what it spoke of is made again")


def plain(value: Any) -> Any:
    """As it comes back from a JSON file, so that both can be compared."""
    return json.loads(json.dumps(value))


def stamp_model(model: ModelDirectory) -> list[Any]:
    """Path, and stamps of weights and configuration."""
    return [str(model.path.resolve()), stamp_files([*weight_files(model.path), model.path / "config.json"])]


def stamp_corpus(files: Sequence[Path]) -> list[Any]:
    """In the given order: packing follows it."""
    return [stamp_files([file])[0] for file in files]


def stamp_mixture(entries: Sequence[Path | CorpusSource]) -> list[Any]:
    """Of each source its weight and its files."""
    return [[source.weight, *stamp_corpus(source.files)] for source in corpus_sources(entries)]
