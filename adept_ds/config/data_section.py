"""The section `data`: texts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from adept_ds.config.corpus_entries import CorpusEntry, Format, HeldOutEntry, corpus_sources, twice_named
from adept_ds.config.question_template import DEFAULT_TEMPLATE, VARIABLES, check_template
from adept_ds.config.section import Count, Section, Tokens


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
    eval_sequences: Count = Field(
        128, description="so many sequences' worth of tokens of each held-out corpus are evaluated at most"
    )
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
        for key in ("domain", "replay", "general_eval", "domain_eval"):
            twice = twice_named(getattr(self, key))
            if twice is not None:
                raise ValueError(f"{key}: two sources are named '{twice}': give each a name of its own")
        return self

    @model_serializer(mode="wrap")
    def _what_has_an_effect(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As in `LrPolicySection`."""
        tree: dict[str, Any] = serialize(self)
        return {key: value for key, value in tree.items() if key != "replay_share" or self.replay}

    def check_domain_sample(self, taker: str, otherwise: str, key: str, sequences: int) -> None:
        """A sample of so many sequences of the domain can be had, of each source one at least.

        Args:
            taker: the key and value for which it is taken.
            otherwise: what else to choose.
            key: that says how many sequences.

        Raises:
            ValueError: it cannot.
        """
        if self.streaming:
            raise ValueError(
                f"data.streaming: {taker} takes a sample of the whole domain corpus; remove it, or choose {otherwise}"
            )
        sources = len(corpus_sources(self.domain))
        if sources > sequences:
            raise ValueError(
                f"{key}: {sequences} leaves none for some of the {sources} sources of data.domain, which {taker} "
                f"samples: raise it to at least {sources}"
            )
