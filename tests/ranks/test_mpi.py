"""How rank 0 is found under MPI; ranks of a real mpirun are in tests/cluster."""

from __future__ import annotations

import dataclasses
import socket

import pytest

from adept_ds.ranks import mpi


def test_rank_0_is_known_by_its_answer_and_not_by_an_open_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another host may have the same address, and something that listens there."""
    monkeypatch.setattr(mpi, "_own_addresses", lambda: ["127.0.0.1", "127.0.0.2"])
    with mpi._Door(0) as door:
        assert mpi._answered(door.offer) == ["127.0.0.1", "127.0.0.2"]
        assert mpi._answered(dataclasses.replace(door.offer, word=b"of another start")) == []
    assert mpi._answered(door.offer) == [], "nobody listens any more"
    with socket.socket() as ranks_meet_here:
        ranks_meet_here.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ranks_meet_here.bind(("", door.offer.port))


def test_a_port_that_is_taken_is_trouble_for_all() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        with mpi._Door(other.getsockname()[1]) as door:
            assert door.offer.trouble.startswith("cannot be used (")


def test_loopback_is_no_address_for_other_hosts() -> None:
    assert not any(address.startswith("127.") for address in mpi._own_addresses())
