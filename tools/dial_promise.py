"""How often the dial's promise holds on documents that did not choose: over every model of one or more studies.

    python tools/dial_promise.py docs/study/first docs/study/writer_rates

Of every trained model the dial is turned as `adept dial` turns it (docs/dial.md), all copies alike, on one half of the
held-out documents of each source, so that the upper limit of the rise of every general source stays within the promise;
what became of it is read off the other half. Both halves take both parts in turn. Positions between those that were
evaluated are interpolated, as in comparisons.

held: no general source rises above the promise on the other half. shown: neither does any upper limit there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from adept_ds.base.files import read_json
from adept_ds.comparison.between import filled
from adept_ds.comparison.trials import BASE, Documents, Floats, Source, Trial, read_cell
from adept_ds.evaluation.dial_search import Scores, search
from adept_ds.evaluation.rises import HALVES, Half, SourceRises, in_half, loss_change

FEWEST = 5
"""Documents of a source in a half: with fewer, no limit of 95% says anything."""


class Outcome(NamedTuple):
    """Of one model and one half that chose."""

    alpha: float
    domain_rise: float
    """On the other half, in nats per token; below 0 where something was learned."""
    worst_rise: float
    """There, of the general source that rises most."""
    worst_limit: float


class Model(NamedTuple):
    """A trained model at every position of its dial."""

    documents: Mapping[Source, Documents]
    sums: Mapping[float, Mapping[Source, Floats]]

    def rises(self, alpha: float, source: Source, half: Half) -> SourceRises:
        documents = self.documents[source]
        mine = in_half(documents.ids, half) & (documents.tokens > 0)
        return SourceRises(documents.tokens[mine], self.sums[BASE][source][mine], self.sums[alpha][source][mine])

    def sources(self, corpus: str) -> list[Source]:
        """Of the general corpus, those that can be promised anything."""
        found = [source for source in self.documents if source.corpus == corpus]
        if corpus == "domain":
            return found
        return [s for s in found if min(len(self.rises(BASE, s, half).tokens) for half in HALVES) >= FEWEST]


def outcome(model: Model, evaluated: list[float], half: Half, promise: float, confidence: float) -> Outcome:
    """Chosen on `half`, and read off the other."""
    general, domain = model.sources("general"), model.sources("domain")
    course = search(evaluated, 1, promise, per_copy=False)
    trial = next(course)
    while True:
        (alpha,) = trial.alphas
        learned = loss_change([model.rises(alpha, source, half) for source in domain], confidence)
        limits = tuple(loss_change([model.rises(alpha, s, half)], confidence).limit for s in general)
        try:
            trial = course.send(Scores(learned.loss, limits))
        except StopIteration as end:
            ((alpha,),) = (end.value,)
            break
    (other,) = set(HALVES) - {half}
    changes = [loss_change([model.rises(alpha, source, other)], confidence) for source in general]
    learned = loss_change([model.rises(alpha, source, other) for source in domain], confidence)
    return Outcome(alpha, learned.rise, max(c.rise for c in changes), max(c.limit for c in changes))


def models_of(study: Path, known: set[str]) -> Iterator[tuple[str, Model, list[float]]]:
    """Name of the method, the model, and the positions at which it was evaluated.

    Args:
        known: fingerprints of cells, to which are added those of this study; the same cell may be one of several.
    """
    for path in sorted(study.glob("cells/*/cell.json")):
        cell = read_json(path)
        if cell["fingerprint"] in known or not (path.parent / "document_losses.safetensors").is_file():
            continue
        known.add(cell["fingerprint"])
        trial = Trial(
            label=cell["label"], setting=cell["setting"], lr=cell["lr"], seed=cell["seed"], run_dir=path.parent
        )
        found = read_cell(trial)
        yield trial.arm, Model(found.documents, filled(found.evaluated)), sorted(found.evaluated)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+", help="directories with cells/")
    parser.add_argument("--keep-general", type=float, default=0.0, help="nats per token that may be lost")
    parser.add_argument("--confidence", type=float, default=0.95)
    arguments = parser.parse_args()
    table = Table(
        "study", "method", "choices", "0 chosen", "held", "shown", "mean dial", "domain", "worst general rise"
    )
    console, every, known = Console(), list[Outcome](), set[str]()
    for study in arguments.studies:
        by_method: dict[str, list[Outcome]] = {}
        for name, model, evaluated in models_of(study, known):
            if not model.sources("general"):
                console.print(f"{study.name}: {name} left out, no general source has {FEWEST} documents in each half")
                continue
            for half in HALVES:
                found = outcome(model, evaluated, half, arguments.keep_general, arguments.confidence)
                by_method.setdefault(name, []).append(found)
        for name, outcomes in by_method.items():
            table.add_row(study.name, name, *_counted(outcomes, arguments.keep_general))
        of_study = [of for outcomes in by_method.values() for of in outcomes]
        if of_study:
            table.add_row(study.name, "all", *_counted(of_study, arguments.keep_general), end_section=True)
        every += of_study
    if every:
        table.add_row("all", "", *_counted(every, arguments.keep_general))
    console.print(table)


def _counted(outcomes: list[Outcome], promise: float) -> list[str]:
    """Cells of a row, behind study and method."""
    at_base = sum(of.alpha == 0 for of in outcomes)
    held = sum(of.worst_rise <= promise for of in outcomes)
    shown = sum(of.worst_limit <= promise for of in outcomes)
    means = [sum(of.alpha for of in outcomes), sum(of.domain_rise for of in outcomes)]
    return [
        *map(str, (len(outcomes), at_base, held, shown)),
        *(f"{total / len(outcomes):.2f}" for total in means),
        f"{max(of.worst_rise for of in outcomes):+.3f}",
    ]


if __name__ == "__main__":
    main()
