"""What a diagnosis measured, and what follows from it (diagnosis.json); docs/diagnosis.md explains each number."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import NonNegativeInt

from adept_ds.base.files import json_text
from adept_ds.base.records import Record

Topic = Literal["general", "domain", "entanglement"]
"""General loss has risen; the domain has not improved; copies answer both texts alike."""


class Change(Record):
    """Of a mean token loss, in nats."""

    change: float
    standard_error: float | None
    """Over documents, or sequences, that both losses are of; None: not known."""


class TextLosses(Record):
    """Of a held-out corpus under base and adapted model."""

    base: float
    adapted: float
    tokens: NonNegativeInt
    rise: Change
    """Adapted minus base."""
    beyond_noise: bool
    """General: it has risen. Domain: it has fallen."""


class Setting(Record):
    """Of the run, as far as what is to be changed depends on it."""

    method: str
    lr: float
    eps: float
    steps: int
    map: str
    """From importance to multiplier; constant: the method has none."""
    preset: bool
    """Whether `lr_policy` is one."""
    every: int
    replays: bool
    source_layers: int
    copied: tuple[int, ...]
    """Source layers; none where the method makes no copies."""


class CopyEffect(Record):
    """What the losses of the adapted model owe to one copy."""

    index: int
    """Of the copy, in the adapted model."""
    source: int
    general: Change | None
    """Loss with the copy minus loss without it: above 0, the copy does harm. None: no such corpus."""
    domain: Change | None


class CopiedLayer(Record):
    """How important the probe found a layer that was copied."""

    source: int
    delta: float
    rank: int
    """1: of all layers, general text needs it least."""
    of: int
    median: float
    """Of all layers' deltas."""


class UnitCourse(Record):
    """A unit over the whole of training."""

    unit: str
    kind: str
    numel: int
    multiplier: float
    """Mean over steps."""
    importance: float | None
    """Mean over steps of the one that was in force; None: there was none."""
    change: float
    """Root mean square over elements of the change since the start."""
    against: float | None
    """Rank of change plus rank of importance, both from 0 (smallest) to 1 among units of its kind, minus 1."""


class WriteShare(Record):
    """What two layers write to the residual stream on one text; shares are of the stream's norm below the layer."""

    copy_share: float
    """Root mean square over tokens."""
    below_share: float
    """The same of the layer below the copy, which is its source, or another copy of that."""
    copy_rms: float
    """Root mean square over tokens of the norm of what the copy writes."""
    stream_rms: float
    """The same of the stream below the copy."""


class CopyWrites(Record):
    """Of a copy, by corpus."""

    index: int
    source: int
    on: dict[str, WriteShare]


class UnitGradient(Record):
    """Gradient of the domain text's loss."""

    unit: str
    kind: str
    layer: int
    part: str
    rms: float
    """Root mean square over elements."""
    silent: bool
    """Whether it writes to the residual stream: it was silent at the start."""


class Overlap(Record):
    """Of what a layer writes, mean over a sequence, on general and on domain text (see `probing.overlap`)."""

    index: int
    source: int
    accuracy: float
    """With which a plane tells both texts apart; 0.5 is chance."""
    distance: float
    """Energy coefficient: 0 the same distribution, at most 1."""
    below_accuracy: float
    """Of the layer below the copy."""
    below_distance: float
    general_scores: tuple[float, ...]
    """Of each sequence, on which side of the plane it lies: domain above 0, general below."""
    domain_scores: tuple[float, ...]


class Finding(Record):
    """One sentence about what was seen, and one about what to change."""

    name: str
    topic: Topic
    problem: bool
    """Whether it explains what went wrong; otherwise this was looked at, and is not to blame."""
    saw: str
    change: str | None
    settings: dict[str, Any]
    """Keys of the configuration, dotted, with the values that are advised."""


class Diagnosis(Record):
    """Everything (diagnosis.json)."""

    adept_ds: str
    made_of: str
    """A digest of what it was made of: it need not be made again while this is the same."""
    setting: Setting
    losses: dict[str, TextLosses]
    """By corpus: general, domain."""
    effects: tuple[CopyEffect, ...]
    layers: tuple[CopiedLayer, ...]
    units: tuple[UnitCourse, ...]
    writes: tuple[CopyWrites, ...]
    gradients: tuple[UnitGradient, ...]
    overlaps: tuple[Overlap, ...]
    findings: tuple[Finding, ...] = ()

    @classmethod
    def remedy(cls) -> str:
        return "move it away, and `adept diagnose RUN` makes it again"

    @property
    def general_rose(self) -> bool:
        return "general" in self.losses and self.losses["general"].beyond_noise

    @property
    def domain_stayed(self) -> bool:
        return "domain" in self.losses and not self.losses["domain"].beyond_noise

    @property
    def advice(self) -> dict[str, Any]:
        """What all problems together say: of two values for one key, that of the first."""
        found: dict[str, Any] = {}
        for finding in self.findings:
            if finding.problem:
                found |= {key: value for key, value in finding.settings.items() if key not in found}
        return found


def written(value: Any) -> str:
    """A value of the configuration as it is typed behind its key: a word, or JSON, which YAML takes too."""
    return value if isinstance(value, str) else json_text(value)
