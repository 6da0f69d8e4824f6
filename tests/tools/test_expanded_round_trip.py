"""A model is expanded and given back, byte for byte, or nothing is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from harness.domains import content
from harness.models import save_tiny_model
from harness.tool_runs import run_tool
from harness.trained_run import train_two_steps
from harness.workspace import Workspace

from adept_ds.base.run_dir import RunDirectory
from adept_ds.weights.tensor_files import read_header

INSERT, REMOVE = "tools/hf_to_expanded.py", "tools/expanded_to_hf.py"


@pytest.fixture(scope="module")
def trained(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return train_two_steps(workspace, tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of several files, with experts, whose names differ from the model's."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    result = run_tool(
        *("tools/make_synthetic_model.py", folder, "--family", "mixtral", "--parameters", "300K"),
        *("--shard-gib", "0.0001", "--dtype", "float32"),
    )
    assert result.returncode == 0, result.stderr
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return folder


def refused(*arguments: object) -> str:
    result = run_tool(*arguments)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    (line,) = result.stderr.splitlines()
    return line


def test_there_and_back_is_the_same_bytes(sharded: Path, tmp_path: Path) -> None:
    result = run_tool(INSERT, sharded, tmp_path / "expanded", "--layers", "1,0")
    assert result.returncode == 0, result.stderr
    assert "tensors are what they must be, bit for bit" in result.stdout
    result = run_tool(REMOVE, tmp_path / "expanded", tmp_path / "back", "--base", sharded)
    assert result.returncode == 0, result.stderr
    assert content(tmp_path / "back") == content(sharded)
    assert "without copies of layers [0, 1]" in result.stdout
    assert result.stdout.rstrip().endswith("known by expansion.json and --base")


def test_a_run_knows_its_model_and_its_layers(trained: RunDirectory, workspace: Workspace, tmp_path: Path) -> None:
    result = run_tool(INSERT, trained.root, tmp_path / "expanded")
    assert result.returncode == 0, result.stderr
    assert content(tmp_path / "expanded") == content(trained.expanded)
    assert "5 + 2 layers" in result.stdout
    result = run_tool(REMOVE, trained.root, tmp_path / "back")
    assert result.returncode == 0, result.stderr
    assert content(tmp_path / "back") == content(workspace.model), "out of what was trained"


def test_what_is_damaged_or_of_another_base_is_not_given_back(
    trained: RunDirectory, workspace: Workspace, tmp_path: Path
) -> None:
    shutil.copytree(trained.expanded, tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert f"'{file}' is not as it was written" in refused(REMOVE, tmp_path / "damaged", tmp_path / "back")
    (tmp_path / "damaged" / ".adept_output.json").unlink()  # then the fingerprint shows what is the base's
    data[-1] ^= 1
    data[read_header(file)["model.layers.4.mlp.up_proj.weight"].start] ^= 1
    file.write_bytes(data)
    line = refused(REMOVE, tmp_path / "damaged", tmp_path / "back")
    assert "weights of its base are not those that it was made from" in line
    other = save_tiny_model(tmp_path / "other", hidden_size=22)
    line = refused(REMOVE, trained.export, tmp_path / "back", "--base", other)
    assert f"--base: '{trained.export}' does not stand on '{other}'" in line
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([INSERT, "{model}", "new"], "--layers is missing; say which layers"),
        ([INSERT, "{model}", "new", "--layers", "one"], "--layers: 'one' is no list of layers"),
        ([INSERT, "{model}", "new", "--layers", "9"], "9 is no layer of"),
        ([INSERT, "nowhere", "new", "--layers", "1"], "'nowhere' does not exist"),
        ([INSERT, "{model}", "{model}", "--layers", "1"], "is MODEL"),
        ([REMOVE, "{model}", "new"], "has no expansion.json, and so no copies to remove"),
        ([REMOVE, "{run}/checkpoints", "new"], "is a checkpoint, no model; make one of it with tools/zero_to_hf.py"),
        ([REMOVE, "nowhere", "new"], "'nowhere' does not exist"),
        ([REMOVE, "{run}", "{run}/expanded"], "was written by `adept expand`, not by `adept delta strip`"),
    ],
)
def test_mistakes_are_one_line(trained: RunDirectory, workspace: Workspace, arguments: list[str], words: str) -> None:
    assert words in refused(*(each.format(model=workspace.model, run=trained.root) for each in arguments))
    assert not Path("new").exists()
