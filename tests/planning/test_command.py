"""`adept plan` on a directory that holds config.json and nothing else."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from harness.complaints import files_under, refused
from harness.launching import ROOT, adept

from adept_ds.base.errors import InputError
from adept_ds.config.checks import check_replay
from adept_ds.config.deepspeed_merge import deepspeed_of_run
from adept_ds.config.loading import load_config
from adept_ds.models.directory import ModelDirectory
from adept_ds.planning import from_config
from adept_ds.planning.zero_settings import ZeroSettings

MODELS = ROOT / "tools" / "scaling" / "models"
ON = ("--gpus", 8, "--gpu-memory", "80GB")
RATES = ("--flops", "989TFLOP/s", "--bandwidth", "450GB/s")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write(tmp_path, "qwen3_8b")


def write(folder: Path, model: str, **sections: object) -> Path:
    (folder / model).mkdir()
    (folder / model / "config.json").write_text((MODELS / f"{model}.json").read_text())
    tree = {"model": str(folder / model), "run_dir": str(folder / "run"), "data": {"seq_len": 2048}}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree | {"train": {"global_batch_size": 64}} | sections))
    return path


def planned(config: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    result = adept(1, "plan", config, *ON, *arguments)
    assert result.returncode == 0, result.stderr
    return result


def test_a_plan_needs_no_weights_and_writes_nothing(config: Path) -> None:
    before = files_under(config.parent)
    out = planned(config, *RATES).stdout
    assert files_under(config.parent) == before
    for words in ("frozen weights", "stage 3", "set   deepspeed=ds_configs/zero", "why   ", "40% of 989 TFLOP/s"):
        assert words in out
    assert "evenly spread, expand.layers=[8,17,26,35]" in out


@pytest.mark.parametrize(
    ("model", "total", "gpus"),
    [("qwen3_8b", 8_190_735_360, 8), ("llama_3_70b", 70_553_706_496, 16), ("qwen3_coder_480b", 480_154_875_392, 512)],
)
def test_published_models_have_as_many_parameters_as_published(
    model: str, total: int, gpus: int, tmp_path: Path
) -> None:
    """8.19, 70.55 and 480.15 billion are the sizes of their files; copies come on top, and are what trains."""
    config = write(tmp_path, model, train={"global_batch_size": gpus})
    nodes = ("--nodes", gpus // 8) if gpus > 8 else ()
    result = adept(1, "plan", config, "--gpus", gpus, "--gpu-memory", "80GB", *nodes, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)["parameters"]
    assert found["total"] - found["trained"] == total


def test_a_plan_of_one_method_differs_from_that_of_another(tmp_path: Path) -> None:
    """Adapters train little, and everything trains in full training; both go through their own code."""
    config = write(tmp_path, "qwen3_8b")
    found = {
        method: json.loads(planned(config, "--json", f"method={method}", "--reserve", 0).stdout)
        for method in ("lora", "llama_pro")
    }
    assert found["lora"]["parameters"]["trained"] < 1e8 < found["llama_pro"]["parameters"]["trained"]
    assert found["lora"]["lowest_trained_layer"] == 0


@pytest.mark.parametrize("hosted", [False, True])
def test_what_a_method_keeps_beside_the_optimizer_is_counted_where_that_is(hosted: bool, config: Path) -> None:
    """EWC: the start's weights and the Fisher matrix, 4 bytes each for every one of 8.19 billion, split over 8 GPUs."""
    file = f"deepspeed={ROOT}/ds_configs/{'zero3_offload' if hosted else 'zero3'}.json"
    ewc, full = (
        json.loads(planned(config, "--json", file, f"method={method}", "train.keep_gathered_gib=0").stdout)["stages"][
            "3"
        ]
        for method in ("ewc", "full")
    )
    more = {kind: size - full["memory"][kind] for kind, size in ewc["memory"].items()}
    same = (each["micro_batch_size"] for each in (ewc, full))
    assert len(set(same)) == 1
    kind = "on_host" if hosted else "kept_beside"
    assert more[kind] == pytest.approx(8_190_735_360, rel=1e-3)
    assert (more["peak"] > 8e9) != hosted
    assert [name for name, size in more.items() if size and name != "peak"] == [kind]


