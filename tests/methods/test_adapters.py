"""`adept run` with adapters: by two ranks under ZeRO, merged at export, and the same as peft's own training.

That an adapter's training equals peft's under every stage is tested beside the mechanism (tests/models); here is what
the run adds: rows, rates, resumption, export.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from harness.complaints import assert_one_line
from harness.finished_run import Finished
from harness.launching import adept
from harness.packing import pack, rows_of_step
from harness.workspace import Workspace
from safetensors.torch import load_file, save_file

from adept_ds.base.files import read_json
from adept_ds.base.run_dir import RunDirectory, checkpoint_tag
from adept_ds.config.loading import load_config

LORA_PLUS = {"name": "lora", "rank": 3, "alpha": 6.0, "lr_ratio": 4.0}
OFT = {"name": "oft", "block_size": 5, "targets": ["self_attn.q_proj", "mlp.up_proj"]}
CASES = [pytest.param(LORA_PLUS, 3, 2, id="lora"), pytest.param(OFT, 2, 1, id="oft", marks=pytest.mark.slow)]


def configured(workspace: Workspace, folder: Path, method: Any, stage: int = 3) -> Path:
    tree = workspace.tree(folder / "run", method=method, train={"steps": 3, "checkpoint_every": 2})
    del tree["importance"], tree["expand"]
    tree["deepspeed"] = str(folder / "zero.json")
    Path(tree["deepspeed"]).write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    file = folder / "run.yaml"
    file.write_text(json.dumps(tree))
    return file


def merged_by_peft(workspace: Workspace, file: Path, rates: list[float], cache: Path) -> dict[str, torch.Tensor]:
    """The same rows through peft and torch.optim in one process."""
    from peft import LoraConfig, OFTConfig, get_peft_model

    config = load_config(file)
    method, train = config.method.model_dump(), config.train
    torch.manual_seed(train.seed)
    if method["name"] == "lora":
        peft: Any = LoraConfig(r=method["rank"], lora_alpha=method["alpha"], target_modules="all-linear")
    else:
        peft = OFTConfig(oft_block_size=method["block_size"], target_modules=["q_proj", "up_proj"])
    model: Any = get_peft_model(oracle.load(workspace.model).train(), peft)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    ratio = method.get("lr_ratio", 1.0)
    groups = [{"params": [parameter], "factor": ratio if "lora_B" in name else 1.0} for name, parameter in named]
    optimizer = torch.optim.AdamW(groups, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay)
    blocks = pack([workspace.root / "domain.jsonl"], workspace.model, cache, seq_len=config.data.seq_len)
    for step, lr in enumerate(rates):
        optimizer.zero_grad()
        oracle.mean_loss(model, [rows_of_step(blocks, step, train.global_batch_size, train.seed)]).backward()
        torch.nn.utils.clip_grad_norm_([parameter for _, parameter in named], train.clip_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        optimizer.step()
    return dict(model.merge_and_unload().state_dict())


@pytest.mark.parametrize(("method", "stage", "world_size"), CASES)
def test_a_run_is_what_peft_computes_with_the_same_rows_and_resumes_bit_for_bit(
    workspace: Workspace, tmp_path: Path, method: dict[str, Any], stage: int, world_size: int
) -> None:
    """Exported weights of three steps to 5e-5, where a step is of the size of the learning rate, 1e-2."""
    file, run = configured(workspace, tmp_path, method, stage), Finished(tmp_path / "run")
    result = adept(world_size, "run", file)
    assert result.returncode == 0, result.stderr
    exported = run.weights()
    wanted = merged_by_peft(workspace, file, [record["lr"] for record in run.steps()], tmp_path / "cache")
    assert exported.keys() == wanted.keys() - {"lm_head.weight"}  # tied
    for name, tensor in exported.items():
        assert float((wanted[name] - tensor).abs().max()) <= 5e-5, name
    files = RunDirectory(run.directory)
    summary = read_json(files.summary)
    assert summary["trainable_parameters"] == sum(unit["numel"] for unit in run.movement()[-1]["units"])
    shutil.rmtree(files.checkpoints / checkpoint_tag(3))
    result = adept(world_size, "run", file)
    assert result.returncode == 0, result.stderr
    assert all(torch.equal(exported[name], tensor) for name, tensor in run.weights().items())


def test_a_checkpoint_alone_says_how_its_adapters_are_merged(workspace: Workspace, tmp_path: Path) -> None:
    file = configured(workspace, tmp_path, LORA_PLUS)
    assert adept(1, "run", file, "train.steps=1").returncode == 0
    exported = (tmp_path / "run" / "export" / "model.safetensors").read_bytes()
    for number, checkpoint in enumerate(("checkpoints/step_1", "checkpoints")):  # also by its `latest`
        out = tmp_path / f"out{number}"
        result = adept(1, "export", tmp_path / "run" / checkpoint, out, "--base", workspace.model)
        assert result.returncode == 0, result.stderr
        assert (out / "model.safetensors").read_bytes() == exported


def test_an_adapter_is_not_merged_into_another_base(workspace: Workspace, tmp_path: Path) -> None:
    """Of the same shapes, which contents alone tell apart; also where the directory above the checkpoint is given."""
    file = configured(workspace, tmp_path, LORA_PLUS)
    assert adept(1, "run", file, "train.steps=1").returncode == 0
    other = tmp_path / "other"
    shutil.copytree(workspace.model, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    for checkpoint in (tmp_path / "run" / "checkpoints", tmp_path / "run" / "checkpoints" / "step_1"):
        result = adept(1, "export", checkpoint, tmp_path / "out", "--base", other)
        assert result.returncode == 2
        assert_one_line(result.stderr, ["--base: ", "trained from another model than", "give its own"])
        assert not (tmp_path / "out").exists()


def test_training_does_not_go_on_with_other_adapters_or_another_method(workspace: Workspace, tmp_path: Path) -> None:
    assert adept(1, "run", configured(workspace, tmp_path, LORA_PLUS), "train.steps=1").returncode == 0
    others: list[tuple[Any, list[str]]] = [
        (LORA_PLUS | {"rank": 4}, ["method.rank: ", "3, not 4"]),
        ("full", ["method.name: ", "'lora'"]),
    ]
    for method, words in others:
        result = adept(1, "run", configured(workspace, tmp_path, method), "train.steps=1")
        assert result.returncode == 2
        assert_one_line(result.stderr, words)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        pytest.param({"name": "oft", "block_size": 3}, ["method.block_size: 3", "20 inputs"], id="block"),
        pytest.param(
            {"name": "lora", "targets": ["self_attn.w_proj"]}, ["method.targets: 'self_attn.w_proj'"], id="none"
        ),
        pytest.param({"name": "lora", "rank": 0}, ["method.rank: 0"], id="rank"),
        pytest.param({"name": "lora", "targets": []}, ["method.targets: []"], id="empty"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_before_anything_heavy(
    workspace: Workspace, tmp_path: Path, method: dict[str, Any], words: list[str]
) -> None:
    result = adept(1, "run", configured(workspace, tmp_path, method))
    assert result.returncode == 2
    assert_one_line(result.stderr, words)
    assert not (tmp_path / "run").exists()
