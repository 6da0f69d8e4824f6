"""Every parameter trains, embeddings and heads too, as in plain PyTorch: at every ZeRO stage, on one rank and on two.

Each cell is a training of four steps on real ranks, with two micro-batches a step, clipping, and another learning rate
for every unit; the oracle is `torch.optim.AdamW` on a plain transformers model, in one process.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from harness.launching import launch
from harness.marks import slow
from harness.models import save_tiny_model
from harness.whole_worker import LISTENING, LR, OPTIONS, PULL, SAVED_AFTER, batches, unlike_multipliers

from adept_ds.weights.export import export_checkpoint, read_zero_checkpoint

TABLE = ("llama", "qwen2")
"""A tied head and one of its own."""
OTHERS = ("gemma2", "gpt2", "gpt_neox", "mixtral")
"""A cap, learned positions, a head that files call otherwise, experts that files hold apart."""
CELLS = {
    1: ["llama/zero1/plain", "llama/zero2/resumed", "llama/strict/resumed", "qwen2/zero3/pulled", "qwen2/zero1/pulled"],
    2: [
        *(f"{model}/{zero}/resumed" for model in TABLE for zero in ("zero1", "zero2", "strict")),
        *(f"{model}/{zero}/plain" for model in TABLE for zero in ("zero1", "zero2", "strict")),
        *(f"llama/{zero}/pulled" for zero in ("zero1", "zero2", "zero3", "zero3_offload")),
        "qwen2/zero3/recomputed",
        "qwen2/zero3_offload/plain",
        *(f"llama/{zero}/fp16" for zero in ("zero2", "zero3", "zero3_offload")),
        *(f"{model}/strict/exported" for model in OTHERS),
    ],
}
"""Model / ZeRO setting / variant, by number of ranks."""
AT_EVERY_COMMIT = {
    1: ["llama/strict/resumed", "qwen2/zero1/pulled"],
    2: [
        *("llama/zero1/resumed", "llama/zero1/plain", "qwen2/strict/resumed", "qwen2/strict/plain"),
        *("llama/zero2/pulled", "llama/zero3_offload/pulled", "qwen2/zero3/recomputed", "llama/zero2/fp16"),
        *("gpt2/strict/exported", "mixtral/strict/exported"),
    ],
}
"""Of them: each setting and each variant."""


def is_slow(world_size: int, cell: str) -> bool:
    return cell not in AT_EVERY_COMMIT[world_size]


SMALL = {"num_hidden_layers": 2, "n_layer": 2, "max_window_layers": 1}
NO_DROPOUT = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    for model_type in (*TABLE, *OTHERS):
        save_tiny_model(folder / model_type, model_type, **SMALL, **NO_DROPOUT)
    return folder


class Outcomes(dict[tuple[int, bool], dict[str, Any]]):
    """By number of ranks and whether they are slow, trained when they are asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, key: tuple[int, bool]) -> dict[str, Any]:
        world_size, are_slow = key
        cells = [cell for cell in CELLS[world_size] if is_slow(world_size, cell) == are_slow]
        output = self._folder / f"outcomes_{len(self)}.pt"
        result = launch(world_size, ["-m", "harness.whole_worker", str(self._folder), str(output), *cells])
        assert result.returncode == 0, result.stderr
        return self.setdefault(key, dict(torch.load(output, weights_only=False)))

    def of(self, world_size: int, cell: str) -> dict[str, Any]:
        """All that was trained together with a cell."""
        return self[world_size, is_slow(world_size, cell)]


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> Outcomes:
    return Outcomes(folder)


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[tuple[str, bool], oracle.WholeTraining]:
    """By model, and whether weights are pulled towards another place."""
    found = {}
    for name in TABLE:
        for pulled in (False, True):
            model = oracle.load(folder / name)
            factors = unlike_multipliers({oracle.unit_of(parameter) for parameter, _ in model.named_parameters()})
            pull = PULL if pulled else 0.0
            found[name, pulled] = oracle.train_whole(model, batches(), LR, factors, OPTIONS, pull)
    return found


def every(*variants: str) -> list[Any]:
    cells = [(size, cell) for size, of in CELLS.items() for cell in of if cell.rpartition("/")[2] in variants]
    return [slow(*case) if is_slow(*case) else case for case in cells]


@pytest.mark.parametrize(("world_size", "cell"), every("plain", "pulled", "recomputed", "resumed"))
def test_training_is_that_of_plain_adamw(
    outcomes: Outcomes,
    plain: dict[tuple[str, bool], oracle.WholeTraining],
    world_size: int,
    cell: str,
) -> None:
    """In fp32: weights of order 1 to 1e-5 after every step, losses and norms to 1e-5 relative."""
    mine = outcomes.of(world_size, cell)[cell]
    wanted = plain[cell.partition("/")[0], cell.endswith("pulled")]
    assert mine["losses"] == pytest.approx(wanted.losses, rel=1e-5)
    assert mine["norms"] == pytest.approx(wanted.norms, rel=1e-5)
    assert mine["products"] == pytest.approx(wanted.products, rel=1e-4)
    for found, expected in zip(mine["weights"], wanted.weights, strict=True):
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5, msg=name)


