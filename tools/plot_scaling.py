"""The scaling study of docs/scaling.md: `adept plan` for three models on 8 to 4,096 GPUs, on paper.

    python tools/plot_scaling.py docs/scaling          # figures, and tables.md that the page repeats

Nothing is measured here: every number follows from the models' config.json (tools/scaling/models) and the figures of
`HOSTS` below, by the assumptions that the page lists.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.progress import track

from adept_ds.config.loading import parse_config
from adept_ds.planning.candidates import Candidate, Task, best_by_stage, candidate, recommended
from adept_ds.planning.cluster import Cluster
from adept_ds.planning.from_config import planned
from adept_ds.planning.quantities import in_gb, in_seconds
from adept_ds.planning.report import KINDS

MODELS = {
    "Qwen3-8B": "qwen3_8b",
    "Llama-3-70B": "llama_3_70b",
    "Qwen3-Coder-480B": "qwen3_coder_480b",
}
SEQ_LEN, ROWS_EACH = 4096, 4
"""Tokens of a sequence; sequences of a step for each GPU where the batch grows with the cluster."""
FIXED_BATCH = 1024
"""Sequences of a step where it does not: 4.2 million tokens."""
SIZES = tuple(8 << shift for shift in range(10))
"""Numbers of GPUs: 8 to 4,096."""
GPUS_A_NODE = 8
HOSTS: dict[str, float] = {"memory": 80e9, "flops": 989e12, "link": 450e9, "bandwidth": 400e9}
"""H100 SXM in hosts of eight: NVIDIA's data sheet has 80 GB, 989 TFLOP/s in bf16 without sparsity and 900 GB/s of
NVLink in both directions together; DGX H100's has eight adapters of 400 Gb/s, 400 GB/s a direction."""
COLORS = {1: "#8c8c8c", 2: "#0072b2", 3: "#d55e00"}
KIND_COLORS = ["#4c72b0", "#dd8452", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#55a868", "#ccb974", "#ccb974"]


@dataclass(frozen=True)
class Point:
    """One model on one cluster."""

    gpus: int
    by_stage: dict[int, Candidate]
    chosen: Candidate | None
    tokens: int
    """Of a step."""

    def rate(self, stage: int, cluster: Cluster) -> float | None:
        """Tokens a second of each GPU; None: it does not fit."""
        each = self.by_stage[stage]
        return self.tokens / each.timing.total / self.gpus if each.timing and each.fits(cluster) else None


def cluster_of(gpus: int) -> Cluster:
    nodes = gpus // GPUS_A_NODE
    single = {"bandwidth": HOSTS["link"], "link": None} if nodes == 1 else {}
    options: dict[str, Any] = HOSTS | single
    return Cluster(gpus, nodes=nodes, **options)


def task_of(name: str, **sections: Any) -> Task:
    """Four copies, evenly spread."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(__file__).parent / "scaling" / "models" / f"{name}.json"
        (Path(folder) / "config.json").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
        tree = {"model": folder, "run_dir": "runs/none", "data": {"seq_len": SEQ_LEN}}
        return planned(parse_config(tree | {"expand": {"k": 4, "choose": "uniform"}} | sections), 1).task


def points(task: Task, batch_of: Callable[[int], int]) -> list[Point]:
    """For all sizes that the batch has a sequence for."""
    found = []
    for gpus in SIZES:
        batch = batch_of(gpus)
        if batch < gpus:
            break
        cluster, own = cluster_of(gpus), replace(task, global_batch_size=batch)
        by_stage = best_by_stage(own, cluster)
        chosen = recommended(own, cluster, by_stage)
        found.append(Point(gpus, by_stage, chosen, batch * SEQ_LEN))
    return found


def table(name: str, found: Sequence[Point]) -> list[str]:
    """Markdown."""
    lines = [
        f"## {name}",
        "",
        "| GPUs | stage | micro-batch | checkpointing | peak | sent | computing | sending | a step | tokens/s |",
        "| --: | --: | --: | :-- | --: | --: | --: | --: | --: | --: |",
    ]
    for point in found:
        each = point.chosen
        if each is None or each.timing is None:
            least = min(c.found.memory.peak for c in point.by_stage.values())
            lines.append(f"| {point.gpus:,} | none fits | | | {in_gb(least)} needed | | | | | |")
            continue
        timing = each.timing
        lines.append(
            f"| {point.gpus:,} | {each.stage} | {each.step.rows} x {each.step.micro_batches} "
            f"| {'on' if each.step.recompute else 'off'} | {in_gb(each.found.memory.peak)} | {in_gb(each.sent)} "
            f"| {in_seconds(timing.compute)} | {in_seconds(timing.communication)} | {in_seconds(timing.total)} "
            f"| {point.tokens / timing.total / point.gpus:,.0f} |"
        )
    return [*lines, ""]


def estimates(tasks: dict[str, Task]) -> list[str]:
    """States of a GPU by this planner, and by DeepSpeed's own estimators."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    lines = [
        "| model | GPUs | stage | weights, gradients and moments | DeepSpeed's estimator | too much by |",
        "| :-- | --: | --: | --: | --: | --: |",
    ]
    for name, task in tasks.items():
        outline = task.outline
        by_layer: dict[int, int] = {}
        for call in outline.calls:
            if call.layer is not None:
                own = sum(outline.weights[position].numel for position in call.weights)
                by_layer[call.layer] = by_layer.get(call.layer, 0) + own
        for gpus in (8, 64):
            cluster = replace(cluster_of(gpus), memory=1e15)  # that it fits is another question
            own_task = replace(task, global_batch_size=gpus, keep_gathered=0.0)
            for stage in (2, 3):
                states = candidate(own_task, cluster, stage, 1, recompute=True).found.memory.states
                arguments = {"num_gpus_per_node": GPUS_A_NODE, "num_nodes": cluster.nodes, "cpu_offload": False}
                if stage == 2:
                    _, theirs = estimate_zero2_model_states_mem_needs(outline.total, **arguments)
                else:
                    _, theirs, _ = estimate_zero3_model_states_mem_needs(
                        outline.total, max(by_layer.values()), cpu_offload_params=False, **arguments
                    )
                lines.append(
                    f"| {name} | {gpus} | {stage} | {in_gb(states)} | {in_gb(theirs)} | {theirs / states:.1f} x |"
                )
    return [*lines, ""]


