"""Forward passes beside training that leave no trace in it.

Written against DeepSpeed 0.19.8 (runtime/zero/partitioned_param_coordinator.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from adept_ds.models.device import device_rng_state, set_device_rng_state
from adept_ds.zero.engine import Engine, zero_stage


@contextmanager
def outside_training(engine: Engine) -> Iterator[None]:
    """Run forward passes beside training without leaving a trace in it.

    Evaluation mode, the state of the random number generators, and ZeRO-3's recorded order of modules are as before
    when the block ends. (A pass that does not follow the recorded order makes DeepSpeed fetch parameters late or
    twice, so the record is dropped before; the next training step makes a new one.)
    """
    forget_module_order(engine)
    cpu_rng, device_rng = torch.get_rng_state(), device_rng_state()
    was_training = engine.module.training
    engine.module.eval()
    try:
        yield
    finally:
        engine.module.train(was_training)
        torch.set_rng_state(cpu_rng)
        set_device_rng_state(device_rng)
        forget_module_order(engine)


def forget_module_order(engine: Engine) -> None:
    """Drop what ZeRO-3 recorded of the order in which modules are called; between two passes."""
    if zero_stage(engine) != 3:
        return
    optimizer = engine.optimizer
    offload = getattr(optimizer, "parameter_offload", optimizer)
    coordinator = offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
