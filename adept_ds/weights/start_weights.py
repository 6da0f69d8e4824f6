"""The weights that training started from, read again from the files of the model that it started from.

Whoever compares trained weights with them needs no copy of its own: not in memory, and not in checkpoints.
"""

from __future__ import annotations

import math

import torch
from safetensors import safe_open

from adept_ds.models.directory import ModelDirectory
from adept_ds.weights.hf_directory import stored_tensors
from adept_ds.weights.tensor_files import StoredTensor


class StartWeights:
    """Runs of elements of a model's parameters, as they are in its files.

    Args:
        precision: in which training loaded the model: it starts from weights rounded to it.
    """

    def __init__(self, model: ModelDirectory, precision: torch.dtype) -> None:
        self._family, self._stored, self._precision = model.family, stored_tensors(model.path), precision

    def elements(self, parameter: str, start: int, stop: int) -> torch.Tensor:
        """[stop - start] fp32: elements start:stop of the flattened parameter.

        Of each stored tensor that holds some, only the rows with them are read.

        Raises:
            KeyError: the files do not hold the parameter.
        """
        begin, found = 0, []
        for expert in self._family.stored_parts(parameter, self._stored):
            for name in expert:
                stored = self._stored[name]
                first, last = max(start - begin, 0), min(stop - begin, math.prod(stored.shape))
                if first < last:
                    found.append(_elements(name, stored, first, last))
                begin += math.prod(stored.shape)
        return torch.cat(found).to(self._precision).float()


def _elements(name: str, stored: StoredTensor, start: int, stop: int) -> torch.Tensor:
    """Elements start:stop of the flattened tensor."""
    row = math.prod(stored.shape[1:])
    first, last = start // row, -(-stop // row)
    with safe_open(stored.file, framework="pt") as file:
        rows = file.get_slice(name)[first:last]
    flat: torch.Tensor = rows.flatten()[start - first * row : stop - first * row]
    return flat
