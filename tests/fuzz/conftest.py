"""What is mutated: small valid inputs of every kind, made once; and the table of what became of the mutations."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest
from harness.fuzzing import Fuzzing, Kind, Sandbox, check_depth, fuzz
from harness.workspace import Workspace
from rich.console import Console
from rich.table import Table

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "8"))
"""Inputs of each kind, before its weight; `make test-fuzz` says how many are thrown in all."""

_FULL = 200
"""From so many on, every kind must have been accepted, and have met its different refusals."""

_ROW = "fuzz"


@pytest.fixture(scope="module")
def sandbox(request: pytest.FixtureRequest, workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    """With a model, corpora and the configuration of a run on them, and what the module prepares."""
    sandbox = Sandbox.make(tmp_path_factory.mktemp("sandbox"))
    shutil.copytree(workspace.root, sandbox.inputs, dirs_exist_ok=True)
    prepare: Callable[[Sandbox], object] = request.module.prepare
    prepare(sandbox)
    return sandbox


@pytest.fixture
def fuzzing(record_property: Callable[[str, object], None]) -> Fuzzing:
    def judge(kind: Kind, sandbox: Sandbox) -> None:
        tally = fuzz(kind, sandbox, EXAMPLES)
        record_property(_ROW, tally.as_row())
        if EXAMPLES >= _FULL:
            check_depth(kind, tally)

    return judge


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    rows = [value for report in reports for name, value in report.user_properties if name == _ROW]
    if not rows:
        return
    table = Table("kind", "inputs", "accepted", "refused", "different refusals", title="What became of the mutations")
    for row in sorted(rows):
        table.add_row(*map(str, row))
    table.add_section()
    table.add_row("all", *(str(sum(row[column] for row in rows)) for column in range(1, 4)), "")
    Console(width=100).print(table)
