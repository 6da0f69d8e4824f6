"""What both forms of `adept probe` do once they are in a session."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from adept_ds.base.errors import InputError
from adept_ds.base.files import write_json
from adept_ds.cli.session import show
from adept_ds.cli.summary import print_layer_importance, print_methods, print_places
from adept_ds.config.schema import Config

if TYPE_CHECKING:
    from adept_ds.run.context import Context


def check_method(config: Config, method: str | None) -> None:
    """Raises `InputError`: another way to estimate deltas is asked for, and none are estimated."""
    if method is not None and config.weighs_places:
        raise InputError(
            f"--method: {method} is about deltas of layers, which expand.choose: gain does not estimate; leave it "
            "out, or say expand.choose=lowest"
        )


def weigh_and_show(session: Context, out: Path | None, as_json: bool) -> None:
    """Weigh the places of copies, and show them."""
    from adept_ds.run.places import places_stage

    found = places_stage(session)
    if out is not None:
        session.ranks.on_main(lambda: write_json(out, found.to_json()))
    show(session.terminal, as_json, found.to_json(), lambda: print_places(found, session.terminal))


def probe_and_show(session: Context, method: str | None, out: Path | None, as_json: bool) -> dict[str, Any]:
    """Probe, compare methods where that is asked for (`all`), and show both; what was found about methods."""
    from adept_ds.run.probe import compare_methods, probe_stage

    result = probe_stage(session)
    methods = compare_methods(session, result) if method == "all" else {}
    found = result.to_json() | methods
    if out is not None:
        session.ranks.on_main(lambda: write_json(out, found))

    def print_tables() -> None:
        print_layer_importance(result, session.terminal)
        print_methods(methods, session.terminal)

    show(session.terminal, as_json, found, print_tables)
    return methods
