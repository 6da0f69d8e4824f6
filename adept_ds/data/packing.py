"""Text -> packed blocks.

Documents are tokenised, joined by the end-of-text token and cut into blocks of seq_len tokens: no padding inside
training blocks, at the price that a document can be cut. Blocks are memory-mapped (Arrow), so a corpus may be
larger than memory and is held once per host.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, Features, Value, disable_progress_bars, load_from_disk
from datasets import Sequence as ListOf
from datasets.exceptions import DatasetGenerationError

from adept_ds.base.errors import AdeptError, InputError
from adept_ds.base.files import new_directory, stamp_files
from adept_ds.base.progress import ProgressCallback
from adept_ds.config.question_template import DEFAULT_TEMPLATE
from adept_ds.data.blocks import Blocks
from adept_ds.data.documents import read_documents
from adept_ds.ranks.collectives import Ranks

_DOCUMENTS_PER_CALL = 512


@dataclass(frozen=True)
class Packing:
    """A corpus, and how it becomes blocks."""

    key: str
    """Configuration key of the corpus, for error messages."""
    files: tuple[Path, ...]
    """In the order in which they are packed."""
    tokenizer_dir: Path
    seq_len: int
    keep_tail: bool
    """Keep the last, partly filled block (padded): for evaluation and probing, where every token counts."""
    question_template: str = DEFAULT_TEMPLATE

    def cache_name(self) -> str:
        """The same for the same blocks; reads the names, sizes and times of the files."""
        tokenizer_files = [
            file for file in self.tokenizer_dir.iterdir() if "token" in file.name or "vocab" in file.name
        ]
        files = [str(file.resolve()) for file in self.files]
        inputs = [files, stamp_files(list(self.files)), stamp_files(tokenizer_files)]
        described = [inputs, self.seq_len, self.keep_tail, self.question_template]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def build_blocks(
    packing: Packing, cache_dir: Path, ranks: Ranks | None = None, progress: ProgressCallback | None = None
) -> Blocks:
    """Tokenise and pack a corpus once; later calls with the same inputs map the result.

    Rank 0 writes, the others wait and read.

    Raises:
        InputError: a malformed record, or a corpus without one whole block.
    """
    disable_progress_bars()
    ranks = ranks or Ranks()

    def write() -> Path:
        target = cache_dir / packing.cache_name()
        if not target.is_dir():
            _write_blocks(target, packing, progress)
        return target

    target = ranks.on_main(write)
    remedy = f"all hosts must see '{cache_dir}': use a file system that they share"
    return Blocks(ranks.on_each(lambda: load_from_disk(str(target)), remedy), packing.seq_len)


def _write_blocks(target: Path, packing: Packing, progress: ProgressCallback | None) -> None:
    with new_directory(target) as folder:
        if next(_pack(packing, progress), None) is None:
            raise InputError(
                f"{packing.key}: {', '.join(map(str, packing.files))} has less than one block of {packing.seq_len} "
                "tokens; add text or lower the sequence length"
            )
        try:
            dataset = Dataset.from_generator(
                _pack,
                features=Features({"input_ids": ListOf(Value("int32"))}),
                cache_dir=str(folder / "building"),
                gen_kwargs={"packing": packing, "progress": progress},
                # The cache is ours (`target`); hashing the arguments would fail on a progress bar.
                fingerprint=target.name,
            )
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, AdeptError):
                raise error.__cause__ from None
            raise
        dataset.save_to_disk(str(folder))
        shutil.rmtree(folder / "building", ignore_errors=True)


def _pack(packing: Packing, progress: ProgressCallback | None) -> Iterator[dict[str, list[int]]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(packing.tokenizer_dir)
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    seq_len, pending = packing.seq_len, list[int]()
    done, total = 0, sum(path.stat().st_size for path in packing.files)

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes

    for path in packing.files:
        texts = read_documents(packing.key, path, advance, packing.question_template)
        for documents in _chunks(texts, _DOCUMENTS_PER_CALL):
            for tokens in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]:
                pending += tokens + separator
            whole = len(pending) // seq_len * seq_len
            for start in range(0, whole, seq_len):
                yield {"input_ids": pending[start : start + seq_len]}
            pending = pending[whole:]
            if progress:
                progress(done / total, path.name)
    if packing.keep_tail and len(pending) > 1:
        yield {"input_ids": pending}


def _chunks(items: Iterator[str], size: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
