"""`adept launch`: scripts that start a run. What they start in truth is in tests/cluster."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from harness.launching import ROOT, adept
from harness.shell_scripts import complaints
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.ranks import start_scripts
from adept_ds.ranks.start_scripts import Scheduler, Start, script_of

# Stands for whatever a script starts: notes its name, arguments and what it was given.
PROGRAM = f"""#!{sys.executable}
import json, os, pathlib, sys
name = pathlib.Path(sys.argv[0]).name
reads = [pathlib.Path(argument).read_text() for argument in sys.argv[1:] if argument.startswith("/dev/fd/")]
record = {{"arguments": sys.argv[1:], "env": dict(os.environ), "directory": os.getcwd(), "files": reads}}
pathlib.Path(os.environ["RECORD"], f"{{name}}.json").write_text(json.dumps(record))
"""


TEMPLATES = [
    (gpus, name) for gpus, name in ((4, "slurm.sbatch"), (0, "slurm_cpu.sbatch")) if (ROOT / "launch" / name).is_file()
]


def start(tmp_path: Path, **changes: object) -> Start:
    values = {
        "nodes": 2,
        "per_node": 4,
        "gpus_per_node": 4,
        "arguments": [str(tmp_path / "my config.yaml"), "data.domain=[a,$b]"],
        "directory": tmp_path,
        "python": str(tmp_path / "python"),
        "hosts": ["node1", "node2"],
    }
    return Start(**(values | changes))  # type: ignore[arg-type]


def started(script: str, tmp_path: Path, program: str, **variables: str) -> dict[str, object]:
    """What `program` was given when bash ran the script."""
    for name in (program, "hostname"):
        path = tmp_path / name
        path.write_text(PROGRAM if name == program else "#!/bin/sh\necho node2\n")
        path.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RECORD": str(tmp_path), **variables}
    done = subprocess.run(["/bin/bash", "-c", script], env=env, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads((tmp_path / f"{program}.json").read_text())
    return found


def sbatch_lines(script: str) -> list[str]:
    return [line for line in script.splitlines() if line.startswith("#SBATCH")]


@pytest.mark.parametrize(("gpus", "name"), TEMPLATES)
def test_a_slurm_script_is_the_checkouts_own_with_these_numbers(gpus: int, name: str, tmp_path: Path) -> None:
    options = ["--time=08:00:00", "--partition=gpu", "--exclusive"]
    script = script_of(Scheduler.SLURM, start(tmp_path, gpus_per_node=gpus, hosts=(), sbatch=options))
    template = (ROOT / "launch" / name).read_text()
    asked = {
        "nodes": "2",
        "ntasks-per-node": "4",
        "time": "08:00:00",
        "partition": "gpu",
        "chdir": str(tmp_path),
    } | ({"gpus-per-node": "4"} if gpus else {})
    lines = sbatch_lines(script)
    assert set(lines) >= {f"#SBATCH --{name}={value}" for name, value in asked.items()} | {"#SBATCH --exclusive"}
    names = [line.partition("=")[0] for line in lines]
    assert len(names) == len(set(names)), "each option once: Slurm takes the last"
    kept = {line for line in sbatch_lines(template) if line.partition("=")[0].removeprefix("#SBATCH --") not in asked}
    assert kept <= set(lines), "what makes it stop with a checkpoint and requeue, above all"
    last = max(index for index, line in enumerate(script.splitlines()) if line.startswith("#SBATCH"))
    assert not any(line and not line.startswith("#") for line in script.splitlines()[:last]), (
        "or Slurm reads no further"
    )


def test_a_slurm_script_has_its_arguments_inside(tmp_path: Path) -> None:
    script = script_of(Scheduler.SLURM, start(tmp_path))
    head, _, tail = script.partition("set -euo pipefail\n")
    shown = subprocess.run(
        ["bash", "-c", head + "\n".join(tail.splitlines()[:2]) + '\nprintf "%s\\n" "$ADEPT_PYTHON" "$@"'],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert shown == [str(tmp_path / "python"), str(tmp_path / "my config.yaml"), "data.domain=[a,$b]"]


@pytest.mark.parametrize("name", ["plain", "a b", 'a "b"', "it's", "#7", "back\\slash", "[1]$x"])
def test_whatever_a_directory_is_called_sbatch_reads_it(name: str, tmp_path: Path) -> None:
    """It takes words as a shell does: quotes, backslashes, and the rest of a line behind '#' for a comment."""
    script = script_of(Scheduler.SLURM, start(tmp_path, directory=tmp_path / name))
    (line,) = (line for line in sbatch_lines(script) if "--chdir" in line)
    assert shlex.split(line.removeprefix("#SBATCH"), comments=True) == [f"--chdir={tmp_path / name}"]


def test_torchrun_starts_on_the_one_host_that_is_named(tmp_path: Path) -> None:
    script = script_of(Scheduler.TORCHRUN, start(tmp_path, nodes=1, hosts=["node2"]))
    words = started(script, tmp_path, "python", MASTER_PORT="29500")["arguments"]
    assert isinstance(words, list)
    assert words[2:6] == ["--nnodes", "1", "--node_rank", "0"]
    with pytest.raises(AssertionError, match="is this host one of node7"):
        started(script_of(Scheduler.TORCHRUN, start(tmp_path, nodes=1, hosts=["node7"])), tmp_path, "python")


def test_mpi_starts_all_ranks_once(tmp_path: Path) -> None:
    script = script_of(Scheduler.MPI, start(tmp_path, gpus_per_node=0))
    found = started(script, tmp_path, "mpirun", NCCL_DEBUG="WARN")
    words = found["arguments"]
    assert isinstance(words, list)
    before, after = words[: words.index("-x")], words[words.index(str(tmp_path / "python")) :]
    assert before == [
        *("--quiet", "-n", "8", "--host", "node1:4,node2:4", "--bind-to", "none", "--wdir", str(tmp_path)),
    ]
    assert {"NCCL_DEBUG", "DS_ACCELERATOR"} <= {words[n + 1] for n, word in enumerate(words) if word == "-x"}
    config = [str(tmp_path / "my config.yaml"), "data.domain=[a,$b]"]
    assert after == [str(tmp_path / "python"), "-u", "-m", "adept_ds", "run", *config]
    assert found["env"]["DS_ACCELERATOR"] == "cpu"  # type: ignore[index]


def test_torchrun_knows_each_host_by_its_name(tmp_path: Path) -> None:
    found = started(script_of(Scheduler.TORCHRUN, start(tmp_path)), tmp_path, "python", MASTER_PORT="29500")
    config = [str(tmp_path / "my config.yaml"), "data.domain=[a,$b]"]
    assert found["arguments"] == [
        *("-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", "1", "--nproc_per_node", "4"),
        *("--master_addr", "node1", "--master_port", "29500", "-m", "adept_ds", "run", *config),
    ]
    assert found["directory"] == str(tmp_path)
    assert int(found["env"]["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 4)  # type: ignore[index]


@pytest.mark.parametrize(
    ("nodes", "hosts", "expected"),
    [
        (1, (), ["local.sh", "4", "run"]),
        (1, ("node1",), ["multinode.sh", "node1 slots=4\n", "run"]),
        (2, ("node1", "node2"), ["multinode.sh", "node1 slots=4\nnode2 slots=4\n", "run"]),
    ],
)
def test_deepspeed_is_started_by_the_checkouts_scripts(
    nodes: int, hosts: tuple[str, ...], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = script_of(Scheduler.DEEPSPEED, start(tmp_path, nodes=nodes, hosts=hosts))
    found = started(script.replace("exec bash ", f"exec {tmp_path}/bash "), tmp_path, "bash")
    words, files = found["arguments"], found["files"]
    assert isinstance(words, list)
    assert isinstance(files, list)
    assert words[0] == str(ROOT / "launch" / expected[0])
    assert (files[0] if files else words[1]) == expected[1]
    assert words[2:] == ["run", str(tmp_path / "my config.yaml"), "data.domain=[a,$b]"]


@pytest.mark.parametrize("scheduler", Scheduler)
def test_shellcheck_has_nothing_to_say_of_what_is_printed(scheduler: Scheduler, tmp_path: Path) -> None:
    hosts = () if scheduler is Scheduler.SLURM else ["node1", "node2"]
    printed = script_of(scheduler, start(tmp_path, hosts=hosts, arguments=[str(tmp_path / "my config.yaml")]))
    script = tmp_path / "start"
    script.write_text(printed)
    assert not complaints(script)


def test_without_a_checkout_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_scripts, "_CHECKOUT", tmp_path)
    for scheduler, file in ((Scheduler.SLURM, "slurm.sbatch"), (Scheduler.DEEPSPEED, "multinode.sh")):
        with pytest.raises(InputError, match=rf"{file}' is not there; run adept from a checkout"):
            script_of(scheduler, start(tmp_path))
    for scheduler in (Scheduler.MPI, Scheduler.TORCHRUN):
        assert script_of(scheduler, start(tmp_path)).startswith("#!")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--scheduler", "mpi", "--nodes", "2"], "--hosts is missing; name the 2 hosts"),
        (["--scheduler", "mpi", "--nodes", "2", "--hosts", "a,a"], "--hosts: 'a,a' are not 2 different names"),
        (["--scheduler", "torchrun", "--nodes", "1", "--hosts", "a b"], "--hosts: 'a b' are not 1"),
        (["--hosts", "a"], "Slurm chooses hosts itself"),
        (["--gpus-per-node", "4", "--ranks-per-node", "2"], "--ranks-per-node: 2 does not fit --gpus-per-node 4"),
        (["--scheduler", "mpi", "--sbatch=--time=1"], "--sbatch: '--time=1' goes with --scheduler slurm"),
        (["--sbatch=-p gpu"], "--sbatch: '-p gpu' is no long option"),
        (
            ["--sbatch=--nodes=4"],
            "--sbatch: '--nodes=4' would change what the configuration was checked for; say it by",
        ),
        (["--sbatch=--ntasks-per-node=3"], "say it by --gpus-per-node, or --ranks-per-node without GPUs"),
        (["--sbatch=--chdir=/"], "run adept launch in that directory"),
        (["--gpus-per-node", "5"], "train.global_batch_size"),
        (
            ["--scheduler", "torchrun", "--nodes", "2", "--hosts", "a,b", "--gpus-per-node", "1", "--submit"],
            "on every host",
        ),
    ],
)
def test_what_cannot_work_is_one_line_before_anything_is_submitted(
    options: list[str], expected: str, workspace: Workspace, tmp_path: Path
) -> None:
    done = adept(1, "launch", *options, workspace.config(tmp_path / "run"))
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1


def test_submit_hands_the_script_that_is_printed_to_sbatch(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in; a real sbatch takes it in tests/cluster."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/sh\ncat >{tmp_path}/submitted\necho Submitted batch job 7\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    command = ["launch", "--gpus-per-node", 2, workspace.config(tmp_path / "run"), "train.lr=1e-4"]
    printed, submitted = adept(1, *command), adept(1, *command, "--submit")
    assert (submitted.returncode, submitted.stdout) == (0, "Submitted batch job 7\n"), submitted.stderr
    assert (tmp_path / "submitted").read_text() == printed.stdout
    assert "train.lr=1e-4" in printed.stdout
