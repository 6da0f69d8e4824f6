"""Ranks of mpirun: who they are, where rank 0 is, and how they end. They tell each other, by mpi4py's COMM_WORLD.

Importing mpi4py.MPI initialises MPI, so nobody imports it whom mpirun has not started; and it is finalised as soon as
the ranks have met, since MPI kills a process whose mpirun is gone, which else stops with a checkpoint.

Rank 0 listens at a free port, and offers all IPv4 addresses of its host; one rank of each other host tries them. The
first at which all were answered is where the ranks meet: no name has to be known, and an interface that leads elsewhere
(such as a bridge of containers, which has the same address on every host) is found out.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn

import psutil

from adept_ds.base.errors import InputError
from adept_ds.ranks.launchers import LaunchedRank, rank_of_several

_ANSWER = 3.0
"""Seconds that rank 0 has to answer at one of its addresses."""

_TOGETHER = 5.0
"""Seconds within which all ranks fail if the reason is the same for all."""

_FIRST_WORDS = 2.0
"""Seconds that a silent rank leaves to the one that speaks: launchers end all ranks with the first that ends."""

_LOOKS = 0.05


@cache
def world_of_mpi(launcher: str, size_key: str, announced: int) -> LaunchedRank:
    """Who this process is; all ranks call it.

    Args:
        launcher: its name.
        size_key, announced: by which environment variable mpirun says how many ranks there are, and how many.

    Raises:
        InputError: on every rank: mpi4py does not work with the MPI of mpirun, or hosts do not reach rank 0.
    """
    mpi = _mpi()
    world = mpi.COMM_WORLD
    if world.size != announced:
        library = mpi.Get_library_version().split(",")[0].split("\n")[0]
        raise InputError(
            f"{size_key}={announced}, but mpi4py knows {world.size} (it uses {library}); start with the mpirun of that "
            "MPI, or unset the variable, if no mpirun has started this"
        )
    host = world.Split_type(mpi.COMM_TYPE_SHARED)
    place = _place_of_rank_0(world, host)
    return LaunchedRank(world.rank, world.size, host.rank, host.size, *place, launcher)


def leave_mpi() -> None:
    """The ranks have met elsewhere, and need MPI no more. All call it, under mpirun or not."""
    if "mpi4py.MPI" in sys.modules and not _is_over():
        _mpi().Finalize()


class Ending:
    """How a process ends: a rank of mpirun that fails alone ends the whole job, and names itself.

    mpirun by itself ends all ranks as soon as one of them is gone, although another one is to say why; and waits for
    ever where one that has failed waits for the others to finalise MPI.
    """

    def __init__(self, *, under_mpi: bool) -> None:
        """`under_mpi`: mpirun has started this process; without it a process just ends."""
        self._under_mpi, self._unsaid = under_mpi, ""

    def keep(self, line: str) -> None:
        """What this rank leaves to another one to say, since all fail alike."""
        self._unsaid = line

    def exit(self, code: int) -> NoReturn:
        """As `sys.exit`, if all ranks do."""
        if self._under_mpi and not _all_end():
            self.leave(code)
        if self._unsaid:
            time.sleep(_FIRST_WORDS)
        sys.exit(code)

    def leave(self, code: int) -> NoReturn:
        """At once, without waiting for a peer, which may be waiting in a collective for this rank."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self._under_mpi:
            why = f": {self._unsaid}" if self._unsaid else ""
            who = f"rank {rank_of_several(os.environ)} on {socket.gethostname()}"
            os.write(2, f"adept: {who} has failed, and ends all ranks{why}\n".encode(errors="backslashreplace"))
            with suppress(InputError):
                if not _is_over():
                    _mpi().COMM_WORLD.Abort(code)
        os._exit(code)  # which mpirun takes for an abort


def _all_end() -> bool:
    """Whether the others have failed as well, within a few seconds; taken for granted when the ranks have met, since
    they then know of each other's ends otherwise (see `watch`)."""
    with suppress(InputError):
        if _is_over():
            return True
        world, until = _mpi().COMM_WORLD, time.monotonic() + _TOGETHER
        request = world.Ibarrier()
        while not request.Test():
            if time.monotonic() > until:
                return False
            time.sleep(_LOOKS)
    return True


def _is_over() -> bool:
    return bool(_mpi().Is_finalized())


@cache
def _mpi() -> Any:
    """Initialised. Raises `InputError`: it cannot be used."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"mpi4py cannot use the MPI of mpirun ({reason}); install its libmpi, or start with torchrun"
        ) from None
    return MPI


def _place_of_rank_0(world: Any, host: Any) -> tuple[str, int]:
    """Address and port: what rank 0's environment says, else found by trying."""
    given, port = world.bcast((os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT") or "0"))
    if not port.isdigit() or int(port) > 65535:
        raise InputError(f"MASTER_PORT='{port}' in the environment is not a port; unset it, and a free one is taken")
    with _Door(int(port)) if world.rank == 0 else nullcontext() as door:
        offer: _Offer = world.bcast(door.offer if door else None)
        if offer.trouble:
            raise InputError(f"MASTER_PORT: {port} {offer.trouble} on the host of rank 0; set another, or none")
        if given or host.size == world.size:
            return given or "127.0.0.1", offer.port
        is_first_of_another_host = host.rank == 0 and world.rank != 0
        reached = _answered(offer) if is_first_of_another_host else offer.addresses
        everyone: list[tuple[str, list[str]]] = world.allgather((socket.gethostname(), reached))
    for address in offer.addresses:
        if all(address in found for _, found in everyone):
            return address, offer.port
    deaf = next((name for name, found in everyone if not found), everyone[-1][0])
    raise InputError(
        f"MASTER_ADDR: '{deaf}' does not reach rank 0 on '{everyone[0][0]}' at any of its addresses "
        f"({', '.join(offer.addresses) or 'it has none'}) that the others reach; set MASTER_ADDR to one that all hosts "
        "reach, and let its ports through the firewall"
    )


@dataclass(frozen=True)
class _Offer:
    """Of rank 0's."""

    addresses: list[str]
    port: int
    word: bytes
    """Its answer: something else may listen at the same address and port, on another host."""
    trouble: str = ""


class _Door:
    """Where rank 0 answers, until all have tried."""

    def __init__(self, port: int) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        trouble = ""
        try:
            self._socket.bind(("", port))
            self._socket.listen(1024)
        except OSError as error:
            trouble = f"cannot be used ({error.strerror})"
        self.offer = _Offer(_own_addresses(), self._socket.getsockname()[1], secrets.token_bytes(16), trouble)

    def __enter__(self) -> _Door:
        if not self.offer.trouble:
            threading.Thread(target=self._answer, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # or who accepts would wait on
        self._socket.close()

    def _answer(self) -> None:
        with suppress(OSError):
            while True:
                visitor, _ = self._socket.accept()
                with visitor, suppress(OSError):
                    visitor.sendall(self.offer.word)


def _own_addresses() -> list[str]:
    """IPv4, of interfaces that are up; those that the user has named for traffic between hosts first."""
    named = [os.environ.get(f"{library}_SOCKET_IFNAME", "") for library in ("GLOO", "NCCL")]
    states = psutil.net_if_stats()
    found = dict[str, bool]()
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            is_usable = address.family == socket.AF_INET and states[name].isup
            if is_usable and not ipaddress.ip_address(address.address).is_loopback:
                found[address.address] = name in named
    return sorted(found, key=lambda address: not found[address])


def _answered(offer: _Offer) -> list[str]:
    """Addresses at which rank 0 answers to this host."""
    if not offer.addresses:
        return []
    with ThreadPoolExecutor(len(offer.addresses)) as pool:
        answers = pool.map(lambda address: _answers(address, offer), offer.addresses)
        return [address for address, answered in zip(offer.addresses, answers, strict=True) if answered]


def _answers(address: str, offer: _Offer) -> bool:
    try:
        with socket.create_connection((address, offer.port), timeout=_ANSWER) as rank_0:
            return rank_0.recv(len(offer.word), socket.MSG_WAITALL) == offer.word
    except OSError:
        return False
