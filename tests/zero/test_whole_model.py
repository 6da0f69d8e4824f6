"""Every parameter trains, embeddings and heads too, as in plain PyTorch: at every ZeRO stage, on one rank and on two.

Each cell is a training of four steps on real ranks, with two micro-batches a step, clipping, and another learning rate
for every unit; the oracle is `torch.optim.AdamW` on a plain transformers model, in one process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from harness.launching import launch
from harness.models import save_tiny_model
from harness.whole_worker import LR, OPTIONS, PULL, SAVED_AFTER, batches, unlike_multipliers

from adept_ds.weights.export import read_zero_checkpoint

MODELS = {"tied": "llama", "untied": "qwen2"}
CELLS = {
    1: ["tied/zero1/plain", "tied/zero2/resumed", "tied/strict/resumed", "untied/zero3/pulled", "untied/zero1/pulled"],
    2: [
        *(f"{model}/{zero}/resumed" for model in MODELS for zero in ("zero1", "zero2", "strict")),
        *(f"{model}/{zero}/plain" for model in MODELS for zero in ("zero1", "zero2", "strict")),
        *(f"tied/{zero}/pulled" for zero in ("zero1", "zero2", "zero3", "zero3_offload")),
        "untied/zero3/recomputed",
        "untied/zero3_offload/plain",
        *(f"tied/{zero}/fp16" for zero in ("zero2", "zero3", "zero3_offload")),
    ],
}
"""Model / ZeRO setting / variant, by number of ranks."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    for name, model_type in MODELS.items():
        options = {"num_hidden_layers": 2, "max_window_layers": 1}
        save_tiny_model(folder / name, model_type, **options)
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[int, dict[str, Any]]:
    found = {}
    for world_size, cells in CELLS.items():
        output = folder / f"outcomes_{world_size}.pt"
        result = launch(world_size, ["-m", "harness.whole_worker", str(folder), str(output), *cells])
        assert result.returncode == 0, result.stderr
        found[world_size] = dict(torch.load(output, weights_only=False))
    return found


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[tuple[str, bool], oracle.WholeTraining]:
    """By model, and whether weights are pulled towards another place."""
    found = {}
    for name in MODELS:
        for pulled in (False, True):
            model = oracle.load(folder / name)
            factors = unlike_multipliers({oracle.unit_of(parameter) for parameter, _ in model.named_parameters()})
            pull = PULL if pulled else 0.0
            found[name, pulled] = oracle.train_whole(model, batches(), LR, factors, OPTIONS, pull)
    return found


def every(*variants: str) -> list[tuple[int, str]]:
    return [(size, cell) for size, cells in CELLS.items() for cell in cells if cell.rpartition("/")[2] in variants]


@pytest.mark.parametrize(("world_size", "cell"), every("plain", "pulled", "recomputed", "resumed"))
def test_training_is_that_of_plain_adamw(
    outcomes: dict[int, dict[str, Any]],
    plain: dict[tuple[str, bool], oracle.WholeTraining],
    world_size: int,
    cell: str,
) -> None:
    """In fp32: weights of order 1 to 1e-5 after every step, losses and norms to 1e-5 relative."""
    mine, wanted = outcomes[world_size][cell], plain[cell.partition("/")[0], cell.endswith("pulled")]
    assert mine["losses"] == pytest.approx(wanted.losses, rel=1e-5)
    assert mine["norms"] == pytest.approx(wanted.norms, rel=1e-5)
    assert mine["products"] == pytest.approx(wanted.products, rel=1e-4)
    for found, expected in zip(mine["weights"], wanted.weights, strict=True):
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5, msg=name)


def test_clipping_acted_and_the_pull_too(plain: dict[tuple[str, bool], oracle.WholeTraining]) -> None:
    """Otherwise the table would prove little."""
    for name in MODELS:
        assert min(plain[name, False].norms) > OPTIONS["clip_grad_norm"]
        for apart, pulled in zip(plain[name, False].norms, plain[name, True].norms, strict=True):
            assert abs(apart - pulled) > 0.05 * apart


@pytest.mark.parametrize(("world_size", "cell"), every("fp16"))
def test_what_is_added_in_fp16_knows_the_loss_scale(
    outcomes: dict[int, dict[str, Any]],
    plain: dict[tuple[str, bool], oracle.WholeTraining],
    world_size: int,
    cell: str,
) -> None:
    """Norms to 2 %, after what steps have made of rounding; the loss scale is 1024."""
    wanted = plain[cell.partition("/")[0], True]
    assert outcomes[world_size][cell]["norms"] == pytest.approx(wanted.norms, rel=2e-2)


@pytest.mark.parametrize(("world_size", "cell"), every("resumed"))
def test_a_checkpoint_holds_every_weight_and_training_goes_on_bit_for_bit(
    outcomes: dict[int, dict[str, Any]], world_size: int, cell: str
) -> None:
    resumed, whole = outcomes[world_size][cell], outcomes[world_size].get(cell.replace("resumed", "plain"))
    saved = resumed["weights"][SAVED_AFTER - 1]
    stored = read_zero_checkpoint(resumed["checkpoints"])
    tied = {"lm_head.weight"} if cell.startswith("tied") else set()
    assert stored.keys() - tied == saved.keys()
    assert all(torch.equal(stored[name], weight) for name, weight in saved.items())
    assert all(torch.equal(stored[name], saved["model.embed_tokens.weight"]) for name in tied & stored.keys())
    if whole is not None:
        assert resumed["losses"] == whole["losses"] and resumed["norms"] == whole["norms"]
        for mine, others in zip(resumed["weights"], whole["weights"], strict=True):
            assert all(torch.equal(mine[name], weight) for name, weight in others.items())


def test_where_nothing_is_frozen_nothing_is_kept_gathered(outcomes: dict[int, dict[str, Any]]) -> None:
    kept = [outcome["kept"] for cells in outcomes.values() for outcome in cells.values() if "kept" in outcome]
    assert kept and set(kept) == {(0, 0)}
