"""Kernels of liger-kernel (`train.kernels`): the head's loss, rotary positions, norms, SwiGLU. Nobody else knows it.

Read from liger-kernel 0.8.5. What of it serves here:

- `_apply_liger_kernel_to_instance`, which transformers' own trainer calls too, puts rope, RMSNorm and SwiGLU kernels
  into a loaded model of the types that it knows, and into transformers' modules, for models that are loaded later.
- The kernel of its fused linear cross entropy, `liger_cross_entropy_kernel`, goes over a chunk of logits twice and
  leaves the gradient in their place: 6 bytes a logit where PyTorch's operations move about 40. It takes biases (before
  it) and caps; logits that are divided (Granite) stay with PyTorch.

Not the function around that kernel (`liger_fused_linear_cross_entropy`): it asks the device in every call how many
labels count, and the host waits; for losses by token, which rows are summed of, it computes all logits once more in the
backward pass; and its chunks hold as many logits as hidden states, 128 of 4,096 tokens at a vocabulary of 128k. The
product with the head is fused with the kernel by `head_loss`, chunk by chunk, instead.

Whether the kernel computes what is expected of it is tried at start, on a few numbers.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from adept_ds.base.errors import InputError
from adept_ds.models.device import current_device, device_name

WRITTEN_AGAINST = "0.8.5"
Wanted = Literal["auto", "torch", "liger"]
_IGNORED_LABEL = -100
_LARGEST_BLOCK = 1 << 15


@dataclass(frozen=True)
class Liger:
    """What is used of an installed liger-kernel.

    Args:
        kernel: its `liger_cross_entropy_kernel`.
        patch: its `_apply_liger_kernel_to_instance`.
        types: `model_type`s that `patch` knows.
        say: is told once of whatever stays with PyTorch.
    """

    kernel: Any
    patch: Callable[..., None]
    types: frozenset[str]
    say: Callable[[str], None] = lambda line: None
    _said: set[str] = field(default_factory=set)

    def put_into(self, model: torch.nn.Module) -> None:
        """Rope, norms and SwiGLU of a loaded model; nothing of its head or loss."""
        kind: Any = model.config.model_type  # type: ignore[union-attr]
        if kind not in self.types:
            self._say_once(f"liger-kernel has no layers for '{kind}': they stay with PyTorch")
            return
        self.patch(model, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False)

    def takes(self, divisor: float) -> bool:
        """Whether `cross_entropy` can be used with logits that are divided so."""
        if divisor != 1:
            self._say_once("liger-kernel does not divide logits: the head's loss stays with PyTorch")
        return divisor == 1

    def cross_entropy(
        self, logits: torch.Tensor, labels: torch.Tensor, cap: float | None, with_gradient: bool
    ) -> torch.Tensor:
        """Loss of each token, 0 where the label is ignored. [tokens] float32

        Args:
            logits: as the head says them; `with_gradient`, the loss' gradient stands in their place afterwards, with
                respect to them as they were before the cap. [tokens, vocab], contiguous
            labels: [tokens] int64
            cap: see `head_logits`.
        """
        tokens, vocabulary = logits.shape
        losses = torch.zeros(tokens, dtype=torch.float32, device=logits.device)  # it writes none that is ignored
        self.kernel[(tokens,)](
            X_ptr=logits,
            X_stride=logits.stride(0),
            Y_ptr=labels,
            Y_stride=labels.stride(0),
            weight_ptr=None,
            loss_ptr=losses,
            z_loss_ptr=None,
            loss_stride=losses.stride(0),
            token_accuracy_ptr=None,
            token_accuracy_stride=0,
            predicted_tokens_ptr=None,
            predicted_tokens_stride=0,
            n_cols=vocabulary,
            n_non_ignore=1,  # of a mean
            sum_non_ignore_weight=1,
            weight_sum=0.0,
            ignore_index=_IGNORED_LABEL,
            lse_square_scale=0.0,
            label_smoothing=0.0,
            reduction="sum",
            softcap=cap,
            RETURN_Z_LOSS=False,
            RETURN_TOKEN_ACCURACY=False,
            RETURN_PREDICTED_TOKENS=False,
            BLOCK_SIZE=min(_LARGEST_BLOCK, 1 << (vocabulary - 1).bit_length()),
            HAS_WEIGHT=False,
            HAS_SOFTCAPPING=cap is not None,
            HAS_GRADIENTS=with_gradient,
            num_warps=16 if torch.version.hip else 32,
        )
        return losses

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.say(line)


def find_liger(wanted: Wanted, say: Callable[[str], None] = lambda line: None) -> Liger | None:
    """What `train.kernels` says; None: PyTorch's operations.

    Args:
        say: is told what `auto` does without although liger-kernel is there, and what of it cannot serve.

    Raises:
        InputError: liger-kernel is asked for, and cannot be had.
    """
    if wanted == "torch" or (wanted == "auto" and device_name() != "cuda"):
        return None
    if device_name() != "cuda":
        raise InputError(
            f"train.kernels: liger computes on CUDA devices, and this one is '{device_name()}'; set it to auto or torch"
        )
    version = _installed_version()
    if version is None:
        if wanted == "auto":
            return None
        raise InputError(
            "train.kernels: liger-kernel is not installed; pip install 'adept-ds[liger]', or set it to auto or torch"
        )
    found, wrong = _loaded(say)
    if wrong and wanted == "liger":
        raise InputError(
            f"train.kernels: liger-kernel {version} is not as {WRITTEN_AGAINST}, which adept-ds was written against "
            f"({wrong}); install liger-kernel=={WRITTEN_AGAINST}, or set it to auto or torch"
        )
    if wrong:
        say(f"liger-kernel {version} is not as {WRITTEN_AGAINST} ({wrong}): PyTorch's operations are used")
    return found


def _installed_version() -> str | None:
    try:
        return importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        return None


def _loaded(say: Callable[[str], None]) -> tuple[Liger | None, str]:
    """The kernels, or what is wrong with them."""
    try:
        kernel = importlib.import_module("liger_kernel.ops.cross_entropy").liger_cross_entropy_kernel
        patching = importlib.import_module("liger_kernel.transformers.monkey_patch")
        types = frozenset(patching.MODEL_TYPE_TO_APPLY_LIGER_FN)
        liger = Liger(kernel, patching._apply_liger_kernel_to_instance, types, say)
        wrong = _disagreement(liger, current_device())
    except Exception as error:  # of an import, a missing name, a compiler
        wrong = f"{type(error).__name__}: {error}"
    else:
        if not wrong:
            return liger, ""
    return None, wrong


def _disagreement(liger: Liger, device: torch.device, caps: Sequence[float | None] = (None, 3.0)) -> str:
    """What its kernel computes differently from PyTorch on a few numbers, at most; empty: nothing."""
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(5, 300, generator=generator)).to(device)
    labels = torch.tensor([7, _IGNORED_LABEL, 299, 0, 150]).to(device)
    for cap in caps:
        plain = logits.clone().requires_grad_(True)
        capped = plain if cap is None else cap * torch.tanh(plain / cap)
        wanted = torch.nn.functional.cross_entropy(capped, labels, ignore_index=_IGNORED_LABEL, reduction="none")
        (gradient,) = torch.autograd.grad(wanted.sum(), plain)
        found = logits.clone()
        losses = liger.cross_entropy(found, labels, cap, with_gradient=True)
        # A few units in the last place of float32, and the approximate exponentials of a device.
        if not torch.allclose(losses, wanted, rtol=1e-4, atol=1e-4):
            return "it computes another loss"
        if not torch.allclose(found, gradient, rtol=1e-3, atol=1e-5):
            return "it computes another gradient"
    return ""
