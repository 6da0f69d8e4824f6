"""What follows from the scores of a probe: a choice of layers, how sure it is, what it is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.packing import made_up_blocks
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.config.layer_sections import ExpandSection, ProbeSection
from adept_ds.data.mixture import Mixture
from adept_ds.models.directory import ModelDirectory
from adept_ds.probing.decision import Reference, check_halves, result_of, select
from adept_ds.probing.estimators import ESTIMATORS, Probe
from adept_ds.probing.scores import LayerScores
from adept_ds.ranks.collectives import Ranks
from adept_ds.zero.build import EngineSettings

MEANS = [0.9, 0.1, 0.5, 0.3, 0.2]
SEQUENCES = (8, 4)
"""Of two sources."""


def made_up_probe(
    workspace: Workspace, *, counts: Sequence[int] = SEQUENCES, expand: dict[str, Any] | None = None, **section: Any
) -> Probe:
    """No engine is built and no text read: twelve sequences of nine tokens."""
    parts = [made_up_blocks(np.ones((count, 10))) for count in counts]
    mixture = Mixture.of(parts, [1.0] * len(counts), [f"source {number}" for number in range(len(counts))])
    engines = EngineSettings({}, torch.float32, Ranks())
    chosen = ExpandSection(**(expand or {"k": 2}))
    model = ModelDirectory.read(workspace.model)
    return Probe(engines, ProbeSection(**section), chosen, 3, model, mixture.sample(sum(counts), seed=0))


def made_up_scores(probe: Probe, noise: float = 0.0, means: Sequence[float] = MEANS) -> LayerScores:
    """Scores that scatter about the layers' means, which they have in each source (or over all batches)."""
    estimator, tokens = ESTIMATORS[probe.section.method], np.array(probe.sample.tokens(), dtype=float)
    source_of = np.array(probe.sample.sources)
    if not estimator.by_sequence:
        source_of = np.zeros(len(probe.batches.global_batches()), dtype=int)
    scatter = noise * np.random.default_rng(0).normal(size=(len(source_of), len(means)))
    for source in set(source_of):
        scatter[source_of == source] -= scatter[source_of == source].mean(0)
    table = (tokens[0] if estimator.by_sequence else 1) * (np.array(means) + scatter)
    return LayerScores(
        method=probe.section.method,
        by_sequence=estimator.by_sequence,
        seconds=1.0,
        losses=5 * tokens,
        tokens=tokens,
        sources=np.array(probe.sample.sources),
        weights=np.array(probe.sample.weights),
        scores=table,
    )


@pytest.mark.parametrize("method", list(ESTIMATORS))
def test_a_result_says_what_was_probed_and_what_came_out(workspace: Workspace, method: str) -> None:
    probe = made_up_probe(workspace, method=method, batch_sequences=4)
    scores = made_up_scores(probe, noise=0.02)
    result = result_of(probe, scores)
    assert (result.method, result.sequences, result.tokens) == (method, 12, 12 * 9)
    assert [dict(source) for source in result.sources] == probe.sample.facts()
    assert result.base_loss == pytest.approx(5)
    assert result.deltas == scores.deltas == pytest.approx(MEANS)
    assert result.selected == (1, 4)
    assert [layer.index for layer in result.layers] == [0, 1, 2, 3, 4]
    for layer in result.layers:
        if method in ("mask", "taylor"):
            assert layer.loss == pytest.approx(5 + layer.delta)
        else:
            assert layer.loss is None, "other scores are in no unit of a loss"
    replicates = scores.replicates(probe.seed)
    assert replicates is not None
    assert [layer.standard_error for layer in result.layers] == pytest.approx(replicates.std(0, ddof=1).tolist())


def test_without_anything_to_draw_from_there_is_a_choice_and_no_error(workspace: Workspace) -> None:
    probe = made_up_probe(workspace, counts=(3, 1), stability=None)
    result = result_of(probe, made_up_scores(probe))
    assert result.selected == (1, 4)
    assert {layer.standard_error for layer in result.layers} == {None}


