"""What lies in a Hugging Face directory: its tensors, and what there is besides weights and configuration."""

from __future__ import annotations

import shutil
from pathlib import Path

from adept_ds.base.outputs import MARK_NAME
from adept_ds.base.run_dir import EXPANSION_NAME
from adept_ds.models.weight_files import INDEX_NAME, weight_entries
from adept_ds.weights.tensor_files import StoredTensor, located


def stored_tensors(model_dir: Path) -> dict[str, StoredTensor]:
    """All tensors of a model, by name: where they lie. Raises `InputError` as `weight_entries` does."""
    files = weight_entries(model_dir)
    return {name: tensor for file, entries in files.items() for name, tensor in located(file, entries).items()}


def copy_companions(source: Path, destination: Path) -> None:
    """Copy what makes a checkpoint complete besides weights and config: tokenizer, generation config, licence."""
    for file in source.iterdir():
        is_weight = file.suffix in {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}
        is_ours = file.name in {"config.json", EXPANSION_NAME, INDEX_NAME, MARK_NAME}
        if file.is_file() and not is_weight and not is_ours and not file.name.endswith(".index.json"):
            shutil.copy2(file, destination / file.name)
