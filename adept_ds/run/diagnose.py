"""Why a run did not come out as it should: which copy does harm, what held learning back, what is entangled.

Reads what the run has left behind, writes diagnosis.json and diagnosis.html beside it, and changes nothing else. One
sweep of forward passes over the held-out texts, and one backward pass over the domain's (see `probing.bypassed_copies`
and `probing.copy_gradients`); methods that train in place have no copies, and only their units are looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adept_ds.base.errors import InputError
from adept_ds.base.files import json_text
from adept_ds.base.version import __version__
from adept_ds.data.mixture import Sample
from adept_ds.methods.shape import method_of
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.loading import layers_train
from adept_ds.probing.bypassed_copies import CopyPasses, CopySweep, Written
from adept_ds.probing.copy_gradients import UnitGradients, unit_gradients
from adept_ds.probing.overlap import energy_coefficient, separability
from adept_ds.probing.result import LayerImportance
from adept_ds.report.diagnosis import (
    Change,
    CopiedLayer,
    CopyEffect,
    CopyWrites,
    Diagnosis,
    Overlap,
    Setting,
    TextLosses,
    UnitGradient,
    WriteShare,
)
from adept_ds.report.diagnosis_findings import findings_of
from adept_ds.report.diagnosis_signs import compared, evaluated_losses, paired_error, signatures
from adept_ds.report.diagnosis_units import unit_courses
from adept_ds.run.context import Context
from adept_ds.run.identity import reading_settings
from adept_ds.run.non_finite import naming_what_is_not_finite
from adept_ds.training.evaluation import EvalSet
from adept_ds.units.registry import UnitRegistry, build_registry
from adept_ds.units.unit_sums import GradientBatches
from adept_ds.weights.expansion import Expansion

GRADIENT_SEQUENCES = 32
"""At most so many of the domain's held-out sequences have a backward pass."""

FEWEST_SEQUENCES = 4
"""With fewer of either text, nothing is said about how far they are apart."""


def diagnose_stage(run: Context, sequences: int | None = None) -> Diagnosis:
    """Look at everything, and write diagnosis.json and diagnosis.html; the same on every rank.

    Args:
        sequences: at most so many of each held-out corpus; None: those that are evaluated.

    Raises:
        InputError: a file of the run is damaged, or a loss is no number.
    """
    made_of = run.ranks.on_main(lambda: _digest_of_inputs(run, sequences))
    known = run.ranks.on_main(lambda: _unchanged(run.run_dir.diagnosis, made_of))
    if known is not None:
        run.unchanged("diagnose")
        return known
    expansion = run.ranks.on_main(lambda: _expansion(run))
    passes: dict[str, CopyPasses] = {}
    gradients: UnitGradients | None = None
    if expansion is None:
        name = run.settings.config.method.name
        run.terminal.stage("diagnose", f"method {name} makes no copies: only how its units moved is looked at")
    else:
        adapted = run.ranks.on_main(lambda: ModelDirectory.read(run.run_dir.export))
        with naming_what_is_not_finite(run, adapted):
            passes = _sweep(run, adapted, expansion, sequences)
            gradients = _gradients(run, adapted, expansion, sequences)

    def conclude() -> Diagnosis:
        facts = _facts(run, made_of, expansion, passes, gradients)
        diagnosis = facts.model_copy(update={"findings": findings_of(facts)})
        diagnosis.save(run.run_dir.diagnosis)
        from adept_ds.report.diagnosis_page import write_page  # matplotlib takes a second, on rank 0 alone

        path = write_page(run.run_dir.root, diagnosis)
        run.terminal.stage("diagnose", f"{_summary(diagnosis)}: {path}")
        return diagnosis

    return run.ranks.on_main(conclude)


def diagnose_if_it_failed(run: Context) -> None:
    """At the end of a run: where its evaluation shows a known failure, say so, and look for the cause."""
    found = run.ranks.on_main(lambda: signatures(run.run_dir.root))
    for signature in found:
        run.terminal.stage("diagnose", signature.sentence)
    if found:
        diagnose_stage(run)


def _digest_of_inputs(run: Context, sequences: int | None) -> str:
    config, run_dir = run.settings.config, run.run_dir
    adapted = run.identity.model(ModelDirectory.read(run_dir.export)) if _makes_copies(run) else None
    corpora = {"data.general_eval": config.data.general_eval, "data.domain_eval": config.data.domain_eval}
    files = [run_dir.evaluation, run_dir.document_losses, run_dir.unit_importance, run_dir.unit_movement]
    files += [run_dir.layer_importance]
    inputs = {
        "version": __version__,
        "adapted": adapted,
        "config": config.model_dump(mode="json", exclude={"run_dir", "model", "deepspeed"}),
        "corpora": [run.identity.corpus(key, entries) for key, entries in corpora.items()],
        "reading": reading_settings(config.data),
        "sequences": sequences,
        "files": [hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None for file in files],
    }
    return hashlib.sha256(json_text(inputs).encode()).hexdigest()


def _summary(diagnosis: Diagnosis) -> str:
    problems = [finding.name.replace("_", " ") for finding in diagnosis.findings if finding.problem]
    return f"to blame: {', '.join(problems)}" if problems else "nothing is to blame"


def _unchanged(path: Path, made_of: str) -> Diagnosis | None:
    """What was found before, of the same inputs; one that is damaged is made again."""
    try:
        known = Diagnosis.load(path)
    except InputError:
        return None
    return known if known.made_of == made_of else None


def _makes_copies(run: Context) -> bool:
    return method_of(run.settings.config).starts_from == "expanded"


def _expansion(run: Context) -> Expansion | None:
    return Expansion.read(run.run_dir.export) if _makes_copies(run) else None


