"""The figures of a diagnosis, one for each thing that it looks at."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

from adept_ds.report.diagnosis import Change, Diagnosis
from adept_ds.report.diagnosis_findings import AGAINST, HELD_BACK
from adept_ds.report.diagnosis_units import rank_shares
from adept_ds.report.drawing import BLUE, COPY, GREEN, GREY, INK, PALE, WIDTH
from adept_ds.report.run_files import MAX_DOTS, short

TEXTS = {"general": GREEN, "domain": BLUE}

_ACROSS = 4
"""Panels side by side."""

WARNING = "#fbe3d0"
"""Where something is not as it should be."""

_ERROR_BARS = {"elinewidth": 0.9, "capsize": 2, "ecolor": INK}


def draw_effects(diagnosis: Diagnosis, figure: Figure) -> None:
    """What general and domain loss owe to each copy."""
    effects = diagnosis.effects
    if not effects:
        return
    figure.set_size_inches(WIDTH, 3.4)
    axes, places = figure.add_subplot(), np.arange(len(effects))
    for number, (text, color) in enumerate(TEXTS.items()):
        changes: list[Change | None] = [getattr(effect, text) for effect in effects]
        heights = [change.change if change else math.nan for change in changes]
        errors = [change.standard_error or 0.0 if change else 0.0 for change in changes]
        if not all(map(math.isnan, heights)):
            style: Any = {"color": color, "label": f"{text} text", "error_kw": _ERROR_BARS}
            bars = axes.bar(places + 0.38 * number - 0.19, heights, 0.36, yerr=errors, **style)
            axes.bar_label(bars, [f"{height:+.4f}" for height in heights], padding=3, fontsize=7.5)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.margins(y=0.16)
    axes.set_xticks(places, _named(diagnosis))
    axes.set_ylabel("loss with the copy minus\nloss without it (nats)")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def draw_conflicts(diagnosis: Diagnosis, figure: Figure) -> None:
    """Ranks of importance and of change, norms apart; protected units lie on the falling line."""
    units = [unit for unit in diagnosis.units if unit.against is not None]
    groups = {
        "norms": [u for u in units if u.kind == "norm"],
        "everything else": [u for u in units if u.kind != "norm"],
    }
    groups = {title: group for title, group in groups.items() if group}
    if not groups:
        return
    figure.set_size_inches(WIDTH, 4.0)
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, (title, group) in zip(panels, groups.items(), strict=True):
        axes.plot([0, 1], [1, 0], color=GREY, linewidth=1, linestyle="--")
        axes.fill_between([AGAINST, 1], [1, AGAINST], 1, color=WARNING, linewidth=0)
        moved, matters = (rank_shares([getattr(unit, key) for unit in group]) for key in ("change", "importance"))
        thin = slice(None, None, math.ceil(len(group) / MAX_DOTS))
        axes.scatter(matters[thin], moved[thin], color=BLUE, s=20, alpha=0.75, linewidths=0)
        worst = max(range(len(group)), key=lambda place: group[place].against or 0.0)
        left = matters[worst] > 0.5
        axes.annotate(group[worst].unit, (matters[worst], moved[worst]), (-6 if left else 6, -3), fontsize=7,
                      textcoords="offset points", ha="right" if left else "left")  # fmt: skip
        axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), xlabel="rank of importance (1: most important)")
        axes.set_title(title, loc="left")
    panels[0].set_ylabel("rank of change (1: moved farthest)")


def draw_writes(diagnosis: Diagnosis, figure: Figure) -> None:
    """What copies write, beside the layers below them."""
    if not diagnosis.writes or not diagnosis.writes[0].on:
        return
    texts = list(diagnosis.writes[0].on)
    figure.set_size_inches(WIDTH, 3.2)
    panels = figure.subplots(1, len(texts), sharey=True, squeeze=False)[0]
    for axes, text in zip(panels, texts, strict=True):
        shares = [writes.on[text] for writes in diagnosis.writes]
        _draw_bars(axes, -0.2, PALE, "the layer below", [share.below_share for share in shares])
        _draw_bars(axes, 0.2, COPY, "the copy", [share.copy_share for share in shares])
        axes.set_title(f"on {text} text", loc="left")
        axes.set_xticks(range(len(shares)), _named(diagnosis))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{short(100 * value)}%")
        axes.yaxis.set_minor_formatter(NullFormatter())
    all_shares = [share for writes in diagnosis.writes for share in writes.on.values()]
    drawn = [height for share in all_shares for height in (share.copy_share, share.below_share) if height > 0]
    if drawn:  # from a whole power of ten on, so that at least one stands at the axis
        panels[0].set_ylim(10 ** math.floor(math.log10(min(drawn))), 2 * max(drawn))
    panels[0].set_ylabel("written, as a share of\nthe stream's norm")
    panels[-1].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def _draw_bars(axes: Any, shift: float, color: str, label: str, heights: Sequence[float]) -> None:
    bars = axes.bar(np.arange(len(heights)) + shift, heights, 0.38, color=color, label=label)
    axes.bar_label(bars, [f"{height:.2%}" for height in heights], padding=2, fontsize=7)


def draw_multipliers(diagnosis: Diagnosis, figure: Figure) -> None:
    """How many parameters have which multiplier."""
    units = diagnosis.units
    if not units or not diagnosis.setting.copied:
        return
    figure.set_size_inches(WIDTH, 2.8)
    axes = figure.add_subplot()
    multipliers, sizes = np.array([unit.multiplier for unit in units]), np.array([float(unit.numel) for unit in units])
    top = max(2.0, float(multipliers.max()))
    bins = np.linspace(0, top, 41).tolist()
    axes.axvspan(0, HELD_BACK, color=WARNING, linewidth=0, label=f"held back (below {HELD_BACK:g})")
    axes.hist(multipliers, bins, weights=sizes / sizes.sum(), color=BLUE)
    mean = float(np.average(multipliers, weights=sizes))
    axes.axvline(mean, color=INK, linestyle="--", linewidth=1, label=f"mean {mean:.2f}")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlim=(0, top), xlabel="mean multiplier over the run", ylabel="share of trained parameters")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def draw_gradients(diagnosis: Diagnosis, figure: Figure) -> None:
    """Sizes of gradients of every unit of every copy, by powers of ten."""
    found = {(unit.part, unit.layer): unit.rms for unit in diagnosis.gradients if unit.rms > 0}
    if not found:
        return
    parts = list(dict.fromkeys(unit.part for unit in diagnosis.gradients))[:_MAX_PARTS]
    layers = sorted({unit.layer for unit in diagnosis.gradients})
    grid = np.array([[found.get((part, layer), math.nan) for layer in layers] for part in parts])
    figure.set_size_inches(WIDTH, 0.9 + 0.24 * len(parts))
    axes = figure.add_subplot()
    image = axes.pcolormesh(np.log10(grid), cmap="YlGnBu", edgecolors="white", linewidth=0.4)
    middle = np.nanmean(np.log10(grid))
    for (row, column), value in np.ndenumerate(grid):
        ink = "white" if np.log10(value) > middle else INK
        axes.text(column + 0.5, row + 0.5, short(value, 2), ha="center", va="center", fontsize=7, color=ink)
    silent = {unit.part for unit in diagnosis.gradients if unit.silent}
    axes.set_yticks(
        np.arange(len(parts)) + 0.5, [f"{part} (silent at first)" if part in silent else part for part in parts]
    )
    axes.set_xticks(np.arange(len(layers)) + 0.5, _named(diagnosis))
    axes.grid(visible=False)
    axes.invert_yaxis()
    figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01, label="log10 of gradient (RMS)")


_MAX_PARTS = 60
"""Experts may be many."""


def draw_overlaps(diagnosis: Diagnosis, figure: Figure) -> None:
    """On which side of the plane each sequence lies."""
    overlaps = diagnosis.overlaps
    if not overlaps:
        return
    across, down = min(_ACROSS, len(overlaps)), math.ceil(len(overlaps) / _ACROSS)
    figure.set_size_inches(WIDTH, 2.6 * down)
    panels = figure.subplots(down, across, squeeze=False)
    for axes in panels.flat[len(overlaps) :]:
        axes.axis("off")
    for axes, overlap in zip(panels.flat, overlaps, strict=False):
        both = {"general": overlap.general_scores, "domain": overlap.domain_scores}
        reach = float(np.quantile(np.abs([*both["general"], *both["domain"]]), 0.99)) or 1.0
        bins = np.linspace(-reach, reach, 25)
        for text, scores in both.items():
            weights = np.full(len(scores), 1 / len(scores))
            axes.hist(np.clip(scores, -reach, reach), bins, weights=weights, color=TEXTS[text], alpha=0.55, label=text)
        axes.axvline(0, color=INK, linewidth=0.9, linestyle="--")
        axes.set_title(f"layer {overlap.index} (copy of {overlap.source})", loc="left")
        axes.set_xlabel(f"accuracy {overlap.accuracy:.2f}, distance {overlap.distance:.3f}")
        axes.set_yticks([])
        axes.grid(visible=False)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    figure.supylabel("share of sequences", fontsize=8.5)


def _named(diagnosis: Diagnosis) -> list[str]:
    return [f"layer {effect.index}\n(copy of {effect.source})" for effect in diagnosis.effects]


FIGURES: dict[str, Callable[[Diagnosis, Figure], None]] = {
    "harmful_copy": draw_effects,
    "unit_against_importance": draw_conflicts,
    "silent_projections": draw_writes,
    "held_back": draw_multipliers,
    "starved_units": draw_gradients,
    "entangled": draw_overlaps,
}
"""By the finding that it belongs to."""
