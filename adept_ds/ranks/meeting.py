"""How ranks find each other: at a store of rank 0's (or of torchrun's), where all say that they are there.

Whom a rank waits for is said, and in the end named in one line. Until all have met nothing is lost, so signals do what
they do by default: the main thread never waits inside of a library.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from adept_ds.base.errors import InputError, UnreachedError
from adept_ds.ranks.launchers import LaunchedRank

if TYPE_CHECKING:
    from torch.distributed import Store

_LOOKS, _FIRST_SAID = 0.2, 10.0
_TO_BE_READ = 2.0
"""Seconds for which rank 0 stays, so that the others learn why it gives up."""

_NAMED = 8
"""Missing ranks, at most."""

_HERE, _WORD = "here/", "word"
"""Keys: of each rank, and of what rank 0 tells all, who is missing or nobody."""

_REFUSED = "nobody listens there"


class _Waiting:
    """Says for whom this rank waits: after 10 s, 20 s, 40 s, ..., at the latest every five minutes."""

    def __init__(self, minutes: float, say: Callable[[str], None]) -> None:
        self.minutes, self._say, self._begun, self._next = minutes, say, time.monotonic(), _FIRST_SAID

    def is_over(self, who: Callable[[], str], *, unusual: bool = False) -> bool:
        """Wait a little; whether that was the last time.

        Args:
            unusual: it is no mere matter of time, so it is said from the beginning.
        """
        waited = time.monotonic() - self._begun
        if waited >= self._next or (unusual and self._next == _FIRST_SAID):
            self._next = max(1.01 * _FIRST_SAID, min(2 * waited, waited + 300))
            self._say(f"waiting for {who()}, {waited:.0f} s")
        time.sleep(_LOOKS)
        return waited > 60 * self.minutes


def meet(launched: LaunchedRank, minutes: float, say: Callable[[str], None]) -> Store:
    """Wait until all ranks are here; the store at which they are.

    Args:
        minutes: that this may take (`dist_timeout_minutes`).
        say: who is waited for.

    Raises:
        InputError: some did not come (`UnreachedError`: rank 0 did not), or rank 0's port is taken.
    """
    import torch.distributed as dist

    waiting = _Waiting(minutes, say)
    hosts = launched.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = _opened(launched, minutes) if hosts else _reached(launched, waiting)
    store = of_this_start(store)
    try:
        store.set(f"{_HERE}{launched.rank}", "")
        if launched.is_main:
            _await_others(store, launched.world_size, waiting)
        else:
            _await_word(store, waiting)
    except dist.DistError:
        raise InputError("rank 0 ended before all ranks had met; its own words say why") from None
    return store


def of_this_start(store: Store) -> Store:
    """The same without what ranks left there that torchrun has started before these: its store outlives them."""
    import torch.distributed as dist

    return dist.PrefixStore(f"adept/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _opened(launched: LaunchedRank, minutes: float) -> Store:
    import torch.distributed as dist

    try:
        return _tcp_store(launched, minutes, is_master=True)
    except dist.DistError as error:
        how = "is taken" if "EADDRINUSE" in str(error) else f"cannot be used ({str(error)[:100]})"
        raise InputError(f"MASTER_PORT: {launched.master_port} {how} on the host of rank 0; set another") from None


def _tcp_store(launched: LaunchedRank, minutes: float, *, is_master: bool) -> Store:
    import torch.distributed as dist

    return dist.TCPStore(
        launched.master_addr,
        launched.master_port,
        is_master=is_master,
        timeout=timedelta(minutes=minutes),
        wait_for_workers=False,
    )


def _reached(launched: LaunchedRank, waiting: _Waiting) -> Store:
    place = f"rank 0 at {launched.master_addr}:{launched.master_port}"
    while True:
        reason = _why_unreached(launched)
        store = None if reason else _connected(launched, waiting, place)
        if store is not None:
            return store
        unusual = reason not in (_REFUSED, "")
        if waiting.is_over(partial(str, f"{place} ({reason})" if unusual else place), unusual=unusual):
            raise _unreached(launched, waiting, reason)


def _why_unreached(launched: LaunchedRank) -> str:
    """Empty if somebody listens there."""
    try:
        socket.create_connection((launched.master_addr, launched.master_port), timeout=5.0).close()
    except ConnectionRefusedError:
        return _REFUSED
    except socket.gaierror as error:
        return f"its name is not known: {error.strerror}"
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _connected(launched: LaunchedRank, waiting: _Waiting, place: str) -> Store | None:
    """None: it ended meanwhile. In a thread, since torch waits in C++, and for ever where something else listens."""
    import torch.distributed as dist

    found: list[Store] = []

    def connect() -> None:
        with suppress(dist.DistError):
            found.append(_tcp_store(launched, waiting.minutes, is_master=False))

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    while thread.is_alive():
        if waiting.is_over(partial(str, place)):
            raise _unreached(launched, waiting, "something else listens there")
    return found[0] if found else None


def _unreached(launched: LaunchedRank, waiting: _Waiting, reason: str) -> UnreachedError:
    return UnreachedError(
        f"MASTER_ADDR: rank 0 was not reached at {launched.master_addr}:{launched.master_port} within "
        f"{waiting.minutes:g} minutes ({reason or _REFUSED}); start all ranks, set MASTER_ADDR to the host of rank 0 "
        "and MASTER_PORT to a port that the other hosts can reach, or raise dist_timeout_minutes"
    )


def _await_others(store: Store, world_size: int, waiting: _Waiting) -> None:
    keys = [f"{_HERE}{rank}" for rank in range(world_size)]

    def missing() -> str:
        ranks = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        named = ", ".join(ranks[:_NAMED]) + (", ..." if len(ranks) > _NAMED else "")
        return f"rank{'s' * (len(ranks) > 1)} {named} of {world_size}"

    while not store.check(keys):
        if waiting.is_over(missing):
            who = missing()
            store.set(_WORD, who)
            time.sleep(_TO_BE_READ)
            raise _incomplete(who, waiting)
    store.set(_WORD, "")


def _await_word(store: Store, waiting: _Waiting) -> None:
    """From rank 0, which says itself for whom it waits."""
    while not store.check([_WORD]):
        time.sleep(_LOOKS)
    who = store.get(_WORD).decode()
    if who:
        raise _incomplete(who, waiting)


def _incomplete(who: str, waiting: _Waiting) -> InputError:
    return InputError(
        f"{who} did not come within {waiting.minutes:g} minutes; start all ranks, or raise dist_timeout_minutes if "
        "their hosts take longer"
    )
