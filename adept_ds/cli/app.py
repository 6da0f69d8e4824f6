"""The `adept` command: the same without a launcher and under deepspeed, torchrun, srun and mpirun.

Input is checked before torch is imported; then output of libraries is diverted to a log file per rank, the ranks
meet, and the stage runs. Exit codes: see `base.errors`.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import typer

from adept_ds.base.errors import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    EXIT_MACHINE,
    EXIT_STOPPED,
    AdeptError,
    InputError,
    LostRankError,
    MachineError,
    StopRequestedError,
    UnreachedError,
)
from adept_ds.base.files import disk_failure
from adept_ds.base.lifeline import end_with
from adept_ds.base.version import __version__
from adept_ds.cli import compare, delta, diagnose, dial, job, launch, model_files, plan, run, status
from adept_ds.cli.forms import either, on_config_only
from adept_ds.ranks.launchers import (
    is_first_of_host,
    is_under_mpi,
    launcher_processes,
    rank_of_several,
    share_cores,
)
from adept_ds.ranks.mpi import Ending

app = typer.Typer(
    name="adept",
    help="Domain adaptation of language models that keeps their general competence (ADEPT) on DeepSpeed.",
    epilog="Example:  adept run config.yaml train.lr=1e-4   ·   deepspeed --module adept_ds run config.yaml",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run", epilog="Example:  adept run config.yaml train.steps=200")(on_config_only(run.run))
app.command(
    "launch",
    epilog="Example:  adept launch --nodes 2 --gpus-per-node 8 config.yaml > run.sbatch   ·   "
    "adept launch --scheduler mpi --nodes 2 --hosts node1,node2 config.yaml train.lr=1e-4",
)(launch.launch)
app.command(
    "probe",
    epilog="Example:  adept probe config.yaml --method all   ·   adept probe MODEL --corpus general.jsonl -k 4 --json",
)(either(run.probe, model_files.probe))
app.command("expand", epilog="Example:  adept expand config.yaml   ·   adept expand MODEL OUT --layers 12,17")(
    either(run.expand, model_files.expand)
)
app.command("verify", epilog="Example:  adept verify MODEL EXPANDED")(model_files.verify)
app.command(
    "train",
    epilog="Example:  deepspeed --module adept_ds train config.yaml   ·   adept train config.yaml --decay-from 400",
)(on_config_only(run.train))
app.command("eval", epilog="Example:  adept eval config.yaml --json   ·   adept eval MODEL --text heldout.jsonl")(
    either(run.evaluate, model_files.evaluate)
)
app.command(
    "export",
    epilog="Example:  adept export config.yaml   ·   adept export run/checkpoints/step_100 OUT --base run/expanded   "
    "·   adept export ADAPTED OUT --alpha 0.5",
)(either(run.export, model_files.export, directory="CHECKPOINT|ADAPTED"))
app.command(
    "dial",
    epilog="Example:  adept dial runs/math --keep-general 0.0   ·   adept dial config.yaml dial.confidence=0.9 --json",
)(dial.dial)
app.command("report", epilog="Example:  adept report config.yaml   ·   adept report runs/math")(
    either(run.report, model_files.report, directory="RUN_DIR")
)
app.command(
    "diagnose", epilog="Example:  adept diagnose runs/math   ·   adept diagnose config.yaml --sequences 32 --json"
)(either(diagnose.on_config, diagnose.on_directory, directory="RUN"))
app.command(
    "compare",
    epilog="Example:  adept compare launch/studies/first.yaml   ·   adept compare study.yaml --dry-run   ·   "
    "adept compare study.yaml --scale 100 --submit",
)(compare.compare)
app.command(
    "plan",
    epilog="Example:  adept plan config.yaml --gpus 8 --gpu-memory 80GB --flops 989TFLOP/s --bandwidth 450GB/s   ·   "
    "adept plan config.yaml --gpus 64 --nodes 8 --gpu-memory 80GB --flops 989TFLOP/s --bandwidth 3200Gb/s",
)(on_config_only(plan.plan))
app.command(
    "status",
    epilog="Example:  adept status runs/math   ·   adept status runs/math --watch   ·   adept status runs/study --json",
)(status.status)
app.command(
    "job",
    epilog="Example:  adept job config.yaml train.lr=1e-4   ·   adept job --stage train --requeue-faults config.yaml",
)(job.job)
app.command("show", epilog="Example:  adept show config.yaml train.lr=1e-4")(on_config_only(run.show_plan))

delta_app = typer.Typer(
    help="Delta packages: the copies of a domain alone, to ship, apply and remove (docs/deltas.md).",
    epilog="Example:  adept delta pack runs/math math   ·   adept delta apply MODEL math OUT",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(delta_app, name="delta")
delta_app.command(
    "pack",
    epilog="Example:  adept delta pack runs/math math   ·   adept delta pack ADAPTED law --only law --json",
)(delta.pack)
delta_app.command(
    "apply",
    epilog="Example:  adept delta apply MODEL math OUT --alpha 0.5   ·   adept delta apply MODEL math law OUT --json",
)(delta.apply)
delta_app.command("strip", epilog="Example:  adept delta strip ADAPTED OUT --json")(delta.strip)


@app.command(epilog="Example:  adept version")
def version() -> None:
    """The version of adept-ds."""
    typer.echo(__version__)


def main() -> None:
    """Entry point: maps errors to exit codes."""
    # The deepspeed launcher hands --local_rank to the program; the environment says the same.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    end_with(launcher_processes(os.environ))
    if arguments[:1] != ["job"]:  # which starts ranks, and is none
        share_cores(os.environ)
    ending = Ending(under_mpi=is_under_mpi(os.environ))
    code = _run(arguments, ending)
    # The interpreter looks for cycles as it ends: more than a second over what torch and
    # transformers leave behind, for memory that the system takes back anyway.
    gc.freeze()
    if code:
        ending.exit(code)


def _run(arguments: Sequence[str], ending: Ending) -> int:
    try:
        code = app(arguments, standalone_mode=False)
        return int(code or 0)  # Typer makes Ctrl-C a value that is returned
    except typer.Exit as end:
        return end.exit_code
    except typer.Abort:
        return EXIT_INTERRUPTED
    except InputError as error:
        _complain(ending, str(error), by_rank_1=isinstance(error, UnreachedError))
        return EXIT_BAD_INPUT
    except StopRequestedError as stop:
        _complain(ending, f"{stop}; run the same command again to go on")
        return EXIT_STOPPED
    except MachineError as error:
        _complain(ending, str(error))
        return EXIT_MACHINE
    except LostRankError as lost:
        if lost.line:
            _say(lost.line)
        sys.stderr.flush()
        os._exit(lost.code)
    except AdeptError as error:
        _say_by_rank(str(error))
        return 1
    except OSError as error:
        failure = disk_failure(error)
        if failure:
            _say(failure)
            ending.leave(EXIT_MACHINE)
        if error.errno != errno.ENAMETOOLONG:
            _show_bug(ending, error)
        _complain(ending, str(InputError(f"'{error.filename}' is too long for the name of a file; give another one")))
        return EXIT_BAD_INPUT
    except Exception as error:
        if _is_usage_error(error):
            message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
            if message:  # without arguments the help has been printed already
                _complain(ending, str(InputError(f"{message}; see `adept --help`")))  # it repeats what was typed
            return EXIT_BAD_INPUT
        _show_bug(ending, error)


def _show_bug(ending: Ending, error: Exception) -> NoReturn:
    _say_by_rank(f"unexpected {type(error).__name__}\n{traceback.format_exc()}")
    ending.leave(1)


def _complain(ending: Ending, message: str, *, by_rank_1: bool = False) -> None:
    """One line on stderr; once per host, so that a launcher's ranks do not repeat each other."""
    if is_first_of_host(os.environ) or (by_rank_1 and rank_of_several(os.environ) == "1"):
        _say(message)
    else:
        ending.keep(message)


def _say_by_rank(message: str) -> None:
    """Of each rank, since it is its own."""
    rank = rank_of_several(os.environ)
    _say(message, "adept" if rank is None else f"adept[rank {rank}]")


def _say(message: str, prefix: str = "adept") -> None:
    print(f"{prefix}: {message}", file=sys.stderr, flush=True)  # noqa: T201


def _is_usage_error(error: Exception) -> bool:
    return hasattr(error, "format_message") and hasattr(error, "exit_code")
