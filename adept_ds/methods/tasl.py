"""TaSL (Feng et al., ACL 2024, arXiv 2408.09857; extended: arXiv 2408.05200): old and new weights by skill unit.

The whole model trains. The importance of a unit, I = mean of |w dL/dw| over its elements, is smoothed over batches:

    I' <- a1 I' + (1 - a1) I,    U <- a2 U + (1 - a2) |I - I'|,    score = I' * U,

for the domain over the gradients of training, for general competence over batches of general text at the base's
weights. On each side the units with the highest scores, a share `important`, count. After training every unit becomes

    old                                   important to general competence only,
    new                                   important to the domain only,
    old_share old + (1 - old_share) new   important to both,
    (old + new) / 2                       important to neither.

Constants are those of the published implementation (a = 0.85, important = 0.2, old_share = 0.7).

Where it departs from the original: skill units are matrices and norms of the whole model, embeddings and head included,
not adapters; smoothing acts on the means of units, two numbers each, where the original smooths every element and
averages the scores after that; norms, which the original has none of in its adapters, are ranked among themselves; the
tasks before are one, general competence, whose text is read once without training on it, where the original
accumulates scores of task after task; and steps are looked at from the first one on, where the published
implementation leaves out the first 50.

Consolidation is the export's: losses during training, and checkpoints, are those of the new weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from adept_ds.config.section import Beta, Count
from adept_ds.methods.full import WithGeneralText
from adept_ds.methods.shape import Training

if TYPE_CHECKING:
    import torch

    from adept_ds.config.schema import Config
    from adept_ds.models.directory import ModelDirectory
    from adept_ds.training.rule import TrainingRule


class Tasl(WithGeneralText):
    """Everything trains; what general competence needs is given back."""

    name: Literal["tasl"] = "tasl"
    important: float = Field(0.2, gt=0, lt=1, description="share of the units that count as important on each side")
    old_share: float = Field(0.7, ge=0, le=1, description="of the base's weights where both sides need a unit: gamma")
    smoothing: tuple[Beta, Beta] = Field(
        (0.85, 0.85), strict=False, description="a1 of the importance, a2 of its uncertainty"
    )
    observe_every: Count = Field(1, description="optimizer steps from one look at the gradient to the next")

    def check(self, config: Config) -> None:
        super().check(config)
        if config.data.replay:
            raise ValueError(
                "data.replay: method: tasl takes all that it trains on for the domain's; remove it, or write method: "
                "replay"
            )

    def rule(self, training: Training) -> TrainingRule:
        from adept_ds.training.consolidation import ConsolidationRule

        return ConsolidationRule(
            training.engine,
            training.unit_lr,
            training.ranks,
            lambda: training.general_text(self.sequences, self.batch_sequences),
            training.together,
            smoothing=self.smoothing,
            every=self.observe_every,
            important=self.important,
            new_shares={"general": 0.0, "domain": 1.0, "shared": 1.0 - self.old_share, "idle": 0.5},
        )

    def learned(
        self, trained: Mapping[str, torch.Tensor], model: ModelDirectory, checkpoint: Path
    ) -> Mapping[str, torch.Tensor]:
        from adept_ds.training.consolidation import consolidated

        return consolidated(trained, model, checkpoint)
