"""`anchor.text: sampled` by `adept run`: what the base writes, at any number of ranks, once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from harness.launching import adept
from harness.marks import slow
from harness.method_runs import MethodRun
from harness.workspace import Workspace
from safetensors.torch import load_file

from adept_ds.base.files import write_json
from adept_ds.base.run_dir import checkpoint_tag
from adept_ds.training.sampled_text import chances

SEQUENCES, SEQ_LEN, END = 5, 16, 256
TRAIN: dict[str, Any] = {"steps": 4, "checkpoint_every": 2, "global_batch_size": 4, "lr": 1e-2}


def configured(workspace: Workspace, folder: Path, world_size: int) -> MethodRun:
    """Under ZeRO-3, nothing gathered."""
    folder.mkdir()
    strict = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    write_json(folder / "strict.json", strict)
    sections: dict[str, Any] = {"expand": {"layers": [1, 3]}, "train": TRAIN, "deepspeed": str(folder / "strict.json")}
    sections["data"] = {"seq_len": SEQ_LEN, "domain": [str(workspace.root / "domain.jsonl")]}
    sections["anchor"] = {"kind": "kl", "text": "sampled", "sequences": SEQUENCES}
    sections["probe"] = {"seed": 3}
    return MethodRun(workspace, folder, {"name": "llama_pro"}, 3, world_size, sections)


def written(model: Any, sequence: int) -> list[int]:
    """By the base alone, the whole text anew for each token."""
    tokens = [END]
    for chance in chances(sequence, SEQ_LEN, 3)[1:]:
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].double()
        tokens.append(int((logits.softmax(-1).cumsum(-1) <= chance).sum()))
    return tokens


@pytest.mark.parametrize("world_size", [slow(1), 2])
def test_it_is_what_the_base_writes_and_it_is_written_once(
    workspace: Workspace, tmp_path: Path, world_size: int
) -> None:
    run = configured(workspace, tmp_path / "run", world_size)
    run.start()
    file = run.files.anchor_text
    with torch.no_grad():
        expected = [written(oracle.load(workspace.model), sequence) for sequence in range(SEQUENCES)]
    assert load_file(file)["tokens"].tolist() == expected
    assert len({token for tokens in expected for token in tokens}) > 20
    assert [step["anchor_tokens"] for step in run.finished.steps()] == [SEQ_LEN] * 4  # one sequence a step
    before, weights = file.stat(), run.finished.weights()
    again = run.resumed()
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())
    file.write_bytes(b"nothing")
    shutil.rmtree(run.files.checkpoints / checkpoint_tag(4))
    result = adept(1, "run", run.file)
    assert result.returncode == 0, result.stderr
    assert f"{file}' is not as it was written (its SHA-256 is another): made again" in result.stdout
    assert load_file(file)["tokens"].tolist() == expected
