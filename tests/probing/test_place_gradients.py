"""Gain and harm of every place on real ranks, against plain PyTorch on a real expanded model.

The ranks do everything in one process group per world size (harness/places_worker.py), under ZeRO-3 with every
parameter cut, and once under ZeRO-2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from harness.expanding import layers_of
from harness.launching import launch
from harness.packing import rows
from harness.places_worker import FAMILIES, places_config, places_workspace
from harness.probe_worker import open_run
from harness.workspace import Workspace

from adept_ds.base.errors import NonFiniteLossError
from adept_ds.data.mixture import Sample
from adept_ds.probing.place_gradients import _Places
from adept_ds.probing.places import PlaceScores
from adept_ds.ranks.collectives import Ranks
from adept_ds.weights.expansion import expand_checkpoint

RUNS = {1: [("llama", 3)], 2: [("llama", 2), *((family, 3) for family in FAMILIES)]}
"""By number of ranks: models and ZeRO stages. In one process every family is in test_silent_copies.py."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return places_workspace(tmp_path_factory.mktemp("places"))


@pytest.fixture(scope="module")
def roots(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The directory of each world size's runs."""
    found = {}
    for world_size, runs in RUNS.items():
        found[world_size] = tmp_path_factory.mktemp(f"ranks{world_size}")
        arguments = [str(workspace.root), str(found[world_size]), *(str(value) for run in runs for value in run)]
        result = launch(world_size, ["-m", "harness.places_worker", *arguments])
        assert result.returncode == 0, result.stderr[-4000:]
    return found


def scores_of(roots: dict[int, Path], world_size: int, family: str, stage: int = 3) -> PlaceScores:
    return PlaceScores.load(roots[world_size] / f"{family}{stage}" / "place_scores.json")


def of_plain_pytorch(
    source: Path, expanded: Path, domain: Sample, general: Sample
) -> tuple[list[float], list[float], list[float]]:
    """Gains, harms, and both base losses, from all parameters of real copies of all layers."""
    expand_checkpoint(source, expanded, range(5))
    model = oracle.load(expanded)
    gradients, losses = [], []
    for sample in (domain, general):
        model.zero_grad()
        loss = oracle.mean_loss(model, [rows(sample.blocks, sample.indices)])
        loss.backward()
        copies = [layers_of(model)[2 * layer + 1] for layer in range(5)]
        gradients.append([torch.cat([p.grad.double().flatten() for p in copy.parameters()]) for copy in copies])
        losses.append(float(loss.detach()))
    gains = [float(of_domain.abs().sum()) for of_domain in gradients[0]]
    harms = [-float((of_domain.sign() * of_general).sum()) for of_domain, of_general in zip(*gradients, strict=True)]
    return gains, harms, losses


@pytest.mark.parametrize(
    ("world_size", "family", "stage"), [(size, *run) for size, runs in RUNS.items() for run in runs]
)
def test_gain_and_harm_are_those_of_real_copies(
    workspace: Workspace, roots: dict[int, Path], tmp_path: Path, world_size: int, family: str, stage: int
) -> None:
    run = open_run(places_config(workspace, tmp_path / "run", family))
    domain, general = (corpus.sample(7, 0) for corpus in (run.corpora.domain_of_probe, run.corpora.general))
    gains, harms, losses = of_plain_pytorch(workspace.root / family, tmp_path / "expanded", domain, general)
    found = scores_of(roots, world_size, family, stage)
    assert [found.domain.loss, found.general.loss] == pytest.approx(losses, rel=1e-5)
    assert [len(found.domain.sources), found.domain.sequences, found.general.sequences] == [2, 7, 7]
    # float32 gradients, summed in another order
    assert list(found.gains) == pytest.approx(gains, rel=1e-4)
    # where an element of g_d is zero but for rounding, its sign may be another one
    assert list(found.harms) == pytest.approx(harms, rel=1e-3, abs=1e-3 * max(gains))
    assert max(abs(harm) for harm in harms) > 0.1 * max(gains), "general text is not indifferent"
    assert len({round(gain / max(gains), 2) for gain in gains}) > 2, "places differ"


def loss_in_double(model: Any, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
    assert logits.dtype == torch.float64
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def test_a_step_of_adamw_does_what_gain_and_harm_say(
    workspace: Workspace, roots: dict[int, Path], tmp_path: Path
) -> None:
    """Real copies at one place, one step with the domain's gradient: both losses move by the learning rate times these
    numbers. That fixes both signs."""
    run = open_run(places_config(workspace, tmp_path / "run"))
    domain, general = (corpus.sample(7, 0) for corpus in (run.corpora.domain_of_probe, run.corpora.general))
    found = scores_of(roots, 1, "llama")
    for place in (0, 3):
        expanded = tmp_path / f"expanded{place}"
        expand_checkpoint(workspace.root / "llama", expanded, [place])
        model = oracle.load(expanded).double()
        model.requires_grad_(False)
        copy = list(layers_of(model)[place + 1].requires_grad_(True).parameters())
        texts = [rows(sample.blocks, sample.indices) for sample in (domain, general)]
        before = [loss_in_double(model, *text) for text in texts]
        before[0].backward()
        lr = 3e-6
        torch.optim.AdamW(copy, lr=lr, eps=1e-30, weight_decay=0.1).step()
        with torch.no_grad():
            after = [loss_in_double(model, *text) for text in texts]
        fall, rise = float(before[0] - after[0]) / lr, float(after[1] - before[1]) / lr
        # norms and softmax are float32 whatever the model is, which is 1e-7 of a move of 1e-4; so is curvature
        assert fall == pytest.approx(found.gains[place], rel=0.01)
        assert rise == pytest.approx(found.harms[place], rel=0.01, abs=0.01 * found.gains[place])


def test_what_is_not_finite_ends_it(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adept_ds.probing import place_gradients

    run = open_run(places_config(workspace, tmp_path / "run"))
    sample = run.corpora.general.sample(2, 0)
    monkeypatch.setattr(_Places, "gains", lambda *_: torch.full((5,), torch.nan, dtype=torch.float64))
    monkeypatch.setattr(_Places, "harms", lambda _: torch.zeros(5, dtype=torch.float64))
    with pytest.raises(NonFiniteLossError, match=r"^probe: a gradient of a silent copy is NaN"):
        place_gradients.weigh_places(
            run.engines,
            run.settings.model,
            sample,
            sample,
            micro_batch_size=2,
            check=lambda *_: None,
            move=lambda *_: None,
        )


def test_gains_are_of_the_whole_batch_and_harm_is_linear() -> None:
    """Micro-batches that pull in opposite directions cancel in g_d; signs are of what is left."""
    places = _Places(2, Ranks(), {}, {})
    for of_layers in ([[1.0, -2.0, 0.5], [1.0, 1.0]], [[-3.0, -1.0, -0.5], [1.0, 0.0]]):
        for layer in (1, 0):
            places.take(layer, torch.tensor(of_layers[layer]))
    assert places.gains("cpu").tolist() == [2 + 3 + 0, 2 + 1]
    for layer, part in ((1, [1.0, 2.0]), (0, [1.0, 1.0, 9.0]), (1, [0.5, 0.0]), (0, [0.0, 1.0, 0.0])):
        places.take(layer, torch.tensor(part))
    assert places.harms().tolist() == [1 + 2, -(1.5 + 2)]
