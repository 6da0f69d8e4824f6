"""What a directory lacks, or has too much of, is said from its headers alone; `test_loading` asks transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.families import MOSTLY_SLOW_FAMILIES
from harness.incomplete import Change, holding, save_tensors, with_tensors, without
from harness.launching import ROOT
from harness.models import FAMILY_OPTIONS, VOCABULARY, save_tiny_model
from harness.spoiling import changed_json
from safetensors.torch import load_file

from adept_ds.base.errors import InputError
from adept_ds.models.completeness import complete_weights
from adept_ds.models.directory import ModelDirectory
from adept_ds.weights.expansion import expand_checkpoint

COMPARABLE: dict[str, dict[str, Any]] = {"qwen3_moe": {"decoder_sparse_step": 2}}
"""With one layer of experts alone, nothing says what else it should have."""


@pytest.fixture(scope="module", params=sorted(FAMILY_OPTIONS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = COMPARABLE.get(request.param, {})
    return save_tiny_model(tmp_path_factory.mktemp(request.param) / "model", request.param, **options)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("qwen3") / "model", "qwen3")


def refuse(path: Path, *words: str) -> None:
    """By what resolves a model, and by what expands it, in one line."""
    for read in (
        lambda: ModelDirectory.resolve("model", str(path)),
        lambda: expand_checkpoint(path, path.parent / "out", [1]),
    ):
        with pytest.raises(InputError) as refusal:
            read()
        message = str(refusal.value)
        assert "\n" not in message and message.startswith("model: ")
        for word in (*words, f"'{path}'"):
            assert word in message, message
    assert not (path.parent / "out").exists()


# --- every family --------------------------------------------------------------------------------------------------


def test_what_every_family_saves_is_complete(model: Path) -> None:
    found = complete_weights(ModelDirectory.read(model))
    assert [file.name for file in found] == ["model.safetensors"]
    assert {name for entries in found.values() for name in entries} == load_file(model / "model.safetensors").keys()


@pytest.mark.parametrize("model", MOSTLY_SLOW_FAMILIES, indirect=True)
def test_every_single_tensor_is_missed(model: Path, tmp_path: Path) -> None:
    copy = with_tensors(model, tmp_path / "model", lambda _: None)
    tensors, directory = load_file(model / "model.safetensors"), ModelDirectory.read(copy)
    assert len(tensors) > 30
    for name in tensors:
        save_tensors(copy, {other: tensor for other, tensor in tensors.items() if other != name})
        with pytest.raises(InputError, match=f"lacks '{name}'"):
            complete_weights(directory)


def test_every_single_tensor_of_a_layer_is_held_against_those_of_others(model: Path, tmp_path: Path) -> None:
    copy = with_tensors(model, tmp_path / "model", lambda _: None)
    tensors, directory = load_file(model / "model.safetensors"), ModelDirectory.read(copy)
    layers = {name for name in tensors if (place := directory.family.split_name(name)) and place[0] == 4}
    for name in layers:
        save_tensors(copy, tensors | {name: torch.zeros(1000, *tensors[name].shape[1:])})
        if any(name.replace(".4.", f".{layer}.", 1) in tensors for layer in range(4)):
            with pytest.raises(InputError, match=f"holds '{name}' of shape "):
                complete_weights(directory)


@pytest.mark.parametrize("layers", [4, 6])
def test_a_configuration_of_other_layers_is_refused(model: Path, tmp_path: Path, layers: int) -> None:
    copy = with_tensors(model, tmp_path / "model", lambda _: None)
    family = ModelDirectory.read(model).family
    per_layer = dict.fromkeys(family.per_layer_config)
    change = {family.layer_count_key: layers, **per_layer}
    changed_json(copy / "config.json", lambda tree: tree.update(change))
    place = f"{family.layers}.{min(layers, 5)}."
    words = [f"lacks '{place}"] if layers > 5 else ["holds '", ".4.", f"says {family.layer_count_key}=4", "config.json"]
    refuse(copy, *words)


def test_names_without_the_first_component_are_those_of_a_base_model(model: Path, tmp_path: Path) -> None:
    """As `AutoModel.save_pretrained` writes them."""
    config = ModelDirectory.read(model).config
    if config.get("tie_word_embeddings") is False:
        pytest.skip("a base model has no head")

    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.partition(".")[2]] = tensors.pop(name)

    copy = with_tensors(model, tmp_path / "model", shorten)
    assert complete_weights(ModelDirectory.read(copy))
    with_tensors(copy, copy, without(next(name for name in load_file(copy / "model.safetensors") if ".3." in name)))
    refuse(copy, "lacks '", ".3.")


# --- one family ----------------------------------------------------------------------------------------------------


DOWN = "model.layers.3.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(without("lm_head.weight"), ["lacks 'lm_head.weight'", "tie_word_embeddings=false"], id="head"),
        pytest.param(without(DOWN), [f"lacks '{DOWN}'", "random numbers"], id="down_proj"),
        pytest.param(holding(DOWN, 20, 36), [f"holds '{DOWN}' of shape (20, 36)", "other layers (20, 37)"], id="shape"),
        pytest.param(holding(DOWN, 37, 20), [f"holds '{DOWN}' of shape (37, 20)"], id="transposed"),
        pytest.param(holding("layers.3.mlp.down_proj.weight", 20, 37), ["both", f"'{DOWN}'", "are one"], id="twice"),
        pytest.param(
            holding("model.layers.5.mlp.up_proj.weight", 37, 20),
            ["holds 'model.layers.5.mlp.up_proj.weight'", "num_hidden_layers=5"],
            id="a layer too many",
        ),
        pytest.param(
            holding("model.embed_tokens.weight", VOCABULARY - 1, 20),
            ["holds 'model.embed_tokens.weight' of shape (261, 20)", "vocab_size=262"],
            id="embedding",
        ),
        pytest.param(
            holding("lm_head.weight", VOCABULARY + 2, 20),
            ["holds 'lm_head.weight'", "vocab_size=262"],
            id="rows of head",
        ),
    ],
)
def test_the_tensor_is_named(qwen3: Path, tmp_path: Path, change: Change, words: list[str]) -> None:
    refuse(with_tensors(qwen3, tmp_path / "model", change), *words)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (holding(DOWN, 20, 37, dtype=torch.float8_e4m3fn), DOWN),
        (holding(DOWN, 20, 37, dtype=torch.float8_e5m2), DOWN),
        (holding(DOWN, 20, 37, dtype=torch.int8), DOWN),
        (holding(DOWN, 740, 1, dtype=torch.uint8), DOWN),
        (holding("model.layers.3.mlp.down_proj.qweight", 20, 5, dtype=torch.int32), "down_proj.qweight"),
        (holding("model.layers.3.mlp.down_proj.weight_scale_inv", 1, 1), "down_proj.weight_scale_inv"),
        (holding("model.layers.3.mlp.down_proj.weight.absmax", 12), "down_proj.weight.absmax"),
    ],
)
def test_packed_weights_are_refused_though_the_configuration_says_nothing(
    qwen3: Path, tmp_path: Path, change: Change, name: str
) -> None:
    refuse(
        with_tensors(qwen3, tmp_path / "model", change), "quantised weights", name, "give the unquantised checkpoint"
    )


def test_a_model_of_a_billion_layers_is_refused_at_once(qwen3: Path, tmp_path: Path) -> None:
    copy = with_tensors(qwen3, tmp_path / "model", lambda _: None)
    changed_json(copy / "config.json", lambda tree: tree.update(num_hidden_layers=10**9, layer_types=None))
    refuse(copy, "lacks 'model.layers.5.")


def test_buffers_that_loading_passes_over_are_no_mistake(tmp_path: Path) -> None:
    """Old files hold masks and frequencies, some in a few layers only."""
    buffers = {
        "llama": [("model.layers.2.self_attn.rotary_emb.inv_freq", torch.float32)],
        "gpt2": [("transformer.h.0.attn.bias", torch.uint8), ("transformer.h.1.attn.masked_bias", torch.float32)],
        "gpt_neox": [
            ("gpt_neox.layers.0.attention.bias", torch.bool),
            ("gpt_neox.layers.0.attention.rotary_emb.inv_freq", torch.float32),
        ],
    }
    for model_type, names in buffers.items():
        model = save_tiny_model(tmp_path / model_type, model_type)
        for name, dtype in names:
            with_tensors(model, model, holding(name, 1, dtype=dtype))
        assert ModelDirectory.resolve("model", str(model)).num_layers == 5


def test_it_takes_no_torch(qwen3: Path) -> None:
    script = (
        "import sys; from adept_ds.models.directory import ModelDirectory\n"
        "ModelDirectory.resolve('model', sys.argv[1])\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    command = [sys.executable, "-c", script, str(qwen3)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
