"""Whether a run has gone wrong in a way that a diagnosis can explain: told from its files, at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from adept_ds.base.run_dir import RunDirectory
from adept_ds.base.run_records import Evaluation
from adept_ds.report.diagnosis import Change, TextLosses

GENERAL_TOLERANCE = 0.015
"""A rise of general loss that is smaller is nothing to explain: the report calls it practically unchanged. Nats."""

DOMAIN_TOLERANCE = 0.005
"""A fall of domain loss that is smaller is none. Nats."""

NOISE = 2.0
"""Standard errors within which a change may be chance."""


@dataclass(frozen=True)
class Signature:
    """A known failure that shows."""

    name: Literal["general_rose", "domain_stayed"]
    sentence: str


def signatures(run_dir: Path) -> list[Signature]:
    """The failures that a run's evaluation shows; none if it has not been evaluated.

    Raises:
        InputError: evaluation.json is damaged.
    """
    losses, found = evaluated_losses(RunDirectory(run_dir)), []
    general, domain = losses.get("general"), losses.get("domain")
    if general and general.beyond_noise:
        found.append(Signature("general_rose", f"general loss rose by {_told(general.rise)}"))
    if domain and not domain.beyond_noise:
        found.append(Signature("domain_stayed", f"domain loss did not fall: it changed by {_told(domain.rise)}"))
    return found


def evaluated_losses(run: RunDirectory) -> dict[str, TextLosses]:
    """Of each held-out corpus, from evaluation.json; empty if that is not there."""
    if not run.evaluation.is_file():
        return {}
    evaluation, errors = Evaluation.load(run.evaluation), _standard_errors(run)
    return {
        corpus: compared(corpus, base.loss, evaluation.adapted[corpus].loss, base.tokens, errors.get(corpus))
        for corpus, base in evaluation.base.items()
    }


def compared(corpus: str, base: float, adapted: float, tokens: int, standard_error: float | None) -> TextLosses:
    """Two losses of one corpus; what is beyond noise is beyond the tolerance too."""
    rise, noise = adapted - base, NOISE * (standard_error or 0.0)
    beyond = rise > max(GENERAL_TOLERANCE, noise) if corpus == "general" else -rise > max(DOMAIN_TOLERANCE, noise)
    change = Change(change=rise, standard_error=standard_error)
    return TextLosses(base=base, adapted=adapted, tokens=tokens, rise=change, beyond_noise=beyond)


def paired_error(differences: np.ndarray, tokens: np.ndarray) -> float | None:
    """Standard error of sum(differences) / sum(tokens), where what varies is which texts there are.

    The linearised error of a ratio of two means (Cochran 1977, Sampling Techniques, section 2.11). None for fewer than
    two texts.

    Args:
        differences: of summed token losses, by text. [texts]
        tokens: of each.
    """
    count = int((tokens > 0).sum())
    if count < 2:
        return None
    residuals = differences - differences.sum() / tokens.sum() * tokens
    return float(math.sqrt(count / (count - 1) * np.square(residuals).sum()) / tokens.sum())


def _standard_errors(run: RunDirectory) -> dict[str, float]:
    """By corpus, over its documents; none where losses by document were not kept, or cannot be read."""
    if not run.document_losses.is_file():
        return {}
    try:
        tensors = load_file(run.document_losses)
    except (SafetensorError, OSError, ValueError):
        return {}
    found = {}
    for corpus in ("general", "domain"):
        keys = [key.removeprefix("tokens/") for key in tensors if key.startswith(f"tokens/{corpus}/")]
        wanted = [f"loss/{model}/{key}" for model in ("base", "adapted") for key in keys]
        if not keys or any(name not in tensors for name in wanted):
            continue
        tokens = np.concatenate([tensors[f"tokens/{key}"] for key in keys]).astype(np.float64)
        base, adapted = (
            np.concatenate([tensors[f"loss/{model}/{key}"] for key in keys]) for model in ("base", "adapted")
        )
        error = paired_error(adapted - base, tokens)
        if error is not None and math.isfinite(error):
            found[corpus] = error
    return found


def _told(change: Change) -> str:
    error = "" if change.standard_error is None else f" ± {change.standard_error:.4f}"
    return f"{change.change:+.4f}{error} nats"
