"""An anchor's passes are what plain models say: base and adapted model apart, every family, with autograd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from harness.expanding import COPIES, SELECTED, layers_of, load
from harness.families import MOSTLY_SLOW_FAMILIES
from harness.marks import slow
from harness.models import VOCABULARY, save_tiny_model
from safetensors.torch import load_file, save_file

from adept_ds.models.anchor_passes import AnchorPasses, Kind
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.head_loss import IGNORED_LABEL
from adept_ds.models.loading import checkpoint_activations, layers_train, load_causal_lm
from adept_ds.weights.expansion import expand_checkpoint

ROWS, TOKENS = 2, 24  # longer than the sliding windows of 16
PADDED = 17
"""Tokens of the second row."""


@pytest.fixture(scope="module", params=MOSTLY_SLOW_FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source/`, and `expanded/` with copies that write."""
    root = tmp_path_factory.mktemp(request.param)
    silenced = expand_checkpoint(save_tiny_model(root / "source", request.param), root / "expanded", SELECTED).silenced
    tensors = load_file(root / "expanded" / "model.safetensors")
    for name in silenced:
        tensors[name] += 0.3 * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(1))
    save_file(tensors, root / "expanded" / "model.safetensors", metadata={"format": "pt"})
    return root


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(VOCABULARY - 6, (ROWS, TOKENS), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[1, PADDED:] = IGNORED_LABEL
    return ids, labels


def plain_kl(adapted: Any, base: Any) -> torch.Tensor:
    ids, labels = rows()
    with torch.no_grad():
        p = base(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    q = adapted(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    each = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    return (each * (labels[:, 1:] != IGNORED_LABEL)).sum(-1)


def plain_neutral(adapted: Any, _: Any) -> torch.Tensor:
    ids, labels = rows()
    shares: list[torch.Tensor] = []

    def measure(_: Any, inputs: tuple[Any, ...], output: Any) -> None:
        stream, after = inputs[0], output[0] if isinstance(output, tuple) else output
        shares.append(((after - stream) ** 2).sum(-1) / (stream.detach() ** 2).sum(-1))

    for copy in COPIES:
        layers_of(adapted)[copy].register_forward_hook(measure)
    adapted(input_ids=ids, use_cache=False)
    mean = sum(shares) / len(COPIES)
    assert isinstance(mean, torch.Tensor)
    return (mean * (labels != IGNORED_LABEL))[:, 1:].sum(-1)


PLAIN: dict[str, Callable[[Any, Any], torch.Tensor]] = {"kl": plain_kl, "neutral": plain_neutral}


def gradients(model: Any) -> list[torch.Tensor]:
    found = []
    for copy in COPIES:
        for name, parameter in layers_of(model)[copy].named_parameters():
            assert parameter.grad is not None, name
            found.append(parameter.grad.clone())
    return found


@pytest.mark.parametrize("recompute", [False, slow(True)], ids=["", "recomputed"])
@pytest.mark.parametrize("kind", get_args(Kind))
def test_an_anchor_and_its_gradient_are_those_of_plain_models(folder: Path, kind: Kind, recompute: bool) -> None:
    """1e-4 relative in fp32: sums of some thousand terms in another order; a wrong layer or token shows at 1e-1."""
    source = ModelDirectory.read(folder / "expanded")
    ours: Any = load_causal_lm(source, torch.float32).eval()
    layers_train(source.family, COPIES).prepare(ours)
    if recompute:
        checkpoint_activations(ours, source.family, COPIES[0])
    passes = AnchorPasses(ours, source.family, COPIES, kind)
    with torch.no_grad(), passes.of_base():
        known = ours(*rows())
    assert known.shape[:3] == (ROWS, passes.num_states, TOKENS)
    with passes.anchored(known):
        found = ours(*rows())
        (found * torch.tensor([1.0, 3.0])).sum().backward()

    adapted, base = load(folder / "expanded"), load(folder / "source")
    adapted.requires_grad_(False)
    for copy in COPIES:
        layers_of(adapted)[copy].requires_grad_(True)
    expected = PLAIN[kind](adapted, base)
    (expected * torch.tensor([1.0, 3.0])).sum().backward()

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert float(expected.detach().min()) > 1e-2, "copies must write for this to mean anything"
    for got, wanted in zip(gradients(ours), gradients(adapted), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * max(1.0, float(wanted.abs().max())))
    assert all(parameter.grad is None for parameter in layers_of(ours)[COPIES[0] - 1].parameters())


@pytest.mark.parametrize("kind", get_args(Kind))
def test_afterwards_the_model_is_as_it_was(tmp_path: Path, kind: Kind) -> None:
    directory = save_tiny_model(tmp_path / "source")
    expand_checkpoint(directory, tmp_path / "expanded", SELECTED)
    source = ModelDirectory.read(tmp_path / "expanded")
    model: Any = load_causal_lm(source, torch.float32).eval()
    before = model(*rows())
    passes = AnchorPasses(model, source.family, COPIES, kind)
    with torch.no_grad():
        with passes.of_base():
            known = model(*rows())
        with passes.anchored(known):
            anchored = model(*rows())
    # Fresh copies are silent: the same numbers in the same order.
    assert float(anchored.abs().max()) < 1e-6
    assert torch.equal(model(*rows()), before)
