"""The tensor that holds NaN or infinity is named, whatever its dtype and wherever in the file it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness.incomplete import with_tensors
from harness.models import save_tiny_model

from adept_ds.weights import tensor_files
from adept_ds.weights.finite import first_non_finite

FLOATS = ["float64", "float32", "float16", "bfloat16", "float8_e5m2", "float8_e4m3fn"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("finite") / "model", "qwen3")


def test_a_finite_model_has_none(model: Path) -> None:
    assert first_non_finite(model) is None


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 411, -1])
def test_one_element_is_found(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, value: float, place: int
) -> None:
    if dtype == "float8_e4m3fn" and value == value:
        pytest.skip("has no infinity")
    monkeypatch.setattr(tensor_files, "_CHUNK", 256)  # several chunks for one tensor
    name = "model.layers.3.mlp.up_proj.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(getattr(torch, dtype))
        tensors[name].view(-1)[place] = value

    assert first_non_finite(with_tensors(model, tmp_path / "model", spoil)) == name


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_and_smallest_numbers_of_a_dtype_are_finite(model: Path, tmp_path: Path, dtype: str) -> None:
    info = torch.finfo(getattr(torch, dtype))
    extremes = torch.tensor([info.max, info.min, info.tiny, info.smallest_normal, 0.0, -0.0], dtype=torch.float64)
    whole = {"masks": torch.full((3,), -1), "flags": torch.ones(3, dtype=torch.bool)}

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= whole | {"extremes": extremes.to(getattr(torch, dtype))}

    assert first_non_finite(with_tensors(model, tmp_path / "model", add)) is None
