"""The configuration's schema.

One pydantic model per section. A key that is not declared is an error, so a typing mistake cannot silently become a
default. Paths are relative to the working directory. Imports neither torch nor DeepSpeed: a mistake is reported within
a fraction of a second.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from adept_ds.config.anchor_section import AnchorSection
from adept_ds.config.checkpoint_section import CheckpointSection
from adept_ds.config.corpus_entries import corpus_sources
from adept_ds.config.data_section import DataSection
from adept_ds.config.dial_section import DialSection
from adept_ds.config.eval_section import EvalSection
from adept_ds.config.guard_section import GuardSection
from adept_ds.config.known_methods import DEFAULT_METHOD, AnyMethod, known_methods, with_presets
from adept_ds.config.layer_sections import ExpandSection, ProbeSection
from adept_ds.config.logging_section import LoggingSection
from adept_ds.config.method import without_effect
from adept_ds.config.paths import ModelName, UserPath
from adept_ds.config.presets import PRESETS, SWITCHED, known_preset, with_defaults
from adept_ds.config.rate_sections import ImportanceSection, LrPolicySection
from adept_ds.config.section import Section
from adept_ds.config.train_sections import ExportSection, TrainSection

_KEYS_OF_DELTAS = ("method", "stability")
"""Keys of `probe` that say how deltas are estimated and compared, left out where none are estimated. A method may be
given nevertheless, in what several configurations have in common; a comparison that cannot be made is refused."""
_DIAL_OF_COPIES = {"per_copy", "prefix_cache_mib"}
"""Keys of `dial` that are about copies alone."""


class Config(Section):
    """A whole run."""

    model: ModelName = Field(description="Hugging Face directory, or a hub name")
    run_dir: UserPath = Field(description="where everything of this run is written")
    deepspeed: UserPath | None = Field(None, description="DeepSpeed configuration; plain ZeRO-3 when absent")
    dist_timeout_minutes: float = Field(
        30.0, gt=0, le=525_600, description="a collective that takes longer ends the run"
    )
    preset: Annotated[str, AfterValidator(known_preset)] | None = Field(
        None,
        description="defaults of the whole configuration, under your own keys: recommended, or paper, ADEPT as it was "
        "published; see docs/methods.md",
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
    checkpoint: CheckpointSection = CheckpointSection()
    export: ExportSection = ExportSection()
    eval: EvalSection = EvalSection()
    dial: DialSection | None = Field(
        None, description="how far what was learned is turned up, {} with defaults; absent: as far as it was trained"
    )
    anchor: AnchorSection | None = Field(None, description="keeps outputs on general text; see docs/anchors.md")
    guard: GuardSection | None = Field(
        None, description="what is done when general text gets worse, {} with defaults; see docs/guard.md"
    )

    logging: LoggingSection = LoggingSection()

    @model_validator(mode="before")
    @classmethod
    def _method_presets(cls, value: Any) -> Any:
        return with_presets(with_defaults(value))

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
        if self.weighs_places:
            tree["probe"] = {key: value for key, value in tree["probe"].items() if key not in _KEYS_OF_DELTAS}
        if self.dial is not None and not self.method.makes_copies:
            tree["dial"] = {key: value for key, value in tree["dial"].items() if key not in _DIAL_OF_COPIES}
        said = PRESETS[self.preset] if self.preset else {}  # where a null says that it is not so
        absent = {key for key in ("preset", *SWITCHED) if getattr(self, key) is None and key not in said}
        unused = without_effect(self.method) | absent
        return {key: value for key, value in tree.items() if key not in unused}

    @property
    def needs_probe(self) -> bool:
        """Whether the probe decides anything: by deltas of layers, or by gains of places."""
        return self.method.chooses_layers and self.expand.needs_probe

    @property
    def weighs_places(self) -> bool:
        """Whether the probe estimates what copies would do at every place, for which it reads domain text too, and no
        deltas of layers."""
        return self.method.chooses_layers and self.expand.by_gain

    @property
    def refreshes(self) -> bool:
        """Whether importances of units decide learning rates, and are estimated again during training."""
        return "lr_policy" in self.method.sections and self.lr_policy.map != "constant"

    @property
    def estimates_domain_importance(self) -> bool:
        """Whether learning rates go by importances for the domain too, estimated on a sample of `data.domain`."""
        return self.refreshes and self.lr_policy.map == "ratio"

    @property
    def _first_importances_are_of_replay(self) -> bool:
        """Whether `data.replay` is sampled for those before the first step; later ones see what training draws."""
        return self.refreshes and self.importance.source == "online" and self.importance.initial == "source"

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
    def _dial_has_what_it_chooses_by(self) -> Config:
        if self.dial is None:
            return self
        for key in ("general_eval", "domain_eval"):
            if not getattr(self.data, key):
                raise ValueError(
                    f"dial: chooses by losses on general and on domain text, but data.{key} is empty: list held-out "
                    "files there, or write dial: null"
                )
        if self.eval.dial:
            raise ValueError(
                f"eval.dial: {self.eval.dial} has no effect beside the section dial, which evaluates dial.alphas and "
                "exports what it chooses: remove one of both (eval.dial=[])"
            )
        given = self.dial.model_fields_set & _DIAL_OF_COPIES
        if given and not self.method.makes_copies:
            raise ValueError(
                f"dial.{min(given)}: has no effect with method: {self.method.name}, which makes no copies; remove it"
            )
        return self

    @model_validator(mode="after")
    def _guard_has_what_it_measures(self) -> Config:
        if self.guard is None:
            return self
        for key in ("general_eval", "domain_eval"):
            if not getattr(self.data, key):
                raise ValueError(
                    f"guard: measures losses on general and on domain text, but data.{key} is empty: list held-out "
                    "files there, or write guard: null"
                )
        if not self.train.eval_every:
            raise ValueError(
                "guard: measures when training is evaluated, but train.eval_every is 0: raise it, or remove the "
                "section guard"
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
        replayed = len(corpus_sources(self.data.replay))
        if self._first_importances_are_of_replay and replayed > count:
            raise ValueError(
                f"importance.sequences: {count} leaves none for some of the {replayed} sources of data.replay, which "
                f"importance.source: online samples before the first step: raise it to at least {replayed}"
            )
        if self.anchor and self.anchor.reads_probe_corpus and sources > self.anchor.sequences:
            raise ValueError(
                f"anchor.sequences: {self.anchor.sequences} leaves none for some of the {sources} sources of "
                f"probe.corpus: raise it to at least {sources}"
            )
        return self

    @model_validator(mode="after")
    def _copies_are_there(self) -> Config:
        """Keys of `train` that are about copies."""
        for key in ("writer_lr_ratio", "copy_dropout"):
            value = getattr(self.train, key)
            if not self.method.makes_copies and value != TrainSection.model_fields[key].default:
                raise ValueError(
                    f"train.{key}: {value} is about copies of layers, and method: {self.method.name} makes none; "
                    "remove it, or choose a method with copies, such as adept"
                )
        if self.train.copy_dropout and self.expand.num_copies == 1:
            raise ValueError(
                f"train.copy_dropout: {self.train.copy_dropout} has no effect with a single copy, since no step goes "
                "around all of them; remove it, or raise expand.k"
            )
        if self.train.copy_dropout and self.refreshes and self.importance.source == "online":
            raise ValueError(
                f"train.copy_dropout: {self.train.copy_dropout} hides copies from importance.source: online, which "
                "takes importances from training steps; set importance.source: corpus, or remove train.copy_dropout"
            )
        if self.train.copy_dropout and self.anchor:
            raise ValueError(
                f"train.copy_dropout: {self.train.copy_dropout} goes around copies whose outputs the section anchor is "
                "to hold; remove one of both"
            )
        return self

    @model_validator(mode="after")
    def _preset_starts_with_ones(self) -> Config:
        if self.lr_policy.preset == "official" and self.importance.initial != "ones":
            raise ValueError(
                "lr_policy.preset: official starts with multipliers of 1; set importance.initial to ones beside it"
            )
        return self

    @model_validator(mode="after")
    def _places_are_weighed_on_both_texts(self) -> Config:
        if not self.weighs_places:
            return self
        if self.probe.stability is not None:
            said = self.probe.stability if isinstance(self.probe.stability, str) else "a comparison"
            raise ValueError(
                f"probe.stability: {said} is about deltas of layers, which expand.choose: gain does not estimate; "
                "remove it, or choose layers by delta"
            )
        self.data.check_domain_sample(
            "expand.choose: gain", "layers otherwise", "probe.sequences", self.probe.sequences
        )
        return self
