"""DeepSpeed's file beside the run's configuration: "auto" as Hugging Face's Trainer fills it in, and contradictions."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness.launching import ROOT
from harness.models import save_tiny_model
from harness.trainer_files import trainer_file
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.config.deepspeed_merge import deepspeed_of_run
from adept_ds.config.loading import parse_config
from adept_ds.config.resolved import resolve
from adept_ds.config.schema import Config
from adept_ds.models.directory import ModelDirectory
from adept_ds.ranks.collectives import Ranks
from adept_ds.zero.build import EngineSettings, StepShape, training_ds_config

RANKS, STEPS = 2, 3
"""The workspace's batch of 12 in micro-batches of 2."""


def config_with(workspace: Workspace, tmp_path: Path, tree: dict[str, Any], **sections: Any) -> Config:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(tree))
    train = {"precision": "fp32"} | sections.pop("train", {})
    return parse_config(workspace.tree(tmp_path / "run", deepspeed=str(path), train=train, **sections))


def of_run(
    config: Config, workspace: Workspace, ranks: int = RANKS, steps: int | None = STEPS, model: Path | None = None
) -> dict[str, Any]:
    return deepspeed_of_run(config, ModelDirectory.read(model or workspace.model), ranks, steps)


def filled_in_by_the_trainer(tree: dict[str, Any], config: Config, model: Path) -> dict[str, Any]:
    """By transformers itself, whose arguments say what the run's configuration says."""
    from transformers import AutoConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    train = config.train
    arguments = SimpleNamespace(
        world_size=RANKS,
        per_device_train_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=STEPS,
        max_grad_norm=train.clip_grad_norm,
        learning_rate=train.lr,
        adam_beta1=train.betas[0],
        adam_beta2=train.betas[1],
        adam_epsilon=train.eps,
        weight_decay=train.weight_decay,
        save_on_each_node=False,
        **{f"{kind}{end}": train.precision == kind for kind in ("fp16", "bf16") for end in ("", "_full_eval")},
        get_warmup_steps=lambda steps: train.num_warmup_steps,
    )
    filled = HfTrainerDeepSpeedConfig(copy.deepcopy(tree))
    filled.trainer_config_process(arguments)
    filled.trainer_config_finalize(
        arguments, SimpleNamespace(config=AutoConfig.from_pretrained(str(model))), train.steps
    )
    return dict(filled.config)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_auto_means_what_the_trainer_makes_of_it(
    workspace: Workspace, tmp_path: Path, stage: int, precision: str
) -> None:
    """All of what an engine is built with, against transformers' own code."""
    scheduler = {"type": "WarmupDecayLR", "params": dict.fromkeys(SCHEDULER, "auto")}
    tree = trainer_file(stage, scheduler=scheduler)
    config = config_with(workspace, tmp_path, tree, train={"schedule": "linear", "precision": precision})
    wanted = filled_in_by_the_trainer(tree, config, workspace.model)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    settings = EngineSettings(of_run(config, workspace), dtype, Ranks())
    train = config.train
    shape = StepShape(train.global_batch_size, train.micro_batch_size, STEPS, train.clip_grad_norm)
    mine = training_ds_config(settings, shape)
    if stage == 1 and precision == "bf16":
        assert mine["zero_optimization"].pop("stage") == 2
        assert wanted["zero_optimization"].pop("stage") == 1
    ours = {"optimizer", "scheduler", "bf16"}
    assert {key: mine[key] for key in wanted.keys() - ours} == {key: wanted[key] for key in wanted.keys() - ours}
    assert mine["bf16"]["enabled"] == wanted["bf16"]["enabled"]
    assert "auto" not in json.dumps(mine)
    assert not ours & mine.keys() - {"bf16"}, "the optimizer and its rates are the run's own"


SCHEDULER = ["warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"]


