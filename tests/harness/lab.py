"""Small trainings on a tiny expanded model, in a process group of real ranks, that differ in their settings only."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import oracle
import torch
from deepspeed.utils import safe_get_full_fp32_param
from harness.packing import pack
from harness.workspace import Workspace

from adept_ds.base.errors import UnitMismatchError
from adept_ds.base.files import write_json
from adept_ds.config.checks import accumulation_steps, anchor_shape
from adept_ds.config.deepspeed_merge import deepspeed_of_run
from adept_ds.config.loading import parse_config
from adept_ds.config.schema import Config
from adept_ds.data.mixture import Mixture
from adept_ds.data.order import block_order
from adept_ds.data.training_data import TrainingData, step_batch
from adept_ds.models.device import resolve_precision
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.frozen_prefix import FrozenPrefix
from adept_ds.models.loading import layers_train
from adept_ds.ranks.collectives import Ranks
from adept_ds.training.step import accumulate_gradient
from adept_ds.units.adamw import UnitAdamW
from adept_ds.units.importance import OnlineImportance, estimate_importance
from adept_ds.units.registry import UnitRegistry, build_registry
from adept_ds.units.unit_lr import UnitLR
from adept_ds.units.unit_sums import GradientBatches
from adept_ds.weights.expansion import expand_checkpoint
from adept_ds.zero.build import EngineSettings, StepShape, build_training_engine
from adept_ds.zero.engine import Engine, parameter_shapes, release, set_learning_rate, zero_stage
from adept_ds.zero.gathered import keep_frozen_gathered
from adept_ds.zero.gradients import loss_scale, set_loss_scale
from adept_ds.zero.layout import partition_layout

STEPS = 5
LR = 3e-3

OptimizerClass = Callable[..., torch.optim.Optimizer]


@dataclasses.dataclass
class Outcome:
    """What a small training left behind."""

    losses: list[float]
    trained: dict[str, torch.Tensor]
    frozen_hash: str
    importances: list[list[float]]
    units: list[str]
    """Names, in the order of each list of importances."""
    cut_rows: int
    """Parameters of which this rank's slice begins inside a row."""
    kept: tuple[int, int]
    """Bytes of frozen parameters that stayed gathered, and of all frozen parameters."""
    gathered_again: int
    """Parameters among those that stayed gathered that lie elsewhere at the end."""
    lowest_runs: int
    """Forward passes of layer 0, which is frozen."""
    twice_partitioned: int
    """Parameters that lie split over a group of ranks beside their partition over all (hpZ)."""


def training_engine(
    config: Config, model: ModelDirectory, layers: Sequence[int], ranks: Ranks, optimizer: OptimizerClass | None
) -> tuple[Engine, UnitRegistry]:
    """As a run builds it.

    Args:
        optimizer: takes AdamW's arguments; None: an engine that takes no step.
    """
    train = config.train
    steps = accumulation_steps(train, ranks.world_size)
    ds_config = deepspeed_of_run(config, model, ranks.world_size, steps)
    settings = EngineSettings(ds_config, resolve_precision(train.precision), ranks)
    options: dict[str, Any] = {
        "seed": train.seed,
        "recompute_activations": train.activation_checkpointing,
    }
    if optimizer is not None:
        options["make_optimizer"] = lambda parameters: optimizer(
            parameters, lr=train.lr, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay
        )
        accumulation = accumulation_steps(train, ranks.world_size) + anchor_shape(config, ranks.world_size)[0]
        sequences = train.micro_batch_size * accumulation * ranks.world_size
        options["shape"] = StepShape(sequences, train.micro_batch_size, accumulation, train.clip_grad_norm)
    engine = build_training_engine(settings, model, layers_train(model.family, layers), **options)
    shapes = parameter_shapes(engine.module)
    registry = build_registry(model.family, shapes, layers, config.importance.granularity, engine.module.config)
    return engine, registry


def take_step(
    engine: Engine,
    data: TrainingData,
    step: int,
    config: Config,
    ranks: Ranks,
    online: OnlineImportance | None = None,
) -> tuple[float, float]:
    domain, replay = accumulate_gradient(engine, step_batch(data, step, config.train, ranks), online).tolist()
    engine.step()
    return domain, replay


def whole_values(engine: Engine) -> dict[str, torch.Tensor]:
    """Every parameter by name, as the forward pass sees it."""
    import deepspeed

    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=zero_stage(engine) == 3):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def whole_master_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """The fp32 weights of every trained parameter by name, put together by DeepSpeed itself."""
    named = engine.module.named_parameters()
    return {name: safe_get_full_fp32_param(p).detach().clone() for name, p in named if p.requires_grad}