def test_gradients_that_are_set_aside_are_counted_at_the_stages_that_do_so(config: Path) -> None:
    """Four copies of Qwen3-8B's layers, 4 bytes each, split over 8 GPUs; at stage 3 they stay where they are."""
    online = ("importance.source=online", "data.replay=[general.jsonl]", "train.keep_gathered_gib=0")
    found = json.loads(planned(config, "--json", *online).stdout)
    aside = {stage: each["memory"]["kept_beside"] for stage, each in found["stages"].items()}
    assert aside["2"] == pytest.approx(4 * found["parameters"]["trained"] / 8, rel=1e-3)
    assert aside["3"] == 0


@pytest.mark.parametrize(("file", "hosted"), [("zero3_offload", 20), ("zero3_offload_params", 22)])
def test_what_lies_on_the_host_is_not_counted_on_a_gpu(file: str, hosted: int, config: Path) -> None:
    """Of a trained parameter 20 bytes: its float32 weight, two moments, its gradient twice; and 2 of every weight."""
    found = json.loads(planned(config, "--json", f"deepspeed={ROOT}/ds_configs/{file}.json").stdout)
    plain = json.loads(planned(config, "--json", "train.keep_gathered_gib=0").stdout)
    memory, before = found["stages"]["3"]["memory"], plain["stages"]["3"]["memory"]
    parameters = found["parameters"]
    frozen = parameters["total"] - parameters["trained"]
    assert memory["gradients"] == memory["optimizer"] == 0 < before["optimizer"]
    expected = (hosted * parameters["trained"] + (2 * frozen if hosted == 22 else 0)) / 8
    assert memory["on_host"] == pytest.approx(expected, rel=1e-3)  # padding
    assert before["on_host"] == 0
    assert (memory["frozen_weights"] < 1e7) == (hosted == 22), "small ones are whole on every GPU"


AUTO = {
    **dict.fromkeys(("overlap_comm", "reduce_bucket_size", "offload_param", "zero_hpz_partition_size"), "auto"),
    **{f"stage3_{key}": "auto" for key in ("prefetch_bucket_size", "param_persistence_threshold")},
    "offload_optimizer": {"device": "auto"},
}


@pytest.mark.parametrize("stage", [2, 3])
def test_auto_is_to_a_plan_what_it_is_to_a_run(stage: int, config: Path) -> None:
    """The Trainer's formulas of Qwen3-8B's width, 4096; else what DeepSpeed's own class makes of the run's file."""
    file = config.parent / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, **AUTO}, "train_batch_size": "auto"}))
    read = load_config(config, [f"deepspeed={file}"])
    found = from_config.planned(read, 8).task.settings[stage]
    run = deepspeed_of_run(read, ModelDirectory.read(Path(read.model)), 8, 8)
    of_run = DeepSpeedZeroConfig(**run["zero_optimization"])
    assert found.reduce_bucket_size == of_run.reduce_bucket_size == 4096 * 4096
    assert found.overlap_comm == of_run.overlap_comm == (stage == 3)
    assert of_run.offload_optimizer is not None
    assert (of_run.offload_optimizer.device, of_run.offload_param) == ("none", None)
    assert not (found.optimizer_on_host or found.weights_on_host)
    if stage == 3:
        assert found.prefetch_bucket_size == of_run.prefetch_bucket_size == int(0.9 * 4096 * 4096)
        assert found.param_persistence_threshold == of_run.param_persistence_threshold == 40960


@pytest.mark.parametrize("key", ["offload_optimizer", "zero_hpz_partition_size"])
def test_auto_for_a_whole_section_or_a_number_is_as_if_it_were_not_there(key: str, config: Path) -> None:
    file = config.parent / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, key: "auto"}}))
    found = json.loads(planned(config, "--json", f"deepspeed={file}").stdout)
    assert found["stages"]["3"]["memory"]["on_host"] == 0


