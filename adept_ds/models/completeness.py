"""Whether a directory holds a whole model: what can be said from config.json and headers alone, without torch.

What is missing would be filled with random numbers when the model is loaded, and what is too many would be dropped.
Layers of one kind are alike, so that each is held against the others; `loading.check_architecture` then asks
transformers itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from adept_ds.base.errors import InputError
from adept_ds.models.families import Family, module_path
from adept_ds.models.safetensors_header import TensorEntry
from adept_ds.models.weight_files import weight_entries

if TYPE_CHECKING:
    from adept_ds.models.directory import ModelDirectory

UNQUANTISED = "give the unquantised checkpoint, or dequantise the model, save it and give that directory"


_FLOATS = {"F64", "F32", "F16", "BF16"}
_PACKED = {"qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv", "absmax"}
"""What tools for quantisation call their tensors."""


SAVE_AGAIN = "complete the download, or save the model again"


Layer = dict[str, tuple[str, tuple[int, ...]]]
"""Name of a tensor inside a layer -> its name in the file, and its shape."""


def complete_weights(model: ModelDirectory) -> dict[Path, dict[str, TensorEntry]]:
    """Weight file -> the tensors in it.

    Raises:
        InputError: naming the tensor: one is missing, of another shape than config.json or its neighbours say, in a
            layer that config.json does not know, or packed in some way.
    """
    files = weight_entries(model.path)
    tensors = {name: entry for entries in files.values() for name, entry in entries.items()}
    _check_dtypes(model, tensors)
    _check_layers(model, _by_layer(model, tensors))
    _check_outside(model, tensors)
    return files


def _check_dtypes(model: ModelDirectory, tensors: Mapping[str, TensorEntry]) -> None:
    """Masks and positions in old files are whole numbers; weights are not, unless they are packed."""
    for name, entry in tensors.items():
        last = name.rpartition(".")[2]
        if last in _PACKED or entry.dtype.startswith("F8") or (entry.dtype not in _FLOATS and last == "weight"):
            raise InputError(
                f"model: '{model.path}' holds quantised weights ('{name}' in {entry.dtype}), which cannot be expanded "
                f"or trained; {UNQUANTISED}"
            )


def _by_layer(model: ModelDirectory, tensors: Mapping[str, TensorEntry]) -> dict[int, Layer]:
    layers: dict[int, Layer] = {}
    for name, entry in tensors.items():
        place = model.family.split_name(name)
        if place is None:
            continue
        index, inner = place
        if index >= model.num_layers:
            raise InputError(
                f"model: '{model.path}' holds '{name}', but config.json says {model.family.layer_count_key}="
                f"{model.num_layers}; give the config.json that belongs to these weights"
            )
        twin = layers.setdefault(index, {}).get(inner)
        if twin is not None:
            raise InputError(f"model: '{model.path}' holds both '{twin[0]}' and '{name}', which are one; {SAVE_AGAIN}")
        layers[index][inner] = (name, entry.shape)
    if len(layers) < model.num_layers:
        absent = next(index for index in range(model.num_layers) if index not in layers)
        raise _missing(model, f"{model.family.layers}.{absent}.{next(_always_there(model.family))}")
    return layers


def _check_layers(model: ModelDirectory, layers: Mapping[int, Layer]) -> None:
    """Those with experts, and those without, are alike among themselves."""
    dense = model.family.dense_layers(model.config)
    for alike in filter(None, (layers.keys() & dense, layers.keys() - dense)):
        _check_alike(model, {index: layers[index] for index in sorted(alike)})


def _check_alike(model: ModelDirectory, layers: Mapping[int, Layer]) -> None:
    """They have tensors of the same names and shapes."""
    wanted = dict.fromkeys(_always_there(model.family))
    for layer in layers.values():
        wanted |= dict.fromkeys(inner for inner in layer if _is_weight(model.family, inner))
        wanted |= dict.fromkeys(_experts(model.family, layer))
    for inner in wanted:
        for index, layer in layers.items():
            if inner not in layer:
                raise _missing(model, f"{model.family.layers}.{index}.{inner}")
        usual = Counter(layer[inner][1] for layer in layers.values()).most_common(1)[0][0]
        for name, shape in (layer[inner] for layer in layers.values()):
            if shape != usual:
                raise InputError(
                    f"model: '{model.path}' holds '{name}' of shape {shape}, other layers {usual}; {SAVE_AGAIN}"
                )


def _always_there(family: Family) -> Iterator[str]:
    """Weights that each layer has; which of a family with experts are in a layer, its neighbours must say."""
    for path in (*family.projections, *family.norms):
        if not (family.experts_per_token_key and path.startswith("mlp.")):
            yield f"{path}.weight"


def _is_weight(family: Family, inner: str) -> bool:
    """Weights and biases; not the buffers that old files hold as well, which loading passes over."""
    path = module_path(inner)
    return path in family.projections or path in family.norms or path in _stored_paths(family)


def _stored_paths(family: Family) -> set[str]:
    return {path for paths in family.stored_as.values() for path in paths}


def _experts(family: Family, layer: Iterable[str]) -> Iterator[str]:
    """The tensors of all experts up to the highest that there is: an expert is like the others."""
    patterns = {path for path in _stored_paths(family) if "*" in path}
    numbers = [int(*re.findall(r"\.(\d+)\.", inner)) for inner in layer if module_path(inner) in patterns]
    for number in range(max(numbers, default=-1) + 1):
        for pattern in patterns:
            yield f"{pattern.replace('*', str(number))}.weight"


def _check_outside(model: ModelDirectory, tensors: Mapping[str, TensorEntry]) -> None:
    family, config = model.family, model.config
    for name in family.outside:
        if _find(tensors, name) is None:
            raise _missing(model, name)
    heads = (family.head, *(f"{path}.weight" for path in family.stored_as.get(module_path(family.head), ())))
    head = next(filter(None, (_find(tensors, name) for name in heads)), None)
    if config.get("tie_word_embeddings") is False and head is None:
        raise InputError(
            f"model: '{model.path}' lacks '{heads[-1]}', but config.json says tie_word_embeddings=false; {SAVE_AGAIN}"
        )
    rows = config.get("vocab_size")
    for name in filter(None, (_find(tensors, family.outside[0]), head)):
        if rows is not None and tensors[name].shape[:1] != (rows,):
            raise InputError(
                f"model: '{model.path}' holds '{name}' of shape {tensors[name].shape}, but config.json says "
                f"vocab_size={rows}; give the config.json that belongs to these weights"
            )


def _find(tensors: Mapping[str, TensorEntry], name: str) -> str | None:
    """What a tensor is called in the files; checkpoints of a base model lack the path's first component."""
    return next((found for found in (name, name.partition(".")[2]) if found in tensors), None)


def _missing(model: ModelDirectory, name: str) -> InputError:
    return InputError(f"model: '{model.path}' lacks '{name}', which would be random numbers; {SAVE_AGAIN}")
