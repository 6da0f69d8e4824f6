"""What one rank measures in planning/test_measured.py: bytes by kind, and what is sent, of real training steps.

Usage: python -m harness.planning_worker CONFIG MODEL LAYERS OUTPUT CELL... with cells such as 2/bf16,
3/fp32/recomputed or 3/fp32/offloaded, or 2/fp32/1 with micro-batches of another size than ROWS. Rank 0 writes to OUTPUT
(torch.save) what it found, and where ranks differ, the largest of all.

PyTorch's own fused attention is taken, and logits are not split into what fits a CPU's cache: as on an accelerator.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from harness.counting import Collectives

from adept_ds.config.loading import load_config
from adept_ds.config.schema import Config
from adept_ds.models import head_loss, loading
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.loading import layers_train
from adept_ds.planning.live_bytes import LiveBytes
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.groups import join
from adept_ds.ranks.launchers import rank_from_environment
from adept_ds.units.adamw import UnitAdamW
from adept_ds.units.registry import build_registry
from adept_ds.units.unit_lr import UnitLR
from adept_ds.zero.build import EngineSettings, StepShape, build_training_engine
from adept_ds.zero.engine import Engine, client_optimizer, parameter_shapes, release, zero_stage
from adept_ds.zero.layout import partition_layout

STEPS, MICRO_BATCHES, ROWS = 2, 2, 2
"""In the second step, ZeRO-3 knows the order of modules."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = {"allgather": "all-gather", "reduce_scatter": "reduce-scatter", "allreduce": "all-reduce"}


def rows_of(how: Iterable[str]) -> int:
    """Of what a cell says behind its precision."""
    return next((int(each) for each in how if each.isdigit()), ROWS)


def bytes_of(tensors: Iterable[torch.Tensor], but: Iterable[torch.Tensor] = ()) -> int:
    """Of what they lie in, once; not of what `but` lie in."""
    left_out = {t.untyped_storage().data_ptr() for t in but}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(size for address, size in storages.items() if address not in left_out)


def weights(engine: Engine, trained: bool) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for parameter in engine.module.parameters():
        if parameter.requires_grad == trained:
            found += [parameter.data, getattr(parameter, "ds_tensor", parameter.data)]
    return found + ([partition.tensor.data for partition in partition_layout(engine)] if trained else [])


def on_host(engine: Engine) -> Iterator[torch.Tensor]:
    """What DeepSpeed (0.19.8) keeps there when weights and optimizer are offloaded."""
    zero = engine.optimizer
    assert zero.device == "cpu"
    for parameter in engine.module.parameters():
        yield parameter.ds_tensor  # type: ignore[attr-defined]
    yield zero.grad_partitions_flat_buffer
    for group in zero.fp32_partitioned_groups_flat:
        yield from (group.data, group.grad)
    for state in client_optimizer(engine).state.values():
        yield from (state[name] for name in MOMENTS)


def gradients(engine: Engine) -> list[torch.Tensor]:
    """All that DeepSpeed (0.19.8) keeps of them between passes."""
    zero, found = engine.optimizer, list[torch.Tensor]()
    if zero_stage(engine) == 3:
        return [zero.grad_partitions_flat_buffer]
    for group in (*zero.averaged_gradients.values(), *zero.all_grad_tensors.values()):
        found += group or []
    for parameter in engine.module.parameters():
        found += [g for g in (parameter.grad, getattr(parameter, "grad_accum", None)) if g is not None]
    return found


class Kept:
    """Bytes that autograd keeps, by decoder layer; None: around them."""

    def __init__(self, engine: Engine, layers: list[torch.nn.Module]) -> None:
        self._engine, self._layer = engine, None
        self.by_layer: dict[int | None, int] = {}
        self._seen: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda *_, index=index: setattr(self, "_layer", index))
            layer.register_forward_hook(lambda *_: setattr(self, "_layer", None))

    @contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept):
            yield
        self._seen.clear()

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in self._seen and address not in self._weights():
            self._seen[address] = tensor.detach()  # or another would get its address
            size = tensor.untyped_storage().nbytes()
            self.by_layer[self._layer] = self.by_layer.get(self._layer, 0) + size
        return tensor

    def _weights(self) -> set[int]:
        return {parameter.data.untyped_storage().data_ptr() for parameter in self._engine.module.parameters()}


@contextmanager
def gathered(engine: Engine) -> Iterator[LiveBytes]:
    """Bytes of what is made while weights are fetched."""
    apart = LiveBytes()
    if zero_stage(engine) < 3:
        yield apart
        return
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    fetch = coordinator.fetch_sub_module

    def counted(*arguments: Any, **named: Any) -> None:
        with apart:
            fetch(*arguments, **named)

    with mock.patch.object(coordinator, "fetch_sub_module", counted):
        yield apart


