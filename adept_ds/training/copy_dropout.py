"""Steps that go around some of the copies (`train.copy_dropout`).

Stochastic depth (Huang et al., ECCV 2016, arXiv 1603.09382) for copies alone: in each step, each copy is bypassed with
probability p, for all sequences of the global batch. A copy that is there is not scaled, and neither is it afterwards:
stochastic depth multiplies what a layer writes by 1 - p at test time because only the mean over all subsets is used.
Here the subsets themselves are: all copies (the adapted model), none (the base, which never changes) and what the dial
has in between. Each of them is trained as it will be used.

A bypassed copy costs nothing in the step. Its gradient is 0: AdamW's moments decay and its update goes on, weight decay
included, as for any parameter whose gradient happens to be 0; and the norm of the gradient is that of the others.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from adept_ds.zero.bypassed_step import around_layers
from adept_ds.zero.engine import Engine


def drawn_copies(copies: Sequence[int], probability: float, seed: int, step: int) -> frozenset[int]:
    """The copies that optimizer step `step` (from 0) goes around: the same on every rank, and when a run goes on.

    Independent draws, on the condition that one copy is left at least: a step around all of them would have no
    gradient. So a single copy is never bypassed, and k copies each with probability (p - p^k) / (1 - p^k).
    """
    generator = random.Random(f"copy_dropout {seed} {step}")  # a text is hashed, the same everywhere
    bypassed = set[int]()
    for number, copy in enumerate(copies):
        stays = 1.0 - probability
        if len(bypassed) == number:  # none stayed yet: one of those that remain has to
            stays /= 1.0 - probability ** (len(copies) - number)
        if generator.random() >= stays:
            bypassed.add(copy)
    return frozenset(bypassed)


@dataclass(frozen=True)
class CopyDropout:
    """Of one training run."""

    engine: Engine
    copies: Mapping[int, torch.nn.Module]
    """By layer, ascending; none where a method trains in place."""
    probability: float
    seed: int

    @contextmanager
    def of_step(self, step: int) -> Iterator[frozenset[int]]:
        """Around all forward and backward passes of step `step` (from 0); which copies it goes around."""
        drawn = drawn_copies(list(self.copies), self.probability, self.seed, step)
        with around_layers(self.engine, [self.copies[copy] for copy in sorted(drawn)]):
            yield drawn
