"""What a run shows on the terminal at its end, and what it would do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from adept_ds.base.dial_record import DialRecord, label_of
from adept_ds.base.run_dir import RunDirectory, checkpoint_steps
from adept_ds.base.run_records import Evaluation, RunSummary
from adept_ds.base.terminal import Terminal
from adept_ds.cli.evaluation_tables import print_evaluation
from adept_ds.config.resolved import ResolvedConfig
from adept_ds.methods.shape import method_of
from adept_ds.weights.expansion import Expansion

if TYPE_CHECKING:
    from adept_ds.probing.places import PlaceBenefits
    from adept_ds.probing.result import LayerImportance


def print_expansion(facts: dict[str, Any], terminal: Terminal) -> None:
    """The plan of `adept expand --dry-run` (see `expansion.describe_expansion`)."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    copies = ", ".join(f"{copy['source']} at {copy['index']}" for copy in facts["copies"])
    gib, total, added = 2**30, facts["source_parameters"], facts["added_parameters"]
    rows = {
        "layers": f"{facts['source_layers']} + {len(facts['copies'])}: copy of {copies}",
        "parameters": f"{total / 1e6:.1f} M + {added / 1e6:.1f} M ({added / total:.1%})",
        "size": f"{facts['source_bytes'] / gib:.2f} + {facts['added_bytes'] / gib:.2f} GiB",
        "files": f"{len(facts['files'])}, the largest {max(facts['files'].values()) / gib:.2f} GiB",
        "would write": facts["destination"],
    }
    if facts["replaces"]:
        rows["would replace"] = f"{len(facts['replaces'])} files that `adept expand` wrote there before"
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/]", value)
    terminal.console.print(table)


def print_summary(run_dir: RunDirectory, terminal: Terminal, *, dialled: bool = False) -> None:
    """The end of `adept run`: losses before and after, what was trained, how fast, and where everything lies.

    Args:
        dialled: the run chose a position of the dial; what it may say of general text comes last.
    """
    if run_dir.evaluation.is_file():
        print_evaluation(Evaluation.load(run_dir.evaluation).to_json(), terminal)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = _copies_of(run_dir) | _numbers_of(RunSummary.load(run_dir.summary))
    rows |= {"checkpoint": escape(str(run_dir.export)), "report": escape(str(run_dir.report))}
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/]", value)
    terminal.console.print(table)
    if dialled:
        record = DialRecord.load(run_dir.dial)
        terminal.say(f"alpha {label_of(record.chosen)}, chosen in {record.seconds:.0f} s; {record.promise}")


def _copies_of(run_dir: RunDirectory) -> dict[str, str]:
    """Where layers were copied."""
    if not run_dir.expansion.is_file():
        return {}
    expansion = Expansion.read(run_dir.expanded)
    return {"layers copied": ", ".join(map(str, expansion.source_indices)) + f" (of {expansion.source_layers})"}


def _numbers_of(summary: RunSummary) -> dict[str, str]:
    """As far as they are known."""
    trained, total, rows = summary.trainable_parameters, summary.total_parameters, dict[str, str]()
    if trained is not None and total:
        rows["trainable"] = f"{trained / 1e6:.1f} M of {total / 1e6:.1f} M parameters ({trained / total:.1%})"
    if summary.writer_lr_ratio not in (None, 1):
        rows["silent factors"] = f"trained at {summary.writer_lr_ratio:g} x the rate of the rest of their copy"
    if summary.copy_dropout:
        rows["copy dropout"] = f"{summary.copy_dropout:g}"
    speed = []
    if summary.tokens_per_second is not None and summary.world_size is not None:
        speed.append(f"{summary.tokens_per_second:.0f} tokens/s on {summary.world_size} ranks")
    if summary.tokens is not None and summary.seconds is not None:
        speed.append(f"{summary.tokens / 1e3:.0f} k tokens in {summary.seconds:.0f} s")
    if speed:
        rows["speed"] = ", ".join(speed)
    if summary.peak_memory_bytes:
        peaks = ", ".join(f"{peak / 2**30:.2f} GiB" for peak in summary.peak_memory_bytes)
        rows["peak memory"] = f"{peaks} per rank"
    return rows


