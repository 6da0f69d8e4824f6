"""Which projections can have an adapter, what is refused, and which unit an adapter's parameter belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness.expanding import layers_of, load
from harness.models import FAMILY_OPTIONS, save_tiny_model

from adept_ds.base.errors import InputError
from adept_ds.models.adapter_spec import (
    AdapterSpec,
    LoraSpec,
    OftSpec,
    adaptable_projections,
    adapter_multipliers,
    adapter_units,
    check_adapters,
    target_projections,
)
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.family_table import FAMILIES
from adept_ds.models.weight_files import tensor_shapes

LLAMA = FAMILIES["llama"]


@pytest.mark.parametrize("family", sorted(FAMILY_OPTIONS))
def test_all_means_every_linear_layer_of_every_decoder_layer(tmp_path: Path, family: str) -> None:
    """But one that gives a single number, which weighs an expert."""
    from transformers.pytorch_utils import Conv1D

    linear = set()
    for layer in layers_of(load(save_tiny_model(tmp_path / "model", family))):
        for path, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear | Conv1D) and module.weight.shape[0] > 1:
                linear.add(path)
    model = ModelDirectory.read(tmp_path / "model")
    check_adapters(LoraSpec(), model, tensor_shapes(model.path))
    possible = adaptable_projections(FAMILIES[family])
    assert linear <= set(possible) and (linear == set(possible) or "moe" in family or family == "mixtral")
    assert target_projections("all", FAMILIES[family]) == possible


def test_targets_come_in_the_order_of_the_table_and_once() -> None:
    targets = ("mlp.up_proj", "self_attn.q_proj", "mlp.up_proj")
    assert target_projections(targets, LLAMA) == ["self_attn.q_proj", "mlp.up_proj"]


@pytest.mark.parametrize(
    ("family", "spec", "words"),
    [
        pytest.param("llama", LoraSpec(targets=()), ["method.targets: []", "write all"], id="none"),
        pytest.param(
            "llama", LoraSpec(targets=("q_proj",)), ["'q_proj'", "did you mean 'self_attn.q_proj'?"], id="too short"
        ),
        pytest.param(
            "gpt2", LoraSpec(targets=("self_attn.c_atn",)), ["did you mean 'attn.c_attn'?"], id="of another family"
        ),
        pytest.param(
            "qwen2_moe",
            LoraSpec(targets=("mlp.experts.down_proj",)),
            ["'mlp.experts.down_proj' is a stack of experts", "mlp.shared_expert.down_proj"],
            id="a stack of experts",
        ),
        pytest.param("mixtral", LoraSpec(targets=("mlp.gate",)), ["'mlp.gate' is what weighs"], id="a router"),
        pytest.param(
            "qwen3_moe",
            LoraSpec(targets=("self_attn.q_proj", "mlp.up_proj")),
            ["'mlp.up_proj' is in no layer", "choose from self_attn.k_proj, "],
            id="in no layer",
        ),
        pytest.param(
            "llama", OftSpec(), ["method.block_size: 32 does not divide the 20 inputs", "take 4"], id="block size"
        ),
        pytest.param(
            "mistral", OftSpec(2), ["the 37 inputs of 'mlp.down_proj'", "fewer method.targets"], id="no block size fits"
        ),
        pytest.param("gpt2", OftSpec(4), ["method.name: oft", "'gpt2'", "choose lora"], id="oft and Conv1D"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    tmp_path: Path, family: str, spec: AdapterSpec, words: list[str]
) -> None:
    options: dict[str, Any] = {"llama": {"intermediate_size": 36}, "qwen3_moe": {"decoder_sparse_step": 1}}
    model = ModelDirectory.read(save_tiny_model(tmp_path / "model", family, **options.get(family, {})))
    with pytest.raises(InputError) as refusal:
        check_adapters(spec, model, tensor_shapes(model.path))
    assert "\n" not in str(refusal.value) and str(refusal.value).startswith("method.")
    for word in words:
        assert word in str(refusal.value)


def test_what_layers_lack_is_left_out_of_all(tmp_path: Path) -> None:
    """Every layer has experts; the table has both kinds."""
    model = ModelDirectory.read(save_tiny_model(tmp_path / "model", "qwen3_moe", decoder_sparse_step=1))
    check_adapters(OftSpec(block_size=4), model, tensor_shapes(model.path))


@pytest.mark.parametrize(
    ("parameter", "unit"),
    [
        ("model.layers.3.mlp.up_proj.lora_A.default.weight", "layers.3.mlp.up_proj.lora_A"),
        ("model.layers.12.self_attn.q_proj.lora_B.default.weight", "layers.12.self_attn.q_proj.lora_B"),
        (
            "model.layers.0.mlp.down_proj.lora_magnitude_vector.default.weight",
            "layers.0.mlp.down_proj.lora_magnitude_vector",
        ),
        ("model.layers.1.self_attn.o_proj.oft_R.default.weight", "layers.1.self_attn.o_proj.oft_R"),
    ],
)
def test_each_factor_of_each_projection_is_a_unit(parameter: str, unit: str) -> None:
    others = [
        "model.layers.3.mlp.up_proj.base_layer.weight",
        "model.norm.weight",
        "model.layers.3.input_layernorm.weight",
    ]
    assert adapter_units(LLAMA, [parameter, *others]) == {parameter: unit}


def test_lora_plus_lets_b_alone_learn_faster() -> None:
    units = [f"layers.0.mlp.up_proj.{factor}" for factor in ("lora_A", "lora_B", "lora_magnitude_vector")]
    assert list(adapter_multipliers(units, 16.0).values()) == [1.0, 16.0, 1.0]
