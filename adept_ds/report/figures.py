"""The figures of the report."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from adept_ds.report.dial_rows import position_rows
from adept_ds.report.drawing import BLUE, COPY, GREEN, GREY, INK, PALE, WIDTH
from adept_ds.report.run_files import MAX_DOTS, Json, RunFiles, finite, short

MAX_POINTS, MAX_COLUMNS, MAX_UNITS = 1200, 48, 40


RULES = {"knee": BLUE, "budget": GREEN, "threshold": GREY}


def _draw_layers(run: RunFiles, figure: Figure) -> None:
    layers = [layer for layer in run.importance.get("layers") or [] if finite(layer["delta"])]
    if not layers:
        return
    index, delta = (np.array([layer[key] for layer in layers], dtype=float) for key in ("index", "delta"))
    # The outermost layers are often 100 times the rest: their bars are broken, and the others keep a linear axis.
    usual = np.abs(delta)[np.abs(delta) <= 4 * np.percentile(np.abs(delta), 75)]
    top = 1.3 * max(usual, default=0.0) or 1.0
    figure.set_size_inches(WIDTH, 3.6)
    axes = figure.add_subplot()
    axes.bar(index, np.clip(delta, -top, top), color=[COPY if i in run.selected else PALE for i in index])
    error = np.array([layer.get("standard_error") or 0.0 for layer in layers], dtype=float)
    shown = (error > 0) & (np.abs(delta) <= top)
    if shown.any():
        axes.errorbar(index[shown], delta[shown], error[shown], fmt="none", ecolor=INK, elinewidth=0.9, capsize=1.6)
    for x, y, e in zip(index, delta, error, strict=True):
        style: Json = {"ha": "center", "va": "bottom", "rotation": 90, "fontsize": min(8, 440 / len(layers))}
        mark = "  \u00b1" if x in run.within_noise else ""
        above = min(max(y, 0) + (e if abs(y) <= top else 0), top) + top / 60
        axes.text(x, above, short(y, 2 if abs(y) < 0.1 else 3) + mark, **style)
        if abs(y) > top:
            axes.plot([x - 0.5, x + 0.5], np.sign(y) * top * np.array([0.85, 0.9]), color="white", linewidth=4)
    axes.set(xlabel="decoder layer of the base model", xticks=index[:: 1 + len(layers) // 41])
    axes.axis((-0.7, max(index) + 0.7, min(-0.02 * top, 1.1 * max(min(delta), -top)), top * 1.22))
    axes.set_ylabel(run.importance.get("measures") or "importance")
    labels = {COPY: "copied" if run.copies else "selected", PALE: "left as it is"}
    handles = [Patch(color=color, label=label) for color, label in labels.items()]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def _draw_choice(run: RunFiles, figure: Figure) -> None:
    """The sorted deltas, and where each rule would stop."""
    layers = [layer for layer in run.importance.get("layers") or [] if finite(layer["delta"])]
    selection = run.importance.get("selection") or {}
    if not layers or not selection:
        return
    layers.sort(key=lambda layer: (layer["delta"], layer["index"]))
    delta, rank = np.array([layer["delta"] for layer in layers], dtype=float), np.arange(1, len(layers) + 1)
    # Those that nothing works without would flatten the rest.
    top = 1.25 * delta[math.ceil(0.8 * len(delta)) - 1]
    top = top if top > delta[0] else delta[0] + 1.0
    figure.set_size_inches(WIDTH, 3.2)
    axes = figure.add_subplot()
    axes.plot(rank, np.minimum(delta, top * 1.2), color=GREY, linewidth=1)
    colors = [COPY if layer["index"] in run.selected else PALE for layer in layers]
    axes.scatter(rank, np.minimum(delta, top), color=colors, s=34, zorder=3, edgecolors=INK, linewidths=0.4)
    low = min(0.0, delta[0] - 0.05 * (top - delta[0]))
    for x, layer in zip(rank, layers, strict=True):
        text = str(layer["index"]) + ("\u2191" if layer["delta"] > top else "")
        axes.annotate(text, (x, min(layer["delta"], top)), (0, 6), textcoords="offset points", ha="center", fontsize=7)
    for number, (rule, k) in enumerate((selection.get("rules") or {}).items()):
        color = RULES.get(rule, INK)
        axes.axvline(k + 0.5, color=color, linestyle="--", linewidth=1.1)
        height = low + (0.97 - 0.08 * number) * (1.12 * top - low)
        axes.text(k + 0.58, height, f"{rule}: {k}", color=color, va="top", weight="bold")
    axes.axis((0.3, len(layers) + 0.7, low, 1.12 * top))
    axes.set(xlabel="layers, sorted; numbers are those of the base model", xticks=rank[:: 1 + len(rank) // 41])
    axes.set_ylabel(run.importance.get("measures") or "importance")


def _draw_places(run: RunFiles, figure: Figure) -> None:
    """What a copy above each layer would do to both texts, to first order."""
    places = [p for p in run.places.get("places") or [] if all(finite(p[key]) for key in ("gain", "harm", "score"))]
    if not places:
        return
    # What no gradient can be in a record that was changed would leave no axis.
    index, gain, harm, score = (
        np.clip([float(place[key]) for place in places], -1e30, 1e30) for key in ("index", "gain", "harm", "score")
    )
    figure.set_size_inches(WIDTH, 3.4)
    axes = figure.add_subplot()
    chosen = set(run.places.get("selected") or [])
    axes.bar(index - 0.2, gain, 0.4, color=[COPY if i in chosen else PALE for i in index])
    axes.bar(index + 0.2, harm, 0.4, color=GREY)
    axes.scatter(index, score, color=BLUE, s=16, marker="D", zorder=3)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set(xlabel="decoder layer of the base model, above which a copy would stand")
    axes.set(xticks=index[:: 1 + len(index) // 41], ylabel="nats per unit of learning rate,\nto first order")
    handles: list[Any] = [Patch(color=COPY, label="gain on domain text, chosen"), Patch(color=PALE, label="not chosen")]
    handles += [Patch(color=GREY, label="harm to general text")]
    handles += [Line2D([], [], color=BLUE, marker="D", linestyle="", markersize=4, label="score")]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=4)


def _draw_methods(run: RunFiles, figure: Figure) -> None:
    """Ranks, which compare where deltas are in different units."""
    methods = {
        name: np.array(method["deltas"], dtype=float) for name, method in run.methods.items() if method.get("deltas")
    }
    if len(methods) < 2 or len({len(deltas) for deltas in methods.values()}) > 1:
        return
    ranks = np.array([deltas.argsort(kind="stable").argsort(kind="stable") + 1 for deltas in methods.values()])
    figure.set_size_inches(WIDTH, 0.9 + 0.34 * len(methods))
    axes = figure.add_subplot()
    image = axes.pcolormesh(ranks, cmap="YlGnBu", edgecolors="white", linewidth=0.4)
    for (row, column), value in np.ndenumerate(ranks):
        ink = "white" if value > 0.6 * ranks.max() else INK
        axes.text(column + 0.5, row + 0.5, str(value), ha="center", va="center", fontsize=7, color=ink)
    for row, name in enumerate(methods):
        for layer in run.methods[name].get("selected") or []:
            axes.add_patch(Rectangle((layer, row), 1, 1, fill=False, edgecolor=COPY, linewidth=1.8, zorder=3))
    columns = range(0, ranks.shape[1], 1 + ranks.shape[1] // 41)
    axes.set_xticks([column + 0.5 for column in columns], [str(column) for column in columns])
    axes.set_yticks(np.arange(len(methods)) + 0.5, list(methods))
    axes.set_xlabel("decoder layer of the base model")
    axes.grid(visible=False)
    axes.invert_yaxis()
    figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01, label="rank")


def _draw_stack(run: RunFiles, figure: Figure) -> None:
    if not run.copies:
        return
    total = int(run.expansion["source_layers"]) + len(run.copies)
    rows = math.ceil(total / 40)
    columns = math.ceil(total / rows)
    figure.set_size_inches(WIDTH, 0.3 + 0.6 * rows)
    axes = figure.add_subplot(xlim=(-2.9, columns), ylim=(-rows * 2.4 + 1.7, 1.6))
    for i in range(total):
        (row, x), copied = divmod(i, columns), i in run.copies
        y, number = -2.4 * row, run.copies[i] if copied else i - sum(copy < i for copy in run.copies)
        axes.add_patch(Rectangle((x + 0.06, y), 0.88, 1, facecolor=COPY if copied else PALE))
        axes.text(x + 0.5, y + 0.5, str(number), ha="center", va="center", color="white" if copied else INK)
        axes.text(x + 0.5, y - 0.35, str(i), ha="center", va="center", fontsize=7, color=COPY if copied else "#6b7280")
        axes.text(x + 0.5, y + 1.12, "copy" if copied else "", ha="center", va="bottom", fontsize=7, color=COPY)
    for row in range(rows):
        axes.text(-0.2, 0.5 - 2.4 * row, "base layer", ha="right", va="center")
        axes.text(-0.2, -0.35 - 2.4 * row, "new index", ha="right", va="center", fontsize=7, color="#6b7280")
    axes.axis("off")


def _curve(axes: Any, steps: Any, values: Any, color: str, smooth: bool) -> None:
    """The raw series pale, a centred running mean over 1/20 of it on top; both thinned."""
    half = max(2, len(values) // 40) if smooth else 0
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low, high = np.maximum(np.arange(len(values)) - half, 0), np.minimum(np.arange(len(values)) + half + 1, len(values))
    thin = slice(None, None, math.ceil(len(values) / MAX_POINTS))
    axes.plot(steps[thin], values[thin], color=color, alpha=0.3, linewidth=0.8, label="each step")
    mean = (sums[high] - sums[low]) / (high - low)
    axes.plot(steps[thin], mean[thin], color=color, linewidth=1.8, label="smoothed")


def _draw_panels(run: RunFiles, figure: Figure, panels: Iterable[tuple[str, str, str]]) -> None:
    """Series over the same steps, one above the other; each is (key, label, colour)."""
    data = [(key, *run.series(key), label, color) for key, label, color in panels if len(run.series(key)[0])]
    if not data:
        return
    figure.set_size_inches(WIDTH, 1.0 + 1.5 * len(data))
    heights = [2 if key == "loss" else 1 for key, *_ in data]
    grid = figure.subplots(len(data), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (key, steps, values, label, color) in zip(grid, data, strict=True):
        _curve(axes, steps, values, color, smooth=key != "lr")
        axes.set(ylabel=label, ylim=(None if key == "loss" else 0, None))
        axes.yaxis.set_major_formatter(lambda value, _: short(value, 6))
    grid[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    grid[-1].set_xlabel("optimizer step")


def _draw_evals(run: RunFiles, figure: Figure) -> None:
    evals = run.evals()
    # Before the first step a model is its base. What evaluation.json says of the base is of documents each alone.
    base = evals[0][1] if evals and evals[0][0] == 0 else {}
    found = {name: [(step, sets[name]) for step, sets in evals if name in sets] for name in ("general", "domain")}
    curves = {name: points for name, points in found.items() if points}
    if not curves:
        return
    figure.set_size_inches(WIDTH, 3.2)
    shown = {name: [loss for _, loss in points] + [base.get(name, points[0][1])] for name, points in curves.items()}
    # Panels of one height in nats: a loss that hardly moves must not look as steep as one that does.
    span = 1.25 * max(max(losses) - min(losses) for losses in shown.values()) or 0.1
    for axes, (name, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        axes.plot(*zip(*points, strict=True), color=BLUE if name == "domain" else GREEN, marker="o", label="this run")
        if name in base:
            axes.axhline(base[name], color=INK, linestyle="--", linewidth=1, label=f"base model ({base[name]:.3f})")
        low = (max(shown[name]) + min(shown[name]) - span) / 2
        axes.set(ylim=(low, low + span), xlabel="optimizer step", ylabel="held-out loss (nats)")
        axes.set_title(f"{name} text: {points[0][1]:.3f} \u2192 {points[-1][1]:.3f}", loc="left", weight="bold")
        axes.legend(loc="best")


def _draw_guard(run: RunFiles, figure: Figure) -> None:
    """What the domain has gained, and how far each general source has certainly risen, by step."""
    found = [(record["step"], record["guard"]) for record in run.metrics if record.get("guard")]
    if not found:
        return
    limit = (run.config.get("guard") or {}).get("max_general_rise", 0.0)
    steps = [step for step, _ in found]
    figure.set_size_inches(WIDTH, 3.4)
    left, right = figure.subplots(1, 2)
    left.plot(steps, [of["domain"] for _, of in found], color=BLUE, marker="o")
    left.set(xlabel="optimizer step", ylabel="loss on validation documents (nats)")
    left.set_title("domain text", loc="left", weight="bold")
    right.axhline(limit, color=INK, linestyle="--", linewidth=1, label=f"max_general_rise ({limit:g})")
    names = list(dict.fromkeys(name for _, of in found for name in of["general"]))
    for name, color in zip(names, (GREEN, COPY, GREY) * len(names), strict=False):
        points = [(step, of["general"][name]) for step, of in found if name in of["general"]]
        at = [step for step, _ in points]
        right.plot(at, [of["rise"] for _, of in points], color=color, marker="o", label=name)
        lower, upper = ([of[key] for _, of in points] for key in ("lower", "upper"))
        right.fill_between(at, lower, upper, color=color, alpha=0.18, linewidth=0)
    highest = {step: max(of["general"].values(), key=lambda one: one["lower"]) for step, of in found if of["forgotten"]}
    if highest:
        lows = [of["lower"] for of in highest.values()]
        right.plot(list(highest), lows, color=INK, marker="x", linestyle="", label="found forgotten")
    right.set(xlabel="optimizer step", ylabel="rise above the base (nats)")
    right.set_title("general text", loc="left", weight="bold")
    right.legend(loc="best")


def _multipliers(run: RunFiles) -> tuple[list[float], list[str], dict[int, Any]]:
    """Steps, names of units within a copy, and for each copy a grid of multipliers (units x steps)."""
    refreshes = run.refreshes[:: math.ceil(len(run.refreshes) / MAX_COLUMNS) or 1]
    parts = {unit: re.search(r"(?:^|\.)(\d+)\.(.+)", unit) for _, units in refreshes for unit in units}
    place = {unit: (int(found[1]), found[2]) if found else (-1, unit) for unit, found in parts.items()}
    if len({name for _, name in place.values()}) > MAX_UNITS:  # heads, neurons, experts: one row for those of a kind
        place = {unit: (copy, re.sub(r"\d+", "*", name)) for unit, (copy, name) in place.items()}
    cells: dict[tuple[int, str, int], list[float]] = {}
    for column, (_, units) in enumerate(refreshes):
        for unit, entry in units.items():
            cells.setdefault((*place[unit], column), []).append(entry["multiplier"])
    names = list(dict.fromkeys(name for _, name in place.values()))
    copies = sorted({copy for copy, _ in place.values()})
    columns = range(len(refreshes))
    grids = {i: np.array([[np.mean(cells.get((i, n, c), [np.nan])) for c in columns] for n in names]) for i in copies}
    return [step for step, _ in refreshes], names, grids


def _draw_units(run: RunFiles, figure: Figure) -> None:
    steps, names, grids = _multipliers(run)
    if not names:
        return
    across, down = min(4, len(grids)), math.ceil(len(grids) / 4)
    figure.set_size_inches(WIDTH, down * (0.7 + 0.21 * len(names)))
    panels = figure.subplots(down, across, sharey=True, squeeze=False)
    for axes in panels.flat[len(grids) :]:
        axes.axis("off")
    for axes, (copy, grid) in zip(panels.flat, grids.items(), strict=False):
        image = axes.pcolormesh(grid, cmap="RdBu_r", vmin=0, vmax=2, edgecolors="white", linewidth=0.4)
        axes.set_title(f"layer {copy}" + (f" (copy of {run.copies[copy]})" if copy in run.copies else ""), loc="left")
        ticks = range(0, len(steps), math.ceil(len(steps) * across * len(f"{steps[-1]:g}") / 64))
        axes.set_xticks([c + 0.5 for c in ticks], [f"{steps[c]:g}" for c in ticks])
        axes.set_yticks(np.arange(len(names)) + 0.5, names)
        for (row, column), value in np.ndenumerate(grid if len(steps) * across <= 26 else grid[:0]):
            ink = "white" if abs(value - 1) > 0.57 else INK
            axes.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)
    panels[0, 0].invert_yaxis()
    figure.supxlabel("optimizer step of the refresh", fontsize=8.5)
    figure.colorbar(image, ax=panels, fraction=0.02, pad=0.01, label="multiplier")


def _draw_movement(run: RunFiles, figure: Figure) -> None:
    if not (run.movement and run.movement.dots):
        return
    figure.set_size_inches(WIDTH, 3.6)
    axes = figure.add_subplot()
    dots = run.movement.dots[:: math.ceil(len(run.movement.dots) / MAX_DOTS)]
    for is_norm, color, marker in ((False, BLUE, "o"), (True, COPY, "D")):
        chosen = [unit for unit in dots if unit.is_norm == is_norm]
        label = "norms" if is_norm else "everything else"
        style: Json = {"color": color, "marker": marker, "alpha": 0.75, "s": 22, "linewidths": 0}
        axes.scatter([u.multiplier for u in chosen], [u.change for u in chosen], label=label, **style)
    axes.set(xlabel="mean multiplier over the run", ylabel="change of a weight since the start\n(root mean square)")
    axes.set(xlim=(-0.02 * axes.get_xlim()[1], None), ylim=(-0.02 * axes.get_ylim()[1], None))
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def _draw_dial(run: RunFiles, figure: Figure) -> None:
    """Domain loss against general loss on test documents; bars go up to the limit of the rise."""
    rows = position_rows(run)
    if not rows:
        return
    figure.set_size_inches(WIDTH, 4.0)
    axes = figure.add_subplot()
    together = sorted((row for row in rows if row.together), key=lambda row: float(row.label))
    axes.plot([row.test.rise for row in together], [row.test.domain for row in together], color=PALE, linewidth=1.2)
    for row in rows:
        color = COPY if row.chosen else GREEN if row.keeps else GREY
        bar = [[0.0], [max(0.0, row.test.limit - row.test.rise)]]
        axes.errorbar([row.test.rise], [row.test.domain], xerr=bar, fmt="none", ecolor=color, elinewidth=0.9, capsize=2)
        axes.scatter([row.test.rise], [row.test.domain], color=color, s=56 if row.chosen else 26, zorder=3)
        if row.together or row.chosen:
            style: Json = {"fontsize": 8, "weight": "bold" if row.chosen else "normal"}
            place = (row.test.rise, row.test.domain)
            axes.annotate(row.label, place, (5, 5), textcoords="offset points", **style)
    bound = run.dial.get("max_general_rise")
    if bound is not None and finite(bound):
        axes.axvline(bound, color=INK, linestyle="--", linewidth=1)
    axes.set(xlabel="general loss above the base's (nats; of several sources, that with the highest limit)")
    axes.set_ylabel("domain loss (nats)")
    labels = {COPY: "chosen", GREEN: "keeps the promise on validation documents", GREY: "breaks it"}
    handles = [Patch(color=color, label=label) for color, label in labels.items()]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)


LOSS = (("loss", "training loss (nats)", BLUE), ("lr", "learning rate", GREY))


SPEED = (("tokens_per_second", "tokens per second", GREEN), ("grad_norm", "gradient norm", COPY))


ANCHOR = (("anchor", "anchor, per general token", COPY), ("anchor_seconds", "seconds of a step", GREY))


FIGURES: dict[str, Callable[[RunFiles, Figure], None]] = {"layers": _draw_layers, "choice": _draw_choice}


FIGURES |= {"places": _draw_places}


FIGURES |= {"methods": _draw_methods, "stack": _draw_stack}


FIGURES |= {"training": lambda run, figure: _draw_panels(run, figure, LOSS), "evals": _draw_evals, "guard": _draw_guard}


FIGURES |= {"dial": _draw_dial}


FIGURES |= {"units": _draw_units, "movement": _draw_movement}


FIGURES |= {"speed": lambda run, figure: _draw_panels(run, figure, SPEED)}


FIGURES |= {"anchor": lambda run, figure: _draw_panels(run, figure, ANCHOR)}
