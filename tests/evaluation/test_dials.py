"""Models between base and adapted: as plain PyTorch on checkpoints that are interpolated by hand, file by file.

Real ranks evaluate documents of unlike lengths in batches of several; the oracle takes one document at a time, cut into
sequences, without padding, and knows which tensors silence copies from the expanded checkpoint itself.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.dial_worker import EACH, MAX_TOKENS, POSITIONS, SEQ_LEN, SOURCES
from harness.launching import launch
from harness.marks import slow
from harness.models import save_byte_tokenizer, save_tiny_model
from harness.packing import write_texts
from harness.plain_evaluation import document_sums
from safetensors.torch import load_file, save_file

from adept_ds.weights.expansion import expand_checkpoint
from adept_ds.weights.turning import write_turned

MODELS = ("llama", "gemma2", "qwen3_moe", "gpt2")
"""A tied head; norms that write to the residual stream, silent at -1; experts that files hold apart; biases."""
CELLS = {
    1: [f"{model}/{kind}/zero2" for model in MODELS[:2] for kind in ("copies", "interpolation")],
    2: [
        *(f"{model}/{kind}/strict" for model in MODELS for kind in ("copies", "interpolation")),
        *(f"llama/{kind}/{zero}" for kind in ("copies", "interpolation") for zero in ("zero2", "zero3")),
        "llama/interpolation/offload",
    ],
}
AT_EVERY_COMMIT = [
    *("gemma2/copies/strict", "llama/copies/zero2", "llama/interpolation/zero3", "llama/interpolation/offload"),
]
"""Of those of two ranks."""


def is_slow(ranks: int, cell: str) -> bool:
    return ranks == 1 or cell not in AT_EVERY_COMMIT


def every(*kinds: str) -> list[Any]:
    """Cells of these kinds of methods, as parameters of a test."""
    cells = [(ranks, cell) for ranks, of in CELLS.items() for cell in of if cell.split("/")[1] in kinds]
    return [slow(*case) if is_slow(*case) else case for case in cells]


EVERY, COPIES = every("copies", "interpolation"), every("copies")
SMALL = {"num_hidden_layers": 3, "n_layer": 3}
TEXTS = {
    "general_one": ["the norm of x", "a", "is zero and the sum of the layer is seven, which is a proof", "matrix"],
    "general_two": ["sum", "x" * 40],
    "domain_one": ["y" * 200, "never read"],
}
"""One is longer than a sequence; one alone is longer than what is evaluated."""


def move(directory: Path, layers: Sequence[int] | None) -> None:
    """Other weights in every tensor, or in those of some layers."""
    tensors, generator = load_file(directory / "model.safetensors"), torch.Generator().manual_seed(1)
    for name in sorted(tensors):
        layer = re.search(r"\.(\d+)\.", name)
        if layers is None or (layer and int(layer[1]) in layers):
            tensors[name] = tensors[name] + 0.05 * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def halfway(origin: Path, adapted: Path, destination: Path, only: set[str] | None = None) -> None:
    """A checkpoint with the mean of two, of all tensors or of some."""
    shutil.copytree(adapted, destination)
    ends = [load_file(directory / "model.safetensors") for directory in (origin, adapted)]
    tensors = {
        name: ends[0][name] + 0.5 * (trained - ends[0][name]) if only is None or name in only else trained
        for name, trained in ends[1].items()
    }
    save_file(tensors, destination / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dials")
    save_byte_tokenizer(folder / "tokenizer")
    for name, texts in TEXTS.items():
        write_texts(folder / f"{name}.jsonl", *texts)
    for model in MODELS:
        base, expanded = save_tiny_model(folder / model / "base", model, **SMALL), folder / model / "expanded"
        expansion = expand_checkpoint(base, expanded, [0, 2])
        kinds = [("copies", expanded, expansion.copy_indices, set(expansion.silenced))]
        for kind, origin, layers, only in [*kinds, ("interpolation", base, None, None)]:
            adapted = shutil.copytree(origin, folder / model / kind)
            move(adapted, layers)
            halfway(origin, adapted, folder / model / f"half_{kind}", only)
        write_turned(folder / model / "copies", folder / model / "each", EACH)
    return folder


class Outcomes(dict[tuple[int, str], Any]):
    """By number of ranks and cell, found when they are asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, key: tuple[int, str]) -> Any:
        ranks, output = key[0], self._folder / f"found_{len(self)}.pt"
        cells = [cell for cell in CELLS[ranks] if is_slow(ranks, cell) == is_slow(*key)]
        result = launch(ranks, ["-m", "harness.dial_worker", str(self._folder), str(output), *cells])
        assert result.returncode == 0, result.stderr
        of_cells = torch.load(output, weights_only=False)
        self.update({(ranks, cell): of for cell, of in of_cells.items()})
        return self[key]


