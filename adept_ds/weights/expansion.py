"""Insert identity copies of layers into a checkpoint (paper, section 3.1).

Works on safetensors files, not on a loaded model, and moves bytes. Each copy stands directly above its source; the last
factors that write to the residual stream are silent in it, so the expanded model computes exactly the function of its
source.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt

from adept_ds.base.errors import InputError
from adept_ds.base.files import write_json
from adept_ds.base.outputs import Command, check_output, new_output
from adept_ds.base.progress import ProgressCallback
from adept_ds.base.records import Record
from adept_ds.base.run_dir import EXPANSION_NAME
from adept_ds.models.completeness import complete_weights
from adept_ds.models.directory import ModelDirectory, understood_by_transformers
from adept_ds.models.families import Family
from adept_ds.models.weight_files import INDEX_NAME, weight_files
from adept_ds.weights.base_files import BASE_FILES_NAME, BaseFiles
from adept_ds.weights.fingerprints import TensorRecord, fingerprint_of
from adept_ds.weights.hf_directory import copy_companions
from adept_ds.weights.tensor_files import (
    ConstantTensor,
    StoredTensor,
    TensorContent,
    in_library_order,
    located,
    write_tensors,
)


class LayerCopy(Record):
    """A copy, and the layer that it was made of."""

    source: NonNegativeInt
    """Index of the copied layer in the source model."""
    index: PositiveInt
    """Index of the copy in the expanded model."""


class AppliedPackage(Record):
    """A delta package that copies of a model came from (see `deltas`)."""

    name: str
    fingerprint: str
    copies: tuple[int, ...]
    """Indices in the expanded model."""
    metrics: dict[str, Any]
    """As its manifest has them."""


class Expansion(Record):
    """What an expanded checkpoint says of itself (expansion.json)."""

    source_layers: int
    copies: tuple[LayerCopy, ...]
    silenced: tuple[str, ...] = Field(alias="zeroed")
    """Tensors of copies that silence them: zero, or a norm's weight with which its gain is zero."""
    fingerprint: str
    """Of all tensors (see `fingerprints.fingerprint_of`)."""
    packages: tuple[AppliedPackage, ...] = Field(default=(), alias="deltas")
    """In the order in which they were applied: of two copies of one layer, the first one's is the lower."""
    base_fingerprint: str | None = None
    """Of the base's tensors, under the names that they have there."""
    alphas: tuple[float, ...] | None = None
    """How far each copy is turned up; None: as it was trained."""

    def to_json(self) -> dict[str, Any]:
        """Without positions where nothing was turned."""
        tree = super().to_json()
        return tree if self.alphas is not None else {key: of for key, of in tree.items() if key != "alphas"}

    def turned(self, alphas: Sequence[float]) -> Expansion:
        """With each copy turned to a position, 0 to 1, from where it stands."""
        before = self.alphas or (1.0,) * len(self.copies)
        after = tuple(old * new for old, new in zip(before, alphas, strict=True))
        return self.model_copy(update={"alphas": None if all(alpha == 1 for alpha in after) else after})

    @classmethod
    def read(cls, directory: Path) -> Expansion:
        """Raises `InputError` when `directory` is not an expanded checkpoint."""
        path = directory / EXPANSION_NAME
        if not path.is_file():
            raise InputError(f"'{directory}' has no {EXPANSION_NAME}; make it with `adept expand`")
        return cls.load(path)

    @classmethod
    def remedy(cls) -> str:
        return "copy the model again, or expand its base again"

    @property
    def copy_indices(self) -> list[int]:
        return [copy.index for copy in self.copies]

    @property
    def source_indices(self) -> list[int]:
        return [copy.source for copy in self.copies]


def is_turned(directory: Path) -> bool:
    """Whether a model with copies is there, and not as it was trained."""
    return (directory / EXPANSION_NAME).is_file() and Expansion.read(directory).alphas is not None


def layer_origins(source_layers: int, copied: Sequence[int]) -> list[int]:
    """For each layer of the expanded model, the source layer it is or copies: (3, [1]) -> [0, 1, 1, 2]."""
    return [layer for layer in range(source_layers) for _ in range(1 + copied.count(layer))]


def plan_copies(selected: Sequence[int]) -> list[LayerCopy]:
    """Where the copy of each selected layer will stand: directly above its source, or above an earlier copy of it."""
    return [LayerCopy(source=source, index=source + position + 1) for position, source in enumerate(sorted(selected))]


@dataclass(frozen=True)
class Plan:
    """An expanded checkpoint before it is written: which tensor comes from where."""

    expansion: Expansion
    """Without fingerprints."""
    files: dict[str, dict[str, TensorContent]]
    """Name of each weight file -> its tensors."""
    config: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        return sum(content.num_bytes for contents in self.files.values() for content in contents.values())

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(content.shape) for contents in self.files.values() for content in contents.values())


def plan_expansion(source: Path, selected: Sequence[int]) -> Plan:
    """Read the headers of `source`'s files, and say what its expansion consists of.

    Args:
        selected: source layers to copy.

    Raises:
        InputError: `source` is no complete model (see `complete_weights`).
    """
    model = ModelDirectory.read(source)
    sources = complete_weights(model)
    family, config = model.family, dict(model.config)
    if any(config.get(key) is None for key in family.derived_config):
        # Old files leave such lists to be derived from the number of layers.
        from transformers import AutoConfig

        with understood_by_transformers(source):
            complete = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        config |= {key: getattr(complete, key) for key in family.derived_config}
    copies = plan_copies(selected)
    files, silenced = {}, list[str]()
    for number, (file, entries) in enumerate(sources.items()):
        contents, silent = _expand_shard(located(file, entries), family, copies)
        files[_shard_name(number, len(sources))] = in_library_order(contents)
        silenced += silent
    expansion = Expansion(
        source_layers=model.num_layers, copies=tuple(copies), silenced=tuple(silenced), fingerprint=""
    )
    return Plan(expansion, files, family.expand_config(config, layer_origins(model.num_layers, selected)))


