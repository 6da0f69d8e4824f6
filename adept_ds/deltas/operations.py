"""Delta packages: a domain is the copies of layers and where they go, kept apart from the base that they stand on.

Training never moves the base, so an adapted model is its base plus the copies. `pack_copies` takes the copies out of
it, `apply_packages` puts those of one or several packages over the base, `strip_copies` gives the base back. Bytes go
from file to file; no model is loaded. What is refused is refused before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from adept_ds.base.dial_record import DialRecord
from adept_ds.base.errors import InputError
from adept_ds.base.outputs import check_as_written, check_output, new_output
from adept_ds.base.progress import Meter, ProgressCallback
from adept_ds.base.records import first_mistake
from adept_ds.base.run_dir import EXPANSION_NAME, RunDirectory
from adept_ds.base.run_records import Evaluation, RunSummary
from adept_ds.base.version import __version__
from adept_ds.deltas.adapted import AdaptedModel, names_in
from adept_ds.deltas.package import (
    MANIFEST_NAME,
    NAME_PATTERN,
    TENSORS_NAME,
    BaseRecord,
    Metrics,
    Package,
    PackageManifest,
)
from adept_ds.models.directory import ModelDirectory
from adept_ds.weights.base_files import BASE_FILES_NAME
from adept_ds.weights.expansion import (
    AppliedPackage,
    Expansion,
    LayerCopy,
    is_turned,
    plan_copies,
    plan_expansion,
    write_plan,
)
from adept_ds.weights.fingerprints import config_digest, fingerprint_of, hash_tensors
from adept_ds.weights.hf_directory import copy_companions, stored_tensors
from adept_ds.weights.tensor_files import StoredTensor, in_library_order, write_tensors
from adept_ds.weights.turning import positions_of_copies, turned_copies

_TRAINING_FACTS = ("steps", "tokens", "seconds", "trainable_parameters")


def pack_copies(
    source: Path,
    destination: Path,
    *,
    name: str | None = None,
    only: str | None = None,
    base: Path | None = None,
    progress: ProgressCallback | None = None,
    overwrite: bool = False,
) -> PackageManifest:
    """Write the package of an adapted model to `destination`.

    Args:
        source: a run directory (its export is packed, with the run's losses), or an adapted model.
        name: of the package; by default that of `source`.
        only: which package, of a model that several were applied to.
        base: the model that `source` must stand on; needed where `source` lost its base_files.json.
        overwrite: an earlier package in its place may be replaced (see `outputs.check_output`).

    Raises:
        InputError: `source` cannot be told apart into base and copies, its base is not `base`, or `destination` is no
            place for a new directory.
    """
    inputs = {"RUN|ADAPTED": source} | ({"--base": base} if base else {})
    check_output(destination, "delta pack", inputs, overwrite=overwrite)
    directory = _model_in(source)
    if directory != source:  # what a run made, and nobody worked on
        check_as_written(directory, remedy="`adept export CONFIG` makes it again, and keeps this one aside")
    model = AdaptedModel.load(directory, base)
    _check_as_trained(model)
    applied = _chosen_package(model, only)
    name = _checked_name(name or (applied.name if applied else source.resolve().name))
    copies = [copy for copy in model.expansion.copies if applied is None or copy.index in applied.copies]
    sources = [copy.source for copy in copies]
    if not copies or len(set(sources)) != len(sources):
        raise InputError(
            f"'{directory}' has copies of layers {sources}; a package holds one or more, of different layers"
        )
    tensors = in_library_order({key: of for copy in copies for key, of in model.copies[copy.index].items()})
    others = stored_tensors(base) if base else {}
    metrics = _recorded_metrics(applied) if applied else _metrics_of(source)
    meter = Meter(sum(map(_num_bytes, (model.base.values(), others.values(), [*tensors.values()] * 2))), progress)
    config = model.base_config
    manifest = PackageManifest(
        format=1,
        name=name,
        created_by=f"adept-ds {__version__}",
        base=BaseRecord(
            fingerprint=_base_fingerprint(model, meter),
            config=config_digest(config),
            model_type=str(config.get("model_type")),
            layers=model.expansion.source_layers,
        ),
        copies=tuple(plan_copies(sources)),
        tensors=hash_tensors(tensors, meter.advance),
        metrics=metrics,
    )
    if base and fingerprint_of(hash_tensors(others, meter.advance)) != manifest.base.fingerprint:
        raise InputError(f"--base: '{directory}' does not stand on '{base}'; give the model that was expanded")
    with new_output(destination, "delta pack", overwrite=overwrite) as folder:
        write_tensors(folder / TENSORS_NAME, tensors, meter.advance)
        manifest.save(folder / MANIFEST_NAME)
    return manifest


def apply_packages(
    base: Path,
    packages: Sequence[Path],
    destination: Path,
    progress: ProgressCallback | None = None,
    *,
    alphas: Sequence[float] | None = None,
    overwrite: bool = False,
) -> Expansion:
    """Write `base` with the copies of all `packages` to `destination`.

    Where several packages copy one layer, their copies stand above it in the order of `packages`, the first lowest.

    Args:
        alphas: how far copies are turned up: one for all, or one for each, lowest first. None: as each package
            recommends, or as they were trained.
        overwrite: an earlier output in its place may be replaced (see `outputs.check_output`).

    Raises:
        InputError: a package is damaged or of another base, or `destination` is no place for a new directory.
    """
    inputs = {"BASE": base} | {f"package {number}": path for number, path in enumerate(packages, start=1)}
    check_output(destination, "delta apply", inputs, overwrite=overwrite)
    loaded = [Package.load(directory) for directory in packages]
    _check_distinct(loaded)
    if alphas is not None:
        positions_of_copies(alphas, sum(len(package.manifest.copies) for package in loaded))
    model, stored = ModelDirectory.read(base), stored_tensors(base)
    family = model.family
    for package in loaded:
        _check_fits(package, model, stored)
    all_tensors = [*stored.values(), *(tensor for package in loaded for tensor in package.tensors.values())]
    meter = Meter(2 * _num_bytes(all_tensors), progress)
    for package in loaded:
        package.check_content(meter)
    fingerprint = fingerprint_of(hash_tensors(stored, meter.advance))
    for package in loaded:
        if package.manifest.base.fingerprint != fingerprint:
            raise _other_base(package, base, "its weights differ")
    # Sorted by source, then by position on the command line: just so `plan_copies` numbers them.
    order = sorted((source, number) for number, package in enumerate(loaded) for source in package.manifest.sources)
    plan = plan_expansion(base, [source for source, _ in order])
    copies: list[list[LayerCopy]] = [[] for _ in loaded]
    for copy, (_, number) in zip(plan.expansion.copies, order, strict=True):
        copies[number].append(copy)
    trained = {
        family.in_layer(name, copy.index): package.tensors[name]
        for package, own in zip(loaded, copies, strict=True)
        for copy in own
        for name in names_in(family, package.tensors, [copy.source])
    }
    positions = _positions(loaded, copies, alphas)
    turned = turned_copies(trained, family, positions)
    files = {file: {name: turned.get(name, content) for name, content in of.items()} for file, of in plan.files.items()}
    applied = tuple(map(_applied, loaded, copies))
    expansion = plan.expansion.model_copy(update={"packages": applied})
    expansion = expansion.turned([positions[index] for index in expansion.copy_indices])
    plan = replace(plan, files=files, expansion=expansion)
    return write_plan(plan, base, destination, "delta apply", meter.rest(), overwrite=overwrite)


@dataclass(frozen=True)
class Stripped:
    """The base that was given back."""

    fingerprint: str
    """As the manifests of delta packages have it."""
    files: tuple[str, ...]
    num_bytes: int


def strip_copies(
    adapted: Path, destination: Path, progress: ProgressCallback | None = None, *, overwrite: bool = False
) -> Stripped:
    """Write the base of an adapted model to `destination`: the same files, byte for byte.

    Args:
        overwrite: an earlier output in its place may be replaced (see `outputs.check_output`).

    Raises:
        InputError: `adapted` is no adapted model, its base's tensors were changed, or `destination` is no place for a
            new directory.
    """
    check_output(destination, "delta strip", {"ADAPTED": adapted}, overwrite=overwrite)
    model = AdaptedModel.load(adapted)
    meter = Meter(2 * _num_bytes(model.base.values()), progress)
    fingerprint = _base_fingerprint(model, meter)
    with new_output(destination, "delta strip", overwrite=overwrite) as folder:
        for file in model.files.headers:
            for num_bytes in model.files.restore_weights(file, folder / file, model.base):
                meter.advance(num_bytes, file)
        copy_companions(adapted, folder)
        (folder / BASE_FILES_NAME).unlink()
        model.files.restore_texts(folder)
    return Stripped(fingerprint, tuple(model.files.headers), _num_bytes(model.base.values()))


def _model_in(source: Path) -> Path:
    if (source / "config.json").is_file():
        return source
    run = RunDirectory(source)
    if not run.config.is_file():
        raise InputError(f"'{source}' is neither a run directory nor a model; give one that `adept` trained")
    if not (run.export / "config.json").is_file():
        raise InputError(f"'{source}' has no exported model yet; run `adept export {run.config}` first")
    return run.trained if is_turned(run.export) and (run.trained / "config.json").is_file() else run.export


def _metrics_of(source: Path) -> Metrics:
    """Of a run: its losses (if they are those of the present export) and totals. Of a mere model: nothing."""
    run = RunDirectory(source)
    export, evaluation, summary = run.export, run.evaluation, run.summary
    losses: dict[str, dict[str, float]] = {}
    if evaluation.is_file() and evaluation.stat().st_mtime >= (export / "config.json").stat().st_mtime:
        found = Evaluation.load(evaluation)
        for model, corpora in {"base": found.base, "adapted": found.adapted}.items():
            losses[model] = {corpus: of.loss for corpus, of in corpora.items()}
    facts = RunSummary.load(summary) if summary.is_file() else RunSummary()
    training = {key: getattr(facts, key) for key in _TRAINING_FACTS if getattr(facts, key) is not None}
    return Metrics(losses=losses, training=training, alphas=_recommended(run))


def _recommended(run: RunDirectory) -> list[float]:
    """By the dial of a run, if it is about what is exported: a later one, as it was trained, it has not seen."""
    if not (run.dial.is_file() and (run.export / EXPANSION_NAME).is_file()):
        return []
    chosen = DialRecord.load(run.dial).chosen
    return list(chosen) if is_turned(run.export) or set(chosen) == {1.0} else []


def _check_as_trained(model: AdaptedModel) -> None:
    """A package holds what was trained, so that it can be turned up as far as anybody likes."""
    if model.expansion.alphas is not None:
        found = ", ".join(f"{alpha:g}" for alpha in model.expansion.alphas)
        raise InputError(
            f"'{model.directory}' is turned down (alpha {found}), and a package holds copies as they were trained; "
            "give its run, or what was trained (run_dir/trained, or `adept delta apply` with --alpha 1)"
        )


def _positions(
    loaded: Sequence[Package], copies: Sequence[Sequence[LayerCopy]], alphas: Sequence[float] | None
) -> dict[int, float]:
    """How far each copy of the new model is turned up, by its index."""
    own = {
        copy.index: alpha
        for package, of in zip(loaded, copies, strict=True)
        for copy, alpha in zip(of, package.manifest.metrics.alphas or [1.0] * len(of), strict=True)
    }
    return own if alphas is None else dict(zip(sorted(own), positions_of_copies(alphas, len(own)), strict=True))


def _recorded_metrics(applied: AppliedPackage) -> Metrics:
    try:
        return Metrics.model_validate(applied.metrics)
    except ValidationError as error:
        raise InputError(
            f"{EXPANSION_NAME}: metrics of '{applied.name}': {first_mistake(error)}; copy it again"
        ) from None


def _chosen_package(model: AdaptedModel, only: str | None) -> AppliedPackage | None:
    """That which `only` names; None for a model that was trained here."""
    packages = {package.name: package for package in model.expansion.packages}
    names = ", ".join(packages)
    if only is None and len(packages) > 1:
        raise InputError(f"'{model.directory}' has several packages ({names}); say which with --only NAME")
    if only is not None and only not in packages:
        has = names or "none that has a name"
        raise InputError(f"--only: '{model.directory}' has no package '{only}'; it has {has}")
    return packages[only] if only is not None else next(iter(packages.values()), None)


def _checked_name(name: str) -> str:
    if not re.fullmatch(NAME_PATTERN, name):
        raise InputError(f"--name: '{name}' is no name of a package; use letters, digits, '.', '_' and '-'")
    return name


def _base_fingerprint(model: AdaptedModel, meter: Meter) -> str:
    """Computed; and compared, where the model knows it."""
    fingerprint = fingerprint_of(hash_tensors(model.base, meter.advance))
    if model.expansion.base_fingerprint not in (None, fingerprint):
        raise InputError(f"'{model.directory}': weights of its base are not those that it was made from; make it again")
    return fingerprint


def _check_distinct(packages: Sequence[Package]) -> None:
    for position, package in enumerate(packages):
        for other in packages[:position]:
            pair = f"'{other.directory}' and '{package.directory}'"
            if package.manifest.fingerprint == other.manifest.fingerprint:
                raise InputError(f"{pair} hold the same copies; give the package once")
            if package.manifest.name == other.manifest.name:
                raise InputError(
                    f"{pair} are both named '{package.manifest.name}'; change \"name\" in {MANIFEST_NAME} of one"
                )


def _check_fits(package: Package, model: ModelDirectory, stored: Mapping[str, StoredTensor]) -> None:
    """What can be seen without reading tensors."""
    record, base, config = package.manifest.base, model.path, model.config
    found: dict[str, Any] = {"model_type": config.get("model_type"), "layers": model.num_layers}
    for key, value in found.items():
        if value != getattr(record, key):
            raise _other_base(package, base, f"{key} is {value!r}, not {getattr(record, key)!r}")
    if config_digest(config) != record.config:
        raise _other_base(package, base, "its config.json differs")
    wanted, given = set(names_in(model.family, stored, package.manifest.sources)), package.tensors
    for name in sorted(wanted | given.keys()):
        # Headers first: a base in another dtype need not be read to the end.
        kinds = [(of[name].dtype, of[name].shape) if name in of else None for of in (stored, given)]
        if name not in wanted or kinds[0] != kinds[1]:
            raise _other_base(package, base, f"they do not agree about tensor {name!r}")


def _other_base(package: Package, base: Path, reason: str) -> InputError:
    remedy = "give the model that was expanded"
    if (base / EXPANSION_NAME).is_file():
        remedy += f"; as '{base}' has copies itself: `adept delta strip` it first, and apply all packages at once"
    return InputError(f"'{package.directory}' belongs to another base than '{base}' ({reason}); {remedy}")


def _applied(package: Package, copies: Sequence[LayerCopy]) -> AppliedPackage:
    manifest = package.manifest
    indices = tuple(copy.index for copy in copies)
    metrics = manifest.metrics.to_json()
    return AppliedPackage(name=manifest.name, fingerprint=manifest.fingerprint, copies=indices, metrics=metrics)


def _num_bytes(tensors: Iterable[StoredTensor]) -> int:
    return sum(tensor.num_bytes for tensor in tensors)
