"""DeepSpeed's configuration: how it is read, what of it is refused, by name and with its reason, and what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hjson
import pytest
from harness.launching import ROOT

from adept_ds.config.deepspeed import (
    UNSUPPORTED,
    check_deepspeed_file,
    read_deepspeed_config,
    unsupported_feature,
)

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ZenFlow": ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zenflow"),
    "super offload": ({"zero_optimization": {"offload_optimizer": {"super_offload": True}}}, "super_offload"),
    "half of the optimizer": ({"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}, "ratio"),
    "an old name for offload": ({"zero_optimization": {"cpu_offload": True}}, "cpu_offload"),
    "gradients dealt out in turn": (
        {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
        "round_robin_gradients",
    ),
    "quantised gradients": ({"zero_optimization": {"zero_quantized_gradients": True}}, "zero_quantized_gradients"),
    "quantised frozen weights": (
        {"zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True}},
        "zero_quantized_nontrainable_weights",
    ),
    "quantised weights where none are gathered": (
        {"zero_optimization": {"stage": 2, "zero_quantized_weights": True}},
        "zero_quantized_weights",
    ),
    "hpZ where no weights are split": (
        {"zero_optimization": {"stage": 1, "zero_hpz_partition_size": 8}},
        "zero_hpz_partition_size",
    ),
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
    "parameters on the host at stage 1": (
        {"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}},
        "offload_param",
    ),
    "optimizer states in bf16": ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "bf16_optimizer_states"),
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
    "steps scaled by norms": ({"optimizer": {"type": "Lamb"}}, "lamb"),
    "steps scaled by norms, torch's": ({"optimizer": {"type": "Adafactor"}}, "adafactor"),
    "division before the sum": (
        {"zero_optimization": {"stage": 3}, "gradient_predivide_factor": 2.0},
        "gradient_predivide_factor",
    ),
    "elastic checkpoints": ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, "elastic_checkpoint"),
    "masters from low precision": (
        {"zero_optimization": {"stage": 2, "load_from_fp32_weights": False}},
        "load_from_fp32_weights",
    ),
    "masters in fp16": ({"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}, "fp16_master"),
    "masters in bf16": ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "bf16_master"),
    "curriculum learning": (
        {"data_efficiency": {"data_sampling": {"curriculum_learning": {"enabled": True}}}},
        "curriculum_learning",
    ),
    "dropped tokens": ({"data_efficiency": {"data_routing": {"random_ltd": {"enabled": True}}}}, "random_ltd"),
    "no ZeRO": ({"zero_optimization": {"stage": 0}}, "stage"),
    "no ZeRO by default": ({}, "stage"),
    "an optimizer without partitions": (
        {
            "zero_optimization": {"stage": 1},
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
        },
        "grad_accum_dtype",
    ),
    "a removed feature, switched off": ({"amp": {"enabled": False}}, "amp"),
    "a removed feature of ZeRO": ({"zero_optimization": {"stage": 3, "mics_shard_size": -1}}, "mics_shard_size"),
}

REFUSED_IN_A_RUN: dict[str, dict[str, Any]] = {
    "use_node_local_storage": {"checkpoint": {"use_node_local_storage": True}},
    "load_universal": {"checkpoint": {"load_universal": True}},
    "autotuning": {"autotuning": {"enabled": True}},
    "leaf_module.classes": {"zero_optimization": {"stage": 3, "leaf_module": {"classes": ["LlamaDecoderLayer"]}}},
    "leaf_module.names": {"zero_optimization": {"stage": 3, "leaf_module": {"names": ["model.layers.2"]}}},
    "leaf_module.name_suffixes": {"zero_optimization": {"stage": 3, "leaf_module": {"name_suffixes": [".mlp"]}}},
    "module_granularity_threshold": {
        "zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 1000},
    },
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
        {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
        {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
        {"zero_optimization": {"stage": 2}, "gradient_predivide_factor": 2.0, "prescale_gradients": True},
        {"zero_optimization": {"stage": 3, "round_robin_gradients": True, "reduce_scatter": False}},
        {"zero_optimization": {"stage": 3, "load_from_fp32_weights": False, "parameter_alignment": True}},
        {"optimizer": {"type": "Lion"}, "pipeline": {"stages": "auto"}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 1.0}}},
        {"zero_optimization": {"stage": 2, "zero_quantized_weights": False, "zero_hpz_partition_size": 1}},
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": True, "zero_hpz_partition_size": 8}},
        {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
        {"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000}},
        {"torch_autocast": {"enabled": False}, "gradient_allreduce_op": "mean", "sequence_parallel_size": 1},
        {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "fp16": {"enabled": True}},
        {"flops_profiler": {"enabled": True}, "wall_clock_breakdown": True, "tensorboard": {"enabled": True}},
    ],
    ids=json.dumps,
)
def test_what_is_off_or_does_no_harm_is_accepted(ds_config: dict[str, Any]) -> None:
    assert unsupported_feature({"zero_optimization": {"stage": 3}} | ds_config, whole_run=True) is None


@pytest.mark.parametrize("key", REFUSED_IN_A_RUN)
def test_what_only_a_run_cannot_take_is_refused_there(key: str) -> None:
    ds_config = {"zero_optimization": {"stage": 3}} | REFUSED_IN_A_RUN[key]
    assert key in (unsupported_feature(ds_config, whole_run=True) or "")
    assert unsupported_feature(ds_config) is None


@pytest.mark.parametrize("value", [None, "cpu", 3, [1], {"device": []}, True])
def test_what_is_malformed_is_left_to_the_checks_of_its_form(value: Any) -> None:
    for ds_config in (
        {"zero_optimization": value},
        {"zero_optimization": {"stage": value, "leaf_module": value, "offload_optimizer": value}},
        {"optimizer": value, "bf16": value, "data_types": value, "checkpoint": {"writer": value}},
    ):
        unsupported_feature(ds_config, whole_run=True)  # whatever it says, it does not raise


@pytest.mark.parametrize("by_alias", [True, False])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_default_of_zero_is_accepted_when_written_out(stage: int, by_alias: bool) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    defaults = DeepSpeedZeroConfig(stage=stage).model_dump(by_alias=by_alias)
    assert unsupported_feature({"zero_optimization": defaults}, whole_run=True) is None


def test_every_refused_key_of_zero_is_a_field_of_its_configuration() -> None:
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

    def names(model: Any) -> set[str]:
        return {name for field, info in model.model_fields.items() for name in (field, info.alias) if name}

    inner = {"offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig, "leaf_module": DeepSpeedZeroLeafModuleConfig}
    known = names(DeepSpeedZeroConfig) | _REMOVED_ZERO_CONFIG_KEYS.keys()
    known |= {f"{section}.{name}" for section, model in inner.items() for name in names(model)}
    keys = {feature.key for feature in UNSUPPORTED if feature.key.startswith("zero_optimization.")}
    assert {key.removeprefix("zero_optimization.") for key in keys} <= known


def test_everything_that_deepspeed_has_removed_is_refused() -> None:
    """By name and in one line, where DeepSpeed would start to load and then raise."""
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS

    removed = _REMOVED_TOP_LEVEL_CONFIG_KEYS.keys() | {f"zero_optimization.{key}" for key in _REMOVED_ZERO_CONFIG_KEYS}
    assert removed <= {feature.key for feature in UNSUPPORTED}


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_configuration_is_accepted(path: Path) -> None:
    assert unsupported_feature(hjson.loads(path.read_text()), whole_run=True) is None


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
    from adept_ds.base.errors import InputError

    engine = mock.Mock(config={"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}})
    with pytest.raises(InputError, match="zenflow"):
        UnitLR(engine, {})


def test_a_run_is_refused_with_the_name_of_the_file(tmp_path: Path) -> None:
    from adept_ds.base.errors import InputError

    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}))
    with pytest.raises(InputError, match=r"ds\.json'.*zero_quantized_gradients' is True.*exact gradients; remove it"):
        check_deepspeed_file(path)


def test_deepspeed_files_may_have_comments(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(
        '{\n  // the stage\n  "zero_optimization": {"stage": 2, # two\n  /* no more */ "overlap_comm": false}\n}'
    )
    expected = {"zero_optimization": {"stage": 2, "overlap_comm": False}}
    assert read_deepspeed_config(path) == expected
    assert check_deepspeed_file(path) == expected


def test_without_a_deepspeed_file_it_is_plain_zero3() -> None:
    assert read_deepspeed_config(None) == {"zero_optimization": {"stage": 3}}
