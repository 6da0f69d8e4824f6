"""Tables as rows: Parquet files, and datasets that `datasets` wrote to disk.

A few hundred rows at a time are read. Of a Parquet file, two of its pages are in memory besides, which are as large as
whoever wrote them wanted: usually 1 MiB, with long texts 1024 of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from adept_ds.base.digests import tree_files
from adept_ds.base.errors import InputError
from adept_ds.base.records import first_mistake
from adept_ds.config.corpus_files import DATASET_STATE
from adept_ds.data.open_files import BUFFER_BYTES, readable
from adept_ds.data.record_text import QUESTION_KEYS, missing_field

_ROWS = 256
"""Of a batch, at most: with 150 KB each they take 40 MB."""

_BATCH_BYTES = 4 << 20
"""Of a batch, going by the mean of its file."""


class Row(Mapping[str, Any]):
    """A row of a batch; a value is converted when it is asked for, which fails where it is not UTF-8."""

    def __init__(self, columns: Mapping[str, Any], index: int) -> None:
        """Args: columns: Arrow arrays."""
        self._columns, self._index = columns, index

    def __getitem__(self, name: str) -> Any:
        try:
            return self._columns[name][self._index].as_py()
        except UnicodeDecodeError:
            raise ValueError(f"{name!r} is not UTF-8; convert it") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


def parquet_rows(
    key: str, path: Path, text_key: str, skip: int = 0, on_bytes: Callable[[int], None] | None = None
) -> Iterator[tuple[int, Row]]:
    """Rows from number `skip` on, each with its number; row groups before it are not read.

    Args:
        on_bytes: told of the file's bytes in the proportion of the rows that are done.

    Raises:
        InputError: it is damaged, or has no column to read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with (
        readable(key, path, pa.ArrowException, UnicodeDecodeError),
        pq.ParquetFile(path, buffer_size=BUFFER_BYTES) as file,
    ):
        columns = _columns(f"{key}: '{path}'", file.schema_arrow, text_key)
        meter, first = _RowMeter(path.stat().st_size, file.metadata.num_rows, on_bytes), 0
        for group in range(file.num_row_groups):
            described = file.metadata.row_group(group)
            rows = described.num_rows
            if first + rows > skip:
                size = max(1, min(_ROWS, _BATCH_BYTES * rows // max(1, described.total_byte_size)))
                batches = file.iter_batches(size, [group], columns, use_threads=False)
                yield from _rows(batches, first, skip, meter)
            first += rows
            meter.done(first)
        meter.done(file.metadata.num_rows)


def dataset_rows(
    key: str, path: Path, text_key: str, skip: int = 0, on_bytes: Callable[[int], None] | None = None
) -> Iterator[tuple[int, Row]]:
    """The same of a dataset's directory."""
    _check_inside(f"{key}: '{path}'", path)
    import pyarrow as pa
    from datasets import load_from_disk

    with readable(key, path, Exception):  # whatever of its files the library cannot make sense of
        dataset = load_from_disk(str(path), keep_in_memory=False)
    with readable(key, path, pa.ArrowException):
        columns = _columns(f"{key}: '{path}'", dataset.features.arrow_schema, text_key)
        meter = _RowMeter(disk_bytes(path), len(dataset), on_bytes)
        if skip < len(dataset):
            rest = dataset.select_columns(columns).skip(skip).with_format("arrow")
            yield from _rows(map(_validated, rest.iter(_ROWS)), skip, skip, meter)
        meter.done(len(dataset))


def _validated(batch: Any) -> Any:
    """The library maps files as they are: a damaged offset would lead out of memory."""
    batch.validate(full=True)
    return batch


def disk_bytes(path: Path) -> int:
    """Of a file, or of all files in the directory of a dataset."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else tree_files(path)))


def _rows(batches: Any, first: int, skip: int, meter: _RowMeter) -> Iterator[tuple[int, Row]]:
    for batch in batches:
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        for index in range(max(0, skip - first), batch.num_rows):
            yield first + index, Row(columns, index)
        first += batch.num_rows
        meter.done(first)


class _RowMeter:
    """Tells of bytes by the share of rows that are done; in the end, of all."""

    def __init__(self, num_bytes: int, rows: int, on_bytes: Callable[[int], None] | None) -> None:
        self._num_bytes, self._rows, self._on_bytes, self._told = num_bytes, rows, on_bytes, 0

    def done(self, rows: int) -> None:
        """So many of them, from the first one."""
        num_bytes = self._num_bytes * rows // self._rows if self._rows else self._num_bytes
        if self._on_bytes and num_bytes > self._told:
            self._on_bytes(num_bytes - self._told)
            self._told = num_bytes


def _columns(place: str, schema: Any, text_key: str) -> list[str]:
    """Those that are read: the text, or what questions consist of."""
    import pyarrow.types as kinds

    wanted = [name for name in dict.fromkeys((text_key, *QUESTION_KEYS)) if name in schema.names]
    for name in wanted:
        if schema.names.count(name) > 1:
            raise InputError(f"{place} has more than one column {name!r}; rename those that are not meant")
    if text_key not in wanted:
        if len(wanted) == len(QUESTION_KEYS):
            return wanted
        raise InputError(f"{place}: {missing_field(text_key, schema.names)}")
    kind = schema.field(text_key).type
    value = kind.value_type if kinds.is_dictionary(kind) else kind
    if not (kinds.is_string(value) or kinds.is_large_string(value) or kinds.is_string_view(value)):
        raise InputError(f"{place}: column {text_key!r} holds {kind}, not texts; set data.text_key to one that does")
    return wanted


class _DataFile(BaseModel):
    filename: str


class _State(BaseModel):
    """What is read of a dataset's `state.json` before the library does."""

    data_files: list[_DataFile] = Field(alias="_data_files")


def _check_inside(place: str, directory: Path) -> None:
    """All files of a dataset are in its own directory."""
    try:
        state = _State.model_validate_json((directory / DATASET_STATE).read_bytes())
    except ValidationError as error:
        raise InputError(f"{place}: {DATASET_STATE} is damaged ({first_mistake(error)}); save it again") from None
    present = {path.name for path in directory.iterdir() if path.is_file()}
    for name in (file.filename for file in state.data_files):
        if name not in present:
            raise InputError(f"{place}: {DATASET_STATE} names '{name[:80]}', which is no file there; save it again")
