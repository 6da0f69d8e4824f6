"""The configuration's schema.

One pydantic model per section. A key that is not declared here is an error, so a typing mistake cannot silently
become a default. Paths are relative to the working directory. Imports neither torch nor DeepSpeed: a mistake is
reported within a fraction of a second.
"""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from adept_ds.config.paths import ModelName, UserPath
from adept_ds.config.question_template import DEFAULT_TEMPLATE, VARIABLES, check_template

Beta = Annotated[float, Field(ge=0, lt=1)]

Count = Annotated[int, Field(ge=1, le=10**9)]
"""How many of something. Beyond the limit it is a slip of the pen, not a plan."""

Tokens = Annotated[int, Field(ge=8, le=2**24)]
"""Of one sequence."""

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""What every generator of random numbers takes, NumPy's old one included."""


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values cannot change once checked.

    Nothing is converted but an integer to a float: `true` is no 1, a text no number, and a fraction no count.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_section_means_defaults(cls, value: Any) -> Any:
        return {} if value is None else value


def _title(text: str) -> str:
    """Raises `ValueError`: it cannot stand in a table."""
    if not text.strip() or not text.isprintable() or len(text) > 100:
        raise ValueError(f"{text[:100]!r} is no name; write one line of at most 100 characters")
    return text


Format = Literal["auto", "jsonl", "text", "parquet", "dataset"]


class CorpusFiles(Section):
    """Files that are read alike."""

    files: list[UserPath] = Field(
        min_length=1, description="files, directories of them, patterns such as 'part-*.jsonl'"
    )
    format: Format | None = Field(None, description="as data.format, for these files")
    text_key: str | None = Field(None, min_length=1, description="as data.text_key, for these files")
    name: Annotated[str, AfterValidator(_title)] | None = Field(
        None, description="for messages and results; by default that of the first file"
    )

    @property
    def title(self) -> str:
        return self.name or self.files[0].stem


class CorpusSource(CorpusFiles):
    """A part of a corpus that is sampled, and counted, by its weight."""

    weight: float = Field(1.0, gt=0, le=1e9, description="share of the sequences, relative to other sources")


_FILE, _PART, _WORD, _NUMBER = ALTERNATIVES = "<file>", "<source>", "<word>", "<number>"
"""Alternatives of a value; not part of the key that messages name."""


CorpusEntry = Annotated[
    Annotated[UserPath, Tag(_FILE)] | Annotated[CorpusSource, Tag(_PART)],
    Discriminator(lambda value: _PART if isinstance(value, dict | CorpusSource) else _FILE),
]


HeldOutEntry = Annotated[
    Annotated[UserPath, Tag(_FILE)] | Annotated[CorpusFiles, Tag(_PART)],
    Discriminator(lambda value: _PART if isinstance(value, dict | CorpusFiles) else _FILE),
]


def corpus_sources(entries: typing.Sequence[Path | CorpusFiles]) -> list[CorpusSource]:
    """What a corpus is mixed of: all plain files together are one source, the first."""
    plain = [entry for entry in entries if isinstance(entry, Path)]
    together = [CorpusSource(files=plain)] if plain else []
    parts = [entry for entry in entries if isinstance(entry, CorpusFiles)]
    return together + [part if isinstance(part, CorpusSource) else CorpusSource(**dict(part)) for part in parts]


def twice_named(entries: typing.Sequence[Path | CorpusFiles]) -> str | None:
    """A name that two sources share."""
    names = [source.title for source in corpus_sources(entries)]
    return next((name for name in names if names.count(name) > 1), None)


