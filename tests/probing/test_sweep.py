"""The sweep in one process: memory of its head, and its bar."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.launching import counted
from harness.models import save_tiny_model
from harness.packing import pack
from harness.workspace import Workspace
from torch.utils._python_dispatch import TorchDispatchMode

from adept_ds.data.mixture import Mixture
from adept_ds.models import head_loss
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.loading import load_causal_lm
from adept_ds.probing.passes import PassProgress
from adept_ds.probing.sweep import bypass_losses, install_layer_sweep
from adept_ds.ranks.collectives import Ranks


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_logits_of_the_whole_stack_are_never_held_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of 150,000 would need 2.8 GB for six variants of one block of 768 tokens; here a small likeness."""
    vocabulary, tokens, chunk = 5000, 24, 5 * 5000
    model_dir = ModelDirectory.read(save_tiny_model(tmp_path / "model", "qwen3", vocab_size=vocabulary))
    monkeypatch.setattr(head_loss, "_CHUNK_ELEMENTS", chunk)
    model = load_causal_lm(model_dir, torch.float32).eval()
    install_layer_sweep(model, model_dir.family, 60)
    input_ids = torch.randint(0, 250, (1, tokens))
    with torch.no_grad(), LargestTensor() as largest:
        assert model(input_ids, input_ids).shape == (6,)
    assert chunk <= largest.elements < 6 * tokens * vocabulary / 10
    assert largest.elements == chunk


def test_the_sweep_moves_its_bar_layer_by_layer(workspace: Workspace, tmp_path: Path) -> None:
    """Only the beginning of a batch may communicate; shares rise, with the work of a layer: one variant more each."""
    checks: list[tuple[float, str]] = []
    moves: list[tuple[float, str]] = []
    progress = PassProgress(5, lambda *report: checks.append(report), lambda *report: moves.append(report))
    model_dir = ModelDirectory.read(workspace.model)
    model = load_causal_lm(model_dir, torch.float32).eval()
    install_layer_sweep(model, model_dir.family, 8192, progress.layer)
    blocks = pack([workspace.root / "general.jsonl"], workspace.model, tmp_path, seq_len=24)
    two = Mixture.of([blocks]).sample(2, seed=0)
    bypass_losses(model, 5, two, Ranks(), micro_batch_size=1, device="cpu", progress=progress)
    assert checks == [(0.0, "batch 1 of 2"), (0.5, "batch 2 of 2")]
    assert [text for _, text in moves] == [
        f"batch {batch} of 2, layer {layer} of 5" for batch, layer in itertools.product((1, 2), range(1, 6))
    ]
    shares = [share for share, _ in moves]
    assert shares[:5] == pytest.approx([done / 30 for done in (1, 3, 6, 10, 15)])
    assert shares[5:] == pytest.approx([0.5 + share for share in shares[:5]])


def test_every_layer_is_gathered_once_per_batch_however_many_chunks_the_stack_passes_in(
    workspace: Workspace, tmp_path: Path
) -> None:
    """Two ranks under strict ZeRO-3. All parameters of the tiny model fit into DeepSpeed's prefetch, so that bytes are
    counted: all of them once per batch; the tied head again in the first one, before DeepSpeed knows that it comes.
    """
    found = counted(workspace.root, tmp_path / "found.pt", "sweep")
    padded = {name: 2 * -(-math.prod(shape) // 2) for name, shape in found["shapes"].items()}
    expected = 4 * (sum(padded.values()) * found["batches"] + padded["model.embed_tokens.weight"])
    assert sum(found["one chunk"]) == sum(found["many chunks"]) == expected
    assert sum(found["each projection apart"]) > 1.4 * expected, "what the promise is worth"
