"""Stage one, second half: insert identity copies of layers into a checkpoint (paper, section 3.1; design trap 6, 8).

Works on safetensors files, not on a loaded model, and moves bytes. Each copy stands directly above its source; the last
factors that write to the residual stream are silent in it, so the expanded model computes exactly the function of its
source.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from adept_ds.base.errors import InputError
from adept_ds.base.files import new_directory, read_json, write_json
from adept_ds.base.progress import ProgressCallback
from adept_ds.models.directory import family_of, layer_count, read_model_config
from adept_ds.models.families import Family
from adept_ds.weights.base_files import BaseFiles
from adept_ds.weights.fingerprints import TensorRecord, fingerprint_of
from adept_ds.weights.hf_directory import INDEX_NAME, copy_companions, weight_files
from adept_ds.weights.tensor_files import Constant, Piece, StoredTensor, in_library_order, read_header, write_tensors


@dataclass(frozen=True)
class LayerCopy:
    source: int
    """Index of the copied layer in the source model."""
    index: int
    """Index of the copy in the expanded model."""


@dataclass(frozen=True)
class AppliedDelta:
    """A delta package that copies of a model came from (see `delta`)."""

    name: str
    fingerprint: str
    copies: tuple[int, ...]
    """Indices in the expanded model."""
    metrics: Mapping[str, Any]
    """As its manifest has them."""


@dataclass(frozen=True)
class Expansion:
    """What an expanded checkpoint says of itself (expansion.json)."""

    source_layers: int
    copies: tuple[LayerCopy, ...]
    zeroed: tuple[str, ...]
    """Tensors of copies that silence them: zero, or a norm's weight with which its gain is zero."""
    fingerprint: str
    """Of all tensors (see `fingerprints.fingerprint_of`)."""
    deltas: tuple[AppliedDelta, ...] = ()
    """In the order in which they were applied: of two copies of one layer, the first one's is the lower."""
    base_fingerprint: str | None = None
    """Of the base's tensors, under the names that they have there."""

    @classmethod
    def load(cls, directory: Path) -> Expansion:
        """Raises `InputError` when `directory` is not an expanded checkpoint."""
        path = directory / "expansion.json"
        if not path.is_file():
            raise InputError(f"'{directory}' has no expansion.json; make it with `adept expand`")
        record = read_json(path)
        copies = tuple(LayerCopy(**copy) for copy in record["copies"])
        deltas = tuple(AppliedDelta(**delta | {"copies": tuple(delta["copies"])}) for delta in record.get("deltas", ()))
        base = record.get("base_fingerprint")
        return cls(record["source_layers"], copies, tuple(record["zeroed"]), record["fingerprint"], deltas, base)

    @property
    def copy_indices(self) -> list[int]:
        return [copy.index for copy in self.copies]

    @property
    def source_indices(self) -> list[int]:
        return [copy.source for copy in self.copies]


def layer_origins(source_layers: int, copied: Sequence[int]) -> list[int]:
    """For each layer of the expanded model, the source layer it is or copies: (3, [1]) -> [0, 1, 1, 2]."""
    return [layer for layer in range(source_layers) for _ in range(1 + copied.count(layer))]


def plan_copies(selected: Sequence[int]) -> list[LayerCopy]:
    """Where the copy of each selected layer will stand: directly above its source, or above an earlier copy of it."""
    return [LayerCopy(source, source + position + 1) for position, source in enumerate(sorted(selected))]


@dataclass(frozen=True)
class Plan:
    """An expanded checkpoint before it is written: which tensor comes from where."""

    expansion: Expansion
    """Without fingerprints."""
    files: dict[str, dict[str, Piece]]
    """Name of each weight file -> its tensors."""
    config: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for pieces in self.files.values() for piece in pieces.values())

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(piece.shape) for pieces in self.files.values() for piece in pieces.values())


def plan_expansion(source: Path, selected: Sequence[int]) -> Plan:
    """Read the headers of `source`'s files, and say what its expansion consists of.

    Args:
        selected: source layers to copy.
    """
    family, config = family_of(source), read_model_config(source)
    if any(config.get(key) is None for key in family.derived_config):
        # Old files leave such lists to be derived from the number of layers.
        from transformers import AutoConfig

        complete = AutoConfig.from_pretrained(source)
        config |= {key: getattr(complete, key) for key in family.derived_config}
    source_layers = layer_count(source)
    copies = plan_copies(selected)
    sources = weight_files(source)
    files, zeroed = {}, []
    for number, file in enumerate(sources):
        pieces, zeros = _expand_shard(read_header(file), family, copies)
        files[_shard_name(number, len(sources))] = in_library_order(pieces)
        zeroed += zeros
    expanded_config = family.expand_config(config, layer_origins(source_layers, selected))
    return Plan(Expansion(source_layers, tuple(copies), tuple(zeroed), ""), files, expanded_config)


