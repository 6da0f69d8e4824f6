"""What unit-wise learning rates cost in an optimizer step, beside the bare fused AdamW on the same flat tensor.

    python tools/bench_step.py --elements 50000000 --units 144

Steps alternate, so that both see the same machine; the median of paired ratios is printed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from adept_ds.optim import UnitAdamW, UnitSlice


def flat_with_gradient(elements: int) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.randn(elements, generator=torch.Generator().manual_seed(0)))
    parameter.grad = torch.randn(elements, generator=torch.Generator().manual_seed(1)) * 1e-3
    return parameter


def unit_optimizer(parameter: torch.nn.Parameter, units: int) -> UnitAdamW:
    """Units of unequal size with a different multiplier each, as after a refresh."""
    names = [f"unit{index}" for index in range(units)]
    optimizer = UnitAdamW([parameter], names)
    bounds = [round(parameter.numel() * (index / units) ** 1.3) for index in range(units + 1)]
    optimizer.bind(parameter, [UnitSlice(bounds[i], bounds[i + 1], name) for i, name in enumerate(names)])
    optimizer.set_multipliers({name: 2.0 * (index + 1) / units for index, name in enumerate(names)})
    return optimizer


def timed_step(optimizer: torch.optim.Optimizer) -> float:
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=50_000_000, help="trainable elements of this rank")
    parser.add_argument("--units", type=int, default=144)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bare = torch.optim.AdamW([flat_with_gradient(arguments.elements)], fused=True)
    unit_wise = unit_optimizer(flat_with_gradient(arguments.elements), arguments.units)
    for optimizer in (bare, unit_wise):
        timed_step(optimizer)
    pairs = [(timed_step(bare), timed_step(unit_wise)) for _ in range(arguments.steps)]
    ratio = statistics.median(unit / plain for plain, unit in pairs)
    print(f"bare fused AdamW       {statistics.median(plain for plain, _ in pairs) * 1e3:7.1f} ms")
    print(f"unit-wise, {arguments.units} units   {statistics.median(unit for _, unit in pairs) * 1e3:7.1f} ms")
    print(f"median of paired ratios {ratio:.3f}  (share spent on multipliers {max(0.0, 1 - 1 / ratio):.1%})")


if __name__ == "__main__":
    main()
