"""What keeps the house in order, beyond the import rule of `make lint`."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.launching import ROOT

HEAVY = {"torch", "deepspeed", "transformers", "datasets", "accelerate", "peft"}
SINGLE = [
    "models.adapter_spec",
    "models.families",
    "models.family_table",
    "models.directory",
    "models.tokenizer_files",
    "models.tokenizer_settings",
    "ranks.launchers",
]
SINGLE += ["probing.result", "probing.selection", "weights.expansion", "deltas.operations", "run.prerequisites"]


def light_modules() -> Iterator[str]:
    for package in ("base", "config", "report", "cli"):
        for module in pkgutil.iter_modules([str(ROOT / "adept_ds" / package)]):
            yield f"{package}.{module.name}"
    yield from SINGLE


@pytest.mark.parametrize("module", sorted(light_modules()))
def test_importing_it_imports_no_torch(module: str) -> None:
    """A mistake in the input, a plan and a report do not wait for torch; nor does work on files."""
    program = f"import sys, adept_ds.{module}; print(sorted({HEAVY!r} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.stdout == "[]\n", result.stdout + result.stderr


def test_only_the_root_says_something_in_its_init() -> None:
    """A package is a folder; what is in it is asked for by the name of its file."""
    found = {path.parent.name: path.read_text() for path in (ROOT / "adept_ds").glob("*/__init__.py")}
    assert len(found) == 14
    assert set(found.values()) == {""}


def test_every_package_has_its_tests() -> None:
    packages = {path.parent.name for path in (ROOT / "adept_ds").glob("*/__init__.py")}
    for package in packages:
        assert list((ROOT / "tests" / package).glob("test_*.py")), package


def test_no_file_is_longer_than_a_reader_likes() -> None:
    """600 lines of code, in a file of any kind."""
    lengths = {path: len(path.read_text().splitlines()) for path in Path(ROOT / "adept_ds").rglob("*.py")}
    assert max(lengths.values()) <= 600, max(lengths, key=lambda path: lengths[path])
