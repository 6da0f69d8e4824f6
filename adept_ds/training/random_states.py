"""Random numbers go on after a checkpoint: each rank keeps the states of its generators in a file of its own."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from safetensors.torch import load_file

from adept_ds.models.device import device_rng_state, set_device_rng_state
from adept_ds.training.checkpoint_files import CheckpointFiles
from adept_ds.weights.by_rank import elements_file, elements_files

_WHAT = "random_state"
_VERSION = 3
"""Of the states of Python's generator, since Python 3.2."""


def save_random_state(files: CheckpointFiles, rank: int) -> None:
    version, python, gauss = random.getstate()
    assert version == _VERSION
    device = device_rng_state()
    tensors = {
        "python": torch.tensor(python, dtype=torch.int64),
        "gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "torch": torch.get_rng_state(),
        "device": torch.zeros(0, dtype=torch.uint8) if device is None else device,
    }
    files.add_tensors(elements_file(_WHAT, rank), tensors)


def load_random_state(checkpoint: Path, rank: int) -> None:
    """Of a checkpoint that other ranks may have written. A rank that was not there begins with a state of its own,
    drawn from that of one that was."""
    files = elements_files(checkpoint, _WHAT)
    state = load_file(files[rank % len(files)])
    gauss, device = state["gauss"].tolist(), state["device"]
    random.setstate((_VERSION, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    torch.set_rng_state(state["torch"])
    set_device_rng_state(device if device.numel() else None)
    if rank >= len(files):
        torch.manual_seed(int(torch.randint(1 << 62, ())) + rank)
