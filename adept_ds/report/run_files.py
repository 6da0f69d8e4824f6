"""What a run directory holds, read and put in order for the report.

Every file is optional, and lines that a crash cut short are skipped.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import yaml
from pydantic import ValidationError
from scipy.stats import spearmanr

from adept_ds.base.errors import InputError
from adept_ds.base.files import read_json
from adept_ds.base.records import first_mistake
from adept_ds.base.run_dir import RunDirectory
from adept_ds.report.presence import check_something_to_report
from adept_ds.report.shapes import (
    ChoiceShape,
    EvaluationShape,
    ExpansionShape,
    ImportanceShape,
    MethodsShape,
    MetricsShape,
    MovementShape,
    PlacesShape,
    RefreshShape,
    Shape,
    SummaryShape,
)

Json = dict[str, Any]


MAX_DOTS = 400
"""Units that are shown one by one; more are shown by kind."""


@dataclass(frozen=True)
class Moved:
    """A unit over the whole run; or the mean of a layer's heads or neurons."""

    name: str
    kind: str
    """'norm', 'matrix', 'head' and so on."""
    multiplier: float
    """Mean over steps."""
    change: float
    """Root mean square over elements of the change since the start."""

    @property
    def is_norm(self) -> bool:
        return self.kind == "norm"


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
class RunFiles:
    """What a run directory holds, read and put in order."""

    config_text: str
    config: Json
    importance: Json
    places: Json
    """What copies would do at each place, where they are chosen by that."""
    methods: Json
    """By method of probing."""
    expansion: Json
    evaluation: Json
    summary: Json
    metrics: list[Json]
    refreshes: list[tuple[float, Json]]
    movement: Movement | None
    dial: Json = field(default_factory=dict)
    """Positions of the dial, and the chosen one."""

    @property
    def copies(self) -> dict[int, int]:
        """Index in the expanded model -> source layer in the base model."""
        return {int(copy["index"]): int(copy["source"]) for copy in self.expansion.get("copies", [])}

    @property
    def selected(self) -> list[int]:
        probed = self.places if self.by_gain else self.importance
        return sorted(self.copies.values()) or sorted(probed.get("selected") or [])

    @property
    def least(self) -> bool:
        """Whether those with the lowest deltas were chosen, as far as the probe's record says."""
        return bool((self.importance.get("selection") or {}).get("choose", "lowest") == "lowest")

    @property
    def chosen_otherwise(self) -> bool:
        """Whether the copies are other layers than those that the probe's record chose."""
        chosen = sorted(self.importance.get("selected") or [])
        return bool(self.copies and chosen) and chosen != sorted(self.copies.values())

    @property
    def by_gain(self) -> bool:
        """Whether copies got their places by gain; there may be an older record of deltas beside."""
        expand = self.config.get("expand")
        configured = isinstance(expand, dict) and expand.get("choose") == "gain"
        return bool(self.places) and (configured or not self.importance)

    @property
    def placed_otherwise(self) -> bool:
        """Whether the copies stand elsewhere than where their gains put them."""
        chosen = sorted(self.places.get("selected") or [])
        return bool(self.copies and chosen) and chosen != sorted(self.copies.values())

    @property
    def probes(self) -> bool:
        """Whether a probe chooses layers, as far as the configuration can be read."""
        expand = self.config.get("expand")
        if not isinstance(expand, dict) or expand.get("k") == "auto":
            return True
        return not expand.get("layers") and expand.get("choose", "lowest") in ("lowest", "highest", "gain")

    @property
    def one_rate(self) -> bool:
        """Whether all units learn alike, as far as the configuration can be read."""
        policy = self.config.get("lr_policy")
        return isinstance(policy, dict) and policy.get("map") == "constant"

    @property
    def within_noise(self) -> list[int]:
        """Layers that another sample of the corpus might well have chosen, or not."""
        return list((self.importance.get("selection") or {}).get("within_noise") or [])

    def series(self, key: str) -> tuple[Any, Any]:
        pairs = _in_order((line["step"], line[key]) for line in self.metrics if finite(line.get(key)))
        return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], dtype=float)

    def evals(self) -> list[tuple[float, dict[str, float]]]:
        lines = ((line["step"], line["eval"]) for line in self.metrics if isinstance(line.get("eval"), dict))
        return [(step, losses(sets)) for step, sets in _in_order(lines)]

    def before_after(self) -> tuple[dict[str, float], dict[str, float]]:
        """Losses by data set of the base and of the adapted model; else of the first and the last evaluation."""
        if self.evaluation:
            return losses(self.evaluation.get("base")), losses(self.evaluation.get("adapted"))
        evals = self.evals()
        return (evals[0][1], evals[-1][1]) if len(evals) > 1 else ({}, {})


