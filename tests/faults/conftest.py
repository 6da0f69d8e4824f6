"""The table of faults: how many were injected, from how many a run recovered, and what was lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from harness.faults import INJECTED, RECOVERED, Fault, Undisturbed, undisturbed
from harness.workspace import Workspace
from rich.console import Console
from rich.table import Table


@pytest.fixture(scope="session")
def on_two_ranks(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return undisturbed(workspace, tmp_path_factory.mktemp("undisturbed2"), 2)


@pytest.fixture(scope="session")
def on_one_rank(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return undisturbed(workspace, tmp_path_factory.mktemp("undisturbed1"), 1)


@pytest.fixture
def fault(record_property: Callable[[str, object], None]) -> Fault:
    return Fault(record_property)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    lost: dict[str, list[int | None]] = {}
    for found in (dict(report.user_properties) for report in reports):
        if INJECTED in found:
            lost.setdefault(str(found[INJECTED]), []).append(found.get(RECOVERED))
    if not lost:
        return
    table = Table("fault", "injected", "recovered", "steps lost, at most", title="Faults")
    injected = recovered = 0
    for kind, of in sorted(lost.items()):
        steps = [count for count in of if count is not None]
        table.add_row(kind, str(len(of)), str(len(steps)), str(max(steps, default="-")))
        injected, recovered = injected + len(of), recovered + len(steps)
    table.add_section()
    table.add_row("all", str(injected), str(recovered), "")
    Console(width=100).print(table)
