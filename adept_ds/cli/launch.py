"""`adept launch CONFIG`: the script that starts a run on many ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from adept_ds.base.errors import AdeptError, InputError
from adept_ds.base.terminal import Terminal
from adept_ds.cli.forms import ConfigArg, OverridesArg
from adept_ds.config.loading import load_config
from adept_ds.config.resolved import resolve
from adept_ds.ranks.start_scripts import Scheduler, Start, script_of

_SAID_ELSEWHERE = {
    "nodes": "say it by --nodes",
    "ntasks": "say it by --nodes and --gpus-per-node, or --ranks-per-node",
    "ntasks-per-node": "say it by --gpus-per-node, or --ranks-per-node without GPUs",
    "gpus": "say it by --nodes and --gpus-per-node",
    "gpus-per-node": "say it by --gpus-per-node",
    "gpus-per-task": "a rank has one; say how many by --gpus-per-node",
    "chdir": "run adept launch in that directory",
}
"""Options of sbatch that decide how many ranks there are, or what relative paths mean."""


def launch(
    config: ConfigArg,
    overrides: OverridesArg = None,
    scheduler: Annotated[Scheduler, typer.Option(help="what starts the ranks")] = Scheduler.SLURM,
    nodes: Annotated[int, typer.Option(min=1, max=65536, help="hosts")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, max=1024, help="on each host, a rank for each; 0: none")] = 8,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, max=4096, help="on hosts without GPUs (--gpus-per-node 0)")
    ] = None,
    hosts: Annotated[str | None, typer.Option(help="names, with commas: node1,node2; Slurm chooses by itself")] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="--OPTION=VALUE", help="of Slurm: --sbatch=--time=08:00:00; repeatable")
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="give it to sbatch; with others, start it here")] = False,
) -> None:
    """Print the ready script that starts `adept run CONFIG` on many ranks, or submit it."""
    ranks = _ranks_per_node(gpus_per_node, ranks_per_node)
    names = _hosts(scheduler, nodes, hosts)
    for option in sbatch or ():
        if scheduler is not Scheduler.SLURM:
            raise InputError(f"--sbatch: '{option}' goes with --scheduler slurm; leave it out")
        if not option.startswith("--") or "\n" in option:
            raise InputError(
                f"--sbatch: '{option}' is no long option of sbatch; write it as in --sbatch=--time=08:00:00"
            )
        name = option.removeprefix("--").partition("=")[0]
        if name in _SAID_ELSEWHERE:
            raise InputError(
                f"--sbatch: '{option}' would change what the configuration was checked for; {_SAID_ELSEWHERE[name]}"
            )
    if submit and scheduler is Scheduler.TORCHRUN and nodes > 1:
        raise InputError("--submit: torchrun has to be started on every host; print the script, and start it there")
    resolve(load_config(config, overrides or []), "run", nodes * ranks)
    start = Start(
        nodes=nodes,
        per_node=ranks,
        gpus_per_node=gpus_per_node,
        arguments=[str(config.absolute()), *(overrides or ())],
        directory=Path.cwd(),
        python=sys.executable,
        hosts=names,
        sbatch=sbatch or (),
    )
    script = script_of(scheduler, start)
    if not submit:
        sys.stdout.write(script)
    elif scheduler is Scheduler.SLURM:
        Terminal(sys.stdout).say(_submitted(script))
    else:
        os.execvp("bash", ["bash", "-c", script])


def _ranks_per_node(gpus: int, ranks: int | None) -> int:
    if ranks is not None and gpus not in (0, ranks):
        raise InputError(
            f"--ranks-per-node: {ranks} does not fit --gpus-per-node {gpus}, a rank for each; leave one of them out"
        )
    return gpus or ranks or 1


def _hosts(scheduler: Scheduler, nodes: int, hosts: str | None) -> list[str]:
    names = [] if hosts is None else hosts.split(",")
    if scheduler is Scheduler.SLURM:
        if names:
            raise InputError(f"--hosts: Slurm chooses hosts itself, not '{hosts}'; leave it out")
        return []
    if hosts is None and nodes > 1:
        raise InputError(f"--hosts is missing; name the {nodes} hosts, rank 0's first, as in --hosts node1,node2")
    if hosts is not None and (len(names) != nodes or len({*names}) != nodes or not all(map(_is_name, names))):
        raise InputError(f"--hosts: '{hosts}' are not {nodes} different names (--nodes); write them with commas")
    return names


def _is_name(name: str) -> bool:
    return name != "" and all(char.isalnum() or char in "-._@:[]" for char in name)


def _submitted(script: str) -> str:
    """What sbatch says."""
    try:
        done = subprocess.run(["sbatch"], input=script, capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(f"--submit: sbatch cannot be started ({error.strerror}); run it where Slurm is") from None
    if done.returncode:
        raise AdeptError(f"--submit: sbatch failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()