def describe_expansion(
    source: Path, destination: Path, selected: Sequence[int], *, overwrite: bool = False
) -> dict[str, Any]:
    """What `expand_checkpoint` would write: layers, parameters, bytes and files; and which files it would replace."""
    replaced = check_output(destination, "expand", {"MODEL": source}, overwrite=overwrite)
    before, after = plan_expansion(source, []), plan_expansion(source, selected)
    files = {name: sum(content.num_bytes for content in contents.values()) for name, contents in after.files.items()}
    return {
        "destination": str(destination),
        "replaces": replaced,
        "source_layers": after.expansion.source_layers,
        "copies": [copy.to_json() for copy in after.expansion.copies],
        "zeroed_tensors": len(after.expansion.silenced),
        "source_parameters": before.num_parameters,
        "added_parameters": after.num_parameters - before.num_parameters,
        "source_bytes": before.num_bytes,
        "added_bytes": after.num_bytes - before.num_bytes,
        "files": files,
    }


def expand_checkpoint(
    source: Path,
    destination: Path,
    selected: Sequence[int],
    progress: ProgressCallback | None = None,
    *,
    overwrite: bool = False,
) -> Expansion:
    """Write the expanded checkpoint of `source` to `destination`, and describe it.

    Bytes go from file to file: whatever the size of the model, next to no memory is needed. Only a finished directory
    has a config.json.

    Args:
        selected: source layers to copy.
        progress: called with the finished share of the work and the name of the shard.
        overwrite: an earlier expansion in its place may be replaced (see `outputs.check_output`).

    Raises:
        InputError: `source` is no complete model, or `destination` no place for a new directory.
    """
    check_output(destination, "expand", {"MODEL": source}, overwrite=overwrite)
    plan = plan_expansion(source, selected)
    return write_plan(plan, source, destination, "expand", progress, overwrite=overwrite)


def write_plan(
    plan: Plan,
    source: Path,
    destination: Path,
    command: Command,
    progress: ProgressCallback | None = None,
    *,
    overwrite: bool = False,
) -> Expansion:
    """Write what `plan` says to `destination`, as an output of `command` (see `expand_checkpoint`)."""
    total, done = plan.num_bytes, 0
    digests: dict[str, str] = {}
    with new_output(destination, command, overwrite=overwrite) as folder:
        for name, contents in plan.files.items():

            def advance(num_bytes: int, name: str = name) -> None:
                nonlocal done
                done += num_bytes
                if progress:
                    progress(min(1.0, done / total), name)

            digests |= write_tensors(folder / name, contents, advance)
        if len(plan.files) > 1:
            weight_map = {tensor: name for name, contents in plan.files.items() for tensor in contents}
            write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
        copy_companions(source, folder)
        BaseFiles.of(source, weight_files(source)).save(folder / BASE_FILES_NAME)
        expansion = _with_fingerprints(plan, ModelDirectory.read(source).family, digests)
        expansion.save(folder / EXPANSION_NAME)
        text = json.dumps(plan.config, indent=2, default=str) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
    if progress:
        progress(1.0, "")
    return expansion


def _with_fingerprints(plan: Plan, family: Family, digests: Mapping[str, str]) -> Expansion:
    """Hashes of what was just written, together; training never touches those of the base."""
    records = {
        name: TensorRecord(sha256=digests[name], dtype=content.dtype, shape=content.shape)
        for contents in plan.files.values()
        for name, content in contents.items()
    }
    in_base = {name: base_name(family, name, plan.expansion.copy_indices) for name in records}
    base = {there: records[name] for name, there in in_base.items() if there is not None}
    fingerprints = {"fingerprint": fingerprint_of(records), "base_fingerprint": fingerprint_of(base)}
    return plan.expansion.model_copy(update=fingerprints)


def base_name(family: Family, name: str, copy_indices: Sequence[int]) -> str | None:
    """What a tensor of an expanded checkpoint is called in its base; None for one of a copy."""
    place = family.split_name(name)
    if place is None:
        return name
    if place[0] in copy_indices:
        return None
    return family.in_layer(name, place[0] - sum(index < place[0] for index in copy_indices))


def _expand_shard(
    stored: Mapping[str, StoredTensor], family: Family, copies: Sequence[LayerCopy]
) -> tuple[dict[str, TensorContent], list[str]]:
    """The tensors of one shard under their new names, with the copies that belong to it; and which are silenced."""
    contents: dict[str, TensorContent] = {}
    silenced = []
    for name, tensor in stored.items():
        place = family.split_name(name)
        if place is None:
            contents[name] = tensor
            continue
        layer, inner = place
        shift = sum(copy.source < layer for copy in copies)
        contents[family.in_layer(name, layer + shift)] = tensor
        for copy in copies:
            if copy.source != layer:
                continue
            copied = family.in_layer(name, copy.index)
            contents[copied] = tensor
            if family.writes_residual(inner):
                contents[copied] = ConstantTensor(tensor, family.silent)
                silenced.append(copied)
    return contents, silenced


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