def plot_rates(growing: dict[str, list[Point]], fixed: dict[str, list[Point]]) -> Figure:
    """Tokens a second of each GPU, by stage."""
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(growing)), growing, strict=True):
        for stage in (2, 3):
            for found, style, batch in ((growing, "-", "grows"), (fixed, "--", "is fixed")):
                rates = [(p.gpus, p.rate(stage, cluster_of(p.gpus))) for p in found[name]]
                drawn = [(float(gpus), rate) for gpus, rate in rates if rate is not None]
                label = f"stage {stage}, the batch {batch}"
                axes.plot(*_columns(drawn), style, marker="o", ms=3, color=COLORS[stage], label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES[::3])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlim(SIZES[0] / 1.3, SIZES[-1] * 1.3)
        axes.set_ylim(bottom=0)
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_xlabel("GPUs")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("tokens/s of each GPU, planned")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def plot_memory(growing: dict[str, list[Point]]) -> Figure:
    """By kind, at what is recommended; where nothing fits, at what needs least."""
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    kinds = [kind for kind in KINDS if kind not in ("working", "reduce_buffers", "kept_beside")]
    for axes, (name, found) in zip(figure.subplots(1, len(growing), sharey=True), growing.items(), strict=True):
        bottoms = [0.0] * len(found)
        shown = [p.chosen or min(p.by_stage.values(), key=lambda c: c.found.memory.peak) for p in found]
        for kind, color in zip(kinds, KIND_COLORS, strict=False):
            heights = [getattr(each.found.memory, kind) / 1e9 for each in shown]
            if kind == "logits":
                heights = [each.found.memory.peak / 1e9 - bottom for each, bottom in zip(shown, bottoms, strict=True)]
            label = "logits, or a layer's backward pass" if kind == "logits" else KINDS[kind]
            axes.bar(range(len(found)), heights, bottom=bottoms, color=color, width=0.75, label=label)
            bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
        usable = cluster_of(8).usable / 1e9
        axes.axhline(usable, color="black", lw=0.8, ls=":")
        for index, each in enumerate(shown):
            if bottoms[index] < 1.5 * usable:
                axes.text(index, bottoms[index] + 1, str(each.stage), ha="center", fontsize=7)
        axes.set_xticks(range(len(found)), [f"{p.gpus:,}" for p in found], rotation=60, fontsize=7)
        axes.set_ylim(0, 1.6 * usable)
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_xlabel("GPUs")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("GB of each GPU, planned")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _columns(rows: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [row[0] for row in rows], [row[1] for row in rows]


def save(figure: Figure, path: Path) -> None:
    """As SVG that is the same whenever it is drawn."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none", "font.size": 8}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory of figures and tables")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    tasks, growing, fixed, lines = dict[str, Task](), dict[str, list[Point]](), dict[str, list[Point]](), list[str]()
    for name, file in track(MODELS.items(), "planning"):
        tasks[name] = task_of(file)
        growing[name] = points(tasks[name], lambda gpus: ROWS_EACH * gpus)
        fixed[name] = points(tasks[name], lambda gpus: FIXED_BATCH)
        lines += table(name, growing[name])
    made_by = (
        "Made by `tools/plot_scaling.py`; [../scaling.md](../scaling.md) says of what, and from which assumptions."
    )
    head = ["# Tables of the scaling study", "", made_by, ""]
    tail = ["## States by DeepSpeed's own estimators", "", *estimates(tasks)]
    (out / "tables.md").write_text("\n".join([*head, *lines, *tail]), encoding="utf-8")
    save(plot_rates(growing, fixed), out / "rates.svg")
    save(plot_memory(growing), out / "memory.svg")


if __name__ == "__main__":
    main()
