"""One tensor out of a weight file, as torch has it."""

from __future__ import annotations

import torch
from safetensors import SafetensorError, safe_open

from adept_ds.base.errors import InputError
from adept_ds.weights.tensor_files import StoredTensor


def read_tensor(name: str, stored: StoredTensor) -> torch.Tensor:
    """Raises `InputError`: the file is damaged."""
    try:
        with safe_open(stored.file, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
    except SafetensorError as error:
        raise InputError(f"model: '{stored.file}' is damaged ({error}); complete the download") from None
    return tensor