def test_layers_are_marked_where_the_spread_of_the_scores_could_change_the_choice(workspace: Workspace) -> None:
    probe = made_up_probe(workspace)
    sure, unsure = (result_of(probe, made_up_scores(probe, noise)).selection for noise in (1e-6, 0.3))
    assert sure is not None and unsure is not None
    assert sure.within_noise == ()
    assert {3, 4} <= set(unsure.within_noise), "0.3 and 0.2, with standard errors of about 0.1"
    assert 0 not in unsure.within_noise


def test_the_section_of_the_expansion_and_the_seed_of_the_run_decide(workspace: Workspace) -> None:
    sections: dict[tuple[int, ...], dict[str, Any]] = {
        (0, 2): {"k": 2, "choose": "highest"},
        (1, 3, 4): {"k": 3},
        (0, 3): {"layers": [3, 0]},
        (0, 2, 4): {"k": 3, "choose": "uniform"},
    }
    for expected, section in sections.items():
        probe = made_up_probe(workspace, expand=section)
        assert result_of(probe, made_up_scores(probe)).selected == expected
        assert tuple(select(probe, MEANS)) == expected
    drawn = made_up_probe(workspace, expand={"k": 2, "choose": "random"})
    assert len({tuple(select(dataclasses.replace(drawn, seed=seed), MEANS)) for seed in range(20)}) > 3


def test_what_a_choice_is_compared_with_does_not_decide(workspace: Workspace) -> None:
    """All signs turned round: the others are chosen, and every pair is in the other order."""
    probe = made_up_probe(workspace, stability={"corpus": ["x"]})
    scores = made_up_scores(probe)
    other = made_up_scores(probe, means=[-mean for mean in MEANS])
    alone, compared = result_of(probe, scores), result_of(probe, scores, Reference("corpus", "other", other))
    assert alone.stability is None
    assert compared.selected == alone.selected
    assert compared.layers == alone.layers
    found = compared.stability
    assert found is not None
    assert (found.against, found.name, found.selected) == ("corpus", "other", ((1, 4), (0, 2)))
    assert (found.jaccard, found.kendall_tau) == (0, pytest.approx(-1))


def test_halves_are_compared_where_they_are_asked_for(workspace: Workspace) -> None:
    """Every other sequence of each source says that layers 0 and 2 can go."""
    probe = made_up_probe(workspace, stability="halves")
    scores = made_up_scores(probe)
    for source in (0, 1):
        scores.scores[np.flatnonzero(scores.sources == source)[1::2]] *= -1
    found = result_of(probe, scores).stability
    assert found is not None
    assert (found.against, found.selected, found.kendall_tau) == ("halves", ((1, 4), (0, 2)), pytest.approx(-1))
    assert result_of(made_up_probe(workspace, stability=None), scores).stability is None


@pytest.mark.parametrize("method", ["mask", "taylor"])
def test_halves_need_two_sequences_of_every_source(workspace: Workspace, method: str) -> None:
    check_halves(made_up_probe(workspace, counts=(7, 2), method=method))
    with pytest.raises(InputError, match=r"^probe\.stability: halves needs two sequences .* 'source 1' has one in the"):
        check_halves(made_up_probe(workspace, counts=(7, 1), method=method))


@pytest.mark.parametrize("method", ["gradient", "fisher"])
def test_halves_of_gradients_need_two_batches_whatever_the_sources(workspace: Workspace, method: str) -> None:
    check_halves(made_up_probe(workspace, counts=(7, 1), method=method, batch_sequences=7))
    with pytest.raises(InputError, match=r"^probe\.stability: .* 8 sequences are one of probe\.batch_sequences 8;"):
        check_halves(made_up_probe(workspace, counts=(7, 1), method=method, batch_sequences=8))


def test_what_halves_need_is_what_they_are_computed_from(workspace: Workspace, tmp_path: Path) -> None:
    """The check before the passes and the scores after them agree."""
    for method in ESTIMATORS:
        for counts, batch in (((2, 2), 2), ((2, 2), 4), ((3, 1), 2), ((3, 1), 4)):
            probe = made_up_probe(workspace, counts=counts, method=method, batch_sequences=batch)
            halves = made_up_scores(probe).halves()
            if halves is None:
                with pytest.raises(InputError):
                    check_halves(probe)
            else:
                check_halves(probe)
