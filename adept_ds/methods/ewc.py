"""Elastic weight consolidation (Kirkpatrick et al., PNAS 2017, arXiv 1612.00796): the whole model, held by a penalty.

The loss of a step has the term (equation 3)

    strength/2 * sum_i F_i (w_i - w0_i)^2

with w0 the base's weights and F the diagonal of the Fisher matrix of general text at w0: an estimate, by its curvature,
of what every weight is worth to general competence. F is estimated once, before the first step, as

    F_i = mean over batches of N (dL/dw_i)^2,    L the mean loss over the N predicted tokens of a batch,

which is the diagonal for the prediction of one token, about the same whatever the batches' size. By Laplace's
approximation the strength would be the number of tokens that the base has learned from, over that of the adaptation;
less is useful.

Where it departs from the original: the Fisher matrix is the empirical one (labels of the text, none drawn from the
model), of text that stands in for what the base was trained on, a batch at a time; and the penalty's gradient is
clipped together with the loss's. AdamW's decay pulls towards zero as ever; set `train.weight_decay: 0` for the penalty
alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from adept_ds.methods.full import WithGeneralText
from adept_ds.methods.shape import Training

if TYPE_CHECKING:
    from adept_ds.training.rule import TrainingRule


class Ewc(WithGeneralText):
    """Everything trains, and what general text minds is held back."""

    name: Literal["ewc"] = "ewc"
    kept_per_element: ClassVar[int] = 8  # w0 and F in float32
    strength: float = Field(100.0, gt=0, le=1e15, description="of the penalty: lambda")

    def rule(self, training: Training) -> TrainingRule:
        from adept_ds.models.device import resolve_precision
        from adept_ds.training.fisher_penalty import FisherPenalty
        from adept_ds.weights.start_weights import StartWeights

        return FisherPenalty(
            training.engine,
            training.unit_lr,
            training.ranks,
            StartWeights(training.start.model, resolve_precision(training.config.train.precision)),
            self.strength,
            lambda: training.general_text(self.sequences, self.batch_sequences),
            training.together,
        )
