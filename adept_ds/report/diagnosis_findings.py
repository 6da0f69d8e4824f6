"""From what a diagnosis measured to sentences: what was seen, and which key of the configuration to change.

Each function looks at one possible cause. It says what it saw where it could look, also when that is not to blame; it
advises a change only where it is. The thresholds stand here, and docs/diagnosis.md gives their reasons.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from adept_ds.report.diagnosis import Change, CopyEffect, Diagnosis, Finding, Topic, UnitCourse
from adept_ds.report.diagnosis_signs import DOMAIN_TOLERANCE, NOISE
from adept_ds.report.run_files import short

FAINT = 0.1
"""A copy that writes a smaller share of the stream than this part of its source's share is hardly there."""

LOUD = 1.0
"""One that writes more than its source does while the domain gets worse has been trained too fast."""

HELD_BACK = 0.25
"""A unit with a smaller multiplier is held back."""

STARVED = 0.01
"""A unit whose gradient is a smaller part of that of its copy's silent factors gets next to nothing."""

AGAINST = 0.5
"""A unit whose ranks of change and importance exceed their balance by this much has not been protected."""

ENTANGLED = 0.8
"""With a smaller accuracy, a copy writes much the same on general as on domain text."""

PLACE_OF_TEXT = "GENERAL.jsonl"
"""Stands for files that only the user knows."""

_LARGEST_LR = 10.0


def findings_of(diagnosis: Diagnosis) -> tuple[Finding, ...]:
    """All that can be said, problems of each topic first."""
    found = [finding for look in _LOOKS for finding in [look(diagnosis)] if finding is not None]
    return tuple(sorted(found, key=lambda finding: (_TOPICS.index(finding.topic), not finding.problem)))


def harmful_copy(diagnosis: Diagnosis) -> Finding | None:
    """Which copy general text would be better off without."""
    effects = [effect for effect in diagnosis.effects if effect.general is not None]
    if not effects:
        return None
    worst = max(effects, key=lambda effect: effect.general.change if effect.general else -math.inf)
    assert worst.general is not None
    harm, losses = worst.general.change, diagnosis.losses["general"]
    harmful = _beyond_noise(worst.general)
    saw = (
        f"The copy at layer {worst.index} (of layer {worst.source}) does the most harm: with it bypassed, general loss "
        f"would be {losses.adapted - harm:.4f} instead of {losses.adapted:.4f} ({_nats(-harm)}{_error(worst.general)}; "
        f"all copies together changed it by {_nats(losses.rise.change)})"
    )
    if not harmful:
        saw = (
            f"No copy does harm by itself: with the copy at layer {worst.index} bypassed, the worst of them, general "
            f"loss would change by {_nats(-harm)}{_error(worst.general)}"
        )
    if worst.domain is not None:
        saw += f"; domain loss would change by {_nats(-worst.domain.change)}{_error(worst.domain)}"
    problem = diagnosis.general_rose
    change, settings = _against_harm(diagnosis, worst, harmful) if problem else (None, {})
    return Finding(
        name="harmful_copy", topic="general", problem=problem, saw=f"{saw}.", change=change, settings=settings
    )


def _against_harm(diagnosis: Diagnosis, worst: CopyEffect, harmful: bool) -> tuple[str, dict[str, Any]]:
    """Leave the layer out where its copy costs more than it brings; otherwise train more gently."""
    setting = diagnosis.setting
    others = [source for source in setting.copied if source != worst.source]
    brings = -worst.domain.change if worst.domain else 0.0
    harm = worst.general.change if worst.general else 0.0
    if harmful and others and harm > brings:
        return (
            f"It costs more than it brings: leave layer {worst.source} out",
            {"expand": {"layers": others}},
        )
    halved = {"train.lr": setting.lr / 2}
    if not setting.replays:
        return "Train more gently, and list general text in data.replay, which keeps copies quiet on it", halved
    return "Train more gently", halved


def important_layer(diagnosis: Diagnosis) -> Finding | None:
    """Was a layer copied that general text needs?"""
    if not diagnosis.layers:
        return None
    highest = max(diagnosis.layers, key=lambda layer: layer.rank)
    above = [layer for layer in diagnosis.layers if layer.delta > layer.median]
    problem = diagnosis.general_rose and bool(above)
    saw = (
        f"Layer {highest.source} was copied with a delta of {short(highest.delta)}, rank {highest.rank} of "
        f"{highest.of} (1: needed least); the median of all layers is {short(highest.median)}"
    )
    if not above:
        saw = f"No important layer was copied: of those that were, l{saw[1:]}"
    change, settings = _against_importance(diagnosis, len(above)) if problem else (None, {})
    return Finding(
        name="important_layer", topic="general", problem=problem, saw=f"{saw}.", change=change, settings=settings
    )


def _against_importance(diagnosis: Diagnosis, above: int) -> tuple[str, dict[str, Any]]:
    """Other layers, or where those with the lowest deltas were copied, fewer."""
    layers = diagnosis.layers
    if max(layer.rank for layer in layers) > len(layers):
        return "Copy layers that general text needs less", {"expand": {"choose": "lowest", "k": len(layers)}}
    return "These are the lowest there are: copy fewer", {"expand": {"k": max(1, len(layers) - above)}}