def read_run(directory: Path) -> RunFiles:
    """Raises `InputError`: the directory has nothing to report, or a damaged record."""
    check_something_to_report(directory)
    run, config = RunDirectory(directory), None
    text = run.config.read_text(encoding="utf-8", errors="replace") if run.config.is_file() else ""
    with suppress(Exception):  # of many kinds, for texts that look like dates, numbers or more
        config = _whole_characters(yaml.safe_load(text))
    importance = _read_record(run.layer_importance, ImportanceShape)
    places = _read_record(run.place_benefits, PlacesShape)
    expansion = _read_record(run.expansion, ExpansionShape)
    evaluation = _read_record(run.evaluation, EvaluationShape)
    summary = _read_record(run.summary, SummaryShape)
    metrics, units = _read_lines(run.metrics, MetricsShape), _read_lines(run.unit_importance, RefreshShape)
    refreshes = _in_order((line["step"], {unit["unit"]: unit for unit in line.get("units", [])}) for line in units)
    movement = _movement(_read_lines(run.unit_movement, MovementShape))
    settings = config if isinstance(config, dict) else {}
    found = _read_record(run.layer_methods, MethodsShape)
    spearman, methods = found.get("spearman") or {}, found.get("methods") or {}
    methods = {name: method | {"spearman": spearman.get(name)} for name, method in methods.items()}
    dial = _read_record(run.dial, ChoiceShape)
    return RunFiles(
        text, settings, importance, places, methods, expansion, evaluation, summary, metrics, refreshes, movement, dial
    )


def _read_record(path: Path, shape: type[Shape]) -> Json:
    """Empty, if it is not there. Raises `InputError`: it is damaged."""
    try:
        tree = _whole_characters(read_json(path)) if path.is_file() else None
        if tree is not None:
            shape.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{path}: {first_mistake(error)}; put it aside, then: adept run CONFIG") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON object ({error}); put it aside, then: adept run CONFIG") from None
    return tree or {}


def _read_lines(path: Path, shape: type[Shape]) -> list[Json]:
    """The whole lines: a crash cuts the last one, and a resumed run that appends leaves the cut in the middle."""
    lines, records = path.read_bytes().split(b"\n") if path.is_file() else [], []
    for line in lines:
        with suppress(ValueError, RecursionError):
            record = _whole_characters(json.loads(line))
            shape.model_validate(record)
            records.append(record)
    return [record for record in records if finite(record["step"])]


def _whole_characters(value: Any) -> Any:
    """With a mark for each half of a character ("\\ud83d" alone), which JSON may hold and no file can."""
    if isinstance(value, dict):
        return {_whole_characters(key): _whole_characters(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole_characters(item) for item in value]
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(value, str) else value


def _in_order(pairs: Iterable[tuple[Any, Any]]) -> list[tuple[float, Any]]:
    """A resumed run repeats the steps after its checkpoint: where it goes back, only the later lines count."""
    kept: list[tuple[float, Any]] = []
    for step, value in pairs:
        while kept and kept[-1][0] >= step:
            kept.pop()
        kept.append((step, value))
    return kept


def _movement(lines: list[Json]) -> Movement | None:
    whole = ((line["step"], line) for line in lines if finite(line.get("since")) and line["since"] < line["step"])
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
                    nevertheless[name] = f"{short(unit['moved'])} (L2 norm) from step {since} to {step}"
    last = {name: _rms(unit, "moved_since_start") for name, unit in intervals[-1][2].items()}
    kinds = {name: str(unit.get("kind", "")) for name, unit in intervals[-1][2].items()}
    finally_at = {name: change for name, change in last.items() if math.isfinite(change)}
    moved = [Moved(name, kinds[name], _mean(held[name]), change) for name, change in finally_at.items()]
    moved.sort(key=lambda unit: -unit.change)
    correlations = [value for _, _, units in intervals for value in _rank_correlation(units.values())]
    return Movement(moved, _by_kind(moved), correlations, stopped, nevertheless, len(last) - len(moved))


def _measured(units: object) -> dict[str, Json]:
    """The units of a line that have all that is needed, by name; weights that overflowed have a distance of NaN."""
    numbers = ("numel", "multiplier", "moved", "moved_since_start")
    whole = [u for u in units if isinstance(u, dict) and "unit" in u] if isinstance(units, list) else []
    whole = [u | {key: math.nan for key in numbers if key in u and u[key] is None} for u in whole]
    whole = [u for u in whole if all(is_number(u.get(key)) for key in numbers)]
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
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for unit in units:
        layer = re.match(r".*?\d+\.", unit.name)
        cut = layer.end() if layer else 0
        name = unit.name[:cut] + re.sub(r"\d+", "*", unit.name[cut:])
        groups.setdefault((name, unit.kind), []).append((unit.multiplier, unit.change))
    means = [Moved(*group, *map(float, np.mean(members, axis=0))) for group, members in groups.items()]
    return sorted(means, key=lambda unit: -unit.change)


def losses(sets: Json | None) -> dict[str, float]:
    return {name: value["loss"] for name, value in (sets or {}).items() if finite(value.get("loss"))}


def is_number(value: object) -> TypeGuard[float]:
    """Also NaN; but no integer that is too large to compute with."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 63)


def finite(value: object) -> bool:
    return is_number(value) and math.isfinite(value)


def short(value: float, digits: int = 3) -> str:
    """Significant digits without padding: 1.8e-4, 0.0123, 7.31."""
    text = f"{value:.{digits - 1}e}" if 0 < abs(value) < 1e-3 else f"{value:.{digits}g}"
    return re.sub(r"\.?0*e([+-])0*", r"e\1", text).replace("e+", "e")
