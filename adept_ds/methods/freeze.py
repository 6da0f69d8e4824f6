"""Training of k layers in place, everything else frozen: what copies are compared with at equal numbers of parameters.

Which layers is said by `expand`: by lowest delta, evenly spread, the last, or a list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from adept_ds.methods.shape import Method

if TYPE_CHECKING:
    from adept_ds.config.schema import Config


class Freeze(Method):
    """Chosen layers at one learning rate, nothing added."""

    name: Literal["freeze"] = "freeze"

    sections = frozenset({"expand"})
    presets: ClassVar = {"lr_policy": {"map": "constant"}}

    def check(self, config: Config) -> None:
        if config.expand.by_gain:
            raise ValueError(
                "expand.choose: gain says what silent copies would do, and method: freeze makes none; choose layers "
                "otherwise, or list them"
            )
