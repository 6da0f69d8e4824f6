"""Numbers of a comparison as a reader sees them: in its page, in Markdown and in LaTeX."""

from __future__ import annotations

from adept_ds.report.run_files import short

MINUS, NONE = "\N{MINUS SIGN}", "\N{EM DASH}"


def nats(value: float) -> str:
    return f"{value:.3f}".replace("-", MINUS)


def change(value: float) -> str:
    """With its sign, but for what is 0 up to rounding."""
    if abs(value) < 1e-9:
        return "0.000"
    return f"{value:+.3f}".replace("-", MINUS)


def interval(low: float, high: float) -> str:
    """Of changes."""
    return f"{change(low)} to {change(high)}"


def excess(value: float) -> str:
    """Beyond a bound."""
    return f"{value:.3f}" if value >= 0.0005 else "less than 0.001"


def rate(value: float) -> str:
    """A learning rate."""
    return short(value)


def percent(part: float | None, whole: float | None = 1, digits: str = ".3g") -> str:
    return NONE if part is None or not whole else f"{100 * part / whole:{digits}}%"


def points(value: float) -> str:
    """A change of a share, in percentage points."""
    return f"{100 * value:+.1f}".replace("-", MINUS)


def count(value: float | None) -> str:
    if value is None:
        return NONE
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{value:,.0f}"


def size(num_bytes: float | None) -> str:
    if num_bytes is None:
        return NONE
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def point(lr: float | None, alpha: float) -> str:
    """Where an arm is operated."""
    if lr is None:
        return "the base"
    return rate(lr) if alpha == 1 else f"{rate(lr)}, dial {alpha:g}"


def seeds(number: int) -> str:
    return "one seed" if number == 1 else f"{number} seeds"


def criterion(name: str) -> str:
    return "as trained" if name == "plain" else name.replace("-", MINUS)
