"""Which stage was made from which inputs, and what came out: what a run need not do again.

A stage declares its inputs and its output once. Rank 0 alone looks at the disk and decides for all: with a network file
system that lags, ranks that looked by themselves would disagree, and wait for each other. An output that is not what
the stage left, to the last bit, is made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from adept_ds.base.digests import Digest, sha256_of
from adept_ds.base.errors import DamagedError
from adept_ds.base.files import aside, write_json
from adept_ds.base.outputs import check_as_written
from adept_ds.base.progress import stage as begun
from adept_ds.base.proofs import DigestOf
from adept_ds.base.records import Record
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.unfinished import Unfinished


class _Entry(Record):
    """Of a stage. Older ones are what it was made of, and nothing else."""

    made_of: Any
    sha256: dict[str, Digest]
    """Of the files among its outputs, by name; directories say themselves what they are."""


@dataclass(frozen=True)
class Stage:
    """What is made, and of what."""

    name: str
    output: Path
    """A file, or a directory that a command wrote (see `outputs.new_output`)."""
    inputs: Callable[[], Any]
    """Everything that decides what the output is, as JSON; called on rank 0."""
    also: tuple[Path, ...] = ()
    """Files that are made beside the output, and belong to it."""

    @property
    def outputs(self) -> tuple[Path, ...]:
        return (self.output, *self.also)


Keep = Callable[[str, Any], Unfinished]
"""From the name of a stage and what it is made of to where its works are kept until it is done."""


class Ledger:
    """The record of a run's stages (stages.json).

    Args:
        keep: says where the works of a stage are kept until it is done.
        digest_of: of a file's bytes, which may be remembered.
        say: is told, with the name of a stage, what is made again because it was damaged.
    """

    def __init__(
        self,
        file: Path,
        ranks: Ranks,
        keep: Keep = lambda name, made_of: Unfinished(),
        digest_of: DigestOf = sha256_of,
        say: Callable[[str, str], None] = lambda stage, line: None,
    ) -> None:
        self._file, self._ranks, self._keep, self._digest_of, self._say = file, ranks, keep, digest_of, say

    def once(self, stage: Stage, make: Callable[[Unfinished], None]) -> bool:
        """Run `make`, on every rank, unless the output was made from these very inputs; whether it was run.

        Args:
            make: may keep what it does on the way.
        """

        def look() -> tuple[Any, bool]:
            inputs = plain(stage.inputs())
            return inputs, self._is_recorded(stage, inputs)

        inputs, is_current = self._ranks.on_main(look)
        if is_current:
            return False
        unfinished = self._keep(stage.name, inputs)
        with begun(stage.name.partition("_")[0]):
            make(unfinished)

        def record() -> None:
            digests = {path.name: self._digest_of(path) for path in stage.outputs if path.is_file()}
            entry = _Entry(made_of=inputs, sha256=digests)
            write_json(self._file, self._recorded() | {stage.name: entry.to_json()})

        self._ranks.on_main(record)
        unfinished.remove()
        return True

    def _is_recorded(self, stage: Stage, inputs: Any) -> bool:
        found = self._recorded().get(stage.name)
        try:
            entry = _Entry.model_validate(found)
        except ValidationError:
            entry = _Entry(made_of=found, sha256={})
        if entry.made_of != inputs or not all(path.exists() for path in stage.outputs):
            return False
        try:
            if stage.output.is_dir():
                check_as_written(stage.output, self._digest_of)
            for path in stage.outputs:
                if entry.sha256 and path.is_file() and entry.sha256.get(path.name) != self._digest_of(path):
                    raise DamagedError(f"'{path}' is not as it was written (its SHA-256 is another)")
        except DamagedError as error:
            self._say(stage.name, f"{error.reason}: made again")
            return False
        return True

    def _recorded(self) -> dict[str, Any]:
        """One that is damaged is put aside: what it says is found out again."""
        if not self._file.is_file():
            return {}
        try:
            record = from_json(self._file.read_bytes(), allow_inf_nan=False)
            if isinstance(record, dict):
                return record
            reason = "no JSON object"
        except (OSError, ValueError) as error:
            reason = str(error)
        kept = aside(self._file, "damaged")
        self._file.rename(kept)
        lost = "layers are probed, and the trained model exported and evaluated, once more"
        line = f"'{self._file}' is damaged ({reason}): kept as '{kept.name}'; {lost}"
        self._say("stages", DamagedError(line).reason)
        return {}


def plain(value: Any) -> Any:
    """As it comes back from a JSON file, so that both can be compared."""
    return json.loads(json.dumps(value))
