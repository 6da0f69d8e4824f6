"""Tests on real clusters: `make test-cluster`, as root. They end with a table of what was tried, and how long it took.

A test says what it tries by its name; of how many ranks, and what came out beyond that it passed, by

    record_property("ranks", 2)
    record_property("result", "requeued once, the same to the last bit")
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            if os.geteuid():
                item.add_marker(pytest.mark.skip(reason="starts daemons of the system, which needs root"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    table = Table("scenario", "ranks", "seconds", "result", title="Clusters")
    for report in [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]:
        if report.when == "call" and "cluster" in report.keywords:
            found = dict(report.user_properties)
            name, _, case = report.nodeid.rpartition("::")[2].removeprefix("test_").partition("[")
            name = name.replace("_", " ") + (f" ({case.removesuffix(']')})" if case else "")
            result = found.get("result", "passed") if report.passed else "failed"
            table.add_row(name, str(found.get("ranks", "")), f"{report.duration:.0f}", str(result))
    if table.rows:
        Console(width=140).print(table)