@pytest.mark.parametrize(
    ("sections", "overrides"),
    [
        ({"train_batch_size": 999}, ()),
        ({"gradient_clipping": 0.5}, ()),
        ({"gradient_accumulation_steps": 3}, ()),
        ({"fp16": {"enabled": True}}, ("train.precision=bf16",)),
        ({"bf16": {"enabled": True}}, ("train.precision=fp16",)),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}, ()),
    ],
)
def test_a_file_that_contradicts_the_configuration_is_refused_as_a_run_refuses_it(
    sections: dict[str, object], overrides: tuple[str, ...], config: Path
) -> None:
    file = config.parent / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}} | sections))
    with pytest.raises(InputError) as refusal:
        read = load_config(config, [f"deepspeed={file}", *overrides])
        deepspeed_of_run(read, ModelDirectory.read(Path(read.model)), 8, 8)
    refused(["plan", config, *ON, f"deepspeed={file}", *overrides], [str(refusal.value)])


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"fp16": {"enabled": True}}, ("fp16.enabled: True, but train.precision is auto, which is bf16 in a plan",)),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": "cpu"}}, ("offload_optimizer' is 'cpu'",)),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "many"}}, ("partition_size' is 'many'",)),
    ],
)
def test_a_file_that_deepspeed_or_the_device_would_refuse_is_refused(
    sections: dict[str, object], words: tuple[str, ...], config: Path
) -> None:
    file = config.parent / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}} | sections))
    refused(["plan", config, *ON, f"deepspeed={file}"], words)


def test_micro_batches_are_those_that_the_file_says_too(config: Path) -> None:
    """At its own stage; shipped files say none."""
    file = config.parent / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 2}))
    stages = json.loads(planned(config, "--json", f"deepspeed={file}").stdout)["stages"]
    assert stages["3"]["micro_batch_size"] == 2 < stages["2"]["micro_batch_size"]


ONLINE = ("importance.source=online", "data.replay=[general.jsonl]")


def test_micro_batches_are_of_a_size_that_a_run_takes(config: Path) -> None:
    """A quarter of 64 is replayed: 16 sequences, which fill micro-batches of 2 on 8 GPUs and none of more."""
    arguments = (*ONLINE, "data.replay_share=0.25", "data.seq_len=256")
    stages = json.loads(planned(config, "--json", *arguments).stdout)["stages"]
    assert [each["micro_batch_size"] for each in stages.values()] == [2, 2, 2]
    check_replay(load_config(config, [*arguments, "train.micro_batch_size=2"]), 8)


def test_replay_that_no_micro_batches_divide_is_refused_at_once(config: Path) -> None:
    arguments = (*ONLINE, "data.replay_share=0.1")
    with pytest.raises(InputError) as refusal:
        check_replay(load_config(config, arguments), 8)
    refused(["plan", config, *ON, *arguments], [str(refusal.value)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpus", 8, "--gpu-memory", "80"), ("--gpu-memory", "'80'", "80GB")),
        (("--gpus", 0, "--gpu-memory", "80GB"), ("--gpus", "0")),
        (("--gpus", 8, "--gpu-memory", "80GB", "--nodes", 3), ("--nodes", "3", "divisor")),
        (("--gpus", 48, "--gpu-memory", "80GB"), ("train.global_batch_size", "64", "48")),
        (("--gpus", 128, "--gpu-memory", "80GB"), ("train.global_batch_size", "128")),
        ((*ON, "--flops", "989"), ("--flops", "TFLOP/s")),
        ((*ON, "--bandwidth", "400Gb"), ("--bandwidth", "400Gb/s")),
        ((*ON, "--link-bandwidth", "450GB/s"), ("--link-bandwidth", "one node")),
        ((*ON, "--efficiency", 1.5), ("--efficiency", "1.5")),
        ((*ON, "--reserve", 1), ("--reserve", "1")),
        (("--gpus", 8, "--gpu-memory", "8GB"), ("--gpu-memory", "8.0 GB", "stage 3", "take")),
        (
            (*ON, f"deepspeed={ROOT}/ds_configs/zeropp.json"),
            ("zeropp.json", "zero_hpz_partition_size: 8", "zero3.json"),
        ),
        ((*ON, "model=nowhere"), ("model", "nowhere", "does not exist")),
        ((*ON, f"model={MODELS / 'qwen3_8b.json'}"), ("model", "qwen3_8b.json", "is a file", "config.json")),
        ((*ON, "expand.k=99"), ("expand.k", "99")),
        ((*ON, "method={name: oft, block_size: 33}"), ("method.block_size", "33", "does not divide")),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(
    arguments: tuple[object, ...], words: tuple[str, ...], config: Path
) -> None:
    refused(["plan", config, *arguments], words)


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        ({"stage": 3, "zero_quantized_weights": True}, ("zero_quantized_weights", "zero3.json")),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, ("offload_optimizer at stage 2", "zero3_offload.json")),
    ],
)
def test_what_a_plan_does_not_know_of_a_file_is_refused(zero: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as refusal:
        ZeroSettings.read({"zero_optimization": zero}, "own.json")
    for word in ("own.json", *words):
        assert word in str(refusal.value)
