"""Trained adapters merged into the weights of their base, one projection at a time.

Each projection's weight is read from the base's files, and peft's own layer merges the adapter into it, in fp32: no
more than one projection is in memory, and no model is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from adept_ds.base.errors import InputError
from adept_ds.models.adapter_spec import AdapterSpec, split_adapter_name
from adept_ds.models.adapters import adapted, adapter_parameters
from adept_ds.models.directory import ModelDirectory
from adept_ds.weights.hf_directory import stored_tensors
from adept_ds.weights.reading import read_tensor


class MergedWeights(Mapping[str, torch.Tensor]):
    """Name of a parameter in the base model -> its weight with the adapter merged into it, fp32, made when asked for.

    Args:
        base: what training started from.
        trained: the adapters' parameters by their full names, fp32, as `export.read_zero_checkpoint` returns them.

    Raises:
        InputError: the adapters do not belong to `base`, or are not of the kind that `spec` says.
    """

    def __init__(self, spec: AdapterSpec, base: ModelDirectory, trained: Mapping[str, torch.Tensor]) -> None:
        self._spec, self._family, self._stored = spec, base.family, stored_tensors(base.path)
        self._adapters: dict[str, dict[str, torch.Tensor]] = {}
        for name, parameter in trained.items():
            place = split_adapter_name(name)
            if place is None:
                raise InputError(f"'{name}' was trained, which is no adapter; export with the method of its own run")
            self._adapters.setdefault(f"{place[0]}.weight", {})[place[1]] = parameter
        for name in self._adapters:
            try:
                self._family.stored_parts(name, self._stored)
            except KeyError:
                raise InputError(
                    f"an adapter of '{name}' was trained, which '{base}' lacks; give its own base"
                ) from None

    def __getitem__(self, name: str) -> torch.Tensor:
        """Its shape is that in the model.

        Raises:
            InputError: the adapter has other factors than `spec` says, or is not finite; or the base is damaged.
        """
        adapter = self._adapters[name]
        layer = adapted(_projection(self._base_weight(name), self._family.transposed), self._spec, empty=True)
        expected = adapter_parameters(layer)
        if _shapes(adapter) != _shapes(expected):
            raise InputError(
                f"the adapter of '{name}' has {_listed(adapter)}, where method asks for {_listed(expected)}; "
                "export with the configuration of its own run"
            )
        if not all(bool(factor.isfinite().all()) for factor in adapter.values()):
            raise InputError(f"the adapter of '{name}' is not finite; export an earlier checkpoint")
        layer.load_state_dict(
            {f"{factor}.default.weight": values.float() for factor, values in adapter.items()},
            strict=False,
            assign=True,
        )
        with torch.no_grad():
            layer.merge(safe_merge=True)
        merged: torch.Tensor = layer.get_base_layer().weight.detach()
        return merged

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    def _base_weight(self, name: str) -> torch.Tensor:
        (parts,) = self._family.stored_parts(name, self._stored)
        return torch.cat([read_tensor(part, self._stored[part]).float() for part in parts])


def _projection(weight: torch.Tensor, transposed: bool) -> nn.Module:
    """A linear layer of this weight: [outputs, inputs], or transposed as in GPT-2."""
    from transformers.pytorch_utils import Conv1D

    first, second = weight.shape
    with torch.device("meta"):
        layer = Conv1D(second, first) if transposed else nn.Linear(second, first, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _shapes(adapter: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {factor: tuple(values.shape) for factor, values in adapter.items()}


def _listed(adapter: Mapping[str, torch.Tensor]) -> str:
    return ", ".join(f"{factor} {list(shape)}" for factor, shape in sorted(_shapes(adapter).items()))
