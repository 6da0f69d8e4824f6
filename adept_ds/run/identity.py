"""What stages are made of, by content: the same wherever it lies and whenever it was written there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adept_ds.base.digests import FileDigests
from adept_ds.base.outputs import check_as_written
from adept_ds.base.progress import Meter
from adept_ds.config.corpus_entries import CorpusFiles, corpus_sources
from adept_ds.config.corpus_files import find_files
from adept_ds.config.data_section import DataSection
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.tokenizer_files import tokenizer_fingerprint
from adept_ds.models.weight_files import INDEX_NAME, weight_files
from adept_ds.run.progress import StageProgress
from adept_ds.weights.fingerprints import config_digest, fingerprint_of, hash_tensors
from adept_ds.weights.hf_directory import stored_tensors

_WHICH_TEXT = {"domain", "replay", "replay_share", "general_eval", "domain_eval", "eval_sequences", "seq_len"}
_HOW_FAST = {"workers"}


@dataclass(frozen=True)
class Identity:
    """Asked on rank 0 alone. What is large is read once, and known from then on (see `FileDigests`)."""

    digests: FileDigests
    progress: StageProgress

    def model(self, model: ModelDirectory) -> dict[str, str]:
        """Tensors, however they fall on files; configuration, without where it comes from; tokenizer."""
        return {"weights": self.weights(model)} | self.besides_weights(model)

    def besides_weights(self, model: ModelDirectory) -> dict[str, str]:
        return {"config.json": config_digest(model.config), "tokenizer": tokenizer_fingerprint(model.path)}

    def corpus(self, key: str, entries: Sequence[Path | CorpusFiles]) -> list[dict[str, Any]]:
        """Of each source its texts, in the order of its files, and how it is read and weighed."""
        sources = corpus_sources(entries)
        total = sum(source.weight for source in sources)
        return [
            {
                "texts": self._texts(key, find_files(key, source.files)),
                "format": source.format,
                "text_key": source.text_key,
                "share": source.weight / total,
            }
            for source in sources
        ]

    def weights(self, model: ModelDirectory) -> str:
        """Of its tensors alone."""
        directory = model.path
        files = weight_files(directory)
        index = directory / INDEX_NAME
        return self.digests.remembered(
            "tensors", [*files, index] if index.is_file() else files, lambda: self._hash_weights(directory)
        )

    def check_as_written(self, directory: Path, remedy: str = "") -> None:
        """What a command wrote there is as it was.

        Raises:
            DamagedError: naming the first file that is not, and `remedy`.
        """
        files = directory.iterdir() if directory.is_dir() else ()
        with self.progress.on_main(f"reading {directory.name}") as bar:
            meter = Meter(sum(file.stat().st_size for file in files if file.is_file()), bar)

            def digest_of(file: Path) -> str:
                return self.digests.file(file, lambda num_bytes: meter.advance(num_bytes, file.name))

            check_as_written(directory, digest_of, remedy)

    def _hash_weights(self, directory: Path) -> str:
        tensors = stored_tensors(directory)
        with self.progress.on_main(f"reading {directory.name}") as bar:
            meter = Meter(sum(tensor.num_bytes for tensor in tensors.values()), bar)
            return fingerprint_of(hash_tensors(tensors, meter.advance))

    def _texts(self, key: str, files: Sequence[Path]) -> list[str]:
        """A data set on disk is a directory, which counts as one."""
        with self.progress.on_main(f"reading {key}") as bar:
            plain = iter(self.digests.files([file for file in files if not file.is_dir()], bar))
            return [self.digests.tree(file, bar) if file.is_dir() else next(plain) for file in files]


def reading_settings(data: DataSection) -> dict[str, Any]:
    """Everything but the texts themselves that decides which tokens they become."""
    return data.model_dump(mode="json", exclude=_WHICH_TEXT | _HOW_FAST)
