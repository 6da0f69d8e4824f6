"""Why a run did not come out as it should: which copy does harm, what held learning back, what is entangled.

Reads what the run has left behind, writes diagnosis.json and diagnosis.html beside it, and changes nothing else. One
sweep of forward passes over the held-out texts, and one backward pass over the domain's (see `probing.bypassed_copies`
and `probing.copy_gradients`); methods that train in place have no copies, and only their units are looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adept_ds.base.errors import InputError
from adept_ds.base.files import json_text
from adept_ds.base.run_dir import RunDirectory
from adept_ds.base.version import __version__
from adept_ds.data.mixture import Sample
from adept_ds.methods.shape import method_of
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.loading import layers_train
from adept_ds.probing.bypassed_copies import CopyPasses, CopySweep
from adept_ds.probing.copy_gradients import UnitGradients, unit_gradients
from adept_ds.probing.result import LayerImportance
from adept_ds.ranks.unfinished import Unfinished
from adept_ds.report.diagnosis import (
    CopiedLayer,
    Diagnosis,
    Setting,
    TextLosses,
    UnitCourse,
)
from adept_ds.report.diagnosis_findings import findings_of
from adept_ds.report.diagnosis_signs import evaluated_losses, signatures
from adept_ds.report.diagnosis_units import unit_courses
from adept_ds.report.run_files import read_run
from adept_ds.run.context import Context
from adept_ds.run.copy_facts import effect_of, gradients_of, losses_of, overlaps_of, writes_of
from adept_ds.run.identity import reading_settings
from adept_ds.run.non_finite import naming_what_is_not_finite
from adept_ds.run.prerequisites import trained_model
from adept_ds.training.evaluation import EvalSet
from adept_ds.units.registry import UnitRegistry, build_registry
from adept_ds.units.unit_sums import GradientBatches
from adept_ds.weights.expansion import Expansion

GRADIENT_SEQUENCES = 32
"""At most so many of the domain's held-out sequences have a backward pass."""


def diagnose_stage(run: Context, sequences: int | None = None) -> Diagnosis:
    """Look at everything, and write diagnosis.json and diagnosis.html; the same on every rank.

    Args:
        sequences: at most so many of each held-out corpus; None: those that are evaluated.

    Raises:
        InputError: a file of the run is damaged, or a loss is no number.
    """
    made_of = run.ranks.on_main(lambda: _digest_of_inputs(run, sequences))
    known = run.ranks.on_main(lambda: _unchanged(run.run_dir, made_of))
    if known is not None:
        run.unchanged("diagnose")
        return known
    expansion = run.ranks.on_main(lambda: _expansion(run))
    from_files = run.ranks.on_main(lambda: _from_files(run, expansion))  # where a damaged file shows, before all else
    passes: dict[str, CopyPasses] = {}
    gradients: UnitGradients | None = None
    unfinished = run.keep("diagnose", made_of)
    if expansion is None:
        name = run.settings.config.method.name
        run.terminal.stage("diagnose", f"method {name} makes no copies: only how its units moved is looked at")
    else:
        adapted = run.ranks.on_main(lambda: _adapted(run))
        with naming_what_is_not_finite(run, adapted):
            passes = _sweep(run, adapted, expansion, sequences, unfinished)
            gradients = _gradients(run, adapted, expansion, sequences, unfinished)

    def conclude() -> Diagnosis:
        facts = _facts(run, made_of, from_files, expansion, passes, gradients)
        diagnosis = facts.model_copy(update={"findings": findings_of(facts)})
        from adept_ds.report.diagnosis_page import write_page  # matplotlib takes a second, on rank 0 alone

        path = write_page(run.run_dir.root, diagnosis)
        diagnosis.save(run.run_dir.diagnosis)
        run.terminal.stage("diagnose", f"{_summary(diagnosis)}: {path}")
        return diagnosis

    diagnosis = run.ranks.on_main(conclude)
    unfinished.remove()
    return diagnosis


def _adapted(run: Context) -> ModelDirectory:
    """Raises `DamagedError`: it is not as it was written."""
    model = trained_model(run.settings.config)
    run.identity.check_as_written(model, "`adept export CONFIG` makes it again, and keeps this one aside")
    return ModelDirectory.read(model)


def diagnose_if_it_failed(run: Context) -> None:
    """At the end of a run: where its evaluation shows a known failure, say so, and look for the cause."""
    config = run.settings.config
    if config.eval.diagnose == "never" or not (config.data.general_eval or config.data.domain_eval):
        return
    found = run.ranks.on_main(lambda: signatures(run.run_dir.root))
    for signature in found:
        run.terminal.stage("diagnose", signature.sentence)
    if found:
        diagnose_stage(run)


@dataclass(frozen=True)
class _FromFiles:
    """What the run has written about itself."""

    losses: dict[str, TextLosses]
    layers: tuple[CopiedLayer, ...]
    units: tuple[UnitCourse, ...]


def _from_files(run: Context, expansion: Expansion | None) -> _FromFiles:
    read_run(run.run_dir.root)  # the page shows a figure of it
    sources = sorted(set(expansion.source_indices)) if expansion else []
    return _FromFiles(evaluated_losses(run.run_dir), _copied_layers(run, sources), unit_courses(run.run_dir))


