"""Held-out text of two kinds: words that a tiny model learns, and other letters, which it forgets on the way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

DOCUMENTS = 24
"""Of each held-out corpus: half a dozen at least in each half."""


def write_held_out(root: Path) -> None:
    """letters.jsonl and words.jsonl, beside the corpora of a workspace."""
    noise = np.random.default_rng(5)
    letters = ["".join(noise.choice(list("QZXVJKWY 0918"), 30)) for _ in range(DOCUMENTS)]
    words = (root / "domain_heldout.jsonl").read_text().splitlines()[:DOCUMENTS]
    (root / "letters.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in letters))
    (root / "words.jsonl").write_text("".join(line + "\n" for line in words))
