"""What DeepSpeed's files say is read by parameter, or refused in one line; what DeepSpeed wrote: zero/test_resuming."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.tensor_fragment import fragment_address

from adept_ds.base.errors import InputError
from adept_ds.weights.saved_state import WEIGHT, read_saved_state

SHAPES = {"a": (3, 3), "b": (2,)}
WEIGHTS = {"a": torch.arange(9.0), "b": torch.tensor([20.0, 21.0])}
OPTIMIZER = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def state(flat: torch.Tensor, sign: float = -1.0) -> dict[str, Any]:
    of_one = {"step": torch.tensor(4.0), "exp_avg": sign * flat, "exp_avg_sq": flat**2}
    return {"state": {0: of_one}, "param_groups": [{"lr": 0.5, "params": [0]}]}


def by_two_ranks(folder: Path, stage: int, **options: Any) -> Path:
    """As DeepSpeed's formats are described: at stage 3 each parameter in two, the second half with padding; below it
    both parameters in two, the first rank with six of the eleven elements."""
    folder.mkdir()
    shapes = [OrderedDict((name, torch.Size(shape)) for name, shape in SHAPES.items())]
    prefix = "zero_pp_rank_0_" if stage == 3 else ""
    counters = {"global_steps": 4, "global_samples": 48, "skipped_steps": 0}
    torch.save({"param_shapes": shapes} | counters, folder / f"{prefix}mp_rank_00_model_states.pt", **options)
    both = torch.cat(list(WEIGHTS.values()))
    for rank in (0, 1):
        if stage == 3:
            padded = torch.cat([WEIGHTS["a"], torch.zeros(1)]).view(2, 5)[rank], WEIGHTS["b"].view(2, 1)[rank]
            flat = torch.cat(padded)
            saved = {"fp32_flat_groups": [flat], "optimizer_state_dict": state(flat), "partition_count": 2}
        else:
            flat = both[:6] if rank == 0 else both[6:]
            places = [[("a", 0, 6)], [("a", 0, 3), ("b", 3, 2)]][rank]
            mapping = OrderedDict((name, fragment_address(start=start, numel=size)) for name, start, size in places)
            saved = {"single_partition_of_fp32_groups": [flat], "param_slice_mappings": [mapping]}
            # moments keep the padding that weights are saved without
            padding = torch.zeros(rank)
            saved |= {"base_optimizer_state": state(torch.cat([flat, padding])), "partition_count": [2]}
        saved |= {"zero_stage": stage, "loss_scaler": None, "dynamic_loss_scale": False, "overflow": False}
        torch.save({"optimizer_state_dict": saved}, folder / OPTIMIZER.format(rank), **options)
    return folder


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["mapped", "old format"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_parameter_has_its_elements_moments_and_step(tmp_path: Path, stage: int, options: dict[str, Any]) -> None:
    found = read_saved_state(by_two_ranks(tmp_path / "step_4", stage, **options))
    assert {name: parameter.shape for name, parameter in found.parameters.items()} == SHAPES
    for name, weight in WEIGHTS.items():
        parameter = found.parameters[name]
        for key, values in {WEIGHT: weight, "exp_avg": -weight, "exp_avg_sq": weight**2}.items():
            assert torch.equal(parameter.elements(key, 1, len(weight)), values[1:])
        assert float(parameter.scalars["step"]) == 4
    assert found.param_groups[0]["lr"] == 0.5
    assert found.counters == {"global_steps": 4, "global_samples": 48, "skipped_steps": 0}


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def of_another_shape(file: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, file)


@pytest.mark.parametrize("damage", [Path.unlink, truncated, emptied, of_another_shape])
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", [OPTIMIZER.format(0), OPTIMIZER.format(1), "model_states.pt"])
def test_damage_is_one_line_that_names_the_checkpoint(tmp_path: Path, stage: int, name: str, damage: Any) -> None:
    folder = by_two_ranks(tmp_path / "step_4", stage)
    (file,) = folder.glob(f"*{name}")
    damage(file)
    with pytest.raises(InputError, match=r"^'.*step_4.*' (cannot be read|is damaged) \([^\n]*\); copy"):
        read_saved_state(folder)


@pytest.mark.parametrize("stage", [2, 3])
def test_files_that_do_not_fit_each_other_are_no_checkpoint(tmp_path: Path, stage: int) -> None:
    """Of two ranks' files one was left out, and nobody missed it by its number."""
    folder = by_two_ranks(tmp_path / "step_4", stage)
    (folder / OPTIMIZER.format(1)).unlink()
    with pytest.raises(InputError, match=r"is damaged \(ValueError: .* elements of fp32 of a\)"):
        read_saved_state(folder)
