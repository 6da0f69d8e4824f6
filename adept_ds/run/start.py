"""The model that training starts from: an expanded one, or the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adept_ds.methods.shape import Start, method_of
from adept_ds.models.directory import ModelDirectory
from adept_ds.run.context import Context
from adept_ds.run.expand import current_expansion, selected_layers


@dataclass(frozen=True)
class FoundStart:
    """It, and what it is known by."""

    start: Start
    fingerprint: str
    """Of its weights."""


def find_start(run: Context) -> FoundStart:
    """On every rank alike.

    Raises:
        InputError: what it is made from, or the probe that chooses layers, is not there.
    """
    base = run.settings.model
    if method_of(run.settings.config).makes_copies:
        expansion = current_expansion(run)
        model = run.ranks.on_main(lambda: ModelDirectory.read(run.run_dir.expanded))
        start = Start(model, tuple(expansion.copy_indices), base, tuple(expansion.source_indices))
        return FoundStart(start, expansion.fingerprint)
    layers = run.ranks.on_main(lambda: _layers_in_place(run))
    return FoundStart(Start(base, layers, base, layers), run.ranks.on_main(lambda: run.identity.weights(base)))


def _layers_in_place(run: Context) -> tuple[int, ...]:
    if run.settings.config.method.chooses_layers:
        return tuple(sorted(selected_layers(run)))
    return tuple(range(run.settings.model.num_layers))


def start_directory(run: Context) -> Path:
    """Where it lies."""
    expands = method_of(run.settings.config).makes_copies
    return run.run_dir.expanded if expands else run.settings.model.path
