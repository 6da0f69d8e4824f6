"""What lies in a directory that a run, DeepSpeed or transformers wrote: what it holds, who wrote it, whether it is so.

Reads records, headers and, where hashes are known, every byte of the files that they are of. Nothing is changed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from adept_ds.base.errors import InputError
from adept_ds.base.outputs import MARK_NAME, OutputMark, check_as_written
from adept_ds.base.progress import Meter, ProgressCallback
from adept_ds.base.records import Record
from adept_ds.base.run_dir import EXPANSION_NAME, RunDirectory, checkpoint_steps, checkpoint_tag
from adept_ds.deltas.package import MANIFEST_NAME, Package
from adept_ds.models.completeness import complete_weights
from adept_ds.models.directory import ModelDirectory, check_model_dir
from adept_ds.run.conversion import check_as_saved, config_of, is_run
from adept_ds.training.checkpoint import CheckpointManifest, WrittenFile
from adept_ds.weights.deepspeed_files import mapped, reading_checkpoint, tag_of
from adept_ds.weights.expansion import Expansion
from adept_ds.weights.fingerprints import fingerprint_of, hash_tensors
from adept_ds.weights.hf_directory import stored_tensors
from adept_ds.weights.saved_state import WEIGHT
from adept_ds.weights.saved_weights import read_saved_weights
from adept_ds.weights.universal import universal_tag_of

Kind = Literal["checkpoint", "universal checkpoint", "model", "delta package", "damaged"]


class Held(Record):
    """Tensors, counted."""

    tensors: int
    elements: int

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> Held:
        return cls(tensors=len(shapes), elements=sum(map(math.prod, shapes.values())))


class Training(Record):
    """Who trained what is in a checkpoint; None is what nothing says."""

    method: dict[str, Any] | None = None
    """Its name, and its keys in the configuration."""
    step: int | None = None
    zero_stage: int
    ranks: int
    precision: str | None = None
    optimizer_state: tuple[str, ...] = ()
    """Vectors by element, beside the weights."""
    learning_rates: tuple[float, ...] = ()
    """Of the parameter groups, when it was saved."""
    start: str | None = None
    """Fingerprint of the model that training started from."""
    by_rank: dict[int, int] = {}  # noqa: RUF012 - a record does not change
    """Bytes that each rank wrote, where the manifest says that."""


class Found(Record):
    """A thing that was looked at."""

    path: Path
    kind: Kind
    written_by: str | None = None
    trained: Held | None = None
    by_layer: dict[str, Held] = {}  # noqa: RUF012
    """What trained: by decoder layer, with its source where it is a copy; and what is outside of layers."""
    frozen: Held | None = None
    """What a checkpoint, and what a model, holds beside that."""
    training: Training | None = None
    model_type: str | None = None
    dtypes: tuple[str, ...] = ()
    fingerprint: str | None = None
    """Of a model's tensors, or of a package."""
    base_fingerprint: str | None = None
    """Of the base that copies stand on."""
    copies: dict[int, int] = {}  # noqa: RUF012
    """Index of each copy -> layer of the base that it was made of."""
    alphas: tuple[float, ...] = ()
    """How far copies are turned up, where they are not as they were trained."""
    num_bytes: int
    proof: str | None = None
    """By what every byte was found to be as it was written; None: nothing says how that was."""
    damage: str | None = None
    """Why it is not what it should be."""


def inspect(path: Path, progress: ProgressCallback | None = None) -> list[Found]:
    """What `path` is; or, of a run, its models and checkpoints, damaged ones among them.

    Raises:
        InputError: `path` is nothing that is understood; or it is damaged, and no run.
    """
    if not path.is_dir():
        raise InputError(f"'{path}' does not exist; give the directory of a run, a checkpoint or a model")
    return [*_of_run(path, progress)] if is_run(path) else [_described(path, {}, Meter(_bytes_in(path), progress))]


def _of_run(root: Path, progress: ProgressCallback | None) -> Iterator[Found]:
    run = RunDirectory(root)
    config_of(root)  # says what is wrong with it
    places = [place for place in (run.expanded, run.trained, run.export) if (place / "config.json").is_file()]
    places += [run.checkpoints / checkpoint_tag(step) for step in checkpoint_steps(run.checkpoints)]
    if not places:
        raise InputError(f"'{root}' holds neither a model nor a checkpoint yet; run `adept run {run.config}` first")
    meter = Meter(sum(map(_bytes_in, places)), progress)
    for place in places:
        try:
            yield _described(place, _copies_of(run.expanded), meter)
        except InputError as error:
            yield Found(path=place, kind="damaged", num_bytes=_bytes_in(place), damage=str(error))


def _described(path: Path, copies: Mapping[int, int], meter: Meter) -> Found:
    """Args: copies: index of each copy -> its source, in the model that a checkpoint was trained from."""
    if (path / MANIFEST_NAME).is_file():
        return _package(path, meter)
    if (path / "config.json").is_file():
        return _model(path, meter)
    universal = universal_tag_of(path)
    return _universal(universal) if universal else _checkpoint(tag_of(path), copies, meter)


