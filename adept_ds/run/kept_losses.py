"""Losses of held-out documents at positions of the dial, kept on the disk (dial_losses.safetensors)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from adept_ds.base.dial_record import Alphas, label_of
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
        """Those in a file; none if it is not there, of something else, or damaged: they are only found again."""
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
        except (OSError, SafetensorError, ValueError, KeyError):
            return cls(made_of)
        return cls(made_of, {label: Measured(losses[label], seconds[label]) for label in seconds})  # type: ignore[arg-type]

    def of(self, alphas: Alphas) -> Measured | None:
        return self.positions.get(label_of(alphas))

    def add(self, alphas: Alphas, measured: Measured) -> None:
        self.positions[label_of(alphas)] = measured

    def save(self, path: Path) -> None:
        """Whole, or as it was."""
        tensors = {f"{label}/{name}": of for label, at in self.positions.items() for name, of in at.losses.items()}
        seconds = {label: at.seconds for label, at in self.positions.items()}
        write_bytes(path, save(tensors, metadata={"made_of": self.made_of, "seconds": json.dumps(seconds)}))
