"""The directory of a run is a place of its own: nothing of the user's is mixed with what a run writes there."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
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
                if _may_match(path, config.run_dir):
                    raise InputError(f"'{config.run_dir}' may hold what '{path}' matches, which {key} reads; {_REMEDY}")
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


def _may_match(pattern: Path, run_dir: Path) -> bool:
    """Whether a pattern, as `find_files` understands it, stands for the directory of a run, for one around it, or
    perhaps for something in it: what a run will write there is not asked."""
    if os.path.lexists(pattern) or not glob.has_magic(str(pattern)):
        return False
    fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    place, root = run_dir.resolve(), fixed.resolve()
    if not place.is_relative_to(root):
        return False
    return _may_begin_alike(pattern.parts[len(fixed.parts) :], place.relative_to(root).parts)


def _may_begin_alike(pattern: Sequence[str], names: Sequence[str]) -> bool:
    """Whether one matches a beginning of the other."""
    if not pattern or not names:
        return True
    if pattern[0] == "**":
        return _may_begin_alike(pattern[1:], names) or _may_begin_alike(pattern, names[1:])
    return fnmatchcase(names[0], pattern[0]) and _may_begin_alike(pattern[1:], names[1:])


def _corpora(config: Config) -> dict[str, list[Path | CorpusFiles]]:
    """What is read, by key."""
    data, stability = config.data, config.probe.stability
    other = stability.corpus if isinstance(stability, Stability) else None
    anchor = config.anchor.corpus if config.anchor else []
    return {
        "data.domain": [*data.domain],
        "data.replay": [*data.replay],
        "data.general_eval": [*data.general_eval],
        "data.domain_eval": [*data.domain_eval],
        "probe.corpus": [*config.probe.corpus],
        "probe.stability.corpus": [*(other or [])],
        "anchor.corpus": [*anchor],
        "eval.tasks": [*config.eval.tasks],
    }
