"""A job of Slurm, as its batch script sees it: what Slurm says of it, the step that runs the ranks, the queue.

Imports no torch.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from adept_ds.base.errors import InputError

_OF_OTHER_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")
"""Variables of a launcher around the submission, which would win over srun's."""

_LAST_RANKS = 120
"""Seconds that ranks have to end once the first of them has."""


Fate = Literal["runs", "ends", "time is over", "goes back"]
"""What Slurm is about to do with a job: nothing; end it for good; end it for its time; end it, and start it again."""


@dataclass(frozen=True)
class SlurmJob:
    """The job in which this process runs."""

    name: str
    """As scontrol takes it. A task of an array is called by the array: the number of its last task is also that of the
    whole array, and would put all tasks back into the queue."""
    restarts: int
    """How often it was started before."""
    cpus_per_task: str | None

    @classmethod
    def of(cls, env: Mapping[str, str]) -> SlurmJob:
        """Raises `InputError`: this process runs in none."""
        number = env.get("SLURM_JOB_ID")
        if not number:
            raise InputError(
                "SLURM_JOB_ID: it is not set, so this is no job of Slurm; submit one: sbatch launch/slurm.sbatch CONFIG"
            )
        array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
        restarts = env.get("SLURM_RESTART_COUNT", "")
        return cls(
            name=f"{array}_{task}" if array and task else number,
            restarts=int(restarts) if restarts.isdigit() else 0,
            cpus_per_task=env.get("SLURM_CPUS_PER_TASK"),
        )

    def fate(self) -> Fate:
        """As Slurm says it; "runs" where it does not answer. Whatever ends a job, its state is COMPLETING meanwhile."""
        words = re.findall(r"(\w+)=(\S*)", _asked("scontrol", "--oneliner", "show", "job", self.name))
        shown = dict(reversed(words))  # what the user has put in, as into a comment, comes later
        if int(shown.get("Restarts", "0")) > self.restarts:
            return "goes back"
        if shown.get("Reason") == "TimeLimit":
            return "time is over"
        return "ends" if shown.get("JobState") in ("COMPLETING", "CANCELLED") else "runs"

    def requeue(self) -> str:
        """Put it back into the queue; Slurm ends this process then. Why that failed; empty: it did not."""
        try:
            done = subprocess.run(["scontrol", "requeue", self.name], capture_output=True, text=True, check=False)
        except OSError as error:
            return error.strerror or "scontrol cannot be started"
        return done.stderr.strip() or "scontrol says nothing" if done.returncode else ""

    def start(self, command: Sequence[str], env: Mapping[str, str], *, alone: bool = False) -> Step:
        """Start a command as the ranks of the job.

        Args:
            env: of this process.
            alone: on one process, whatever the job has.

        Raises:
            InputError: there is no srun.
        """
        if shutil.which("srun", path=env.get("PATH")) is None:
            raise InputError("srun: it is not on PATH, which has to have Slurm's commands; add their directory")
        options = ["--kill-on-bad-exit=0", f"--wait={_LAST_RANKS}"]
        if self.cpus_per_task:  # since Slurm 22.05 a step does not take those of the job by itself
            options.append(f"--cpus-per-task={self.cpus_per_task}")
        if alone:
            options += ["--nodes=1", "--ntasks=1"]
        settings = {name: value for name, value in env.items() if name not in _OF_OTHER_LAUNCHERS}
        settings.setdefault("OMP_NUM_THREADS", self.cpus_per_task or "1")
        if "MASTER_ADDR" not in settings:
            hosts = _asked("scontrol", "show", "hostnames", env.get("SLURM_JOB_NODELIST", "")).split()
            if hosts:
                settings["MASTER_ADDR"] = hosts[0]
        return Step(subprocess.Popen(["srun", *options, *command], stdin=subprocess.DEVNULL, env=settings))


class Step:
    """What srun started: the ranks, as long as they run."""

    def __init__(self, srun: subprocess.Popen[bytes]) -> None:
        self._srun = srun

    def stop(self) -> None:
        """Ask every rank to stop. srun hands SIGUSR1 on to them; at SIGTERM it would kill them."""
        with suppress(ProcessLookupError):
            self._srun.send_signal(signal.SIGUSR1)

    def wait(self) -> int:
        """The highest exit code of the ranks, 128 + N for one that signal N ended; signals are taken meanwhile."""
        code = self._srun.wait()
        return code if code >= 0 else 128 - code


def _asked(*command: str) -> str:
    """What a command of Slurm's answers; empty where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""
