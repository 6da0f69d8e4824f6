"""Weights of the start, read from files: any run of elements, wherever they lie, in the precision of training."""

from __future__ import annotations

from pathlib import Path

import oracle
import pytest
import torch
from harness.models import save_tiny_model

from adept_ds.models.directory import ModelDirectory
from adept_ds.weights.start_weights import StartWeights


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt_neox"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_they_are_what_the_loaded_model_has(tmp_path: Path, model_type: str, precision: torch.dtype) -> None:
    """Whole parameters, and runs that begin and end inside rows: files hold experts apart, and one head by another
    name."""
    directory = ModelDirectory.read(save_tiny_model(tmp_path / "model", model_type))
    start = StartWeights(directory, precision)
    for name, parameter in oracle.load(directory.path).named_parameters():
        flat = parameter.detach().to(precision).float().flatten()
        for first, stop in ((0, flat.numel()), (flat.numel() // 3, flat.numel() - 1), (3, 4)):
            assert torch.equal(start.elements(name, first, stop), flat[first:stop]), (name, first, stop)


def test_a_parameter_that_the_files_do_not_hold_is_an_error(tmp_path: Path) -> None:
    start = StartWeights(ModelDirectory.read(save_tiny_model(tmp_path / "model")), torch.float32)
    with pytest.raises(KeyError, match=r"layers\.9"):
        start.elements("model.layers.9.mlp.up_proj.weight", 0, 1)
