"""Ranks meet, or say in one line who is missing."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness.launching import ROOT, free_port, rank_environment
from harness.rank_processes import RankProcess
from harness.waiting import until
from harness.workspace import Workspace

from adept_ds.base.errors import InputError, UnreachedError
from adept_ds.ranks import meeting
from adept_ds.ranks.launchers import LaunchedRank
from adept_ds.ranks.meeting import meet, of_this_start

SOON = 0.02
"""Minutes."""


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_LOOKS", 0.02)
    monkeypatch.setattr(meeting, "_FIRST_SAID", 0.5)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Ranks are threads here: a store does not care."""
    with ThreadPoolExecutor(8) as pool:
        yield pool


def rank(number: int, size: int, port: int, host: str = "127.0.0.1") -> LaunchedRank:
    return LaunchedRank(number, size, number, size, host, port, "env")


def test_all_ranks_meet_whoever_comes_first(pool: ThreadPoolExecutor) -> None:
    port, said = free_port(), list[str]()
    others = [pool.submit(meet, rank(number, 3, port), 1.0, said.append) for number in (1, 2)]
    until(lambda: len(said) >= 2)
    stores = [meet(rank(0, 3, port), 1.0, said.append), *(other.result() for other in others)]
    stores[2].set("key", "value")
    assert [store.get("key") for store in stores] == [b"value"] * 3
    assert said[0].startswith(f"waiting for rank 0 at 127.0.0.1:{port}, ")
    assert said[0].endswith(" s")


def test_whoever_waits_for_rank_0_in_vain_says_where_it_looked() -> None:
    port, said = free_port(), list[str]()
    with pytest.raises(UnreachedError) as failure:
        meet(rank(1, 2, port), SOON, said.append)
    assert str(failure.value).startswith(
        f"MASTER_ADDR: rank 0 was not reached at 127.0.0.1:{port} within 0.02 minutes (nobody listens there); "
    )
    assert "dist_timeout_minutes" in str(failure.value)
    assert 1 <= len(said) <= 4, "each time after twice as long"


def test_a_name_that_is_not_known_is_said_at_once() -> None:
    said = list[str]()
    with pytest.raises(UnreachedError, match="its name is not known"):
        meet(rank(1, 2, 20003, "nowhere.invalid"), SOON, said.append)
    assert said[0].startswith("waiting for rank 0 at nowhere.invalid:20003 (its name is not known: ")


def test_rank_0_names_those_who_did_not_come_and_all_others_learn_it(pool: ThreadPoolExecutor) -> None:
    port, said = free_port(), list[str]()
    ranks = [pool.submit(meet, rank(number, 4, port), SOON, said.append) for number in (0, 2)]
    for met in ranks:
        with pytest.raises(InputError, match=r"^ranks 1, 3 of 4 did not come within 0.02 minutes; start all ranks"):
            met.result()
    assert any(line.startswith("waiting for ranks 1, 3 of 4, ") for line in said)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"^MASTER_PORT: {port} is taken on the host of rank 0; set another$"):
            meet(rank(0, 2, port), SOON, lambda text: None)
        # It takes the connection and never answers, which torch alone would wait for without end.
        with pytest.raises(UnreachedError, match="something else listens there"):
            meet(rank(1, 2, port), SOON, lambda text: None)


# --- the command ---------------------------------------------------------------------------------------------------


def begin(workspace: Workspace, run_dir: Path, number: int, minutes: float) -> RankProcess:
    """One rank of three that look for rank 0 where there is no host."""
    config = workspace.config(run_dir, dist_timeout_minutes=minutes)
    environment = rank_environment(number, 3, free_port()) | {"MASTER_ADDR": "nowhere.invalid"}
    return RankProcess(["-m", "adept_ds", "run", str(config)], environment, ROOT)


def test_ranks_without_rank_0_end_with_one_line_for_all_of_them(workspace: Workspace, tmp_path: Path) -> None:
    processes = [begin(workspace, tmp_path / "run", number, SOON) for number in (1, 2)]
    said = [process.communicate(timeout=300)[1].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert said[1] == []
    waiting, refusal = said[0]
    assert waiting.startswith("adept: waiting for rank 0 at nowhere.invalid:")
    assert refusal.startswith("adept: MASTER_ADDR: rank 0 was not reached at nowhere.invalid:")


def test_a_rank_that_waits_is_not_deaf(workspace: Workspace, tmp_path: Path) -> None:
    """Nothing is lost before ranks have met: SIGTERM does what it always does."""
    process = begin(workspace, tmp_path / "run", 1, 60.0)
    try:
        until(lambda: "waiting for rank 0" in process.said(), timeout=300)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
        assert time.monotonic() - begun < 50
    finally:
        process.kill()


def test_ranks_that_torchrun_starts_again_see_nothing_of_those_before_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A call for the roll, above all, that the first start ended with."""
    import torch.distributed as dist

    store, seen = dist.HashStore(), []
    for restart in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
        found = of_this_start(store)
        seen.append(found.check(["adept_ds/call"]))
        found.set("adept_ds/call", "hangs")
    assert seen == [False, False]
