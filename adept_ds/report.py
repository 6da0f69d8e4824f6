"""`report.html`: one page that says what a run probed, copied, trained and gained.

A single file without scripts or requests: it can be mailed, archived or opened without a network. Figures are inline
SVG with letters drawn as outlines: the same look everywhere, but labels that cannot be searched (the tables can). Long
series are thinned, which bounds the page but may hide a spike of one step. Every input file is optional, and lines
that a crash cut short are skipped. The wording lives in the template.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from scipy.stats import spearmanr

from adept_ds.errors import InputError
from adept_ds.files import read_json, write_text

Json = dict[str, Any]
INK, GREY, PALE, COPY, BLUE, GREEN = "#1f2937", "#9aa5b4", "#cfd8e4", "#d9660b", "#2459c4", "#12806a"
WIDTH, MAX_POINTS, MAX_COLUMNS, MAX_UNITS, MAX_DOTS = 10.4, 1200, 48, 40, 400
STYLE: Json = {"svg.fonttype": "path", "font.size": 8.5, "axes.titlesize": 9.5, "axes.edgecolor": GREY}
STYLE |= {"axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": "#e6eaef"}
STYLE |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
STYLE |= dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False)
DELTA_AXIS = {"mask": "delta loss (nats) with layer bypassed", "taylor": "delta loss (nats), first-order estimate"}


@dataclass(frozen=True)
class Moved:
    """A unit over the whole run; or the mean of a layer's heads or neurons."""

    name: str
    multiplier: float
    """Mean over steps."""
    change: float
    """Root mean square over elements of the change since the start."""

    @property
    def is_norm(self) -> bool:
        return "norm" in self.name


@dataclass(frozen=True)
class Movement:
    """What shows that multipliers acted. An interval lies between two lines of unit_movement.jsonl."""

    units: list[Moved]
    """Farthest first; without those whose weights are not finite numbers any more."""
    dots: list[Moved]
    """The same, or where units are many, the means of those that differ in a number only."""
    correlations: list[float]
    """Spearman's, of multiplier and change over the units of an interval; where nothing differs there is none. One
    over all intervals would mostly tell how the learning rate decays."""
    stopped: dict[str, int]
    """Units that had multiplier 0 in an interval -> number of elements."""
    stopped_but_moved: dict[str, str]
    """Those of them that moved in it nevertheless -> how far, when."""
    broken: int
    """Units whose weights are not finite numbers any more."""


