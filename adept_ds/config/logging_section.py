"""The section `logging`: who is told how training goes, beside the run's own files (docs/watching.md)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from adept_ds.config.paths import UserPath, expanded
from adept_ds.config.section import Section

_PROJECT = re.compile(r"(?:[^/\\#?%:\s]+/)?[^/\\#?%:]{1,128}")
_KEY = re.compile(r"(?i)(?:password|passwd|token|secret|api_?key)=")


def _project(text: str) -> str:
    if not _PROJECT.fullmatch(text) or text != text.strip():
        raise ValueError(f"'{text[:200]}' is no name of a project; write PROJECT or ENTITY/PROJECT")
    return text


def _place(text: str) -> str:
    if not is_address(text):
        return expanded(text)
    found = urlsplit(text)
    if "@" in found.netloc or _KEY.search(found.query):
        shown = f"{found.scheme}://...{found.netloc.rpartition('@')[2]}"
        raise ValueError(
            f"'{shown[:200]}' has a name or a password in it, which config.yaml would keep; leave them out, and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment"
        )
    return text


def _prom(path: Path) -> Path:
    if path.suffix != ".prom":
        raise ValueError(f"'{path}' does not end in .prom, and node_exporter reads no other files; write such a name")
    return path


def is_address(place: str) -> bool:
    """Whether it is a server's or a database's, and no folder."""
    return "://" in place or place == "databricks"


class LoggingSection(Section):
    """Nothing here changes what training computes, nor what makes a run the same run."""

    wandb: Annotated[str, AfterValidator(_project)] | None = Field(
        None, description="Weights & Biases: PROJECT or ENTITY/PROJECT; the API key comes from `wandb login`"
    )
    mlflow: Annotated[str, AfterValidator(_place)] | None = Field(
        None, description="MLflow: address of a tracking server, or a folder"
    )
    prometheus: Annotated[UserPath, AfterValidator(_prom)] | None = Field(
        None, description="a file NAME.prom in the folder that node_exporter's textfile collector reads"
    )
