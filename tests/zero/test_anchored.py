"""However an anchor's passes are done, training is the same: what is kept, gathered, recomputed; and half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness.anchor_worker import STEPS
from harness.launching import launch
from harness.marks import slow
from harness.workspace import Workspace

DOMAIN_PASSES = STEPS * 2
"""Of a rank: four sequences a step, one at a time on two ranks."""


GROUPS = (("kl", "bf16"), ("neutral", "fp16"))
"""At every commit, and slow: what is trained together."""


class Found(dict[str, Any]):
    """On two ranks, when it is asked for; under ZeRO-3 nothing stays gathered unless it is said."""

    def __init__(self, workspace: Workspace, folder: Path) -> None:
        super().__init__()
        self._workspace, self._folder = workspace, folder

    def __missing__(self, name: str) -> Any:
        parts = next(group for group in GROUPS if name.partition(" ")[0] in group)
        output = self._folder / parts[0] / "found.pt"
        output.parent.mkdir()
        result = launch(2, ["-m", "harness.anchor_worker", str(self._workspace.root), str(output), *parts])
        assert result.returncode == 0, result.stderr[-4000:]
        self.update(torch.load(output))
        return self[name]


@pytest.fixture(scope="module")
def found(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return Found(workspace, tmp_path_factory.mktemp("anchors"))


@pytest.mark.parametrize("kind", ["kl", slow("neutral")])
@pytest.mark.parametrize("how", ["kept in part", "not kept"])
def test_how_passes_are_done_changes_no_bit(found: dict[str, Any], kind: str, how: str) -> None:
    """Activations that are recomputed, frozen weights that stay gathered, and importances estimated between."""
    usual, other = found[f"{kind} kept"], found[f"{kind} {how}"]
    assert other["anchors"] == usual["anchors"]
    assert usual["anchors"][-1] > 1e-5
    assert all(torch.equal(weight, other["trained"][name]) for name, weight in usual["trained"].items())


@pytest.mark.parametrize("kind", ["kl", slow("neutral")])
def test_what_the_base_computes_is_computed_once(found: dict[str, Any], kind: str) -> None:
    """Three sequences a step, one by one on two ranks, which see five of them, and nothing, once at first: six passes
    at most. An anchored pass begins above the lowest layer. Seven sequences are probed, in batches of five and two.
    """
    assert DOMAIN_PASSES < found[f"{kind} kept"]["runs"] <= DOMAIN_PASSES + 6
    assert found[f"{kind} kept"]["runs"] < found[f"{kind} kept in part"]["runs"]
    assert found[f"{kind} not kept"]["runs"] == DOMAIN_PASSES + STEPS * 2 + 3 + 1


@pytest.mark.parametrize("what", ["bf16 neutral", slow("fp16 kl")])
def test_in_half_precision_a_strong_anchor_holds(found: dict[str, Any], what: str) -> None:
    """It begins at nothing, up to rounding, and leaves less than a weak one; in fp16 losses are scaled as ever."""
    weak, strong = (found[f"{what} {weight:g}"]["anchors"] for weight in (1e-3, 1e3))
    assert abs(weak[0]) < 1e-3
    assert 0 < strong[-1] < weak[-1] / 2
    assert (found[f"{what} 1000"]["loss_scale"] > 1) == what.startswith("fp16")
