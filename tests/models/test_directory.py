"""A model as a directory: what its configuration says, and what is refused before weights are read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from harness.models import save_tiny_model

from adept_ds.base.errors import InputError
from adept_ds.base.files import write_json
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.family_table import FAMILIES

LLAMA = {"model_type": "llama", "num_hidden_layers": 5, "vocab_size": 262}


def test_a_model_is_what_its_configuration_says(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "model")
    found = ModelDirectory.resolve("model", str(path))
    config = json.loads((path / "config.json").read_text())
    assert found == ModelDirectory.read(path) == ModelDirectory(path, config, FAMILIES["llama"], 5)
    gpt2 = save_tiny_model(tmp_path / "gpt2", "gpt2", num_hidden_layers=7, n_layer=7)
    assert ModelDirectory.read(gpt2).num_layers == 7, "each architecture counts its layers under a key of its own"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, r"config\.json' cannot be read \(.*No such file.*\); give a complete model"),
        ('{"model_type": "lla', r"config\.json' cannot be read \(.*\); give a complete model"),
        ("[3]", r"config\.json' holds no JSON object; give a complete model"),
        ("[" * 100_000, r"config\.json' cannot be read \(.*\); give a complete model"),
        ('{"vocab_size": ' + "9" * 5000 + "}", r"config\.json' cannot be read \(.*\); give a complete model"),
        ("\ufeff{}", r"config\.json' cannot be read \(.*BOM.*\); give a complete model"),
        (json.dumps({"model_type": "llama"}), r"config\.json' has num_hidden_layers=None, which is no whole number"),
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
    path = save_tiny_model(tmp_path / "model")
    (path / "model.safetensors").rename(path / weights)
    with pytest.raises(InputError, match=rf"^probe\.stability\.model: .* pickled weights \({re.escape(weights)}\)"):
        ModelDirectory.resolve("probe.stability.model", str(path))
    (path / weights).rename(path / "model.safetensors")
    (path / weights).touch()
    assert ModelDirectory.resolve("model", str(path)).num_layers == 5


def test_a_directory_that_holds_no_model_is_refused_by_the_key_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused = {"empty": "has no config.json", "no": "does not exist", "bare": r"has no \*\.safetensors weights"}
    (save_tiny_model(tmp_path / "bare") / "model.safetensors").unlink()
    for name, words in refused.items():
        with pytest.raises(InputError, match=f"^model: '.*/{name}' {words}; give a"):
            ModelDirectory.resolve("model", str(tmp_path / name))


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[str, ...]]]:
    """A hub that has `owner/good`: what it is asked for, and what it is asked not to send."""
    seen: list[tuple[str, tuple[str, ...]]] = []
    snapshot = save_tiny_model(tmp_path / "snapshot")

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
    save_tiny_model(tmp_path / "owner" / "good")
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


COUNT, FLAG, NUMBER = "whole number above 0", "true or false", "number above 0"
BAD_VALUES: list[tuple[str, Any, str]] = [
    *zip(["num_hidden_layers"] * 8, [0, -1, "5", 5.0, True, None, [5], 1 << 40], [COUNT] * 8, strict=True),
    *zip(["vocab_size"] * 7, ["600", 262.0, -262, 0, True, [262], {}], [COUNT] * 7, strict=True),
    *((key, "x", COUNT) for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")),
    *((key, -1, COUNT) for key in ("intermediate_size", "head_dim", "max_position_embeddings")),
    *zip(["tie_word_embeddings"] * 4, ["false", 0, 1, []], [FLAG] * 4, strict=True),
    *zip(["rms_norm_eps"] * 5, ["1e-5", True, 0, float("nan"), float("inf")], [NUMBER] * 5, strict=True),
    ("layer_types", ["full"] * 4, "list of 5 entries"),
    ("layer_types", "full", "list of 5 entries"),
]


@pytest.mark.parametrize(("key", "value", "what"), BAD_VALUES)
def test_a_value_of_another_type_is_refused_by_its_key(tmp_path: Path, key: str, value: Any, what: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {key: value}))
    words = f"config.json' has {key}={value!r}, which is no {what}; give a complete model"
    with pytest.raises(InputError, match=f"^model: '.*{re.escape(words)}$"):
        ModelDirectory.read(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("gpt2", "n_layer", "5"),
        ("gemma2", "final_logit_softcapping", "30"),
        ("granite", "logits_scaling", 0),
        ("qwen3_moe", "mlp_only_layers", 3),
        ("qwen3_moe", "mlp_only_layers", ["3"]),
        ("qwen3_moe", "decoder_sparse_step", 0),
        ("smollm3", "no_rope_layers", [1]),
    ],
)
def test_what_only_one_family_has_is_looked_at_too(tmp_path: Path, model_type: str, key: str, value: Any) -> None:
    write_json(tmp_path / "config.json", {"model_type": model_type, "num_hidden_layers": 5, "n_layer": 5, key: value})
    with pytest.raises(InputError, match=re.escape(f"has {key}={value!r}, which is no ")):
        ModelDirectory.read(tmp_path)


def test_keys_that_are_null_are_derived_as_ever(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", LLAMA | {"head_dim": None, "num_key_value_heads": None, "layer_types": None})
    assert ModelDirectory.read(tmp_path).num_layers == 5


@pytest.mark.parametrize(
    ("section", "method"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "'fp8'"),
        ({"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ({"quant_method": "awq", "bits": 4}, "'awq'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
        ({"quant_method": "mxfp4"}, "'mxfp4'"),
        ({"load_in_8bit": True}, "None"),
        ("fp8", "None"),
    ],
)
def test_a_quantised_base_is_refused_with_what_to_do(tmp_path: Path, section: Any, method: str) -> None:
    write_json(tmp_path / "config.json", LLAMA | {"quantization_config": section})
    words = (
        rf"quantization_config \(quant_method={method}\), .*; give the unquantised checkpoint, or dequantise .* save it"
    )
    with pytest.raises(InputError, match=words):
        ModelDirectory.read(tmp_path)


def test_weights_in_a_file_that_only_the_configuration_names_are_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", LLAMA | {"transformers_weights": "../x.safetensors"})
    with pytest.raises(InputError, match=r"transformers_weights='\.\./x\.safetensors', .* save it and give"):
        ModelDirectory.read(tmp_path)


def test_an_unknown_architecture_is_refused_with_the_way_to_add_it(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "mamba"})
    with pytest.raises(InputError, match=r"'mamba', which is not supported; supported: .*CONTRIBUTING\.md"):
        ModelDirectory.read(tmp_path)
