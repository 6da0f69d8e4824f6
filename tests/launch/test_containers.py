"""Recipes of containers install what the Makefile installs, copy what is there, and have nobody work as root."""

from __future__ import annotations

import re
import shlex

import pytest
from harness.launching import ROOT

FOLDER = ROOT / "containers"
RECIPES = {name: (FOLDER / name).read_text(encoding="utf-8") for name in ("Dockerfile", "adept-ds.def")}
DOCKERFILE, DEFINITION = RECIPES.values()


def installs(text: str) -> list[list[str]]:
    """What pip is told in it, in order, without how it talks and caches."""
    joined = text.replace("\\\n", " ")
    calls = [shlex.split(call) for call in re.findall(r"pip (install [^\n&|]*)", joined)]
    return [[word for word in call if word not in ("--quiet", "--no-cache-dir")] for call in calls]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_installs_what_the_makefile_does_in_its_versions(name: str) -> None:
    """With the trackers, which are an extra."""
    rule = (ROOT / "Makefile").read_text(encoding="utf-8").partition("$(VENV)/.installed:")[2].partition("\n\n")[0]
    makefile = installs(rule)
    assert len(makefile) == 2
    assert installs(RECIPES[name]) == [
        [*call[:-1], ".[tracking]" if call[-1] == "." else call[-1]] for call in makefile
    ]


def copied() -> dict[str, set[str]]:
    files = DEFINITION.partition("%files")[2].partition("%post")[0]
    return {
        "Dockerfile": {
            word for line in re.findall(r"^COPY (.*)$", DOCKERFILE, flags=re.MULTILINE) for word in line.split()[:-1]
        },
        "adept-ds.def": {line.split()[0] for line in files.splitlines() if line.strip()},
    }


def test_both_copy_the_same_and_it_is_there() -> None:
    first, second = copied().values()
    assert first == second
    assert all((ROOT / name).exists() for name in first)
    allowed = {line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert allowed == first
    needed = {"adept_ds", "launch", "ds_configs", "setup.py", "README.md", "constraints.txt", "pyproject.toml"}
    assert needed <= first, "what setup.py, the launch scripts and the README's commands read"


def test_both_begin_with_the_python_that_the_tests_run_with() -> None:
    bases = [re.search(r"^F(?:ROM|rom:) (.*)$", text, flags=re.MULTILINE) for text in RECIPES.values()]
    images = {found[1] for found in bases if found}
    assert len(images) == 1
    (image,) = images
    tested = re.search(r"Python (\d+\.\d+)", (ROOT / "constraints.txt").read_text())
    assert tested
    assert image.startswith(f"python:{tested[1]}-")


def test_nobody_works_as_root_in_the_image() -> None:
    users = re.findall(r"^USER (\w+)$", DOCKERFILE, flags=re.MULTILINE)
    assert users
    assert users[-1] not in ("root", "0")
    assert DOCKERFILE.rindex("\nRUN ") < DOCKERFILE.rindex("\nUSER "), "what is installed is not theirs to change"
