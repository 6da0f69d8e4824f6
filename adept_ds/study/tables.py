"""The tables of a comparison, as words and numbers; page, Markdown and LaTeX write the same ones."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import NamedTuple

from adept_ds.study import wording
from adept_ds.study.arms import BOUNDS, CRITERIA, PLAIN
from adept_ds.study.comparison import ArmRecord, ChosenPoint, Comparison, SourceRecord, TrialRecord
from adept_ds.study.verdicts import Difference
from adept_ds.study.wording import NONE

_D = [criterion.name for criterion in CRITERIA if criterion != PLAIN]


class Entry(NamedTuple):
    text: str
    details: tuple[str, ...] = ()
    """Smaller lines below it."""
    strong: bool = False


class Table(NamedTuple):
    name: str
    caption: str
    header: list[str]
    rows: list[list[Entry]]
    """Each begins with what the row is about."""


def tables_of(comparison: Comparison) -> dict[str, Table]:
    """By name."""
    makers = (_verdicts, _losses, _at_most, _differences, _cost)
    return {table.name: table for table in (make(comparison) for make in makers)}


def pair_tables(comparison: Comparison) -> dict[str, Table]:
    """By criterion: every arm against every other."""
    return {criterion.name: _pairs(comparison, criterion.name) for criterion in CRITERIA}


def _verdicts(comparison: Comparison) -> Table:
    reference = comparison.reference
    rows = []
    for criterion in CRITERIA:
        pairs = [
            (arm.name, _pair(comparison, criterion.name, arm.name, reference))
            for arm in comparison.arms
            if arm.name != reference
        ]
        groups: dict[str, list[str]] = {"better": [], "open": [], "worse": [], "none": []}
        for name, pair in pairs:
            group, line = _verdict(name, pair)
            groups[group].append(line)
        rows.append([Entry(_signed(criterion.name)), *(Entry(NONE) if not of else Entry(of[0], tuple(of[1:])) for of in groups.values())])
    header = ["", f"better than {reference}", "not told apart", f"worse than {reference}", "no comparison"]
    return Table("verdicts", caption, header, rows)


def _losses(comparison: Comparison) -> Table:
    sources = _test_sources(comparison)
    asked = [source for source in sources if _accuracies(comparison, source)]
    header = ["method", "learning rate", "seeds"]
    header += [f"{source.corpus}: {source.name}" for source in sources] + [f"accuracy: {s.name}" for s in asked]
    base = [Entry("base"), Entry(NONE), Entry(NONE)]
    base += [Entry(wording.nats(source.base_loss)) for source in sources]
    base += [Entry(wording.percent(source.base_accuracy)) for source in asked]
    rows = [base]
    for arm, plain in _with_plain(comparison):
        trials = _trials_at(comparison, arm, plain)
        row = [Entry(arm.name), Entry(wording.rate(plain.lr or 0)), Entry(str(len(plain.seeds)))]
        losses = [fmean(trial.losses["1"][s.corpus][f"test/{s.name}"] for trial in trials) for s in sources]
        row += [
            Entry(wording.nats(loss), (wording.change(loss - s.base_loss),))
            for loss, s in zip(losses, sources, strict=True)
        ]
        row += [Entry(wording.percent(_accuracies(comparison, source).get(arm.name))) for source in asked]
        rows.append(row)
    caption = (
        "Losses on test documents in nats per token (change against the base), without dial, "
        "at the learning rate with the lowest domain loss on validation documents; means over seeds."
    )
    return Table("losses", caption, header, rows)


def _at_most(comparison: Comparison) -> Table:
    header = ["method", *(f"D({bound:g})".replace("-", wording.MINUS) for bound in BOUNDS), "hypervolume"]
    rows = [
        [Entry(arm.name), *(_reached(arm.chosen[name]) for name in _D), Entry(f"{1000 * arm.hypervolume:.1f}")]
        for arm in comparison.arms
    ]
    caption = (
        "D(x): domain loss on test documents (below it the change against the base with its 95% interval), at the "
        "learning rate and dial with the lowest domain loss among those that keep every general source at most x nats "
        "above the base, both on validation documents. Hypervolume of the front in thousandths of nats squared."
    )
    return Table("at_most", caption, header, rows)


def _reached(chosen: ChosenPoint | None) -> Entry:
    if chosen is None:
        return Entry("not reached")
    if chosen.lr is None:
        return Entry(wording.nats(chosen.domain_loss), ("the base",))
    gain = f"{wording.change(chosen.change)} ({wording.interval(chosen.change_low, chosen.change_high)})"
    where = f"{wording.point(chosen.lr, chosen.alpha)}; {wording.seeds(len(chosen.seeds))}"
    beyond = f"on test {wording.excess(chosen.excess)} beyond x ({chosen.largest_rise_of})"
    return Entry(wording.nats(chosen.domain_loss), (gain, where, *([beyond] if chosen.excess else [])))


def _differences(comparison: Comparison) -> Table:
    reference = comparison.reference
    header = ["method", "plain", *_D]
    rows = []
    for arm in comparison.arms:
        if arm.name != reference:
            pairs = [_pair(comparison, criterion.name, arm.name, reference) for criterion in CRITERIA]
            rows.append([Entry(arm.name), *map(_gap, pairs)])
    caption = (
        f"Difference of domain loss on test documents to {reference} (95% interval); negative is better. "
        "Bold: told apart, that is, the interval excludes 0 and every seed has the same sign."
    )
    return Table("differences", caption, [name.replace("-", wording.MINUS) for name in header], rows)


def _pairs(comparison: Comparison, criterion: str) -> Table:
    names = [arm.name for arm in comparison.arms]
    rows = [[Entry(mine), *(_gap(_pair(comparison, criterion, mine, other)) for other in names)] for mine in names]
    return Table(criterion, "Domain loss of the row less that of the column.", ["", *names], rows)


def _gap(pair: tuple[Difference, int] | None) -> Entry:
    if pair is None:
        return Entry(NONE)
    found, sign = pair
    low, high = sorted((sign * found.low, sign * found.high))
    details = (wording.interval(low, high), wording.seeds(len(found.seeds)))
    return Entry(wording.change(sign * found.difference), details, strong=found.better is not None)


def _pair(comparison: Comparison, criterion: str, mine: str, other: str) -> tuple[Difference, int] | None:
    """The difference of two arms and the sign that makes it that of `mine` less `other`."""
    for found in comparison.differences:
        if found.criterion == criterion and {found.first, found.second} == {mine, other}:
            return found, 1 if found.first == mine else -1
    return None


def _cost(comparison: Comparison) -> Table:
    header = ["method", "trainable", "share", "tokens", "tokens/s", "training", "beside it", "peak memory", "learned"]
    rows = []
    for arm, plain in _with_plain(comparison):
        trials = _trials_at(comparison, arm, plain)
        mean = {
            key: _mean(getattr(trial, key) for trial in trials)
            for key in TrialRecord.model_fields
            if key.endswith(("parameters", "tokens", "second", "seconds", "bytes"))
        }
        row = [arm.name, wording.count(mean["trainable_parameters"])]
        row += [wording.percent(mean["trainable_parameters"], mean["total_parameters"]), wording.count(mean["tokens"])]
        row += [wording.count(mean["tokens_per_second"]), wording.duration(mean["seconds"])]
        row += [wording.duration(mean["overhead_seconds"]), wording.size(mean["peak_memory_bytes"])]
        row += [wording.size(mean["learned_bytes"])]
        rows.append([Entry(text) for text in row])
    caption = (
        "What training cost, means over the trials of the table of losses: parameters that train, their share of all, "
        "time of training steps and beside them (probe, refreshes, anchors), memory of the rank with most, "
        "and bytes on disk of what was learned."
    )
    return Table("cost", caption, header, rows)


def _test_sources(comparison: Comparison) -> list[SourceRecord]:
    return sorted(
        (source for source in comparison.sources if source.role == "test"),
        key=lambda source: (source.corpus, source.name),
    )


def _with_plain(comparison: Comparison) -> list[tuple[ArmRecord, ChosenPoint]]:
    return [(arm, plain) for arm in comparison.arms if (plain := arm.chosen[PLAIN.name]) is not None]


def _trials_at(comparison: Comparison, arm: ArmRecord, chosen: ChosenPoint) -> list[TrialRecord]:
    return [trial for trial in comparison.trials if (trial.arm, trial.lr) == (arm.name, chosen.lr)]


def _accuracies(comparison: Comparison, source: SourceRecord) -> dict[str, float]:
    """By arm, without dial."""
    found = {}
    for arm, plain in _with_plain(comparison):
        trials = _trials_at(comparison, arm, plain)
        values = [trial.accuracy.get("1", {}).get(source.corpus, {}).get(f"test/{source.name}") for trial in trials]
        mean = _mean(values)
        if mean is not None:
            found[arm.name] = mean
    return found


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
