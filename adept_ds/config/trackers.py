"""Trackers that a configuration asks for can be had: looked at before anything heavy starts, without importing them."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

from adept_ds.base.errors import InputError
from adept_ds.config.logging_section import LoggingSection, is_address

FIRST_WORDS = "# HELP adept_"
"""Of every file that is written for `logging.prometheus`."""

_NETWORK = ("http://", "https://", "databricks", "file://")


def check_trackers(logging: LoggingSection) -> None:
    """Raises `InputError`: a package is not installed, or a file cannot be written."""
    if logging.wandb is not None and not _is_installed("wandb"):
        raise _missing("logging.wandb", logging.wandb, "wandb")
    if logging.mlflow is not None:
        _check_mlflow(logging.mlflow)
    if logging.prometheus is not None:
        _check_prometheus(logging.prometheus)


def _check_mlflow(place: str) -> None:
    if is_address(place) and not place.startswith(_NETWORK):
        if not _is_installed("mlflow"):
            raise InputError(
                f"logging.mlflow: '{place}' is a database, and needs the package mlflow, which is not installed; "
                "pip install mlflow, or give a server's address or a folder"
            )
        return
    if not _is_installed("mlflow-skinny", "mlflow"):
        raise _missing("logging.mlflow", place, "mlflow-skinny")
    if not is_address(place):
        _check_folder("logging.mlflow", Path(place))


def _check_prometheus(path: Path) -> None:
    if not path.parent.is_dir():
        raise InputError(
            f"logging.prometheus: '{path.parent}' is no directory; give a file in the one that node_exporter reads "
            "(--collector.textfile.directory)"
        )
    if path.is_dir() or (path.exists() and not _is_ours(path)):
        raise InputError(f"logging.prometheus: '{path}' is there, and adept did not write it; give another name")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"logging.prometheus: '{path.parent}' cannot be written; ask for the right to do so")


def _check_folder(key: str, folder: Path) -> None:
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise InputError(f"{key}: '{nearest}' is a file, where a folder is to be; give another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{key}: '{nearest}' cannot be written; give another folder")


def _is_ours(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(FIRST_WORDS)) in (FIRST_WORDS.encode(), b"")
    except OSError:
        return False


def _missing(key: str, value: str, package: str) -> InputError:
    return InputError(
        f"{key}: '{value}' needs the package {package}, which is not installed; pip install 'adept-ds[tracking]', or "
        "remove the key"
    )


def _is_installed(*names: str) -> bool:
    """Whether one of these is; a folder of its name in the working directory is none."""
    for name in names:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return True
    return False
