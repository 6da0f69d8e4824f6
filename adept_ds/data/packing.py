"""TODO data.packing."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value, disable_progress_bars, load_from_disk
from datasets import Sequence as ListOf
from datasets.exceptions import DatasetGenerationError

from adept_ds.base.errors import AdeptError, InputError
from adept_ds.base.files import new_directory, stamp_files
from adept_ds.base.progress import ProgressCallback
from adept_ds.config.question_template import DEFAULT_TEMPLATE
from adept_ds.data.blocks import Blocks
from adept_ds.data.documents import read_documents
from adept_ds.ranks.collectives import on_main_rank

_DOCUMENTS_PER_CALL = 512


def build_blocks(
    key: str,
    files: Sequence[Path],
    tokenizer_dir: Path,
    seq_len: int,
    cache_dir: Path,
    *,
    keep_tail: bool,
    question_template: str = DEFAULT_TEMPLATE,
    progress: ProgressCallback | None = None,
) -> Blocks:
    """Tokenise and pack a corpus once; later calls with the same inputs map the result.

    Rank 0 writes, the others wait and read.

    Args:
        key: the configuration key of the corpus, for error messages.
        keep_tail: keep the last, partly filled block (padded): for evaluation and probing, where every token counts.

    Raises:
        InputError: a malformed record, or a corpus without one whole block.
    """
    disable_progress_bars()

    def write() -> Path:
        target = cache_dir / _cache_name(files, tokenizer_dir, seq_len, keep_tail, question_template)
        _write_blocks(target, key, list(files), tokenizer_dir, seq_len, keep_tail, question_template, progress)
        return target

    target = on_main_rank(write)
    return Blocks(load_from_disk(str(target)), seq_len)


def _cache_name(
    files: Sequence[Path], tokenizer_dir: Path, seq_len: int, keep_tail: bool, question_template: str
) -> str:
    tokenizer_files = [file for file in tokenizer_dir.iterdir() if "token" in file.name or "vocab" in file.name]
    inputs = [[str(file.resolve()) for file in files], stamp_files(list(files)), stamp_files(tokenizer_files)]
    return hashlib.sha256(json.dumps([inputs, seq_len, keep_tail, question_template]).encode()).hexdigest()[:16]


def _write_blocks(
    target: Path,
    key: str,
    files: list[Path],
    tokenizer_dir: Path,
    seq_len: int,
    keep_tail: bool,
    question_template: str,
    progress: ProgressCallback | None,
) -> None:
    if target.is_dir():
        return
    with new_directory(target) as folder:
        arguments: dict[str, Any] = {
            "key": key,
            "files": tuple(files),  # a list would be taken for shards, each packed by itself
            "tokenizer_dir": tokenizer_dir,
            "seq_len": seq_len,
            "keep_tail": keep_tail,
            "question_template": question_template,
            "progress": progress,
        }
        if next(_pack(**arguments), None) is None:
            raise InputError(
                f"{key}: {', '.join(map(str, files))} has less than one block of {seq_len} tokens; "
                "add text or lower the sequence length"
            )
        try:
            dataset = Dataset.from_generator(
                _pack,
                features=Features({"input_ids": ListOf(Value("int32"))}),
                cache_dir=str(folder / "building"),
                gen_kwargs=arguments,
                # The cache is ours (`target`); hashing the arguments would fail on a progress bar.
                fingerprint=target.name,
            )
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, AdeptError):
                raise error.__cause__ from None
            raise
        dataset.save_to_disk(str(folder))
        shutil.rmtree(folder / "building", ignore_errors=True)


def _pack(
    key: str,
    files: Sequence[Path],
    tokenizer_dir: Path,
    seq_len: int,
    keep_tail: bool,
    question_template: str,
    progress: ProgressCallback | None,
) -> Iterator[dict[str, list[int]]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    total = sum(path.stat().st_size for path in files)
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes

    pending: list[int] = []
    for path in files:
        for documents in _chunks(read_documents(key, path, advance, question_template), _DOCUMENTS_PER_CALL):
            for tokens in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]:
                pending += tokens + separator
            whole = len(pending) // seq_len * seq_len
            for start in range(0, whole, seq_len):
                yield {"input_ids": pending[start : start + seq_len]}
            pending = pending[whole:]
            if progress:
                progress(done / total, path.name)
    if keep_tail and len(pending) > 1:
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
