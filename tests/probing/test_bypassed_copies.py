"""What a sweep says of every copy, against plain PyTorch: one forward pass of Hugging Face's model for each variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness.expanding import COPIES, SELECTED, layers_of, load
from harness.marks import slow
from harness.models import save_tiny_model
from harness.packing import pack
from harness.workspace import write_corpus
from safetensors.torch import load_file, save_file

from adept_ds.data.mixture import Mixture, Sample
from adept_ds.models.directory import ModelDirectory
from adept_ds.probing.bypassed_copies import CopyPasses, CopySweep
from adept_ds.probing.sweep import stacks
from adept_ds.ranks.collectives import Ranks
from adept_ds.weights.expansion import Expansion, expand_checkpoint
from adept_ds.zero.build import EngineSettings

SETTINGS = EngineSettings({"zero_optimization": {"stage": 3}}, torch.float32, Ranks())


def adapted_model(directory: Path, model_type: str) -> Path:
    """An expanded model whose copies write something, as after training."""
    base, adapted = save_tiny_model(directory / "base", model_type), directory / "adapted"
    expand_checkpoint(base, adapted, SELECTED)
    tensors, generator = load_file(adapted / "model.safetensors"), torch.Generator().manual_seed(3)
    for name in Expansion.read(adapted).silenced:
        tensors[name] += 0.3 * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, adapted / "model.safetensors", metadata={"format": "pt"})
    return adapted


def sample_of(directory: Path, *, documents: bool = False) -> Sample:
    """Seven sequences; the last ones end in padding."""
    text = write_corpus(directory / "text.jsonl", 5, documents=9)
    blocks = pack([text], directory / "base", directory / "cache", seq_len=90, keep_tail=True, documents=documents)
    return Mixture.of([blocks]).sample(len(blocks), seed=0)


def swept(directory: Path, sample: Sample, rows: int = 2, max_stack_tokens: int = 250) -> CopyPasses:
    sweep = CopySweep(SETTINGS, ModelDirectory.read(directory), COPIES, max_stack_tokens=max_stack_tokens)
    try:
        return sweep.over(sample, micro_batch_size=rows, check=lambda *_: None, move=lambda *_: None)
    finally:
        sweep.close()


def row_of(sample: Sample, position: int) -> torch.Tensor:
    """A sequence without its padding."""
    (text,) = sample.blocks.texts(sample.indices[position])
    return torch.from_numpy(text.astype("int64"))[None]


def plain_loss(model: Any, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits.double()
    return float(torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum"))


def bypass(model: Any, layers: list[int]) -> None:
    """In place: hidden states pass around them."""
    for layer in layers:
        layers_of(model)[layer].forward = lambda hidden, *_, **__: hidden


@pytest.mark.parametrize("model_type", [slow("llama"), "gemma3_text", slow("gpt2"), "qwen2_moe"])
def test_losses_without_each_copy_and_without_any_are_those_of_plain_forward_passes(
    tmp_path: Path, model_type: str
) -> None:
    adapted = adapted_model(tmp_path, model_type)
    sample = sample_of(tmp_path)
    found = swept(adapted, sample)
    columns = [found.with_all, found.without_any, *found.without.T]
    for column, layers in zip(columns, [[], COPIES, *([copy] for copy in COPIES)], strict=True):
        model = load(adapted)
        bypass(model, layers)
        plain = [plain_loss(model, row_of(sample, position)) for position in range(len(sample))]
        # float32 passes of a few hundred nats, in batches or one by one
        torch.testing.assert_close(column.tolist(), plain, rtol=2e-5, atol=1e-3)
    base = load(tmp_path / "base")
    without_any = [plain_loss(base, row_of(sample, position)) for position in range(len(sample))]
    torch.testing.assert_close(found.without_any.tolist(), without_any, rtol=2e-5, atol=1e-3)
    assert found.tokens.tolist() == [row_of(sample, p).shape[1] - 1 for p in range(len(sample))]


def test_what_layers_write_is_the_difference_of_their_hidden_states(tmp_path: Path) -> None:
    """Of every token but the first of a text, and of nothing that is padding."""
    adapted = adapted_model(tmp_path, "llama")
    sample = sample_of(tmp_path)
    found = swept(adapted, sample)
    assert sorted(found.written) == [0, 1, 3, 4, 6, 7]
    model = load(adapted)
    for position in range(len(sample)):
        with torch.no_grad():
            passed = model.model(input_ids=row_of(sample, position), output_hidden_states=True, use_cache=False)
        for layer, written in found.written.items():
            if layer == 7:  # the last one's output has passed the final norm
                continue
            below, above = (passed.hidden_states[i][0, 1:].double() for i in (layer, layer + 1))
            write = above - below
            wanted = {
                "squares": write.square().sum(),
                "stream_squares": below.square().sum(),
                "share_squares": (write.square().sum(1) / below.square().sum(1)).sum(),
                "sums": write.sum(0),
            }
            for name, value in wanted.items():
                torch.testing.assert_close(getattr(written, name)[position], value, rtol=1e-4, atol=1e-5)


def test_neither_chunks_nor_batches_nor_the_packing_of_documents_show(tmp_path: Path) -> None:
    adapted = adapted_model(tmp_path, "llama")
    for documents in (False, True):
        sample = sample_of(tmp_path, documents=documents)
        one, other = swept(adapted, sample, 1, 10**6), swept(adapted, sample, 3, 8)
        torch.testing.assert_close(one.without, other.without, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(one.written[4].sums, other.written[4].sums, rtol=1e-4, atol=1e-4)
        assert one.tokens.tolist() == sample.tokens()


def test_a_copy_that_is_silent_owes_nothing_and_writes_nothing(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    expand_checkpoint(base, tmp_path / "adapted", SELECTED)
    found = swept(tmp_path / "adapted", sample_of(tmp_path), rows=1)
    # The same hidden states, in stacks of other heights.
    torch.testing.assert_close(found.without, found.with_all[:, None].expand(-1, 3), rtol=1e-6, atol=1e-4)
    assert all(float(found.written[copy].squares.sum()) == 0.0 for copy in COPIES)
    assert all(float(found.written[copy - 1].squares.sum()) > 0.0 for copy in COPIES)


def test_a_variant_joins_at_its_lowest_layer_and_goes_around_the_others() -> None:
    below = stacks(6, [{1}, {1, 4}, {4}])
    assert [(stack.variants, stack.around, stack.joining) for stack in below] == [
        (1, (), 0), (1, (), 2), (3, (), 0), (3, (), 0), (3, (2,), 1), (4, (), 0),
    ]  # fmt: skip
    assert sum(len(stack.through) for stack in below) == 14
