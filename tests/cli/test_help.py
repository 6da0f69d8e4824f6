"""`--help` of every command: an example that can be typed, and what either form takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from harness.launching import ROOT, rank_environment
from harness.rank_processes import RankProcess

from adept_ds.cli.app import app

TAKES = {
    "": [],
    "run": ["CONFIG", "[KEY=VALUE]..."],
    "launch": [
        *("CONFIG", "[KEY=VALUE]...", "--scheduler", "--nodes", "--gpus-per-node", "--ranks-per-node"),
        *("--hosts", "--sbatch", "--submit"),
    ],
    "probe": [
        *("CONFIG|MODEL", "[KEY=VALUE]...", "--method", "--out", "--json"),
        *("--corpus", "-k", "--sequences", "--seq-len", "--work-dir"),
    ],
    "expand": ["CONFIG|MODEL", "[OUT | KEY=VALUE]...", "--layers", "--dry-run", "--overwrite", "--json"],
    "verify": ["MODEL", "EXPANDED", "--logits", "--no-logits", "--json"],
    "train": ["CONFIG", "[KEY=VALUE]...", "--decay-from", "--decay-dir"],
    "eval": [
        *("CONFIG|MODEL", "[KEY=VALUE]...", "--tasks", "--lm-eval", "--json"),
        *("--text", "--seq-len", "--work-dir"),
    ],
    "export": ["CONFIG|CHECKPOINT", "[OUT | KEY=VALUE]...", "--step", "--base", "--dtype", "--alpha", "--overwrite"],
    "dial": ["CONFIG|RUN", "[KEY=VALUE]...", "--keep-general", "--json"],
    "report": ["CONFIG|RUN_DIR", "[KEY=VALUE]..."],
    "diagnose": ["CONFIG|RUN", "[KEY=VALUE]...", "--sequences", "--json"],
    "compare": [
        *("STUDY", "[KEY=VALUE]...", "--scale", "--only", "--cell", "--json"),
        *("--report", "--submit", "--dry-run", "--stop-on-failure"),
    ],
    "plan": [
        *("CONFIG", "[KEY=VALUE]...", "--gpus", "--gpu-memory", "--nodes", "--flops", "--bandwidth", "--json"),
        *("--link-bandwidth", "--efficiency", "--reserve"),
    ],
    "status": ["RUN|STUDY_DIR", "--json", "--watch"],
    "job": [
        *("CONFIG", "[KEY=VALUE]...", "--stage", "--list-stages", "--requeue-faults", "--fruitless-starts"),
    ],
    "show": ["CONFIG", "[KEY=VALUE]...", "--json"],
    "version": [],
    "delta": [],
    "delta pack": ["RUN|ADAPTED", "OUT", "--name", "--only", "--base", "--overwrite", "--json"],
    "delta apply": ["BASE", "PACKAGE...", "OUT", "--alpha", "--overwrite", "--json"],
    "delta strip": ["ADAPTED", "OUT", "--overwrite", "--json"],
}
"""Of each command, what its help must show."""

SUBCOMMANDS = {"": [name for name in TAKES if name and " " not in name], "delta": ["pack", "apply", "strip"]}


def commands(group: Any = None, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command with its full name, from the program itself."""
    group = group or typer.main.get_command(app)
    yield name, group
    for part, command in getattr(group, "commands", {}).items():
        yield from commands(command, f"{name} {part}".strip())


def help_of(name: str) -> str:
    """As a reader of a wide terminal sees it."""
    wide = {"COLUMNS": "400", "TERMINAL_WIDTH": "400"}
    process = RankProcess(["-m", "adept_ds", *name.split(), "--help"], rank_environment(0, 1, 0) | wide, ROOT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    return out


@pytest.mark.parametrize("name", TAKES)
def test_help_names_what_a_command_takes_in_either_form_and_explains_it(name: str) -> None:
    text = help_of(name)
    for word in TAKES[name]:
        assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text), word
    for command in SUBCOMMANDS.get(name, []):
        assert re.search(rf"^\W*{command} +\w", text, flags=re.MULTILINE), f"{command} has no explanation"


@pytest.mark.parametrize("name", TAKES)
def test_help_shows_an_example_of_that_very_command(name: str) -> None:
    _, found, example = help_of(name).partition("Example:")
    assert found
    assert re.match(rf"\s+(adept|deepspeed --module adept_ds) {name}", example), example


def test_every_command_stands_in_these_tables() -> None:
    assert {name for name, _ in commands()} == TAKES.keys()
    for name, command in commands():
        options = {option for p in command.params for option in (*p.opts, *p.secondary_opts) if option.startswith("-")}
        assert options == {word for word in TAKES[name] if word.startswith("-")}, name


def test_every_option_and_argument_has_a_word_of_explanation() -> None:
    for name, command in commands():
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.name}"


def test_every_example_is_one_that_the_command_line_takes() -> None:
    """Read as it would be typed: an option that does not exist, or an argument too few, is an error."""
    for name, command in commands():
        examples = (command.epilog or "").removeprefix("Example:").split("·")
        for example in filter(None, map(str.strip, examples)):
            words = shlex.split(example.replace("deepspeed --module adept_ds", "adept"))[1:]
            typed = typer.main.get_command(app)
            while words and words[0] in getattr(typed, "commands", {}):
                typed = typed.commands[words.pop(0)]  # type: ignore[attr-defined]
            typed.make_context(name, words)
