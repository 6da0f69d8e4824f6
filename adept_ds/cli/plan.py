"""`adept plan`: memory, bytes sent and time of a training before any GPU is rented, and what to train with."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from adept_ds.base.errors import InputError
from adept_ds.base.terminal import Terminal
from adept_ds.cli.forms import JsonOption
from adept_ds.cli.session import show
from adept_ds.config.schema import Config

if TYPE_CHECKING:
    from adept_ds.planning.report import Plan


def plan(
    config: Config,
    *,
    gpus: Annotated[int, typer.Option(help="GPUs in all")],
    gpu_memory: Annotated[str, typer.Option(help="of each: 80GB, 80GiB")],
    nodes: Annotated[int, typer.Option(help="hosts that they are on, as many on each")] = 1,
    flops: Annotated[
        str | None, typer.Option(help="of each, at its peak, dense, in the precision of training: 989TFLOP/s")
    ] = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(help="that a node sends to others, all adapters together; of one node, that a GPU sends: 400Gb/s"),
    ] = None,
    link_bandwidth: Annotated[
        str | None, typer.Option(help="that a GPU sends within its node, where there are several: 450GB/s")
    ] = None,
    efficiency: Annotated[float, typer.Option(help="share of --flops that a step reaches")] = 0.4,
    reserve: Annotated[float, typer.Option(help="share of --gpu-memory that is not counted on")] = 0.1,
    as_json: JsonOption = False,
) -> None:
    """Memory, bytes sent and time of a step by ZeRO stage, and what to train with: from the configuration alone."""
    from adept_ds.planning.cluster import Cluster
    from adept_ds.planning.quantities import parse_bandwidth, parse_bytes, parse_operations

    _check(gpus, nodes, efficiency, reserve)
    if link_bandwidth is not None and nodes == 1:
        raise InputError(
            f"--link-bandwidth: '{link_bandwidth}' has no effect with one node; give it as --bandwidth, or --nodes"
        )
    cluster = Cluster(
        gpus,
        parse_bytes("--gpu-memory", gpu_memory),
        nodes,
        None if flops is None else parse_operations("--flops", flops),
        None if bandwidth is None else parse_bandwidth("--bandwidth", bandwidth),
        None if link_bandwidth is None else parse_bandwidth("--link-bandwidth", link_bandwidth),
        efficiency=efficiency,
        reserve=reserve,
    )
    with _without_collections():
        from adept_ds.planning.from_config import planned
        from adept_ds.planning.report import make_plan, to_json

        found = planned(config, gpus)
        made = make_plan(found.task, cluster, found.guessed)
    terminal = Terminal(sys.stdout)
    show(terminal, as_json, to_json(made), lambda: print_plan(made, terminal))


@contextmanager
def _without_collections() -> Iterator[None]:
    """Of five seconds, four are imports of libraries; the collector would look through all that they make: one more."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _check(gpus: int, nodes: int, efficiency: float, reserve: float) -> None:
    for name, count in (("--gpus", gpus), ("--nodes", nodes)):
        if not 1 <= count <= 10**6:
            raise InputError(f"{name}: {count} is not possible; give 1 or more, and a million at most")
    if gpus % nodes:
        raise InputError(f"--nodes: {nodes} do not hold as many of the {gpus} GPUs each; give a divisor of --gpus")
    if not 0 < efficiency <= 1:
        raise InputError(f"--efficiency: {efficiency} is no share; give a number above 0, up to 1, such as 0.4")
    if not 0 <= reserve < 1:
        raise InputError(f"--reserve: {reserve} is no share; give a number from 0 to below 1, such as 0.1")


def print_plan(made: Plan, terminal: Terminal) -> None:
    """What is trained, a column per stage, what to set and why, and what all of it rests on."""
    from adept_ds.planning.report import assumptions, keys, why

    outline, task = made.task.outline, made.task
    share = outline.flops.total / (6.0 * outline.total)
    terminal.say(
        f"{outline.trainable / 1e9:.2f} of {outline.total / 1e9:.2f} billion parameters train; gradients stop at layer "
        f"{outline.lowest} of {len(outline.layer_saved)}\n"
        f"{outline.flops.total / 1e9:.1f} GFLOP a token ({share:.2f} of 6N), "
        f"{task.global_batch_size * outline.seq_len:,} tokens a step"
    )
    terminal.console.print(_table(made))
    settings = " ".join(f"{key}={str(value).lower()}" for key, value in keys(made).items())
    terminal.say(f"set   {settings}")
    terminal.say(f"why   {why(made)}")
    for line in assumptions(made):
        terminal.say(f"note  {line}")


def _table(made: Plan) -> Table:
    from adept_ds.planning.memory import activation_bytes
    from adept_ds.planning.quantities import in_gb, in_seconds
    from adept_ds.planning.report import KINDS

    cluster, outline = made.cluster, made.task.outline
    columns = [f"stage {stage}" for stage in made.by_stage]
    title = f"bytes of each of {cluster.gpus} GPUs, {in_gb(cluster.usable)} of {in_gb(cluster.memory)} counted on"
    table = Table("", *columns, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    ways = list(made.by_stage.values())
    table.add_row("micro-batch x accumulation", *(f"{w.step.rows} x {w.step.micro_batches}" for w in ways))
    table.add_row("activation checkpointing", *("on" if w.step.recompute else "off" for w in ways), end_section=True)
    for kind, words in KINDS.items():
        if kind == "kept_beside" and not any(w.found.memory.kept_beside for w in ways):
            continue
        table.add_row(words, *(in_gb(getattr(w.found.memory, kind)) for w in ways))
        if kind == "activations":
            other = [activation_bytes(outline, replace(w.step, recompute=not w.step.recompute), w.zero) for w in ways]
            texts = (f"{'off' if w.step.recompute else 'on'}: {in_gb(o)}" for w, o in zip(ways, other, strict=True))
            table.add_row("[dim]  with checkpointing[/]", *(f"[dim]{text}[/]" for text in texts))
        if kind == "frozen_weights" and any(w.found.kept for w in ways):
            kept = (f"[dim]{in_gb(w.found.kept)}[/]" if w.found.kept else "" for w in ways)
            table.add_row("[dim]  of which kept gathered[/]", *kept)
    peaks = (
        f"[{'green' if w.fits(cluster) else 'red'}]{in_gb(w.found.memory.peak)}[/]"
        + ("" if w.fits(cluster) else " too much")
        for w in ways
    )
    table.add_row("[bold]peak[/]", *peaks, end_section=True)
    if any(w.found.memory.on_host for w in ways):
        table.add_row("on the host, for each GPU", *(in_gb(w.found.memory.on_host) for w in ways), end_section=True)
    table.add_row("sent by each GPU, a step", *(in_gb(w.sent) for w in ways))
    if cluster.is_timed:
        timings = [w.timing for w in ways if w.timing]
        table.add_row("computing", *(in_seconds(t.compute) for t in timings))
        table.add_row("sending", *(in_seconds(t.communication) for t in timings))
        table.add_row("[bold]a step[/]", *(in_seconds(t.total) for t in timings))
        tokens = made.task.global_batch_size * outline.seq_len
        table.add_row("tokens/s, all GPUs", *(f"{tokens / t.total:,.0f}" for t in timings))
    for column, w in zip(table.columns[1:], ways, strict=True):
        if w is made.chosen:
            column.header = f"[green]{escape(str(column.header))}[/]"
    return table
