"""A cluster of Slurm's own daemons on this host, for as long as tests need it.

munged, slurmctld and a slurmd for each of four virtual nodes: n1 and n2 without GPUs, g1 and g2 that say they have two
(Slurm counts them; nobody opens a device). All of them live in one namespace of processes, whose first process dies
with the tests: nothing is left over, whatever ends them. There `/etc/hosts` knows the nodes' names, which lead here.

    lab   n1, n2   the default; jobs are preempted, and have 60 s to end then
    gpu   g1, g2   the same
    hi    all      its jobs preempt the others
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from harness.launching import ROOT, free_port
from harness.waiting import until

PROGRAMS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "unshare": "util-linux",
    "/usr/lib/*/libpmix.so": "libpmix-dev",  # by this name srun's plug-in looks for it
}
"""The package of each, as Debian calls it."""

NODES = ("n1", "n2", "g1", "g2")

_CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# By default a credential lives 120 s, and as long a job waits that goes back into the queue.
AuthInfo=socket={root}/run/munge.sock,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmctldDebug=debug
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=5
PropagateResourceLimits=NONE
ReturnToService=2
SlurmdTimeout=30
SlurmdParameters=config_overrides
KillWait=30
MinJobAge=3600
MaxArraySize=100
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{extra}
GresTypes=gpu
"""

_NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN{gres}\n"
)

_PARTITIONS = """\
PartitionName=lab Nodes=n[1-2] Default=YES MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=gpu Nodes=g[1-2] MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=hi Nodes=n[1-2],g[1-2] MaxTime=60 State=UP PriorityTier=10
"""

_DAEMONS = """\
set -e
mount --bind {root}/hosts /etc/hosts
munged --foreground --key-file={root}/munge.key --socket={root}/run/munge.sock --pid-file={root}/run/munged.pid \\
  --log-file={root}/log/munged.log --seed-file={root}/run/munged.seed &
until [[ -S {root}/run/munge.sock ]]; do sleep 0.1; done
slurmctld -D -c &
for node in {nodes}; do slurmd -D -c -N "$node" & done
while sleep 1; do :; done
"""

_USER_SIGNAL = "SlurmctldParameters=preempt_send_user_signal"


