"""What an arm can trade: domain loss against forgetting, over all its learning rates and positions of the dial.

The front consists of the points that no other point of the arm beats on validation documents both in domain loss and
in the largest rise of a general source; its hypervolume is of where those points lie on test documents. Points are thus
not chosen by what is reported, and an arm does not gain by trying many.
"""

from __future__ import annotations

from collections.abc import Iterable

from adept_ds.comparison.arms import Arm, Point

Scores = tuple[float, float]

GENERAL_RISE = 0.2
"""Of the reference point of hypervolumes, in nats: no gain of the domain counts that costs a general source more."""


def front(arm: Arm) -> list[Point]:
    """Not dominated on validation documents, from the least general rise to the most."""
    scores: dict[Point, Scores] = {point: arm.search_scores(point)[::-1] for point in arm.points}
    return [
        point
        for point in sorted(scores, key=lambda point: scores[point])
        if not _beaten(scores[point], scores.values())
    ]


def on_test(arm: Arm, point: Point) -> tuple[float, float]:
    """On test documents: domain loss, and largest rise of a general source above the base."""
    return arm.loss(point, arm.measured.sources("domain", "test")), arm.largest_rise(point, "test")[0]


def front_hypervolume(arm: Arm) -> float:
    """Of the front on test documents, in nats squared; the reference point is the base's domain loss, and
    `GENERAL_RISE` above its general losses."""
    base = arm.measured.loss(arm.measured.base, arm.measured.sources("domain", "test"))
    corners = (on_test(arm, point) for point in front(arm))
    return hypervolume([(base - domain, GENERAL_RISE - rise) for domain, rise in corners])


def hypervolume(corners: Iterable[tuple[float, float]]) -> float:
    """Area of the union of rectangles from (0, 0) to each corner; a corner with a negative coordinate adds nothing.

    For two objectives a sweep is enough: widest first, each adds what stands out above those before it.
    """
    area, height = 0.0, 0.0
    for x, y in sorted(corners, reverse=True):
        if x > 0 and y > height:
            area += x * (y - height)
            height = y
    return area


def _beaten(mine: Scores, others: Iterable[Scores]) -> bool:
    return any(other[0] <= mine[0] and other[1] <= mine[1] and other != mine for other in others)