def test_clipping_acted_and_the_pull_too(plain: dict[tuple[str, bool], oracle.WholeTraining]) -> None:
    """Otherwise the table would prove little."""
    for name in TABLE:
        assert min(plain[name, False].norms) > OPTIONS["clip_grad_norm"]
        for apart, pulled in zip(plain[name, False].norms, plain[name, True].norms, strict=True):
            assert abs(apart - pulled) > 0.05 * apart


@pytest.mark.parametrize(("world_size", "cell"), every("fp16"))
def test_what_is_added_in_fp16_knows_the_loss_scale(
    outcomes: Outcomes,
    plain: dict[tuple[str, bool], oracle.WholeTraining],
    world_size: int,
    cell: str,
) -> None:
    """Norms to 2 %, after what steps have made of rounding; the loss scale is 1024."""
    wanted = plain[cell.partition("/")[0], True]
    assert outcomes.of(world_size, cell)[cell]["norms"] == pytest.approx(wanted.norms, rel=2e-2)


@pytest.mark.parametrize(("world_size", "cell"), every("resumed"))
def test_a_checkpoint_holds_every_weight_and_training_goes_on_bit_for_bit(
    outcomes: Outcomes, world_size: int, cell: str
) -> None:
    together = outcomes.of(world_size, cell)
    resumed, whole = together[cell], together.get(cell.replace("resumed", "plain"))
    saved = resumed["weights"][SAVED_AFTER - 1]
    stored = read_zero_checkpoint(resumed["checkpoints"])
    tied = {"lm_head.weight"} if cell.startswith("llama") else set()
    assert stored.keys() - tied == saved.keys()
    assert all(torch.equal(stored[name], weight) for name, weight in saved.items())
    assert all(torch.equal(stored[name], saved["model.embed_tokens.weight"]) for name in tied & stored.keys())
    if whole is not None:
        assert resumed["losses"] == whole["losses"] and resumed["norms"] == whole["norms"]
        for mine, others in zip(resumed["weights"], whole["weights"], strict=True):
            assert all(torch.equal(mine[name], weight) for name, weight in others.items())


@pytest.mark.parametrize("model_type", [slow("gemma2"), "gpt2", slow("gpt_neox"), "mixtral"])
def test_a_whole_model_of_another_shape_is_trained_and_exported(
    folder: Path, outcomes: Outcomes, tmp_path: Path, model_type: str
) -> None:
    """With the same tolerances; the exported directory holds the trained weights to the last bit.

    Where positions do not turn keys, softmax takes no notice of their bias: its gradient is rounding alone, of which
    AdamW makes whole steps.
    """
    cell, model = f"{model_type}/strict/exported", oracle.load(folder / model_type)
    mine = outcomes.of(2, cell)[cell]
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    wanted = oracle.train_whole(model, batches(), LR, defaultdict(lambda: 1.0), OPTIONS)
    assert mine["losses"] == pytest.approx(wanted.losses, rel=1e-5)
    assert mine["norms"] == pytest.approx(wanted.norms, rel=1e-5)
    moved = math.hypot(*(float((wanted.weights[-1][name] - weight).norm()) for name, weight in start.items()))
    assert mine["moved"] == pytest.approx(moved, rel=1e-4)
    export_checkpoint(folder / model_type, mine["checkpoints"], tmp_path / "export")
    exported = dict(oracle.load(tmp_path / "export").named_parameters())
    assert exported.keys() == wanted.weights[-1].keys()
    for name, weight in wanted.weights[-1].items():
        assert torch.equal(exported[name], mine["weights"][-1][name]), name
        if not name.endswith(("c_attn.bias", "query_key_value.bias")):
            torch.testing.assert_close(exported[name], weight, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("world_size", CELLS)
def test_no_port_listens_beyond_the_rendezvous(outcomes: Outcomes, world_size: int) -> None:
    """After all that training, saving and loading: gloo's own ends stay on the interface that ranks share."""
    for rank, (rendezvous, groups, found) in enumerate(outcomes[world_size, False][LISTENING]):
        open_to_all = [port for host, port in found if set(host) == {"0"}]
        assert open_to_all == ([rendezvous] if rank == 0 else [])
        assert {host for host, _ in found if set(host) != {"0"}} == {"0100007F"}
        assert len(found) - len(open_to_all) <= groups


@pytest.mark.parametrize("are_slow", [False, slow(True)])
def test_where_nothing_is_frozen_nothing_is_kept_gathered(outcomes: Outcomes, are_slow: bool) -> None:
    together = [*outcomes[1, are_slow].values(), *outcomes[2, are_slow].values()]
    kept = [outcome["kept"] for outcome in together if "kept" in outcome]
    assert kept and set(kept) == {(0, 0)}
