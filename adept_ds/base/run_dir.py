"""The names of everything that a run writes: the only place that knows them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

EXPANSION_NAME = "expansion.json"
"""Stands in every model directory with copies: what was expanded, and how."""

_STEP, _MANIFEST = "step_", "manifest.json"


@dataclass(frozen=True)
class RunDirectory:
    """A run's directory; every property is the path of something in it, there or not."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def lock(self) -> Path:
        """Of whoever writes here; lock.json beside it says who that is."""
        return self.root / "lock"

    @property
    def activity(self) -> Path:
        """What whoever writes here is at, or how it ended."""
        return self.root / "logs" / "activity.json"

    @property
    def ledger(self) -> Path:
        """Which stage was made from which inputs."""
        return self.root / "stages.json"

    @property
    def tokens(self) -> Path:
        """Tokenised corpora."""
        return self.root / "cache" / "tokens"

    @property
    def digests(self) -> Path:
        """What is known of files by content."""
        return self.root / "cache" / "digests.json"

    @property
    def unfinished(self) -> Path:
        """What stages that take long have done so far."""
        return self.root / "cache" / "unfinished"

    @property
    def requeues(self) -> Path:
        """How often the job that runs it went back into the queue without having kept anything new."""
        return self.root / "cache" / "requeues.json"

    @property
    def layer_importance(self) -> Path:
        return self.root / "layer_importance.json"

    @property
    def layer_methods(self) -> Path:
        """Estimators side by side."""
        return self.root / "layer_methods.json"

    def layer_scores(self, variant: str = "") -> Path:
        """What a probe found out, by sequence; `variant`: on the corpus, or of the model, that it is compared with."""
        return self.root / f"layer_scores{variant and '_'}{variant}.safetensors"

    @property
    def place_scores(self) -> Path:
        """What copies at each place would do, as it was measured (`expand.choose: gain`)."""
        return self.root / "place_scores.json"

    @property
    def place_benefits(self) -> Path:
        """The same, with the places that were chosen."""
        return self.root / "place_benefits.json"

    @property
    def expanded(self) -> Path:
        return self.root / "expanded"

    @property
    def expansion(self) -> Path:
        return self.expanded / EXPANSION_NAME

    @property
    def unit_importance(self) -> Path:
        """A line per refresh."""
        return self.root / "unit_importance.jsonl"

    @property
    def unit_movement(self) -> Path:
        """A line per refresh, and one at the end."""
        return self.root / "unit_movement.jsonl"

    @property
    def metrics(self) -> Path:
        """A line per step, refresh and evaluation."""
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def tracking(self) -> Path:
        """By which names trackers know this run, and how far they have been told."""
        return self.root / "tracking.json"

    @property
    def anchor_text(self) -> Path:
        """Tokens of the text that the base wrote for `anchor.text: sampled`."""
        return self.root / "anchor_text.safetensors"

    @property
    def given_up(self) -> Path:
        """Learning rates with which training broke down."""
        return self.root / "given_up.json"

    @property
    def guard(self) -> Path:
        """That the guard has ended training."""
        return self.root / "guard.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def decayed_from(self, step: int) -> Path:
        """Root of the run that goes on from the checkpoint of step `step` and lets the learning rate fall to 0."""
        return self.root / f"decay_from_{step}"

    @property
    def export(self) -> Path:
        """The adapted model: as it was trained, or as far turned up as was chosen or asked for."""
        return self.root / "export"

    @property
    def trained(self) -> Path:
        """The adapted model as it was trained, where `export` may be turned down."""
        return self.root / "trained"

    @property
    def dial(self) -> Path:
        """Positions of the dial, and which one was chosen."""
        return self.root / "dial.json"

    @property
    def dial_losses(self) -> Path:
        """Losses of held-out documents at these positions: so that another promise needs no other evaluation."""
        return self.root / "dial_losses.safetensors"

    @property
    def evaluation(self) -> Path:
        """Held-out losses of base and adapted model."""
        return self.root / "evaluation.json"

    @property
    def document_losses(self) -> Path:
        """The same by document."""
        return self.root / "document_losses.safetensors"

    @property
    def base_evaluation(self) -> Path:
        """Held-out losses of the base alone: they are the same in every run that evaluates it on the same texts."""
        return self.root / "evaluation_base.json"

    @property
    def base_document_losses(self) -> Path:
        """The same by document."""
        return self.root / "document_losses_base.safetensors"

    @property
    def task_scores(self) -> Path:
        """Of base and adapted model, on tasks."""
        return self.root / "task_scores.json"

    @property
    def base_task_scores(self) -> Path:
        """Of the base alone."""
        return self.root / "task_scores_base.json"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def diagnosis(self) -> Path:
        """What went wrong, where, and what to change."""
        return self.root / "diagnosis.json"

    @property
    def diagnosis_page(self) -> Path:
        return self.root / "diagnosis.html"

    def log(self, rank: int) -> Path:
        """All that libraries print on that rank."""
        return self.root / "logs" / f"rank_{rank}.log"

    def in_the_way(self) -> Path | None:
        """A file where a directory of the run belongs, or a directory in place of a file: neither is a run's work."""
        names = [name for name, kind in vars(RunDirectory).items() if isinstance(kind, property)]
        places = [getattr(self, name) for name in names] + [self.tokens.parent, self.log(0).parent]
        for place in places:
            if place.exists() and place.is_file() != (place == self.lock or bool(place.suffix)):
                return place
        return None


def checkpoint_tag(step: int) -> str:
    """Name of a checkpoint's directory."""
    return f"{_STEP}{step}"


def manifest_of(checkpoint: Path) -> Path:
    """Written last: a directory without it is no checkpoint."""
    return checkpoint / _MANIFEST


def checkpoint_steps(checkpoints: Path) -> list[int]:
    """Steps of all complete checkpoints, ascending."""
    tags = [path.parent.name.removeprefix(_STEP) for path in checkpoints.glob(f"{_STEP}*/{_MANIFEST}")]
    return sorted(int(tag) for tag in tags if tag.isdigit())