@pytest.mark.parametrize("model_type", ["gpt2", "qwen3_moe"])
def test_sizes_follow_from_the_width_of_any_family(workspace: Workspace, tmp_path: Path, model_type: str) -> None:
    model = save_tiny_model(tmp_path / "model", model_type)
    config = config_with(workspace, tmp_path, trainer_file(3))
    wanted = filled_in_by_the_trainer(trainer_file(3), config, model)["zero_optimization"]
    assert of_run(config, workspace, model=model)["zero_optimization"] == wanted


def test_a_model_without_a_width_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    written = json.loads((model / "config.json").read_text())
    del written["hidden_size"]
    (model / "config.json").write_text(json.dumps(written))
    with pytest.raises(InputError, match=r"says zero_optimization\.reduce_bucket_size: 'auto', .*; write a number$"):
        of_run(config_with(workspace, tmp_path, trainer_file(2)), workspace, model=model)


def test_auto_anywhere_else_in_zero_is_deepspeeds_default_as_in_the_trainer(
    workspace: Workspace, tmp_path: Path
) -> None:
    zero = {
        "stage": 2,
        "overlap_comm": "auto",
        "round_robin_gradients": "auto",
        "offload_param": {"device": "auto"},
        "stage3_prefetch_bucket_size": "auto",
    }
    found = of_run(config_with(workspace, tmp_path, {"zero_optimization": zero}), workspace)
    assert found["zero_optimization"] == {"stage": 2, "offload_param": {}}


def params(section: str, kind: str, **values: Any) -> dict[str, Any]:
    return {section: {"type": kind, "params": values}}


SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sizes of batches": (
        {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3},
        {},
    ),
    "clipping": ({"gradient_clipping": 0.5}, {}),
    "a number with a point": ({"gradient_clipping": 1.0, "train_batch_size": 12.0}, {"clip_grad_norm": 1}),
    "AdamW": (params("optimizer", "AdamW", lr=1e-2, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1), {}),
    "Adam, which is AdamW to DeepSpeed": (params("optimizer", "Adam", torch_adam=True, adam_w_mode=True), {}),
    "AdamW by its name alone": ({"optimizer": {"type": "adamw"}}, {}),
    "no warmup": (
        params("scheduler", "WarmupLR", warmup_num_steps=1, warmup_min_lr=0, warmup_max_lr=1e-2),
        {"schedule": "constant", "warmup_ratio": 0.0},
    ),
    "a warmup in steps": (
        params("scheduler", "WarmupCosineLR", warmup_num_steps=4, total_num_steps=7, warmup_type="linear"),
        {"warmup_ratio": 0.5},
    ),
    "precision": ({"fp16": {"enabled": False}, "bf16": {"enabled": True}}, {"precision": "bf16"}),
    "precision, by the old name": ({"bfloat16": {"enabled": True}}, {"precision": "bf16"}),
    "what is set anyway": (
        {
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "steps_per_print": None,
        },
        {},
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_what_is_said_twice_alike_is_taken(workspace: Workspace, tmp_path: Path, name: str) -> None:
    tree, train = SAME[name]
    found = of_run(config_with(workspace, tmp_path, {"zero_optimization": {"stage": 2}} | tree, train=train), workspace)
    assert found["zero_optimization"] == {"stage": 2}
    assert found.keys() <= {"zero_optimization", "fp16", "bf16", "bfloat16", "steps_per_print"}


CONTRADICTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "the batch": ({"train_batch_size": 64}, {}, "train_batch_size: 64, but train.global_batch_size is 12"),
    "the micro-batch": (
        {"train_micro_batch_size_per_gpu": 8},
        {},
        "train_micro_batch_size_per_gpu: 8, but train.micro_batch_size is 2",
    ),
    "accumulation": (
        {"gradient_accumulation_steps": 8},
        {},
        "gradient_accumulation_steps: 8, but train.global_batch_size: 12 on 2 ranks with train.micro_batch_size: 2",
    ),
    "clipping": ({"gradient_clipping": 0.7}, {}, "gradient_clipping: 0.7, but train.clip_grad_norm is 0.5"),
    "a number in quotes": ({"gradient_clipping": "0.5"}, {}, "gradient_clipping: '0.5', but"),
    "another optimizer": (params("optimizer", "Lion"), {}, "optimizer.type: 'Lion', but training steps with AdamW"),
    "Adam without decay of its own": (
        params("optimizer", "Adam", adam_w_mode=False),
        {},
        "optimizer.params.adam_w_mode: False, but training steps with AdamW",
    ),
    "the learning rate": (
        params("optimizer", "AdamW", lr=1e-3),
        {},
        "optimizer.params.lr: 0.001, but train.lr is 0.01",
    ),
    "betas": (
        params("optimizer", "AdamW", betas=[0.9, 0.999]),
        {},
        "optimizer.params.betas: [0.9, 0.999], but train.betas is [0.9, 0.95]",
    ),
    "eps": (params("optimizer", "AdamW", eps=1e-6), {}, "optimizer.params.eps: 1e-06, but train.eps is 1e-08"),
    "weight decay": (
        params("optimizer", "AdamW", weight_decay=0),
        {},
        "optimizer.params.weight_decay: 0, but train.weight_decay is 0.1",
    ),
    "a truth for a number": (
        params("optimizer", "AdamW", weight_decay=True),
        {"weight_decay": 1},
        "optimizer.params.weight_decay: True, but train.weight_decay is 1.0",
    ),
    "no correction of bias": (params("optimizer", "AdamW", bias_correction=False), {}, "bias_correction: False, but"),
    "another schedule": (
        params("scheduler", "WarmupLR"),
        {},
        "scheduler.type: 'WarmupLR', but train.schedule is cosine; set train.schedule: constant, which it stands for",
    ),
    "a schedule that there is not": (
        params("scheduler", "OneCycle", cycle_min_lr=0.1),
        {},
        "scheduler.type: 'OneCycle', but train.schedule is cosine, and none of its kinds is that; remove the section",
    ),
    "a schedule of no name": (
        params("scheduler", "WarmupDecayLR"),
        {"schedule": "wsd"},
        "scheduler.type: 'WarmupDecayLR', but train.schedule is wsd",
    ),
    "its highest rate": (
        params("scheduler", "WarmupCosineLR", warmup_max_lr=0.5),
        {},
        "scheduler.params.warmup_max_lr: 0.5, but train.lr is 0.01",
    ),
    "its warmup": (
        params("scheduler", "WarmupCosineLR", warmup_num_steps=100),
        {},
        "scheduler.params.warmup_num_steps: 100, but train.warmup_ratio: 0.3 of train.steps: 7 is 3",
    ),
    "its length": (
        params("scheduler", "WarmupCosineLR", total_num_steps=100),
        {},
        "scheduler.params.total_num_steps: 100, but train.steps is 7",
    ),
    "its form": (
        params("scheduler", "WarmupCosineLR", warmup_type="log"),
        {},
        "scheduler.params.warmup_type: 'log', but a warmup rises from 0 in equal steps",
    ),
    "its end": (
        params("scheduler", "WarmupCosineLR", cos_min_ratio=0.1),
        {},
        "scheduler.params.cos_min_ratio: 0.1, but the cosine ends at 0",
    ),
    "precision": ({"bf16": {"enabled": True}}, {}, "bf16.enabled: True, but train.precision is fp32"),
    "precision that is off": (
        {"bf16": {"enabled": False}},
        {"precision": "bf16"},
        "bf16.enabled: False, but train.precision is bf16",
    ),
    "half precision": (
        {"fp16": {"enabled": True}},
        {"precision": "bf16"},
        "fp16.enabled: True, but train.precision is",
    ),
    "no truth": (
        {"bfloat16": {"enabled": 1}},
        {"precision": "bf16"},
        "bfloat16.enabled: 1, but train.precision is bf16",
    ),
    "overflow": ({"bf16": {"check_grad_overflow": True}}, {}, "bf16.check_grad_overflow: True, but"),
    "what goes between ranks": ({"communication_data_type": "fp16"}, {}, "communication_data_type: 'fp16', but"),
    "what is added up": ({"data_types": {"grad_accum_dtype": "bf16"}}, {}, "data_types.grad_accum_dtype: 'bf16', but"),
    "an optimizer of DeepSpeed's": (
        {"zero_force_ds_cpu_optimizer": True},
        {},
        "zero_force_ds_cpu_optimizer: True, but",
    ),
    "no other optimizer": ({"zero_allow_untested_optimizer": False}, {}, "zero_allow_untested_optimizer: False, but"),
    "no rhythm": ({"steps_per_print": 0}, {}, "steps_per_print: 0, which is no number of steps; remove it"),
    "groups of hpZ": (
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}},
        {},
        "zero_optimization.zero_hpz_partition_size: 4, but 6 ranks are no whole number of such groups",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradiction_is_refused_in_one_line_with_both_values_and_both_places(
    workspace: Workspace, tmp_path: Path, name: str
) -> None:
    tree, train, words = CONTRADICTIONS[name]
    config = config_with(workspace, tmp_path, {"zero_optimization": {"stage": 3}} | tree, train=train)
    with pytest.raises(InputError, match=r"^deepspeed: '.*ds\.json' says .*; \w+") as refusal:
        of_run(config, workspace, ranks=6 if name == "groups of hpZ" else RANKS)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("tree", "remedy"),
    [
        (params("optimizer", "AdamW", weigth_decay=0.1), "did you mean 'optimizer.params.weight_decay'?"),
        (params("scheduler", "WarmupCosineLR", warmup_steps=3), "did you mean 'scheduler.params.warmup_"),
        (params("optimizer", "AdamW", max_grad_norm=1.0), "valid keys here: lr, betas, eps"),
    ],
)
def test_an_unknown_parameter_is_refused_with_the_nearest(
    workspace: Workspace, tmp_path: Path, tree: dict[str, Any], remedy: str
) -> None:
    with pytest.raises(InputError, match=r"ds\.json': unknown key '\w+\.params\.") as refusal:
        of_run(config_with(workspace, tmp_path, {"zero_optimization": {"stage": 3}} | tree), workspace)
    assert remedy in str(refusal.value)