def _checkpoint(directory: Path, copies: Mapping[int, int], meter: Meter) -> Found:
    manifest = check_as_saved(directory)
    weights = read_saved_weights(directory)
    state = weights.state
    of_adept = {} if manifest is None else _in_manifest(manifest)
    of_deepspeed: dict[str, Any] = {"zero_stage": 0, "ranks": 1}
    if state is not None:
        of_deepspeed = {
            "zero_stage": state.zero_stage,
            "ranks": state.world_size,
            "step": state.counters["global_steps"],
            "optimizer_state": tuple(
                dict.fromkeys(key for of in state.parameters.values() for key in of.vectors if key != WEIGHT)
            ),
            "learning_rates": tuple(float(group["lr"]) for group in state.param_groups),
        }
    proved = [file for file in manifest.files.values() if isinstance(file, WrittenFile)] if manifest else []
    meter.advance(_bytes_in(directory), directory.name)
    version = state.client.get("ds_version") if state else None
    return Found(
        path=directory,
        kind="checkpoint",
        written_by=f"{f'adept-ds {manifest.adept_ds}, ' if manifest else ''}DeepSpeed {version or ''}".strip(),
        trained=Held.of(weights.shapes),
        by_layer=_by_layer(weights.shapes, copies),
        frozen=Held.of({name: tuple(tensor.shape) for name, tensor in weights.frozen.items()}),
        training=Training(**of_deepspeed | of_adept),
        num_bytes=_bytes_in(directory),
        proof=f"SHA-256 of {len(proved)} files (manifest.json)" if proved else None,
    )


def _in_manifest(manifest: CheckpointManifest) -> dict[str, Any]:
    method = {key.removeprefix("method."): of for key, of in manifest.settings.items() if key.startswith("method.")}
    by_rank: dict[int, int] = {}
    for file in manifest.files.values():
        if isinstance(file, WrittenFile):
            by_rank[file.rank] = by_rank.get(file.rank, 0) + file.size
    return {
        "method": method or None,
        "step": manifest.step,
        "precision": manifest.precision,
        "start": manifest.fingerprint,
        "by_rank": dict(sorted(by_rank.items())),
    }


def _universal(directory: Path) -> Found:
    root = directory / "zero"
    with reading_checkpoint(directory):
        shapes = {
            file.parent.relative_to(root).as_posix(): _shape_in_universal(mapped(file))
            for file in sorted(root.glob("*/fp32.pt"))
        }
    return Found(
        path=directory,
        kind="universal checkpoint",
        written_by=_writer(directory.parent),
        trained=Held.of(shapes),
        by_layer=_by_layer(shapes, {}),
        num_bytes=_bytes_in(directory),
        proof=_proof(directory.parent),
    )


def _shape_in_universal(stored: Any) -> tuple[int, ...]:
    """DeepSpeed's own converter leaves stage 3 flat, and without a dictionary around it."""
    return tuple((stored["param"] if isinstance(stored, dict) else stored).shape)


def _model(path: Path, meter: Meter) -> Found:
    check_model_dir("model", path)
    proof = _proof(path)
    model = ModelDirectory.read(path)
    complete_weights(model)
    tensors = stored_tensors(path)
    expansion = Expansion.read(path) if (path / EXPANSION_NAME).is_file() else None
    return Found(
        path=path,
        kind="model",
        written_by=_writer(path),
        frozen=Held.of({name: tensor.shape for name, tensor in tensors.items()}),
        model_type=model.config.get("model_type"),
        dtypes=tuple(sorted({tensor.dtype for tensor in tensors.values()})),
        fingerprint=fingerprint_of(hash_tensors(tensors, meter.advance)),
        base_fingerprint=expansion.base_fingerprint if expansion else None,
        copies=_copies_of(path),
        alphas=(expansion.alphas or ()) if expansion else (),
        num_bytes=_bytes_in(path),
        proof=proof,
    )


def _package(path: Path, meter: Meter) -> Found:
    package = Package.load(path)
    package.check_content(meter)
    manifest = package.manifest
    return Found(
        path=path,
        kind="delta package",
        written_by=manifest.created_by,
        trained=Held.of({name: tensor.shape for name, tensor in package.tensors.items()}),
        fingerprint=manifest.fingerprint,
        base_fingerprint=manifest.base.fingerprint,
        copies={copy.index: copy.source for copy in manifest.copies},
        num_bytes=_bytes_in(path),
        proof=f"SHA-256 of {len(package.tensors)} tensors ({MANIFEST_NAME})",
    )


def _copies_of(model: Path) -> dict[int, int]:
    if not (model / EXPANSION_NAME).is_file():
        return {}
    return {copy.index: copy.source for copy in Expansion.read(model).copies}


def _by_layer(shapes: Mapping[str, tuple[int, ...]], copies: Mapping[int, int]) -> dict[str, Held]:
    """By the first number in the name, which is that of the layer in every family."""
    groups: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        found = re.search(r"\.(\d+)\.", name)
        groups.setdefault(int(found[1]) if found else -1, {})[name] = shape
    return {_called(layer, copies): Held.of(groups[layer]) for layer in sorted(groups)}


def _called(layer: int, copies: Mapping[int, int]) -> str:
    if layer < 0:
        return "outside of layers"
    return f"layer {layer}, a copy of {copies[layer]}" if layer in copies else f"layer {layer}"


def _writer(directory: Path) -> str | None:
    mark = directory / MARK_NAME
    if not mark.is_file():
        return None
    command = OutputMark.load(mark).command
    return f"tools/{command}" if command.endswith(".py") else f"adept {command}"


def _proof(directory: Path) -> str | None:
    """By what an output was found to be as it was written. Raises `DamagedError`: it is not."""
    check_as_written(directory, remedy=Expansion.remedy())
    mark = directory / MARK_NAME
    proved = OutputMark.load(mark).sha256 if mark.is_file() else {}
    return f"SHA-256 of {len(proved)} files ({MARK_NAME})" if proved else None


def _bytes_in(directory: Path) -> int:
    return sum(file.lstat().st_size for file in directory.rglob("*") if file.is_file())
