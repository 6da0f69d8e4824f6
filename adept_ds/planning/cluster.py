"""The machines that a plan is for, and what a collective costs on them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["all-gather", "reduce-scatter", "all-reduce"]

HOP_IN_NODE = 3.4e-6
HOP_BETWEEN_NODES = 14.0e-6
"""Seconds of one hop of a ring: the figures by which NCCL chooses its own algorithm (NCCL 2.19 to 2.27,
src/graph/tuning.cc: hwLat of Ring/Simple on NVLink and on the network)."""


@dataclass(frozen=True)
class Collective:
    """Calls of one kind, which all ranks make together."""

    kind: Kind
    what: str
    """What is exchanged, in words."""
    payload: float
    """Bytes of the larger side of all calls together: what is whole before (reduce) or after (gather) them."""
    calls: float

    def sent(self, gpus: int) -> float:
        """Bytes that each GPU sends in a ring."""
        return (2 if self.kind == "all-reduce" else 1) * self.payload * (gpus - 1) / gpus


@dataclass(frozen=True)
class Cluster:
    """So many GPUs, in nodes of as many each."""

    gpus: int
    """In all."""
    memory: float
    """Bytes of each GPU."""
    nodes: int = 1
    flops: float | None = None
    """Operations a second of a GPU at its peak, in the precision of training."""
    bandwidth: float | None = None
    """Bytes a second that a node sends to others, all its adapters together; of one node, that a GPU sends."""
    link: float | None = None
    """Bytes a second that a GPU sends to others of its node; None: no limit."""
    efficiency: float = 0.4
    """Share of the peak that a step's operations reach."""
    reserve: float = 0.1
    """Share of the memory that is left to CUDA, NCCL and gaps of the allocator."""

    @property
    def usable(self) -> float:
        return self.memory * (1 - self.reserve)

    @property
    def is_timed(self) -> bool:
        """Whether enough is known to say how long a step takes."""
        return self.flops is not None and (self.gpus == 1 or self.bandwidth is not None)

    def seconds(self, collective: Collective) -> float:
        """Of a ring over all GPUs, in which nodes stand behind one another, so that each sends once what passes.

        Bytes take as long as the slowest part of the ring needs, and each call as many hops as there are other GPUs.
        """
        if self.gpus == 1:
            return 0.0
        assert self.bandwidth is not None
        rounds = 2 if collective.kind == "all-reduce" else 1
        sent = collective.sent(self.gpus)
        moving = sent / self.bandwidth
        if self.link is not None and self.nodes > 1:
            moving = max(moving, sent / self.link)
        between = self.nodes if self.nodes > 1 else 0
        hops = HOP_BETWEEN_NODES * between + HOP_IN_NODE * max(0, self.gpus - 1 - between)
        return moving + collective.calls * rounds * hops
