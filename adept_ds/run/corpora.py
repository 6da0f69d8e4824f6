"""The texts of a run: tokenised and packed when they are first asked for, and kept beside the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

from rich.markup import escape

from adept_ds.base.digests import FileDigests
from adept_ds.base.errors import InputError
from adept_ds.config.corpus_entries import CorpusFiles, CorpusSource, corpus_sources
from adept_ds.config.resolved import ResolvedConfig
from adept_ds.data.blocks import Blocks
from adept_ds.data.document_rows import DocumentRows, token_shares
from adept_ds.data.documents import TextSource
from adept_ds.data.mixture import Mixture
from adept_ds.data.packing import Packing
from adept_ds.data.streaming import StreamedCorpus, StreamedSource, WindowMaker
from adept_ds.data.tokenizer import TextTokenizer
from adept_ds.data.tokens import TokenFile, Tokenisation, tokens_of
from adept_ds.data.training_data import TrainingData
from adept_ds.evaluation.held_out import HeldOut, SourceName
from adept_ds.evaluation.questions import QuestionSet, questions_among
from adept_ds.run.progress import StageProgress
from adept_ds.training.evaluation import EvalSet


@dataclass(frozen=True)
class Corpora:
    """Every rank asks for the same ones, in the same order: rank 0 tokenises, the others wait."""

    settings: ResolvedConfig
    progress: StageProgress
    _complained_of: set[Path] = field(default_factory=set)
    """Tokens of sources with bad records."""

    def prepare(self) -> dict[str, int | str]:
        """Tokenise and pack all that the configuration names; how many blocks each corpus has. Streamed ones begin."""
        counts: dict[str, int | str] = {
            "domain": len(self.domain.blocks) if isinstance(self.domain, Mixture) else "(streamed)"
        }
        counts |= {"replay": len(self.replay.blocks)} if self.replay else {}
        anchor = self.settings.config.anchor
        counts |= {"anchor": len(self.anchor.blocks)} if anchor and anchor.text == "corpus" else {}
        counts |= {f"{eval_set.name} held out": len(eval_set.indices) for eval_set in self.held_out}
        _ = self.held_out_questions  # what is wrong with them shows before training
        if self.settings.config.weighs_places:
            counts["domain probe"] = len(self.domain_of_probe.blocks)
        return counts | ({"general probe": len(self.general.blocks)} if self.settings.config.probe.corpus else {})

    @cached_property
    def domain(self) -> Mixture | StreamedCorpus:
        config = self.settings.config
        if config.data.streaming:
            return self._streamed("data.domain", config.data.domain)
        return self._for_training("data.domain", config.data.domain, config.train.global_batch_size - config.replayed)

    @cached_property
    def replay(self) -> Mixture | None:
        config = self.settings.config
        sources = config.data.replay
        return self._for_training("data.replay", sources, config.replayed) if sources else None

    @property
    def training_data(self) -> TrainingData:
        return TrainingData(self.domain, self.replay, self.settings.config.replayed)

    @cached_property
    def anchor(self) -> Mixture:
        """General text that training is anchored to: of the anchor's own corpus, or that of the probe."""
        config = self.settings.config
        assert config.anchor is not None
        own = config.anchor.corpus
        key, entries = ("anchor.corpus", own) if own else ("probe.corpus", config.probe.corpus)
        return self._mixture(key, entries, config.data.seq_len, keep_tail=True)

    @cached_property
    def general(self) -> Mixture:
        """General competence, as the probe sees it."""
        return self.for_probing("probe.corpus", self.settings.config.probe.corpus)

    @cached_property
    def domain_of_probe(self) -> Mixture:
        """The domain that is trained on, in blocks as the probe sees them (`expand.choose: gain`)."""
        return self.for_probing("data.domain", self.settings.config.data.domain)

    @property
    def for_importance(self) -> Mixture:
        """General text that importances are estimated on in passes of their own."""
        online = self.settings.config.importance.source == "online"
        return self.replay if online and self.replay else self.general

    @cached_property
    def held_out(self) -> list[EvalSet]:
        """In packed blocks, as training looks at them in passing."""
        data = self.settings.config.data
        corpora = {"general": data.general_eval, "domain": data.domain_eval}
        found = {
            name: self._mixture(f"data.{name}_eval", entries, data.seq_len, keep_tail=True)
            for name, entries in corpora.items()
            if entries
        }
        return [EvalSet(name, corpus.blocks, corpus.first(data.eval_sequences)) for name, corpus in found.items()]

    @cached_property
    def held_out_documents(self) -> HeldOut:
        """The same text, each document in a row of its own."""
        data = self.settings.config.data
        corpora = {"general": data.general_eval, "domain": data.domain_eval}
        return {
            SourceName(name, source): documents
            for name, entries in corpora.items()
            if entries
            for source, documents in self._documents(f"data.{name}_eval", corpus_sources(entries)).items()
        }

    @cached_property
    def held_out_questions(self) -> dict[SourceName, QuestionSet]:
        """Of the sources that have any, the questions among these documents."""
        data = self.settings.config.data
        sources = {
            SourceName(name, source.title): source
            for name, entries in {"general": data.general_eval, "domain": data.domain_eval}.items()
            for source in corpus_sources(entries)
        }
        documents, tokenizer = self.held_out_documents, self.tokenizer_of_documents

        def read() -> dict[SourceName, QuestionSet]:
            found = {
                name: questions_among(self._text(name.key, source), documents[name].ids)
                for name, source in sources.items()
            }
            model = self.settings.model
            return {name: QuestionSet.of(of, tokenizer, model) for name, of in found.items() if of}

        return self.progress.ranks.on_main(read)

    def _documents(self, key: str, sources: Sequence[CorpusSource]) -> dict[str, DocumentRows]:
        data, tokenisation = self.settings.config.data, self._tokenisation_of_documents
        files = [self._tokens(key, source, tokenisation) for source in sources]
        shares = token_shares(data.eval_sequences * data.seq_len, files)
        found = {}
        for source, file, share in zip(sources, files, shares, strict=True):
            documents = DocumentRows.of(file, share, data.seq_len, tokenisation.bos_of_blocks)
            if not documents.tokens.sum():
                raise InputError(
                    f"{key}: {', '.join(map(str, source.files))} has no token with one before it that it is "
                    "predicted from; add text"
                )
            found[source.title] = documents
        return found

    def for_probing(self, key: str, entries: Sequence[Path | CorpusSource]) -> Mixture:
        """A corpus of weighted sources, in blocks for probing."""
        return self._mixture(key, entries, self.settings.config.probe.seq_len, keep_tail=True)

    def _for_training(self, key: str, entries: Sequence[Path | CorpusSource], needed: int) -> Mixture:
        config = self.settings.config
        corpus = self._mixture(key, entries, config.data.seq_len, keep_tail=False)
        if len(corpus.blocks) < needed:
            raise InputError(
                f"{key}: {len(corpus.blocks)} blocks of {config.data.seq_len} tokens cannot feed batches of "
                f"train.global_batch_size {config.train.global_batch_size}, {needed} of them from here; "
                "add text, or lower train.global_batch_size or data.seq_len"
            )
        return corpus

    def _mixture(self, key: str, entries: Sequence[Path | CorpusFiles], seq_len: int, *, keep_tail: bool) -> Mixture:
        sources = corpus_sources(entries)
        packing = Packing(seq_len, keep_tail, self.settings.config.data.packing == "documents")
        parts = [self._blocks(key, source, packing) for source in sources]
        return Mixture.of(parts, [source.weight for source in sources], [source.title for source in sources])

    def _streamed(self, key: str, entries: Sequence[Path | CorpusSource]) -> StreamedCorpus:
        data, sources = self.settings.config.data, corpus_sources(entries)
        packing = Packing(data.seq_len, documents=data.packing == "documents")
        streams = [
            StreamedSource(
                partial(WindowMaker, self._text(key, source), self._tokenisation, packing),
                packing,
                number,
                self._tokenisation.bos_of_blocks,
                self.progress.ranks,
            )
            for number, source in enumerate(sources)
        ]
        corpus = StreamedCorpus(streams, [source.weight for source in sources])
        with self.progress.on_main(f"tokenising the beginning of {key}"):
            corpus.begin()
        return corpus

    def _blocks(self, key: str, source: CorpusSource, packing: Packing) -> Blocks:
        ranks, seq_len = self.progress.ranks, packing.seq_len
        tokens = self._tokens(key, source, self._tokenisation)
        blocks = Blocks.of(tokens, packing, self._tokenisation.bos_of_blocks, ranks)
        if not len(blocks):
            raise InputError(
                f"{key}: {', '.join(map(str, source.files))} has {tokens.manifest.tokens} tokens, less than one block "
                f"of {seq_len}; add text or lower the sequence length"
            )
        return blocks

    def _tokens(self, key: str, source: CorpusSource, tokenisation: Tokenisation) -> TokenFile:
        with self.progress.on_main(f"tokenising {key}") as bar:
            tokens = tokens_of(self._text(key, source), tokenisation, self.progress.ranks, bar)
        skipped = tokens.manifest.skipped
        if skipped and tokens.directory not in self._complained_of:
            self._complained_of.add(tokens.directory)
            first = tokens.manifest.skipped_places[0]
            self.progress.terminal.stage("data", f"{key}: {skipped} bad records skipped, the first: {first}")
        return tokens

    def _text(self, key: str, source: CorpusSource) -> TextSource:
        return TextSource.of(key, source, self.settings.config.data)

    @cached_property
    def _tokenisation(self) -> Tokenisation:
        """Of blocks."""
        # A document that is a sequence of its own begins like one.
        by_document = self.settings.config.data.packing == "documents"
        return self._tokenise_with("document" if by_document else self.settings.model.family.bos_per)

    @property
    def tokenizer_of_documents(self) -> TextTokenizer:
        """For texts that are sequences of their own."""
        return self._tokenisation_of_documents.tokenizer

    @cached_property
    def _tokenisation_of_documents(self) -> Tokenisation:
        """Of rows, which begin as the family wants whatever it sees to begin."""
        return self._tokenise_with(self.settings.model.family.bos_per)

    def _tokenise_with(self, bos_per: Literal["document", "block"]) -> Tokenisation:
        settings, data = self.settings, self.settings.config.data
        tokenizer = TextTokenizer(
            settings.model.path, bos=data.bos, special_tokens_in_text=data.special_tokens_in_text, bos_per=bos_per
        )
        return Tokenisation(
            tokenizer, settings.run_dir.tokens, FileDigests(settings.run_dir.digests), data.workers, self._say
        )

    def _say(self, line: str) -> None:
        self.progress.terminal.stage("data", escape(line))
