"""What a run's files are called, and which of its directories are checkpoints."""

from __future__ import annotations

from pathlib import Path

from adept_ds.base.run_dir import RunDirectory, checkpoint_steps, checkpoint_tag, manifest_of

NAMES = {
    "config": "config.yaml",
    "activity": "logs/activity.json",
    "tracking": "tracking.json",
    "ledger": "stages.json",
    "tokens": "cache/tokens",
    "digests": "cache/digests.json",
    "requeues": "cache/requeues.json",
    "layer_importance": "layer_importance.json",
    "layer_methods": "layer_methods.json",
    "place_scores": "place_scores.json",
    "place_benefits": "place_benefits.json",
    "expanded": "expanded",
    "expansion": "expanded/expansion.json",
    "anchor_text": "anchor_text.safetensors",
    "unit_importance": "unit_importance.jsonl",
    "unit_movement": "unit_movement.jsonl",
    "metrics": "metrics.jsonl",
    "tensorboard": "tensorboard",
    "checkpoints": "checkpoints",
    "export": "export",
    "trained": "trained",
    "dial": "dial.json",
    "dial_losses": "dial_losses.safetensors",
    "evaluation": "evaluation.json",
    "document_losses": "document_losses.safetensors",
    "base_evaluation": "evaluation_base.json",
    "base_document_losses": "document_losses_base.safetensors",
    "task_scores": "task_scores.json",
    "base_task_scores": "task_scores_base.json",
    "summary": "summary.json",
    "given_up": "given_up.json",
    "guard": "guard.json",
    "lock": "lock",
    "unfinished": "cache/unfinished",
    "report": "report.html",
    "diagnosis": "diagnosis.json",
    "diagnosis_page": "diagnosis.html",
}
"""People and scripts know these names, and old runs have them."""


def test_every_file_of_a_run_has_the_name_that_it_always_had(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    found = {name: getattr(run, name) for name, member in vars(RunDirectory).items() if isinstance(member, property)}
    assert found == {name: tmp_path / place for name, place in NAMES.items()}
    assert run.layer_scores() == tmp_path / "layer_scores.safetensors"
    assert run.layer_scores("corpus") == tmp_path / "layer_scores_corpus.safetensors"
    assert run.log(3) == tmp_path / "logs" / "rank_3.log"


def test_looking_at_names_writes_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert not any(getattr(run, name).exists() for name in NAMES)
    assert checkpoint_steps(run.checkpoints) == []
    assert list(tmp_path.iterdir()) == []


def test_only_complete_checkpoints_are_listed_by_number(tmp_path: Path) -> None:
    for step in (100, 9, 2, 10):
        checkpoint = tmp_path / checkpoint_tag(step)
        checkpoint.mkdir()
        manifest_of(checkpoint).write_text("{}")
    (tmp_path / "step_11").mkdir()  # its manifest would have been written last
    (tmp_path / "step_12").write_text("no directory")
    hidden = [f".step_13.{'0' * 32}.tmp", f"step_14.{'0' * 32}.tmp", "global_step15", "step_last", "step_-16", "step_"]
    for name in hidden:
        (tmp_path / name).mkdir()
        manifest_of(tmp_path / name).write_text("{}")
    (tmp_path / "latest").write_text("step_100")
    assert checkpoint_steps(tmp_path) == [2, 9, 10, 100]


def test_a_tag_is_what_its_step_is_found_by(tmp_path: Path) -> None:
    for step in (1, 10**9):
        manifest_of(tmp_path / checkpoint_tag(step)).parent.mkdir()
        manifest_of(tmp_path / checkpoint_tag(step)).touch()
    assert checkpoint_steps(tmp_path) == [1, 10**9]
    assert checkpoint_tag(10) == "step_10"
    assert manifest_of(tmp_path / "step_10") == tmp_path / "step_10" / "manifest.json"
