"""A plan in words and numbers: tables for people, one dictionary for programs. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from adept_ds.base.errors import InputError
from adept_ds.planning.candidates import Candidate, Task, best_by_stage, candidate, recommended, smallest_micro_batch
from adept_ds.planning.cluster import HOP_BETWEEN_NODES, HOP_IN_NODE, Cluster
from adept_ds.planning.memory import Memory, activation_bytes
from adept_ds.planning.quantities import in_gb, in_seconds

_MOST_GPUS = 1 << 16
"""That a remedy asks for."""

KINDS = {
    "frozen_weights": "frozen weights",
    "trained_weights": "trained weights",
    "gradients": "gradients",
    "optimizer": "optimizer's moments",
    "kept_beside": "kept beside the optimizer",
    "gather_buffers": "gathered weights",
    "bucket": "gradients' bucket",
    "reduce_buffers": "gradients on their way",
    "activations": "activations",
    "logits": "logits",
    "working": "a layer's backward pass",
}
"""Of a GPU's memory, in words."""


@dataclass(frozen=True)
class Plan:
    """What to train with, and what it was weighed against."""

    task: Task
    cluster: Cluster
    by_stage: Mapping[int, Candidate]
    chosen: Candidate
    guessed: str


def make_plan(task: Task, cluster: Cluster, guessed: str = "") -> Plan:
    """Raises `InputError`: no stage fits; the line says what would help."""
    by_stage = best_by_stage(task, cluster)
    chosen = recommended(task, cluster, by_stage)
    if chosen is None:
        raise InputError(too_small(task, cluster, by_stage))
    return Plan(task, cluster, by_stage, chosen, guessed)


def too_small(task: Task, cluster: Cluster, by_stage: Mapping[int, Candidate]) -> str:
    """What is needed least, and what would help, in one line."""
    least = min(by_stage.values(), key=lambda each: each.found.memory.peak)
    memory = least.found.memory
    remedies = []
    larger = _gpus_that_fit(task, cluster)
    if larger is not None:
        gpus, batch = larger
        with_batch = f" with train.global_batch_size {batch}" if batch != task.global_batch_size else ""
        remedies.append(f"take {gpus} GPUs of this size{with_batch}")
    in_step = memory.activations + max(memory.logits, memory.working)
    if in_step > memory.peak / 3:
        remedies.append(f"lower data.seq_len, of which {in_gb(in_step)} depend")
    remedies += _offloading(least, memory)
    remedies.append(f"take GPUs of {in_gb(memory.peak / (1 - cluster.reserve))} or more")
    rows = "one sequence" if least.step.rows == 1 else f"{least.step.rows} sequences"
    return (
        f"--gpu-memory: {in_gb(cluster.memory)}, of which {in_gb(cluster.usable)} are counted on, are too few for any "
        f"stage; stage {least.stage} with micro-batches of {rows} and checkpointing needs {in_gb(memory.peak)}; "
        f"{', or '.join(remedies)}"
    )


def _offloading(least: Candidate, memory: Memory) -> Iterator[str]:
    """What could lie on the host and is a tenth of all."""
    states = memory.gradients + 1.5 * memory.optimizer + memory.kept_beside
    weights = memory.frozen_weights
    if not least.zero.optimizer_on_host and states > memory.peak / 10:
        yield f"use ds_configs/zero3_offload.json, which moves {in_gb(states)} to the host"
    elif least.stage == 3 and not least.zero.weights_on_host and weights > memory.peak / 10:
        yield f"use ds_configs/zero3_offload_params.json, which moves {in_gb(weights)} to the host"


