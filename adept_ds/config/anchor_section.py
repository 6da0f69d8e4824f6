"""The section `anchor`: what keeps the model's outputs on general text where they were."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from adept_ds.config.corpus_entries import CorpusEntry, corpus_sources, twice_named
from adept_ds.config.section import Count, Section


class AnchorSection(Section):
    """A term of the loss on general text; formulas, costs and advice are in docs/anchors.md."""

    kind: Literal["kl", "neutral"] = Field(
        description="kl: divergence of the next-token distribution from the base's; neutral: what copies write, as a "
        "share of the residual stream"
    )
    weight: float = Field(1.0, gt=0, le=1e9, description="of the anchor in the loss; the loss of a token has 1")
    share: float = Field(
        0.1, gt=0, le=100, description="anchor sequences of a step, as a share of its domain sequences; one at least"
    )
    text: Literal["corpus", "sampled"] = Field(
        "corpus", description="sampled: text that the base itself writes, once, before the first step"
    )
    corpus: list[CorpusEntry] = Field(
        default_factory=list, description="general text of the anchor's own, as probe.corpus, which it is by default"
    )
    sequences: Count = Field(
        256, description="sequences of data.seq_len tokens that anchor text consists of, gone through again and again"
    )
    cache_mib: int = Field(
        512,
        ge=0,
        le=2**30,
        description="host memory per rank for what the base computes on anchor text, which never changes; what does "
        "not fit is computed in every step",
    )

    @field_validator("kind", mode="before")
    @classmethod
    def _replay_has_keys_of_its_own(cls, value: Any) -> Any:
        if value == "replay":
            raise ValueError("'replay' is no kind of anchor: list general text in data.replay, with data.replay_share")
        return value

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> AnchorSection:
        if self.text == "sampled" and self.corpus:
            raise ValueError("corpus: has no effect with text: sampled; remove one of them")
        return self

    @model_validator(mode="after")
    def _every_source_has_its_name_and_a_sequence(self) -> AnchorSection:
        twice, count = twice_named(self.corpus), len(corpus_sources(self.corpus))
        if twice is not None:
            raise ValueError(f"corpus: two sources are named '{twice}': give each a name of its own")
        if count > self.sequences:
            raise ValueError(
                f"sequences: {self.sequences} leaves none for some of the {count} sources of corpus: "
                f"raise it to at least {count}"
            )
        return self

    @model_serializer(mode="wrap")
    def _what_has_an_effect(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As in `LrPolicySection`."""
        tree: dict[str, Any] = serialize(self)
        return {key: value for key, value in tree.items() if key != "corpus" or self.corpus}

    @property
    def reads_probe_corpus(self) -> bool:
        return self.text == "corpus" and not self.corpus