def _digest_of_inputs(run: Context, sequences: int | None) -> str:
    config, run_dir = run.settings.config, run.run_dir
    adapted = run.identity.model(ModelDirectory.read(trained_model(config))) if _makes_copies(run) else None
    corpora = {"data.general_eval": config.data.general_eval, "data.domain_eval": config.data.domain_eval}
    files = [run_dir.evaluation, run_dir.document_losses, run_dir.unit_importance, run_dir.unit_movement]
    files += [run_dir.layer_importance]
    inputs = {
        "version": __version__,
        "adapted": adapted,
        "config": config.model_dump(mode="json", exclude={"run_dir", "model", "deepspeed", "checkpoint"}),
        "corpora": [run.identity.corpus(key, entries) for key, entries in corpora.items()],
        "reading": reading_settings(config.data),
        "sequences": sequences,
        "files": [hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None for file in files],
    }
    return hashlib.sha256(json_text(inputs).encode()).hexdigest()


def _summary(diagnosis: Diagnosis) -> str:
    problems = [finding.name.replace("_", " ") for finding in diagnosis.findings if finding.problem]
    return f"to blame: {', '.join(problems)}" if problems else "nothing is to blame"


def _unchanged(run_dir: RunDirectory, made_of: str) -> Diagnosis | None:
    """What was found before, of the same inputs; one that is damaged is made again."""
    try:
        known = Diagnosis.load(run_dir.diagnosis)
    except InputError:
        return None
    return known if known.made_of == made_of and run_dir.diagnosis_page.is_file() else None


def _makes_copies(run: Context) -> bool:
    return method_of(run.settings.config).makes_copies


def _expansion(run: Context) -> Expansion | None:
    return Expansion.read(trained_model(run.settings.config)) if _makes_copies(run) else None


def _sample(held_out: EvalSet, sequences: int | None) -> Sample:
    """The first of them, as they are evaluated."""
    indices = held_out.indices[:sequences]
    return Sample(held_out.blocks, indices, (0,) * len(indices), (1.0,), (held_out.name,))


def _sweep(
    run: Context, adapted: ModelDirectory, expansion: Expansion, sequences: int | None, unfinished: Unfinished
) -> dict[str, CopyPasses]:
    """By corpus."""
    section, found = run.settings.config.probe, dict[str, CopyPasses]()
    samples = {held_out.name: _sample(held_out, sequences) for held_out in run.corpora.held_out}
    sweep = CopySweep(run.engines, adapted, expansion.copy_indices, max_stack_tokens=section.max_stack_tokens)
    for name, sample in samples.items():
        doing = f"bypassing copies on {name} text"
        with run.terminal.progress(doing) as bar:
            check, work = run.progress.stop.checked("diagnosing", bar, run.ranks), unfinished.work(doing)
            found[name] = sweep.over(
                sample, micro_batch_size=section.micro_batch_size, check=check, move=bar, work=work
            )
    sweep.close()
    return found


def _gradients(
    run: Context, adapted: ModelDirectory, expansion: Expansion, sequences: int | None, unfinished: Unfinished
) -> UnitGradients | None:
    """Of the domain's held-out text; None without any."""
    domain = next((held_out for held_out in run.corpora.held_out if held_out.name == "domain"), None)
    if domain is None:
        return None
    config, family, copies = run.settings.config, adapted.family, expansion.copy_indices
    indices = domain.indices[: min(GRADIENT_SEQUENCES, sequences or GRADIENT_SEQUENCES)]
    batches = GradientBatches(domain.blocks, indices, len(indices), config.train.micro_batch_size)

    def units(shapes: Mapping[str, tuple[int, ...]], model_config: Any) -> UnitRegistry:
        # Whatever the run's units are: a head is made of what was silent and of what was not.
        return build_registry(family, shapes, copies, "matrix", model_config)

    doing = "gradients on domain text"
    with run.progress.together(doing) as bar:
        trains, work = layers_train(family, copies), unfinished.work(doing)
        return unit_gradients(
            run.engines, adapted, trains, units, batches, seed=config.train.seed, progress=bar, work=work
        )


def _facts(
    run: Context,
    made_of: str,
    from_files: _FromFiles,
    expansion: Expansion | None,
    passes: dict[str, CopyPasses],
    gradients: UnitGradients | None,
) -> Diagnosis:
    """All that was measured, on rank 0."""
    measured = {name: losses_of(name, found) for name, found in passes.items()}
    copies = {copy.index: copy.source for copy in expansion.copies} if expansion else {}
    return Diagnosis(
        adept_ds=__version__,
        made_of=made_of,
        setting=_setting(run, tuple(copies.values())),
        losses=from_files.losses | measured,
        effects=tuple(effect_of(number, *copy, passes) for number, copy in enumerate(copies.items())),
        layers=from_files.layers,
        units=from_files.units,
        writes=tuple(writes_of(*copy, passes) for copy in copies.items()),
        gradients=gradients_of(run.settings.model.family, gradients) if gradients else (),
        overlaps=tuple(overlaps_of(copies, passes)),
    )


def _setting(run: Context, copied: tuple[int, ...]) -> Setting:
    config = run.settings.config
    has_policy = "lr_policy" in method_of(config).sections
    return Setting(
        method=config.method.name,
        lr=config.train.lr,
        eps=config.train.eps,
        steps=config.train.steps,
        map=config.lr_policy.map if has_policy else "constant",
        preset=config.lr_policy.preset is not None,
        every=config.importance.every,
        replays=bool(config.data.replay),
        source_layers=run.settings.model.num_layers,
        copied=copied,
    )


def _copied_layers(run: Context, sources: list[int]) -> tuple[CopiedLayer, ...]:
    if not run.run_dir.layer_importance.is_file():
        return ()
    deltas = {layer.index: layer.delta for layer in LayerImportance.load(run.run_dir.layer_importance).layers}
    ascending, median = sorted(deltas, key=lambda layer: deltas[layer]), float(np.median(list(deltas.values())))
    return tuple(
        CopiedLayer(
            source=source, delta=deltas[source], rank=1 + ascending.index(source), of=len(deltas), median=median
        )
        for source in sources
        if source in deltas
    )
