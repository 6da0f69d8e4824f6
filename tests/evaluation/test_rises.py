"""Rises and their limits: what a plain loop over draws finds, as often right as they say, and by halves that stay."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from adept_ds.base.errors import InputError
from adept_ds.data.pieces import document_id
from adept_ds.evaluation.held_out import SourceName
from adept_ds.evaluation.rises import Pairs, SourceRises, check_halves, in_half, loss_change, rise_limits


def rises_of(seed: int, documents: int, mean: float = 0.0, spread: float = 0.2) -> SourceRises:
    """Documents of unlike lengths, whose losses per token rise by about `mean`."""
    noise = np.random.default_rng(seed)
    tokens = noise.integers(1, 60, documents)
    base = noise.normal(3, 0.5, documents) * tokens
    return SourceRises(tokens, base, base + noise.normal(mean, spread, documents) * tokens)


def plain_limit(sources: list[SourceRises], confidence: float, samples: int) -> float:
    """Draw documents of each source, sum, divide; sort. Nothing vectorised."""
    draw, found = random.Random(7), []
    for _ in range(samples):
        total = tokens = 0.0
        for source in sources:
            for i in draw.choices(range(len(source.tokens)), k=len(source.tokens)):
                total += float(source.losses[i] - source.base[i])
                tokens += int(source.tokens[i])
        found.append(total / tokens)
    return sorted(found)[int(confidence * samples)]


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_limit_is_that_of_a_plain_loop(confidence: float) -> None:
    """Of 10,000 random draws each: a percentile then varies by some hundredths of the spread, which is about 0.02."""
    sources = [rises_of(1, 30, 0.05), rises_of(2, 12)]
    change = loss_change(sources, confidence)
    assert change.limit == pytest.approx(plain_limit(sources, confidence, 10_000), abs=0.002)
    tokens = sum(int(source.tokens.sum()) for source in sources)
    assert (change.tokens, change.documents) == (tokens, 42)
    assert change.loss == pytest.approx(sum(float(source.losses.sum()) for source in sources) / tokens, rel=1e-12)
    assert change.rise == pytest.approx(
        sum(float((source.losses - source.base).sum()) for source in sources) / tokens, rel=1e-9
    )


def test_long_documents_weigh_what_they_weigh_in_the_loss() -> None:
    """One of 900 tokens that gets better by 0.1 nats, nine of 10 that get worse by 0.5: better, by the token."""
    tokens = np.array([900] + [10] * 9)
    base = 3.0 * tokens
    change = loss_change([SourceRises(tokens, base, base + np.where(tokens > 100, -0.1, 0.5) * tokens)], 0.95)
    assert change.rise == pytest.approx((-90 + 45) / 990)
    assert change.limit > 0, "but a draw without it is worse"


def test_what_documents_have_in_common_is_no_noise() -> None:
    """Paired: each document rises by exactly 0.01, however unlike their losses are."""
    source = rises_of(3, 20)
    change = loss_change([source._replace(losses=source.base + 0.01 * source.tokens)], 0.95)
    assert change.rise == pytest.approx(0.01) and change.limit == pytest.approx(0.01)


def test_the_base_itself_does_not_rise_at_all() -> None:
    source = rises_of(3, 20)
    change = loss_change([source._replace(losses=source.base)], 0.95)
    assert (change.rise, change.limit) == (0.0, 0.0)


def test_the_limit_holds_as_often_as_it_says() -> None:
    """400 samples of 40 documents whose true rise is known: 380 limits should lie above it. Binomial noise is 4.4, and
    a bootstrap over 40 documents of unlike lengths is a little too sure of itself: 365 to 392."""
    above = 0
    for seed in range(400):
        change = loss_change([rises_of(1000 + seed, 40, mean=0.03)], 0.95, samples=400)
        above += change.limit >= 0.03
    assert 365 <= above <= 392


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_both_limits_are_those_of_a_plain_loop(confidence: float) -> None:
    source = rises_of(1, 30, 0.05)
    found, change = rise_limits(source, confidence), loss_change([source], confidence)
    assert (found.rise, found.upper) == (change.rise, change.limit)
    assert found.lower == pytest.approx(plain_limit([source], 1 - confidence, 10_000), abs=0.002)
    assert found.lower < found.rise < found.upper


# --- halves ----------------------------------------------------------------------------------------------------------


def documents(texts: list[str], tokens: list[int] | None = None) -> Any:
    ids = np.array([document_id(text) for text in texts])
    return SimpleNamespace(ids=ids, tokens=np.array(tokens or [5] * len(texts)))


def test_a_document_is_in_one_half_by_its_text_alone() -> None:
    """About half in each: of 1,000, 500 +- 16."""
    texts = [f"text {number}" for number in range(1000)]
    validation, test = (in_half(documents(texts).ids, half) for half in ("validation", "test"))
    assert (validation != test).all()
    assert 440 < validation.sum() < 560
    assert (in_half(documents(texts[::-1]).ids, "test") == test[::-1]).all()


def test_pairs_are_of_a_half_by_source_and_the_domain_is_one() -> None:
    texts = [f"text {number}" for number in range(40)]
    held_out = {
        SourceName("general", "wiki"): documents(texts),
        SourceName("general", "exams"): documents([text + "!" for text in texts]),
        SourceName("domain", "one"): documents([text + "?" for text in texts]),
        SourceName("domain", "two"): documents([text + "." for text in texts]),
    }
    base = {name: np.full(40, 10.0) for name in held_out}
    losses = {name: 10.0 + 5 * (0.1 if name.source == "exams" else -0.2) * np.ones(40) for name in held_out}
    pairs = Pairs(held_out, base, 0.95)
    halves = [pairs.of(losses, half) for half in ("validation", "test")]
    for found in halves:
        assert {name: of.rise for name, of in found.general.items()} == pytest.approx({"wiki": -0.2, "exams": 0.1})
        assert found.domain.rise == pytest.approx(-0.2)
        assert found.worst == "exams" and found.keeps(0.11) and not found.keeps(0.09)
    for half, found in zip(("validation", "test"), halves, strict=True):
        limits = pairs.limits(losses, half)  # type: ignore[arg-type]
        assert {name: of.upper for name, of in limits.items()} == {n: of.limit for n, of in found.general.items()}
        assert pairs.domain_loss(losses, half) == pytest.approx(found.domain.loss)  # type: ignore[arg-type]
    for name in ("wiki", "exams"):
        assert sum(found.general[name].documents for found in halves) == 40
    assert sum(found.domain.documents for found in halves) == 80


def test_too_few_documents_in_a_half_are_refused_by_source() -> None:
    """Of general text; of the domain, whose limits promise nothing, one of each is enough."""
    texts = [f"text {number}" for number in range(60)]
    mine = [text for text in texts if in_half(documents([text]).ids, "test")[0]]
    others = [text for text in texts if text not in mine]
    exams, domain = SourceName("general", "exams"), SourceName("domain", "words")
    few, one = documents([*mine[:6], *others[:6]]), documents([mine[0], others[0]])
    check_halves({exams: few, domain: one}, 6)
    with pytest.raises(InputError, match=r"data.general_eval: source 'exams' has 6 validation and 6 test documents"):
        check_halves({exams: few, domain: one}, 7)
    nothing_predicted = documents([mine[0], *others[:8]], [0] + [5] * 8)
    with pytest.raises(InputError, match=r"data.domain_eval: 8 validation and 0 test documents"):
        check_halves({exams: few, domain: nothing_predicted}, 6)
    check_halves({exams: few, domain: nothing_predicted, SourceName("domain", "more"): one}, 6)
