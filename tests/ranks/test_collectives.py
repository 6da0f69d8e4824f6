"""How ranks agree, and what happens on all of them when one fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.launching import launch

from adept_ds.base.errors import InputError
from adept_ds.ranks.collectives import Ranks

PROGRAM = """
import dataclasses, datetime, json, os, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from adept_ds.base.errors import AdeptError, InputError
from adept_ds.ranks.groups import join, joined, leave
from adept_ds.ranks.launchers import rank_from_environment

ranks = join(rank_from_environment(os.environ))
found = {"rank": ranks.rank, "size": [ranks.world_size, ranks.local_size]}

def caught(action):
    try:
        return ["returned", action()]
    except Exception as error:
        return [type(error).__name__, str(error)]

def fail(error):
    raise error

found["sum"] = ranks.sum([ranks.rank + 0.1, 1.0]).tolist()
found["slice of sum"] = ranks.slice_of_sum(torch.tensor([1.0, 2.0, 3.0]) * (1 + ranks.rank)).tolist()
found["max"] = ranks.max(float(ranks.rank), -1.0 * ranks.rank)
found["equal"] = [ranks.all_equal(3.0), ranks.all_equal(float(ranks.rank))]
found["gather"] = ranks.gather({"r": ranks.rank})
found["main"] = ranks.on_main(lambda: f"from {ranks.rank}")
found["input error"] = caught(lambda: ranks.on_main(lambda: fail(InputError("train.lr: no"))))
found["other error"] = caught(lambda: ranks.on_main(lambda: fail(KeyError("steps"))))
path = Path("/nowhere" if ranks.rank == 1 else sys.argv[1])
found["each"] = caught(lambda: ranks.on_each(lambda: len(list(path.iterdir())) * 0, "share it"))
found["each works"] = ranks.on_each(lambda: ranks.rank, "share it")
patience = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=3))
impatient = dataclasses.replace(ranks, of_main=patience, sign_of_life=0.3)
found["long"] = caught(lambda: impatient.on_main(lambda: time.sleep(5) or "done"))
found["joined"] = joined().gather(ranks.rank)
found["still together"] = ranks.sum([1.0]).item()
Path(sys.argv[1], f"{ranks.rank}.json").write_text(json.dumps(found))
leave()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    result = launch(2, ["-c", PROGRAM, str(folder)], timeout=120)
    assert result.returncode == 0, result.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_every_rank_gets_the_same_answers(found: list[dict[str, Any]]) -> None:
    for rank, mine in enumerate(found):
        assert mine["rank"] == rank
        assert mine["size"] == [2, 2]
        assert mine["sum"] == [1.2000000000000002, 2.0]  # float64: 0.1 + 1.1
        assert mine["max"] == [1.0, 0.0]
        assert mine["equal"] == [True, False]
        assert mine["gather"] == [{"r": 0}, {"r": 1}]
        assert mine["main"] == "from 0"
        assert mine["joined"] == [0, 1]


def test_every_rank_gets_its_share_of_a_large_sum(found: list[dict[str, Any]]) -> None:
    """3, 6 and 9 on two ranks; the last share is completed with a zero. One rank alone has it all."""
    assert [mine["slice of sum"] for mine in found] == [[3.0, 6.0], [9.0, 0.0]]
    assert Ranks().slice_of_sum(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]


def test_an_error_of_rank_0_ends_the_others_too(found: list[dict[str, Any]]) -> None:
    """Nobody is left waiting, whatever kind of error it is; rank 0 itself keeps its own, with its traceback."""
    assert [mine["input error"] for mine in found] == [["InputError", "train.lr: no"]] * 2
    assert found[0]["other error"] == ["KeyError", "'steps'"]
    assert found[1]["other error"] == ["AdeptError", "rank 0 failed: KeyError: 'steps'"]
    assert all(mine["still together"] == 2.0 for mine in found)


def test_work_of_rank_0_may_take_longer_than_the_timeout(found: list[dict[str, Any]]) -> None:
    """The others wait for its next sign of life, and for no longer than that."""
    assert [mine["long"] for mine in found] == [["returned", "done"]] * 2


def test_what_one_rank_cannot_read_ends_all_of_them_by_its_name(found: list[dict[str, Any]]) -> None:
    for mine in found:
        kind, message = mine["each"]
        assert kind == "InputError"
        assert message.startswith("rank 1: FileNotFoundError: ")
        assert message.endswith("'/nowhere'; share it")
    assert [mine["each works"] for mine in found] == [0, 1]


def silent() -> None:
    raise TimeoutError


def test_a_process_alone_needs_no_process_group() -> None:
    ranks = Ranks()
    assert ranks.is_main
    assert ranks.sum(torch.tensor([0.5, 2.0])).tolist() == [0.5, 2.0]
    assert ranks.max(1.0, 2.0) == [1.0, 2.0]
    assert ranks.all_equal(1.0)
    assert ranks.gather("x") == ["x"]
    assert ranks.on_main(lambda: 5) == ranks.on_each(lambda: 5, "") == 5
    ranks.barrier()
    with pytest.raises(KeyError):
        ranks.on_main(lambda: dict[str, int]()["no"])
    with pytest.raises(InputError, match=r"rank 0: FileNotFoundError: .*nowhere.*; look"):
        ranks.on_each(lambda: Path("/nowhere").read_text(), "look")
    with pytest.raises(InputError, match="rank 0: TimeoutError: ; look"):
        ranks.on_each(silent, "look")
