"""Which stage was made from which inputs: what a run need not do again.

A stage declares its inputs and its output once. Rank 0 alone looks at the disk and decides for all: with a network file
system that lags, ranks that looked by themselves would disagree, and wait for each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from adept_ds.base.errors import InputError
from adept_ds.base.files import write_json
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.unfinished import Unfinished


@dataclass(frozen=True)
class Stage:
    """What is made, and of what."""

    name: str
    output: Path
    inputs: Callable[[], Any]
    """Everything that decides what the output is, as JSON; called on rank 0."""
    also: tuple[Path, ...] = ()
    """What is made beside the output, and belongs to it."""


Keep = Callable[[str, Any], Unfinished]
"""From the name of a stage and what it is made of to where its works are kept until it is done."""


class Ledger:
    """The record of a run's stages (stages.json)."""

    def __init__(self, file: Path, ranks: Ranks, keep: Keep = lambda name, made_of: Unfinished()) -> None:
        self._file, self._ranks, self._keep = file, ranks, keep

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
        make(unfinished)
        self._ranks.on_main(lambda: write_json(self._file, self._recorded() | {stage.name: inputs}))
        unfinished.remove()
        return True

    def check(self) -> None:
        """Raises `InputError`: the record is damaged."""
        self._ranks.on_main(self._recorded)

    def _is_recorded(self, stage: Stage, inputs: Any) -> bool:
        whole = all(path.exists() for path in (stage.output, *stage.also))
        return whole and self._recorded().get(stage.name) == inputs

    def _recorded(self) -> dict[str, Any]:
        if not self._file.is_file():
            return {}
        try:
            record = from_json(self._file.read_bytes(), allow_inf_nan=False)
        except (OSError, ValueError) as error:
            raise self._damaged(str(error)) from None
        if not isinstance(record, dict):
            raise self._damaged("no JSON object")
        return record

    def _damaged(self, reason: str) -> InputError:
        return InputError(
            f"'{self._file}' is damaged ({reason}); move this one file away: layers are probed, and the trained model "
            "exported and evaluated, once more, and training goes on from its checkpoints"
        )


def plain(value: Any) -> Any:
    """As it comes back from a JSON file, so that both can be compared."""
    return json.loads(json.dumps(value))
