"""`adept verify` finds whatever keeps an expanded model from being its source, and `--dry-run` writes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from harness.launching import adept
from harness.models import save_tiny_model
from safetensors.torch import load_file, save_file

from adept_ds.base.errors import InputError
from adept_ds.base.files import read_json, write_json
from adept_ds.weights import verification
from adept_ds.weights.expansion import describe_expansion, expand_checkpoint
from adept_ds.weights.verification import verify_expansion


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("verified") / "source", "qwen3")


@pytest.fixture
def expanded(source: Path, tmp_path: Path) -> Path:
    expand_checkpoint(source, tmp_path / "expanded", [1, 3])
    return tmp_path / "expanded"


def test_an_expanded_model_is_found_equal_by_bytes_and_by_logits(source: Path, expanded: Path) -> None:
    found = verify_expansion(source, expanded)
    assert found.logits
    assert found.tensors == len(load_file(expanded / "model.safetensors"))
    assert found.num_bytes == sum(t.nbytes for t in load_file(expanded / "model.safetensors").values())


def test_logits_are_left_out_where_memory_is_short(
    source: Path, expanded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adept_ds.models.device.free_host_memory_bytes", lambda: 1000)
    assert not verify_expansion(source, expanded).logits


def change_tensor(name: str) -> Callable[[Path], None]:
    """One element, by as little as there is."""

    def change(directory: Path) -> None:
        path = directory / "model.safetensors"
        tensors = load_file(path)
        tensors[name].view(-1)[-1] += 1e-6
        save_file(tensors, path, metadata={"format": "pt"})

    return change


def drop_tensor(directory: Path) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def change_record(file: str, **changes: object) -> Callable[[Path], None]:
    return lambda directory: write_json(directory / file, read_json(directory / file) | changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(change_tensor("model.layers.3.mlp.up_proj.weight"), "layers.3.mlp.up_proj", id="a kept layer"),
        pytest.param(change_tensor("model.layers.2.mlp.up_proj.weight"), "layers.2.mlp.up_proj", id="a copy"),
        pytest.param(change_tensor("model.layers.2.mlp.down_proj.weight"), "layers.2.mlp.down_proj", id="a zero"),
        pytest.param(change_tensor("lm_head.weight"), "lm_head", id="the head"),
        pytest.param(drop_tensor, "layers.2.mlp.up_proj", id="a tensor too few"),
        pytest.param(change_record("config.json", rms_norm_eps=1e-3), "rms_norm_eps", id="the configuration"),
        pytest.param(
            change_record("expansion.json", copies=[{"source": 1, "index": 3}, {"source": 3, "index": 5}]),
            "not above its source",
            id="the record",
        ),
    ],
)
def test_a_difference_is_named(source: Path, expanded: Path, change: Callable[[Path], None], words: str) -> None:
    change(expanded)
    with pytest.raises(InputError, match=words):
        verify_expansion(source, expanded, logits=False)


def test_logits_that_differ_are_reported_even_if_all_bytes_are_right(
    source: Path, expanded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the table of families named the wrong projections: bytes are as planned, the function is not."""
    change_tensor("model.layers.2.mlp.down_proj.weight")(expanded)
    with pytest.raises(InputError, match=r"logits of .* differ .* by up to"):
        verification._compare_logits(source, expanded)


def test_the_command_says_what_it_compared_and_fails_with_code_2(source: Path, expanded: Path) -> None:
    result = adept(1, "verify", source, expanded, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["logits"] is True
    change_tensor("lm_head.weight")(expanded)
    result = adept(1, "verify", source, expanded, "--json")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "lm_head.weight" in result.stderr


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    command = ["expand", source, tmp_path / "out", "--layers", "3,1"]
    result = adept(1, *command, "--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []
    facts = json.loads(result.stdout)
    assert facts == describe_expansion(source, tmp_path / "out", [1, 3])
    assert facts["copies"] == [{"source": 1, "index": 2}, {"source": 3, "index": 5}]
    assert adept(1, *command).returncode == 0
    tensors, before = (load_file(path / "model.safetensors") for path in (tmp_path / "out", source))
    assert facts["source_parameters"] == sum(tensor.numel() for tensor in before.values())
    assert facts["added_bytes"] == sum(t.nbytes for t in tensors.values()) - sum(t.nbytes for t in before.values())
    shutil.rmtree(tmp_path / "out")
