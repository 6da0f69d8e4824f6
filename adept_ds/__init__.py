"""adept-ds: domain adaptation of language models by adaptive layer expansion, on DeepSpeed.

`UnitLR` and `UnitAdamW` also serve alone, with any model on a DeepSpeed engine (docs/unit_lr.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adept_ds.base.version import __version__ as __version__

if TYPE_CHECKING:
    from adept_ds.units.adamw import UnitAdamW as UnitAdamW
    from adept_ds.units.unit_lr import UnitLR as UnitLR

__all__ = ["UnitAdamW", "UnitLR", "__version__"]


def __getattr__(name: str) -> Any:
    """Import at first use: the command must find a mistake in its input without waiting for torch."""
    if name == "UnitAdamW":
        from adept_ds.units.adamw import UnitAdamW

        return UnitAdamW
    if name == "UnitLR":
        from adept_ds.units.unit_lr import UnitLR

        return UnitLR
    raise AttributeError(f"module 'adept_ds' has no attribute '{name}'")