@contextmanager
def logits(engine: Engine, found: dict[str, int]) -> Iterator[None]:
    """Peak of what the head's own call holds, but for the gradient that it keeps."""
    head: Any = engine.module.get_output_embeddings()  # type: ignore[operator]
    forward = head.forward

    def counted(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with LiveBytes() as apart:
            losses: torch.Tensor = forward(hidden, labels)
            found["logits"] = max(found.get("logits", 0), apart.peak - hidden.numel() * hidden.element_size())
        return losses

    head.forward = counted
    try:
        yield
    finally:
        head.forward = forward


def measure(model: ModelDirectory, layers: list[int], config: Config, cell: str, ranks: Ranks) -> dict[str, Any]:
    stage, precision, *how = cell.split("/")
    offloaded = "offloaded" in how
    threshold = 100 if model.num_layers < 10 else 100_000  # so that a tiny model has weights of both kinds
    zero: dict[str, Any] = {
        "stage": int(stage),
        "overlap_comm": stage != "1",
        "reduce_bucket_size": 50_000,
        "stage3_param_persistence_threshold": threshold,
        "stage3_prefetch_bucket_size": 20_000 if model.num_layers < 10 else 5_000_000,
        "stage3_max_reuse_distance": 10_000 if model.num_layers < 10 else 10_000_000,
        "stage3_max_live_parameters": 10**9,
    }
    if model.num_layers >= 10:
        zero["reduce_bucket_size"] = 5_000_000
    if offloaded:
        zero |= {key: {"device": "cpu", "pin_memory": False} for key in ("offload_optimizer", "offload_param")}
    settings = EngineSettings({"zero_optimization": zero}, DTYPES[precision], ranks)
    rows = rows_of(how)
    shape = StepShape(rows * MICRO_BATCHES * ranks.world_size, rows, MICRO_BATCHES, 1.0)
    engine = build_training_engine(
        settings,
        model,
        layers_train(model.family, layers),
        lambda parameters: UnitAdamW(parameters, lr=1e-3),
        shape,
        recompute_activations="recomputed" in how,
    )
    registry = build_registry(model.family, parameter_shapes(engine.module), layers, "matrix", engine.module.config)
    UnitLR(engine, registry, ranks=ranks)
    modules = list(model.family.layer_modules(engine.module))
    kept, found, sent = Kept(engine, modules), dict[str, Any](), dict[str, int]()
    generator = torch.Generator().manual_seed(ranks.rank)
    vocabulary: Any = engine.module.config.vocab_size  # type: ignore[union-attr]
    for step in range(STEPS):
        last = step == STEPS - 1
        with LiveBytes() as live, Collectives() as collectives, gathered(engine) as fetched:
            for _ in range(MICRO_BATCHES):
                tokens = torch.randint(vocabulary, (rows, config.data.seq_len), generator=generator)
                kept.by_layer = {}
                with kept.counting(), logits(engine, found):
                    losses = engine(tokens, tokens)
                engine.backward(losses.mean())
                del losses
                if last:
                    hosted = list(on_host(engine)) if offloaded else []
                    found["gradients"] = max(found.get("gradients", 0), bytes_of(gradients(engine), hosted))
                engine.step()
            if last:
                found["gather_buffers"], found["peak"] = fetched.peak, live.peak
    for name, size in collectives.seen:
        kind = next((words for key, words in KINDS.items() if key in name), None)
        if kind is not None and size > 256:
            sent[kind] = sent.get(kind, 0) + size
    hosted = list(on_host(engine)) if offloaded else []
    state = client_optimizer(engine).state.values()
    found |= {
        "frozen_weights": bytes_of(weights(engine, trained=False), hosted),
        "trained_weights": bytes_of(weights(engine, trained=True), hosted),
        "optimizer": bytes_of((of[name] for of in state for name in MOMENTS), hosted),
        "on_host": bytes_of(hosted),
    }
    largest = dict(zip(found, ranks.max(*(float(value) for value in found.values())), strict=True))
    release(engine)
    return {"zero": zero, "memory": largest, "kept": dict(kept.by_layer), "sent": sent}


def main() -> None:
    config, model = load_config(Path(sys.argv[1])), ModelDirectory.read(Path(sys.argv[2]))
    layers, output, cells = [int(layer) for layer in sys.argv[3].split(",")], Path(sys.argv[4]), sys.argv[5:]
    ranks = join(rank_from_environment(os.environ))
    with (
        mock.patch.object(loading, "use_products", lambda _: None),
        mock.patch.object(head_loss, "_BLOCK_ELEMENTS", 1 << 62),
    ):
        found = {cell: measure(model, layers, config, cell, ranks) for cell in cells}
    if ranks.is_main:
        torch.save(found, output)


if __name__ == "__main__":
    main()
