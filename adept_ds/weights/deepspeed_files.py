"""Files of DeepSpeed's checkpoints are pickles, which run whatever code they name. They are read as data alone."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from adept_ds.base.errors import InputError
from adept_ds.base.files import write_bytes

_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")


def write_scripts(directory: Path) -> None:
    """DeepSpeed's scripts for its checkpoints, beside them as it would put them there, unless they are there."""
    from deepspeed.utils import zero_to_fp32

    for name in _SCRIPTS:
        source, target = Path(zero_to_fp32.__file__).with_name(name), directory / name
        if not target.is_file():
            write_bytes(target, source.read_bytes())
            target.chmod(target.stat().st_mode | stat.S_IXUSR)


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

    def load(file: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return original(file, *arguments, **(options | {"weights_only": True}))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of whatever kind, for a damaged file
            raise _unreadable(file, error) from None

    with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
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