@dataclass(frozen=True)
class Run:
    """What a run directory holds, read and put in order."""

    config_text: str
    config: Json
    importance: Json
    expansion: Json
    evaluation: Json
    summary: Json
    metrics: list[Json]
    refreshes: list[tuple[float, Json]]
    movement: Movement | None

    @property
    def copies(self) -> dict[int, int]:
        """Index in the expanded model -> source layer in the base model."""
        return {int(copy["index"]): int(copy["source"]) for copy in self.expansion.get("copies", [])}

    @property
    def selected(self) -> list[int]:
        return sorted(self.copies.values()) or sorted(self.importance.get("selected") or [])

    def series(self, key: str) -> tuple[Any, Any]:
        pairs = _in_order((line["step"], line[key]) for line in self.metrics if _finite(line.get(key)))
        return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], dtype=float)

    def evals(self) -> list[tuple[float, dict[str, float]]]:
        lines = ((line["step"], line["eval"]) for line in self.metrics if isinstance(line.get("eval"), dict))
        return [(step, _losses(sets)) for step, sets in _in_order(lines)]

    def before_after(self) -> tuple[dict[str, float], dict[str, float]]:
        """Losses by data set of the base and of the adapted model; else of the first and the last evaluation."""
        if self.evaluation:
            return _losses(self.evaluation.get("base")), _losses(self.evaluation.get("adapted"))
        evals = self.evals()
        return (evals[0][1], evals[-1][1]) if len(evals) > 1 else ({}, {})


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from the files beside it; a reader never sees half a page."""
    run, target = _read_run(Path(run_dir)), Path(run_dir) / "report.html"
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    # Chainable: a number that a file lacks leaves its place empty instead of costing the page.
    env = Environment(loader=loader, autoescape=True, undefined=ChainableUndefined, trim_blocks=True)
    env.filters["short"], env.tests["finite"] = _short, _finite
    svgs = {name: _svg(name, draw, run) for name, draw in FIGURES.items()}
    write_text(target, env.get_template("report.html.j2").render(run=run, svgs=svgs))
    return target


def _read_run(run_dir: Path) -> Run:
    if not any((run_dir / name).is_file() for name in ("layer_importance.json", "metrics.jsonl")):
        raise InputError(f"{run_dir}: no layer_importance.json and no metrics.jsonl; make them: adept run CONFIG")
    path, config = run_dir / "config.yaml", None
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    with suppress(yaml.YAMLError):
        config = yaml.safe_load(text)
    names = ("layer_importance.json", "expanded/expansion.json", "evaluation.json", "summary.json")
    probe, expansion, scores, summary = (_read_record(run_dir / name) for name in names)
    metrics, units = (_read_lines(run_dir / name) for name in ("metrics.jsonl", "unit_importance.jsonl"))
    refreshes = _in_order((line["step"], {unit["unit"]: unit for unit in line.get("units", [])}) for line in units)
    movement = _movement(_read_lines(run_dir / "unit_movement.jsonl"))
    settings = config if isinstance(config, dict) else {}
    return Run(text, settings, probe, expansion, scores, summary, metrics, refreshes, movement)


def _read_record(path: Path) -> Json:
    try:
        return dict(read_json(path)) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not a JSON object ({error}); delete it, then: adept run CONFIG") from error


def _read_lines(path: Path) -> list[Json]:
    """The whole lines: a crash cuts the last one, and a resumed run that appends leaves the cut in the middle."""
    lines, records = path.read_bytes().split(b"\n") if path.is_file() else [], []
    for line in lines:
        with suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and _finite(record.get("step"))]


def _in_order(pairs: Iterable[tuple[Any, Any]]) -> list[tuple[float, Any]]:
    """A resumed run repeats the steps after its checkpoint: where it goes back, only the later lines count."""
    kept: list[tuple[float, Any]] = []
    for step, value in pairs:
        while kept and kept[-1][0] >= step:
            kept.pop()
        kept.append((step, value))
    return kept


def _movement(lines: list[Json]) -> Movement | None:
    whole = ((line["step"], line) for line in lines if _finite(line.get("since")) and line["since"] < line["step"])
    intervals = [(line["since"], step, _measured(line.get("units"))) for step, line in _in_order(whole)]
    intervals = [interval for interval in intervals if interval[2]]
    if not intervals:
        return None
    held: dict[str, list[tuple[float, float]]] = {}
    stopped: dict[str, int] = {}
    nevertheless: dict[str, str] = {}
    for since, step, units in intervals:
        for name, unit in units.items():
            held.setdefault(name, []).append((unit["multiplier"], step - since))
            if unit["multiplier"] == 0:
                stopped[name] = unit["numel"]
                if unit["moved"] != 0:
                    nevertheless[name] = f"{_short(unit['moved'])} (L2 norm) from step {since} to {step}"
    last = {name: _rms(unit, "moved_since_start") for name, unit in intervals[-1][2].items()}
    moved = [Moved(name, _mean(held[name]), change) for name, change in last.items() if math.isfinite(change)]
    moved.sort(key=lambda unit: -unit.change)
    correlations = [value for _, _, units in intervals for value in _rank_correlation(units.values())]
    return Movement(moved, _by_kind(moved), correlations, stopped, nevertheless, len(last) - len(moved))


def _measured(units: object) -> dict[str, Json]:
    """The units of a line that have all that is needed, by name; weights that overflowed have a distance of NaN."""
    numbers = ("numel", "multiplier", "moved", "moved_since_start")
    whole = [u for u in units if isinstance(u, dict) and "unit" in u] if isinstance(units, list) else []
    whole = [u for u in whole if all(isinstance(u.get(key), int | float) for key in numbers)]
    return {str(u["unit"]): u for u in whole if u["numel"] > 0 and math.isfinite(u["multiplier"])}


def _rms(unit: Json, distance: str) -> float:
    return float(unit[distance] / math.sqrt(unit["numel"]))


def _mean(weighted: list[tuple[float, float]]) -> float:
    values, weights = zip(*weighted, strict=True)
    return float(np.average(values, weights=weights))


def _rank_correlation(units: Iterable[Json]) -> list[float]:
    """Spearman's, of multiplier and change: none for less than three units, or if either is the same for all."""
    pairs = [(unit["multiplier"], _rms(unit, "moved")) for unit in units if math.isfinite(unit["moved"])]
    columns = list(zip(*pairs, strict=True))
    differ = len(pairs) > 2 and all(len(set(column)) > 1 for column in columns)
    return [float(spearmanr(*columns).statistic)] if differ else []


def _by_kind(units: list[Moved]) -> list[Moved]:
    """If they are too many for the figure: the mean of those of a layer whose names differ in a number only."""
    if len(units) <= MAX_DOTS:
        return units
    kinds: dict[str, list[tuple[float, float]]] = {}
    for unit in units:
        layer = re.match(r".*?\d+\.", unit.name)
        cut = layer.end() if layer else 0
        kind = unit.name[:cut] + re.sub(r"\d+", "*", unit.name[cut:])
        kinds.setdefault(kind, []).append((unit.multiplier, unit.change))
    means = [Moved(name, *map(float, np.mean(members, axis=0))) for name, members in kinds.items()]
    return sorted(means, key=lambda unit: -unit.change)


