"""What an expanded checkpoint keeps of its base besides tensors, so that the base can be given back byte for byte."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError, model_validator

from adept_ds.base.errors import InputError
from adept_ds.base.files import write_all, write_text
from adept_ds.base.records import Record, first_mistake
from adept_ds.models.safetensors_header import parse_header
from adept_ds.models.weight_files import WeightName
from adept_ds.weights.tensor_files import StoredTensor, read_header

BASE_FILES_NAME = "base_files.json"


BaseText = Literal["config.json", "model.safetensors.index.json", "expansion.json", "base_files.json"]
"""Files that an expansion writes anew. The last two exist where the base is an expanded checkpoint itself."""


class BaseFiles(Record):
    """The record that stands in an expanded checkpoint (base_files.json)."""

    format: Literal[1] = 1
    texts: dict[BaseText, str]
    headers: dict[WeightName, str]
    """Each weight file's header, as it stands there: names, dtypes, shapes, order and metadata."""

    @model_validator(mode="after")
    def _without_config_it_is_no_model(self) -> BaseFiles:
        if "config.json" not in self.texts or not self.headers:
            raise ValueError("config.json and weight files are needed")
        self.config()
        return self

    def config(self) -> dict[str, Any]:
        """The base's config.json. Raises `ValueError`: it is none, which no record that was made is."""
        try:
            tree = json.loads(self.texts["config.json"])
        except RecursionError:
            raise ValueError("config.json: nested too deeply") from None
        if not isinstance(tree, dict):
            raise ValueError("config.json: no JSON object")
        return tree

    @classmethod
    def of(cls, base: Path, files: Sequence[Path]) -> BaseFiles:
        """Read those of `base`, whose weight files are `files`. Raises `InputError` if it keeps some outside itself."""
        try:
            texts = {name: _text(base / name) for name in get_args(BaseText) if (base / name).is_file()}
            return cls(texts=texts, headers={file.relative_to(base).as_posix(): _header(file) for file in files})
        except ValueError as error:
            reason = first_mistake(error) if isinstance(error, ValidationError) else str(error)
            raise InputError(f"model: '{base}' is no directory that could be given back: {reason}") from None

    @classmethod
    def read(cls, directory: Path) -> BaseFiles:
        """Raises `InputError` when `directory` has no such record, or one that was tampered with."""
        path = directory / BASE_FILES_NAME
        if not path.is_file():
            raise InputError(
                f"'{directory}' has no {BASE_FILES_NAME}, which says what its base was; "
                "`adept delta pack` it with --base"
            )
        return cls.load(path)

    @classmethod
    def remedy(cls) -> str:
        return "copy the model again"

    def restore_texts(self, directory: Path) -> None:
        for name, text in self.texts.items():
            write_text(directory / name, text)

    def tensors(self) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
        """Weight file -> its tensors in their order, each with dtype and shape.

        Raises:
            InputError: a header cannot be read.
        """
        try:
            return {
                file: {name: (entry.dtype, entry.shape) for name, entry in parse_header(header).items()}
                for file, header in self.headers.items()
            }
        except ValueError as error:
            raise InputError(f"{BASE_FILES_NAME}: a header cannot be read ({error}); copy the model again") from None

    def restore_weights(self, name: str, destination: Path, tensors: Mapping[str, StoredTensor]) -> Iterator[int]:
        """Write one of the base's weight files; yields the number of bytes of each chunk.

        Args:
            tensors: all that it holds, by their names in the base.

        Raises:
            InputError: the record was tampered with.
        """
        header = self.headers[name].encode()
        destination.parent.mkdir(parents=True, exist_ok=True)
        with destination.open("wb", buffering=0) as file:
            write_all(file, struct.pack("<Q", len(header)) + header)
            for tensor in parse_header(self.headers[name]):
                yield from tensors[tensor].copy_to(file)
        try:
            read_header(destination)
        except InputError:
            raise InputError(
                f"{BASE_FILES_NAME}: the header of '{name}' does not fit its tensors; copy the model again"
            ) from None


def _header(path: Path) -> str:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return file.read(length).decode()


def _text(path: Path) -> str:
    """With its line ends as they are."""
    return path.read_bytes().decode()
