"""A diagnosis that nobody made: of a run with three copies in which nothing is wrong, changed where a test wants it."""

from __future__ import annotations

from typing import Any

from adept_ds.report.diagnosis import (
    Change,
    CopiedLayer,
    CopyEffect,
    CopyWrites,
    Diagnosis,
    Overlap,
    Setting,
    TextLosses,
    UnitCourse,
    UnitGradient,
    WriteShare,
)
from adept_ds.report.diagnosis_findings import findings_of
from adept_ds.report.diagnosis_signs import compared

COPIES = {13: 12, 19: 17, 23: 20}
"""Index -> source."""


def change(value: float, error: float | None = 0.001) -> Change:
    return Change(change=value, standard_error=error)


def losses(general: float = 0.0, domain: float = -0.3) -> dict[str, TextLosses]:
    """By how much each has changed, beyond an error of 0.002."""
    return {
        "general": compared("general", 2.5, 2.5 + general, 4000, 0.002),
        "domain": compared("domain", 2.2, 2.2 + domain, 4000, 0.002),
    }


def setting(**values: Any) -> Setting:
    usual = {"method": "adept", "lr": 2e-4, "eps": 1e-8, "steps": 100, "map": "linear", "preset": False, "every": 20,
             "replays": False, "source_layers": 30, "copied": (12, 17, 20)}  # fmt: skip
    return Setting.model_validate(usual | values)


def effects(general: list[float], domain: list[float]) -> tuple[CopyEffect, ...]:
    return tuple(
        CopyEffect(index=index, source=source, general=change(g), domain=change(d))
        for (index, source), g, d in zip(COPIES.items(), general, domain, strict=True)
    )


def copied_layers(*deltas: float, ranks: tuple[int, ...] = (1, 25, 2)) -> tuple[CopiedLayer, ...]:
    """Beside a median of 0.05."""
    return tuple(
        CopiedLayer(source=source, delta=delta, rank=rank, of=30, median=0.05)
        for source, delta, rank in zip(COPIES.values(), deltas, ranks, strict=True)
    )


def unit(name: str, **values: Any) -> UnitCourse:
    usual = {"kind": "matrix", "numel": 1000, "multiplier": 1.0, "importance": 0.5, "change": 1e-3, "against": 0.0}
    return UnitCourse.model_validate({"unit": name} | usual | values)


def writes(copy: float = 0.05, below: float = 0.1, on_general: float | None = None) -> tuple[CopyWrites, ...]:
    def share(value: float) -> WriteShare:
        return WriteShare(copy_share=value, below_share=below, copy_rms=value * 30, stream_rms=30.0)

    on = {"general": share(copy if on_general is None else on_general), "domain": share(copy)}
    return tuple(CopyWrites(index=index, source=source, on=on) for index, source in COPIES.items())


def gradients(behind: float = 1e-4) -> tuple[UnitGradient, ...]:
    """Silent projections get 1e-3."""
    parts = {"self_attn.q_proj": behind, "self_attn.o_proj": 1e-3, "mlp.up_proj": behind, "mlp.down_proj": 1e-3}
    return tuple(
        UnitGradient(unit=f"layers.{index}.{part}", kind="matrix", layer=index, part=part, rms=rms, silent=rms == 1e-3)
        for index in COPIES
        for part, rms in parts.items()
    )


def overlaps(accuracy: float = 0.95) -> tuple[Overlap, ...]:
    return tuple(
        Overlap(index=index, source=source, accuracy=accuracy, distance=0.2, below_accuracy=0.97, below_distance=0.3,
                general_scores=(-0.9, -0.5, -1.1, 0.1), domain_scores=(0.8, 0.4, 1.2, -0.1))
        for index, source in COPIES.items()
    )  # fmt: skip


def diagnosis(**parts: Any) -> Diagnosis:
    """With its findings."""
    usual: dict[str, Any] = {
        "adept_ds": "1.0",
        "made_of": "f" * 64,
        "setting": setting(),
        "losses": losses(),
        "effects": effects([0.001, -0.002, 0.0], [-0.1, -0.1, -0.1]),
        "layers": copied_layers(0.001, 0.004, 0.01),
        "units": tuple(unit(f"layers.{index}.mlp.up_proj") for index in COPIES),
        "writes": writes(),
        "gradients": gradients(),
        "overlaps": overlaps(),
    }
    facts = Diagnosis(**(usual | parts))
    return facts.model_copy(update={"findings": findings_of(facts)})
