"""How many layers are copied, and which (docs/choosing_layers.md).

Which: those with the lowest delta (paper, section 3.1); for ablations the highest, random ones, or evenly spread ones
as in LLaMA-Pro (arXiv 2401.02415). How many: a number, or a rule over the sorted deltas. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from pydantic import Field

from adept_ds.base.errors import InputError
from adept_ds.base.records import Record
from adept_ds.config.layer_sections import ExpandSection
from adept_ds.probing.model_size import ModelSize

_CERTAIN = 0.95
"""A layer that more, or less than one minus, of the bootstrap's samples would choose is chosen, or not, for certain."""


_HOW = {
    "highest": "those with the highest delta are copied",
    "uniform": "evenly spread layers are copied",
    "random": "random layers are copied",
    "last": "the last layers are copied",
}


Cost = Callable[[Sequence[int]], float]
"""From the layers that are chosen to the floating-point operations of a training step, by token."""


class TieBreak(Record):
    """How `tie_break: cost` came to its layers."""

    lowest: tuple[int, ...]
    """Those with the lowest deltas, which would have been chosen otherwise; ascending."""
    tied: tuple[int, ...]
    """Layers whose deltas the probe cannot tell from the highest of these; ascending."""
    rise: float
    """Mean delta of the chosen layers minus that of the lowest ones."""
    standard_error: float
    """Of `rise`, by the bootstrap."""
    flops: float | None
    """Planned operations of a training step by token, with the chosen layers; None where no training is planned."""
    flops_of_lowest: float | None
    """The same with the lowest ones."""


class Selection(Record):
    """What was chosen, and why."""

    layers: tuple[int, ...] = Field(default=(), exclude=True)
    """Ascending; a result file has them in a place of its own."""
    k: int
    choose: str
    rule: str | None
    """None: k was given."""
    reason: str
    """A sentence for people."""
    rules: dict[str, int]
    """What each rule would have given for k; budget only where limits are set."""
    within_noise: tuple[int, ...]
    """Layers, chosen or not, for which another sample of the corpus might well decide otherwise."""
    tie_break: TieBreak | None = None
    """None: it was not asked for, or there is no bootstrap to tell what a tie is."""


def select_layers(
    section: ExpandSection,
    deltas: Sequence[float],
    size: ModelSize,
    seed: int,
    replicates: Sequence[Sequence[float]] | None = None,
    cost: Cost | None = None,
) -> Selection:
    """Choose by the deltas of a probe.

    Args:
        seed: of `choose: random`.
        replicates: [samples][layers] deltas of bootstrap samples; without any, no tie is broken.
        cost: of training, for `tie_break: cost` to say what it saves.

    Raises:
        InputError: deltas that are no numbers, more layers than there are, or a budget that not even one copy fits.
    """
    broken = [index for index, delta in enumerate(deltas) if not math.isfinite(delta)]
    if broken:
        raise InputError(
            f"probe: the delta of layer {broken[0]} is {deltas[broken[0]]}, no number; "
            "train.precision: fp32 avoids overflow, and probe.corpus may be at fault"
        )
    deltas = deltas[: len(deltas) - section.spare_top]  # what is above does not count, for anything
    if replicates is not None:
        replicates = [sample[: len(deltas)] for sample in replicates]
    rules = {"knee": knee(deltas), "threshold": len(_below_threshold(deltas, section.threshold))}
    if section.limits:
        rules["budget"] = _within_budget(section, deltas, size, seed)
    if section.layers is not None:
        chosen, k = sorted(section.layers), len(section.layers)
    else:
        k = min(rules[section.rule], rules.get("budget", len(deltas)))
        if section.num_copies is not None:
            k = section.num_copies
        chosen = _chosen(section, deltas, k, seed)
    tie_break, too_large = None, False
    if section.tie_break == "cost" and replicates is not None:
        lowest, (chosen, tied) = chosen, cheapest_layers(deltas, k, replicates)
        too_large = bool(_over_budget(section, chosen, size))  # layers may differ in size
        if too_large:
            chosen = lowest
        tie_break = _tie_break(lowest, chosen, tied, replicates, cost, deltas)
    return Selection(
        layers=tuple(chosen),
        k=k,
        choose="list" if section.layers is not None else section.choose,
        rule=section.rule if section.k == "auto" else None,
        reason=_reason(section, rules, deltas, chosen, size)
        + (_says(tie_break, chosen, too_large) if tie_break else ""),
        rules=rules,
        within_noise=_within_noise(section, k, replicates),
        tie_break=tie_break,
    )


def layers_without_probe(section: ExpandSection, num_layers: int, seed: int) -> list[int]:
    """The layers of a section that no delta decides about (see `ExpandSection.needs_probe`), ascending."""
    assert not section.needs_probe
    if section.layers is not None:
        return sorted(section.layers)
    return _chosen(section, [0.0] * (num_layers - section.spare_top), section.num_copies or 0, seed)