class DataSection(Section):
    """Texts: what is trained on and what is held out; see docs/data.md."""

    seq_len: Tokens = Field(1024, description="tokens per training sequence")
    domain: list[CorpusEntry] = Field(
        default_factory=list,
        description="domain corpus, trained on: files, or sources with a weight, {files: [...], weight: 2, name: ...}",
    )
    replay: list[CorpusEntry] = Field(
        default_factory=list, description="general corpus, replayed in every training batch"
    )
    replay_share: float = Field(0.25, gt=0, lt=1, description="of a batch's sequences, that are replayed ones")
    general_eval: list[HeldOutEntry] = Field(default_factory=list, description="held-out general text")
    domain_eval: list[HeldOutEntry] = Field(default_factory=list, description="held-out domain text")
    eval_sequences: Count = Field(128, description="at most so many sequences of each held-out corpus are evaluated")
    format: Format = Field("auto", description="of every corpus of the run; auto: by what the files hold, not by name")
    text_key: str = Field("text", min_length=1, description="the field of a record that holds the text")
    max_bad_records: int = Field(
        0,
        ge=0,
        le=10**9,
        description="so many records of a source that cannot be read are skipped, and counted; one more ends it",
    )
    question_template: Annotated[str, AfterValidator(check_template)] = Field(
        DEFAULT_TEMPLATE,
        description="Jinja template that turns question/choices/answer records into text, in every corpus of the run; "
        f"variables: {', '.join(VARIABLES)}",
    )
    bos: Literal["auto", "always", "never"] = Field(
        "auto", description="beginning-of-sequence token; auto: where the model's own tokenizer puts one"
    )
    special_tokens_in_text: Literal["text", "parse", "error"] = Field(
        "text", description="what '<s>' or '<|im_end|>' is, spelled in a text: letters, the token, or a bad record"
    )
    packing: Literal["concat", "documents"] = Field(
        "concat",
        description="concat: documents follow one another and see each other; documents: attention never crosses one, "
        "and positions restart",
    )
    workers: int | None = Field(
        None, ge=1, le=4096, description="processes that tokenise; by default one per CPU of the host"
    )
    streaming: bool = Field(
        False, description="tokenise data.domain while it is trained on, instead of keeping all its tokens on disk"
    )

    @model_validator(mode="after")
    def _every_source_has_its_name(self) -> DataSection:
        for key in ("domain", "replay"):
            twice = twice_named(getattr(self, key))
            if twice is not None:
                raise ValueError(f"{key}: two sources are named '{twice}': give each a name of its own")
        return self

    @model_serializer(mode="wrap")
    def _what_has_an_effect(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As in `LrPolicySection`."""
        tree: dict[str, Any] = serialize(self)
        return {key: value for key, value in tree.items() if key != "replay_share" or self.replay}


class Stability(Section):
    """What the choice of layers is compared with: another corpus, or another checkpoint of the same architecture."""

    corpus: list[CorpusEntry] | None = Field(None, min_length=1)
    model: ModelName | None = Field(None, description="Hugging Face directory, or a hub name")

    @model_validator(mode="after")
    def _one_of_both(self) -> Stability:
        if (self.corpus is None) == (self.model is None):
            raise ValueError("stability compares with another corpus or with another model: give one of both")
        return self


class ProbeSection(Section):
    """Stage one: the general-competence corpus and how layers are probed with it; see docs/probing.md."""

    corpus: list[CorpusEntry] = Field(
        default_factory=list,
        description="general-competence corpus: files, or sources with a weight, {files: [...], weight: 2, name: ...}",
    )
    method: Literal["mask", "taylor", "gradient", "fisher"] = Field(
        "mask",
        description="mask: the loss without each layer; taylor: its first-order estimate; gradient: sum of |w dL/dw|; "
        "fisher: sum of (dL/dw)^2",
    )
    sequences: Count = Field(32, description="sequences of the corpus that are probed")
    seq_len: Tokens = Field(256, description="tokens per probed sequence")
    micro_batch_size: Count = Field(1, description="sequences per rank that pass the decoder together")
    max_stack_tokens: int = Field(
        8192, ge=8, le=10**9, description="mask: tokens of the variant stack that pass a layer at once"
    )
    batch_sequences: Count = Field(
        8, description="gradient, fisher: sequences per global batch, whatever the number of ranks"
    )
    seed: Seed = Field(
        0,
        description="of all text that is sampled to estimate importance, here and in refreshes, and of choose: random",
    )
    stability: (
        Annotated[
            Annotated[Literal["halves"], Tag(_WORD)] | Annotated[Stability, Tag(_PART)],
            Discriminator(lambda value: _PART if isinstance(value, dict | Stability) else _WORD),
        ]
        | None
    ) = Field(
        None,
        description="what the choice of layers is compared with: halves (of the sequences, at no cost), "
        "{corpus: [...]} or {model: DIR}",
    )

    @model_validator(mode="after")
    def _every_source_has_its_name_and_a_sequence(self) -> ProbeSection:
        others = self.stability.corpus if isinstance(self.stability, Stability) else None
        for key, entries in {"corpus": self.corpus, "stability.corpus": others or []}.items():
            twice, count = twice_named(entries), len(corpus_sources(entries))
            if twice is not None:
                raise ValueError(f"{key}: two sources are named '{twice}': give each a name of its own")
            if count > self.sequences:
                raise ValueError(
                    f"sequences: {self.sequences} leaves none for some of the {count} sources of {key}: "
                    f"raise it to at least {count}"
                )
        return self

    @property
    def sources(self) -> list[CorpusSource]:
        return corpus_sources(self.corpus)


_KEYS_OF_AUTO = ("rule", "max_trainable_share", "max_added_latency", "threshold")
"""Keys of `expand` that say how many layers `k: auto` copies."""


class ExpandSection(Section):
    """How many layers are copied, and which; see docs/choosing_layers.md."""

    k: Annotated[int, Tag(_NUMBER)] | Annotated[Literal["auto"], Tag(_WORD)] | None = Field(
        None, description="number of layers to copy (4 unless layers are listed); auto: by `rule`, after the probe"
    )
    rule: Literal["knee", "budget", "threshold"] = Field(
        "knee",
        description="k: auto: where the sorted deltas begin to rise; as many as the limits allow; or all low deltas",
    )
    max_trainable_share: float | None = Field(
        None, gt=0, lt=1, description="k: auto: limit of the copies' share of all parameters of the expanded model"
    )
    max_added_latency: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="k: auto: limit of what copies add to the time of a forward pass, as a share of it",
    )
    threshold: float = Field(
        0.5, gt=0, le=1e6, description="rule: threshold: deltas below this share of the median delta"
    )
    choose: Literal["lowest", "highest", "uniform", "random"] = Field(
        "lowest",
        description="which layers: by delta; evenly spread, as in LLaMA-Pro; random, by probe.seed; or a list",
    )
    layers: list[int] | None = Field(None, min_length=1, description="indices of the source layers to copy")

    @model_validator(mode="before")
    @classmethod
    def _a_list_to_choose_is_layers(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("choose"), list):
            if value.get("layers") is not None:
                raise ValueError("choose and layers list layers twice: remove one of them")
            value = {key: entry for key, entry in value.items() if key != "choose"} | {"layers": value["choose"]}
        return value

    @model_validator(mode="after")
    def _one_of_both(self) -> ExpandSection:
        if isinstance(self.k, int) and self.k < 1:
            raise ValueError(f"k: {self.k} copies nothing; use 1 or more, or auto")
        if self.layers is None:
            return self
        for key in ("k", "choose"):
            if getattr(self, key) is not None and key in self.model_fields_set:
                raise ValueError(f"{key} and layers exclude each other: remove one of them")
        if len(set(self.layers)) != len(self.layers):
            raise ValueError("layers lists a layer twice: list each source layer once")
        return self

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> ExpandSection:
        for key in _KEYS_OF_AUTO:
            value = getattr(self, key)
            if self.k != "auto" and key in self.model_fields_set and value is not None:
                raise ValueError(f"{key}: {value} has an effect with k: auto only: remove it or set k: auto")
        if "threshold" in self.model_fields_set and self.rule != "threshold":
            raise ValueError(
                f"threshold: {self.threshold} belongs to rule: threshold, but rule is {self.rule}: "
                "remove threshold or set rule: threshold"
            )
        if self.k == "auto" and self.rule == "budget" and not self.limits:
            raise ValueError("rule: budget has no limit: set max_trainable_share or max_added_latency")
        return self

    @model_serializer(mode="wrap")
    def _what_has_an_effect(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As in `LrPolicySection`."""
        tree: dict[str, Any] = serialize(self)
        unused = set() if self.k == "auto" else set(_KEYS_OF_AUTO)
        unused |= set() if self.rule == "threshold" else {"threshold"}
        unused |= set() if self.layers is None else {"choose"}
        return {key: value for key, value in tree.items() if key not in unused}

    @property
    def limits(self) -> dict[str, float]:
        """Those that are set, by key."""
        both = {"max_trainable_share": self.max_trainable_share, "max_added_latency": self.max_added_latency}
        return {key: limit for key, limit in both.items() if limit is not None}

    @property
    def num_copies(self) -> int | None:
        """None: the probe will tell."""
        if self.layers is not None:
            return len(self.layers)
        return None if self.k == "auto" else self.k or 4

    @property
    def needs_probe(self) -> bool:
        """Whether deltas of layers decide anything."""
        return self.layers is None and (self.k == "auto" or self.choose in ("lowest", "highest"))


class ImportanceSection(Section):
    """Stage two: how unit importance is estimated, and how often."""

    source: Literal["corpus", "online"] = Field(
        "corpus",
        description="text that importance is estimated on: probe.corpus, in passes of its own; or the sequences of "
        "data.replay that each training batch holds, without further passes",
    )
    every: Count = Field(500, description="optimizer steps between refreshes")
    sequences: Count = Field(32, description="sequences of general text per refresh, over all ranks")
    batch_sequences: Count = Field(8, description="sequences per global batch, whatever the number of ranks")
    granularity: Literal["matrix", "module", "fine"] = Field(
        "matrix", description="units: projections; attention and MLP; or attention heads and MLP neurons"
    )
    initial: Literal["source", "ones"] = Field("source", description="multipliers before the first refresh")
    prefix_cache_mib: int = Field(
        512,
        ge=0,
        le=2**30,
        description="host memory per rank for what the layers below the lowest copy compute for these sequences, "
        "which never changes; 0 computes it at every refresh",
    )


_MAP_OF_PARAMETER = {"power": "power", "temperature": "exponential", "threshold": "step", "low": "step", "high": "step"}
"""Keys of `lr_policy` that belong to one map only."""


class LrPolicySection(Section):
    """How importance becomes a learning-rate multiplier; formulas and advice are in docs/lr_policy.md."""

    preset: Literal["official"] | None = Field(
        None, description="official: as the paper's published implementation; no other key of this section may be set"
    )
    map: Literal["linear", "power", "exponential", "step", "rank", "constant"] = Field(
        "linear",
        description="from scaled importance s in [0, 1] to a multiplier; constant: plain training of the copies",
    )
    power: float = Field(2.0, gt=0, le=1e6, description="power: exponent p of 2 (1 - s)^p")
    temperature: float = Field(
        2.0, gt=0, le=1e6, description="exponential: shape t of the decay; close to 0 it is linear"
    )
    threshold: float = Field(0.5, ge=0, le=1, description="step: scaled importance at which the step is")
    low: float = Field(0.0, ge=0, le=1e6, description="step: multiplier at and above the threshold")
    high: float = Field(2.0, ge=0, le=1e6, description="step: multiplier below the threshold")
    scope: Literal["all", "norms_apart", "per_kind", "per_layer"] = Field(
        "norms_apart", description="units whose importances are scaled together"
    )
    preserve_mean: bool = Field(False, description="scale multipliers to mean 1 by parameter, in each scope")
    min_multiplier: float = Field(0.0, ge=0, le=1e6, description="smaller multipliers are raised to this")
    max_multiplier: float | None = Field(None, ge=0, le=1e6, description="larger multipliers are lowered to this")
    smoothing: float = Field(0.0, ge=0, lt=1, description="share of its previous value that an importance keeps")

    @model_validator(mode="after")
    def _preset_stands_alone(self) -> LrPolicySection:
        others = [f"{key}: {getattr(self, key)}" for key in self._given() if key != "preset"]
        if self.preset is not None and others:
            raise ValueError(
                f"preset: {self.preset} leaves nothing to choose, but {', '.join(others)} is set too: remove one "
                f"or the other ('lr_policy={{preset: {self.preset}}}' replaces the whole section)"
            )
        return self

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> LrPolicySection:
        for key in self._given():
            owner = _MAP_OF_PARAMETER.get(key, self.map)
            if owner != self.map:
                raise ValueError(
                    f"{key}: {getattr(self, key)} belongs to map: {owner}, but map is {self.map}: "
                    f"remove {key} or set map: {owner}"
                )
        if self.map == "constant":
            for key in ("preserve_mean", "min_multiplier", "max_multiplier", "smoothing"):
                if getattr(self, key) != LrPolicySection.model_fields[key].default:
                    raise ValueError(
                        f"{key}: {getattr(self, key)} has no place beside map: constant, where every multiplier is 1: "
                        f"remove {key} or choose another map"
                    )
        return self

    @model_validator(mode="after")
    def _limits_are_in_order(self) -> LrPolicySection:
        if self.low > self.high:
            raise ValueError(f"low: {self.low} is above high: {self.high}; lower low or raise high")
        if self.max_multiplier is not None and self.min_multiplier > self.max_multiplier:
            raise ValueError(
                f"min_multiplier: {self.min_multiplier} is above max_multiplier: {self.max_multiplier}; "
                "lower min_multiplier or raise max_multiplier"
            )
        return self

    @model_serializer(mode="wrap")
    def _what_has_an_effect(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keys without effect stay out of a dump, which is thus a section that may be written in a file."""
        if self.preset is not None:
            return {"preset": self.preset}
        tree: dict[str, Any] = serialize(self)
        return {key: value for key, value in tree.items() if _MAP_OF_PARAMETER.get(key, self.map) == self.map}

    def _given(self) -> list[str]:
        """Keys that the user wrote, in the order of the schema."""
        return [key for key in LrPolicySection.model_fields if key in self.model_fields_set]


class TrainSection(Section):
    """The training loop."""

    steps: Count = Field(1000, description="optimizer steps")
    lr: float = Field(2e-4, gt=0, le=10, description="base learning rate")
    global_batch_size: Count = Field(8, description="sequences per optimizer step, over all ranks")
    micro_batch_size: Count = Field(1, description="sequences per forward pass of a rank")
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(0.1, ge=0, le=100)
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), strict=False)  # a list, in YAML
    eps: float = Field(1e-8, gt=0, le=1)
    clip_grad_norm: float = Field(1.0, ge=0, le=1e30, description="0 switches clipping off")
    seed: Seed = Field(0, description="of the order of training data and of dropout, and of nothing else")
    checkpoint_every: Count = 500
    keep_checkpoints: Count = Field(2, description="the newest so many checkpoints stay")
    eval_every: Count = 500
    activation_checkpointing: bool = Field(False, description="from the lowest copy up")
    keep_gathered_gib: (
        Annotated[Annotated[float, Field(ge=0, le=2**20)], Tag(_NUMBER)] | Annotated[Literal["auto"], Tag(_WORD)]
    ) = Field(
        "auto",
        description="GiB of frozen weights that ZeRO-3 keeps whole on every rank, so that it need not gather them "
        "again and again; auto: up to half of the memory that the first step left free",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on an accelerator, else fp32; fp16 scales losses dynamically"
    )


class ExportSection(Section):
    """The exported checkpoint."""

    dtype: Literal["source", "float32", "bfloat16"] = Field("source", description="source: as the base model")


class Config(Section):
    """A whole run."""

    model: ModelName = Field(description="Hugging Face directory, or a hub name")
    run_dir: UserPath = Field(description="where everything of this run is written")
    deepspeed: UserPath | None = Field(None, description="DeepSpeed configuration; plain ZeRO-3 when absent")
    dist_timeout_minutes: float = Field(
        30.0, gt=0, le=525_600, description="a collective that takes longer ends the run"
    )
    data: DataSection = DataSection()
    probe: ProbeSection = ProbeSection()
    expand: ExpandSection = ExpandSection()
    importance: ImportanceSection = ImportanceSection()
    lr_policy: LrPolicySection = LrPolicySection()
    train: TrainSection = TrainSection()
    export: ExportSection = ExportSection()

    @property
    def replayed(self) -> int:
        """Sequences of each training batch that come from `data.replay`."""
        return round(self.data.replay_share * self.train.global_batch_size) if self.data.replay else 0

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
        return self

    @model_validator(mode="after")
    def _preset_starts_with_ones(self) -> Config:
        if self.lr_policy.preset == "official" and self.importance.initial != "ones":
            raise ValueError(
                "lr_policy.preset: official starts with multipliers of 1; set importance.initial to ones beside it"
            )
        return self
