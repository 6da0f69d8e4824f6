"""ADEPT (arXiv 2510.10071): identity copies of the layers that general competence hardly needs, trained unit by unit.

Layers with the lowest delta are copied (section 3.1); inside the copies a unit's learning rate falls with its
importance for general competence (section 3.2, equations 5 and 6), refreshed as training goes on. What is chosen, and
how, is in the sections `probe`, `expand`, `importance` and `lr_policy`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from adept_ds.methods.shape import Method, Preparation, Training

if TYPE_CHECKING:
    from adept_ds.training.rule import TrainingRule


class Adept(Method):
    """Expanded layers with unit-wise learning rates."""

    name: Literal["adept"] = "adept"

    starts_from = "expanded"
    sections = frozenset({"expand", "importance", "lr_policy", "anchor"})
    presets: ClassVar = {}

    def prepare(self, preparation: Preparation) -> list[float] | None:
        """Importance of each copy's *source* layer: in a fresh copy the silent factors hide everything behind them.

        The source model computes the same function as the expanded one, so the same estimate runs on it, with the
        source layers unfrozen and nothing trained.
        """
        config, start = preparation.config, preparation.start
        if not config.refreshes or config.importance.initial == "ones":
            return None
        from adept_ds.base.errors import NonFiniteLossError
        from adept_ds.models.loading import layers_train
        from adept_ds.units.importance import estimate_importance
        from adept_ds.units.registry import build_registry
        from adept_ds.zero.engine import parameter_shapes, release

        preparation.announce("importance of the source layers' units")
        family = start.base.family
        engine = preparation.make_engine(start.base, layers_train(family, start.sources))
        registry = build_registry(
            family,
            parameter_shapes(engine.module),
            start.sources,
            config.importance.granularity,
            engine.module.config,
        )
        with preparation.together("estimating importance") as bar:
            importance = estimate_importance(engine, registry, preparation.general_text(), preparation.ranks, bar)
            if not all(map(math.isfinite, importance)):
                raise NonFiniteLossError("importance: a gradient of the source layers is NaN or infinite")
        release(engine)
        return importance

    def rule(self, training: Training) -> TrainingRule:
        from adept_ds.training.importance_rule import ImportanceRule
        from adept_ds.training.rule import TrainingRule
        from adept_ds.units.importance import OnlineImportance, estimate_importance

        config, engine, ranks = training.config, training.engine, training.ranks
        if not config.refreshes:
            return TrainingRule()
        rule = partial(ImportanceRule, training.unit_lr, training.prepared, config.importance.every)
        if config.importance.source == "online":
            online = OnlineImportance(engine, training.registry, ranks)
            return rule(online.take, online)
        batches = training.general_text()
        prefix = training.frozen_prefix(batches)
        return rule(partial(estimate_importance, engine, training.registry, batches, ranks, prefix=prefix))