def lowest_layers(deltas: Sequence[float], k: int) -> list[int]:
    """The k layers with the lowest delta, in ascending order of index; ties go to the lower layer."""
    return sorted(sorted(range(len(deltas)), key=lambda layer: (deltas[layer], layer))[:k])


def cheapest_layers(
    deltas: Sequence[float], k: int, replicates: Sequence[Sequence[float]]
) -> tuple[list[int], list[int]]:
    """Of the choices that the probe cannot tell from the k lowest deltas, the one with which training costs least.

    Two layers are tied if fewer than 95% of the bootstrap's samples agree which of them has the lower delta. A sample
    has one set of sequences for all layers, so what they have in common does not count as noise. Layers that are lower
    than the highest of the k lowest deltas, and not tied with it, stay chosen; the others are chosen among those that
    are tied with it. No layer below the lowest copy has a backward pass, and nothing else of the cost depends on the
    choice (where layers are of one size): so the lowest copy stands as high as it can, and above that deltas decide.

    Args:
        replicates: [samples][layers] deltas of bootstrap samples.

    Returns:
        The chosen layers and the tied ones, both ascending.
    """
    lowest = lowest_layers(deltas, k)
    last = max(lowest, key=lambda layer: (deltas[layer], layer))
    values = np.asarray(replicates, dtype=np.float64)
    other = values[:, [last]]
    above = (values > other).mean(0) + (values == other).mean(0) / 2  # equal in all samples: a half, a tie
    tied = [layer for layer in range(len(deltas)) if 1 - _CERTAIN < above[layer] < _CERTAIN]
    certain = [layer for layer in lowest if layer not in tied]
    free = k - len(certain)
    floor = min([tied[-free], *certain])
    within = sorted((layer for layer in tied if layer >= floor), key=lambda layer: (deltas[layer], -layer))
    return sorted(certain + within[:free]), tied