def print_layer_importance(result: LayerImportance, terminal: Terminal) -> None:
    """A row per layer; with no losses (gradient, fisher) its score."""
    has_losses = any(layer.loss is not None for layer in result.layers)
    columns = ["loss without it", "delta"] if has_losses else [result.method]
    table = Table("layer", *columns, "± s.e.", "", title=f"base loss {result.base_loss:.4f}")
    unsure = set(result.selection.within_noise if result.selection else ())
    for layer in result.layers:
        chosen = "[green]copied[/]" if layer.index in result.selected else ""
        noise = " [yellow]within noise[/]" if layer.index in unsure else ""
        number = "{:.4f}" if has_losses else "{:.4g}"
        error = "" if layer.standard_error is None else number.format(layer.standard_error)
        values = [f"{layer.loss:.4f}", f"{layer.delta:+.4f}"] if layer.loss is not None else [f"{layer.delta:.4g}"]
        table.add_row(str(layer.index), *values, error, (chosen + noise).strip())
    terminal.console.print(table)


def print_places(found: PlaceBenefits, terminal: Terminal) -> None:
    """A row per place; numbers are nats per unit of learning rate, to first order."""
    title = f"base loss {found.domain.loss:.4f} on domain text, {found.general.loss:.4f} on general text"
    table = Table("behind layer", "gain (domain)", "harm (general)", "score", "", title=title)
    for place in found.places:
        chosen = "[green]copied[/]" if place.index in found.selected else ""
        numbers = (f"{place.gain:.4g}", f"{place.harm:+.4g}", f"{place.score:.4g}")
        table.add_row(str(place.index), *numbers, chosen)
    terminal.console.print(table)


def print_methods(found: dict[str, Any], terminal: Terminal) -> None:
    """The estimators side by side (see `run.probe.compare_methods`); nothing if they were not compared."""
    if not found:
        return
    table = Table("method", "rank correlation with mask", "seconds", "layers chosen")
    for name, of in found["methods"].items():
        correlation = found["spearman"].get(name)
        text = "" if correlation is None else f"{correlation:.3f}"
        table.add_row(name, text, f"{of['seconds']:.1f}", ", ".join(map(str, of["selected"])))
    terminal.console.print(table)


def describe_plan(settings: ResolvedConfig) -> list[str]:
    """A line per stage of what `adept run` would do in this run directory."""
    config, run_dir = settings.config, settings.run_dir
    steps = checkpoint_steps(run_dir.checkpoints)
    expand, method = config.expand, method_of(config)
    if not method.chooses_layers:
        probe = "every layer trains: no probe"
    elif expand.by_gain:
        each = f"{config.probe.sequences} sequences of {config.probe.seq_len} tokens"
        score = f"gain - {expand.harm_weight:g} x harm"
        probe = f"weigh places on {each} of data.domain and of probe.corpus, choose {expand.num_copies} by {score}"
        probe += f", {expand.min_distance} layers apart" if expand.min_distance > 1 else ""
    elif expand.needs_probe:
        probe = f"probe {config.probe.sequences} sequences of {config.probe.seq_len} tokens"
        how_many = f"as many layers as rule {expand.rule} says" if expand.k == "auto" else f"{expand.num_copies} layers"
        probe += f", choose {how_many}" + (f" ({expand.choose})" if expand.choose != "lowest" else "")
        probe += ", of those within noise the cheapest" if expand.tie_break == "cost" else ""
    else:
        which = expand.layers if expand.layers is not None else f"{expand.num_copies}, {expand.choose}"
        probe = f"layers {which} are given: no probe"
    copies = f"write {run_dir.expanded} (kept while its inputs are unchanged)"
    made = copies if method.makes_copies else f"method {method.name}: the model itself trains"
    start = f"resume after step {steps[-1]}" if steps else "train"
    tokens = config.train.steps * config.train.global_batch_size * config.data.seq_len
    turned = ""
    if config.dial is not None:
        turned = f"at the best of {len(config.dial.positions)} positions of the dial"
        turned += ", then with copies turned by themselves, " if config.dial.per_copy and method.makes_copies else ", "
    return [
        f"# 1. {probe}",
        f"# 2. {made}",
        f"# 3. {start} to step {config.train.steps} ({tokens:,} tokens in all)",
        f"# 4. {turned}export to {run_dir.export}, evaluate, write {run_dir.report}",
    ]
