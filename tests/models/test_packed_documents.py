"""Documents that share a row: each has the losses that it would have alone, whatever the family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness.families import MOSTLY_SLOW_FAMILIES
from harness.models import FAMILY_OPTIONS, VOCABULARY, save_tiny_model

from adept_ds.models.directory import ModelDirectory
from adept_ds.models.head_loss import IGNORED_LABEL
from adept_ds.models.loading import load_causal_lm
from adept_ds.probing.sweep import install_layer_sweep

LENGTHS = [[13, 2, 9], [24], [5, 18]]
"""Of the documents of each row; the second row is full, the first has none left over, the third is padded."""
ROW = 24


def rows_of(documents: list[list[torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, labels and positions, written out by hand."""
    input_ids, positions = (torch.zeros(len(documents), ROW, dtype=torch.int64) for _ in range(2))
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    for row, texts in enumerate(documents):
        at = 0
        for text in texts:
            input_ids[row, at : at + len(text)] = text
            labels[row, at + 1 : at + len(text)] = text[1:]
            positions[row, at : at + len(text)] = torch.arange(len(text))
            at += len(text)
    return input_ids, labels, positions


@pytest.mark.parametrize("family", FAMILY_OPTIONS)
def test_losses_and_gradients_are_those_of_the_documents_alone(tmp_path: Path, family: str) -> None:
    """1e-5 in fp32: sums of at most 24 token losses in another order. The tiny models' windows of 16 tokens matter."""
    from transformers import AutoModelForCausalLM

    directory = save_tiny_model(tmp_path, family)
    generator = torch.Generator().manual_seed(0)
    documents = [[torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths] for lengths in LENGTHS]
    source = ModelDirectory.read(directory)
    packed: Any = load_causal_lm(source, torch.float32).eval()
    trained = list(source.family.layer_modules(packed))[2].requires_grad_(True)
    losses = packed(*rows_of(documents))
    losses.sum().backward()
    found = [p.grad.clone() if p.grad is not None else None for p in trained.parameters()]

    plain: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    layer = list(source.family.layer_modules(plain))[2]
    expected = torch.zeros(len(documents))
    total = torch.zeros(())
    for row, texts in enumerate(documents):
        for text in texts:
            logits = plain(input_ids=text[None], use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, text[1:], reduction="sum")
            expected[row] += loss.detach()
            total = total + loss
    torch.testing.assert_close(losses.detach(), expected, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        together = packed(*rows_of(documents)[:2])
    assert float((together - expected)[0].abs()) > 1e-3, "what documents that see each other would have"
    gradients = torch.autograd.grad(total, list(layer.parameters()), allow_unused=True)
    for mine, wanted in zip(found, gradients, strict=True):
        assert (mine is None) == (wanted is None)
        if mine is not None and wanted is not None:
            torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", MOSTLY_SLOW_FAMILIES)
def test_the_sweep_keeps_documents_apart_too(tmp_path: Path, family: str, rows: int) -> None:
    """Its stack of variants, in chunks of one and of several, against a pass for each bypassed layer; 1e-5 as above."""
    directory = save_tiny_model(tmp_path, family)
    generator = torch.Generator().manual_seed(1)
    documents = [[torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths] for lengths in LENGTHS][:rows]
    source, batch = ModelDirectory.read(directory), rows_of(documents)
    plain: Any = load_causal_lm(source, torch.float32).eval()
    layers = source.family.layer_modules(plain)
    with torch.no_grad():
        expected = [plain(*batch)]
        for layer in layers:
            forward = layer.forward
            layer.forward = lambda hidden, *_, **__: hidden
            expected.append(plain(*batch))
            layer.forward = forward
        for chunk in (rows * ROW, 1 << 20):
            sweep: Any = load_causal_lm(source, torch.float32).eval()
            install_layer_sweep(sweep, source.family, chunk)
            torch.testing.assert_close(sweep(*batch), torch.cat(expected), rtol=1e-5, atol=1e-4)
