"""The files of a run that never took place, and what a reader sees of its report page."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

from adept_ds.base.run_records import log_line
from adept_ds.report.page import write_report

MATRICES = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
UNITS = dict.fromkeys(MATRICES, "matrix") | dict.fromkeys(("input_layernorm", "post_attention_layernorm"), "norm")
"""Name within a layer -> kind."""
SELECTED = [12, 17, 20, 21]
COPIES = [{"source": source, "index": source + 1 + i} for i, source in enumerate(SELECTED)]
FIGURES = ("layers", "stack", "training", "evals", "units", "movement", "speed")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(map(log_line, lines)), encoding="utf-8")


def write_importance(run_dir: Path, layers: int = 30) -> None:
    noise = random.Random(0)
    delta = [0.02 + 0.05 * noise.random() for _ in range(layers)]
    delta[0], delta[1], delta[-1], delta[5] = 7.31, 1.24, 2.05, 0.0973
    for rank, i in enumerate(SELECTED):
        delta[i] = 0.004 * rank - 0.002
    rows = [{"index": i, "loss": 2.2 + d, "delta": d} for i, d in enumerate(delta)]
    result = {"method": "mask", "base_loss": 2.2, "tokens": 16384, "layers": rows, "selected": SELECTED,
              "measures": "delta loss (nats) with layer bypassed"}  # fmt: skip
    (run_dir / "layer_importance.json").write_text(json.dumps(result), encoding="utf-8")


def step_line(step: int, noise: random.Random) -> dict[str, Any]:
    lr = 2e-4 * min(1, step / 10) * (0.55 + 0.45 * math.cos(math.pi * step / 100))
    loss = 1.6 + 0.4 * math.exp(-step / 25) + noise.gauss(0, 0.06)
    speed = 3200 * (1 + noise.gauss(0, 0.03)) * (0.6 if step % 20 == 1 else 1)
    return {"step": step, "loss": loss, "lr": lr, "grad_norm": 0.8 + noise.random(), "tokens": 2048 * step,
            "tokens_per_second": speed, "seconds": 2048 / speed, "peak_memory_bytes": 3 << 30}  # fmt: skip


def eval_line(step: int) -> dict[str, Any]:
    domain, general = 1.61 + 0.31 * math.exp(-step / 30), 2.20 + 0.01 * step / 100
    sets = {"general": {"loss": general, "tokens": 8192}, "domain": {"loss": domain, "tokens": 8192}}
    return {"step": step, "eval": sets}


def metric_lines(steps: int = 100) -> list[dict[str, Any]]:
    noise, lines = random.Random(1), []
    for step in range(steps + 1):
        lines += [step_line(step, noise)] if step else []
        lines += [eval_line(step)] if step % 25 == 0 else []
        lines += [{"step": step, "refresh_seconds": 0.7}] if step % 20 == 0 else []
    return lines


def refresh_line(step: int, noise: random.Random) -> dict[str, Any]:
    units = []
    for copy in COPIES:
        for rank, (name, kind) in enumerate(UNITS.items()):
            importance = min(1.0, max(0.0, 0.7 * (rank % 7 == 2) + 0.15 * rank * noise.random() / 4))
            unit = f"layers.{copy['index']}.{name}"
            units.append({"unit": unit, "kind": kind, "importance": importance, "multiplier": 2 * (1 - importance)})
    return {"step": step, "units": units}


def make_run(run_dir: Path, model: str = "models/SmolLM2-135M") -> Path:
    (run_dir / "expanded").mkdir(parents=True)
    write_importance(run_dir)
    config = f"model: {json.dumps(model)}\nexpand: {{k: 4}}\ntrain: {{steps: 100, lr: 2.0e-4}}\n"
    (run_dir / "config.yaml").write_text(config, encoding="utf-8")
    expansion = {"source_layers": 30, "copies": COPIES, "zeroed": ["layers.13.mlp.down_proj.weight"],
                 "fingerprint": "f" * 64}  # fmt: skip
    (run_dir / "expanded/expansion.json").write_text(json.dumps(expansion), encoding="utf-8")
    noise = random.Random(2)
    write_lines(run_dir / "unit_importance.jsonl", [refresh_line(step, noise) for step in range(0, 100, 20)])
    write_movement(run_dir)
    write_lines(run_dir / "metrics.jsonl", metric_lines())
    write_evaluation(run_dir, general=2.21)
    summary = {"trainable_parameters": 14_160_000, "total_parameters": 148_680_000, "world_size": 2, "seconds": 75.4,
               "tokens": 204_800, "tokens_per_second": 3187.2, "peak_memory_bytes": 3 << 30, "refresh_seconds": 3.5,
               "step_seconds": 0.64, "zero_stage": 3, "precision": "bf16"}  # fmt: skip
    (run_dir / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return run_dir


def write_movement(run_dir: Path) -> None:
    """Every element moves by 1e-5 times its multiplier in each step, always in the same direction."""
    lines: list[dict[str, Any]] = []
    travelled: dict[str, float] = {}
    for refresh in map(json.loads, (run_dir / "unit_importance.jsonl").read_text().splitlines()):
        units = []
        for unit in refresh["units"]:
            name, kind, multiplier = unit["unit"], unit["kind"], unit["multiplier"]
            numel, step = 576 if kind == "norm" else 331_776, 1e-5 * multiplier * 20
            travelled[name] = travelled.get(name, 0.0) + step
            total = travelled[name] * numel**0.5
            units.append(moved(name, multiplier, step * numel**0.5, total, numel=numel, kind=kind))
        lines.append({"step": refresh["step"] + 20, "since": refresh["step"], "units": units})
    write_lines(run_dir / "unit_movement.jsonl", lines)


def write_evaluation(run_dir: Path, general: float, domain: float = 1.61) -> None:
    base = {"general": {"loss": 2.20, "tokens": 8192}, "domain": {"loss": 1.92, "tokens": 8192}}
    adapted = {"general": {"loss": general, "tokens": 8192}, "domain": {"loss": domain, "tokens": 8192}}
    (run_dir / "evaluation.json").write_text(json.dumps({"base": base, "adapted": adapted}), encoding="utf-8")


def moved(
    unit: str, multiplier: float, distance: float, total: float, *, numel: int = 4, kind: str = "matrix"
) -> dict[str, Any]:
    """A unit that went this far in an interval, and since the start."""
    return {"unit": unit, "kind": kind, "numel": numel, "multiplier": multiplier,
            "moved": distance, "moved_since_start": total}  # fmt: skip


def interval(since: int, step: int, *units: dict[str, Any]) -> dict[str, Any]:
    """A line of unit_movement.jsonl."""
    return {"step": step, "since": since, "units": list(units)}


def page_of(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


def words(page: str) -> str:
    """What a reader sees, on one line."""
    return " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(style|svg).*?</\1>", "", page)).split())


def figures(page: str) -> dict[str, bool]:
    parts = {part.split('"', 1)[0]: "<svg" in part for part in page.split('<section id="')[1:]}
    return {name: parts[name] for name in FIGURES}
