"""From a training checkpoint to a Hugging Face directory.

The checkpoint that training started from is streamed shard by shard; what was trained is replaced by tensors that are
put together from DeepSpeed's partitions by DeepSpeed's own reader. No engine and no accelerator is needed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from adept_ds.base.errors import InputError
from adept_ds.base.files import share
from adept_ds.base.outputs import check_output, new_output
from adept_ds.base.progress import ProgressCallback
from adept_ds.base.run_dir import EXPANSION_NAME
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.weight_files import INDEX_NAME, weight_files
from adept_ds.weights.deepspeed_files import reading_checkpoint
from adept_ds.weights.hf_directory import copy_companions, stored_tensors

Learned = Callable[[dict[str, torch.Tensor]], Iterable[tuple[str, torch.Tensor]]]
"""From trained parameters, fp32, by name, to parameters of the model that they stand for (see `Method.learned`)."""

_DTYPES = {"source": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def read_zero_checkpoint(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All parameters, fp32, that a DeepSpeed ZeRO checkpoint holds (frozen ones too, if it was saved with them).

    Args:
        checkpoint: its tag, or the directory above it with its `latest` file.

    Raises:
        InputError: `checkpoint` is no DeepSpeed checkpoint, or is damaged.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    directory = tag_of(checkpoint)
    with reading_checkpoint(directory):
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(directory.parent), tag=directory.name))


def tag_of(checkpoint: Path) -> Path:
    """The directory with a checkpoint's files: `checkpoint` itself, or that which its `latest` file names.

    Raises:
        InputError: there is none.
    """
    if _is_tag(checkpoint):
        return checkpoint
    latest = checkpoint / "latest"
    tag = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else ""
    if not tag or Path(tag).name != tag or not _is_tag(checkpoint / tag):
        raise InputError(f"'{checkpoint}' holds no DeepSpeed checkpoint; give run_dir/checkpoints/step_N")
    return checkpoint / tag


def _read_shard(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a safetensors file. Raises `InputError` when it is damaged."""
    try:
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - safe_open is not a mapping
                yield name, shard.get_tensor(name)
    except SafetensorError as error:
        raise InputError(f"model: '{file}' is damaged ({error}); complete the download") from None


def export_checkpoint(
    start: Path,
    checkpoint: Path,
    destination: Path,
    dtype: str = "source",
    progress: ProgressCallback | None = None,
    *,
    learned: Learned = dict.items,
    overwrite: bool = False,
) -> int:
    """Write the adapted model to `destination`; returns how many tensors were trained.

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
    files = weight_files(start)
    trained = _as_stored(dict(learned(read_zero_checkpoint(checkpoint))), start, checkpoint)
    missing = set(trained)
    with new_output(destination, "export", overwrite=overwrite) as folder:
        for number, file in enumerate(files):
            if progress:
                progress(number / len(files), file.name)
            tensors = {
                name: _result_tensor(name, tensor, trained.get(name), _DTYPES[dtype])
                for name, tensor in _read_shard(file)
            }
            missing -= tensors.keys()
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
            share(folder / file.name)
        assert not missing
        if (start / INDEX_NAME).is_file():
            shutil.copy2(start / INDEX_NAME, folder / INDEX_NAME)
        copy_companions(start, folder)
        if (start / EXPANSION_NAME).is_file():
            (folder / EXPANSION_NAME).write_bytes((start / EXPANSION_NAME).read_bytes())
        _write_config(start, folder, dtype)
    return len(trained)


def _as_stored(parameters: dict[str, torch.Tensor], start: Path, checkpoint: Path) -> dict[str, torch.Tensor]:
    """A model's parameters under the names that they have in the files of `start`: stacks of experts come apart."""
    family, stored = ModelDirectory.read(start).family, stored_tensors(start)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        try:
            names = family.stored_parts(name, stored)
        except KeyError:
            if name == family.head and family.outside[0] in parameters:
                continue  # tied to the embedding, which is there under its own name
            raise InputError(f"'{checkpoint}' trained '{name}', which '{start}' lacks; give its own base") from None
        listed = [part for expert in names for part in expert]
        comes_apart = parameter.dim() > len(stored[listed[0]].shape)
        rows = parameter.reshape(-1, *parameter.shape[2:]) if comes_apart else parameter
        tensors |= zip(listed, rows.chunk(len(listed)), strict=True)
    return tensors


def _result_tensor(
    name: str, base: torch.Tensor, trained: torch.Tensor | None, dtype: torch.dtype | None
) -> torch.Tensor:
    if trained is not None and trained.shape != base.shape:
        raise InputError(f"trained tensor '{name}' is {tuple(trained.shape)}, its base {tuple(base.shape)}")
    wanted = dtype if dtype is not None and base.is_floating_point() else base.dtype
    return (base if trained is None else trained).to(wanted).contiguous()


def _write_config(start: Path, folder: Path, dtype: str) -> None:
    config = dict(ModelDirectory.read(start).config)
    if dtype != "source":
        config["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _is_tag(path: Path) -> bool:
    try:
        return any(path.glob("*optim_states.pt"))
    except (OSError, ValueError):  # whatever stands in `latest`, it is no name
        return False
