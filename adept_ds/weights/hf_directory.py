"""The files of a Hugging Face directory: which hold weights, which tensors lie in them, and what else there is."""

from __future__ import annotations

import shutil
from pathlib import Path

from adept_ds.base.errors import InputError
from adept_ds.base.files import read_json
from adept_ds.base.run_dir import EXPANSION_NAME
from adept_ds.weights.tensor_files import StoredTensor, read_header

INDEX_NAME = "model.safetensors.index.json"


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors shards of a checkpoint, in the order of its index."""
    index = model_dir / INDEX_NAME
    if index.is_file():
        names = dict.fromkeys(read_json(index)["weight_map"].values())
        files = [model_dir / name for name in names]
    else:
        files = sorted(model_dir.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise InputError(
            f"model: '{model_dir}' lacks weight file {missing[:1] or '*.safetensors'}; complete the download"
        )
    return files


def stored_tensors(model_dir: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint, by name: where they lie."""
    return {name: tensor for file in weight_files(model_dir) for name, tensor in read_header(file).items()}


def copy_companions(source: Path, destination: Path) -> None:
    """Copy what makes a checkpoint complete besides weights and config: tokenizer, generation config, licence."""
    for file in source.iterdir():
        is_weight = file.suffix in {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}
        is_ours = file.name in {"config.json", EXPANSION_NAME, INDEX_NAME}
        if file.is_file() and not is_weight and not is_ours and not file.name.endswith(".index.json"):
            shutil.copy2(file, destination / file.name)
