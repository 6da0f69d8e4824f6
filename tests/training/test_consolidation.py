"""Old and new weights are mixed by unit wherever a unit's elements lie: fused, stacked, tied, stored apart."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
from harness.models import save_tiny_model

from adept_ds.base.errors import InputError
from adept_ds.models.directory import ModelDirectory
from adept_ds.training.consolidation import (
    CONSOLIDATION_NAME,
    Consolidation,
    ConsolidationRule,
    UnitShare,
    consolidated,
)
from adept_ds.units.registry import build_registry
from adept_ds.units.smoothed import SmoothedImportance

Trained = dict[str, torch.Tensor]

FUSED: dict[str, dict[str, list[tuple[str, tuple[Any, ...]]]]] = {
    "gpt_neox": {
        "gpt_neox.layers.1.attention.query_key_value.weight": [
            (f"layers.1.attention.{part}", (slice(head * 30 + number * 10, head * 30 + number * 10 + 10),))
            for head in range(2)
            for number, part in enumerate(("query", "key", "value"))
        ]
    },
    "mixtral": {
        "model.layers.3.mlp.experts.gate_up_proj": [
            (f"layers.3.mlp.experts.{part}.{expert}", (expert, slice(number * 32, number * 32 + 32)))
            for expert in range(3)
            for number, part in enumerate(("gate_proj", "up_proj"))
        ]
    },
    "phi3": {
        "model.layers.0.self_attn.qkv_proj.weight": [
            (f"layers.0.self_attn.{part}", (slice(first, last),))
            for part, first, last in (("q_proj", 0, 20), ("k_proj", 20, 30), ("v_proj", 30, 40))
        ]
    },
    "qwen2": {},
    "llama": {},
}
"""Parameters that hold several units: which, and where."""


def trained_by_one(folder: Path, model_type: str) -> tuple[ModelDirectory, Trained, dict[str, float]]:
    """A model, all its weights larger by 1, and a record in `folder` that gives every unit another share of that."""
    place = save_tiny_model(folder / "model", model_type)
    model, directory = oracle.load(place), ModelDirectory.read(place)
    trained = {name: parameter.detach() + 1 for name, parameter in model.named_parameters()}
    shapes = {name: tuple(weight.shape) for name, weight in trained.items()}
    layers = range(directory.num_layers)
    names = build_registry(directory.family, shapes, layers, config=model.config, outside=True).names
    shares = {name: number / (len(names) - 1) for number, name in enumerate(names)}
    units = {name: UnitShare(general=0.0, domain=0.0, role="idle", new=share) for name, share in shares.items()}
    Consolidation(units=units).save(folder / CONSOLIDATION_NAME)
    return directory, trained, shares


@pytest.mark.parametrize("model_type", sorted(FUSED))
def test_every_element_moves_by_the_share_of_its_unit(tmp_path: Path, model_type: str) -> None:
    directory, trained, shares = trained_by_one(tmp_path, model_type)
    head = directory.family.head
    is_tied = head not in trained
    given = trained | ({head: trained[directory.family.outside[0]]} if is_tied else {})
    mixed = dict(consolidated(given, directory, tmp_path))
    assert mixed.keys() == given.keys()
    if is_tied:
        assert torch.equal(mixed[head], mixed[directory.family.outside[0]])
    for name, new in trained.items():
        moved = mixed[name] - (new - 1)
        for unit, place in FUSED[model_type].get(name, [(oracle.unit_of(name), ())]):
            unit = unit.removeprefix("gpt_neox.")
            if unit in shares:  # but those of other fused parameters
                expected = torch.full_like(moved[place], shares[unit])
                torch.testing.assert_close(moved[place], expected, rtol=0, atol=1e-6, msg=name)


def test_no_share_and_the_whole_share_are_the_old_and_the_new_weights_to_the_last_bit(tmp_path: Path) -> None:
    directory, trained, shares = trained_by_one(tmp_path, "qwen2")
    old, mixed = dict(oracle.load(directory.path).named_parameters()), dict(consolidated(trained, directory, tmp_path))
    by_share = sorted(shares, key=shares.__getitem__)
    assert (by_share[0], by_share[-1]) == ("layers.0.self_attn.q_proj", "lm_head")
    for part in ("weight", "bias"):
        first = f"model.layers.0.self_attn.q_proj.{part}"
        assert torch.equal(mixed[first], old[first])
    assert torch.equal(mixed["lm_head.weight"], trained["lm_head.weight"])


def test_a_record_of_another_model_is_refused(tmp_path: Path) -> None:
    _, trained, _ = trained_by_one(tmp_path, "qwen2")
    other = ModelDirectory.read(save_tiny_model(tmp_path / "other", "qwen2", num_hidden_layers=4, max_window_layers=2))
    fewer = {name: weight for name, weight in trained.items() if ".4." not in name}
    with pytest.raises(InputError, match=r"consolidation\.json' is of another model than .*; give its own base"):
        list(consolidated(fewer, other, tmp_path))


def test_the_gradient_of_a_step_that_is_not_taken_is_no_observation() -> None:
    """Of one that is skipped as a spike, say. A score is the first observation's, half way to the second one's."""
    rule: Any = ConsolidationRule.__new__(ConsolidationRule)  # no engine: sums are given
    sums = iter([1.0, 1000.0, 2.0])
    rule._unit_sums = SimpleNamespace(local_later=lambda: partial(torch.full, (2,), next(sums)))
    rule._mean = lambda found: found.double()
    rule._domain = SmoothedImportance(2, (0.5, 0.5))
    rule._every, rule._steps, rule._last = 1, 0, None
    apart = SmoothedImportance(2, (0.5, 0.5))
    for taken in (True, False, True):
        rule.before_update()
        if not taken:
            rule.take_back()
    rule._observe_last()
    for value in (1.0, 2.0):
        apart.observe(torch.full((2,), value).double())
    assert rule._domain.scores == apart.scores
