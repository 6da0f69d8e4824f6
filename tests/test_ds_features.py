"""What of DeepSpeed is refused, by name and with its reason, and what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hjson
import pytest
from conftest import ROOT

from adept_ds.config import parse_config
from adept_ds.ds_features import UNSUPPORTED, unsupported_feature

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ZenFlow": ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zenflow"),
    "super offload": ({"zero_optimization": {"offload_optimizer": {"super_offload": True}}}, "super_offload"),
    "half of the optimizer": ({"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}, "ratio"),
    "an old name for offload": ({"zero_optimization": {"cpu_offload": True}}, "cpu_offload"),
    "gradients dealt out in turn": ({"zero_optimization": {"round_robin_gradients": True}}, "round_robin_gradients"),
    "quantised gradients": ({"zero_optimization": {"zero_quantized_gradients": True}}, "zero_quantized_gradients"),
    "quantised weights": ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights"),
    "hpZ": ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "zero_hpz_partition_size"),
    "NVMe for the optimizer": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        "offload_optimizer.device",
    ),
    "NVMe for parameters": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
        "offload_param.device",
    ),
    "offload at stage 2": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        "offload_optimizer",
    ),
    "autocast": ({"torch_autocast": {"enabled": True}}, "torch_autocast"),
    "DeepCompile": ({"compile": {"deepcompile": True}}, "deepcompile"),
    "sums of gradients": ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op"),
    "unmanaged accumulation": ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation"),
    "tensor parallelism": ({"tensor_parallel": {"autotp_size": 2}}, "autotp_size"),
    "sequence parallelism": ({"sequence_parallel_size": 2}, "sequence_parallel_size"),
    "its sampler": ({"data_efficiency": {"enabled": True}}, "data_efficiency"),
    "the hybrid engine": ({"hybrid_engine": {"enabled": True}}, "hybrid_engine"),
    "checkpoints written later": ({"checkpoint": {"writer": {"decoupled": True}}}, "decoupled"),
    "1-bit Adam": ({"optimizer": {"type": "OneBitAdam"}}, "onebitadam"),
    "Muon": ({"optimizer": {"type": "Muon"}}, "muon"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_its_key_with_a_reason(name: str) -> None:
    ds_config, key = REFUSED[name]
    message = unsupported_feature(ds_config)
    assert message is not None
    assert key in message
    assert "\n" not in message
    assert ";" in message, "every refusal ends in a remedy"


@pytest.mark.parametrize(
    "ds_config",
    [
        {},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 1.0}}},
        {"zero_optimization": {"stage": 2, "zero_quantized_weights": False, "zero_hpz_partition_size": 1}},
        {"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000}},
        {"torch_autocast": {"enabled": False}, "gradient_allreduce_op": "mean", "sequence_parallel_size": 1},
        {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "fp16": {"enabled": True}},
        {"flops_profiler": {"enabled": True}, "wall_clock_breakdown": True, "tensorboard": {"enabled": True}},
    ],
    ids=json.dumps,
)
def test_what_is_off_or_does_no_harm_is_accepted(ds_config: dict[str, Any]) -> None:
    assert unsupported_feature(ds_config) is None


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_configuration_is_accepted(path: Path) -> None:
    assert unsupported_feature(hjson.loads(path.read_text())) is None


@pytest.mark.parametrize("feature", UNSUPPORTED, ids=lambda feature: feature.key)
def test_every_refused_key_is_one_that_deepspeed_reads(feature: Any) -> None:
    """A misspelt one would refuse nothing."""
    import deepspeed

    section, leaf = feature.key.split(".")[0], feature.key.rpartition(".")[2]
    sources = [path.read_text() for path in Path(deepspeed.__file__).parent.glob("**/*.py")]
    for word in (section, leaf):
        assert any(f'"{word}"' in text or f"'{word}'" in text or f" {word}:" in text for text in sources), word


def test_unit_lr_alone_refuses_an_engine_that_uses_such_a_feature() -> None:
    from unittest import mock

    from adept_ds import UnitLR
    from adept_ds.errors import InputError

    engine = mock.Mock(config={"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}})
    with pytest.raises(InputError, match="zenflow"):
        UnitLR(engine, {})


def test_a_run_is_refused_with_the_name_of_the_file(tmp_path: Path) -> None:
    from adept_ds.checks import check_deepspeed_config
    from adept_ds.errors import InputError

    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}))
    config = parse_config({"model": "m", "run_dir": "r", "deepspeed": str(path)})
    with pytest.raises(InputError, match=r"ds\.json'.*zero_quantized_gradients' is True.*exact gradients; remove it"):
        check_deepspeed_config(config)
