"""An optimizer step in which the residual stream passes around some trainable layers.

Such a layer has no gradient in the step, which is to count as a gradient of 0 wherever its elements lie. Written
against DeepSpeed 0.19.8:

- Stages 1 and 2 gather gradients anew in each step, zeros where a parameter has none (stage_1_and_2.py:
  get_all_grad_tensors). Stage 3 keeps them in buffers that outlive the step (stage3.py: grad_partitions_flat_buffer,
  and with optimizer states on the host `grad` of the flat fp32 partitions, and norms by parameter), which a parameter
  without a backward pass does not write to: what an earlier step or an estimate left there would be taken for this
  step's gradient.
- Stage 3 fetches parameters ahead in the order in which it saw modules called (partitioned_param_coordinator.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from adept_ds.base.errors import LayoutError
from adept_ds.models.bypass import bypassed
from adept_ds.zero.assumptions import layout_complaint
from adept_ds.zero.engine import Engine, zero_stage
from adept_ds.zero.outside_training import forget_module_order


@contextmanager
def around_layers(engine: Engine, layers: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Go around `layers`: entered before the first forward pass of a step, left behind its last backward pass.

    Every rank names the same layers, and some trainable layer is left. Without layers it does nothing. ZeRO-3's
    recorded order of modules holds for no other choice of layers, and is dropped on both sides: the first micro-batch
    of this step and of the next fetch parameters when they are needed.
    """
    if not layers:
        yield
        return
    forget_module_order(engine)
    _forget_earlier_gradients(engine)
    with bypassed(layers):
        yield
    forget_module_order(engine)


@torch.no_grad()
def _forget_earlier_gradients(engine: Engine) -> None:
    """One launch for each flat buffer; what has a gradient in this step is written over."""
    if zero_stage(engine) != 3:
        return
    try:
        engine.optimizer.grad_partitions_flat_buffer.zero_()
        if engine.optimizer.offload_optimizer:
            engine.optimizer.reset_cpu_buffers()
            for partition in engine.optimizer.fp32_partitioned_groups_flat:
                partition.grad.zero_()
    except AttributeError as error:
        raise LayoutError(layout_complaint(str(error))) from error