def test_where_nothing_is_trained_no_number_of_ranks_is_wrong(workspace: Workspace, tmp_path: Path) -> None:
    """A file with a number of micro-batches also serves to probe and to evaluate, on other ranks."""
    tree = {"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 3}
    config = config_with(workspace, tmp_path, tree)
    for purpose in ("probe", "eval"):
        assert resolve(config, purpose, num_ranks=5).deepspeed == {"zero_optimization": {"stage": 3}}
    assert resolve(config, "train", num_ranks=2).deepspeed == {"zero_optimization": {"stage": 3}}
    with pytest.raises(InputError, match=r"gradient_accumulation_steps: 3, but .* on 1 rank .* makes 6"):
        resolve(config, "train", num_ranks=1)


def test_an_anchors_micro_batches_are_not_counted(workspace: Workspace, tmp_path: Path) -> None:
    """They are adept-ds's own; what a user counts is the batch."""
    tree = {"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 3, "train_batch_size": 12}
    settings = resolve(config_with(workspace, tmp_path, tree, anchor={"kind": "kl", "share": 0.5}), "train", 2)
    assert (settings.accumulation_steps or 0) > 3


def test_how_losses_are_scaled_in_fp16_is_the_files(workspace: Workspace, tmp_path: Path) -> None:
    tree = {"zero_optimization": {"stage": 2}, "fp16": {"enabled": "auto", "initial_scale_power": 7, "hysteresis": 3}}
    config = config_with(workspace, tmp_path, tree, train={"precision": "fp16"})
    settings = EngineSettings(of_run(config, workspace), torch.float16, Ranks())
    built = training_ds_config(settings, StepShape(1, 1, 1))
    assert built["fp16"] == {"enabled": True, "initial_scale_power": 7, "hysteresis": 3}


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_configuration_stays_as_it_is(workspace: Workspace, tmp_path: Path, path: Path) -> None:
    from adept_ds.config.deepspeed import check_deepspeed_file

    config = parse_config(workspace.tree(tmp_path / "run", deepspeed=str(path)))
    assert of_run(config, workspace) == check_deepspeed_file(path)
