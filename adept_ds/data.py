"""Text -> packed blocks -> a global order that does not depend on the number of ranks.

Documents are tokenised, joined by the end-of-text token and cut into blocks of seq_len tokens: no padding inside
training blocks, at the price that a document can be cut. Blocks are memory-mapped (Arrow), so a corpus may be
larger than memory and is held once per host.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Value, disable_progress_bars, load_from_disk
from datasets import Sequence as ListOf
from datasets.exceptions import DatasetGenerationError

from adept_ds.config import TrainSection
from adept_ds.distributed import on_main_rank, share_of_rank
from adept_ds.errors import AdeptError, InputError
from adept_ds.files import new_directory, stamp_files
from adept_ds.loss import IGNORED_LABEL
from adept_ds.questions import DEFAULT_TEMPLATE, render_question
from adept_ds.terminal import ProgressCallback

FILLER = -1
"""Index of a block that counts nothing: it lets every rank make the same number of forward passes."""

_DOCUMENTS_PER_CALL = 512


@dataclass(frozen=True)
class Blocks:
    """Packed blocks of one corpus."""

    dataset: Dataset
    seq_len: int

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and labels, both [len(indices), seq_len] int64; padding and fillers carry ignored labels."""
        input_ids = torch.zeros(len(indices), self.seq_len, dtype=torch.int64)
        labels = torch.full_like(input_ids, IGNORED_LABEL)
        for row, index in enumerate(indices):
            if index != FILLER:
                tokens = torch.tensor(self.dataset[index]["input_ids"], dtype=torch.int64)
                input_ids[row, : len(tokens)] = tokens
                labels[row, : len(tokens)] = tokens
        return input_ids, labels

    def predicted_tokens(self, indices: Sequence[int]) -> int:
        """How many tokens of these blocks are predicted (each block's first one is not)."""
        return sum(len(self.dataset[index]["input_ids"]) - 1 for index in indices if index != FILLER)


@dataclass(frozen=True)
class Row:
    """One sequence of a training batch."""

    index: int
    replayed: bool
    """From the general corpus, not from the domain's."""


@dataclass(frozen=True)
class TrainingData:
    """What is trained on: domain text, and in every batch as many sequences of general text as are replayed."""

    domain: Blocks
    replay: Blocks | None = None
    replayed: int = 0

    def micro_batches(self, step: int, train: TrainSection, rank: int, world_size: int) -> list[list[Row]]:
        """This rank's share of the global batch of optimizer step `step` (from 0); replayed sequences come first.

        Which sequences a global batch consists of depends on neither the number of ranks nor the micro-batch.
        """
        size, rows = train.global_batch_size, []
        if self.replay is not None:
            chosen = global_batch(step, self.replayed, len(self.replay), train.seed)
            rows += [Row(index, replayed=True) for index in chosen]
        chosen = global_batch(step, size - len(rows), len(self.domain), train.seed)
        rows += [Row(index, replayed=False) for index in chosen]
        mine, micro = rows[rank::world_size], train.micro_batch_size
        return [mine[start : start + micro] for start in range(0, len(mine), micro)]

    def batch(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and labels, both [len(rows), seq_len] int64."""
        pairs = [self._blocks(row).batch([row.index]) for row in rows]
        return torch.cat([ids for ids, _ in pairs]), torch.cat([labels for _, labels in pairs])

    def _blocks(self, row: Row) -> Blocks:
        return self.replay if row.replayed and self.replay is not None else self.domain


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


def read_documents(
    key: str,
    path: Path,
    on_bytes: Callable[[int], None] | None = None,
    question_template: str = DEFAULT_TEMPLATE,
) -> Iterator[str]:
    """The texts of a corpus file: JSON lines ({"text"} or {"question", "choices", "answer"}), or one plain text.

    Raises:
        InputError: naming file and line of a malformed record.
    """
    if path.suffix not in {".jsonl", ".json", ".ndjson"}:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{key}: '{path}' is not UTF-8 text (byte {error.start}); convert it") from None
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if on_bytes:
                on_bytes(len(line))
            if line.strip():
                yield _render(f"{key}: '{path}' line {number}", line, question_template)


def global_batch(step: int, size: int, num_blocks: int, seed: int) -> list[int]:
    """The blocks of optimizer step `step` (from 0): epoch after epoch, each a permutation of all blocks.

    A pure function of its arguments, so a resumed run and a run on another number of ranks see the same data.
    """
    positions = range(step * size, (step + 1) * size)
    return [int(_permutation(num_blocks, seed + p // num_blocks)[p % num_blocks]) for p in positions]


def block_order(num_blocks: int, seed: int) -> list[int]:
    """A permutation of the blocks that depends on the seed alone."""
    return _permutation(num_blocks, seed).tolist()


@functools.lru_cache(maxsize=2)
def _permutation(num_blocks: int, seed: int) -> torch.Tensor:
    """Kept for the current epoch and the next: with many millions of blocks it takes a while."""
    return torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))


def rank_batches(indices: Sequence[int], rank: int, world_size: int, batch_size: int) -> list[list[int]]:
    """This rank's share of `indices`, in batches of exactly `batch_size`; every rank gets the same number of batches.

    Shares that do not come out even are completed with fillers.
    """
    largest_share = -(-len(indices) // world_size)
    num_batches = -(-largest_share // batch_size)
    mine = [indices[i] for i in share_of_rank(len(indices), rank, world_size)]
    mine += [FILLER] * (num_batches * batch_size - len(mine))
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]


def _render(place: str, line: bytes, question_template: str) -> str:
    try:
        record = json.loads(line)
    except ValueError:
        raise InputError(f"{place} is not JSON; write one record per line") from None
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return str(record["text"])
        if {"question", "choices", "answer"} <= record.keys():
            try:
                return render_question(record, question_template)
            except ValueError as error:
                raise InputError(f"{place}: {error}") from None
    raise InputError(f"{place} has neither 'text' nor 'question', 'choices' and 'answer'")


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
