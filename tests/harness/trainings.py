"""Small trainings on real ranks (see lab_worker.py), and how two of them are compared."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from harness.launching import launch
from harness.workspace import Workspace
from safetensors.torch import load_file


def trained(workspace: Workspace, folder: Path, part: str, world_size: int = 2) -> dict[str, Any]:
    """What a part of `harness.lab_worker` found."""
    folder.mkdir(exist_ok=True)
    output = folder / "outcomes.pt"
    result = launch(world_size, ["-m", "harness.lab_worker", str(workspace.root), str(output), part])
    assert result.returncode == 0, result.stderr
    return dict(torch.load(output))


class Trainings(dict[str, Any]):
    """What a part found, and the rest of it, which is trained when something of it is asked for."""

    def __init__(self, workspace: Workspace, folder: Path, part: str, world_size: int = 2) -> None:
        super().__init__()
        self._parts = iter((part, f"{part}_rest"))
        self._train = lambda part: trained(workspace, folder / part, part, world_size)

    def __missing__(self, name: str) -> Any:
        part = next(self._parts, None)
        if part is None:
            raise KeyError(name)
        self.update(self._train(part))
        return self[name]


def assert_bit_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["losses"] == second["losses"]
    assert first["trained"].keys() == second["trained"].keys()
    for name, tensor in first["trained"].items():
        assert torch.equal(tensor, second["trained"][name]), name


def frozen_hashes(outcomes: dict[str, Any]) -> set[str]:
    """Of all trainings in fp32."""
    return {
        outcome["frozen_hash"]
        for name, outcome in outcomes.items()
        if isinstance(outcome, dict) and "frozen_hash" in outcome and not name.startswith("bf16")
    }


def hash_before_training(outcomes: dict[str, Any]) -> str:
    """Of the frozen weights of the expanded checkpoint, in which layers 2 and 5 are copies."""
    from transformers import AutoModelForCausalLM

    folder, digest = Path(outcomes["expanded"]), hashlib.sha256()
    before = load_file(folder / "model.safetensors")
    for name, _ in AutoModelForCausalLM.from_pretrained(folder).named_parameters():
        if not name.startswith(("model.layers.2.", "model.layers.5.")):
            digest.update(before[name].numpy().tobytes())
    return digest.hexdigest()
