"""STUDY.yaml: methods x learning rates x seeds x settings, and what all of them have in common; see docs/comparing.md.

As strict as a run's configuration, and checked as early. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from adept_ds.config.corpus_entries import CorpusEntry, HeldOutEntry
from adept_ds.config.eval_section import Between
from adept_ds.config.known_methods import AnyMethod
from adept_ds.config.loading import load_section
from adept_ds.config.paths import UserPath
from adept_ds.config.section import FILE, NUMBER, PART, Count, Section, Seed

FACTOR = 2.0
"""Between neighbours of every grid: methods that are searched more finely than others would look better."""

Rate = Annotated[float, Field(gt=0, le=10)]
Share = Annotated[float, Field(gt=0, lt=0.5)]


def _label(text: str) -> str:
    if not text.strip() or text != text.strip() or not text.isprintable() or len(text) > 60 or "/" in text:
        raise ValueError(f"{text[:60]!r} is no label: write one line of at most 60 characters without '/'")
    return text


CriterionName = Literal["plain", "D(-0.02)", "D(0)", "D(0.02)", "D(0.05)"]
"""Of `comparison.arms.CRITERIA`, which needs numpy."""

Label = Annotated[str, AfterValidator(_label)]

Changes = Annotated[dict[str, Any], Field(description="keys of the configuration, dotted or nested")]


class Grid(Section):
    """Learning rates start, start * 2, start * 4, ..."""

    start: Rate
    factor: float = Field(FACTOR, description="of neighbours; listing the rates is the way to deviate")
    count: int = Field(3, ge=1, le=20)

    @model_validator(mode="after")
    def _as_fine_as_all_others(self) -> Grid:
        if self.factor != FACTOR:
            raise ValueError(
                f"factor: {self.factor:g} searches this method otherwise than the rest, whose grids go in factors of "
                f"{FACTOR:g}: remove it, or list the rates, [1e-4, 3e-4]"
            )
        return self

    @property
    def rates(self) -> list[float]:
        return [float(f"{self.start * self.factor**number:.10g}") for number in range(self.count)]


def _ascending(rates: list[float]) -> list[float]:
    if sorted(set(rates)) != rates:
        raise ValueError(f"{rates} are not ascending learning rates: sort them, and give each once")
    return rates


LearningRates = Annotated[
    Annotated[Grid, Tag(PART)]
    | Annotated[list[Rate], Field(min_length=1, max_length=20), AfterValidator(_ascending), Tag(NUMBER)],
    Discriminator(lambda value: PART if isinstance(value, dict | Grid) else NUMBER),
]


def rates_of(rates: Grid | list[float]) -> list[float]:
    return rates.rates if isinstance(rates, Grid) else rates


class MethodEntry(Section):
    """A method that is compared."""

    method: AnyMethod = Field(description="as in a configuration: a word, or {name: ..., and its keys}")
    label: Label | None = Field(None, description="what it is called in tables; by default the method's name")
    set: Changes = Field(default_factory=dict)
    learning_rates: LearningRates | None = Field(None, description="instead of the study's")

    @property
    def title(self) -> str:
        return self.label or self.method.name


def _entry(value: Any) -> Any:
    return {"method": value} if isinstance(value, str) else value


class Setting(Section):
    """A change of the configuration that methods are tried with."""

    label: Label
    set: Changes
    methods: list[Label] | None = Field(None, min_length=1, description="labels of those it is for; by default all")


class DomainTexts(Section):
    """What is learned; documents fall to training, validation and test by the hash of their text."""

    sources: list[CorpusEntry] = Field(min_length=1, description="as data.domain of a configuration")
    validation: Share = Field(0.1, description="of the documents; learning rates and dials are chosen on them")
    test: Share = Field(0.1, description="of the documents; every figure is of them")


class GeneralTexts(Section):
    """What must not be forgotten, in three roles that no text has two of."""

    train: list[CorpusEntry] = Field(default_factory=list, description="replayed, probed, anchored to")
    validation: list[HeldOutEntry] = Field(min_length=1, description="learning rates and dials are chosen on these")
    test: list[HeldOutEntry] = Field(min_length=1, description="every figure is of these")


class Seeds(Section):
    """Of the sample and order of training data, of dropout and of adapters (train.seed)."""

    search: list[Seed] = Field(default_factory=lambda: [0], min_length=1, description="each with every learning rate")
    confirm: list[Seed] = Field(default_factory=lambda: [1, 2], description="each at the best rates of a method alone")
    confirm_for: list[CriterionName] = Field(
        default_factory=lambda: list(get_args(CriterionName)),
        min_length=1,
        description="what the rates are best for: fewer of these are fewer runs, and one seed for the others' figures",
    )

    @model_validator(mode="after")
    def _each_once(self) -> Seeds:
        seeds = [*self.search, *self.confirm]
        twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} is there twice: every seed searches or confirms, once")
        return self


class Budget(Section):
    """What every cell may spend: as many tokens, or as much time."""

    tokens: int | None = Field(None, ge=1, le=10**15, description="of training")
    seconds: float | None = Field(None, gt=0, le=1e8, description="of training, probing, refreshes and preparation")
    measure_rates: bool = Field(
        False,
        description="measure what a step of each method takes, alone and before the study, also for equal tokens: the "
        "page's times are then these, whatever else the machine does while cells run",
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Budget:
        if (self.tokens is None) == (self.seconds is None):
            raise ValueError("methods get equal tokens or equal time: give tokens or seconds")
        return self


class StudyEvaluation(Section):
    """Of every cell."""

    sequences: Count = Field(128, description="as data.eval_sequences: of each held-out corpus at most so much")
    tasks: list[UserPath] = Field(default_factory=list, description="as eval.tasks")
    lm_eval: list[str] = Field(default_factory=list, description="as eval.lm_eval")


class SlurmSection(Section):
    """For `--submit`."""

    options: list[str] = Field(
        default_factory=list, description="of sbatch for every job: [--partition=gpu, --gpus-per-node=8]"
    )
    at_once: int | None = Field(None, ge=1, le=10_000, description="cells that run at the same time, at most")

    @model_validator(mode="after")
    def _options_are_options(self) -> SlurmSection:
        for option in self.options:
            if not option.startswith("--") or not option.isprintable():
                raise ValueError(f"options: {option!r} is no option of sbatch: write --name=value")
        return self


class Study(Section):
    """A whole comparison."""

    study_dir: UserPath = Field(description="where everything of this study is written")
    title: str = Field("", max_length=200, description="of the page; by default the name of study_dir")
    base: (
        Annotated[Annotated[UserPath, Tag(FILE)] | Annotated[dict[str, Any], Tag(PART)], Discriminator(
            lambda value: PART if isinstance(value, dict) else FILE
        )]
    ) = Field(description="configuration that all cells have in common, or the path of one")  # fmt: skip
    domain: DomainTexts
    general: GeneralTexts
    methods: list[Annotated[MethodEntry, BeforeValidator(_entry)]] = Field(min_length=1)
    reference: Label | None = Field(None, description="the method that the others are compared with; by default full")
    settings: list[Setting] = Field(default_factory=list, description="each is tried with each of its methods")
    learning_rates: LearningRates | None = Field(None, description="{start: ..., count: 3} in factors of 2, or a list")
    seeds: Seeds = Seeds()
    budget: Budget
    dial: list[Between] = Field(default_factory=lambda: [0.25, 0.5, 0.75], description="as eval.dial")
    evaluation: StudyEvaluation = StudyEvaluation()
    ranks: int = Field(1, ge=1, le=1024, description="processes of each run on this host")
    threads: int | None = Field(None, ge=1, le=4096, description="of each process (OMP_NUM_THREADS)")
    keep: Literal["all", "model", "results"] = Field(
        "model", description="of a finished cell: all, or all but checkpoints, or results without any weights"
    )
    slurm: SlurmSection = SlurmSection()

    @model_validator(mode="after")
    def _labels_tell_apart(self) -> Study:
        for key, labels in {
            "methods": [entry.title for entry in self.methods],
            "settings": [setting.label for setting in self.settings],
        }.items():
            twice = next((label for label in labels if labels.count(label) > 1), None)
            if twice is not None:
                raise ValueError(f"{key}: two are called '{twice}': give each a label of its own")
        return self

    @model_validator(mode="after")
    def _settings_are_of_methods(self) -> Study:
        titles = [entry.title for entry in self.methods]
        for setting in self.settings:
            for label in setting.methods or ():
                if label not in titles:
                    raise ValueError(
                        f"settings: '{setting.label}' is for '{label}', which is none of the methods; "
                        f"choose of {', '.join(titles)}"
                    )
        return self

    @model_validator(mode="after")
    def _every_method_has_rates(self) -> Study:
        for entry in self.methods:
            if entry.learning_rates is None and self.learning_rates is None:
                raise ValueError(
                    f"methods: '{entry.title}' has no learning rates: give it some, or the whole study: "
                    "learning_rates: {start: 1e-4, count: 3}"
                )
        return self

    def rates(self, entry: MethodEntry) -> list[float]:
        """That a method is tried with."""
        rates = entry.learning_rates or self.learning_rates
        assert rates is not None
        return rates_of(rates)

    def settings_of(self, entry: MethodEntry) -> list[Setting | None]:
        """Those that are for a method; None stands for none."""
        mine = [setting for setting in self.settings if setting.methods is None or entry.title in setting.methods]
        return [*mine] or [None]


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read STUDY.yaml and apply dotted overrides. Raises `InputError`: as `load_config`."""
    return load_section(Study, path, overrides, keys="'study_dir:' and 'methods:'")
