"""Which places copies get, by gains and harms that are known."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from adept_ds.base.errors import InputError
from adept_ds.config.layer_sections import ExpandSection
from adept_ds.probing.places import PlaceBenefits, PlaceScores, TextRecord, choose_places, greedy_places

GAINS = (5.0, 9.0, 8.0, 7.0, 1.0, 6.0)
HARMS = (-3.0, 4.0, 1.0, 0.5, -9.0, 0.0)


def choose(gains: tuple[float, ...] = GAINS, harms: tuple[float, ...] = HARMS, **section: Any) -> PlaceBenefits:
    text = TextRecord(loss=2.0, tokens=100, sequences=4, sources=())
    scores = PlaceScores(domain=text, general=text, gains=gains, harms=harms, seconds=1.5)
    return choose_places(ExpandSection(choose="gain", **section), scores)


def test_the_largest_gain_minus_harm_is_chosen() -> None:
    """Scores are 5, 5, 7, 6.5, 1, 6: what general text gains counts nothing."""
    found = choose(k=3)
    assert found.selected == (2, 3, 5)
    assert [place.score for place in found.places] == [5, 5, 7, 6.5, 1, 6]
    assert [(place.index, place.gain, place.harm) for place in found.places] == list(
        zip(range(6), GAINS, HARMS, strict=True)
    )
    assert choose(k=4).selected == (0, 2, 3, 5), "a tie goes to the lower layer"
    assert len(choose().selected) == 4, "as many as by default"


def test_the_weight_of_harm_decides() -> None:
    assert choose(k=2, harm_weight=0.0).selected == (1, 2)
    assert choose(k=2, harm_weight=0.3).selected == (1, 2)
    assert choose(k=2, harm_weight=0.6).selected == (2, 3)
    assert choose(k=2, harm_weight=10.0).selected == (0, 5)


def test_copies_keep_their_distance() -> None:
    """Without harm: 9, 8, 7, 6, 5, 1 at layers 1, 2, 3, 5, 0, 4."""
    none = (0.0,) * 6
    assert choose(harms=none, k=3).selected == (1, 2, 3)
    assert choose(harms=none, k=3, min_distance=2).selected == (1, 3, 5)
    assert choose(harms=none, k=2, min_distance=3).selected == (1, 5), "4 is nearer to none, but 5 gains more"
    assert choose(harms=none, k=2, min_distance=5).selected == (0, 5), "1 would leave no room for another"
    assert choose(harms=none, k=2, min_distance=3, spare_top=1).selected == (1, 4)
    spared = choose(harms=none, k=3, spare_top=3)
    assert spared.selected == (0, 1, 2)
    assert spared.reason.endswith("; no place is left; the last 3 layers are spared")
    assert len(spared.places) == 6, "what was measured stays"


@pytest.mark.parametrize("seed", range(30))
def test_every_step_takes_the_best_place_that_leaves_room(seed: int) -> None:
    """By trying all sets of places that keep the distance."""
    draw = random.Random(seed)
    num_layers, distance = draw.randint(1, 9), draw.randint(1, 4)
    k = draw.randint(1, -(-num_layers // distance))
    scores = [draw.randint(0, 6) - 2.0 for _ in range(num_layers)]
    possible = [
        set(places)
        for places in itertools.combinations(range(num_layers), k)
        if all(b - a >= distance for a, b in itertools.pairwise(places))
    ]
    chosen: list[int] = []
    for _ in range(k):
        left = {place for places in possible if places >= set(chosen) for place in places} - set(chosen)
        chosen.append(min(left, key=lambda place: (-scores[place], place)))
    assert greedy_places(scores, k, distance) == chosen


def test_too_many_copies_for_the_distance_are_refused() -> None:
    assert greedy_places([1.0] * 7, 3, 3) == [0, 3, 6]
    with pytest.raises(InputError, match=r"^expand\.min_distance: 3 leaves room for 3 of the 4 copies .* in 7 layers"):
        greedy_places([1.0] * 7, 4, 3)


def test_the_reason_says_what_decided() -> None:
    assert choose(k=3).reason == (
        "k = 3: the largest gain - 1 x what general text would lose; of the chosen the lowest has 6, and the best of "
        "the others 5 (layer 0)"
    )
    assert choose(k=6).reason == "k = 6: the largest gain - 1 x what general text would lose; no place is left"
    assert "nothing is left of the gain behind 1, but" in choose(k=6, harm_weight=3.0).reason
    text = choose(k=2, harm_weight=0.0, min_distance=2).reason
    assert text.startswith("k = 2: the largest gain, whatever general text would lose, 2 layers or more between")
    assert text.endswith("the lowest has 7, and the best of the others 8 (layer 2, too near)")
