"""A mistake in a corpus is one line, before anything heavy is even imported."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.fresh_process import HEAVY, run_fresh
from harness.reading import json_lines, write_parquet
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.config.loading import parse_config
from adept_ds.run.prerequisites import check_texts

MISTAKES = {
    "other field": (json_lines("a", key="body"), "line 1: no 'text', only 'body'; set data.text_key"),
    "array": (b'[{"text": "a"}]', "is a JSON array; write one record on each line"),
    "UTF-16": ("words".encode("utf-16"), "is UTF-16; convert it"),
    "Latin-1": (b"caf\xe9", "is not UTF-8 text (byte 0xe9 in line 1); convert it"),
    "zip": (b"PK\x03\x04\0\0", "is a zip archive, not text"),
}


@pytest.mark.parametrize("key", ["data.domain", "data.replay", "data.general_eval", "data.domain_eval", "probe.corpus"])
@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_shows_in_whatever_is_read(workspace: Workspace, tmp_path: Path, key: str, kind: str) -> None:
    content, words = MISTAKES[kind]
    path = tmp_path / "corpus"
    path.write_bytes(content)
    section, name = key.split(".")
    config = parse_config(workspace.tree(tmp_path / "run", **{section: {name: [str(path)]}}))
    with pytest.raises(InputError) as refusal:
        check_texts(config, "run")
    assert str(refusal.value).startswith(f"{key}: '{path}' ")
    assert words in str(refusal.value)


@pytest.mark.parametrize("command", ["show", "run"])
def test_a_command_says_so_before_it_imports_torch(workspace: Workspace, tmp_path: Path, command: str) -> None:
    path = write_parquet(tmp_path / "corpus", {"body": ["a"]})
    config = workspace.config(tmp_path / "run", data={"domain": [str(path)]})
    ended = run_fresh(command, config)
    assert (ended.code, ended.loaded & HEAVY) == (2, set())
    (line,) = ended.err.splitlines()
    assert line.startswith(f"adept: data.domain: '{path}': no 'text', only 'body'")
    assert not (tmp_path / "run").exists()
