"""Ranks are derived from what each launcher puts into the environment."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from adept_ds.base.errors import InputError
from adept_ds.ranks import launchers as launchers_module
from adept_ds.ranks.launchers import (
    LaunchedRank,
    is_first_of_host,
    is_under_mpi,
    rank_from_environment,
    share_cores,
)


def test_without_a_launcher_there_is_one_process() -> None:
    ranks = rank_from_environment({})
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.launcher) == (0, 1, 0, "none")


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        pytest.param(
            {
                "RANK": "5",
                "WORLD_SIZE": "8",
                "LOCAL_RANK": "1",
                "LOCAL_WORLD_SIZE": "4",
                "MASTER_ADDR": "10.0.0.1",
                "MASTER_PORT": "29501",
            },
            LaunchedRank(5, 8, 1, 4, "10.0.0.1", 29501, "env"),
            id="torchrun",
        ),
        pytest.param(
            {
                "RANK": "1",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "1",
                "LOCAL_SIZE": "2",
                "CROSS_RANK": "0",
                "CROSS_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "29500",
            },
            LaunchedRank(1, 2, 1, 2, "127.0.0.1", 29500, "env"),
            id="deepspeed",
        ),
        pytest.param(
            {
                "SLURM_PROCID": "4",
                "SLURM_STEP_NUM_TASKS": "6",
                "SLURM_LOCALID": "0",
                "SLURM_NTASKS_PER_NODE": "2",
                "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
                "SLURM_JOB_NODELIST": "gpu03",
                "SLURM_JOB_ID": "123456",
            },
            LaunchedRank(4, 6, 0, 2, "gpu03", 20000 + 123456 % 10000, "slurm"),
            id="slurm",
        ),
        pytest.param(
            {
                "PMI_RANK": "1",
                "PMI_SIZE": "2",
                "PMIX_RANK": "1",
                "PMIX_NAMESPACE": "slurm.pmix.7.3",
                "SLURM_PROCID": "1",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_LOCALID": "1",
                "SLURM_STEP_TASKS_PER_NODE": "2",
                "SLURM_STEP_NODELIST": "n1",
                "SLURM_JOB_ID": "7",
                "SLURM_STEP_ID": "3",
            },
            LaunchedRank(1, 2, 1, 2, "127.0.0.1", 20000 + 7 + 3 * 1009, "slurm"),
            id="slurm-with-pmix-on-one-node",
        ),
        pytest.param(
            {
                "RANK": "0",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "29504",
                "SLURM_PROCID": "0",
                "SLURM_STEP_NUM_TASKS": "1",
                "SLURM_LOCALID": "0",
            },
            LaunchedRank(0, 2, 0, 2, "127.0.0.1", 29504, "env"),
            id="torchrun-in-a-slurm-step",
        ),
    ],
)
def test_ranks_are_those_that_the_launcher_announces(env: dict[str, str], expected: LaunchedRank) -> None:
    assert rank_from_environment(env) == expected


def test_mpirun_with_one_rank_needs_no_mpi() -> None:
    """What `adept compare` starts would inherit its variables, but not its place in MPI."""
    env = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    ranks = rank_from_environment(env)
    assert (ranks.rank, ranks.world_size, ranks.launcher) == (0, 1, "openmpi")
    assert "mpi4py.MPI" not in sys.modules
    assert not is_under_mpi(env)
    assert is_under_mpi(env | {"OMPI_COMM_WORLD_SIZE": "2"})


def test_a_slurm_batch_script_without_srun_is_one_process() -> None:
    env = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert rank_from_environment(env).world_size == 1


@pytest.mark.parametrize(
    ("counts", "node", "expected"), [("2(x3)", 2, 2), ("1,3", 1, 3), ("4(x2),1", 2, 1), ("4", 1, 4)]
)
def test_slurm_tells_each_node_how_many_ranks_it_has(counts: str, node: int, expected: int) -> None:
    env = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "9", "SLURM_LOCALID": "0", "MASTER_ADDR": "n1"}
    ranks = rank_from_environment(env | {"SLURM_STEP_TASKS_PER_NODE": counts, "SLURM_NODEID": str(node)})
    assert ranks.local_size == expected


@pytest.mark.parametrize(
    "env",
    [
        {"RANK": "first", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": ""},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2(x3)"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2", "MASTER_PORT": "http"},
        {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"RANK": "1"},
        {"WORLD_SIZE": "8"},
        {"OMPI_COMM_WORLD_RANK": "1"},
        {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "n1"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "n1"},
        {"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "2"},
        {"RANK": "1", "WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"},
    ],
)
def test_an_impossible_environment_is_one_clear_line(env: dict[str, str]) -> None:
    with pytest.raises(InputError) as error:
        rank_from_environment(env)
    assert "\n" not in str(error.value)
    assert any(key in str(error.value) for key in env)


def test_ranks_on_several_hosts_need_the_address_of_rank_0() -> None:
    alone_on_its_host = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    with pytest.raises(InputError, match=r"MASTER_ADDR is not set.*set it to the host of rank 0"):
        rank_from_environment(alone_on_its_host)
    assert rank_from_environment(alone_on_its_host | {"MASTER_ADDR": "node1"}).master_addr == "node1"


STEP = {
    "SLURM_PROCID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
    "SLURM_STEP_NODELIST": "gpu[03-05,9]-ib,login",
}


def test_the_hosts_of_a_slurm_step_are_what_scontrol_makes_of_its_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in; the real one is asked in tests/cluster."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "$@" >"$(dirname "$0")/asked"\nprintf "gpu03-ib\\ngpu04-ib\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert rank_from_environment(STEP).master_addr == "gpu03-ib"
    assert (tmp_path / "asked").read_text() == "show hostnames gpu[03-05,9]-ib,login\n"
    assert rank_from_environment(STEP | {"MASTER_ADDR": "10.0.0.1"}).master_addr == "10.0.0.1"


def test_without_scontrol_the_address_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        InputError, match=r"`scontrol show hostnames gpu.*` failed \(.*\); set MASTER_ADDR to the host of"
    ):
        rank_from_environment(STEP)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho 'Invalid hostlist' >&2; exit 1\n")
    scontrol.chmod(0o755)
    with pytest.raises(InputError, match=r"failed \(Invalid hostlist\)"):
        rank_from_environment(STEP)


def test_a_launcher_inside_a_step_is_no_contradiction() -> None:
    """torchrun or deepspeed, once on each host."""
    step = {
        "SLURM_PROCID": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    }
    inner = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "MASTER_ADDR": "n1"}
    for mark in ("TORCHELASTIC_RUN_ID", "CROSS_SIZE"):
        assert rank_from_environment(step | inner | {mark: "2"}).rank == 5
    same = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "n1"}
    assert rank_from_environment(step | same).rank == 1, "as scripts that copy SLURM_PROCID have it"


@pytest.mark.parametrize(
    ("env", "speaks"),
    [
        ({}, True),
        ({"RANK": "4", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}, True),
        ({"RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, False),
        ({"RANK": "1"}, False),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, False),
        ({"PMI_RANK": "4", "SLURM_PROCID": "4", "SLURM_LOCALID": "0"}, True),
        ({"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "2", "SLURM_LOCALID": "2"}, False),
    ],
)
def test_of_each_host_one_rank_speaks_whatever_else_is_wrong(env: dict[str, str], speaks: bool) -> None:
    assert is_first_of_host(env) == speaks


@pytest.mark.parametrize(
    ("env", "own", "launchers", "threads"),
    [
        ({}, 8, 8, None),
        ({"RANK": "0", "WORLD_SIZE": "8", "LOCAL_SIZE": "4"}, 8, 8, "2"),
        ({"RANK": "0", "WORLD_SIZE": "8", "LOCAL_SIZE": "4", "OMP_NUM_THREADS": "1"}, 8, 8, "1"),
        ({"RANK": "0", "WORLD_SIZE": "64", "LOCAL_SIZE": "64"}, 8, 8, "1"),
        ({"RANK": "0", "WORLD_SIZE": "8", "LOCAL_SIZE": "1"}, 8, 8, None),
        # mpirun has bound each rank to a core, or to a half of them.
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 1, 8, "1"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 4, 8, "2"),
        # Slurm has given the job four of them.
        (STEP | {"SLURM_CPUS_ON_NODE": "4"}, 8, 8, "2"),
    ],
)
def test_ranks_share_the_cores_of_their_host(
    env: dict[str, str], own: int, launchers: int, threads: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launchers_module, "_cores", lambda process: launchers if process else own)
    env = dict(env)
    share_cores(env)
    assert env.get("OMP_NUM_THREADS") == threads


def test_processes_without_a_launcher_do_not_share_a_port() -> None:
    with socket.socket() as taken:
        port = rank_from_environment({}).master_port
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert rank_from_environment({}).master_port != port