@pytest.fixture(scope="module")
def found(folder: Path) -> Outcomes:
    return Outcomes(folder)


@functools.cache
def expected(model_dir: Path, tokenizer: Path) -> dict[str, list[float]]:
    """Of each source, the sum of each document's token losses."""
    return {
        name: document_sums(model_dir, tokenizer, texts if name != "domain_one" else texts[:1], SEQ_LEN, MAX_TOKENS)
        for name, texts in TEXTS.items()
    }


def assert_same(sums: dict[Any, np.ndarray], wanted: dict[str, list[float]]) -> None:
    """To the rounding of a forward pass in float32: losses of tokens are about 6."""
    assert list(sums) == list(SOURCES)
    for source, values in sums.items():
        assert values.tolist() == pytest.approx(wanted[f"{source.corpus}_{source.source}"], rel=2e-6)


@pytest.mark.parametrize(("ranks", "cell"), EVERY)
def test_documents_have_the_losses_that_they_have_alone(found: Outcomes, folder: Path, ranks: int, cell: str) -> None:
    model, kind, _ = cell.split("/")
    assert_same(found[ranks, cell]["base"], expected(folder / model / "base", folder / "tokenizer"))
    assert_same(found[ranks, cell]["adapted"], expected(folder / model / kind, folder / "tokenizer"))


@pytest.mark.parametrize(("ranks", "cell"), EVERY)
def test_halfway_is_what_checkpoints_that_are_interpolated_by_hand_compute(
    found: Outcomes, folder: Path, ranks: int, cell: str
) -> None:
    model, kind, _ = cell.split("/")
    assert_same(found[ranks, cell][0.5], expected(folder / model / f"half_{kind}", folder / "tokenizer"))


@pytest.mark.parametrize(("ranks", "cell"), EVERY)
def test_at_its_ends_the_dial_gives_base_and_adapted_model_bit_for_bit(found: Outcomes, ranks: int, cell: str) -> None:
    of = found[ranks, cell]
    assert POSITIONS[-1] == 1 and of["bits"]
    for source in SOURCES:
        assert np.array_equal(of[1.0][source], of["adapted"][source])
        assert np.array_equal(of[0.0][source], of["base"][source])
        assert not np.array_equal(of[0.25][source], of[0.5][source])


@pytest.mark.parametrize(("ranks", "cell"), COPIES)
def test_copies_at_positions_of_their_own_are_the_model_that_is_written_so(
    found: Outcomes, folder: Path, ranks: int, cell: str
) -> None:
    """Which `tests/weights/test_turning.py` compares with torch, tensor by tensor."""
    assert_same(found[ranks, cell]["each"], expected(folder / cell.split("/")[0] / "each", folder / "tokenizer"))


@pytest.mark.parametrize(("ranks", "cell"), COPIES)
def test_what_lies_below_the_lowest_copy_is_computed_once_and_losses_are_the_same_bit_for_bit(
    found: Outcomes, ranks: int, cell: str
) -> None:
    """At two positions; where all passes are kept, and where the last is not. Layer 0 is below, of copies 1 and 4."""
    of = found[ranks, cell]
    for left_out in (0, 1):
        for source in SOURCES:
            assert np.array_equal(of[f"first/{left_out}"][source], of[0.5][source])
            assert np.array_equal(of[f"each_again/{left_out}"][source], of["each"][source])
        calls, passes = of[f"calls/{left_out}"]
        assert calls == (0 if cell.startswith("gpt2") else passes + left_out)
