"""Files of trials that cannot be compared are refused in one line that names the file and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from harness.made_up_study import FOUR, description, write_small, write_trial
from safetensors.numpy import load_file, save_file

from adept_ds.base.errors import InputError
from adept_ds.base.run_records import TaskScores
from adept_ds.comparison.measurements import read_measurements
from adept_ds.comparison.page import write_comparison
from adept_ds.comparison.trials import Source, Trial, document_losses

TOKENS = dict.fromkeys(FOUR, (2, 4))


def losses(base: float = 3.0, adapted: float = 2.0) -> dict[str, dict[str, list[float]]]:
    return {"base": {source: [base] * 2 for source in FOUR}, "adapted": {source: [adapted] * 2 for source in FOUR}}


def change_tensors(trial: Trial, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = dict(load_file(document_losses(trial)))
    change(tensors)
    save_file(tensors, document_losses(trial))


def spoil_ids(tensors: dict[str, np.ndarray]) -> None:
    tensors["ids/general/test/g"] = tensors["ids/general/test/g"][::-1].copy()


def spoil_tokens(tensors: dict[str, np.ndarray]) -> None:
    tensors["tokens/general/test/g"] = tensors["tokens/general/test/g"] + 1


def rename(kind: str, old: str, new: str) -> Callable[[dict[str, np.ndarray]], object]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.startswith(kind) and old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (spoil_ids, "other documents of 'test/g' in data.general_eval"),
        (spoil_tokens, "other documents of 'test/g' in data.general_eval"),
        (rename("", "test/g", "test/other"), "other documents of 'test/g' in data.general_eval"),
        (rename("loss", "/base/", "/alpha=0.5/"), "lacks the losses of a model, base or adapted"),
        (rename("loss", "/base/", "/best/"), "has a model 'best', which is no position of the dial"),
        (rename("tokens", "test/g", "test/other"), "has not the same documents for every model"),
        (rename("", "test/g", "held_out"), "the source 'held_out' of data.general_eval has no role"),
        (lambda tensors: tensors.update({"loss/base/domain/test/d": np.full(2, np.inf)}), "are no finite numbers"),
        (lambda tensors: tensors.update({"loss/base/domain/test/d": np.full(2, 99.0)}), "another loss of the base"),
    ],
)
def test_a_trial_that_is_not_like_the_first_is_refused(
    tmp_path: Path, change: Callable[[dict[str, np.ndarray]], object], words: str
) -> None:
    first, second = (write_small(tmp_path, "m", lr, 0, losses(), TOKENS) for lr in (1e-4, 2e-4))
    change_tensors(second, change)
    with pytest.raises(InputError) as refusal:
        write_comparison(tmp_path / "study", description(), [first, second])
    assert words in str(refusal.value)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(("role", "other"), [("validation", "test"), ("test", "validation")])
def test_a_study_without_one_of_the_roles_is_refused(tmp_path: Path, role: str, other: str) -> None:
    trial = write_small(tmp_path, "m", 1e-4, 0, losses(), TOKENS)
    change_tensors(trial, rename("", f"domain/{role}/d", f"domain/{other}/e"))
    with pytest.raises(InputError, match=f"has no {role} documents of data.domain_eval"):
        read_measurements([trial])


@pytest.mark.parametrize("name", ["document_losses.safetensors", "summary.json"])
def test_a_missing_or_damaged_file_is_refused(tmp_path: Path, name: str) -> None:
    trial = write_small(tmp_path, "m", 1e-4, 0, losses(), TOKENS)
    (trial.run_dir / name).write_bytes(b"{")
    with pytest.raises(InputError, match=name):
        read_measurements([trial])
    (trial.run_dir / name).unlink()
    with pytest.raises(InputError, match=name):
        read_measurements([trial])


def test_no_trial_and_a_trial_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished trial"):
        read_measurements([])
    trial = write_small(tmp_path, "m", 1e-4, 0, losses(), TOKENS)
    with pytest.raises(InputError, match="'m, learning rate 1e-4, seed 0' is given twice"):
        read_measurements([trial, trial])


def test_losses_are_weighted_by_tokens_over_all_sources(tmp_path: Path) -> None:
    tokens = {**TOKENS, "domain/test/e": (10,)}
    sums = {
        model: {**{source: [1.0, 8.0] for source in FOUR}, "domain/test/e": [20.0]} for model in ("base", "adapted")
    }
    trial = write_trial(Trial(label="m", lr=1e-4, seed=0, run_dir=tmp_path / "run"), tokens, sums)
    measured = read_measurements([trial])
    assert measured.loss(measured.base, measured.sources("domain", "test")) == pytest.approx(29 / 16)
    assert measured.loss(measured.base, [Source("domain", "test", "d")]) == pytest.approx(9 / 6)


def test_a_trial_needs_neither_accuracies_nor_evaluations_nor_logs(tmp_path: Path) -> None:
    trial = write_small(tmp_path, "m", 1e-4, 0, losses(), TOKENS)
    assert {path.name for path in trial.run_dir.iterdir()} == {"document_losses.safetensors", "summary.json"}
    (cell,) = read_measurements([trial]).cells
    assert (dict(cell.accuracy), len(cell.training.loss), len(cell.held_out.loss)) == ({}, 0, 0)
    write_comparison(tmp_path / "study", description(), [trial])


def test_scores_on_tasks_are_by_position_of_the_dial(tmp_path: Path) -> None:
    trial = write_small(tmp_path, "m", 1e-4, 0, losses(), TOKENS)
    scores = {"quiz": {"acc": 0.25, "acc_stderr": 0.1}}
    TaskScores(models={"base": scores, "adapted": {}, "alpha=0.5": scores}).save(trial.run_dir / "task_scores.json")
    measured = read_measurements([trial])
    assert measured.base_scores == scores
    assert measured.cells[0].scores == {0.0: scores, 1.0: {}, 0.5: scores}


def test_accuracies_are_those_of_length_normalised_likelihoods(tmp_path: Path) -> None:
    trial = Trial(label="m", lr=1e-4, seed=0, run_dir=tmp_path / "run")
    sums = {model: {source: [1.0, 8.0] for source in FOUR} for model in ("base", "alpha=0.5", "adapted")}
    shares = {"base": 0.25, "alpha=0.5": 0.5, "adapted": 0.375}
    write_trial(trial, TOKENS, sums, accuracy={model: {"general/test/g": share} for model, share in shares.items()})
    (cell,) = read_measurements([trial]).cells
    source = Source("general", "test", "g")
    assert dict(cell.accuracy) == {0.0: {source: 0.25}, 0.5: {source: 0.5}, 1.0: {source: 0.375}}
