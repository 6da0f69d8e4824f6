"""`adept job CONFIG`: a command on a configuration as a job of Slurm, from its batch script (`launch/*.sbatch`).

    Slurm -- USR1 or TERM --> adept job -- USR1 --> srun -- USR1 --> every rank: checkpoint, exit code 3

Whoever asked for the end, ranks end with 3; they may have been asked directly, since preemption tells the step alone.
So what was stopped goes back into the queue, unless its batch script was told to end (SIGTERM) or Slurm ends the job;
and no longer than it keeps something new (see `run.requeues`).
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, Any

import typer
from rich.markup import escape

from adept_ds.base.errors import EXIT_MACHINE, EXIT_STOPPED, InputError
from adept_ds.base.run_dir import RunDirectory
from adept_ds.base.terminal import Terminal
from adept_ds.cli.forms import ConfigArg, OverridesArg
from adept_ds.config.loading import load_config
from adept_ds.config.schema import Config
from adept_ds.methods.shape import method_of
from adept_ds.ranks.slurm import SlurmJob
from adept_ds.run.requeues import Kept, Requeues

_STOPPED = (EXIT_STOPPED, 128 + signal.SIGUSR1, 128 + signal.SIGTERM)
"""The latter two: before the ranks had met, when a signal does what it does to any program."""

_FAULTS = (EXIT_MACHINE, 128 + signal.SIGKILL)

_COMMANDS = ("run", "probe", "expand", "train", "export", "dial", "eval", "report", "diagnose")
_OF_ONE_PROCESS = ("report", "diagnose")

StageOption = Annotated[str, typer.Option(metavar="COMMAND", help=f"which command: {', '.join(_COMMANDS)}")]
StartsOption = Annotated[
    int, typer.Option(min=1, max=1000, help="in a row that may keep nothing new; then the job is not requeued any more")
]


def job(
    config: ConfigArg,
    overrides: OverridesArg = None,
    stage: StageOption = "run",
    requeue_faults: Annotated[
        bool, typer.Option("--requeue-faults", help="requeue also when a rank was killed or the machine failed")
    ] = False,
    fruitless_starts: StartsOption = 3,
    list_stages: Annotated[
        bool, typer.Option("--list-stages", help="print those of CONFIG in order, run none")
    ] = False,
) -> None:
    """A command as a Slurm job, from its batch script: stopped before its time is over, it saves and is requeued."""
    if stage not in _COMMANDS:
        raise InputError(f"--stage: '{stage}' is no command on a configuration; choose of {', '.join(_COMMANDS)}")
    checked = load_config(config, overrides or [])
    terminal = Terminal(sys.stdout)
    if list_stages:
        terminal.say(" ".join(_stages(checked)))
        return
    slurm = SlurmJob.of(os.environ)
    run_dir = RunDirectory(checked.run_dir)
    before = Requeues.of(slurm.name, run_dir)
    code, told = _run_step(slurm, [stage, str(config), *(overrides or [])])
    if code in _STOPPED or (requeue_faults and code in _FAULTS):
        terminal.stage("job", escape(_requeue(slurm, before.after(Kept.by(run_dir)), run_dir, told, fruitless_starts)))
    raise typer.Exit(code)


def _stages(config: Config) -> list[str]:
    """Those that `adept run` would go through, as commands."""
    probes = config.needs_probe or config.weighs_places
    before = ["probe"] * probes + ["expand"] * method_of(config).makes_copies
    return [*before, "train", "dial" if config.dial is not None else "export", "eval", "report"]


def _run_step(slurm: SlurmJob, arguments: list[str]) -> tuple[int, bool]:
    """The ranks' exit code, and whether this process was told to end, and not only that time is over."""
    step, asked = None, set[int]()

    def on_signal(number: int, frame: Any) -> None:
        asked.add(number)
        if step is not None:
            step.stop()

    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    command = [sys.executable, "-u", "-m", "adept_ds", *arguments]
    step = slurm.start(command, os.environ, alone=arguments[0] in _OF_ONE_PROCESS)
    if asked:
        step.stop()
    return step.wait(), bool(asked - {signal.SIGUSR1})


def _requeue(slurm: SlurmJob, now: Requeues, run_dir: RunDirectory, told: bool, most: int) -> str:
    """Put the job back into the queue, unless there is a reason not to; what was done, and why.

    Args:
        told: to end; Slurm tells a job so too whose time is over, or that it puts back by itself.
    """
    fate, again = slurm.fate(), "nothing is lost, submit it again to go on"
    if fate == "ends" or (told and fate == "runs"):
        return f"told to end: not requeued; {again}"
    try:
        now.save(run_dir.requeues)
    except OSError as error:
        return f"not requeued, since '{run_dir.requeues}' cannot be written ({error.strerror}); {again}"
    if fate == "goes back":
        return f"stopped, and nothing is lost ({now.farthest}); Slurm puts it back into the queue"
    if now.fruitless >= most:
        starts = "its last start has" if most == 1 else f"{now.fruitless} starts in a row have"
        return (
            f"not requeued: {starts} kept nothing new ({now.farthest}); give it more time (--time, the partition's "
            "GraceTime), or write checkpoints more often (train.checkpoint_every), and submit it again"
        )
    problem = slurm.requeue()
    if problem:
        return f"could not be requeued ({problem}); {again}"
    fruitless = f"; start {now.fruitless} of {most} that kept nothing new" if now.fruitless else ""
    return f"stopped, and nothing is lost ({now.farthest}); back into the queue, to resume{fruitless}"
