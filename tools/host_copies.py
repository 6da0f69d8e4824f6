"""How often the host waits for the device while a block runs, and who asked: also on a machine without a device.

    with HostCopies() as copies:
        engine(...)
    copies.by_place()      # {"adept_ds/training/step.py accumulate_gradient": 1}

On a device, copies to the host that the host waits for are counted as PyTorch dispatches them. On a CPU every tensor
stands for one on a device, and what is asked of its content (`item`, `tolist`, `float`, `if`, `cpu`) for a copy; what
follows from a copy alone (the result of `cpu()`, and of operations on nothing else) is on the host, and costs nothing.
Whole waits (`synchronize`) count too. What cannot be told on a CPU is `to("cpu")`, and copies to the device.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ATEN = torch.ops.aten
_ASKS = {_ATEN._local_scalar_dense.default, _ATEN.equal.default, _ATEN.nonzero.default, _ATEN.masked_select.default}
"""Operations whose result, or its shape, the host has to know."""
_PACKAGES = ("adept_ds", "deepspeed", "transformers", "liger_kernel")


class HostCopies(TorchDispatchMode):
    """Counts while the block runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        """Of each copy, who asked for it: file and function of the innermost package that is known here."""
        self._on_host: dict[int, torch.Tensor] = {}
        self._patches = ExitStack()

    def by_place(self) -> dict[str, int]:
        return dict(Counter(self.seen))

    def of(self, package: str) -> int:
        """How many this package asked for."""
        return sum(place.startswith(package + "/") for place in self.seen)

    def __enter__(self) -> HostCopies:
        from deepspeed.accelerator import get_accelerator

        for name in ("tolist", "numpy", "cpu"):
            self._patches.enter_context(mock.patch.object(torch.Tensor, name, self._asked(name)))
        kind, wait = type(get_accelerator()), type(get_accelerator()).synchronize

        def synchronize(*arguments: Any, **options: Any) -> Any:
            self._note()
            return wait(*arguments, **options)

        self._patches.enter_context(mock.patch.object(kind, "synchronize", synchronize))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()
        self._on_host.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        found = func(*args, **options)
        tensors = list(_tensors((args, options)))
        if func in _ASKS:
            if not self._is_on_host(tensors[0]):
                self._note()
        elif func is _ATEN._to_copy.default or func is _ATEN.copy_.default:
            source = tensors[-1] if func is _ATEN.copy_.default else tensors[0]
            waits = not (options.get("non_blocking") or (func is _ATEN.copy_.default and len(args) > 2 and args[2]))
            if source.device.type != "cpu" and found.device.type == "cpu" and waits:
                self._note()
                self._keep(found)
        if tensors and all(map(self._is_on_host, tensors)):
            for tensor in _tensors(found):
                self._keep(tensor)
        return found

    def _asked(self, name: str) -> Callable[..., Any]:
        """In the place of a method that PyTorch does not dispatch where there is nothing to copy."""
        method = getattr(torch.Tensor, name)

        def asked(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            if tensor.device.type == "cpu" and not self._is_on_host(tensor):
                self._note()
                if name == "cpu":
                    return self._keep(tensor.detach())
            return method(tensor, *arguments, **options)

        return asked

    def _is_on_host(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._on_host

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """As one on the host; held, so that no other one gets its identity."""
        self._on_host[id(tensor)] = tensor
        return tensor

    def _note(self) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None:
            package, _, file = _within(frame.f_code.co_filename)
            if package:
                self.seen.append(f"{package}/{file} {frame.f_code.co_name}")
                return
            frame = frame.f_back
        self.seen.append("elsewhere")


def _within(path: str) -> tuple[str, str, str]:
    """(package, "/", file in it); ("", "", "") of a file of none."""
    for package in _PACKAGES:
        _, found, file = path.rpartition(f"/{package}/")
        if found:
            return package, "/", file
    return "", "", ""


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
