"""The tables of a comparison, as words and numbers; page, Markdown and LaTeX write the same ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import NamedTuple

from adept_ds.comparison import wording
from adept_ds.comparison.arms import CRITERIA, PLAIN
from adept_ds.comparison.record import ArmRecord, ChosenPoint, Comparison, SourceRecord, TrialRecord
from adept_ds.comparison.verdicts import Gap, condition
from adept_ds.comparison.wording import NONE

_PREFERRED = ("accuracy_norm", "acc_norm", "acc", "exact_match")

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
    makers = (_verdicts, _losses, *([_tasks] if comparison.base_scores else []), _at_most, _differences, _cost)
    return {table.name: table for table in (make(comparison) for make in makers)}


def pair_tables(comparison: Comparison) -> dict[str, Table]:
    """By criterion: every arm against every other."""
    return {criterion.name: _pairs(comparison, criterion.name) for criterion in CRITERIA}


def _verdicts(comparison: Comparison) -> Table:
    reference = comparison.reference
    header = ["", f"better than {reference}", "not told apart from it", f"worse than {reference}", "no comparison"]
    rows = []
    for criterion in CRITERIA:
        lines: dict[str, list[str]] = {"better": [], "open": [], "worse": [], "none": []}
        for arm in _others(comparison):
            gap = comparison.gap(criterion.name, arm.name, reference)
            lines[_verdict(gap)].append(arm.name if gap is None else f"{arm.name} {_in_words(gap)}")
        if not any(arm.chosen[criterion.name] for arm in comparison.arms):
            lines["none"] = ["no method reaches it"]
        groups = [Entry(first, tuple(more)) for first, *more in (of or [NONE] for of in lines.values())]
        rows.append([Entry(wording.criterion(criterion.name), (condition(criterion),)), *groups])
    caption = (
        f"Which methods reach another domain loss than {reference} on test documents, and by how many nats: told apart "
        "where the 95% interval excludes 0 and every seed has the same sign. No comparison: one of the two does not "
        "reach the bound, or no seed is common to both."
    )
    return Table("verdicts", caption, header, rows)


def _verdict(gap: Gap | None) -> str:
    if gap is None:
        return "none"
    return "open" if not gap.told_apart else "better" if gap.value < 0 else "worse"


def _in_words(gap: Gap) -> str:
    """A difference whose sign is clear from where it stands, or its interval where it is not."""
    seeds = ", one seed" if gap.num_seeds == 1 else ""
    return f"by {abs(gap.value):.3f}{seeds}" if gap.told_apart else f"({wording.interval(gap.low, gap.high)}{seeds})"


def _others(comparison: Comparison) -> list[ArmRecord]:
    return [arm for arm in comparison.arms if arm.name != comparison.reference]


def _losses(comparison: Comparison) -> Table:
    sources = _test_sources(comparison)
    asked = [source for source in sources if _accuracies(comparison, source)]
    header = ["method", "learning rate", "seeds"]
    header += [f"{source.corpus}: {source.name}" for source in sources] + [f"accuracy: {s.name}" for s in asked]
    base = [Entry("base"), Entry(NONE), Entry(NONE)]
    base += [Entry(wording.nats(source.base_loss)) for source in sources]
    base += [Entry(wording.percent(source.base_accuracy, digits=".1f")) for source in asked]
    rows = [base]
    for arm, plain in _with_plain(comparison):
        trials = _trials_at(comparison, arm, plain)
        row = [Entry(arm.name), Entry(wording.rate(plain.lr or 0)), Entry(str(len(plain.seeds)))]
        losses = [fmean(trial.losses["1"][s.corpus][f"test/{s.name}"] for trial in trials) for s in sources]
        row += [
            Entry(wording.nats(loss), (wording.change(loss - s.base_loss),))
            for loss, s in zip(losses, sources, strict=True)
        ]
        row += [_accuracy(_accuracies(comparison, source).get(arm.name), source.base_accuracy) for source in asked]
        rows.append(row)
    caption = (
        "Losses on test documents in nats per token (change against the base), without dial, "
        "at the learning rate with the lowest domain loss on validation documents; means over seeds."
    )
    return Table("losses", caption, header, rows)


def _accuracy(value: float | None, base: float | None) -> Entry:
    against = () if value is None or base is None else (wording.points(value - base),)
    return Entry(wording.percent(value, digits=".1f"), against)


def _tasks(comparison: Comparison) -> Table:
    base = comparison.base_scores
    asked = [(task, _measure_of(scores)) for task, scores in base.items() if scores]
    rows = [[Entry("base"), *(Entry(_score(measure, base[task][measure])) for task, measure in asked)]]
    for arm, plain in _with_plain(comparison):
        scores = [trial.scores.get("1", {}) for trial in _trials_at(comparison, arm, plain)]
        row = [Entry(arm.name)]
        for task, measure in asked:
            value = _mean(of.get(task, {}).get(measure) for of in scores)
            row.append(Entry(NONE) if value is None else _change(measure, value, base[task][measure]))
        rows.append(row)
    caption = (
        "Scores on tasks (change against the base), without dial, of the trials of the table of losses; means over "
        "seeds. Other measures, standard errors and positions of the dial are in compare.json."
    )
    return Table("tasks", caption, ["method", *(f"{task}: {measure}" for task, measure in asked)], rows)


def _measure_of(scores: Mapping[str, float]) -> str:
    """The one that stands for a task: by length where choices have lengths."""
    others = sorted(scores, key=lambda measure: measure.endswith("_stderr"))
    return next(measure for measure in (*_PREFERRED, *others) if measure in scores)


def _change(measure: str, value: float, base: float) -> Entry:
    change = wording.points(value - base) if _is_share(measure) else wording.change(value - base)
    return Entry(_score(measure, value), (change,))


def _score(measure: str, value: float) -> str:
    return wording.percent(value, digits=".1f") if _is_share(measure) else f"{value:.4g}"


def _is_share(measure: str) -> bool:
    return measure.startswith(("acc", "exact_match"))


def _at_most(comparison: Comparison) -> Table:
    header = ["method", *map(wording.criterion, _D), "hypervolume"]
    rows = [
        [Entry(arm.name), *(_reached(arm.chosen[name]) for name in _D), Entry(f"{1000 * arm.hypervolume:.1f}")]
        for arm in comparison.arms
    ]
    caption = (
        "D(x): domain loss on test documents (below it the change against the base with its 95% interval), at the "
        "learning rate and dial with the lowest domain loss among those that keep every general source at most x nats "
        "above the base, both on validation documents. Hypervolume of the front in thousandths of nats squared."
        f"{_of_positions_between(comparison)}"
    )
    return Table("at_most", caption, header, rows)


def _of_positions_between(comparison: Comparison) -> str:
    missed = comparison.interpolation
    if missed is None:
        return ""
    return (
        f" The dial goes in steps of {missed.step:g}; between positions that were evaluated, losses are interpolated. "
        f"From its neighbours alone, one that was evaluated would be missed by {missed.mean:.4f} nats in the mean and "
        f"{missed.largest:.3f} at most."
    )


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
    names = [criterion.name for criterion in CRITERIA]
    rows = [
        [Entry(arm.name), *(_gap(comparison.gap(name, arm.name, reference)) for name in names)]
        for arm in _others(comparison)
    ]
    caption = (
        f"Domain loss on test documents less that of {reference} (95% interval); negative is better. "
        "Bold: told apart, that is, the interval excludes 0 and every seed has the same sign."
    )
    return Table("differences", caption, ["method", *map(wording.criterion, names)], rows)


def _pairs(comparison: Comparison, criterion: str) -> Table:
    names = [arm.name for arm in comparison.arms]
    rows = [[Entry(mine), *(_gap(comparison.gap(criterion, mine, other)) for other in names)] for mine in names]
    return Table(criterion, "Domain loss of the row less that of the column.", ["", *names], rows)


def _gap(gap: Gap | None) -> Entry:
    if gap is None:
        return Entry(NONE)
    details = (wording.interval(gap.low, gap.high), wording.seeds(gap.num_seeds))
    return Entry(wording.change(gap.value), details, strong=gap.told_apart)


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
