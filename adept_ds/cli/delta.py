"""The commands on delta packages."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from adept_ds.base.dial_record import label_of
from adept_ds.cli.dial import AlphaOption, parse_alphas
from adept_ds.cli.forms import JsonOption, OutArg, OverwriteOption
from adept_ds.cli.session import quiet_session, show


def pack(
    source: Annotated[Path, typer.Argument(metavar="RUN|ADAPTED", help="a run directory, or an adapted model")],
    out: OutArg,
    name: Annotated[str | None, typer.Option(help="what to call the package; by default as RUN or ADAPTED")] = None,
    only: Annotated[str | None, typer.Option(help="which package, where several were applied")] = None,
    base: Annotated[Path | None, typer.Option(help="make sure that this model is the base")] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write only the copies, and a manifest that says which base they belong to."""
    with quiet_session(as_json) as terminal:
        from adept_ds.deltas.operations import pack_copies
        from adept_ds.deltas.package import TENSORS_NAME

        with terminal.progress("packing") as bar:
            manifest = pack_copies(source, out, name=name, only=only, base=base, progress=bar, overwrite=overwrite)
        facts = manifest.model_dump(mode="json", exclude={"tensors"}) | {"fingerprint": manifest.fingerprint}
        layers, size = ", ".join(map(str, manifest.sources)), (out / TENSORS_NAME).stat().st_size / 2**20
        text = f"package '{manifest.name}' in {out}: copies of layers {layers}, {size:.1f} MiB"
        show(terminal, as_json, facts, lambda: terminal.say(text))


def apply(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="the model that was expanded")],
    packages: Annotated[list[Path], typer.Argument(metavar="PACKAGE...", help="of one layer, the first is lowest")],
    out: OutArg,
    alpha: AlphaOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Rebuild the adapted model bit for bit, or put several domains over one base."""
    alphas = parse_alphas(alpha)
    with quiet_session(as_json) as terminal:
        from adept_ds.deltas.operations import apply_packages

        with terminal.progress("applying") as bar:
            expansion = apply_packages(base, packages, out, bar, alphas=alphas, overwrite=overwrite)
        where = "; ".join(f"{package.name} at {', '.join(map(str, package.copies))}" for package in expansion.packages)
        text = f"{expansion.source_layers} + {len(expansion.copies)} layers in {out}: {where}"
        if expansion.alphas is not None:
            by_whom = "as recommended; --alpha 1 gives them as they were trained" if alphas is None else "as asked for"
            text += f", at alpha {label_of(expansion.alphas)} ({by_whom})"
        show(terminal, as_json, expansion.to_json(), lambda: terminal.say(text))


def strip(
    adapted: Annotated[Path, typer.Argument(metavar="ADAPTED", help="a model with copies")],
    out: OutArg,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Give the base back, byte for byte."""
    with quiet_session(as_json) as terminal:
        from adept_ds.deltas.operations import strip_copies

        with terminal.progress("stripping") as bar:
            found = strip_copies(adapted, out, bar, overwrite=overwrite)
        text = f"base in {out}: {len(found.files)} weight files, {found.num_bytes / 2**20:.1f} MiB"
        text += f", fingerprint {found.fingerprint}"
        show(terminal, as_json, dataclasses.asdict(found), lambda: terminal.say(text))
