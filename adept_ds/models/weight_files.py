"""Which files a model consists of: the only place that decides it, as transformers would, or not at all. No torch.

transformers takes model.safetensors where there is one, else the files that the index names, and passes over whatever
else lies there. A directory in which that could be another model than the one that is meant is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field

from adept_ds.base.errors import InputError
from adept_ds.base.records import Record
from adept_ds.models.safetensors_header import TensorEntry, read_entries

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"


ADAPTER_NAME = "adapter_config.json"
"""With it, libraries load another model, the one that the adapter was trained on."""


_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def check_weight_name(name: str) -> str:
    """A weight file stays in its directory, whatever a record says: it may have come from anywhere."""
    path = PurePosixPath(name)
    outside = path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name
    if outside or path.suffix != ".safetensors" or len(name.encode()) > 255:
        raise ValueError(f"{name[:100]!r} is no name of a weight file")
    return name


Shapes = Mapping[str, tuple[int, ...]]
"""Name of a tensor -> its shape."""

WeightName = Annotated[str, AfterValidator(check_weight_name)]


class WeightIndex(Record):
    """The index of a model of several files (model.safetensors.index.json)."""

    model_config = ConfigDict(extra="ignore")

    weight_map: Annotated[dict[str, WeightName], Field(min_length=1)]
    """Tensor -> file."""
    metadata: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def remedy(cls) -> str:
        return "complete the download"


def weight_files(model_dir: Path) -> list[Path]:
    """The files that hold a model's weights, in the order of its index.

    Raises:
        InputError: one is missing, or it is not clear which they are.
    """
    if (model_dir / ADAPTER_NAME).is_file():
        raise InputError(
            f"model: '{model_dir}' has {ADAPTER_NAME}, so that it is an adapter and no model by itself; "
            "merge it into its base (merge_and_unload), save that, and give that directory"
        )
    names = _indexed(model_dir) if (model_dir / INDEX_NAME).is_file() else _single(model_dir)
    missing = [name for name in names if not (model_dir / name).is_file()]
    if missing:
        raise InputError(f"model: '{model_dir}' lacks weight file '{missing[0]}'; complete the download")
    return [model_dir / name for name in names]


def tensor_shapes(model_dir: Path) -> Shapes:
    """As `weight_entries`."""
    return {name: entry.shape for entries in weight_entries(model_dir).values() for name, entry in entries.items()}


def weight_entries(model_dir: Path) -> dict[Path, dict[str, TensorEntry]]:
    """Weight file -> the tensors in it, by their headers.

    Raises:
        InputError: a file is missing or damaged, or the index and the files do not agree.
    """
    entries = {file: read_entries(file) for file in weight_files(model_dir)}
    _check_unique(model_dir, entries)
    if (model_dir / INDEX_NAME).is_file():
        _check_index(model_dir, entries)
    return entries


def _indexed(model_dir: Path) -> list[str]:
    names = list(dict.fromkeys(WeightIndex.load(model_dir / INDEX_NAME).weight_map.values()))
    if (model_dir / SINGLE_NAME).is_file() and names != [SINGLE_NAME]:
        others = next(name for name in names if name != SINGLE_NAME)
        raise InputError(
            f"model: '{model_dir}' has {SINGLE_NAME} beside {INDEX_NAME}, which names other files ('{others}'): which "
            "is the model? Move those of the other one away"
        )
    return names


def _single(model_dir: Path) -> list[str]:
    found = sorted(path.name for path in model_dir.glob("*.safetensors"))
    shards = [name for name in found if _SHARD.fullmatch(name)]
    if shards:
        beside = f" and {SINGLE_NAME}" if SINGLE_NAME in found else ""
        raise InputError(
            f"model: '{model_dir}' has '{shards[0]}'{beside} but no {INDEX_NAME}, which says what belongs together; "
            "complete the download, or move away what is of another model"
        )
    if SINGLE_NAME not in found:
        several = f"'{found[0]}'" + (f" and {len(found) - 1} more" if found[1:] else "") if found else "no weights"
        raise InputError(
            f"model: '{model_dir}' has {several} but neither {SINGLE_NAME} nor {INDEX_NAME}, which loading looks for; "
            f"complete the download, or copy the file that is the model to {SINGLE_NAME}"
        )
    return [SINGLE_NAME]


def _check_unique(model_dir: Path, entries: dict[Path, dict[str, TensorEntry]]) -> None:
    place: dict[str, Path] = {}
    for file, tensors in entries.items():
        for name in tensors:
            if name in place:
                raise InputError(
                    f"model: '{model_dir}' has '{name}' in both '{place[name].name}' and '{file.name}'; "
                    "download or save the model again"
                )
            place[name] = file


def _check_index(model_dir: Path, entries: dict[Path, dict[str, TensorEntry]]) -> None:
    listed: dict[Path, set[str]] = {file: set() for file in entries}
    for name, place in WeightIndex.load(model_dir / INDEX_NAME).weight_map.items():
        listed[model_dir / place].add(name)
    for file, tensors in entries.items():
        for name in sorted(listed[file] ^ tensors.keys()):
            what = f"lacks '{name}', which {INDEX_NAME} names"
            if name in tensors:
                what = f"holds '{name}', which {INDEX_NAME} does not name"
            raise InputError(f"model: '{file}' {what}; download or save the model again")
