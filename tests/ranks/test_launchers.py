"""Ranks are derived from what each launcher puts into the environment."""

from __future__ import annotations

import socket

import pytest

from adept_ds.base.errors import InputError
from adept_ds.ranks.launchers import LaunchedRank, rank_from_environment


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
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
                "MASTER_ADDR": "node1",
                "MASTER_PORT": "29502",
            },
            LaunchedRank(3, 4, 1, 2, "node1", 29502, "openmpi"),
            id="openmpi",
        ),
        pytest.param(
            {
                "PMI_RANK": "1",
                "PMI_SIZE": "2",
                "MPI_LOCALRANKID": "1",
                "MPI_LOCALNRANKS": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "29503",
            },
            LaunchedRank(1, 2, 1, 2, "127.0.0.1", 29503, "mpich"),
            id="mpich",
        ),
        pytest.param(
            {
                "SLURM_PROCID": "4",
                "SLURM_STEP_NUM_TASKS": "6",
                "SLURM_LOCALID": "0",
                "SLURM_NTASKS_PER_NODE": "2",
                "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
                "SLURM_JOB_NODELIST": "gpu[03-05]",
                "SLURM_JOB_ID": "123456",
            },
            LaunchedRank(4, 6, 0, 2, "gpu03", 20000 + 123456 % 10000, "slurm"),
            id="slurm",
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


def test_a_slurm_batch_script_without_srun_is_one_process() -> None:
    env = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert rank_from_environment(env).world_size == 1


def test_every_rank_of_an_mpi_run_derives_the_same_master() -> None:
    common = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-host-4711@1"}
    masters = set()
    for rank in ("0", "1"):
        ranks = rank_from_environment(common | {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank})
        masters.add((ranks.master_addr, ranks.master_port))
    assert len(masters) == 1


@pytest.mark.parametrize(
    "env",
    [
        {"RANK": "first", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": ""},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2(x3)"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2", "MASTER_PORT": "http"},
        {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
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


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("login", "login"),
        ("node1,node2", "node1"),
        ("gpu[03-05]", "gpu03"),
        ("gpu[7,9-12]", "gpu7"),
        ("gpu[03-05,9]-ib,login", "gpu03-ib"),
        ("rack[1-2]node[08-09]", "rack1node08"),
    ],
)
def test_the_master_of_a_slurm_step_is_the_first_host_of_its_list(nodes: str, first: str) -> None:
    env = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "2(x4)"}
    assert rank_from_environment(env | {"SLURM_STEP_NODELIST": nodes}).master_addr == first


def test_processes_without_a_launcher_do_not_share_a_port() -> None:
    with socket.socket() as taken:
        port = rank_from_environment({}).master_port
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert rank_from_environment({}).master_port != port
