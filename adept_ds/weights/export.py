"""From a training checkpoint to a Hugging Face directory.

The model that training started from is copied, file by file; in the place of what was trained come tensors that are put
together from DeepSpeed's partitions as they are written. However large the model is, a few of its tensors are in memory
at once. No engine and no accelerator is needed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch

from adept_ds.base.errors import InputError
from adept_ds.base.files import new_file, read_json, write_json
from adept_ds.base.outputs import check_new_file, check_output, new_output
from adept_ds.base.progress import Meter, ProgressCallback
from adept_ds.base.run_dir import EXPANSION_NAME
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.weight_files import INDEX_NAME, weight_entries
from adept_ds.weights.deepspeed_files import tag_of
from adept_ds.weights.hf_directory import copy_companions
from adept_ds.weights.made_tensors import MadeTensors
from adept_ds.weights.reading import read_tensor
from adept_ds.weights.saved_weights import read_saved_weights
from adept_ds.weights.tensor_files import (
    MadeTensor,
    StoredTensor,
    TensorContent,
    in_dtype,
    in_library_order,
    located,
    write_tensors,
)

Learned = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
"""From trained parameters, fp32, by name, to parameters of the model that they stand for (see `Method.learned`)."""

_DTYPES = {"source": None, "float32": "F32", "bfloat16": "BF16"}

_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_FORMATS = {dtype: name for name, dtype in _TORCH_DTYPES.items()}

_STACKS = 3
"""Stacks of experts that are kept: in files an expert's matrices lie side by side, one of each stack."""


def read_zero_checkpoint(checkpoint: Path) -> MadeTensors:
    """All that a DeepSpeed checkpoint holds of a model (frozen weights too, if it was saved with them).

    Args:
        checkpoint: its tag, or the directory above it with its `latest` file.

    Returns:
        Trained parameters in fp32, frozen ones as the model had them.

    Raises:
        InputError: `checkpoint` is no DeepSpeed checkpoint, is damaged, or of a kind that is not understood.
    """
    saved = read_saved_weights(tag_of(checkpoint))
    return saved.frozen | saved.trained


def export_checkpoint(
    start: Path,
    checkpoint: Path,
    destination: Path,
    dtype: str = "source",
    progress: ProgressCallback | None = None,
    *,
    learned: Learned = lambda trained: trained,
    overwrite: bool = False,
) -> int:
    """Write the adapted model to `destination`; returns how many tensors of its files were trained.

    Frozen weights are those of `start`; where the checkpoint holds them too, both must be the same.

    Args:
        start: the model that training started from.
        dtype: of all floating-point tensors; 'source' keeps each tensor's own.
        learned: what the trained parameters are in the model; by default themselves.
        overwrite: an earlier export in its place may be replaced (see `outputs.check_output`).

    Raises:
        InputError: the training checkpoint does not belong to `start`, or `destination` is no place for a new
            directory.
    """
    check_output(destination, "export", {"CHECKPOINT": checkpoint, "--base": start}, overwrite=overwrite)
    stored = {file: located(file, entries) for file, entries in weight_entries(start).items()}
    by_name = {name: tensor for tensors in stored.values() for name, tensor in tensors.items()}
    saved = read_saved_weights(tag_of(checkpoint))
    trained = _InFiles(learned(saved.trained), start, checkpoint, by_name)
    frozen = _InFiles(saved.frozen, start, checkpoint, by_name)
    wanted = _DTYPES[dtype]

    def content(name: str, tensor: StoredTensor) -> TensorContent:
        if name in trained.parts:
            return trained.content(name, tensor, wanted)
        kept = in_dtype(tensor, wanted) if wanted else tensor
        return frozen.checked(name, tensor, kept) if name in frozen.parts else kept

    files = {
        file: in_library_order({name: content(name, tensor) for name, tensor in tensors.items()})
        for file, tensors in stored.items()
    }
    total = sum(tensor.num_bytes for contents in files.values() for tensor in contents.values())
    meter = Meter(total, progress)
    with new_output(destination, "export", overwrite=overwrite) as folder:
        for file, contents in files.items():
            advance = partial(meter.advance, text=file.name)
            write_tensors(folder / file.name, contents, advance, digested=False)
        _write_index(start, folder, None if wanted is None else total)
        copy_companions(start, folder)
        if (start / EXPANSION_NAME).is_file():
            (folder / EXPANSION_NAME).write_bytes((start / EXPANSION_NAME).read_bytes())
        _write_config(start, folder, dtype)
    return len(trained.parts)


