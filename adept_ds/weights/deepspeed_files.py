"""Files of DeepSpeed's checkpoints are pickles, which run whatever code they name. They are read as data alone."""

from __future__ import annotations

import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from adept_ds.base.errors import InputError
from adept_ds.base.files import write_bytes

_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")

_NOT_UNDERSTOOD = {
    r"zero": ("a universal checkpoint", "give the one that it was made from"),
    r"offloaded_tensors": ("one of NVMe offload, whose files are not read", "save it without"),
    r"(layer_.*|expp_rank_.*)\.pt": (
        "one of pipeline stages or of DeepSpeed's own experts, which are not put together",
        "save it from an engine without them",
    ),
    r".*mp_rank_(?!00).*\.pt": (
        "one of tensor parallel ranks, which are not put together",
        "save it from an engine without them",
    ),
}
"""Name of something in a checkpoint's directory -> what kind it tells of, and the remedy."""


def write_scripts(directory: Path) -> None:
    """DeepSpeed's scripts for its checkpoints, beside them as it would put them there, unless they are there."""
    from deepspeed.utils import zero_to_fp32

    for name in _SCRIPTS:
        source, target = Path(zero_to_fp32.__file__).with_name(name), directory / name
        if not target.is_file():
            write_bytes(target, source.read_bytes())
            target.chmod(target.stat().st_mode | stat.S_IXUSR)


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


def _is_tag(path: Path) -> bool:
    try:
        return any(path.glob("*_states.pt"))
    except (OSError, ValueError):  # whatever stands in `latest`, it is no name
        return False


def check_understood(directory: Path) -> None:
    """Raises `InputError` where a checkpoint is of a kind whose files do not say by themselves where parameters lie."""
    for path in sorted(directory.iterdir()):
        for pattern, (kind, remedy) in _NOT_UNDERSTOOD.items():
            if re.fullmatch(pattern, path.name):
                raise InputError(f"'{directory}' is {kind} ('{path.name}'); {remedy}")


def mapped(file: Path) -> Any:
    """What `torch.save` wrote there, of whose tensors only what is asked for is read.

    DeepSpeed can be told to write in a format that cannot be mapped: that is read.
    """
    return torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file))


@contextmanager
def reading_checkpoint(directory: Path) -> Iterator[None]:
    """Read DeepSpeed's files in `directory` as data alone (see `reading_data_only`).

    Raises:
        InputError: one of them is damaged, or they do not fit each other, or are not what DeepSpeed writes.
    """
    try:
        with reading_data_only():
            yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of whatever kind
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"'{directory}' is damaged ({reason}); copy it again, or give another one") from error


@contextmanager
def reading_data_only() -> Iterator[None]:
    """Meanwhile `torch.load`, whoever calls it, makes tensors, plain values and four classes of DeepSpeed's; no more.

    DeepSpeed itself asks it for whatever a file names.

    Raises:
        InputError: a file names something else, or is damaged.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    original = torch.load

    def stage_by_name(stages: Any, name: str) -> Any:
        """What Python 3.11 before 3.11.4 writes of a ZeRO stage: `getattr`, which could get hold of anything."""
        if stages is not ZeroStageEnum:
            raise ValueError(f"it names GLOBAL getattr of {stages!r}")
        return stages[name]

    def load(file: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return original(file, *arguments, **(options | {"weights_only": True}))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of whatever kind, for a damaged file
            raise _unreadable(file, error) from None

    data: list[Any] = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    with torch.serialization.safe_globals([*data, (stage_by_name, "builtins.getattr")]):
        torch.load = load  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.load = original


def _unreadable(file: Any, error: Exception) -> InputError:
    words = " ".join(str(error).split())
    _, found, named = words.partition(" GLOBAL ")
    if found:
        return InputError(
            f"'{file}' names {named.split()[0]}, which is no data and could run code; "
            "give a checkpoint that adept wrote"
        )
    reason = words.rpartition("WeightsUnpickler error: ")[2][:200]  # torch explains its switch before
    return InputError(f"'{file}' cannot be read ({reason}); copy the checkpoint again, or give another one")