def _gpus_that_fit(task: Task, cluster: Cluster) -> tuple[int, int] | None:
    """The smallest multiple by a power of two at which a run takes a step that fits, and the batch: the smallest that
    is no less than the present one and divides evenly."""
    gpus = 2 * cluster.gpus
    while gpus <= _MOST_GPUS:
        larger = replace(cluster, gpus=gpus, nodes=cluster.nodes * gpus // cluster.gpus)
        stepped = replace(task, global_batch_size=-(-task.global_batch_size // gpus) * gpus)
        rows = smallest_micro_batch(stepped, larger, 3)
        if rows is not None and candidate(stepped, larger, 3, rows, recompute=True).fits(larger):
            return gpus, stepped.global_batch_size
        gpus *= 2
    return None


def why(plan: Plan) -> str:
    """The choice of the stage, in a sentence or two."""
    chosen, cluster = plan.chosen, plan.cluster
    whole, split = plan.by_stage[2], plan.by_stage[3]
    frozen = whole.found.memory.frozen_weights
    outline = plan.task.outline
    weights, what = (frozen, "frozen weights") if frozen else (outline.element_size * float(outline.total), "weights")
    if chosen.stage == 3 and not whole.fits(cluster):
        text = (
            f"every GPU would hold all {in_gb(weights)} of {what} at stages 1 and 2, and need "
            f"{in_gb(whole.found.memory.peak)} of {in_gb(cluster.usable)} at least"
        )
    elif chosen.stage == 3:
        text = (
            f"the {what} would fit whole ({in_gb(weights)} of {in_gb(cluster.usable)}), but stage 3 takes "
            f"{_compared(chosen, whole)}"
        )
    else:
        text = f"the {what} fit whole ({in_gb(weights)} of {in_gb(cluster.usable)})"
        if cluster.gpus > 1:
            text += ", so nothing of them is sent" if frozen else ""
            text += f": {in_gb(chosen.sent)} a step for each GPU"
            if split.fits(cluster):
                text += f", stage 3 {in_gb(split.sent)}"
        if split.timing and chosen.timing and split.fits(cluster):
            text += f", in {_compared(chosen, split)}"
    if chosen.step.recompute:
        plain = candidate(plan.task, cluster, chosen.stage, chosen.step.rows, recompute=False)
        text += (
            f". Without checkpointing, micro-batches of {chosen.step.rows} would need {in_gb(plain.found.memory.peak)}"
        )
    return text


def _compared(one: Candidate, other: Candidate) -> str:
    if one.timing and other.timing:
        return f"{in_seconds(one.timing.total)} instead of {in_seconds(other.timing.total)}"
    return f"{in_gb(one.sent)} instead of {in_gb(other.sent)} a step"


def keys(plan: Plan) -> dict[str, Any]:
    """Of the configuration, as overrides set them."""
    return {
        "deepspeed": plan.chosen.zero.file,
        "train.micro_batch_size": plan.chosen.step.rows,
        "train.activation_checkpointing": plan.chosen.step.recompute,
    }


def assumptions(plan: Plan) -> list[str]:
    """What the numbers rest on."""
    task, cluster = plan.task, plan.cluster
    lines = [
        (
            f"{task.precision} with float32 gradients and AdamW; PyTorch's operations with fused attention and no mask "
            "(liger-kernel keeps less; packed documents and sliding windows keep their mask)"
        ),
        f"{cluster.reserve:.0%} of the memory is left to CUDA, NCCL and gaps between tensors",
        "training steps alone: evaluations, refreshes of importances and anchors are not counted",
    ]
    if cluster.is_timed:
        assert cluster.flops is not None
        lines.append(
            f"{cluster.efficiency:.0%} of {cluster.flops / 1e12:g} TFLOP/s are reached; the optimizer's own step and "
            "the reading of data take no time"
        )
        if any(each.found.memory.on_host for each in plan.by_stage.values()):
            lines.append(
                "what lies on the host takes no time to be copied, nor the CPU any to step it: it will be slower"
            )
        if cluster.gpus > 1:
            lines.append(
                "one ring over all GPUs, at full bandwidth: "
                + (f"{HOP_BETWEEN_NODES * 1e6:g} us a hop between nodes, " if cluster.nodes > 1 else "")
                + f"{HOP_IN_NODE * 1e6:g} us within one; with overlap_comm it runs beside the passes, and the longer "
                "of both counts"
            )
    else:
        lines.append("no time is given without --flops and --bandwidth: that is chosen which sends least")
    if task.precision == "bf16":
        lines.append("stage 1 in bf16 is run as stage 2, with the settings of its file")
    if plan.guessed:
        lines.append(plan.guessed)
    return lines


def to_json(plan: Plan) -> dict[str, Any]:
    """Everything; bytes, seconds, operations."""
    outline, task, cluster = plan.task.outline, plan.task, plan.cluster
    return {
        "parameters": {"total": outline.total, "trained": outline.trainable},
        "lowest_trained_layer": outline.lowest,
        "layers": len(outline.layer_saved),
        "tokens_per_step": task.global_batch_size * outline.seq_len,
        "flops_per_token": asdict(outline.flops)
        | {"total": outline.flops.total, "recomputed": outline.recomputed_flops, "six_n": 6.0 * outline.total},
        "cluster": asdict(cluster) | {"usable": cluster.usable},
        "stages": {str(stage): _candidate_json(each, task, cluster) for stage, each in plan.by_stage.items()},
        "recommended": {"stage": plan.chosen.stage, "set": keys(plan), "why": why(plan)},
        "assumptions": assumptions(plan),
    }


def _candidate_json(each: Candidate, task: Task, cluster: Cluster) -> dict[str, Any]:
    step = each.step
    both = {
        name: activation_bytes(task.outline, replace(step, recompute=recompute), each.zero)
        for name, recompute in (("kept", False), ("checkpointed", True))
    }
    return {
        "fits": each.fits(cluster),
        "micro_batch_size": step.rows,
        "micro_batches": step.micro_batches,
        "activation_checkpointing": step.recompute,
        "memory": asdict(each.found.memory) | {"peak": each.found.memory.peak},
        "activations": both,
        "kept_gathered": each.found.kept,
        "collectives": [asdict(c) | {"sent": c.sent(step.ranks)} for c in each.collectives],
        "sent": each.sent,
        "seconds": asdict(each.timing) if each.timing else None,
    }
