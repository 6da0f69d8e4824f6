"""Ranks that meet in a process group, and what they leave behind."""

from __future__ import annotations

from harness.launching import launch

_MEET = """
import os, pathlib, torch, torch.distributed as dist
from adept_ds.ranks.extensions import directory_of_environment
from adept_ds.ranks.groups import join
from adept_ds.ranks.launchers import rank_from_environment
import deepspeed.comm
shared = pathlib.Path("/dev/shm") / f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{os.environ['MASTER_PORT']}_"
stale = pathlib.Path(f"{shared}{os.environ['RANK']}")
if shared.parent.is_dir():
    stale.write_bytes(b"of a run that crashed")
leftover = directory_of_environment() / "deepspeed_shm_comm" / "lock"  # of a build that was killed
leftover.parent.mkdir(parents=True, exist_ok=True)
leftover.touch()
ranks = join(rank_from_environment(os.environ))
leftover.unlink(missing_ok=True)
assert os.environ["TORCH_EXTENSIONS_DIR"] == str(leftover.parent.parent)
total = torch.ones(1000) * (ranks.rank + 1)
deepspeed.comm.all_reduce(total)
assert (total == 3).all()
dist.barrier()
assert not list(shared.parent.glob(shared.name + "*")), "its memory would stay taken until the host restarts"
"""


def test_ranks_leave_no_shared_memory_behind_and_mind_nothing_that_others_left() -> None:
    result = launch(2, ["-c", _MEET], timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]


_GUEST = """
import os, torch.distributed as dist
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.groups import joined, leave
assert joined() == Ranks(), "there is no group"
dist.init_process_group("gloo")
ranks = joined()
rank = int(os.environ["RANK"])
assert (ranks.rank, ranks.world_size, ranks.local_size, ranks.is_main) == (rank, 2, 2, rank == 0)
assert ranks.sum([1.0, rank]).tolist() == [2.0, 1.0]
assert ranks.on_main(lambda: "from rank 0") == "from rank 0"
leave()
assert not dist.is_initialized()
leave()
assert joined() == Ranks()
"""


def test_a_group_that_somebody_else_has_made_is_joined_as_it_is() -> None:
    result = launch(2, ["-c", _GUEST], timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]


_APART = """
import os, sys, torch.distributed as dist
from adept_ds.ranks.groups import join, leave
from adept_ds.ranks.launchers import rank_from_environment
env = dict(os.environ)
announced = {name: env.pop(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")}
env |= {"SLURM_PROCID": announced["RANK"], "SLURM_STEP_NUM_TASKS": announced["WORLD_SIZE"]}
for name in announced:
    del os.environ[name]
ranks = join(rank_from_environment(env))
assert {name: os.environ[name] for name in announced} == announced, "what DeepSpeed and torch look for"
assert ranks.gather(ranks.rank) == [0, 1]
leave()
"""


def test_ranks_of_a_launcher_that_torch_does_not_know_meet_as_well() -> None:
    result = launch(2, ["-c", _APART], timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