def _losses(sets: Json | None) -> dict[str, float]:
    return {name: value["loss"] for name, value in (sets or {}).items() if _finite(value.get("loss"))}


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _short(value: float, digits: int = 3) -> str:
    """Significant digits without padding: 1.8e-4, 0.0123, 7.31."""
    text = f"{value:.{digits - 1}e}" if 0 < abs(value) < 1e-3 else f"{value:.{digits}g}"
    return re.sub(r"\.?0*e([+-])0*", r"e\1", text).replace("e+", "e")


def _svg(name: str, draw: Callable[[Run, Figure], None], run: Run) -> Markup | None:
    """Draw one figure under a fixed style; the style's context leaves matplotlib's global settings as they were."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | {"svg.hashsalt": name})
        figure = Figure(layout="constrained")
        draw(run, figure)
        if not figure.axes:
            return None
        out = StringIO()
        FigureCanvasSVG(figure).print_figure(out, format="svg", metadata={"Date": None})
    text = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>|<!--.*?-->", "", out.getvalue(), flags=re.DOTALL)
    # Figures share one document, and matplotlib names the same things alike in each of them.
    text = re.sub(r'( id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    return Markup(re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', text, count=1))


def _draw_layers(run: Run, figure: Figure) -> None:
    layers = [layer for layer in run.importance.get("layers") or [] if _finite(layer["delta"])]
    if not layers:
        return
    index, delta = (np.array([layer[key] for layer in layers], dtype=float) for key in ("index", "delta"))
    # The outermost layers are often 100 times the rest: their bars are broken, and the others keep a linear axis.
    usual = np.abs(delta)[np.abs(delta) <= 4 * np.percentile(np.abs(delta), 75)]
    top = 1.3 * max(usual, default=0.0) or 1.0
    figure.set_size_inches(WIDTH, 3.6)
    axes = figure.add_subplot()
    axes.bar(index, np.clip(delta, -top, top), color=[COPY if i in run.selected else PALE for i in index])
    for x, y in zip(index, delta, strict=True):
        style: Json = {"ha": "center", "va": "bottom", "rotation": 90, "fontsize": min(8, 440 / len(layers))}
        axes.text(x, min(max(y, 0), top) + top / 60, _short(y, 2 if abs(y) < 0.1 else 3), **style)
        if abs(y) > top:
            axes.plot([x - 0.5, x + 0.5], np.sign(y) * top * np.array([0.85, 0.9]), color="white", linewidth=4)
    axes.set(xlabel="decoder layer of the base model", xticks=index[:: 1 + len(layers) // 41])
    axes.axis((-0.7, max(index) + 0.7, min(-0.02 * top, 1.1 * max(min(delta), -top)), top * 1.22))
    axes.set_ylabel(DELTA_AXIS.get(str(run.importance.get("method")), "importance"))
    labels = {COPY: "copied" if run.copies else "selected", PALE: "left as it is"}
    handles = [Patch(color=color, label=label) for color, label in labels.items()]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def _draw_stack(run: Run, figure: Figure) -> None:
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


def _draw_panels(run: Run, figure: Figure, panels: Iterable[tuple[str, str, str]]) -> None:
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
        axes.yaxis.set_major_formatter(lambda value, _: _short(value, 6))
    grid[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    grid[-1].set_xlabel("optimizer step")


def _draw_evals(run: Run, figure: Figure) -> None:
    evals, base = run.evals(), _losses(run.evaluation.get("base"))
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


def _multipliers(run: Run) -> tuple[list[float], list[str], dict[int, Any]]:
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


def _draw_units(run: Run, figure: Figure) -> None:
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
        axes.set_yticks(np.arange(len(names)) + 0.5, [name.replace("$", r"\$") for name in names])
        for (row, column), value in np.ndenumerate(grid if len(steps) * across <= 26 else grid[:0]):
            ink = "white" if abs(value - 1) > 0.57 else INK
            axes.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)
    panels[0, 0].invert_yaxis()
    figure.supxlabel("optimizer step of the refresh", fontsize=8.5)
    figure.colorbar(image, ax=panels, fraction=0.02, pad=0.01, label="multiplier")


def _draw_movement(run: Run, figure: Figure) -> None:
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
    axes.yaxis.set_major_formatter(lambda value, _: _short(value))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


LOSS = (("loss", "training loss (nats)", BLUE), ("lr", "learning rate", GREY))
SPEED = (("tokens_per_second", "tokens per second", GREEN), ("grad_norm", "gradient norm", COPY))
FIGURES: dict[str, Callable[[Run, Figure], None]] = {"layers": _draw_layers, "stack": _draw_stack}
FIGURES |= {"training": lambda run, figure: _draw_panels(run, figure, LOSS), "evals": _draw_evals}
FIGURES |= {"units": _draw_units, "movement": _draw_movement}
FIGURES |= {"speed": lambda run, figure: _draw_panels(run, figure, SPEED)}
