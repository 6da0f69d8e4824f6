"""What one rank does in test_dials.py: losses of held-out documents, with the dial at several positions.

Usage: python -m harness.dial_worker FOLDER OUTPUT CELL... with cells such as gemma2/copies/strict. FOLDER holds, for
each model, `base`, and what was made of it by each kind of method; and texts. Rank 0 writes to OUTPUT (torch.save).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from harness.packing import tokenised

from adept_ds.data.document_rows import DocumentRows, JoinedRows
from adept_ds.evaluation.dials import Kind, alphas_by_parameter, dial_of
from adept_ds.evaluation.held_out import SourceName, document_losses
from adept_ds.evaluation.row_losses import Evaluator, token_batches
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.frozen_prefix import FrozenPrefix
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.groups import join
from adept_ds.ranks.launchers import rank_from_environment
from adept_ds.zero.build import EngineSettings, build_forward_engine
from adept_ds.zero.dialled import held_elements
from adept_ds.zero.engine import release

SEQ_LEN, MAX_TOKENS, BATCH_TOKENS = 24, 150, 40
SOURCES = (SourceName("general", "one"), SourceName("general", "two"), SourceName("domain", "one"))
POSITIONS = (0.5, 0.0, 0.25, 1.0)
"""In this order: each has to be right whatever was set before."""
EACH = (1.0, 0.25)
"""Of two copies."""
ZERO: dict[str, dict[str, Any]] = {
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},  # small parameters stay gathered
    "strict": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "offload": {"stage": 3, "offload_param": {"device": "cpu"}},
}


def held_out(folder: Path, ranks: Ranks) -> dict[SourceName, DocumentRows]:
    """Texts of several sources, of unlike lengths."""
    return {
        name: DocumentRows.of(
            tokenised([folder / f"{name.corpus}_{name.source}.jsonl"], folder / "tokenizer", folder / "tokens", ranks),
            MAX_TOKENS,
            SEQ_LEN,
            None,
        )
        for name in SOURCES
    }


def evaluated(settings: EngineSettings, folder: Path, model: str, kind: Kind) -> dict[str | float, Any]:
    """Sums of losses by document: of the base, of the adapted model, and at every position after that."""
    documents, found = held_out(folder, settings.ranks), dict[str | float, Any]()
    base, adapted = (ModelDirectory.read(folder / model / name) for name in ("base", kind))
    for name, directory in {"base": base, "adapted": adapted}.items():
        engine, device = build_forward_engine(settings, directory)
        evaluator = Evaluator(engine, device, settings.ranks, BATCH_TOKENS)
        found[name] = dict(document_losses(evaluator, documents))
        if name == "adapted":
            module = getattr(engine, "module", engine)
            trained = [elements.clone() for p in module.parameters() for elements, _ in held_elements(p)]
            dial = dial_of(kind, engine, adapted, base, settings.precision)
            for alpha in POSITIONS:
                dial.turn(alpha)
                found[alpha] = dict(document_losses(evaluator, documents))
            if kind == "copies":
                found |= by_copies(evaluator, adapted, dial, documents)
                dial.turn(1.0)
            restored = [elements for p in module.parameters() for elements, _ in held_elements(p)]
            found["bits"] = all(map(torch.equal, trained, restored))
        release(engine)
    return found


def by_copies(evaluator: Evaluator, adapted: ModelDirectory, dial: Any, documents: Any) -> dict[str | float, Any]:
    """Each copy at a position of its own; and with what lies below the lowest copy computed once, for some passes or
    for all. `calls`: how often the attention of the lowest layer was."""
    module: Any = getattr(evaluator.model, "module", evaluator.model)
    layers: Any = adapted.family.layer_modules(module)
    rows = JoinedRows(tuple(documents.values()))
    passes = -(-len(token_batches(rows.lengths, BATCH_TOKENS)) // evaluator.ranks.world_size)
    found: dict[str | float, Any] = {}
    dial.turn(alphas_by_parameter(dial, adapted, EACH))
    found["each"] = dict(document_losses(evaluator, documents))
    for kept in (passes - 1, passes):
        prefix, calls = FrozenPrefix(layers, 1, kept), 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        for alphas, name in (((0.5, 0.5), "first"), (EACH, "each_again")):
            dial.turn(alphas_by_parameter(dial, adapted, alphas))
            hook = layers[0].self_attn.register_forward_hook(count) if hasattr(layers[0], "self_attn") else None
            found[f"{name}/{passes - kept}"] = dict(document_losses(evaluator, documents, prefix=prefix))
            if hook is not None:
                hook.remove()
        found[f"calls/{passes - kept}"] = (calls, passes)
    return found


def main() -> None:
    folder, output, cells = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    ranks, found = join(rank_from_environment(os.environ)), dict[str, Any]()
    for cell in cells:
        model, kind, zero = cell.split("/")
        assert kind in get_args(Kind)
        settings = EngineSettings({"zero_optimization": ZERO[zero]}, torch.float32, ranks)
        found[cell] = evaluated(settings, folder, model, kind)  # type: ignore[arg-type]
    same = ranks.gather([np.concatenate(list(of["adapted"].values())).tolist() for of in found.values()])
    assert all(other == same[0] for other in same), "every rank knows all losses"
    if ranks.is_main:
        torch.save(found, output)


if __name__ == "__main__":
    main()
