"""What the shipped DeepSpeed configurations promise."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import hjson
import pytest
from harness.launching import ROOT

DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_deepspeed_reads_every_shipped_configuration_and_knows_every_key(path: Path) -> None:
    from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    with path.open(encoding="utf-8") as file:  # as DeepSpeedConfig does
        config = hjson.load(file, object_pairs_hook=dict_raise_error_on_duplicate_keys)
    zero = DeepSpeedZeroConfig(**config["zero_optimization"])  # refuses unknown keys
    assert zero.stage == (3 if path.stem == "zeropp" else int(path.stem.removeprefix("zero")[0]))
    assert (zero.offload_optimizer is not None) == ("offload" in path.stem)
    assert (zero.offload_param is not None) == path.stem.endswith("offload_params")
    assert (zero.zero_hpz_partition_size > 1) == (path.stem == "zeropp")
    assert not (zero.zero_quantized_weights or zero.zero_quantized_gradients), "lossy: nobody gets it unasked"
    assert not zero.gather_16bit_weights_on_model_save


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_hold_no_key_that_the_runs_own_configuration_has(path: Path) -> None:
    assert set(hjson.loads(path.read_text())) == {"zero_optimization", "wall_clock_breakdown"}


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_every_key_of_a_shipped_configuration_is_explained(path: Path) -> None:
    lines = [line.strip() for line in path.read_text().splitlines()]
    for before, line in pairwise(lines):
        if line.startswith('"') and not line.startswith(('"zero_optimization"', '"stage"')):
            assert before.startswith("//"), f"{path.name}: {line} has no comment"


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_says_when_to_use_it(path: Path) -> None:
    head = path.read_text().partition("{")[0]
    assert "// When: " in head
    assert path.name in (ROOT / "docs" / "deepspeed.md").read_text(encoding="utf-8")
