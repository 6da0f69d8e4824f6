"""ADEPT (arXiv 2510.10071): identity copies of the layers that general competence hardly needs, trained unit by unit.

Layers with the lowest delta are copied (section 3.1); inside the copies a unit's learning rate falls with its
importance for general competence (section 3.2, equations 5 and 6), refreshed as training goes on. What is chosen, and
how, is in the sections `probe`, `expand`, `importance` and `lr_policy`. With the map `ratio`, which is not the paper's,
learning rates also rise with the importance for the domain.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from adept_ds.methods.shape import Method, Preparation, Training

if TYPE_CHECKING:
    from adept_ds.config.schema import Config
    from adept_ds.training.rule import TrainingRule
    from adept_ds.units.importance import Importances


class Adept(Method):
    """Expanded layers with unit-wise learning rates."""

    name: Literal["adept"] = "adept"

    starts_from = "expanded"
    sections = frozenset({"expand", "importance", "lr_policy", "anchor"})
    presets: ClassVar = {}

    def check(self, config: Config) -> None:
        if not config.estimates_domain_importance:
            return
        if config.importance.source != "corpus":
            raise ValueError(
                f"importance.source: {config.importance.source} sees general text alone, and lr_policy.map: ratio goes "
                "by the domain's too; remove it, or choose another map"
            )
        config.data.check_domain_sample(
            "lr_policy.map: ratio", "another map", "importance.sequences", config.importance.sequences
        )

    def prepare(self, preparation: Preparation) -> Importances | None:
        """Importance of each copy's *source* layer: in a fresh copy the silent factors hide everything behind them.

        The source model computes the same function as the expanded one, so the same estimate runs on it, with the
        source layers unfrozen and nothing trained.
        """
        config, start = preparation.config, preparation.start
        if not config.refreshes or config.importance.initial == "ones":
            return None
        from adept_ds.models.loading import layers_train
        from adept_ds.training.rule import check_start
        from adept_ds.units.importance import Importances, estimate_importance
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
        texts = {"": preparation.general_text}
        if config.estimates_domain_importance:
            texts[" for the domain"] = preparation.domain_text
        found = []
        for side, text in texts.items():
            with preparation.together(f"estimating importance{side}") as (bar, work):
                found.append(estimate_importance(engine, registry, text(), preparation.ranks, bar, work=work))
                check_start(found[-1])
        release(engine)
        return Importances(*found)

    def rule(self, training: Training) -> TrainingRule:
        from adept_ds.training.importance_rule import ImportanceRule
        from adept_ds.training.rule import TrainingRule
        from adept_ds.units.importance import Importances, OnlineImportance, estimate_importance

        config, engine, ranks = training.config, training.engine, training.ranks
        if not config.refreshes:
            return TrainingRule()
        rule = partial(ImportanceRule, training.unit_lr, training.prepared, config.importance.every)
        if config.importance.source == "online":
            online = OnlineImportance(engine, training.registry, ranks)

            def seen() -> Importances | None:
                importance = online.take()
                return None if importance is None else Importances(importance)

            return rule(seen, online)
        texts = [training.general_text()]
        if config.estimates_domain_importance:
            texts.append(training.domain_text())
        sides = [(text, training.frozen_prefix(text, sharing=len(texts))) for text in texts]

        def estimate() -> Importances:
            return Importances(
                *(estimate_importance(engine, training.registry, text, ranks, prefix=prefix) for text, prefix in sides)
            )

        return rule(estimate)
