"""What is counted as a promise that held: by documents that did not choose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dial_promise import Model, outcome
from harness.made_up_study import FOUR, document_id, write_small

from adept_ds.comparison.between import filled
from adept_ds.comparison.trials import read_cell
from adept_ds.evaluation.rises import Half, in_half

DOCUMENTS = 40
MODELS = {"base": 0.0, "alpha=0.25": 0.25, "alpha=0.5": 0.5, "alpha=0.75": 0.75, "adapted": 1.0}


def model_of(folder: Path, crossing: dict[Half, float]) -> Model:
    """The general losses of each half come back to the base's at its `crossing`; every document is alike in a half."""
    ids = {source: np.array([document_id(f"{source} {i}") for i in range(DOCUMENTS)]) for source in FOUR}

    def losses(source: str, alpha: float) -> list[float]:
        if source.startswith("domain"):
            return [3 - alpha] * DOCUMENTS
        at = np.where(in_half(ids[source], "validation"), crossing["validation"], crossing["test"])
        rises: Any = alpha * (alpha - at)
        return list(2 + rises)

    tokens = {source: [10] * DOCUMENTS for source in FOUR}
    by_model = {model: {source: losses(source, alpha) for source in FOUR} for model, alpha in MODELS.items()}
    cell = read_cell(write_small(folder, "full", 1e-4, 0, by_model, tokens))
    return Model(cell.documents, filled(cell.evaluated))


def found(folder: Path, half: Half, **crossing: float) -> Any:
    model = model_of(folder, {"validation": crossing["validation"], "test": crossing["test"]})
    return outcome(model, sorted(MODELS.values()), half, 0.0, 0.95)


@pytest.mark.parametrize(("half", "alpha", "rise"), [("validation", 0.62, 0.62 * 0.195), ("test", 0.42, -0.42 * 0.205)])
def test_one_half_chooses_and_the_other_tells(tmp_path: Path, half: Half, alpha: float, rise: float) -> None:
    of = found(tmp_path, half, validation=0.625, test=0.425)
    assert of.alpha == pytest.approx(alpha)
    assert of.domain_rise == pytest.approx(-alpha)
    assert of.worst_rise == pytest.approx(rise)
    assert of.worst_limit == pytest.approx(rise), "documents that are alike leave no doubt"


def test_where_only_the_base_keeps_the_promise_nothing_is_lost(tmp_path: Path) -> None:
    of = found(tmp_path, "validation", validation=0.0, test=0.5)
    assert (of.alpha, of.domain_rise, of.worst_rise) == (0.0, 0.0, 0.0)
