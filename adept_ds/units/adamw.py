"""AdamW over DeepSpeed's flat partitions, in which every element has its unit's multiplier.

On an accelerator a partition is one pass, whatever lies in it (see `one_pass`). On a CPU views of it are stepped: units
that are whole runs of elements in one fused call per distinct multiplier, without copying anything; units that are rows
or columns (heads, neurons) in chunks that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adept_ds.units.multipliers import UnitMultipliers, with_gradient
from adept_ds.units.one_pass import adamw_pass
from adept_ds.units.placement import Tile
from adept_ds.units.segments import UnitSlice

_CPU_CHUNK = 1 << 16
"""Elements whose weight, gradient, moments and copy stay in a core's cache while they are stepped and rescaled."""


class UnitAdamW(torch.optim.AdamW):
    """AdamW with one learning-rate multiplier per unit (see `UnitMultipliers`); elements of no unit stay as they are.

    Args:
        params, lr, betas, eps, weight_decay: as `torch.optim.AdamW`; one parameter group.
        one_pass: step as on an accelerator, or as on a CPU; None: as is fast where the tensors are.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        one_pass: bool | None = None,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        if len(self.param_groups) != 1:
            raise ValueError("UnitAdamW takes one parameter group: units, not groups, carry the multipliers")
        self.multipliers = UnitMultipliers(self)
        self.one_pass = one_pass

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter in with_gradient(self):
            self._step_tensor(parameter)
        return loss

    def _step_tensor(self, parameter: torch.Tensor) -> None:
        state = self._state_of(parameter)
        state["step"] += 1
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        flat = [tensor.view(-1) for tensor in tensors if tensor is not None]
        if self.one_pass or (self.one_pass is None and parameter.device.type != "cpu"):
            factors = self.multipliers.on(parameter.device)
            adamw_pass(flat, state["step"], self.multipliers.segments_of(parameter), factors, self.param_groups[0])
        else:
            self._step_views(flat, state["step"], self.multipliers.slices_of(parameter))

    def _step_views(self, flat: list[torch.Tensor], step: torch.Tensor, slices: Sequence[UnitSlice]) -> None:
        exact, factors = self.multipliers.exact, self.multipliers.on(flat[0].device)
        runs_of_factor: dict[float, list[tuple[int, int]]] = {}
        for unit_slice in slices:
            if unit_slice.is_uniform:
                factor = exact[unit_slice.placement.first] * unit_slice.lr_ratio
                runs_of_factor.setdefault(factor, []).append((unit_slice.start, unit_slice.stop))
        for factor, runs in runs_of_factor.items():
            views = [[tensor[start:stop] for start, stop in _merge_neighbours(runs)] for tensor in flat]
            self._fused_step(views, step, factor)
        for unit_slice in slices:
            if not unit_slice.is_uniform:
                for tile in unit_slice.tiles:
                    views = [[tile.view(tensor[unit_slice.start : unit_slice.stop])] for tensor in flat]
                    held_back = 1.0 - tile.spread(factors)
                    self._step_tile(views, step, tile, held_back, unit_slice.lr_ratio)

    def _step_tile(
        self,
        views: list[list[torch.Tensor]],
        step: torch.Tensor,
        tile: Tile,
        held_back: torch.Tensor,
        lr_ratio: float,
    ) -> None:
        """Step a tile whole, then take back each row's or column's share.

        In chunks of rows: what was copied, stepped and taken back chunk by chunk crosses the memory bus once.
        """
        rows = max(1, _CPU_CHUNK // tile.columns)
        for first in range(0, tile.rows, rows):
            chunk = [[view[first : first + rows] for view in group] for group in views]
            weight = chunk[0][0]
            old = weight.clone()
            self._fused_step(chunk, step, lr_ratio)
            weight.lerp_(old, held_back[first : first + rows] if tile.axis == 0 else held_back)

    def _fused_step(self, views: list[list[torch.Tensor]], step: torch.Tensor, factor: float) -> None:
        group = self.param_groups[0]
        # What torch.optim.AdamW(fused=True) itself ends in. The functional form around it sorts tensors by device
        # first: 80 microseconds a call, as much as the arithmetic of a chunk.
        torch._fused_adamw_(
            views[0],
            views[1],
            views[2],
            views[3],
            [],
            [step] * len(views[0]),
            lr=group["lr"] * factor,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

    def _state_of(self, parameter: torch.Tensor) -> dict[str, Any]:
        """The stock state of `torch.optim.AdamW`, which universal checkpoints need."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def _merge_neighbours(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join touching runs (weight and bias of a projection): fewer and longer views."""
    merged: list[tuple[int, int]] = []
    for start, stop in runs:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged
