"""Parenting (Xu et al., ACL 2025, arXiv 2410.10360), carried over to pretraining: each kind of unit has its own rule.

The original tunes a model that answers from retrieved text, for two abilities that pull against each other: to adhere
to the text, and to withstand what is wrong in it. By the importance of units to either ability it tells exclusive,
entangled and other units apart, and tunes each kind in its own way. Here the abilities are the domain and general
competence. Importance is the mean of |w dL/dw| over a unit's elements (as in ADEPT, equation 5), on general and on
domain text; on each side the units with the highest one, a share `important`, count. A unit's learning rate is
multiplied by

    0              important to general competence only: it is kept,
    1              important to the domain only: it is what shall change,
    shared_rate    important to both: it changes with care,
    idle_rate      important to neither: room for what is new.

Both importances are estimated before the first step and again every `importance.every` steps, on
`importance.sequences` sequences of each side.

Where it departs from the original: that trains adapters, apart for each ability and for an auxiliary task of extracting
documents, and mixes them by kind of unit in fixed shares, so that every kind learns something from the text that serves
it. In continual pretraining only the domain's text is learned, so that the rule of a kind is a learning rate. The
original weighs smoothed importances by how strongly layers are activated, and its threshold follows their mean and
spread; here a fixed share counts, norms ranked among themselves.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from adept_ds.methods.full import WholeModel
from adept_ds.methods.shape import Training

if TYPE_CHECKING:
    from adept_ds.config.schema import Config
    from adept_ds.training.rule import TrainingRule


class Parenting(WholeModel):
    """Everything trains at the rate of its role."""

    name: Literal["parenting"] = "parenting"
    important: float = Field(0.2, gt=0, lt=1, description="share of the units that count as important on each side")
    shared_rate: float = Field(0.5, ge=0, le=1e6, description="multiplier of units that both sides need")
    idle_rate: float = Field(1.0, ge=0, le=1e6, description="multiplier of units that neither side needs")

    sections = frozenset({"importance"})
    needs_general_text: ClassVar[bool] = True
    estimates_again: ClassVar[bool] = True

    def check(self, config: Config) -> None:
        if config.importance.source != "corpus":
            raise ValueError(
                f"importance.source: {config.importance.source} sees general text alone, and method: parenting needs "
                "the domain's too; remove it"
            )
        config.data.check_domain_sample(
            "method: parenting", "another method", "importance.sequences", config.importance.sequences
        )

    def rule(self, training: Training) -> TrainingRule:
        from adept_ds.training.role_rule import RoleRule
        from adept_ds.units.importance import estimate_importance

        engine, registry, ranks = training.engine, training.registry, training.ranks
        general, domain = training.general_text(), training.domain_text()
        importance = training.config.importance
        return RoleRule(
            training.unit_lr,
            partial(estimate_importance, engine, registry, general, ranks),
            partial(estimate_importance, engine, registry, domain, ranks),
            training.together,
            important=self.important,
            rates={"general": 0.0, "domain": 1.0, "shared": self.shared_rate, "idle": self.idle_rate},
            every=importance.every,
            from_start=importance.initial == "source",
        )
