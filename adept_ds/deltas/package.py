"""The form of a delta package: delta.json, the manifest, and delta.safetensors, the tensors of the copies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, SerializerFunctionWrapHandler, model_serializer, model_validator

from adept_ds.base.digests import Digest, json_digest
from adept_ds.base.errors import InputError
from adept_ds.base.progress import Meter
from adept_ds.base.records import Record
from adept_ds.weights.expansion import LayerCopy, plan_copies
from adept_ds.weights.fingerprints import TensorRecord, fingerprint_of, hash_tensors
from adept_ds.weights.tensor_files import StoredTensor, read_header

MANIFEST_NAME, TENSORS_NAME = "delta.json", "delta.safetensors"


NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


_AGAIN = "copy the package again, or pack it anew"


class BaseRecord(Record):
    """The model that a package belongs to."""

    fingerprint: Digest
    """See `fingerprints.fingerprint_of`."""
    config: Digest
    """See `fingerprints.config_digest`."""
    model_type: str
    layers: PositiveInt


class Metrics(Record):
    """What the run that made the copies says of them; all of it may be absent."""

    losses: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Held-out losses in nats per token: base and adapted -> general and domain."""
    training: dict[str, int | float] = Field(default_factory=dict)
    """Of the whole run: steps, tokens, seconds, trainable_parameters."""
    alphas: list[Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=list)
    """How far to turn up each copy, lowest first, as the run's dial recommends; none without a dial."""

    @model_serializer(mode="wrap")
    def _no_word_of_a_dial_without_one(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree: dict[str, Any] = serialize(self)
        return tree if self.alphas else {key: of for key, of in tree.items() if key != "alphas"}


class PackageManifest(Record):
    """It names no file: a package consists of two, whose names are fixed."""

    format: Literal[1]
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    created_by: str
    base: BaseRecord
    copies: Annotated[tuple[LayerCopy, ...], Field(min_length=1)]
    """Where they stand if this package alone is applied."""
    tensors: dict[str, TensorRecord]
    """By the names of their sources in the base."""
    metrics: Metrics

    @model_validator(mode="after")
    def _copies_stand_above_their_sources(self) -> PackageManifest:
        sources = self.sources
        if len(set(sources)) != len(sources) or max(sources) >= self.base.layers:
            raise ValueError(f"copies of layers {sources} of {self.base.layers}, where each layer has one at most")
        if list(self.copies) != plan_copies(sources):
            raise ValueError(f"copies of layers {sources} do not stand directly above their sources, lowest first")
        if self.metrics.alphas and len(self.metrics.alphas) != len(sources):
            raise ValueError(f"{len(self.metrics.alphas)} positions of the dial for {len(sources)} copies")
        return self

    @classmethod
    def remedy(cls) -> str:
        return _AGAIN

    @property
    def sources(self) -> list[int]:
        return [copy.source for copy in self.copies]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the package does: its base and its tensors, not its name and metrics."""
        return json_digest([self.base.fingerprint, self.base.config, fingerprint_of(self.tensors)])


@dataclass(frozen=True)
class Package:
    """A delta package on disk; `load` reads only headers, `check_content` the rest."""

    directory: Path
    manifest: PackageManifest
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def load(cls, directory: Path) -> Package:
        """Raises `InputError` when it is incomplete, or manifest and tensors do not belong together."""
        for name in (MANIFEST_NAME, TENSORS_NAME):
            path = directory / name
            if not path.is_file():
                raise InputError(f"'{directory}' has no {name}; give a package that `adept delta pack` wrote")
            if path.resolve().parent != directory.resolve():
                raise InputError(f"'{path}' is a link to another directory; copy the package with cp -rL")
        manifest = PackageManifest.load(directory / MANIFEST_NAME)
        stored = read_header(directory / TENSORS_NAME)
        odd = sorted(stored.keys() ^ manifest.tensors.keys())
        if odd:
            raise InputError(
                f"'{directory}': {odd[0]!r} is only in one of {MANIFEST_NAME} and {TENSORS_NAME}; {_AGAIN}"
            )
        return cls(directory, manifest, stored)

    def check_content(self, meter: Meter) -> None:
        """Raises `InputError`, naming it, when a tensor is not what the manifest says."""
        for name, record in hash_tensors(self.tensors, meter.advance).items():
            if record != self.manifest.tensors[name]:
                raise InputError(f"'{self.directory}': {name!r} is not what {MANIFEST_NAME} says; {_AGAIN}")
