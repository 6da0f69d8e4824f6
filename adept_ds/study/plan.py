"""From STUDY.yaml to cells: everything is checked, the domain is split, and each cell has its configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from adept_ds.base.digests import FileDigests
from adept_ds.base.errors import InputError
from adept_ds.base.terminal import Terminal
from adept_ds.config.resolved import ResolvedConfig, resolve
from adept_ds.config.run_directory import check_run_dir
from adept_ds.config.schema import Config
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.stopping import StopRequest
from adept_ds.run.identity import Identity
from adept_ds.run.prerequisites import check_texts
from adept_ds.run.progress import StageProgress
from adept_ds.study.budget import Rate, scaled, steps_of
from adept_ds.study.cells import Cell, make_cell
from adept_ds.study.directory import CELL_RECORD, StudyDirectory
from adept_ds.study.roles import check_roles, texts_of_variants, uses_of, uses_of_variants
from adept_ds.study.schema import Study
from adept_ds.study.splitting import split_domain
from adept_ds.study.texts import Texts, texts_of
from adept_ds.study.variants import Variant, variants_of


@dataclass(frozen=True)
class CheckedStudy:
    """A study that can begin; nothing of it has been written."""

    study: Study
    path: Path
    variants: tuple[Variant, ...]
    examples: Mapping[str, Config]
    """A configuration of each variant, by its name; texts are not split in it."""
    overrides: tuple[str, ...] = ()
    """Of the study, already applied."""

    @property
    def directory(self) -> StudyDirectory:
        return StudyDirectory(self.study.study_dir)

    @property
    def tells_time(self) -> bool:
        """Whether rates have to be measured first."""
        return self.study.budget.seconds is not None or self.study.budget.measure_rates


def check_study(study: Study, path: Path, scale: float = 1.0, overrides: Sequence[str] = ()) -> CheckedStudy:
    """Look everything up that can be known before anything is written or takes time.

    Raises:
        InputError: one line about the first mistake.
    """
    study = _scaled(study, scale)
    if study.reference is not None and study.reference not in (names := _arms_of(study)):
        raise InputError(f"{path}: reference: '{study.reference}' is none of {', '.join(names)}; choose one of them")
    for use in uses_of(study):
        use.files()
    variants, texts = tuple(variants_of(study, path, scale)), texts_of(study)
    examples = dict[str, Config]()
    for variant in variants:
        run_dir = StudyDirectory(study.study_dir).cells / "checked"
        config = variant.config(study, texts, lr=variant.rates[0], seed=study.seeds.search[0], steps=1, run_dir=run_dir)
        settings = _resolved(variant, config, study.ranks)
        if study.budget.tokens is not None:
            steps_of(study.budget, config, variant.origin)
        examples[variant.name] = config
        check_run_dir(config.model_copy(update={"run_dir": study.study_dir}), settings.model.path)
    return CheckedStudy(study, path, variants, examples, tuple(overrides))


def _scaled(study: Study, factor: float) -> Study:
    """With the budget, and what is evaluated, of a larger machine."""
    if factor == 1:
        return study
    sequences = max(1, round(study.evaluation.sequences * factor))
    evaluation = study.evaluation.model_copy(update={"sequences": sequences})
    return study.model_copy(update={"budget": scaled(study.budget, factor), "evaluation": evaluation})


def _arms_of(study: Study) -> list[str]:
    return [
        f"{entry.title} ({setting.label})" if setting else entry.title
        for entry in study.methods
        for setting in study.settings_of(entry)
    ]


def _resolved(variant: Variant, config: Config, ranks: int) -> ResolvedConfig:
    try:
        settings = resolve(config, "run", ranks)
        check_texts(config, "run")
    except InputError as error:
        raise InputError(f"{variant.origin}: {error}") from None
    return settings


class Plan:
    """The cells of a study. What is written for it is the domain's split alone."""

    def __init__(self, checked: CheckedStudy, terminal: Terminal, stop: StopRequest) -> None:
        """Raises `InputError`: a text has two roles, or the domain cannot be split."""
        self.checked, self.study = checked, checked.study
        self._identity = Identity(FileDigests(self.directory.digests), StageProgress(terminal, stop, Ranks()))
        examples = [(variant, self.example(variant)) for variant in checked.variants]
        own = uses_of_variants(self.study, examples)
        check_roles([*uses_of(self.study), *own], self._identity.digests)
        first = self.example(checked.variants[0])
        split = split_domain(self.study.domain, first.data, self.directory.data, self._identity, terminal)
        self.texts: Texts = texts_of(self.study, split)
        self.other_texts = texts_of_variants(self.study, examples)
        """That one of them alone probes, replays or is anchored to."""
        self.rates: Mapping[str, Rate] = {}
        """Of variants by name; for equal time they are measured before cells are asked for."""
        self._cells = dict[tuple[str, float, int], Cell]()

    @property
    def directory(self) -> StudyDirectory:
        return self.checked.directory

    @property
    def identity(self) -> Identity:
        return self._identity

    def example(self, variant: Variant) -> Config:
        return self.checked.examples[variant.name]

    @cached_property
    def search(self) -> list[Cell]:
        """Every learning rate with every seed of the search. Seeds come last, so that methods advance together."""
        return list(self._grid(self.study.seeds.search))

    def confirmations(self, best: Mapping[str, Sequence[float]]) -> list[Cell]:
        """Further seeds at the rates that deserve them.

        Args:
            best: rates of variants by name (see `arms.best_rates`).
        """
        return [
            self.cell(variant, lr, seed)
            for seed in self.study.seeds.confirm
            for variant in self.checked.variants
            for lr in best.get(variant.name, ())
        ]

    @property
    def possible_confirmations(self) -> list[Cell]:
        """All that the search may choose."""
        return self.confirmations({variant.name: variant.rates for variant in self.checked.variants})

    def cell(self, variant: Variant, lr: float, seed: int) -> Cell:
        key = (variant.name, lr, seed)
        if key not in self._cells:
            config = self.config(variant, lr, seed, self.steps(variant))
            self._cells[key] = make_cell(variant, config, self._identity, self.directory.cells)
        return self._cells[key]

    def config(self, variant: Variant, lr: float, seed: int, steps: int) -> Config:
        placeholder = self.directory.cells / "unnamed"
        return variant.config(self.study, self.texts, lr=lr, seed=seed, steps=steps, run_dir=placeholder)

    def steps(self, variant: Variant) -> int:
        return steps_of(self.study.budget, self.example(variant), variant.origin, self.rates.get(variant.name))

    def strangers(self) -> list[Path]:
        """Cells of earlier versions of this study: they are left alone."""
        known = {cell.run.root for cell in (*self.search, *self._grid(self.study.seeds.confirm))}
        return [
            folder
            for folder in sorted(self.directory.cells.glob("*"))
            if (folder / CELL_RECORD).is_file() and folder not in known
        ]

    def _grid(self, seeds: Sequence[int]) -> Iterator[Cell]:
        for seed in seeds:
            for variant in self.checked.variants:
                for lr in variant.rates:
                    yield self.cell(variant, lr, seed)
