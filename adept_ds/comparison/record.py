"""compare.json: all that a comparison found out, as records whose docstrings are its schema.

Losses and their differences are in nats per token.
"""

from __future__ import annotations

from pydantic import Field

from adept_ds.base.records import Record
from adept_ds.base.resampling import SAMPLES, SEED
from adept_ds.base.run_records import Scores
from adept_ds.comparison.arms import BOUNDS
from adept_ds.comparison.between import STEP
from adept_ds.comparison.bootstrap import LEVEL
from adept_ds.comparison.fronts import GENERAL_RISE
from adept_ds.comparison.verdicts import Difference, Gap

ByCorpus = dict[str, dict[str, float]]
"""'general' or 'domain' -> name of the source, with its role -> value."""


class StudyDescription(Record):
    """What trials do not say about themselves."""

    title: str
    model: str
    budget: str
    """What every trial was given, in words."""
    reference: str | None = None
    """Name of the arm that the others are compared with."""
    texts: dict[str, str] = Field(default_factory=dict)
    """Use -> texts, of what is no held-out source: trained on, replayed, probed."""
    commands: list[str] = Field(default_factory=list)
    """That make this comparison again."""
    notes: list[str] = Field(default_factory=list)
    """Sentences that a reader must know, such as cells that are missing."""
    facts: list[str] = Field(default_factory=list)
    """Sentences about how the study was made."""


class SourceRecord(Record):
    """Held-out documents, and the base's loss on them."""

    corpus: str
    role: str
    name: str
    documents: int
    tokens: int
    base_loss: float
    base_accuracy: float | None
    """Of multiple-choice questions, if the source has any."""


class TrialRecord(Record):
    """What one run measured."""

    arm: str
    lr: float
    seed: int
    run_dir: str
    losses: dict[str, ByCorpus]
    """By position of the dial."""
    accuracy: dict[str, ByCorpus]
    scores: dict[str, Scores] = Field(default_factory=dict)
    """On tasks; by position of the dial, those of lm-eval at 1 alone."""
    trainable_parameters: int | None
    total_parameters: int | None
    tokens: int | None
    tokens_per_second: float | None
    seconds: float | None
    """Of training steps."""
    overhead_seconds: float
    """Beside them: probe, refreshes, anchors."""
    peak_memory_bytes: int | None
    """Of the rank with most."""
    learned_bytes: int | None


class PointRecord(Record):
    """An operating point; means over its seeds."""

    lr: float | None
    """None: the base."""
    alpha: float
    """Position of the dial."""
    evaluated: bool
    """And not interpolated."""
    seeds: list[int]
    losses: ByCorpus
    test_domain_loss: float
    test_general_rise: float
    """Above the base, of the general source that rises most."""
    on_front: bool
    """Whether validation documents show no point that is better in one of the two and not worse in the other."""


class ChosenPoint(Record):
    """What one criterion chooses on validation documents, and what test documents say of it; means over seeds."""

    criterion: str
    """'plain' or 'D(x)'"""
    bound: float | None
    """x"""
    lr: float | None
    alpha: float
    seeds: list[int]
    validation_domain_loss: float
    """Over the seeds that searched, like the next."""
    validation_general_rise: float
    domain_loss: float
    low: float
    """Of an interval of `domain_loss`, like the next."""
    high: float
    by_seed: list[float]
    change: float
    """Of the domain loss against the base."""
    change_low: float
    change_high: float
    general_rise: dict[str, float]
    """By test source, above the base."""
    largest_rise: float
    largest_rise_of: str
    holds_on_test: bool | None
    """Whether every general test source is within the bound; None where there is none."""
    excess: float
    """By how much the worst is beyond it; 0 where it holds."""


class ArmRecord(Record):
    """A method with its setting."""

    name: str
    label: str
    setting: str
    learning_rates: list[float]
    seeds: list[int]
    search_seeds: list[int]
    """Those that have every learning rate; points are chosen by them alone."""
    chosen: dict[str, ChosenPoint | None]
    """By criterion; None where no point meets it."""
    points: list[PointRecord]
    hypervolume: float
    """Of the front, in nats squared."""


class Rule(Record):
    """Constants of the comparison."""

    bounds: tuple[float, ...] = BOUNDS
    samples: int = SAMPLES
    level: float = LEVEL
    bootstrap_seed: int = SEED
    hypervolume_general_rise: float = GENERAL_RISE
    """The reference point of hypervolumes: the base's domain loss, and this much above its general losses."""


class Interpolation(Record):
    """What losses at positions of the dial that were evaluated are missed by, were they not, in nats per token (see
    `between`)."""

    step: float = STEP
    """Between two positions."""
    mean: float
    largest: float


class Comparison(Record):
    """compare.json"""

    format: int = 1
    description: StudyDescription
    reference: str
    rule: Rule = Rule()
    interpolation: Interpolation | None = None
    sources: list[SourceRecord]
    base_scores: Scores = Field(default_factory=dict)
    """On tasks."""
    arms: list[ArmRecord]
    differences: list[Difference]
    """Of all pairs of arms at all criteria that both meet."""
    warnings: list[str]
    trials: list[TrialRecord]

    def gap(self, criterion: str, arm: str, other: str) -> Gap | None:
        """Between two arms as the first sees it; None where one does not meet the criterion, or no seed is common."""
        for pair in self.differences:
            if pair.criterion == criterion and {pair.first, pair.second} == {arm, other}:
                return pair.seen_from(arm)
        return None

    def claims(self, criterion: str) -> list[str]:
        """The sentences about arms and the reference that the evidence allows."""
        pairs = [pair for pair in self.differences if pair.criterion == criterion]
        return [pair.sentence for pair in pairs if pair.sentence and self.reference in (pair.first, pair.second)]