def write_tensors_alone(checkpoint: Path, out: Path, progress: ProgressCallback | None = None) -> int:
    """Write what a checkpoint holds of a model, under its own names, to a new safetensors file; returns how many.

    Raises:
        InputError: as `read_zero_checkpoint`, or `out` is no name for a new file.
    """
    if out.suffix != ".safetensors":
        raise InputError(f"OUT: '{out}' is no .safetensors file; name one, or give --base for a Hugging Face directory")
    check_new_file(out)
    saved = read_zero_checkpoint(checkpoint)
    contents = in_library_order({name: _as_it_is(saved, name) for name in saved})
    meter = Meter(sum(content.num_bytes for content in contents.values()), progress)
    with new_file(out) as temporary:
        write_tensors(temporary, contents, meter.advance, digested=False)
    return len(contents)


class _Part(NamedTuple):
    """Where a tensor of a file lies in a parameter of the model."""

    parameter: str
    number: int
    """Of `parts` that lie one below the other in it."""
    parts: int


class _InFiles:
    """Parameters of a model by the names of tensors in the files of `start`: stacks of experts come apart.

    Raises:
        InputError: the files lack one.
    """

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], start: Path, checkpoint: Path, stored: Mapping[str, StoredTensor]
    ) -> None:
        self._parameters, self._checkpoint = parameters, checkpoint
        self._stack = lru_cache(_STACKS)(parameters.__getitem__)
        self.parts: dict[str, _Part] = {}
        family = ModelDirectory.read(start).family
        for name in parameters:
            try:
                names = family.stored_parts(name, stored)
            except KeyError:
                if name != family.head:
                    raise InputError(
                        f"'{checkpoint}' holds '{name}', which '{start}' lacks; give its own base"
                    ) from None
                if family.outside[0] in parameters:
                    continue  # tied to the embedding, which is there under its own name
                names = family.stored_parts(family.outside[0], stored)
            listed = [part for expert in names for part in expert]
            self.parts |= {part: _Part(name, number, len(listed)) for number, part in enumerate(listed)}

    def content(self, name: str, base: StoredTensor, dtype: str | None) -> TensorContent:
        """What is written in the place of `base`."""
        wanted = dtype if dtype and base.dtype.startswith(("F", "BF")) else base.dtype
        return MadeTensor(wanted, base.shape, lambda: iter([_bytes(self._tensor(name, base), wanted)]))

    def checked(self, name: str, base: StoredTensor, kept: TensorContent) -> TensorContent:
        """`kept`, which is made of `base`, once that is seen to be what the checkpoint holds."""

        def make() -> Iterator[memoryview]:
            found = self._tensor(name, base)
            if _bytes(found, _FORMATS[found.dtype]) != _bytes(read_tensor(name, base), _FORMATS[found.dtype]):
                raise InputError(
                    f"'{self._checkpoint}' was trained with another '{name}' than '{base.file}' holds; "
                    "give its own base"
                )
            yield from kept.chunks()

        return MadeTensor(kept.dtype, kept.shape, make)

    def _tensor(self, name: str, base: StoredTensor) -> torch.Tensor:
        part = self.parts[name]
        whole = self._parameters[part.parameter] if part.parts == 1 else self._stack(part.parameter)
        is_stack = whole.dim() > len(base.shape)
        rows = whole.reshape(-1, *whole.shape[2:]) if is_stack else whole
        tensor = rows.chunk(part.parts)[part.number] if part.parts > 1 or is_stack else whole
        if tuple(tensor.shape) != base.shape:
            raise InputError(
                f"'{self._checkpoint}' holds '{name}' of shape {tuple(tensor.shape)}, its base {base.shape}; give its "
                "own base"
            )
        return tensor


def _as_it_is(saved: MadeTensors, name: str) -> TensorContent:
    like = saved[name]
    dtype = _FORMATS[like.dtype]
    return MadeTensor(dtype, tuple(like.shape), lambda: iter([_bytes(saved[name], dtype)]))


def _bytes(tensor: torch.Tensor, dtype: str) -> memoryview:
    """Converted, as they lie in a file."""
    plain = tensor.to(_TORCH_DTYPES[dtype]).contiguous().reshape(-1).view(torch.uint8)
    return plain.numpy().data


def _write_index(start: Path, folder: Path, total: int | None) -> None:
    """Args: total: bytes of all tensors, where that is another number than in `start`."""
    index = start / INDEX_NAME
    if not index.is_file():
        return
    if total is None:
        shutil.copy2(index, folder / INDEX_NAME)
    else:
        tree = read_json(index)
        write_json(folder / INDEX_NAME, tree | {"metadata": (tree.get("metadata") or {}) | {"total_size": total}})


def _write_config(start: Path, folder: Path, dtype: str) -> None:
    config = dict(ModelDirectory.read(start).config)
    if dtype != "source":
        spelled = [key for key in ("dtype", "torch_dtype") if key in config]  # the latter is the older one
        config |= dict.fromkeys(spelled or ["dtype"], dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
