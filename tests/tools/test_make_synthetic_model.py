"""The tool takes what its help says, and refuses the rest in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.domains import content
from harness.tool_runs import run_tool

from adept_ds.base.files import read_json

TOOL = "tools/make_synthetic_model.py"


def test_sizes_and_keys_are_written_as_one_says_them(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "out"), "--family", "gemma2", "--parameters", "0.3M", "--set", "sliding_window=16"]
    arguments += ["--set", "tie_word_embeddings=true", "--dtype", "float16", "--seed", "3"]
    result = run_tool(TOOL, *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("gemma2 of ") and f"in {tmp_path / 'out'}" in result.stdout
    config = read_json(tmp_path / "out" / "config.json")
    assert (config["sliding_window"], config["tie_word_embeddings"], config["dtype"]) == (16, True, "float16")
    before = content(tmp_path / "out")
    again = run_tool(TOOL, *arguments, "--overwrite")
    assert again.returncode == 0, again.stderr
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parameters", "many"], "--parameters: 'many' is no number; write for example 135M"),
        (["--set", "hidden_size"], "--set: 'hidden_size' is no KEY=VALUE"),
        (["--shard-gib", "0"], "--shard-gib: 0.0 is no size of a file"),
        (["--shard-gib", "nan"], "--shard-gib: nan is no size of a file"),
        (["--family", "bert"], "--family: 'bert' is none that is known"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path: Path, arguments: list[str], words: str) -> None:
    result = run_tool(TOOL, tmp_path / "out", *arguments)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    result = run_tool(TOOL, tmp_path, "--overwrite")
    assert result.returncode == 2 and "holds something that adept did not write ('notes.txt')" in result.stderr
    assert (tmp_path / "notes.txt").read_text() == "x"
