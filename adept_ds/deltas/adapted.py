"""A model with copies of layers, told apart: what is its base's and what is a copy's, by names and headers alone."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adept_ds.base.errors import InputError
from adept_ds.base.run_dir import EXPANSION_NAME
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.families import Family
from adept_ds.models.weight_files import weight_files
from adept_ds.weights.base_files import BaseFiles
from adept_ds.weights.expansion import Expansion, base_name, plan_copies
from adept_ds.weights.hf_directory import stored_tensors
from adept_ds.weights.tensor_files import StoredTensor

Kind = tuple[str, tuple[int, ...]]
"""Dtype and shape."""


@dataclass(frozen=True)
class AdaptedModel:
    """Tensors under the names that they (or their sources) have in the base."""

    directory: Path
    expansion: Expansion
    files: BaseFiles
    base: Mapping[str, StoredTensor]
    copies: Mapping[int, Mapping[str, StoredTensor]]
    """By the index of the copy."""

    @classmethod
    def load(cls, directory: Path, base_dir: Path | None = None) -> AdaptedModel:
        """Read headers and records.

        Args:
            base_dir: its base, if that shall be asked instead of the model's own record of it.

        Raises:
            InputError: it is no adapted model, or a tensor is not of its dtype and shape in the base.
        """
        model = ModelDirectory.read(directory)
        family, expansion = model.family, _read_expansion(model)
        files = BaseFiles.of(base_dir, weight_files(base_dir)) if base_dir else BaseFiles.read(directory)
        sources = {copy.index: copy.source for copy in expansion.copies}
        base: dict[str, StoredTensor] = {}
        copies: dict[int, dict[str, StoredTensor]] = {index: {} for index in sources}
        for name, tensor in stored_tensors(directory).items():
            in_base, place = base_name(family, name, expansion.copy_indices), family.split_name(name)
            if in_base is not None:
                base[in_base] = tensor
            elif place is not None:
                copies[place[0]][family.in_layer(name, sources[place[0]])] = tensor
        kinds = {name: kind for tensors in files.tensors().values() for name, kind in tensors.items()}
        _check_kinds(directory, base, kinds)
        for index, source in sources.items():
            _check_kinds(directory, copies[index], {name: kinds[name] for name in names_in(family, kinds, [source])})
        return cls(directory, expansion, files, base, copies)

    @property
    def base_config(self) -> dict[str, Any]:
        """The base's config.json."""
        return self.files.config()


def names_in(family: Family, names: Mapping[str, Any], layers: Container[int]) -> list[str]:
    """Those of `names` that lie in one of `layers`."""
    return [name for name in names if (place := family.split_name(name)) is not None and place[0] in layers]


def _check_kinds(where: Path, found: Mapping[str, StoredTensor], wanted: Mapping[str, Kind]) -> None:
    """Raises `InputError`, naming it, when a tensor is missing, too many, or of another dtype or shape."""
    odd = sorted(found.keys() ^ wanted.keys())
    if odd:
        what = "lacks" if odd[0] in wanted else "has"
        raise InputError(f"'{where}' {what} {odd[0]!r}, unlike its base; give a complete model, and its own base")
    for name, tensor in found.items():
        dtype, shape = wanted[name]
        if tensor.shape != shape:
            raise InputError(f"'{where}' has {name!r} of shape {tensor.shape}, its base {shape}; give its own base")
        if tensor.dtype != dtype:
            raise InputError(
                f"'{where}' holds {name!r} as {tensor.dtype}, its base as {dtype}; export it again with "
                "export.dtype=source, which keeps every bit"
            )


def _read_expansion(model: ModelDirectory) -> Expansion:
    """The record of a model that may come from anywhere."""
    expansion = Expansion.read(model.path)
    in_order = list(expansion.copies) == plan_copies(expansion.source_indices)
    complete = expansion.source_layers + len(expansion.copies) == model.num_layers
    of_packages = sorted(index for package in expansion.packages for index in package.copies)
    claimed = not expansion.packages or of_packages == expansion.copy_indices
    if not in_order or not complete or not claimed:
        raise InputError(f"'{model.path / EXPANSION_NAME}' is not about the layers of this model; copy the model again")
    return expansion
