"""The terminal belongs to rank 0's own words; all that libraries print goes to a file."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

from harness.launching import ROOT

from adept_ds.base.terminal import Terminal

NOISY = """
import os, subprocess, sys, warnings
from pathlib import Path
from adept_ds.base.terminal import capture_output

print("before")
with capture_output(Path(sys.argv[1]), is_main=sys.argv[2] == "main") as terminal:
    print("a library")
    print("its complaint", file=sys.stderr)
    os.write(1, b"a library in C\\n")
    subprocess.run([sys.executable, "-c", "print('its child')"])
    warnings.warn("a warning")
    terminal.stage("probe", "a stage")
    terminal.say("own words")
print("after")
print("after, too", file=sys.stderr)
"""


def noisy(log: Path, rank: str) -> tuple[list[str], list[str], str]:
    """Lines on stdout and on stderr, and what is in the log."""
    command = [sys.executable, "-c", NOISY, str(log), rank]
    plain = {key: value for key, value in os.environ.items() if key != "FORCE_COLOR"}
    result = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, check=True)
    return result.stdout.splitlines(), result.stderr.splitlines(), log.read_text()


def test_what_libraries_and_their_children_print_goes_to_the_log(tmp_path: Path) -> None:
    out, err, log = noisy(tmp_path / "logs" / "rank_0.log", "main")
    assert [line.rstrip() for line in out] == ["before", "probe    a stage", "own words", "after"]
    assert err == ["after, too"]
    for words in ("a library\n", "its complaint\n", "a library in C\n", "its child\n", "UserWarning: a warning\n"):
        assert words in log
    assert "own words" not in log and "after" not in log


def test_other_ranks_keep_silent(tmp_path: Path) -> None:
    out, err, log = noisy(tmp_path / "rank_1.log", "other")
    assert (out, err) == (["before", "after"], ["after, too"])
    assert "a library\n" in log and "own words" not in log


def test_a_log_is_added_to(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("yesterday\n")
    noisy(tmp_path / "log", "main")
    assert (tmp_path / "log").read_text().startswith("yesterday\n")


def test_words_are_said_as_they_are() -> None:
    """No markup, no line breaks, no pictures: a path may have brackets, colons and any length."""
    out = io.StringIO()
    text = "[bold]" + "x" * 300 + " 3.5 'a/[b].txt' 'shard:100:of:200'"
    Terminal(out).say(text)
    assert out.getvalue() == text + "\n"


def test_a_muted_terminal_says_only_what_it_is_asked_for() -> None:
    out = io.StringIO()
    terminal = Terminal(out)
    terminal.mute()
    terminal.stage("probe", "a stage")
    with terminal.progress("packing") as bar:
        bar(0.5, "half")
    terminal.say('{"json": 1}')
    assert out.getvalue() == '{"json": 1}\n'


def test_a_name_that_is_no_text_is_said_all_the_same() -> None:
    """As Python has the name of a file that is Latin-1 on the disk; and on a terminal that knows ASCII alone."""
    for encoding, shown in (("utf-8", "caf\\udce9 \u00e9\n"), ("ascii", "caf\\udce9 \\xe9\n")):
        out = io.BytesIO()
        stream = io.TextIOWrapper(out, encoding=encoding)
        Terminal(stream).say("caf\udce9 \u00e9")
        stream.flush()
        assert out.getvalue().decode(encoding) == shown