def uniform_layers(num_layers: int, k: int) -> list[int]:
    """The top layer of each of k groups of consecutive layers, whose sizes differ by one at most."""
    return [(group + 1) * num_layers // k - 1 for group in range(k)]


def knee(deltas: Sequence[float]) -> int:
    """How many layers stand before the sorted deltas begin to rise.

    The point of the ascending curve that is farthest below the straight line from its first to its last one, both axes
    scaled to [0, 1] (Kneedle: Satopaa et al., ICDCS workshops 2011). A few layers that nothing works without would
    bend every curve into one knee just before them: the highest quarter is left out. 1 where no point lies below.
    """
    curve = np.sort(np.asarray(deltas, dtype=np.float64))[: math.ceil(0.75 * len(deltas))]
    height = curve[-1] - curve[0]
    if height <= 0:
        return 1
    below = np.linspace(0, 1, len(curve)) - (curve - curve[0]) / height
    return int(below.argmax()) + 1


def _in_order(section: ExpandSection, deltas: Sequence[float], seed: int) -> list[int]:
    """All layers, those first that a smaller k would choose already."""
    layers = range(len(deltas))
    if section.choose == "random":
        return [int(layer) for layer in np.random.default_rng(seed).permutation(len(deltas))]
    if section.choose == "last":
        return list(reversed(layers))
    sign = -1 if section.choose == "highest" else 1
    return sorted(layers, key=lambda layer: (sign * deltas[layer], layer))


def _chosen(section: ExpandSection, deltas: Sequence[float], k: int, seed: int) -> list[int]:
    if k > len(deltas):
        raise InputError(f"expand.k: {k} is more than the model's {len(deltas)} layers; choose at most {len(deltas)}")
    if section.choose == "uniform":
        return uniform_layers(len(deltas), k)
    return sorted(_in_order(section, deltas, seed)[:k])


def _below_threshold(deltas: Sequence[float], share: float) -> list[int]:
    """Layers with a delta below that share of the median (of the median itself where it is negative); at least one."""
    limit = _limit(deltas, share)
    return [layer for layer, delta in enumerate(deltas) if delta < limit] or lowest_layers(deltas, 1)


def _limit(deltas: Sequence[float], share: float) -> float:
    median = float(np.median(deltas))
    return share * median if median > 0 else median


def _within_budget(section: ExpandSection, deltas: Sequence[float], size: ModelSize, seed: int) -> int:
    """The largest k up to which the copies that would be chosen stay within every limit."""
    fits = 0
    while fits < len(deltas) and not _over_budget(section, _chosen(section, deltas, fits + 1, seed), size):
        fits += 1
    if not fits:
        (only,) = _chosen(section, deltas, 1, seed)
        what, value, limit = _over_budget(section, [only], size)[0]
        raise InputError(
            f"expand.{what}: {limit:g} does not allow one copy: layer {only} alone makes {value:.3g}; raise it"
        )
    return fits


def _over_budget(section: ExpandSection, layers: Sequence[int], size: ModelSize) -> list[tuple[str, float, float]]:
    """Limits that copies of these layers exceed: key, value, limit."""
    return [use for use in _budget(section, layers, size) if use[1] > use[2]]


def _budget(section: ExpandSection, layers: Sequence[int], size: ModelSize) -> list[tuple[str, float, float]]:
    use = {"max_trainable_share": size.trainable_share, "max_added_latency": size.added_latency}
    return [(key, use[key](layers), limit) for key, limit in section.limits.items()]


def _reason(
    section: ExpandSection, rules: dict[str, int], deltas: Sequence[float], chosen: Sequence[int], size: ModelSize
) -> str:
    k = len(chosen)
    if section.layers is not None:
        return f"k = {k}: these layers were listed"
    if section.k != "auto":
        why = "as configured" if section.k else "the default"
    elif k == rules[section.rule] and section.rule == "knee":
        why = "the knee of the sorted deltas" if k > 1 else "the sorted deltas have no knee above the first"
    elif k == rules[section.rule] and section.rule == "threshold":
        limit = _limit(deltas, section.threshold)
        why = "deltas below" if min(deltas) < limit else "one at least, though no delta is below"
        why += f" {limit:.4g}, " + (f"{section.threshold:g} x the median" if limit > 0 else "the median")
    else:
        names = {"max_trainable_share": "of the parameters train", "max_added_latency": "is added to a forward pass"}
        why = " and ".join(
            f"{value:.1%} {names[key]} (limit {limit:.1%})" for key, value, limit in _budget(section, chosen, size)
        )
        why += "" if section.rule == "budget" else f"; {section.rule} alone would give {rules[section.rule]}"
    how = _next_layer(deltas, k) if section.choose == "lowest" else _HOW[section.choose]
    return f"k = {k}: {why}; {how}{spared(section)}"


def spared(section: ExpandSection) -> str:
    """The end of a reason."""
    return f"; the last {section.spare_top} layers are spared" if section.spare_top else ""


def _tie_break(
    lowest: Sequence[int],
    chosen: Sequence[int],
    tied: Sequence[int],
    replicates: Sequence[Sequence[float]],
    cost: Cost | None,
    deltas: Sequence[float],
) -> TieBreak:
    values = np.asarray(replicates, dtype=np.float64)
    rises = values[:, list(chosen)].mean(1) - values[:, list(lowest)].mean(1)
    return TieBreak(
        lowest=tuple(lowest),
        tied=tuple(tied),
        rise=float(np.mean([deltas[layer] for layer in chosen]) - np.mean([deltas[layer] for layer in lowest])),
        standard_error=float(rises.std(ddof=1)),
        flops=None if cost is None else cost(chosen),
        flops_of_lowest=None if cost is None else cost(lowest),
    )


def _says(tie: TieBreak, chosen: Sequence[int], too_large: bool) -> str:
    """The end of the reason. Args: too_large: what trains fastest exceeds the limits of the budget."""
    if too_large:
        return "; tie_break: cost changes nothing: layers that train faster exceed the limits"
    if tuple(chosen) == tie.lowest:
        return "; tie_break: cost changes nothing: no choice that the probe cannot tell from this one trains faster"
    text = f"; of layers {', '.join(map(str, tie.tied))}, whose deltas the probe cannot tell apart, those that train "
    text += f"fastest are copied: not {', '.join(str(layer) for layer in tie.lowest if layer not in chosen)}, but "
    text += ", ".join(str(layer) for layer in chosen if layer not in tie.lowest)
    text += f" (mean delta {tie.rise:+.4g} ± {tie.standard_error:.2g})"
    if tie.flops is not None and tie.flops_of_lowest:
        text += f", which saves {1 - tie.flops / tie.flops_of_lowest:.1%} of a training step's operations"
    return text


def _next_layer(deltas: Sequence[float], k: int) -> str:
    order = sorted(range(len(deltas)), key=lambda layer: (deltas[layer], layer))
    if k == len(order):
        return "no layer is left"
    last, following = deltas[order[k - 1]], deltas[order[k]]
    times = f", {following / last:.2f} x that of number {k}" if last > 0 else ""
    return f"the next lowest delta is {following:.4g} (layer {order[k]}){times}"


def _within_noise(section: ExpandSection, k: int, replicates: Sequence[Sequence[float]] | None) -> tuple[int, ...]:
    if replicates is None or section.layers is not None or section.choose not in ("lowest", "highest"):
        return ()
    values = np.asarray(replicates, dtype=np.float64) * (-1 if section.choose == "highest" else 1)
    places = values.argsort(axis=1, kind="stable")[:, :k]
    share = np.bincount(places.ravel(), minlength=values.shape[1]) / len(values)
    return tuple(int(layer) for layer in np.flatnonzero((share > 1 - _CERTAIN) & (share < _CERTAIN)))
