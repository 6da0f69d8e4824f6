"""The sections `probe` and `expand`: how layers are probed, and which are chosen."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, SerializerFunctionWrapHandler, Tag, model_serializer, model_validator

from adept_ds.config.corpus_entries import CorpusEntry, CorpusSource, corpus_sources, twice_named
from adept_ds.config.paths import ModelName
from adept_ds.config.section import NUMBER, PART, WORD, Count, Section, Seed, Tokens


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
        description="of all text that is sampled to estimate importance, here and in refreshes, and to be anchored to; "
        "and of choose: random",
    )
    stability: (
        Annotated[
            Annotated[Literal["halves"], Tag(WORD)] | Annotated[Stability, Tag(PART)],
            Discriminator(lambda value: PART if isinstance(value, dict | Stability) else WORD),
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

_KEYS_OF_GAIN = ("harm_weight", "min_distance")
"""Keys of `expand` that `choose: gain` looks at."""


class ExpandSection(Section):
    """How many layers are copied (method: freeze: trained in place), and which; see docs/choosing_layers.md."""

    k: Annotated[int, Tag(NUMBER)] | Annotated[Literal["auto"], Tag(WORD)] | None = Field(
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
    choose: Literal["lowest", "highest", "uniform", "random", "last", "gain"] = Field(
        "lowest",
        description="which layers: by delta; evenly spread, as in LLaMA-Pro; random, by probe.seed; the last; gain: "
        "where silent copies would do most for the domain and least harm to general text, to first order; or a list",
    )
    spare_top: int = Field(
        0,
        ge=0,
        le=10**4,
        description="so many layers below the head are not copied: what a copy writes there goes straight into it",
    )
    layers: list[int] | None = Field(None, min_length=1, description="indices of the source layers to copy")
    harm_weight: float = Field(
        1.0, ge=0, le=1e6, description="choose: gain: what a nat of general loss counts against a nat of domain loss"
    )
    min_distance: int = Field(
        1, ge=1, le=10**4, description="choose: gain: layers from one copy's source to the next one's at least; 1: any"
    )
    tie_break: Literal["none", "cost"] = Field(
        "none",
        description="choose: lowest: cost: among layers whose deltas the probe cannot tell apart, those with which a "
        "training step costs least: the highest",
    )

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
        for key in ("k", "choose", "spare_top"):
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

    @model_validator(mode="after")
    def _every_way_to_choose_has_its_keys(self) -> ExpandSection:
        for key in _KEYS_OF_GAIN:
            if key in self.model_fields_set and not self.by_gain:
                raise ValueError(
                    f"{key}: {getattr(self, key)} has an effect with choose: gain only: remove it or set choose: gain"
                )
        if self.by_gain and self.k == "auto":
            raise ValueError(
                "k: auto counts layers by their deltas, which choose: gain does not estimate: give a number"
            )
        if self.tie_break != "none" and not self.by_lowest_delta:
            chosen = "layers are listed" if self.layers is not None else f"choose is {self.choose}"
            raise ValueError(
                f"tie_break: {self.tie_break} has an effect with choose: lowest only, but {chosen}: remove it"
            )
        return self

    @model_serializer(mode="wrap")
    def _what_has_an_effect(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As in `LrPolicySection`."""
        tree: dict[str, Any] = serialize(self)
        unused = set() if self.k == "auto" else set(_KEYS_OF_AUTO)
        unused |= set() if self.rule == "threshold" else {"threshold"}
        unused |= set() if self.layers is None else {"choose"}
        unused |= set() if self.spare_top else {"spare_top"}
        unused |= set() if self.by_gain else set(_KEYS_OF_GAIN)
        unused |= set() if self.by_lowest_delta else {"tie_break"}
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
    def by_gain(self) -> bool:
        """Whether first-order benefits of places decide, and no delta does."""
        return self.layers is None and self.choose == "gain"

    @property
    def by_lowest_delta(self) -> bool:
        return self.layers is None and self.choose == "lowest"

    @property
    def needs_probe(self) -> bool:
        """Whether the probe decides anything: by deltas of layers, or by gains of places."""
        return self.layers is None and (self.k == "auto" or self.choose in ("lowest", "highest", "gain"))
