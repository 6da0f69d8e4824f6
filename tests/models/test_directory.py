"""A model as a directory: what its configuration says, and what is refused before weights are read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from adept_ds.base.errors import InputError
from adept_ds.base.files import write_json
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.family_table import FAMILIES

LLAMA = {"model_type": "llama", "num_hidden_layers": 5, "vocab_size": 262}


def made_up_model(directory: Path, weights: str = "model.safetensors", **config: Any) -> Path:
    """Nothing reads the weights."""
    directory.mkdir(parents=True)
    write_json(directory / "config.json", LLAMA | config)
    (directory / weights).touch()
    return directory


def test_a_model_is_what_its_configuration_says(tmp_path: Path) -> None:
    path = made_up_model(tmp_path / "model")
    found = ModelDirectory.resolve("model", str(path))
    assert found == ModelDirectory.read(path) == ModelDirectory(path, LLAMA, FAMILIES["llama"], 5)
    gpt2 = made_up_model(tmp_path / "gpt2", model_type="gpt2", n_layer=7)
    assert ModelDirectory.read(gpt2).num_layers == 7, "each architecture counts its layers under a key of its own"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, r"config\.json' cannot be read \(.*No such file.*\); give a complete model"),
        ('{"model_type": "lla', r"config\.json' cannot be read \(.*\); give a complete model"),
        ("[3]", r"config\.json' holds no JSON object; give a complete model"),
        (json.dumps({"model_type": "llama"}), r"config\.json' has num_hidden_layers=None; give a complete model"),
        (json.dumps(LLAMA | {"num_hidden_layers": 0}), r"config\.json' has num_hidden_layers=0; give a complete model"),
        (json.dumps(LLAMA | {"num_hidden_layers": "5"}), r"config\.json' has num_hidden_layers='5'; give a complete"),
    ],
)
def test_a_configuration_that_is_missing_or_damaged_is_refused_in_one_line(
    tmp_path: Path, text: str | None, words: str
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=f"^model: '.*{words}") as refusal:
        ModelDirectory.read(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_refused_unless_others_lie_beside_them(tmp_path: Path, weights: str) -> None:
    path = made_up_model(tmp_path / "model", weights)
    with pytest.raises(InputError, match=rf"^probe\.stability\.model: .* pickled weights \({re.escape(weights)}\)"):
        ModelDirectory.resolve("probe.stability.model", str(path))
    (path / "model.safetensors").touch()
    assert ModelDirectory.resolve("model", str(path)).num_layers == 5


def test_a_directory_that_holds_no_model_is_refused_by_the_key_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused = {"empty": "has no config.json", "no": "does not exist", "bare": r"has no \*\.safetensors weights"}
    (made_up_model(tmp_path / "bare") / "model.safetensors").unlink()
    for name, words in refused.items():
        with pytest.raises(InputError, match=f"^model: '.*/{name}' {words}; give a"):
            ModelDirectory.resolve("model", str(tmp_path / name))


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[str, ...]]]:
    """A hub that has `owner/good`: what it is asked for, and what it is asked not to send."""
    seen: list[tuple[str, tuple[str, ...]]] = []
    snapshot = made_up_model(tmp_path / "snapshot")

    def download(name: str, ignore_patterns: list[str]) -> str:
        seen.append((name, tuple(ignore_patterns)))
        if name != "owner/good":
            raise OSError("404 Client Error.\nRepository Not Found")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    return seen


def test_a_name_of_the_hub_is_its_snapshot_without_pickles(tmp_path: Path, asked: list[Any]) -> None:
    assert ModelDirectory.resolve("model", "owner/good").path == tmp_path / "snapshot"
    assert asked == [("owner/good", ("*.bin", "*.pt", "*.pth", "*.gguf"))]
    with pytest.raises(InputError, match=r"'owner/none' is no directory and not to be had .* \(404 .*Error\.\)$"):
        ModelDirectory.resolve("model", "owner/none")


def test_the_hub_is_asked_for_nothing_that_can_only_be_a_directory(
    tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up_model(tmp_path / "owner" / "good")
    assert ModelDirectory.resolve("model", "owner/good").path == Path("owner/good")
    for name in ("./none", "~/none", "none", "a/b/none", "/none"):
        with pytest.raises(InputError, match="does not exist"):
            ModelDirectory.resolve("model", name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="'owner/other' does not exist"):
        ModelDirectory.resolve("model", "owner/other")
    assert asked == []


def test_a_multimodal_model_is_refused_with_the_way_to_its_language_model(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}})
    with pytest.raises(InputError, match=r"'gemma3', which is not supported; .*'gemma3_text'.*save its language model"):
        ModelDirectory.read(tmp_path)


def test_an_unknown_architecture_is_refused_with_the_way_to_add_it(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "mamba"})
    with pytest.raises(InputError, match=r"'mamba', which is not supported; supported: .*CONTRIBUTING\.md"):
        ModelDirectory.read(tmp_path)
