"""The configuration's schema.

One pydantic model per section. A key that is not declared is an error, so a typing mistake cannot silently become a
default. Paths are relative to the working directory. Imports neither torch nor DeepSpeed: a mistake is reported within
a fraction of a second.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from adept_ds.config.anchor_section import AnchorSection
from adept_ds.config.data_section import DataSection
from adept_ds.config.eval_section import EvalSection
from adept_ds.config.known_methods import DEFAULT_METHOD, AnyMethod, known_methods, with_presets
from adept_ds.config.layer_sections import ExpandSection, ProbeSection
from adept_ds.config.method import without_effect
from adept_ds.config.paths import ModelName, UserPath
from adept_ds.config.rate_sections import ImportanceSection, LrPolicySection
from adept_ds.config.section import Section
from adept_ds.config.train_sections import ExportSection, TrainSection


class Config(Section):
    """A whole run."""

    model: ModelName = Field(description="Hugging Face directory, or a hub name")
    run_dir: UserPath = Field(description="where everything of this run is written")
    deepspeed: UserPath | None = Field(None, description="DeepSpeed configuration; plain ZeRO-3 when absent")
    dist_timeout_minutes: float = Field(
        30.0, gt=0, le=525_600, description="a collective that takes longer ends the run"
    )
    method: AnyMethod = Field(
        default_factory=lambda: known_methods()[DEFAULT_METHOD].model_validate({"name": DEFAULT_METHOD}),
        description="how the model is adapted: a word, or {name: ..., and its own keys}; see docs/methods.md",
    )
    data: DataSection = DataSection()
    probe: ProbeSection = ProbeSection()
    expand: ExpandSection = ExpandSection()
    importance: ImportanceSection = ImportanceSection()
    lr_policy: LrPolicySection = LrPolicySection()
    train: TrainSection = TrainSection()
    export: ExportSection = ExportSection()
    eval: EvalSection = EvalSection()
    anchor: AnchorSection | None = Field(None, description="keeps outputs on general text; see docs/anchors.md")

    @model_validator(mode="before")
    @classmethod
    def _method_presets(cls, value: Any) -> Any:
        return with_presets(value)

    @model_validator(mode="after")
    def _every_section_has_an_effect(self) -> Config:
        for section in without_effect(self.method):
            keys = getattr(self, section)
            given = keys.model_fields_set - set(self.method.presets.get(section, ())) if keys else ()
            if given:
                raise ValueError(
                    f"{section}.{min(given)}: has no effect with method: {self.method.name}; remove it, or choose a "
                    "method that looks at it"
                )
        self.method.check(self)
        return self

    @model_serializer(mode="wrap")
    def _what_has_an_effect(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As in `LrPolicySection`."""
        tree: dict[str, Any] = serialize(self)
        unused = without_effect(self.method) | (set() if self.anchor else {"anchor"})
        return {key: value for key, value in tree.items() if key not in unused}

    @property
    def needs_probe(self) -> bool:
        """Whether deltas of layers decide anything."""
        return self.method.chooses_layers and self.expand.needs_probe

    @property
    def refreshes(self) -> bool:
        """Whether importances of units decide learning rates, and are estimated again during training."""
        return "lr_policy" in self.method.sections and self.lr_policy.map != "constant"

    @property
    def reads_general_text(self) -> bool:
        """Whether training estimates something on `probe.corpus`, or is anchored to it."""
        estimates = self.method.needs_general_text or (self.refreshes and self.importance.source == "corpus")
        return estimates or (self.anchor is not None and self.anchor.reads_probe_corpus)

    @property
    def replayed(self) -> int:
        """Sequences of each training batch that come from `data.replay`."""
        return round(self.data.replay_share * self.train.global_batch_size) if self.data.replay else 0

    @property
    def anchored(self) -> int:
        """Anchor sequences of each step, over all ranks: `anchor.share` of the domain's, to the nearest whole number
        (a half to the even one), and one at least."""
        if self.anchor is None:
            return 0
        return max(1, round(self.anchor.share * (self.train.global_batch_size - self.replayed)))

    @model_validator(mode="after")
    def _replay_has_text(self) -> Config:
        if not self.data.replay and "replay_share" in self.data.model_fields_set:
            raise ValueError(
                f"data.replay_share: {self.data.replay_share} replays nothing without a corpus: "
                "list files in data.replay, or remove data.replay_share"
            )
        if not self.data.replay and self.importance.source == "online":
            raise ValueError(
                "importance.source: online needs general text in the training batches: list files in data.replay"
            )
        return self

    @model_validator(mode="after")
    def _refreshes_see_every_source(self) -> Config:
        count, sources = self.importance.sequences, len(self.probe.sources)
        if self.importance.source == "corpus" and sources > count:
            raise ValueError(
                f"importance.sequences: {count} leaves none for some of the {sources} sources of probe.corpus: "
                f"raise it to at least {sources}"
            )
        if self.anchor and self.anchor.reads_probe_corpus and sources > self.anchor.sequences:
            raise ValueError(
                f"anchor.sequences: {self.anchor.sequences} leaves none for some of the {sources} sources of "
                f"probe.corpus: raise it to at least {sources}"
            )
        return self

    @model_validator(mode="after")
    def _preset_starts_with_ones(self) -> Config:
        if self.lr_policy.preset == "official" and self.importance.initial != "ones":
            raise ValueError(
                "lr_policy.preset: official starts with multipliers of 1; set importance.initial to ones beside it"
            )
        return self