@dataclass(frozen=True)
class ClusterJob:
    """A job that was submitted."""

    cluster: SlurmCluster
    name: str
    """Number, or number_task."""
    output: Path

    def says(self, key: str) -> str:
        """What `scontrol show job` says, such as JobState."""
        shown = self.cluster.command("scontrol", "--oneliner", "show", "job", self.name)
        match = re.search(rf"(?:^| ){key}=(\S*)", shown)
        assert match, shown
        return match[1]

    @property
    def state(self) -> str:
        return self.says("JobState")

    @property
    def restarts(self) -> int:
        return int(self.says("Restarts"))

    @property
    def said(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace") if self.output.is_file() else ""

    def wait_for(self, *states: str, timeout: float = 300.0) -> None:
        until(lambda: self.state in states, timeout)

    def ends(self, timeout: float = 400.0) -> tuple[str, str]:
        """Its last state, and its exit code as Slurm writes it, CODE:SIGNAL."""
        self.wait_for("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", timeout=timeout)
        return self.state, self.says("ExitCode")

    @contextmanager
    def held_until(self, line: str) -> Iterator[None]:
        """Its ranks stand still from now on, until Slurm's controller has logged this about the job (a pattern).

        Slurm looks at times every 30 s, in which a small run would come to its end."""
        log = self.cluster.root / "log" / "slurmctld.log"
        before, ranks = log.stat().st_size, self.ranks()
        assert ranks
        for rank in ranks:
            rank.suspend()
        try:
            yield
            pattern = re.compile(f"{line} JobId={self.name}\\b".encode())
            until(lambda: pattern.search(log.read_bytes()[before:]) is not None)
        finally:
            for rank in ranks:
                with suppress(psutil.Error):
                    rank.resume()

    def ranks(self) -> list[psutil.Process]:
        """Of its step, as this host sees them."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                if environment.get("SLURM_CONF") == str(self.cluster.conf) and "SLURM_STEP_NUM_TASKS" in environment:
                    number = environment.get("SLURM_JOB_ID")
                    if number == self.name and Path(process.exe()).name.startswith("python"):
                        found.append(process)
        return [process for process in found if process.parent() not in found]


class SlurmCluster:
    """See above. What it writes lies in a directory that everybody may enter, or munged would not start."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="slurm_"))
        self.conf = self.root / "slurm.conf"
        self._host = socket.gethostname().partition(".")[0]
        self._ports = {name: free_port() for name in ("controller", *NODES)}
        self._daemons: subprocess.Popen[bytes] | None = None

    @contextmanager
    def running(self) -> Iterator[SlurmCluster]:
        try:
            self._start()
            yield self
        finally:
            self._stop()

    def command(self, *words: str) -> str:
        """A command of Slurm's, and what it answers."""
        done = subprocess.run(words, env=self._environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refuses(self, *words: str) -> str:
        """What it says to a command that it refuses."""
        done = subprocess.run(words, env=self._environment(), capture_output=True, text=True, check=False)
        assert done.returncode != 0, done.stdout
        return done.stderr

    def submit(
        self,
        script: Path,
        *arguments: object,
        options: Sequence[str] = (),
        directory: Path,
        env: Mapping[str, str] | None = None,
    ) -> ClusterJob:
        """`sbatch OPTIONS SCRIPT ARGUMENTS` in a directory, which gets the output too."""
        command = ["sbatch", "--parsable", *options, str(script), *map(str, arguments)]
        done = subprocess.run(
            command,
            env=self._environment() | dict(env or {}),
            cwd=directory,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return self.job(done.stdout.strip(), directory)

    def job(self, name: str, directory: Path) -> ClusterJob:
        """One that was submitted from this directory."""
        job = ClusterJob(self, name, Path())
        return ClusterJob(self, name, directory / job.says("StdOut"))

    def run(self, *words: str, directory: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """A command that itself submits jobs."""
        environment = self._environment() | dict(env)
        return subprocess.run(words, env=environment, cwd=directory, capture_output=True, text=True, check=False)

    @contextmanager
    def failed(self, node: str) -> Iterator[None]:
        """Slurm takes the node for dead, ends what runs there, and starts nothing there meanwhile, although its daemon
        reports again."""
        for state in ("down", "drain"):
            self.command("scontrol", "update", f"nodename={node}", f"state={state}", "reason=test")
        try:
            yield
        finally:
            self.command("scontrol", "update", f"nodename={node}", "state=resume")

    @contextmanager
    def user_signals_at_preemption(self) -> Iterator[None]:
        """While it lasts, a job that is preempted also gets the signal that its `--signal` names."""
        self._write_conf(_USER_SIGNAL)
        self.command("scontrol", "reconfigure")
        try:
            yield
        finally:
            self._write_conf()
            self.command("scontrol", "reconfigure")

    def _start(self) -> None:
        for name in ("run", "state", "spool", "log"):
            (self.root / name).mkdir(parents=True)
        self.root.chmod(0o755)
        (self.root / "run").chmod(0o755)
        (self.root / "munge.key").write_bytes(os.urandom(1024))
        (self.root / "munge.key").chmod(0o600)
        names = "".join(f"127.0.0.1 {name}\n" for name in NODES)
        (self.root / "hosts").write_text(Path("/etc/hosts").read_text() + "\n" + names)
        for number in (0, 1):
            os.mknod(self.root / f"gpu{number}", stat.S_IFCHR | 0o600, os.makedev(1, 3))  # as /dev/null
        (self.root / "gres.conf").write_text(f"Name=gpu File={self.root}/gpu[0-1]\n")
        self._write_conf()
        script = _DAEMONS.format(root=self.root, nodes=" ".join(NODES))
        namespace = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._daemons = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *namespace, "bash", "-c", script],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=(self.root / "log" / "daemons.log").open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        until(self._is_up, 120)

    def _is_up(self) -> bool:
        assert self._daemons is not None
        assert self._daemons.poll() is None, (self.root / "log" / "daemons.log").read_text(errors="replace")
        words = ["sinfo", "--noheader", "--Node", "--partition=hi", "--format=%N %t"]
        done = subprocess.run(words, env=self._environment(), capture_output=True, text=True, check=False)
        return sorted(done.stdout.split("\n"))[1:] == sorted(f"{name} idle" for name in NODES)

    def _stop(self) -> None:
        if self._daemons is not None:
            self._daemons.kill()  # and with it the first process of the namespace, and with that all
            self._daemons.wait()
        shutil.rmtree(self.root, ignore_errors=True)

    def _write_conf(self, extra: str = "") -> None:
        text = _CONF.format(host=self._host, controller=self._ports["controller"], root=self.root, extra=extra)
        for name in NODES:
            gres = " Gres=gpu:2" if name.startswith("g") else ""
            text += _NODE.format(name=name, host=self._host, port=self._ports[name], gres=gres)
        self.conf.write_text(text + _PARTITIONS)

    def _environment(self) -> dict[str, str]:
        """Of commands, and through sbatch of jobs: this Python, and one thread for each rank."""
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return mine | {
            "SLURM_CONF": str(self.conf),
            "ADEPT_PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