def unit_against_importance(diagnosis: Diagnosis) -> Finding | None:
    """Which unit moved most against its importance?"""
    ranked = [unit for unit in diagnosis.units if unit.against is not None]
    if not ranked:
        return None
    worst = max(ranked, key=lambda unit: unit.against if unit.against is not None else -1.0)
    against = worst.against or 0.0
    problem = diagnosis.general_rose and against > AGAINST
    saw = (
        f"{worst.unit} moved most against its importance ({against:+.2f}, where 0 is in balance and 1 the most "
        f"important unit moving farthest): importance {short(worst.importance or 0.0)}, mean multiplier "
        f"{worst.multiplier:.2f}, change of a weight {short(worst.change)}"
    )
    change, settings = _against_conflict(diagnosis, worst) if problem else (None, {})
    return Finding(
        name="unit_against_importance", topic="general", problem=problem, saw=f"{saw}.", change=change,
        settings=settings,
    )  # fmt: skip


def _against_conflict(diagnosis: Diagnosis, unit: UnitCourse) -> tuple[str, dict[str, Any]]:
    setting = diagnosis.setting
    if setting.map == "constant":
        return "Importance had no effect: let it decide", {"method": "adept", "lr_policy": {"map": "linear"}}
    if unit.multiplier > 1 and setting.map == "ratio":
        return (
            "The domain needs it too, and the ratio let it move: let general competence alone decide",
            {"lr_policy": {"map": "linear", "preserve_mean": True}},
        )
    if unit.multiplier > 1 and setting.map != "rank":
        return (
            "An outlier of importance leaves all others next to nothing of the range: let ranks decide",
            {"lr_policy": {"map": "rank"}},
        )
    if unit.multiplier > 1 and setting.every < setting.steps:
        return "Its importance changed faster than its multiplier", {"importance.every": max(1, setting.every // 2)}
    return "It was held back and moved far all the same: train more gently", {"train.lr": setting.lr / 2}


def silent_projections(diagnosis: Diagnosis) -> Finding | None:
    """Is the learning rate too small for the silent projections, or too large?"""
    on_domain = [(writes, writes.on["domain"]) for writes in diagnosis.writes if "domain" in writes.on]
    if not on_domain:
        return None
    parts = [share.copy_share / share.below_share if share.below_share else 0.0 for _, share in on_domain]
    told = ", ".join(
        f"{share.copy_share:.2%} at layer {writes.index} (the layer below: {share.below_share:.2%})"
        for writes, share in on_domain
    )
    saw = f"On domain text the copies write to the residual stream, as a share of its norm: {told}"
    setting, typical = diagnosis.setting, statistics.median(parts)
    problem, change, settings = False, None, dict[str, Any]()
    if diagnosis.domain_stayed and typical < FAINT:
        factor = 2.0 ** min(6, max(1, math.ceil(math.log2(FAINT / max(typical, 1e-9)))))
        problem, settings = True, {"train.lr": min(setting.lr * factor, _LARGEST_LR)}
        change = (
            "The learning rate is too small for the silent projections, which began at zero: the copies are hardly "
            f"there ({typical:.1%} of what the layers below them write); raise it, or train.steps"
        )
    elif _got_worse(diagnosis) and typical > LOUD:
        problem, settings = True, {"train.lr": setting.lr / 4}
        change = (
            "The learning rate is too large: the copies write more than the layers below them, and the domain got worse"
        )
    return Finding(
        name="silent_projections", topic="domain", problem=problem, saw=f"{saw}.", change=change, settings=settings
    )


def few_copies(diagnosis: Diagnosis) -> Finding | None:
    """Are there enough copies? To blame only if those that there are do write."""
    copies, total = len(diagnosis.setting.copied), diagnosis.setting.source_layers
    faint = silent_projections(diagnosis)
    if not copies or faint is None:
        return None
    room = min(2 * copies, total)
    problem = diagnosis.domain_stayed and not faint.problem and room > copies
    return Finding(
        name="few_copies",
        topic="domain",
        problem=problem,
        saw=f"{copies} of {total} layers {'has a copy' if copies == 1 else 'have copies'}.",
        change="The copies do write, and it is not enough: copy more layers" if problem else None,
        settings={"expand": {"k": room}} if problem else {},
    )


def held_back(diagnosis: Diagnosis) -> Finding | None:
    """Do multipliers leave the copies room to learn?"""
    units = diagnosis.units
    if not units or not diagnosis.setting.copied:
        return None
    sizes = np.array([unit.numel for unit in units], dtype=float)
    multipliers = np.array([unit.multiplier for unit in units])
    mean, share = (
        float(np.average(multipliers, weights=sizes)),
        float(sizes[multipliers < HELD_BACK].sum() / sizes.sum()),
    )
    problem = diagnosis.domain_stayed and (mean < 0.5 or share > 0.5)
    change, settings = _let_go(diagnosis)
    return Finding(
        name="held_back",
        topic="domain",
        problem=problem,
        saw=f"Multipliers are {mean:.2f} on average over parameters; {share:.1%} of all parameters have one below "
        f"{HELD_BACK:g}.",
        change=change if problem else None,
        settings=settings if problem else {},
    )


def _let_go(diagnosis: Diagnosis) -> tuple[str, dict[str, Any]]:
    """A preset takes no other key beside it; a ratio keeps the mean, so that it is a low limit that holds back."""
    if diagnosis.setting.map == "ratio":
        return "Multipliers hold most of the copies back: raise the lowest", {"lr_policy.min_multiplier": HELD_BACK}
    key = {"lr_policy": {"preserve_mean": True}} if diagnosis.setting.preset else {"lr_policy.preserve_mean": True}
    return "Multipliers hold the copies back: keep their mean at 1", key


def starved_units(diagnosis: Diagnosis) -> Finding | None:
    """Do gradients reach what lies behind the silent factors?"""
    parts = []
    for layer in sorted({unit.layer for unit in diagnosis.gradients}):
        units = [unit for unit in diagnosis.gradients if unit.layer == layer and unit.kind != "norm"]
        writers = [unit.rms for unit in units if unit.silent]
        if writers and max(writers) > 0:
            parts += [(unit, unit.rms / max(writers)) for unit in units if not unit.silent]
    if not parts:
        return None
    unit, smallest = min(parts, key=lambda item: item[1])
    below = [unit for unit, part in parts if part < STARVED or unit.rms < diagnosis.setting.eps]
    faint = silent_projections(diagnosis)
    problem = diagnosis.domain_stayed and len(below) > len(parts) / 2 and not (faint and faint.problem)
    saw = (
        f"The smallest gradient on domain text is that of {unit.unit}: {short(unit.rms)} (root mean square), "
        f"{smallest:.2%} of what its copy's writing projections get; {len(below)} of {len(parts)} units behind those "
        f"get less than {STARVED:.0%}"
    )
    change = (
        "These units are starved: gradients reach them through projections that are still close to zero. Larger steps "
        "bring those up sooner"
    )
    return Finding(
        name="starved_units", topic="domain", problem=problem, saw=f"{saw}.", change=change if problem else None,
        settings={"train.lr": min(2 * diagnosis.setting.lr, _LARGEST_LR)} if problem else {},
    )  # fmt: skip


def entangled(diagnosis: Diagnosis) -> Finding | None:
    """Do copies answer general text as they answer domain text?"""
    if not diagnosis.overlaps:
        return None
    least = min(diagnosis.overlaps, key=lambda overlap: (overlap.accuracy, overlap.distance))
    loud = [
        writes.on["general"].copy_share / writes.on["domain"].copy_share
        for writes in diagnosis.writes
        if writes.index == least.index and writes.on.keys() >= {"general", "domain"} and writes.on["domain"].copy_share
    ]
    problem = least.accuracy < ENTANGLED and (diagnosis.general_rose or diagnosis.domain_stayed)
    saw = (
        f"What the copy at layer {least.index} (of layer {least.source}) writes tells general from domain text with an "
        f"accuracy of {least.accuracy:.2f} (chance: 0.50; the layer below: {least.below_accuracy:.2f}), at a distance "
        f"of {least.distance:.3f} between both (the layer below: {least.below_distance:.3f})"
    )
    if loud:
        saw += f"; on general text it writes {loud[0]:.0%} of what it writes on domain text"
    change, settings = None, dict[str, Any]()
    if problem and diagnosis.setting.replays:
        change, settings = "Both texts pass it alike: replay more general text", {"data.replay_share": 0.5}
    elif problem:
        change = (
            "Both texts pass it alike: list general text (not that of data.general_eval) in data.replay, so that it "
            "learns to tell them apart"
        )
        settings = {"data.replay": [PLACE_OF_TEXT], "data.replay_share": 0.25}
    return Finding(
        name="entangled", topic="entanglement", problem=problem, saw=f"{saw}.", change=change, settings=settings
    )


_LOOKS: Sequence[Callable[[Diagnosis], Finding | None]] = (
    harmful_copy, important_layer, unit_against_importance, silent_projections, few_copies, held_back, starved_units,
    entangled,
)  # fmt: skip

_TOPICS: tuple[Topic, ...] = ("general", "domain", "entanglement")


def _got_worse(diagnosis: Diagnosis) -> bool:
    rise = diagnosis.losses["domain"].rise if "domain" in diagnosis.losses else None
    return rise is not None and _beyond_noise(rise)


def _beyond_noise(change: Change) -> bool:
    """Upwards."""
    return change.change > max(DOMAIN_TOLERANCE, NOISE * (change.standard_error or 0.0))


def _nats(value: float) -> str:
    return f"{value:+.4f}"


def _error(change: Change) -> str:
    return "" if change.standard_error is None else f" ± {change.standard_error:.4f}"
