"""Two hosts on this one: each with a network, processes, shared memory, a name and an sshd of its own.

They are namespaces of processes of this one, and so is the switch between them: all of it ends with these processes,
and they end with pytest, however that ends. Nothing outside is changed, and several may exist side by side. Files are
shared, as on hosts with a common file system.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
from harness.launching import ROOT
from harness.waiting import until

NAMES = ("hosta", "hostb")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
DECOY = "172.17.0.1"
"""An address that each host has for itself, as bridges of containers have: it leads to no other host."""

_SSH_CONFIG = """
Host *
  IdentityFile {folder}/identity
  UserKnownHostsFile /dev/null
  GlobalKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking yes
  LogLevel ERROR
"""

_SSHD_CONFIG = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/identity.pub
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
"""

_BEGINS = """
hostname {name}
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
mount -t tmpfs -o size=2g tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
exec {sshd} -D -e -f {folder}/sshd_config
"""


class Hosts:
    """hosta and hostb."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._write_files()
        self._switch = _Namespace(["--net"], "exec sleep infinity")
        self._switch.run("ip link add br0 type bridge && ip link set br0 up")
        self._hosts = dict[str, _Namespace]()
        for name in NAMES:
            self.begin(name)

    def begin(self, name: str) -> None:
        """Also again, after `kill`."""
        number = NAMES.index(name)
        sshd = Path("/usr/sbin/sshd")
        begins = _BEGINS.format(name=name, folder=self._folder, sshd=sshd)
        host = _Namespace(["--net", "--uts", "--pid", "--mount", "--mount-proc"], begins)
        port = f"port{number}"
        card = f"02:00:00:00:00:0{number + 1}"  # the same after a restart, as others remember it
        self._switch.run(f"ip link add {port} type veth peer name eth0 address {card} netns {host.pid}")
        self._switch.run(f"ip link set {port} master br0 up")
        host.run(
            "ip link set lo up; ip link add aaa0 type dummy; "
            f"ip addr add {DECOY}/16 dev aaa0; ip link set aaa0 up; "
            f"ip addr add {ADDRESSES[number]}/24 dev eth0; ip link set eth0 up"
        )
        self._hosts[name] = host
        until(lambda: host.run("exec 3<>/dev/tcp/127.0.0.1/22", check=False) == 0)

    def kill(self, name: str) -> None:
        """As a power cut: no process of it says anything more."""
        self._hosts[name].kill()

    def cut(self, name: str) -> None:
        """Take its network away."""
        self._switch.run(f"ip link set port{NAMES.index(name)} down")

    def join(self, name: str) -> None:
        """Give it back, until the other finds it again, which looks anew only after some seconds."""
        self._switch.run(f"ip link set port{NAMES.index(name)} up")
        reaches = f"exec 3<>/dev/tcp/{ADDRESSES[NAMES.index(name)]}/22"
        (other,) = set(NAMES) - {name}
        until(lambda: self._hosts[other].run(reaches, check=False) == 0)

    def start(self, command: str, *, out: Path, on: str = "hosta", **variables: str) -> subprocess.Popen[bytes]:
        """A shell's command on a host; what it says goes to `out`."""
        with out.open("wb") as file:
            return self._hosts[on].start(command, environment(**variables), file)

    def end(self) -> None:
        for namespace in (*self._hosts.values(), self._switch):
            namespace.kill()

    def _write_files(self) -> None:
        folder = self._folder
        for key in ("identity", "host_key"):
            _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)])
        listed = "".join(f"{address} {name}\n" for address, name in zip(ADDRESSES, NAMES, strict=True))
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{listed}")
        known = ",".join((*NAMES, *ADDRESSES))
        (folder / "known_hosts").write_text(f"{known} {(folder / 'host_key.pub').read_text()}")
        (folder / "ssh_config").write_text(_SSH_CONFIG.format(folder=folder))
        (folder / "sshd_config").write_text(_SSHD_CONFIG.format(folder=folder))
        (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in NAMES))


class _Namespace:
    """A process with namespaces of its own, and its descendants."""

    def __init__(self, kinds: list[str], script: str) -> None:
        self._kinds = [kind for kind in kinds if kind != "--mount-proc"]
        self._unshare = subprocess.Popen(
            ["unshare", *kinds, "--fork", "--kill-child=KILL", "bash", "-ec", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=_end_with_parent,
        )
        until(lambda: bool(psutil.Process(self._unshare.pid).children()))
        self.pid = psutil.Process(self._unshare.pid).children()[0].pid

    def run(self, script: str, *, check: bool = True) -> int:
        return _run(self._inside(script), check=check)

    def start(self, script: str, environment: Mapping[str, str], out: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._inside(script),
            env=dict(environment),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,  # type: ignore[call-overload]
            stderr=subprocess.STDOUT,
        )

    def kill(self) -> None:
        self._unshare.kill()
        self._unshare.wait()

    def _inside(self, script: str) -> list[str]:
        return ["nsenter", f"--target={self.pid}", *self._kinds, f"--wdns={ROOT}", "bash", "-c", script]


def environment(**variables: str) -> dict[str, str]:
    """Of somebody who logs in there."""
    return {
        "HOME": os.environ.get("HOME", "/root"),
        "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": str(ROOT),
        "ADEPT_PYTHON": sys.executable,
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        **variables,
    }


def shell(*arguments: object) -> str:
    """As a shell takes them."""
    return shlex.join(map(str, arguments))


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _run(command: list[str], *, check: bool = True) -> int:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not (check and done.returncode), f"{command}: {done.stderr}"
    return done.returncode
