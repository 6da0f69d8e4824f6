"""Checkpoints of DeepSpeed's are read as data: whatever else a file names is refused, and does not run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from adept_ds.base.errors import InputError
from adept_ds.weights.deepspeed_files import reading_data_only
from adept_ds.weights.export import read_zero_checkpoint


class Runs:
    """Unpickled by the rules, it makes a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self._directory),))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "step_1" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    path.parent.mkdir()
    return path


def test_a_file_that_names_code_is_refused_and_nothing_of_it_runs(file: Path, tmp_path: Path) -> None:
    for written in (file, file.with_name("zero_pp_rank_0_mp_rank_00_model_states.pt")):
        torch.save({"optimizer_state_dict": Runs(tmp_path / "canary")}, written)
    with reading_data_only(), pytest.raises(InputError, match=r"optim_states\.pt' names .*mkdir, which is no data"):
        torch.load(file, weights_only=False)  # as DeepSpeed asks
    with pytest.raises(InputError, match="which is no data and could run code"):
        read_zero_checkpoint(file.parent)
    assert not (tmp_path / "canary").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "canary").is_dir(), "what it would have done"


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"no checkpoint at all", b"\x80\x02}q\x00."])
def test_a_damaged_file_is_refused_in_one_line(file: Path, content: bytes) -> None:
    for written in (file, file.with_name("zero_pp_rank_0_mp_rank_00_model_states.pt")):
        written.write_bytes(content)
    with pytest.raises(InputError, match=r"^'.*step_1.*' (cannot be read|is damaged) \(") as refusal:
        read_zero_checkpoint(file.parent)
    assert "\n" not in str(refusal.value)


def test_tensors_and_plain_values_are_read_and_the_switch_is_set_back(file: Path) -> None:
    saved: dict[str, Any] = {"step": 3, "shape": torch.Size([2, 3]), "weight": torch.arange(6.0)}
    torch.save(saved, file)
    before = torch.load
    with reading_data_only():
        found = torch.load(file, weights_only=False)
    assert torch.load is before
    assert found["step"] == 3
    assert torch.equal(found["weight"], saved["weight"])


class ByName:
    """Pickled as Python 3.11.0 to 3.11.3 do it with members of an enumeration: getattr(its class, its name)."""

    def __init__(self, of: object, name: str) -> None:
        self._of, self._name = of, name

    def __reduce__(self) -> tuple[Any, ...]:
        return (getattr, (self._of, self._name))


def test_the_stage_that_another_python_wrote_by_name_is_read(file: Path) -> None:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    for written in (ByName(ZeroStageEnum, "weights"), ZeroStageEnum.weights):
        torch.save({"zero_stage": written}, file)
        with reading_data_only():
            assert torch.load(file)["zero_stage"] is ZeroStageEnum.weights


def test_by_name_nothing_else_is_got_hold_of(file: Path) -> None:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    of_data = {"weights": 3}
    for of, name in (
        (ZeroStageEnum, "__subclasses__"),
        (torch.Size, "numel"),
        (ByName, "__init__"),
        (of_data, "weights"),
    ):
        torch.save({"zero_stage": ByName(of, name)}, file)
        with reading_data_only(), pytest.raises(InputError, match=r"and could run code|cannot be read"):
            torch.load(file)
