"""Methods are found, not listed: the file of CONTRIBUTING.md is one more, and docs/methods.md knows all there are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness.finished_run import Finished
from harness.launching import ROOT, free_port, rank_environment
from harness.workspace import Workspace
from safetensors.torch import load_file

from adept_ds.base.files import read_json
from adept_ds.base.run_dir import RunDirectory
from adept_ds.config.known_methods import DEFAULT_METHOD, known_methods

METHODS = known_methods()


def in_copy(site: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`adept ARGUMENTS` by the copy of the package in `site`."""
    environment = rank_environment(0, 1, free_port())
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), environment.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "adept_ds", *map(str, arguments)]
    return subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_a_method_is_one_file(workspace: Workspace, tmp_path: Path) -> None:
    """As the guide has it: the tiny model trains with it, is exported, and the rest of it keeps every bit."""
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (method,) = (text for text in re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL) if "(Method)" in text)
    shutil.copytree(ROOT / "adept_ds", tmp_path / "adept_ds", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "adept_ds" / "methods" / "norms.py").write_text(method)
    tree = workspace.tree(tmp_path / "run", method={"name": "norms", "last_rate": 0.0}, train={"steps": 2})
    del tree["expand"], tree["importance"], tree["data"]["general_eval"], tree["data"]["domain_eval"]
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(tree))
    result = in_copy(tmp_path, "run", config)
    assert result.returncode == 0, result.stderr
    before, after = load_file(workspace.model / "model.safetensors"), Finished(tmp_path / "run").weights()
    moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert moved == {name for name in before if "layernorm" in name}
    summary = read_json(RunDirectory(tmp_path / "run").summary)
    assert summary["method"] == "norms"
    assert summary["trainable_parameters"] == sum(before[name].numel() for name in before if "norm" in name)
    refused = in_copy(tmp_path, "run", config, "method={name: norms, last_rate: -1}")
    assert refused.returncode == 2
    assert "method.last_rate: -1" in refused.stderr


def test_the_default_comes_first_and_every_name_is_its_files() -> None:
    assert next(iter(METHODS)) == DEFAULT_METHOD
    assert {name: kind.__module__.rpartition(".")[2] for name, kind in METHODS.items()} == {
        name: name for name in METHODS
    }


@pytest.mark.parametrize("name", sorted(METHODS))
def test_docs_tell_every_method_its_keys_and_how_it_is_dialled(name: str) -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    (row,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
    keys = METHODS[name].model_fields.keys() - {"name"}
    assert keys == set(re.findall(r"`(\w+)`", row.split("|")[4]))
    assert METHODS[name].model_validate({"name": name}).dial in row.split("|")[6]  # type: ignore[attr-defined]
    assert " ".join((METHODS[name].__doc__ or "").split())
