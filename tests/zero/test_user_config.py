"""What DeepSpeed's own classes say about the user's file, in one line and before a run begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness.complaints import refused
from harness.launching import ROOT
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.config.deepspeed import check_deepspeed_file
from adept_ds.config.deepspeed_keys import SECTIONS
from adept_ds.zero.user_config import CLASSES, check_user_config


def _check(tmp_path: Path, **sections: Any) -> None:
    path = tmp_path / "ds.json"
    zero = {"stage": 3} | sections.pop("zero_optimization", {})
    path.write_text(json.dumps({"zero_optimization": zero} | sections))
    check_user_config(path, check_deepspeed_file(path))


ZERO: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown key": (
        {"overlap_com": True},
        "unknown key 'zero_optimization.overlap_com'; did you mean 'zero_optimization.overlap_comm'?",
    ),
    "an unknown key, by its alias": (
        {"stage3_prefetch_bucket": 5},
        "did you mean 'zero_optimization.stage3_prefetch_bucket_size'?",
    ),
    "an unknown key of a section inside": (
        {"offload_optimizer": {"device": "cpu", "pin_mem": True}},
        "'zero_optimization.offload_optimizer.pin_mem'; did you mean 'zero_optimization.offload_optimizer.pin_memory'?",
    ),
    "a text for a number": ({"reduce_bucket_size": "many"}, "'zero_optimization.reduce_bucket_size' is 'many'"),
    "a fraction": ({"reduce_bucket_size": 1.5}, "'zero_optimization.reduce_bucket_size' is 1.5"),
    "a truth for a number": ({"reduce_bucket_size": True}, "'zero_optimization.reduce_bucket_size' is True"),
    "a truth inside": (
        {"offload_param": {"device": "cpu", "buffer_count": True}},
        "'zero_optimization.offload_param.buffer_count' is True",
    ),
    "a truth by an alias": (
        {"stage3_max_live_parameters": True},
        "'zero_optimization.stage3_max_live_parameters' is True",
    ),
    "too small": ({"reduce_bucket_size": -1}, "'zero_optimization.reduce_bucket_size' is -1"),
    "an unknown device": ({"offload_param": {"device": "gpu"}}, "'zero_optimization.offload_param.device' is 'gpu'"),
    "a text for a section": ({"offload_optimizer": "cpu"}, "'zero_optimization.offload_optimizer' is 'cpu'"),
    "a number for a section": ({"leaf_module": 3}, "zero_optimization"),
}


@pytest.mark.parametrize("name", ZERO)
def test_a_mistake_in_zero_optimization_is_named_by_key_and_value(name: str, tmp_path: Path) -> None:
    section, words = ZERO[name]
    with pytest.raises(InputError, match=r"^deepspeed: '.*ds\.json': ") as refusal:
        _check(tmp_path, zero_optimization=section)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert "validation error" not in str(refusal.value)


OTHERS: dict[str, dict[str, Any]] = {
    "tensorboard.outputpath": {"tensorboard": {"enabled": True, "outputpath": "x"}},
    "csv_monitor.enabled": {"csv_monitor": {"enabled": "maybe"}},
    "wandb.project": {"wandb": {"project": 3}},
    "comms_logger.prof_ops": {"comms_logger": {"enabled": True, "prof_ops": "all"}},
    "compile.deepcompil": {"compile": {"deepcompil": True}},
    "timers.throughput.synch": {"timers": {"throughput": {"synch": True}}},
    "hybrid_engine.max_out_tokens": {"hybrid_engine": {"max_out_tokens": True}},
    "tensor_parallel.tp.tp_sise": {"tensor_parallel": {"tp": {"tp_sise": 1}}},
    "tag_validation": {"checkpoint": {"tag_validation": "maybe"}},
    "communication_data_type": {"seq_parallel_communication_data_type": "fp8"},
    "fp9": {"torch_autocast": {"dtype": "fp9"}},
}


@pytest.mark.parametrize("words", OTHERS)
def test_every_other_section_is_looked_at_too(words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^deepspeed: ") as refusal:
        _check(tmp_path, **OTHERS[words])
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"zero_optimization": {"reduce_bucket_size": 5e8, "stage3_prefetch_bucket_size": "auto"}},
        {"zero_optimization": {"offload_param": {"device": "cpu", "pin_memory": False}, "offload_optimizer": None}},
        {"tensorboard": {"enabled": False}, "csv_monitor": {}, "wall_clock_breakdown": True, "log_level": "warning"},
        {"flops_profiler": {"enabled": True, "output_file": None}, "timers": {"throughput": {"enabled": False}}},
        {"activation_checkpointing": {"cpu_checkpointing": True}, "aio": {"block_size": 4096}, "comms_logger": {}},
    ],
    ids=json.dumps,
)
def test_what_deepspeed_takes_is_taken(sections: dict[str, Any], tmp_path: Path) -> None:
    _check(tmp_path, **sections)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"bf16": {"enabled": True}}, "bf16.enabled: True, but train.precision is auto, which is fp32 on this device"),
        ({"fp16": {"enabled": True}}, "fp16.enabled: True, but train.precision is auto, which is fp32 on this device"),
        ({"fp16": {"loss_scale": -1}}, "'fp16.loss_scale'"),
        ({"bf16": {"enable": True}}, "unknown key 'bf16.enable'; did you mean 'bf16.enabled'?"),
        (
            {"zero_optimization": {"zero_quantized_weights": True}},
            "needs DeepSpeed's kernels for CUDA, but this device is 'cpu'; remove it",
        ),
    ],
)
def test_what_is_not_so_on_this_device_is_refused(tmp_path: Path, sections: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=r"^deepspeed: '.*ds\.json'") as refusal:
        _check(tmp_path, **sections)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("sections", [{"bf16": {"enabled": False}}, {"fp16": {"enabled": False, "loss_scale": 0}}])
def test_what_is_off_on_this_device_may_be_written_so(tmp_path: Path, sections: dict[str, Any]) -> None:
    _check(tmp_path, **sections)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_configuration_is_taken(path: Path) -> None:
    check_user_config(path, check_deepspeed_file(path))


def test_every_section_with_a_class_is_known_to_the_first_check() -> None:
    for section in CLASSES:
        keys: Any = SECTIONS
        for key in section.split("."):
            keys = keys[key]
        assert keys is dict


@pytest.mark.parametrize("command", ["show", "run", "probe"])
def test_commands_complain_at_once_and_nobody_else_speaks(command: str, workspace: Workspace, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "overlap_com": True}}))
    config = workspace.config(tmp_path / "run", deepspeed=str(path))
    refused([command, config], ["deepspeed", "'zero_optimization.overlap_com'", "did you mean"])
    assert not (tmp_path / "run").exists()
