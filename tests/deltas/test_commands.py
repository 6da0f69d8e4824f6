"""`adept delta` does it, and refuses in one line."""

from __future__ import annotations

import json
from pathlib import Path

from harness.domains import Domains, content, run_dir
from harness.launching import adept

from adept_ds.deltas.package import Package


def test_the_commands_do_it_and_refuse_with_code_2_and_one_line(llama: Domains, tmp_path: Path) -> None:
    run = run_dir(llama, tmp_path / "math")

    def done(*arguments: str | Path) -> str:
        result = adept(1, "delta", *arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    found = json.loads(done("pack", run, tmp_path / "d_math", "--base", llama.base, "--json"))
    assert (found["name"], found["metrics"]["losses"]["adapted"]["domain"]) == ("math", 2.5)
    assert found["fingerprint"] == Package.load(tmp_path / "d_math").manifest.fingerprint
    assert "copies of layers 1, 4" in done("pack", llama.law, tmp_path / "d_law", "--name", "law")
    said = done("apply", llama.base, tmp_path / "d_law", tmp_path / "d_math", tmp_path / "both")
    assert "5 + 4 layers" in said and "law at 2, 8; math at 3, 6" in said
    assert json.loads(done("strip", tmp_path / "both", tmp_path / "back", "--json"))["num_bytes"] > 0
    assert content(tmp_path / "back") == content(llama.base)
    for words, arguments in (
        (
            ["OUT", "d_law' was written by `adept delta pack`"],
            ["apply", llama.base, tmp_path / "d_math", tmp_path / "d_law"],
        ),  # OUT forgotten
        (["another base"], ["apply", llama.law, tmp_path / "d_math", tmp_path / "new"]),
    ):
        result = adept(1, "delta", *arguments)
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("adept: ")
        assert all(word in result.stderr for word in words), result.stderr
    assert not (tmp_path / "new").exists() and (tmp_path / "d_law" / "delta.json").is_file()
