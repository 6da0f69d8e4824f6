"""What a run has left behind, read back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from adept_ds.base.files import read_json_lines


@dataclass(frozen=True)
class Finished:
    """The directory of a finished run, and what is read from it."""

    directory: Path

    def steps(self) -> list[dict[str, Any]]:
        return [record for record in read_json_lines(self.directory / "metrics.jsonl") if "loss" in record]

    def losses(self) -> list[float]:
        return [record["loss"] for record in self.steps()]

    def evaluations(self) -> list[dict[str, Any]]:
        return [record["eval"] for record in read_json_lines(self.directory / "metrics.jsonl") if "eval" in record]

    def units(self, key: str) -> list[dict[str, float]]:
        records = read_json_lines(self.directory / "unit_importance.jsonl")
        return [{unit["unit"]: unit[key] for unit in record["units"]} for record in records]

    def movement(self) -> list[dict[str, Any]]:
        return read_json_lines(self.directory / "unit_movement.jsonl")

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.directory / "export" / "model.safetensors")
