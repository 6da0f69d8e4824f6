"""The section `eval`: what is found out about the base and the adapted model at the end of a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from adept_ds.config.paths import UserPath
from adept_ds.config.section import Section

Between = Annotated[float, Field(gt=0, lt=1)]


class EvalSection(Section):
    """Evaluation beside losses on data.general_eval and data.domain_eval; see docs/evaluation.md."""

    dial: list[Between] = Field(
        default_factory=list,
        description="positions between base (0) and adapted model (1) that are evaluated too, such as [0.25, 0.5]",
    )
    tasks: list[UserPath] = Field(
        default_factory=list,
        description="directories with question files (*.jsonl) and tasks of lm-eval (*.yaml) to be scored",
    )

    lm_eval: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(
        default_factory=list, description="names of tasks of lm-eval (pip install 'adept-ds[eval]'), such as [mmlu]"
    )

    diagnose: Literal["auto", "never"] = Field(
        "auto", description="auto: a run that forgot, or did not learn, ends with `adept diagnose`"
    )

    @model_validator(mode="after")
    def _every_position_once(self) -> EvalSection:
        labels = [f"{alpha:g}" for alpha in self.dial]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise ValueError(f"dial: {twice} is there twice, or differs in the seventh digit only: keep one of both")
        return self

    @property
    def scores_tasks(self) -> bool:
        return bool(self.tasks or self.lm_eval)