def _sample(held_out: EvalSet, sequences: int | None) -> Sample:
    """The first of them, as they are evaluated."""
    indices = held_out.indices[:sequences]
    return Sample(held_out.blocks, indices, (0,) * len(indices), (1.0,), (held_out.name,))


def _sweep(run: Context, adapted: ModelDirectory, expansion: Expansion, sequences: int | None) -> dict[str, CopyPasses]:
    """By corpus."""
    section, found = run.settings.config.probe, dict[str, CopyPasses]()
    samples = {held_out.name: _sample(held_out, sequences) for held_out in run.corpora.held_out}
    sweep = CopySweep(run.engines, adapted, expansion.copy_indices, max_stack_tokens=section.max_stack_tokens)
    for name, sample in samples.items():
        with run.terminal.progress(f"bypassing copies on {name} text") as bar:
            check = run.progress.stop.checked("diagnosing", bar, run.ranks)
            found[name] = sweep.over(sample, micro_batch_size=section.micro_batch_size, check=check, move=bar)
    sweep.close()
    return found


def _gradients(
    run: Context, adapted: ModelDirectory, expansion: Expansion, sequences: int | None
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

    with run.progress.together("gradients on domain text") as bar:
        trains = layers_train(family, copies)
        return unit_gradients(run.engines, adapted, trains, units, batches, seed=config.train.seed, progress=bar)


def _facts(
    run: Context,
    made_of: str,
    expansion: Expansion | None,
    passes: dict[str, CopyPasses],
    gradients: UnitGradients | None,
) -> Diagnosis:
    """All that was measured, on rank 0."""
    measured = {name: _losses(name, found) for name, found in passes.items()}
    copies = {copy.index: copy.source for copy in expansion.copies} if expansion else {}
    return Diagnosis(
        adept_ds=__version__,
        made_of=made_of,
        setting=_setting(run, tuple(copies.values())),
        losses=evaluated_losses(run.run_dir) | measured,
        effects=tuple(_effect(number, *copy, passes) for number, copy in enumerate(copies.items())),
        layers=_copied_layers(run, sorted(set(copies.values()))),
        units=unit_courses(run.run_dir),
        writes=tuple(_writes(*copy, passes) for copy in copies.items()),
        gradients=_unit_gradients(run, gradients) if gradients else (),
        overlaps=tuple(_overlaps(copies, passes)),
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


def _losses(corpus: str, found: CopyPasses) -> TextLosses:
    tokens = float(found.tokens.sum())
    base, adapted = (float(losses.sum()) / tokens for losses in (found.without_any, found.with_all))
    error = paired_error((found.with_all - found.without_any).numpy(), found.tokens.numpy())
    return compared(corpus, base, adapted, int(tokens), error)


def _effect(number: int, index: int, source: int, passes: dict[str, CopyPasses]) -> CopyEffect:
    changes = {name: _change(found.with_all - found.without[:, number], found.tokens) for name, found in passes.items()}
    return CopyEffect(index=index, source=source, general=changes.get("general"), domain=changes.get("domain"))


def _change(differences: torch.Tensor, tokens: torch.Tensor) -> Change:
    error = paired_error(differences.numpy(), tokens.numpy())
    return Change(change=float(differences.sum() / tokens.sum()), standard_error=error)


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


def _writes(index: int, source: int, passes: dict[str, CopyPasses]) -> CopyWrites:
    return CopyWrites(
        index=index, source=source, on={name: _share(found, index, found.tokens) for name, found in passes.items()}
    )


def _share(found: CopyPasses, index: int, tokens: torch.Tensor) -> WriteShare:
    copy, below = found.written[index], found.written[index - 1]

    def rms(sums: torch.Tensor) -> float:
        return float((sums.sum() / tokens.sum()).sqrt())

    return WriteShare(
        copy_share=rms(copy.share_squares),
        below_share=rms(below.share_squares),
        copy_rms=rms(copy.squares),
        stream_rms=rms(copy.stream_squares),
    )


def _unit_gradients(run: Context, found: UnitGradients) -> tuple[UnitGradient, ...]:
    family = run.settings.model.family
    return tuple(
        UnitGradient(
            unit=unit.name,
            kind=unit.kind,
            layer=unit.layer,
            part=unit.part,
            rms=rms,
            silent=family.writes_residual(f"{unit.part}.weight"),
        )
        for unit, rms in zip(found.units, found.rms, strict=True)
        if unit.layer is not None
    )


def _overlaps(copies: dict[int, int], passes: dict[str, CopyPasses]) -> list[Overlap]:
    """None where there are too few sequences of either text."""
    if passes.keys() < {"general", "domain"}:
        return []
    if min(len(found.tokens) for found in passes.values()) < FEWEST_SEQUENCES:
        return []
    found = []
    for index, source in copies.items():
        texts = {
            layer: [_means(passes[name].written[layer], passes[name].tokens) for name in ("domain", "general")]
            for layer in (index - 1, index)
        }
        (domain, general), below = texts[index], texts[index - 1]
        parted, parted_below = separability(domain, general), separability(below[0], below[1])
        found.append(
            Overlap(
                index=index,
                source=source,
                accuracy=parted.accuracy,
                distance=energy_coefficient(domain, general),
                below_accuracy=parted_below.accuracy,
                below_distance=energy_coefficient(below[0], below[1]),
                general_scores=parted.y_scores,
                domain_scores=parted.x_scores,
            )
        )
    return found


def _means(written: Written, tokens: torch.Tensor) -> np.ndarray:
    """Over the tokens of each sequence. [sequences, dim]"""
    means: np.ndarray = (written.sums / tokens.clamp(min=1)[:, None]).numpy()
    return means