class Lab:
    """The expanded tiny model and its data."""

    def __init__(self, workspace: Workspace, scratch: Path, ranks: Ranks) -> None:
        self.workspace, self.scratch, self.ranks = workspace, scratch, ranks
        expansion = ranks.on_main(lambda: expand_checkpoint(workspace.model, scratch / "expanded", [1, 3]))
        self.source, self.expanded = ModelDirectory.read(workspace.model), ModelDirectory.read(scratch / "expanded")
        self.layers = expansion.copy_indices
        general = [workspace.root / "general.jsonl"]
        cache = scratch / "blocks"
        domain = [workspace.root / "domain.jsonl"]
        self.domain = Mixture.of([pack(domain, workspace.model, cache, seq_len=32, ranks=ranks)])
        self.general = pack(general, workspace.model, cache, seq_len=24, keep_tail=True, ranks=ranks)
        self.replay = Mixture.of([pack(general, workspace.model, cache, seq_len=32, ranks=ranks)])

    def config(self, **sections: Any) -> Config:
        return parse_config(self.workspace.tree(self.scratch / "run", **sections))

    def deepspeed_file(self, name: str, **zero_optimization: Any) -> Path:
        path = self.scratch / f"{name}.json"
        self.ranks.on_main(lambda: write_json(path, {"zero_optimization": zero_optimization}))
        return path

    def strict_zero3(self) -> Path:
        """ZeRO-3 that keeps nothing gathered by itself; by default every parameter of a tiny model is small enough."""
        return self.deepspeed_file("strict", stage=3, stage3_param_persistence_threshold=0)

    def gradient_batches(self, micro_batch_size: int) -> GradientBatches:
        return GradientBatches(self.general, tuple(block_order(len(self.general), 0)[:7]), 5, micro_batch_size)

    def train(
        self,
        config: Config,
        *,
        optimizer: OptimizerClass = UnitAdamW,
        estimate_after: Iterable[int] = (),
        estimate_within: Iterable[int] = (),
        multipliers: dict[str, float] | None = None,
        refresh: bool = False,
        keep_bytes: int = 0,
        cached_batches: int = 0,
    ) -> Outcome:
        """STEPS optimizer steps; importances are estimated after those in `estimate_after`, and used if `refresh`.

        In `estimate_within` they are also estimated between the micro-batches of a step.
        After the first, up to `keep_bytes` of frozen parameters stay gathered. What the frozen layers below compute
        for `cached_batches` micro-batches of general text is computed once.
        """
        engine, registry = training_engine(config, self.expanded, self.layers, self.ranks, optimizer)
        unit_lr = UnitLR(engine, registry, config.lr_policy, self.ranks)
        if multipliers is not None:
            unit_lr.set(multipliers)
        losses, importances, kept = [], [], (0, 0)
        layers: Any = self.expanded.family.layer_modules(engine.module)
        prefix = FrozenPrefix(layers, min(self.layers), cached_batches)
        lowest_runs = 0

        def count(*_: Any) -> None:
            nonlocal lowest_runs
            lowest_runs += 1

        layers[0].self_attn.register_forward_hook(count)
        addresses: dict[Any, int] = {}
        online = OnlineImportance(engine, registry, self.ranks) if config.importance.source == "online" else None
        data = TrainingData(self.domain, self.replay if config.replayed else None, config.replayed)
        whole_step, batches = engine.step, self.gradient_batches(config.train.micro_batch_size)

        def step_and_estimate() -> None:
            whole_step()
            if step in estimate_within and engine.micro_steps % engine.gradient_accumulation_steps():
                importances.append(estimate_importance(engine, registry, batches, self.ranks))

        engine.step = step_and_estimate  # type: ignore[method-assign]
        for step in range(STEPS):
            set_learning_rate(engine, LR)
            losses.append(sum(take_step(engine, data, step, config, self.ranks, online)))
            if step == 0 and keep_bytes:
                parameters: list[Any] = list(engine.module.parameters())
                partitions = {p: p.ds_tensor.clone() for p in parameters}
                kept = keep_frozen_gathered(engine, keep_bytes)
                assert all(torch.equal(p.ds_tensor, partition) for p, partition in partitions.items())
                whole = [p for p in parameters if not p.requires_grad and p.shape == p.ds_shape]
                assert sum(parameter.numel() * parameter.element_size() for parameter in whole) == kept[0]
                addresses = {parameter: parameter.data_ptr() for parameter in whole}
            if step in estimate_after:
                if online:
                    estimate = online.take()
                    assert estimate is not None
                else:
                    estimate = estimate_importance(engine, registry, batches, self.ranks, prefix=prefix)
                importances.append(estimate)
                if refresh:
                    unit_lr.refresh(importances[-1])
        gathered_again = sum(parameter.data_ptr() != address for parameter, address in addresses.items())
        values, digest = whole_values(engine), hashlib.sha256()
        for name, parameter in engine.module.named_parameters():
            if not parameter.requires_grad:
                digest.update(values[name].float().numpy().tobytes())
        trained = {
            name: values[name] for name, parameter in engine.module.named_parameters() if parameter.requires_grad
        }
        cut_rows = _cut_rows(engine)
        twice = sum(getattr(p, "ds_secondary_tensor", None) is not None for p in engine.module.parameters())
        release(engine)
        return Outcome(
            losses,
            trained,
            digest.hexdigest(),
            importances,
            registry.names,
            cut_rows,
            kept,
            gathered_again,
            lowest_runs,
            twice,
        )

    def source_importance(self, config: Config) -> dict[str, float]:
        """Of the layers that are copied, as a run estimates it before the first step."""
        engine, registry = training_engine(config, self.source, [1, 3], self.ranks, None)
        batches = self.gradient_batches(config.train.micro_batch_size)
        importance = estimate_importance(engine, registry, batches, self.ranks)
        release(engine)
        return dict(zip(registry.names, importance, strict=True))

    def misplaced_share(self, config: Config) -> float:
        """How far the first step of any master weight is from its unit's multiplier times the step it takes with 1.

        Largest over all elements, as a share of the learning rate, which is about the size of a first step. Weights
        are compared by parameter name, and units are the oracle's: nothing here knows how partitions are laid out.
        """
        moved: dict[str, dict[str, torch.Tensor]] = {}
        multiplier_of: dict[str, float] = {}
        for kind in ("whole", "shared"):
            engine, registry = training_engine(config, self.expanded, self.layers, self.ranks, UnitAdamW)
            unit_lr = UnitLR(engine, registry, config.lr_policy, self.ranks)
            multiplier_of = {name: 0.1 * (index % 21) for index, name in enumerate(registry.names)}
            if kind == "shared":
                unit_lr.set(multiplier_of)
            set_learning_rate(engine, LR)
            before = whole_master_weights(engine)
            take_step(engine, TrainingData(self.domain), 0, config, self.ranks)
            moved[kind] = {name: new - before[name] for name, new in whole_master_weights(engine).items()}
            head_dim: Any = engine.module.config.head_dim  # type: ignore[union-attr]
            release(engine)
        worst = 0.0
        for name, whole in moved["whole"].items():
            units = oracle.units_of_elements(name, whole.shape, config.importance.granularity, head_dim)
            factors = torch.tensor([multiplier_of[unit] for unit in units]).view(whole.shape)
            worst = max(worst, float((moved["shared"][name] - whole * factors).abs().max()))
        assert max(float(move.abs().max()) for move in moved["shared"].values()) > 1e-3
        return worst / LR

    def overflowing(self, config: Config) -> dict[str, Any]:
        """Estimates in fp16 with a right loss scale, and with one so large that gradients overflow; then a step."""
        engine, registry = training_engine(config, self.source, [1, 3], self.ranks, UnitAdamW)
        UnitLR(engine, registry, ranks=self.ranks)
        batches, importances = self.gradient_batches(config.train.micro_batch_size), []
        for scale in (2.0**10, 2.0**40):
            set_loss_scale(engine, scale)
            estimate = estimate_importance(engine, registry, batches, self.ranks)
            importances.append(dict(zip(registry.names, estimate, strict=True)))
        scale_after = loss_scale(engine)
        before = whole_master_weights(engine)
        take_step(engine, TrainingData(self.domain), 0, config, self.ranks)
        after = whole_master_weights(engine)
        moved = any(not torch.equal(before[name], after[name]) for name in before)
        release(engine)
        return {"importances": importances, "scale_after": scale_after, "moved": moved}

    def disagreement(self) -> str:
        """What the check says when rank 1 holds another multiplier."""
        config = self.config()
        engine, registry = training_engine(config, self.expanded, self.layers, self.ranks, UnitAdamW)
        unit_lr = UnitLR(engine, registry, config.lr_policy, self.ranks)
        try:
            unit_lr.set({registry.names[4]: 0.5} if self.ranks.rank == 1 else {})
        except UnitMismatchError as error:
            return str(error)
        finally:
            release(engine)
        return ""


def _cut_rows(engine: Engine) -> int:
    shapes, cut = parameter_shapes(engine.module), 0
    for partition in partition_layout(engine):
        for fragment in partition.fragments:
            shape = shapes[fragment.parameter]
            cut += len(shape) == 2 and fragment.param_start % shape[1] > 0
    return cut
