"""What is in a directory is said, with who trained what; a changed byte is found wherever hashes are recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.launching import adept, launch
from harness.models import save_tiny_model
from harness.tool_runs import run_tool
from harness.trained_run import train_two_steps
from harness.workspace import Workspace
from safetensors.torch import load_file

from adept_ds.base.run_dir import RunDirectory

TOOL = "tools/inspect_checkpoint.py"


@pytest.fixture(scope="module")
def trained(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return train_two_steps(workspace, tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    save_tiny_model(folder / "model")
    cells = ["some-zero0", "some-zero1", "some-zero3-full"]
    result = launch(2, ["-m", "harness.plain_worker", str(folder), "train", *cells])
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


def looked_at(path: Path, code: int = 0) -> list[dict[str, Any]]:
    result = run_tool(TOOL, path, "--json")
    assert result.returncode == code, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


def test_of_a_run_it_tells_models_and_checkpoints_apart(trained: RunDirectory, workspace: Workspace) -> None:
    found = {Path(each["path"]).name: each for each in looked_at(trained.root)}
    assert list(found) == ["expanded", "export", "step_2"]
    assert found["expanded"]["copies"] == found["export"]["copies"] == {"1": 0, "5": 3}
    assert found["expanded"]["fingerprint"] != found["export"]["fingerprint"]
    base = looked_at(workspace.model)[0]["fingerprint"]
    assert found["expanded"]["base_fingerprint"] == found["export"]["base_fingerprint"] == base
    step, files = found["step_2"], json.loads((trained.checkpoints / "step_2" / "manifest.json").read_text())["files"]
    exported = load_file(trained.export / "model.safetensors")
    copied = {index: [name for name in exported if f".layers.{index}." in name] for index in (1, 5)}
    assert step["by_layer"] == {
        f"layer {index}, a copy of {source}": {
            "tensors": len(copied[index]),
            "elements": sum(exported[name].numel() for name in copied[index]),
        }
        for index, source in {1: 0, 5: 3}.items()
    }
    training = step["training"]
    assert training["method"]["name"] == "adept"
    assert (training["step"], training["ranks"], training["zero_stage"]) == (2, 2, 3)
    assert training["start"] == found["expanded"]["fingerprint"]
    assert training["optimizer_state"] == ["exp_avg", "exp_avg_sq"]
    for rank in (0, 1):
        assert training["by_rank"][str(rank)] == sum(file["size"] for file in files.values() if file["rank"] == rank)
    assert step["proof"] == f"SHA-256 of {len(files)} files (manifest.json)"
    assert step["frozen"]["tensors"] == 0


def test_what_deepspeed_wrote_is_described_without_proofs(plain: Path) -> None:
    for cell, stage, frozen in (("some-zero0", 0, 0), ("some-zero1", 1, 0), ("some-zero3-full", 3, 30)):
        (found,) = looked_at(plain / cell)
        assert (found["kind"], found["proof"], found["damage"]) == ("checkpoint", None, None)
        assert found["training"]["zero_stage"] == stage
        assert found["training"]["ranks"] == (2 if stage else 1)
        assert found["frozen"]["tensors"] == frozen
        if stage:
            assert list(found["by_layer"]) == ["layer 1", "layer 3"]
            assert found["training"]["step"] == 2 and found["training"]["learning_rates"] == [0.01]


def test_universal_checkpoints_and_packages_are_known(trained: RunDirectory, plain: Path, tmp_path: Path) -> None:
    assert run_tool("tools/to_universal.py", plain / "some-zero1", tmp_path / "universal").returncode == 0
    (found,) = looked_at(tmp_path / "universal")
    (checkpoint,) = looked_at(plain / "some-zero1")
    assert (found["kind"], found["written_by"]) == ("universal checkpoint", "tools/to_universal.py")
    assert (found["trained"], found["by_layer"]) == (checkpoint["trained"], checkpoint["by_layer"])
    assert found["proof"] is not None
    assert adept(1, "delta", "pack", trained.root, tmp_path / "package").returncode == 0
    (package,) = looked_at(tmp_path / "package")
    assert (package["kind"], package["copies"]) == ("delta package", {"1": 0, "5": 3})


@pytest.mark.parametrize("place", ["expanded/model.safetensors", "export/config.json", "checkpoints/step_2/*optim*"])
def test_a_changed_byte_is_found_and_the_rest_is_still_described(
    trained: RunDirectory, tmp_path: Path, place: str
) -> None:
    shutil.copytree(trained.root, tmp_path / "run")
    file = min((tmp_path / "run").glob(place))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    found = looked_at(tmp_path / "run", code=2)
    damaged = [each for each in found if each["damage"]]
    assert len(found) == 3 and [Path(each["path"]) for each in damaged] == [file.parent]
    assert f"'{file}' is not as it was written" in damaged[0]["damage"]
    result = run_tool(TOOL, file.parent)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"inspect_checkpoint: '{file}' is not as it was written")


def test_it_says_all_that_in_words(trained: RunDirectory) -> None:
    result = run_tool(TOOL, trained.checkpoints)
    assert result.returncode == 0, result.stderr
    for words in (
        "adept, to step 2",
        "2 under ZeRO-3",
        "layer 5",
        "every byte is as it was written",
        "no model by itself",
    ):
        assert words in " ".join(result.stdout.split()), words


def test_what_is_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mp_rank_00_model_states.pt").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for path, words in {
        tmp_path: "cannot be read (",
        tmp_path / "empty": "holds no DeepSpeed checkpoint",
        tmp_path / "nowhere": "does not exist; give the directory of a run",
    }.items():
        result = run_tool(TOOL, path)
        assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
        assert words in result.stderr


def test_no_code_of_a_pickle_runs(plain: Path, tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.mkdir, (tmp_path / "canary",))

    shutil.copytree(plain / "some-zero1", tmp_path / "odd")
    file = tmp_path / "odd" / "step_2" / "mp_rank_00_model_states.pt"
    torch.save(torch.load(file, weights_only=False) | {"mine": Runs()}, file)
    result = run_tool(TOOL, tmp_path / "odd")
    assert result.returncode == 2 and "which is no data and could run code" in result.stderr
    assert not (tmp_path / "canary").exists()
