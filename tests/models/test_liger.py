"""Kernels of liger-kernel: when they are used, what is refused, and the loss through a kernel of its interface.

No machine here has a CUDA device. Its own kernel runs in Triton's interpreter where liger-kernel and Triton are
installed; otherwise one of the same interface stands for it, written in PyTorch.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness.complaints import refused
from harness.launching import ROOT
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.models import liger as module
from adept_ds.models.head_loss import _HeadLoss
from adept_ds.models.liger import Liger, find_liger

TOKENS, VOCABULARY, DIM = 6, 50, 8


class Kernel:
    """Its interface: called with a grid, it writes losses, and gradients in the place of logits.

    Args:
        loss, gradient: factors; 1 is right.
    """

    def __init__(self, loss: float = 1.0, gradient: float = 1.0) -> None:
        self._loss, self._gradient = loss, gradient

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(
            *,
            X_ptr: torch.Tensor,  # noqa: N803
            Y_ptr: torch.Tensor,  # noqa: N803
            loss_ptr: torch.Tensor,
            ignore_index: int,
            softcap: float | None,
            **options: Any,
        ) -> None:
            assert grid == (len(X_ptr),) and options["n_cols"] <= options["BLOCK_SIZE"]
            assert options["HAS_SOFTCAPPING"] == (softcap is not None)
            counted, plain = Y_ptr != ignore_index, X_ptr.detach().float().requires_grad_(True)
            with torch.enable_grad():
                capped = plain if softcap is None else softcap * torch.tanh(plain / softcap)
                losses = F.cross_entropy(capped, Y_ptr, ignore_index=ignore_index, reduction="none")
                (gradient,) = torch.autograd.grad(losses.sum(), plain)
            loss_ptr[counted] = losses.detach()[counted] * self._loss
            if options["HAS_GRADIENTS"]:
                X_ptr.copy_(gradient * self._gradient)

        return run


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has such a device."""
    monkeypatch.setattr(module, "device_name", lambda: "cuda")
    monkeypatch.setattr(module, "current_device", lambda: torch.device("cpu"))


def installed(monkeypatch: pytest.MonkeyPatch, kernel: Any, version: str = "0.8.5") -> list[Any]:
    """liger-kernel with this kernel; what it was told to put into a model."""
    told: list[Any] = []
    ops = types.SimpleNamespace(liger_cross_entropy_kernel=kernel)
    patching = types.SimpleNamespace(
        MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None},
        _apply_liger_kernel_to_instance=lambda model, **what: told.append(what),
    )
    monkeypatch.setattr(module, "_installed_version", lambda: version)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.cross_entropy", ops)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patching)
    return told


def test_on_a_cpu_pytorch_computes_and_liger_is_refused() -> None:
    assert find_liger("auto") is None and find_liger("torch") is None
    with pytest.raises(InputError, match="CUDA devices"):
        find_liger("liger")


def test_it_is_refused_before_anything_is_done(workspace: Workspace, tmp_path: Path) -> None:
    config = workspace.config(tmp_path / "run")
    words = ["train.kernels: liger computes on CUDA devices, and this one is 'cpu'; set it to auto or torch"]
    refused(["run", config, "train.kernels=liger"], words)


def test_where_it_is_not_installed_it_is_refused_and_auto_does_without(
    cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_installed_version", lambda: None)
    assert find_liger("auto", pytest.fail) is None
    with pytest.raises(InputError) as complaint:
        find_liger("liger")
    assert str(complaint.value) == (
        "train.kernels: liger-kernel is not installed; pip install 'adept-ds[liger]', or set it to auto or torch"
    )


@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [
        (Kernel(loss=1.01), "it computes another loss"),
        (Kernel(gradient=1.01), "it computes another gradient"),
        (None, "TypeError"),
    ],
)
def test_a_version_that_computes_otherwise_is_refused_by_name_and_auto_says_so(
    cuda: None, monkeypatch: pytest.MonkeyPatch, kernel: Any, wrong: str
) -> None:
    installed(monkeypatch, kernel, "1.0.0")
    said: list[str] = []
    assert find_liger("auto", said.append) is None
    (line,) = said
    assert "liger-kernel 1.0.0 is not as 0.8.5" in line and wrong in line
    with pytest.raises(InputError, match=r"install liger-kernel==0\.8\.5, or set it to auto or torch"):
        find_liger("liger")


def test_rope_norms_and_swiglu_go_into_models_it_knows_and_of_others_it_says_so_once(
    cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    told = installed(monkeypatch, Kernel())
    liger = find_liger("auto", said.append)
    assert liger is not None and said == []
    for kind in ("llama", "gpt2", "gpt2"):
        model: Any = torch.nn.Module()
        model.config = types.SimpleNamespace(model_type=kind)
        liger.put_into(model)
    kernels = {"rope": True, "rms_norm": True, "swiglu": True}
    assert told == [kernels | {"cross_entropy": False, "fused_linear_cross_entropy": False}]
    assert liger.takes(1.0) and not liger.takes(8.0) and not liger.takes(8.0)
    assert said == [
        "liger-kernel has no layers for 'gpt2': they stay with PyTorch",
        "liger-kernel does not divide logits: the head's loss stays with PyTorch",
    ]


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("trains", [(True, False), (True, True)], ids=["frozen head", "head trains"])
def test_losses_and_gradients_through_the_kernel_are_those_of_pytorch(
    cap: float | None, trains: tuple[bool, bool]
) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([[3, -100, 49], [0, 7, -100]])
    ours, plain = [
        [torch.randn(shape, generator=generator.manual_seed(1)) for shape in ((2, 3, DIM), (VOCABULARY, DIM), (50,))]
        for _ in range(2)
    ]
    found = []
    for tensors, liger in ((ours, Liger(Kernel(), print, frozenset())), (plain, None)):
        hidden, weight, bias = tensors
        hidden.requires_grad_(trains[0])
        for tensor in (weight, bias):
            tensor.requires_grad_(trains[1])
        losses = _HeadLoss.apply(hidden, labels, weight, bias, 1.0, cap, liger)
        (losses.sum() * 0.3).backward()
        found.append([losses.detach(), *(tensor.grad for tensor in tensors)])
    for mine, wanted in zip(*found, strict=True):
        assert (mine is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(mine, wanted, rtol=2e-6, atol=2e-6)  # sums in another order


@pytest.mark.skipif(
    not (importlib.util.find_spec("liger_kernel") and importlib.util.find_spec("triton")),
    reason="needs liger-kernel and triton: make test-kernels",
)
def test_its_own_kernel_computes_what_is_expected_of_it() -> None:
    """In Triton's interpreter, which has to be chosen before it is imported, and takes no number for a cap."""
    program = (
        "import functools, torch\n"
        "from adept_ds.models import liger\n"
        "liger.device_name, liger.current_device = lambda: 'cuda', lambda: torch.device('cpu')\n"
        "liger._disagreement = functools.partial(liger._disagreement, caps=[None])\n"
        "assert liger.find_liger('liger', print) is not None\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