def describe_expansion(source: Path, destination: Path, selected: Sequence[int]) -> dict[str, Any]:
    """What `expand_checkpoint` would write: layers, parameters, bytes and files."""
    before, after = plan_expansion(source, []), plan_expansion(source, selected)
    files = {name: sum(piece.num_bytes for piece in pieces.values()) for name, pieces in after.files.items()}
    return {
        "destination": str(destination),
        "source_layers": after.expansion.source_layers,
        "copies": [asdict(copy) for copy in after.expansion.copies],
        "zeroed_tensors": len(after.expansion.zeroed),
        "source_parameters": before.num_parameters,
        "added_parameters": after.num_parameters - before.num_parameters,
        "source_bytes": before.num_bytes,
        "added_bytes": after.num_bytes - before.num_bytes,
        "files": files,
    }


def expand_checkpoint(
    source: Path, destination: Path, selected: Sequence[int], progress: ProgressCallback | None = None
) -> Expansion:
    """Write the expanded checkpoint of `source` to `destination` (replaced if it exists), and describe it.

    Bytes go from file to file: whatever the size of the model, next to no memory is needed. Only a finished directory
    has a config.json.

    Args:
        selected: source layers to copy.
        progress: called with the finished share of the work and the name of the shard.
    """
    plan = plan_expansion(source, selected)
    return write_plan(plan, source, destination, progress)


def write_plan(plan: Plan, source: Path, destination: Path, progress: ProgressCallback | None = None) -> Expansion:
    """Write what `plan` says to `destination` (see `expand_checkpoint`)."""
    total, done = plan.num_bytes, 0
    digests: dict[str, str] = {}
    with new_directory(destination) as folder:
        for name, pieces in plan.files.items():

            def advance(num_bytes: int, name: str = name) -> None:
                nonlocal done
                done += num_bytes
                if progress:
                    progress(min(1.0, done / total), name)

            digests |= write_tensors(folder / name, pieces, advance)
        if len(plan.files) > 1:
            weight_map = {tensor: name for name, pieces in plan.files.items() for tensor in pieces}
            write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
        copy_companions(source, folder)
        BaseFiles.of(source, weight_files(source)).save(folder)
        expansion = _with_fingerprints(plan, family_of(source), digests)
        write_json(folder / "expansion.json", asdict(expansion))
        text = json.dumps(plan.config, indent=2, default=str) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
    if progress:
        progress(1.0, "")
    return expansion


def _with_fingerprints(plan: Plan, family: Family, digests: Mapping[str, str]) -> Expansion:
    """Hashes of what was just written, together; training never touches those of the base."""
    records = {
        name: TensorRecord(sha256=digests[name], dtype=piece.dtype, shape=piece.shape)
        for pieces in plan.files.values()
        for name, piece in pieces.items()
    }
    in_base = {name: base_name(family, name, plan.expansion.copy_indices) for name in records}
    base = {there: records[name] for name, there in in_base.items() if there is not None}
    return replace(plan.expansion, fingerprint=fingerprint_of(records), base_fingerprint=fingerprint_of(base))


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
) -> tuple[dict[str, Piece], list[str]]:
    """The tensors of one shard under their new names, with the copies that belong to it; and which are silenced."""
    pieces: dict[str, Piece] = {}
    zeroed = []
    for name, tensor in stored.items():
        place = family.split_name(name)
        if place is None:
            pieces[name] = tensor
            continue
        layer, inner = place
        shift = sum(copy.source < layer for copy in copies)
        pieces[family.in_layer(name, layer + shift)] = tensor
        for copy in copies:
            if copy.source != layer:
                continue
            copied = family.in_layer(name, copy.index)
            pieces[copied] = tensor
            if family.writes_residual(inner):
                pieces[copied] = Constant(tensor, family.silent)
                zeroed.append(copied)
    return pieces, zeroed


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
