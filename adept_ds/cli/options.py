"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adept_ds.config.loading import parse_config
from adept_ds.config.schema import Config

MethodOption = Annotated[
    str | None, typer.Option(help="mask, taylor, gradient or fisher (probe.method); all compares them")
]
ResultOption = Annotated[Path | None, typer.Option(help="write the result here too, as JSON")]


def with_method(config: Config, method: str | None) -> Config:
    """The configuration with another `probe.method`; `all` is none of them. Raises `InputError` for an unknown one."""
    if method in (None, "all"):
        return config
    tree = config.model_dump(mode="json", exclude_unset=True)
    return parse_config(tree | {"probe": tree.get("probe", {}) | {"method": method}}, "--method")
