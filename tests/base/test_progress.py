"""Progress goes from nothing to all, whatever it counts, and is seldom a line in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from adept_ds.base import progress as progress_module
from adept_ds.base.progress import Meter, ProgressBar


class Seen:
    def __init__(self) -> None:
        self.shares: list[float] = []
        self.texts: list[str] = []

    def __call__(self, share: float, text: str) -> None:
        self.shares.append(share)
        self.texts.append(text)


def test_bytes_of_several_works_are_one_progress() -> None:
    seen = Seen()
    meter = Meter(40, seen)
    meter.advance(10, "reading")
    meter.advance(10)
    rest = meter.rest()
    for share in (0.0, 0.5, 1.0):
        rest(share, "writing")
    assert seen.shares == [0.25, 0.5, 0.5, 0.75, 1.0]
    assert seen.texts == ["reading", "", "writing", "writing", "writing"]


def test_more_bytes_than_were_expected_are_not_more_than_all() -> None:
    seen = Seen()
    meter = Meter(10, seen)
    meter.advance(25)
    meter.rest()(0.5, "")
    assert seen.shares == [1.0, 1.0]


def test_nothing_to_do_and_nobody_to_tell_is_no_mistake() -> None:
    seen = Seen()
    Meter(0, seen).advance(0)
    assert seen.shares == [0.0]
    meter = Meter(10, None)
    meter.advance(5)
    meter.rest()(0.5, "")


def bar_in_a_log(silent: bool) -> tuple[ProgressBar, io.StringIO]:
    out = io.StringIO()
    return ProgressBar("packing", Console(file=out, width=120, _environ={}), silent), out


def test_without_a_terminal_progress_is_a_line_every_quarter_of_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    bar, out = bar_in_a_log(silent=False)
    for second in range(1, 41):
        now = 100.0 + second
        bar(second / 40, f"second {second}")
    bar.close()
    assert out.getvalue().splitlines() == ["  packing  38%  second 15", "  packing  75%  second 30"]


def test_a_silent_bar_says_nothing_however_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    bar, out = bar_in_a_log(silent=True)
    now = 1000.0
    bar(0.5, "half")
    bar.close()
    assert out.getvalue() == ""


def test_on_a_terminal_a_bar_moves_and_is_gone_when_it_is_closed() -> None:
    out = io.StringIO()
    bar = ProgressBar("packing", Console(file=out, force_terminal=True, width=120, _environ={"TERM": "xterm"}), False)
    bar(0.5, "half")
    assert bar._bar is not None
    assert bar._bar.tasks[0].percentage == 50
    bar.close()
    bar.close()
    assert "packing" in out.getvalue()
    assert out.getvalue().endswith("\x1b[1A\x1b[2K"), "its line was wiped out"
