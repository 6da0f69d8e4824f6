"""The figures of a comparison: what each arm trades, what it reaches within a bound, and how it got there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from adept_ds.comparison import wording
from adept_ds.comparison.arms import BOUNDS, CRITERIA, PLAIN, Arm
from adept_ds.comparison.findings import Findings
from adept_ds.comparison.fronts import GENERAL_RISE
from adept_ds.comparison.record import ArmRecord, ChosenPoint, PointRecord
from adept_ds.comparison.trials import Floats, Progress
from adept_ds.report.drawing import GREY, INK, WIDTH

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#B58900", "#5B5B5B", "#882255", "#332288")
"""Of Okabe and Ito, told apart by the colour-blind; yellow, too pale on white, is darkened; wine and indigo are new."""

MARKERS, LINES = "osD^vP*", ("solid", (0, (4, 1.2)))
"""With the colours: more arms than colours differ in these."""

SOFT = "#5b6675"

_SMOOTH = 0.1
"""Share of a training curve that a running mean is over."""


class Look(NamedTuple):
    color: str
    marker: str
    line: str | tuple[float, tuple[float, ...]]


class End(NamedTuple):
    """Of a curve, to be labelled."""

    name: str
    color: str
    x: float
    y: float


def looks(arms: Sequence[ArmRecord]) -> dict[str, Look]:
    """By name of the arm, the same in every figure."""
    return {
        arm.name: Look(PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)], LINES[i // len(PALETTE) % len(LINES)])
        for i, arm in enumerate(arms)
    }


def draw_fronts(findings: Findings, figure: Figure) -> None:
    """Every operating point on test documents: lines are dials of one rate, marks where they were evaluated, filled
    ones the front."""
    arms = findings.comparison.arms
    figure.set_size_inches(WIDTH, 5.4)
    axes = figure.add_subplot()
    axes.grid(visible=True, axis="both")
    for arm in arms:
        _draw_arm(axes, arm, looks(arms)[arm.name])
    base = arms[0].points[0]
    axes.scatter([0], [base.test_domain_loss], color=INK, marker="X", s=60, zorder=7)
    axes.annotate("base", (0, base.test_domain_loss), (-7, 2), textcoords="offset points", ha="right", weight="bold")
    rises = [point.test_general_rise for arm in arms for point in arm.points]
    right = _widest_rise(rises)
    axes.set_xlim(min(*rises, *BOUNDS) - 0.04 * right, right)
    _mark_bounds(axes)
    axes.set_xlabel(
        "largest rise of a general source above the base (nats, test): \N{RIGHTWARDS ARROW} more forgetting"
    )
    axes.set_ylabel("domain loss (nats, test): \N{LEFTWARDS ARROW} more learned")
    _label_at_right(axes, [_front_end(arm, right, looks(arms)[arm.name]) for arm in arms])


def _draw_arm(axes: Any, arm: ArmRecord, look: Look) -> None:
    for lr in arm.learning_rates:
        dial = [point for point in arm.points if point.lr in (lr, None)]
        axes.plot(*_places(dial), color=look.color, linewidth=1.1, linestyle=look.line, alpha=0.55, zorder=2)
    rest = [point for point in arm.points if point.lr is not None and point.evaluated]
    marks: dict[str, Any] = {"marker": look.marker, "s": 30, "zorder": 4}
    axes.scatter(*_places(rest), edgecolors=look.color, facecolors="white", linewidths=0.9, **marks)
    front = [point for point in rest if point.on_front]
    axes.scatter(*_places(front), color=look.color, linewidths=0, **marks)
    plain = arm.chosen[PLAIN.name]
    if plain is not None:
        place = [plain.largest_rise], [plain.domain_loss]
        axes.scatter(*place, color=look.color, marker=look.marker, edgecolors="white", s=62, zorder=6)


def _places(points: Sequence[PointRecord]) -> tuple[list[float], list[float]]:
    return [point.test_general_rise for point in points], [point.test_domain_loss for point in points]


def _widest_rise(rises: Sequence[float]) -> float:
    """Where the axis ends: points that forget more than half again what hypervolumes count would flatten the rest."""
    return 1.04 * max(max(BOUNDS), min(max(rises), 1.5 * GENERAL_RISE))


def _mark_bounds(axes: Any) -> None:
    for bound in BOUNDS:
        axes.axvline(bound, color=GREY, linestyle=(0, (2, 2)), linewidth=0.9, zorder=1)
        style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 7.5, "color": SOFT}
        text = f"{bound:g}".replace("-", wording.MINUS)
        axes.annotate(text, (bound, 1), (0, 3), xycoords=("data", "axes fraction"), **style)


def _front_end(arm: ArmRecord, right: float, look: Look) -> End:
    """The point of the front that has learned most, of those that are seen; the base only where there is no other."""
    front = [point for point in arm.points if point.on_front and point.lr is not None] or arm.points[:1]
    seen = [point for point in front if point.test_general_rise <= right] or front
    last = min(seen, key=lambda point: point.test_domain_loss)
    return End(arm.name, look.color, last.test_general_rise, last.test_domain_loss)


def _label_at_right(axes: Any, ends: Sequence[End]) -> None:
    """Names in the margin, in the order of the curves' ends, apart from one another, each joined to its end."""
    low, high = axes.get_ylim()
    gap = (high - low) * 13 / (72 * axes.figure.get_figheight() * 0.85)
    ordered = sorted(ends, key=lambda end: end.y)
    left, right = axes.get_xlim()
    margin = right + 0.025 * (right - left)
    for (name, color, x, y), height in zip(ordered, spread([end.y for end in ordered], gap), strict=True):
        leader = {"arrowstyle": "-", "color": color, "linewidth": 0.7, "alpha": 0.5, "linestyle": ":"}
        style = {"color": color, "weight": "bold", "fontsize": 9, "va": "center", "annotation_clip": False}
        axes.annotate(name, (x, y), (margin, height), **style, arrowprops=leader)


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Sorted values moved so that neighbours are `gap` apart, each group around its mean."""
    groups: list[list[float]] = []
    for value in values:
        groups.append([value])
        while len(groups) > 1 and _lowest(groups[-1], gap) < _lowest(groups[-2], gap) + gap * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_lowest(group, gap) + gap * i for group in groups for i in range(len(group))]


def _lowest(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


class Span(NamedTuple):
    """A value with its interval, and whether it is drawn filled."""

    value: float
    low: float
    high: float
    filled: bool


def draw_reached(findings: Findings, figure: Figure) -> None:
    """Changes against the base; hollow where test documents do not hold the bound."""
    comparison = findings.comparison
    panels = {
        criterion.name: {
            arm.name: Span(chosen.change, chosen.change_low, chosen.change_high, chosen.holds_on_test is not False)
            for arm in comparison.arms
            if (chosen := arm.chosen[criterion.name]) is not None
        }
        for criterion in CRITERIA
    }
    _draw_spans(comparison.arms, looks(comparison.arms), panels, figure, "domain loss against the base (nats)")


def draw_differences(findings: Findings, figure: Figure) -> None:
    """To the reference; filled where told apart."""
    comparison, reference = findings.comparison, findings.comparison.reference
    others = [arm for arm in comparison.arms if arm.name != reference]
    panels = {
        criterion.name: {
            arm.name: Span(gap.value, gap.low, gap.high, gap.told_apart)
            for arm in others
            if (gap := comparison.gap(criterion.name, arm.name, reference)) is not None
        }
        for criterion in CRITERIA
    }
    if others:
        _draw_spans(others, looks(comparison.arms), panels, figure, f"domain loss less that of {reference} (nats)")


def _draw_spans(
    arms: Sequence[ArmRecord],
    look: Mapping[str, Look],
    panels: Mapping[str, Mapping[str, Span]],
    figure: Figure,
    label: str,
) -> None:
    """A panel for each criterion that something meets, a line for each arm."""
    shown = {criterion: spans for criterion, spans in panels.items() if spans}
    if not shown:
        return
    figure.set_size_inches(WIDTH, 1.15 + 0.3 * len(arms))
    grid = figure.subplots(1, len(shown), sharey=True, sharex=True, squeeze=False)[0]
    for axes, (criterion, spans) in zip(grid, shown.items(), strict=True):
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        axes.axvline(0, color=INK, linewidth=0.9)
        for row, arm in enumerate(arms):
            color, marker, _ = look[arm.name]
            if arm.name not in spans:
                axes.text(
                    0.5, row, wording.NONE, transform=axes.get_yaxis_transform(), ha="center", va="center", color=GREY
                )
                continue
            span = spans[arm.name]
            axes.plot([span.low, span.high], [row, row], color=color, linewidth=1.6, marker="|", markersize=7)
            style = {"color": color if span.filled else "white", "edgecolors": color, "marker": marker}
            axes.scatter([span.value], [row], **style, s=26, linewidths=1.4, zorder=3)
        axes.set_title(wording.criterion(criterion), loc="left", weight="bold")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", wording.MINUS))
        axes.tick_params(axis="y", length=0)
    grid[0].set_yticks(range(len(arms)), [arm.name for arm in arms])
    for tick, arm in zip(grid[0].get_yticklabels(), arms, strict=True):
        tick.set(color=look[arm.name].color, weight="bold", fontsize=9)
    grid[0].set_ylim(len(arms) - 0.4, -0.6)
    figure.supxlabel(label, fontsize=8.5)


def draw_progress(findings: Findings, figure: Figure) -> None:
    """Loss against tokens and against seconds."""
    comparison, held_out = findings.comparison, uses_held_out(findings)
    curves = {
        arm.name: curve
        for arm, record in zip(findings.arms, comparison.arms, strict=True)
        if (curve := _curve(arm, record.chosen[PLAIN.name], held_out=held_out)) is not None
    }
    if not curves:
        return
    figure.set_size_inches(WIDTH, 3.8)
    grid = figure.subplots(1, 2, sharey=True)
    kinds: tuple[tuple[str, Callable[[Progress], Floats]], ...] = (
        ("tokens trained on", lambda curve: curve.tokens),
        ("seconds, with all that is computed beside the steps", lambda curve: curve.seconds),
    )
    for axes, (label, along) in zip(grid, kinds, strict=True):
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(lambda value, _: wording.count(value).replace(" ", ""))
        for name, curve in curves.items():
            color, _, line = looks(comparison.arms)[name]
            axes.plot(along(curve), curve.loss, color=color, linewidth=1.8, linestyle=line)
            axes.plot(along(curve)[-1:], curve.loss[-1:], color=color, marker="o", markersize=4)
    grid[0].set_ylabel("held-out domain loss (nats)" if held_out else "training loss (nats), running mean")
    look = looks(comparison.arms)
    ends = [End(name, look[name].color, float(c.seconds[-1]), float(c.loss[-1])) for name, c in curves.items()]
    _label_at_right(grid[1], ends)


def uses_held_out(findings: Findings) -> bool:
    """Whether every trial was evaluated often enough in training; what methods train on may differ, as with replay."""
    return all(len(cell.held_out.loss) >= 4 for arm in findings.arms for cell in arm.cells.values())


def _curve(arm: Arm, plain: ChosenPoint | None, *, held_out: bool) -> Progress | None:
    """Of the first search seed at the learning rate of the plain choice."""
    if plain is None or plain.lr is None:
        return None
    seed = next((seed for seed in arm.search_seeds if seed in plain.seeds), plain.seeds[0])
    cell = arm.cells[plain.lr, seed]
    curve = cell.held_out if held_out else _smooth(cell.training)
    return curve if len(curve.loss) else None


def _smooth(curve: Progress) -> Progress:
    """A mean over the last tenth before each point, or what there is of it."""
    half = max(1, math.ceil(_SMOOTH * len(curve.loss)))
    known = np.isfinite(curve.loss)
    tokens, seconds, loss = (values[known] for values in curve)
    sums = np.concatenate([[0.0], np.cumsum(loss)])
    first = np.maximum(np.arange(len(loss)) - half + 1, 0)
    return Progress(tokens, seconds, (sums[1:] - sums[first]) / (np.arange(len(loss)) + 1 - first))


def draw_hypervolumes(findings: Findings, figure: Figure) -> None:
    arms = sorted(findings.comparison.arms, key=lambda arm: arm.hypervolume)
    look = looks(findings.comparison.arms)
    figure.set_size_inches(WIDTH, 0.8 + 0.28 * len(arms))
    axes = figure.add_subplot()
    axes.grid(visible=False)
    values = [1000 * arm.hypervolume for arm in arms]
    axes.barh(range(len(arms)), values, color=[look[arm.name].color for arm in arms], height=0.66)
    for row, value in enumerate(values):
        axes.text(value, row, f" {value:.1f}", va="center", weight="bold")
    axes.set_yticks(range(len(arms)), [arm.name for arm in arms])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("hypervolume of the front (thousandths of nats squared, test)")


FIGURES: dict[str, Callable[[Findings, Figure], None]] = {
    "fronts": draw_fronts,
    "hypervolumes": draw_hypervolumes,
    "reached": draw_reached,
    "differences": draw_differences,
    "progress": draw_progress,
}
