"""Elements of parameters that ranks wrote each into a file of its own, read by any number of ranks.

However a parameter was cut, its parts follow each other in the order of the ranks. So elements start:stop of a
flattened parameter are found without knowing which ranks wrote them. Files are mapped: only what is asked for is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


def files_by_rank(directory: Path, pattern: str) -> list[Path]:
    """Those of ranks 0, 1, ... in this order.

    Args:
        pattern: a regular expression for their whole names, with a group for the rank.

    Raises:
        ValueError: there is none of a rank.
    """
    matches = {path: re.fullmatch(pattern, path.name) for path in directory.iterdir()}
    files = {int(match[1]): path for path, match in matches.items() if match}
    if not files or sorted(files) != list(range(len(files))):
        raise ValueError(f"of the files {pattern} there are those of ranks {sorted(files)}")
    return [files[rank] for rank in range(len(files))]


def elements_of(parts: Iterable[Any], start: int, stop: int) -> torch.Tensor:
    """[stop - start]: elements start:stop of what `parts`, which are vectors, are one behind the other.

    Raises:
        ValueError: they have fewer elements.
    """
    found, begin = [], 0
    for part in parts:
        size = part.get_shape()[0] if hasattr(part, "get_shape") else part.numel()
        first, last = max(start - begin, 0), min(stop - begin, size)
        if first < last:
            found.append(part[first:last])
        begin += size
    if begin < stop:
        raise ValueError(f"of {stop} elements there are {begin}")
    return torch.cat(found)


def elements_file(what: str, rank: int) -> str:
    """Name of the safetensors file that holds, of each parameter by full name, the elements that a rank has of it, as
    they follow each other in the flattened parameter."""
    return f"{what}_rank_{rank}.safetensors"


def elements_files(directory: Path, what: str) -> list[Path]:
    """Those of ranks 0, 1, ... in this order. Raises `ValueError` if there is none of a rank."""
    return files_by_rank(directory, rf"{what}_rank_(\d+)\.safetensors")


class SavedElements:
    """What the ranks of a run wrote into files of elements, read by the ranks of another."""

    def __init__(self, directory: Path, what: str) -> None:
        self._files = [safe_open(file, framework="pt") for file in elements_files(directory, what)]

    def of(self, parameter: str, start: int, stop: int) -> torch.Tensor:
        """[stop - start]: elements start:stop of the flattened parameter."""
        holders = (file for file in self._files if parameter in file.keys())  # noqa: SIM118 - no mapping
        return elements_of((file.get_slice(parameter) for file in holders), start, stop)
