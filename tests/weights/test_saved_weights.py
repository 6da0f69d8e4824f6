"""What checkpoints hold is put together a tensor at a time, whatever the size of the model."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.tensor_fragment import fragment_address
from harness.domains import all_tensors
from harness.launching import launch
from safetensors.torch import load_file

from adept_ds.weights.export import read_zero_checkpoint
from adept_ds.weights.synthetic import Synthetic, write_synthetic

MIB = 1 << 20

_WATCHED = """
import json, sys
from pathlib import Path
from adept_ds.weights.export import export_checkpoint, read_zero_checkpoint

def anonymous():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024

base, checkpoint, out = map(Path, sys.argv[1:])
read_zero_checkpoint(checkpoint)  # whatever is imported on the way
start, seen = anonymous(), []
export_checkpoint(base, checkpoint, out, progress=lambda share, text: seen.append(anonymous()))
print(json.dumps([max(seen) - start, len(seen)]))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 MiB in fp32, its largest tensor 1 MiB."""
    folder = tmp_path_factory.mktemp("base") / "model"
    write_synthetic(Synthetic("llama", 10_500_000, dtype="float32"), folder)
    sizes = [tensor.nbytes for tensor in all_tensors(folder).values()]
    assert sum(sizes) > 38 * MIB and max(sizes) <= 2 * MIB
    return folder


def saved_by_two_ranks(folder: Path, tensors: dict[str, torch.Tensor], stage: int) -> Path:
    """A checkpoint in which everything trained, in DeepSpeed's formats, from tensors of even numbers of elements."""
    folder.mkdir()
    shapes = [OrderedDict((name, tensor.shape) for name, tensor in tensors.items())]
    prefix = "zero_pp_rank_0_" if stage == 3 else ""
    counters = {"global_steps": 1, "global_samples": 1, "skipped_steps": 0}
    torch.save({"param_shapes": shapes, "module": {}} | counters, folder / f"{prefix}mp_rank_00_model_states.pt")
    whole = torch.cat([tensor.flatten() for tensor in tensors.values()])
    for rank in (0, 1):
        if stage == 3:
            flat = torch.cat([tensor.view(2, -1)[rank] for tensor in tensors.values()])
        else:
            flat = whole.view(2, -1)[rank].clone()
        inner = {"state": {0: {"exp_avg": flat, "exp_avg_sq": flat}}, "param_groups": [{"lr": 0.5}]}
        saved: dict[str, Any] = {"zero_stage": stage, "partition_count": 2}
        if stage == 3:
            saved |= {"fp32_flat_groups": [flat], "optimizer_state_dict": inner}
        else:
            mapping, begin, half = OrderedDict(), 0, whole.numel() // 2
            for name, tensor in tensors.items():
                first, last = max(begin, rank * half), min(begin + tensor.numel(), (rank + 1) * half)
                if first < last:
                    mapping[name] = fragment_address(start=first - rank * half, numel=last - first)
                begin += tensor.numel()
            saved |= {"single_partition_of_fp32_groups": [flat], "param_slice_mappings": [mapping]}
            saved |= {"base_optimizer_state": inner}
        torch.save({"optimizer_state_dict": saved}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says how much of memory is the process's own")
@pytest.mark.parametrize("stage", [2, 3])
def test_a_few_tensors_are_in_memory_at_once(base: Path, tmp_path: Path, stage: int) -> None:
    """Looked at after each of the tensors: 8 MiB of 40 leave room for what the allocator keeps, and for no model.

    The process's own memory is meant: pages of mapped files are the kernel's to take back.
    """
    trained = {name: tensor + 1 for name, tensor in all_tensors(base).items()}
    checkpoint = saved_by_two_ranks(tmp_path / "step_1", trained, stage)
    result = launch(1, ["-c", _WATCHED, str(base), str(checkpoint), str(tmp_path / "out")])
    assert result.returncode == 0, result.stderr
    most, looks = json.loads(result.stdout.splitlines()[-1])
    assert looks >= len(trained)
    assert most < 8 * MIB
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in trained.items())


def test_what_is_there_is_known_without_reading_it(base: Path, tmp_path: Path) -> None:
    tensors = all_tensors(base)
    found = read_zero_checkpoint(saved_by_two_ranks(tmp_path / "step_1", tensors, 3))
    assert found.keys() == tensors.keys() and len(found) == len(tensors)
    assert "nothing" not in found
    with pytest.raises(KeyError):
        found["nothing"]
