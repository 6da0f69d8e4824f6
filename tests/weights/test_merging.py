"""Merged weights compute what the base with its adapters computes, whatever the architecture and its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.expanding import load, random_tokens
from harness.families import MOSTLY_SLOW_FAMILIES
from harness.models import save_tiny_model

from adept_ds.base.errors import InputError
from adept_ds.models.adapter_spec import AdapterSpec, LoraSpec, OftSpec
from adept_ds.models.adapters import attach_adapters
from adept_ds.models.directory import ModelDirectory
from adept_ds.weights.merging import MergedWeights

LORA = LoraSpec(rank=2, alpha=3.0, rank_stabilised=True)
SPECS: dict[str, AdapterSpec] = {
    "lora": LORA,
    "dora": LoraSpec(rank=2, alpha=3.0, dora=True),
    "oft": OftSpec(block_size=2),
}
DIVISIBLE = {"intermediate_size": 36, "shared_expert_intermediate_size": 12}


def adapted_model(directory: Path, spec: AdapterSpec) -> Any:
    """With adapters that are not at their start."""
    model, generator = load(directory), torch.Generator().manual_seed(1)
    attach_adapters(model, ModelDirectory.read(directory).family, spec, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def adapters_of(model: Any) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {name: parameter.detach() for name, parameter in named if parameter.requires_grad}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=random_tokens(2, 24)).logits
    return result


def assert_merged(directory: Path, spec: AdapterSpec) -> Mapping[str, torch.Tensor]:
    """A plain model with the merged weights computes what the adapted one does, and the base does not."""
    adapted, plain = adapted_model(directory, spec), load(directory)
    base = logits(plain)
    merged = MergedWeights(spec, ModelDirectory.read(directory), adapters_of(adapted))
    assert not plain.load_state_dict(dict(merged), strict=False).unexpected_keys
    wanted = logits(adapted)
    assert float((wanted - base).abs().max()) > 0.02
    torch.testing.assert_close(logits(plain), wanted, rtol=0, atol=1e-5)
    return merged


@pytest.mark.parametrize("family", MOSTLY_SLOW_FAMILIES)
@pytest.mark.parametrize("kind", sorted(SPECS))
def test_merged_weights_compute_what_adapters_compute(tmp_path: Path, family: str, kind: str) -> None:
    if (family, kind) != ("gpt2", "oft"):  # is refused
        assert_merged(save_tiny_model(tmp_path / "model", family, **DIVISIBLE), SPECS[kind])


def test_weights_are_read_from_shards_and_from_a_base_model_without_a_head(tmp_path: Path) -> None:
    """Whose names lack the first component."""
    from transformers import AutoModel

    model = save_tiny_model(tmp_path / "model", "gpt2")
    AutoModel.from_pretrained(model).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    assert all(name.startswith("transformer.h.") for name in assert_merged(tmp_path / "base", LORA))


def test_a_base_in_half_precision_is_merged_in_fp32(tmp_path: Path) -> None:
    """The file's bf16 plus the product of the factors, rounded once."""
    directory = save_tiny_model(tmp_path / "model")
    load(directory, torch.bfloat16).save_pretrained(directory)
    name = "model.layers.2.mlp.up_proj"
    trained = adapters_of(adapted_model(directory, LORA))
    factors = [trained[f"{name}.lora_{factor}.default.weight"] for factor in "BA"]
    merged = MergedWeights(LORA, ModelDirectory.read(directory), trained)[f"{name}.weight"]
    wanted = load(directory).get_parameter(f"{name}.weight") + 3.0 / 2**0.5 * factors[0] @ factors[1]
    torch.testing.assert_close(merged, wanted.detach(), rtol=0, atol=1e-6)


UP = "model.layers.2.mlp.up_proj"


@pytest.mark.parametrize(
    ("spec", "changes", "words"),
    [
        pytest.param(LoraSpec(rank=3), {}, ["lora_A [2, 20]", "lora_A [3, 20]", "configuration"], id="another rank"),
        pytest.param(SPECS["dora"], {}, ["asks for", "lora_magnitude_vector [20]"], id="without a factor"),
        pytest.param(OftSpec(4), {}, ["has lora_A [2, 20]", "oft_R [5, 6]"], id="another kind"),
        pytest.param(
            LORA,
            {f"{UP}.lora_A.default.weight": torch.full((2, 20), torch.nan)},
            [f"'{UP}.weight' is not finite", "earlier checkpoint"],
            id="not finite",
        ),
        pytest.param(
            LORA,
            {"model.layers.7.mlp.up_proj.lora_A.default.weight": torch.zeros(2, 20)},
            ["'model.layers.7.mlp.up_proj.weight'", "lacks", "its own base"],
            id="another base",
        ),
        pytest.param(
            LORA, {f"{UP}.weight": torch.zeros(37, 20)}, [f"'{UP}.weight' was trained", "no adapter"], id="no adapter"
        ),
    ],
)
def test_what_does_not_belong_together_is_refused_in_one_line(
    tmp_path: Path, spec: AdapterSpec, changes: dict[str, torch.Tensor], words: list[str]
) -> None:
    directory = save_tiny_model(tmp_path / "model")
    trained = adapters_of(adapted_model(directory, LORA)) | changes
    with pytest.raises(InputError) as refusal:
        dict(MergedWeights(spec, ModelDirectory.read(directory), trained))
    for word in words:
        assert word in str(refusal.value)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "model")
    trained, base = adapters_of(adapted_model(directory, LORA)), ModelDirectory.read(directory)
    merged = MergedWeights(LORA, base, trained)
    (directory / "model.safetensors").write_bytes(b"\0" * 8)
    with pytest.raises(InputError, match="is damaged"):
        dict(merged)
