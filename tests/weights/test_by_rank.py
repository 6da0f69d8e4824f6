"""Whatever cut a parameter, any elements of it are found again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adept_ds.weights.by_rank import SavedElements, elements_file, elements_of, files_by_rank

WHOLE = {"a": torch.arange(11.0), "b": 100 + torch.arange(3.0)}


def written(folder: Path, cuts: dict[str, list[int]]) -> SavedElements:
    """`cuts`: of each parameter, how many elements each rank has."""
    ranks = len(cuts["a"])
    for rank in range(ranks):
        starts = {name: sum(sizes[:rank]) for name, sizes in cuts.items()}
        mine = {name: WHOLE[name][starts[name] :][: cuts[name][rank]] for name in cuts if cuts[name][rank]}
        save_file(mine, folder / elements_file("fisher", rank))
    return SavedElements(folder, "fisher")


@pytest.mark.parametrize(
    "cuts",
    [
        pytest.param({"a": [11], "b": [3]}, id="one rank"),
        pytest.param({"a": [6, 5], "b": [2, 1]}, id="each parameter by itself"),
        pytest.param({"a": [7, 4, 0], "b": [0, 3, 0]}, id="like one long vector, and padding"),
        pytest.param({"a": [1] * 11, "b": [1] * 3 + [0] * 8}, id="eleven ranks"),
    ],
)
def test_every_run_of_elements_is_read_wherever_it_lies(tmp_path: Path, cuts: dict[str, list[int]]) -> None:
    saved = written(tmp_path, cuts)
    for name, whole in WHOLE.items():
        for start in range(len(whole)):
            for stop in range(start + 1, len(whole) + 1):
                assert torch.equal(saved.of(name, start, stop), whole[start:stop])


def test_what_is_missing_is_no_shorter_run() -> None:
    with pytest.raises(ValueError, match="of 5 elements there are 4"):
        elements_of([torch.zeros(3), torch.zeros(1)], 2, 5)


def test_files_come_in_the_order_of_ranks_and_all_or_none(tmp_path: Path) -> None:
    """Ten before nine by name."""
    for rank in range(11):
        (tmp_path / f"x_{rank}.pt").touch()
    (tmp_path / "x_latest.pt").touch()
    assert [path.name for path in files_by_rank(tmp_path, r"x_(\d+)\.pt")] == [f"x_{rank}.pt" for rank in range(11)]
    (tmp_path / "x_4.pt").unlink()
    with pytest.raises(ValueError, match=r"ranks \[0, 1, 2, 3, 5"):
        files_by_rank(tmp_path, r"x_(\d+)\.pt")
    with pytest.raises(ValueError, match=r"ranks \[\]"):
        files_by_rank(tmp_path, r"y_(\d+)\.pt")
