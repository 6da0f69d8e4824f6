"""Full continual pretraining with replay: general text is mixed into every batch, at `data.replay_share`.

The classical remedy against forgetting (experience replay: Rolnick et al., NeurIPS 2019; for continual pretraining:
Ibrahim et al., TMLR 2024, arXiv 2403.08763).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from adept_ds.methods.full import WholeModel

if TYPE_CHECKING:
    from adept_ds.config.schema import Config


class Replay(WholeModel):
    """Everything at one learning rate, on domain and general text."""

    name: Literal["replay"] = "replay"

    replays: ClassVar[bool] = True

    def check(self, config: Config) -> None:
        if not config.data.replay:
            raise ValueError("data.replay: method: replay mixes in general text; list files, or write method: full")
