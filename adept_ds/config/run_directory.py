"""The directory of a run is a place of its own: nothing of the user's is mixed with what a run writes there."""

from __future__ import annotations

import os
from pathlib import Path

from adept_ds.base.errors import InputError
from adept_ds.base.outputs import check_apart, lies_in
from adept_ds.base.run_dir import RunDirectory
from adept_ds.config.corpus_entries import CorpusFiles, corpus_sources
from adept_ds.config.layer_sections import Stability
from adept_ds.config.schema import Config

_REMEDY = "give a directory of its own, such as runs/first"


def check_run_dir(config: Config, model: Path) -> None:
    """`run_dir` can be written, and holds nothing but this run.

    Args:
        model: the directory of the base.

    Raises:
        InputError: it cannot, or it is where the user works, or where something is read.
    """
    try:
        _check_place(config.run_dir)
        check_apart(config.run_dir, {"model": model})
        for key, corpus in _corpora(config).items():
            for path in (path for source in corpus_sources(corpus) for path in source.files):
                if path.is_dir() and lies_in(config.run_dir, path):
                    raise InputError(f"'{config.run_dir}' lies in '{path}', which {key} reads; {_REMEDY}")
    except InputError as error:
        raise InputError(f"run_dir: {error}") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"run_dir: '{config.run_dir}' cannot be written ({reason}); {_REMEDY}") from None


def _check_place(run_dir: Path) -> None:
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"'{run_dir}' is a file; {_REMEDY}")
    if not RunDirectory(run_dir).ledger.is_file():  # or it is a run's already
        for name, place in {"the directory that you are in": Path.cwd(), "your home directory": Path.home()}.items():
            if lies_in(place, run_dir):
                raise InputError(f"'{run_dir}' is or holds {name}; {_REMEDY}")
    nearest = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise InputError(f"'{run_dir}' cannot be made, because '{nearest}' is a file; {_REMEDY}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"'{run_dir}' cannot be written, because '{nearest}' cannot; {_REMEDY}")
    if (other := RunDirectory(run_dir).in_the_way()) is not None:
        found, belongs = ("file", "directory") if other.is_file() else ("directory", "file")
        raise InputError(f"'{other}' is a {found}, where a {belongs} of the run belongs; move it away, or {_REMEDY}")


def _corpora(config: Config) -> dict[str, list[Path | CorpusFiles]]:
    data, stability = config.data, config.probe.stability
    other = stability.corpus if isinstance(stability, Stability) else None
    return {
        "data.domain": [*data.domain],
        "data.replay": [*data.replay],
        "data.general_eval": [*data.general_eval],
        "data.domain_eval": [*data.domain_eval],
        "probe.corpus": [*config.probe.corpus],
        "probe.stability.corpus": [*(other or [])],
    }
