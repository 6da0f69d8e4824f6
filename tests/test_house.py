"""What keeps the house in order, beyond the import rule of `make lint`."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
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
    "ranks.slurm",
]
SINGLE += [
    "probing.result",
    "probing.selection",
    "weights.expansion",
    "deltas.operations",
    "run.prerequisites",
    "run.requeues",
]
SINGLE += ["training.follower"]


LIGHT = ("base", "config", "methods", "report", "comparison", "study", "cli")


def light_modules(package: str) -> Iterator[str]:
    for module in pkgutil.iter_modules([str(ROOT / "adept_ds" / package)]):
        yield f"adept_ds.{package}.{module.name}"


def imports_of(modules: Sequence[str]) -> str:
    """What a fresh process says that imports them one after the other: the first one that brings something heavy."""
    program = (
        "import importlib, sys\n"
        f"for module in {list(modules)!r}:\n"
        "    importlib.import_module(module)\n"
        f"    heavy = sorted({HEAVY!r} & sys.modules.keys())\n"
        "    if heavy: sys.exit(f'{module} imports {heavy}')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    return result.stdout + result.stderr


@pytest.mark.parametrize("package", LIGHT)
def test_importing_it_imports_no_torch(package: str) -> None:
    """A mistake in the input, a plan and a report do not wait for torch."""
    assert imports_of(sorted(light_modules(package))) == ""


def test_work_on_files_imports_no_torch() -> None:
    assert imports_of([f"adept_ds.{module}" for module in SINGLE]) == ""


def test_any_method_may_be_imported_first() -> None:
    """The configuration finds methods by importing them, and they look at the configuration."""
    for module in light_modules("methods"):
        assert imports_of([module]) == ""


def test_only_the_root_says_something_in_its_init() -> None:
    """A package is a folder; what is in it is asked for by the name of its file."""
    found = {path.parent.name: path.read_text() for path in (ROOT / "adept_ds").glob("*/__init__.py")}
    assert len(found) == 19
    assert set(found.values()) == {""}


def test_every_package_has_its_tests() -> None:
    packages = {path.parent.name for path in (ROOT / "adept_ds").glob("*/__init__.py")}
    for package in packages:
        assert list((ROOT / "tests" / package).glob("test_*.py")), package


def test_no_file_is_longer_than_a_reader_likes() -> None:
    """600 lines of code, in a file of any kind."""
    lengths = {path: len(path.read_text().splitlines()) for path in Path(ROOT / "adept_ds").rglob("*.py")}
    assert max(lengths.values()) <= 600, max(lengths, key=lambda path: lengths[path])
