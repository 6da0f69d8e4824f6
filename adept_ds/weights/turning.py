"""An adapted model turned down, from files to files: a Hugging Face directory at any position of the dial.

    weights = origin + alpha (trained - origin)

For copies of layers these are the last factors that write to the residual stream, whose origin is the value with which
they write nothing; without copies, all weights, whose origin is the base (WiSE-FT, Wortsman et al. 2022,
arXiv:2109.01903). At 0 the model is the base's function bit for bit, at 1 what was trained. See docs/dial.md.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from adept_ds.base.errors import InputError
from adept_ds.base.outputs import check_output, new_output
from adept_ds.base.progress import Meter, ProgressCallback
from adept_ds.base.run_dir import EXPANSION_NAME
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.families import Family
from adept_ds.models.weight_files import INDEX_NAME, weight_entries
from adept_ds.weights.expansion import Expansion
from adept_ds.weights.hf_directory import copy_companions, stored_tensors
from adept_ds.weights.tensor_files import StoredTensor, TensorContent, located, turned_tensor, write_tensors


def write_turned(
    adapted: Path,
    destination: Path,
    alphas: Sequence[float],
    base: Path | None = None,
    progress: ProgressCallback | None = None,
    *,
    overwrite: bool = False,
) -> tuple[float, ...]:
    """Write `adapted` at a position of the dial to `destination`.

    Args:
        alphas: from 0 to 1: one for all, or where copies are turned one for each, lowest first.
        base: the model that was trained in place, which all weights are turned towards; None: copies are turned, and
            the rest stays. A model with copies may have been trained in place too.
        overwrite: an earlier export in its place may be replaced (see `outputs.check_output`).

    Returns:
        The positions, one for each copy; or the one of a model without copies.

    Raises:
        InputError: there are not so many copies; `base` is missing or another model's; or `destination` is no place
            for a new directory.
    """
    inputs = {"ADAPTED": adapted} | ({"--base": base} if base else {})
    check_output(destination, "export", inputs, overwrite=overwrite)
    model = ModelDirectory.read(adapted)
    files = {file: located(file, entries) for file, entries in weight_entries(adapted).items()}
    expansion = Expansion.read(adapted) if (adapted / EXPANSION_NAME).is_file() else None
    if expansion is not None and base is None:
        alphas = positions_of_copies(alphas, len(expansion.copies))
        of_copy = dict(zip(expansion.copy_indices, alphas, strict=True))
        turned = {file: turned_copies(tensors, model.family, of_copy) for file, tensors in files.items()}
        record: Expansion | None = expansion.turned(alphas)
    else:
        check_count(alphas, None)
        record, origin = expansion, stored_tensors(_needed(base, adapted))
        turned = {file: _interpolated(file, tensors, origin, float(alphas[0])) for file, tensors in files.items()}
    meter = Meter(sum(tensor.num_bytes for of in turned.values() for tensor in of.values()), progress)
    with new_output(destination, "export", overwrite=overwrite) as folder:
        for file, contents in turned.items():
            write_tensors(folder / file.name, contents, meter.advance)
        if (adapted / INDEX_NAME).is_file():
            shutil.copy2(adapted / INDEX_NAME, folder / INDEX_NAME)
        copy_companions(adapted, folder)
        if record is not None:
            record.save(folder / EXPANSION_NAME)
        shutil.copy2(adapted / "config.json", folder / "config.json")
    return tuple(alphas)


def turned_copies(
    tensors: Mapping[str, StoredTensor], family: Family, alpha_of_copy: Mapping[int, float]
) -> dict[str, TensorContent]:
    """Tensors of a model, with what its copies write turned to these positions, by the index of the copy."""

    def turned(name: str, tensor: StoredTensor) -> TensorContent:
        place = family.split_name(name)
        if place is None or place[0] not in alpha_of_copy or not family.writes_residual(place[1]):
            return tensor
        return turned_tensor(tensor, family.silent, alpha_of_copy[place[0]])

    return {name: turned(name, tensor) for name, tensor in tensors.items()}


def positions_of_copies(alphas: Sequence[float], copies: int) -> tuple[float, ...]:
    """One for each copy. Raises `InputError` as `check_count`."""
    check_count(alphas, copies)
    return tuple(map(float, alphas)) if len(alphas) == copies else (float(alphas[0]),) * copies


def check_count(alphas: Sequence[float], copies: int | None) -> None:
    """Raises `InputError`: they are neither one nor as many as there are copies; None: the model has none."""
    if len(alphas) == 1 or len(alphas) == copies:
        return
    if copies is None:
        raise InputError(f"--alpha: {len(alphas)} positions for a model without copies; give one")
    raise InputError(
        f"--alpha: {len(alphas)} positions for {copies} copies; give one for all, or one for each, lowest first"
    )


def _interpolated(
    file: Path, tensors: Mapping[str, StoredTensor], origin: Mapping[str, StoredTensor], alpha: float
) -> dict[str, TensorContent]:
    for name in tensors:
        if name not in origin:
            raise InputError(
                f"--base: '{file}' holds '{name}', which the base lacks; give the model that was adapted, or none "
                "where copies of layers were trained"
            )
    return {name: turned_tensor(tensor, origin[name], alpha) for name, tensor in tensors.items()}


def _needed(base: Path | None, adapted: Path) -> Path:
    if base is None:
        raise InputError(
            f"--base is missing; '{adapted}' has no copies of layers, so that it is turned down towards the model that "
            "was adapted: give that"
        )
    return base
