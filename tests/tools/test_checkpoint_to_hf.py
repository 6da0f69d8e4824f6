"""Training checkpoints become Hugging Face models or single files, which are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import checkpoint_to_hf
import pytest
import torch
from harness.tool_runs import run_tool
from harness.trained_run import train_two_steps
from harness.workspace import Workspace
from safetensors.torch import load_file

from adept_ds.base.errors import InputError
from adept_ds.base.run_dir import RunDirectory, checkpoint_tag


@pytest.fixture(scope="module")
def trained(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return train_two_steps(workspace, tmp_path_factory.mktemp("trained") / "run")


def test_converter_writes_the_model_that_export_writes(trained: RunDirectory, tmp_path: Path) -> None:
    checkpoint = trained.checkpoints / checkpoint_tag(2)
    result = run_tool("tools/checkpoint_to_hf.py", checkpoint, tmp_path / "hf", "--base", trained.expanded)
    assert result.returncode == 0, result.stderr
    mine, exported = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", trained.export))
    assert mine.keys() == exported.keys()
    assert all(torch.equal(mine[name], exported[name]) for name in mine)
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


def test_converter_reads_raw_deepspeed_output(trained: RunDirectory, tmp_path: Path) -> None:
    """The directory that DeepSpeed wrote, without a base: just the trained tensors, as in the exported model."""
    result = run_tool("tools/checkpoint_to_hf.py", trained.checkpoints, tmp_path / "trained.safetensors")
    assert result.returncode == 0, result.stderr
    tensors, exported = load_file(tmp_path / "trained.safetensors"), load_file(trained.export / "model.safetensors")
    assert {name.split(".")[2] for name in tensors} == {"1", "5"}
    assert all(torch.equal(tensor, exported[name]) for name, tensor in tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["trained.safetensors"]


def test_converter_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    result = run_tool("tools/checkpoint_to_hf.py", tmp_path, tmp_path / "out.safetensors")
    assert result.returncode == 2
    assert "holds no DeepSpeed checkpoint" in result.stderr
    assert list(tmp_path.iterdir()) == []


def three_tensors(_: Path) -> dict[str, torch.Tensor]:
    """Instead of a checkpoint's; two share memory, as tied parameters do."""
    weight = torch.arange(6.0).view(2, 3)
    return {"weight": weight, "tied": weight, "norm": torch.ones(3)}


def test_a_file_is_synced_before_it_takes_its_name_and_its_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, events = tmp_path / "out.safetensors", list[str]()
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        events.append(f"sync {'directory' if os.path.samestat(os.fstat(descriptor), tmp_path.stat()) else 'file'}")
        real_fsync(descriptor)

    def replace(self: Path, target: Any) -> Path:
        events.append("rename")
        assert load_file(self).keys() == {"weight", "tied", "norm"}
        assert not out.exists()
        return real_replace(self, target)

    monkeypatch.setattr(checkpoint_to_hf, "read_zero_checkpoint", three_tensors)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    checkpoint_to_hf.convert(tmp_path, out, None, "source")
    assert events == ["sync file", "rename", "sync directory"]
    assert torch.equal(load_file(out)["tied"], torch.arange(6.0).view(2, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.safetensors"

    def interrupted(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_to_hf, "read_zero_checkpoint", three_tensors)
    monkeypatch.setattr(checkpoint_to_hf, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint_to_hf.convert(tmp_path, out, None, "source")
    assert not list(tmp_path.iterdir())


def test_a_file_that_exists_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a model, for example."""
    out = tmp_path / "model.safetensors"
    out.write_bytes(b"old")
    monkeypatch.setattr(checkpoint_to_hf, "read_zero_checkpoint", three_tensors)
    for overwrite in (False, True):
        with pytest.raises(InputError, match=f"^OUT: '{out}' exists; give the name of a new file$"):
            checkpoint_to_hf.convert(tmp_path, out, None, "source", overwrite=overwrite)
    assert out.read_bytes() == b"old"
