"""Losses of held-out documents at positions of the dial, kept on the disk (dial_losses.safetensors)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from adept_ds.base.dial_record import Alphas, label_of
from adept_ds.base.digests import json_digest
from adept_ds.base.errors import DamagedError
from adept_ds.base.files import write_bytes
from adept_ds.evaluation.held_out import DocumentLosses, SourceName


class Measured(NamedTuple):
    """A position that was evaluated."""

    losses: DocumentLosses
    seconds: float
    """That it took."""


@dataclass
class KeptLosses:
    """By position, of one pair of models on one set of documents."""

    made_of: str
    """Digest of what they are losses of."""
    positions: dict[str, Measured] = field(default_factory=dict)
    """By label."""

    @classmethod
    def load(cls, path: Path, made_of: str) -> KeptLosses:
        """Those in a file; none if it is not there, or of something else.

        Raises:
            DamagedError: it is not as it was written; they are only to be found again.
        """
        if not path.is_file():
            return cls(made_of)
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("made_of") != made_of:
                    return cls(made_of)
                seconds = json.loads(metadata["seconds"])
                losses: dict[str, dict[SourceName, object]] = {label: {} for label in seconds}
                for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                    label, corpus, source = name.split("/", 2)
                    losses[label][SourceName(corpus, source)] = file.get_tensor(name)
            found = cls(made_of, {label: Measured(losses[label], seconds[label]) for label in seconds})  # type: ignore[arg-type]
            if metadata.get("check") not in (None, found._digest()):
                raise ValueError("losses were changed after they were written")
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedError(f"'{path}' is damaged ({error})") from None
        return found

    def of(self, alphas: Alphas) -> Measured | None:
        return self.positions.get(label_of(alphas))

    def add(self, alphas: Alphas, measured: Measured) -> None:
        self.positions[label_of(alphas)] = measured

    def save(self, path: Path) -> None:
        """Whole, or as it was."""
        metadata = {"made_of": self.made_of, "seconds": json.dumps(self._seconds()), "check": self._digest()}
        write_bytes(path, save(self._tensors(), metadata=metadata))

    def _tensors(self) -> dict[str, np.ndarray]:
        return {f"{label}/{name}": of for label, at in self.positions.items() for name, of in at.losses.items()}

    def _seconds(self) -> dict[str, float]:
        return {label: at.seconds for label, at in self.positions.items()}

    def _digest(self) -> str:
        """Of all that is kept."""
        tensors = {name: [str(of.dtype), sha256(of.tobytes()).hexdigest()] for name, of in self._tensors().items()}
        return json_digest([self.made_of, self._seconds(), tensors])
