"""The `adept` command: the same without a launcher and under deepspeed, torchrun, srun and mpirun.

Input is checked before torch is imported; then output of libraries is diverted to a log file per rank, the ranks
meet, and the stage runs. Exit codes: see `errors`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adept_ds import __version__
from adept_ds.base.errors import EXIT_BAD_INPUT, EXIT_STOPPED, AdeptError, InputError, StopRequestedError
from adept_ds.base.terminal import Terminal, capture_output
from adept_ds.config.checks import check_files, check_layers, check_model, check_probe, check_run
from adept_ds.config.deepspeed import check_deepspeed_config
from adept_ds.config.loading import dump_config, load_config, parse_config
from adept_ds.config.schema import Config
from adept_ds.models.directory import check_model_dir, family_of, resolve_model_dir
from adept_ds.models.families import Family
from adept_ds.ranks.collectives import init_distributed, shutdown
from adept_ds.ranks.launchers import Ranks, ranks_from_environment
from adept_ds.ranks.stopping import StopRequest

if TYPE_CHECKING:
    from adept_ds.run.stages import Run


app = typer.Typer(
    name="adept",
    help="Domain adaptation of language models that keeps their general competence (ADEPT) on DeepSpeed.",
    epilog="Example:  adept run config.yaml train.lr=1e-4   ·   deepspeed --module adept_ds run config.yaml",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


ConfigArg = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration")]


OverridesArg = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides, dotted: train.lr=1e-4")
]


TargetArg = Annotated[str, typer.Argument(metavar="CONFIG|MODEL", help="YAML configuration, or a model directory")]


JsonOption = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


def main() -> None:
    """Entry point: maps errors to exit codes."""
    # The deepspeed launcher hands --local_rank to the program; the environment says the same.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    try:
        app(arguments, standalone_mode=False)
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except typer.Abort:
        sys.exit(130)
    except InputError as error:
        _complain(str(error))
        sys.exit(EXIT_BAD_INPUT)
    except StopRequestedError as stop:
        _complain(f"{stop}; run the same command again to go on")
        sys.exit(EXIT_STOPPED)
    except AdeptError as error:
        _complain(str(error), every_rank=True)
        sys.exit(1)
    except Exception as error:
        if _is_usage_error(error):
            message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
            if message:  # without arguments the help has been printed already
                _complain(f"{message}; see `adept --help`")
            sys.exit(EXIT_BAD_INPUT)
        _complain(f"unexpected {type(error).__name__}\n{traceback.format_exc()}", every_rank=True)
        # A peer may be waiting in a collective for this rank: leave without waiting for it.
        sys.stderr.flush()
        os._exit(1)


@app.command(epilog="Example:  adept run config.yaml train.steps=200")
def run(config: ConfigArg, overrides: OverridesArg = None) -> None:
    """Everything: probe, expand, train, export, evaluate, report. Run it again to resume."""
    from_file = load_config(config, overrides or [])
    ranks = ranks_from_environment(os.environ)
    check_run(from_file, ranks.world_size)
    with _session(from_file, ranks) as session:
        from adept_ds.cli.summary import print_summary
        from adept_ds.run.stages import run_all

        run_all(session)
        print_summary(session.directory, session.terminal)


@app.command(
    epilog="Example:  adept probe config.yaml --method all   ·   adept probe MODEL --corpus general.jsonl -k 4 --json"
)
def probe(
    target: TargetArg,
    overrides: OverridesArg = None,
    corpus: Annotated[list[Path] | None, typer.Option(help="general-competence corpus (with MODEL)")] = None,
    k: Annotated[str, typer.Option("-k", help="layers to choose, or auto (with MODEL)")] = "4",
    method: Annotated[
        str | None, typer.Option(help="mask, taylor, gradient or fisher (probe.method); all compares them")
    ] = None,
    sequences: Annotated[int, typer.Option(help="blocks to probe (with MODEL)")] = 32,
    seq_len: Annotated[int, typer.Option(help="tokens per block (with MODEL)")] = 256,
    out: Annotated[Path | None, typer.Option(help="write the result here (with MODEL)")] = None,
    as_json: JsonOption = False,
) -> None:
    """Which layers does general competence hardly need?"""
    tree: dict[str, Any] = {
        "probe": {"corpus": [str(path) for path in corpus or []], "sequences": sequences, "seq_len": seq_len},
        "expand": {"k": k if k == "auto" else _parse_number("-k", k)},
    }
    if method not in (None, "all") and Path(target).is_dir():
        tree["probe"]["method"] = method
    elif method not in (None, "all"):
        overrides = [*(overrides or []), f"probe.method={method}"]
    settings = _config_or_model(target, overrides, tree)
    check_model(settings)
    check_probe(settings)
    check_deepspeed_config(settings)
    with _session(settings, as_json=as_json) as session:
        from adept_ds.base.files import write_json
        from adept_ds.cli.summary import print_layer_importance, print_methods
        from adept_ds.ranks.collectives import on_main_rank
        from adept_ds.run.stages import compare_methods, probe_stage, report_stage

        result = probe_stage(session)
        methods = compare_methods(session, result) if method == "all" else {}
        if methods and not Path(target).is_dir():
            report_stage(session)  # with the plot
        found = result.to_json() | methods
        if out is not None:
            on_main_rank(lambda: write_json(out, found))

        def print_tables() -> None:
            print_layer_importance(result, session.terminal)
            if methods:
                print_methods(methods, session.terminal)

        _show(session.terminal, as_json, found, print_tables)


@app.command(epilog="Example:  adept expand config.yaml   ·   adept expand MODEL OUT --layers 12,17")
def expand(
    target: TargetArg,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[OUT | KEY=VALUE...]", help="with MODEL: the new directory")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="source layers to copy, for example 12,17 (with MODEL)")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be written (with MODEL)")] = False,
    as_json: JsonOption = False,
) -> None:
    """Insert identity copies of layers: the expanded model computes exactly the same function."""
    import dataclasses

    if Path(target).is_dir():
        out = _only_argument(arguments, "OUT")
        selected = _parse_layers(layers)
        source = resolve_model_dir("MODEL", target)
        check_layers(source, selected)
        if dry_run:
            with _quiet(as_json) as terminal:
                from adept_ds.cli.summary import print_expansion
                from adept_ds.weights.expansion import describe_expansion

                facts = describe_expansion(source, out, selected)
                _show(terminal, as_json, facts, lambda: print_expansion(facts, terminal))
            return
        with _quiet(as_json) as terminal, terminal.progress("expanding") as bar:
            from adept_ds.weights.expansion import expand_checkpoint

            expansion = expand_checkpoint(source, out, selected, bar)
            _show(terminal, as_json, dataclasses.asdict(expansion), lambda: terminal.say(f"expanded model in {out}"))
        return
    if dry_run:
        raise InputError("--dry-run goes with MODEL and OUT; `adept show CONFIG` says what a run would do")
    settings = load_config(Path(target), arguments or [])
    check_model(settings)
    with _session(settings, as_json=as_json) as session:
        from adept_ds.run.stages import expand_stage

        expansion = expand_stage(session)
        _show(session.terminal, as_json, dataclasses.asdict(expansion))


@app.command(epilog="Example:  adept verify MODEL EXPANDED")
def verify(
    source: Annotated[Path, typer.Argument(metavar="MODEL", help="the model that was expanded")],
    expanded: Annotated[Path, typer.Argument(metavar="EXPANDED", help="what was made from it")],
    logits: Annotated[
        bool | None, typer.Option("--logits/--no-logits", help="compare logits too; by default, where memory allows")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove that an expanded model is its source: tensor by tensor, and by logits on random tokens."""
    import dataclasses

    for name, directory in (("MODEL", source), ("EXPANDED", expanded)):
        check_model_dir(name, directory)
    with _quiet(as_json) as terminal, terminal.progress("comparing") as bar:
        from adept_ds.weights.verification import verify_expansion

        found = verify_expansion(source, expanded, bar, logits=logits)
        how = "logits equal bit for bit" if found.logits else "logits not compared"
        text = f"{found.tensors} tensors are what they must be ({found.num_bytes / 2**30:.2f} GiB), {how}"
        _show(terminal, as_json, dataclasses.asdict(found), lambda: terminal.say(text))


@app.command(epilog="Example:  deepspeed --module adept_ds train config.yaml")
def train(config: ConfigArg, overrides: OverridesArg = None) -> None:
    """Train the copies of an expanded model, from the newest checkpoint if there is one."""
    settings = load_config(config, overrides or [])
    ranks = ranks_from_environment(os.environ)
    check_run(settings, ranks.world_size)
    with _session(settings, ranks) as session:
        from adept_ds.run.stages import train_stage

        train_stage(session)


@app.command("eval", epilog="Example:  adept eval config.yaml --json   ·   adept eval MODEL --text heldout.jsonl")
def evaluate(
    target: TargetArg,
    overrides: OverridesArg = None,
    text: Annotated[list[Path] | None, typer.Option(help="held-out text (with MODEL)")] = None,
    seq_len: Annotated[int, typer.Option(help="tokens per block (with MODEL)")] = 1024,
    as_json: JsonOption = False,
) -> None:
    """Held-out loss: of the base and the adapted model of a run, or of one model directory."""
    is_model = Path(target).is_dir()
    tree: dict[str, Any] = {"data": {"domain_eval": [str(path) for path in text or []], "seq_len": seq_len}}
    settings = _config_or_model(target, overrides, tree)
    check_model(settings)
    check_deepspeed_config(settings)
    if is_model or settings.data.domain_eval or not settings.data.general_eval:
        check_files("--text" if is_model else "data.domain_eval", settings.data.domain_eval)
    if settings.data.general_eval:
        check_files("data.general_eval", settings.data.general_eval)
    with _session(settings, as_json=as_json) as session:
        from adept_ds.cli.summary import print_losses
        from adept_ds.run.stages import eval_stage, evaluate_model

        if is_model:
            results = {"model": {"text": evaluate_model(session, session.model_dir, "evaluating")["domain"]}}
        else:
            results = eval_stage(session)
        _show(session.terminal, as_json, results, lambda: print_losses(results, session.terminal))


@app.command(
    epilog="Example:  adept export config.yaml   ·   adept export run/checkpoints/step_100 OUT --base run/expanded"
)
def export(
    target: Annotated[str, typer.Argument(metavar="CONFIG|CHECKPOINT")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[OUT | KEY=VALUE...]", help="with CHECKPOINT: the new directory")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="expanded model it was trained from (with CHECKPOINT)")] = None,
    dtype: Annotated[str, typer.Option(help="source, float32 or bfloat16 (with CHECKPOINT)")] = "source",
    step: Annotated[int | None, typer.Option(help="which checkpoint (with CONFIG; the newest)")] = None,
) -> None:
    """Turn a training checkpoint into a Hugging Face directory."""
    if Path(target).is_dir():
        out = _only_argument(arguments, "OUT")
        if base is None:
            raise InputError("--base is missing; give the expanded model that the checkpoint was trained from")
        if dtype not in ("source", "float32", "bfloat16"):
            raise InputError(f"--dtype: '{dtype}' is not possible; use source, float32 or bfloat16")
        check_model_dir("--base", base)
        with _quiet() as terminal, terminal.progress("exporting") as bar:
            from adept_ds.weights.export import export_checkpoint

            trained = export_checkpoint(base, Path(target), out, dtype, bar)
            terminal.say(f"{trained} trained tensors; model in {out}")
        return
    settings = load_config(Path(target), arguments or [])
    check_model(settings)
    with _session(settings) as session:
        from adept_ds.run.stages import export_stage

        export_stage(session, step)


@app.command(epilog="Example:  adept report config.yaml   ·   adept report runs/math")
def report(target: Annotated[Path, typer.Argument(metavar="CONFIG|RUN_DIR")], overrides: OverridesArg = None) -> None:
    """Write report.html from what a run has written so far."""
    from adept_ds.report.page import write_report

    run_dir = target if target.is_dir() else load_config(target, overrides or []).run_dir
    Terminal(sys.stdout).say(str(write_report(run_dir)))


@app.command(epilog="Example:  adept show config.yaml train.lr=1e-4")
def show(config: ConfigArg, overrides: OverridesArg = None, as_json: JsonOption = False) -> None:
    """The resolved configuration, and what `adept run` would do."""
    settings = load_config(config, overrides or [])
    check_run(settings, ranks_from_environment(os.environ).world_size)
    from adept_ds.cli.summary import describe_plan

    plan = describe_plan(settings)
    tree = settings.model_dump(mode="json")
    terminal = Terminal(sys.stdout)
    _show(
        terminal, as_json, {"config": tree, "plan": plan}, lambda: terminal.say(dump_config(settings) + "\n".join(plan))
    )


delta_app = typer.Typer(
    help="Delta packages: the copies of a domain alone, to ship, apply and remove (docs/deltas.md).",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


app.add_typer(delta_app, name="delta")


NewArg = Annotated[Path, typer.Argument(metavar="OUT", help="the new directory")]


@delta_app.command(
    "pack",
    epilog="Example:  adept delta pack runs/math math   ·   adept delta pack ADAPTED law --only law --json",
)
def delta_pack(
    source: Annotated[Path, typer.Argument(metavar="RUN|ADAPTED", help="a run directory, or an adapted model")],
    out: NewArg,
    name: Annotated[str | None, typer.Option(help="what to call the delta; by default as RUN or ADAPTED")] = None,
    only: Annotated[str | None, typer.Option(help="which delta, where several were applied")] = None,
    base: Annotated[Path | None, typer.Option(help="make sure that this model is the base")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write only the copies, and a manifest that says which base they belong to."""
    with _quiet(as_json) as terminal, terminal.progress("packing") as bar:
        from adept_ds.deltas.operations import pack_delta
        from adept_ds.deltas.package import TENSORS_NAME

        manifest = pack_delta(source, out, name=name, only=only, base=base, progress=bar)
        facts = manifest.model_dump(mode="json", exclude={"tensors"}) | {"fingerprint": manifest.fingerprint}
        layers, size = ", ".join(map(str, manifest.sources)), (out / TENSORS_NAME).stat().st_size / 2**20
        text = f"delta '{manifest.name}' in {out}: copies of layers {layers}, {size:.1f} MiB"
        _show(terminal, as_json, facts, lambda: terminal.say(text))


@delta_app.command(
    "apply", epilog="Example:  adept delta apply MODEL math OUT   ·   adept delta apply MODEL math law OUT --json"
)
def delta_apply(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="the model that was expanded")],
    deltas: Annotated[list[Path], typer.Argument(metavar="DELTA...", help="packages; of one layer, first is lowest")],
    out: NewArg,
    as_json: JsonOption = False,
) -> None:
    """Rebuild the adapted model bit for bit, or put several domains over one base."""
    import dataclasses

    with _quiet(as_json) as terminal, terminal.progress("applying") as bar:
        from adept_ds.deltas.operations import apply_deltas

        expansion = apply_deltas(base, deltas, out, bar)
        where = "; ".join(f"{delta.name} at {', '.join(map(str, delta.copies))}" for delta in expansion.deltas)
        text = f"{expansion.source_layers} + {len(expansion.copies)} layers in {out}: {where}"
        _show(terminal, as_json, dataclasses.asdict(expansion), lambda: terminal.say(text))


@delta_app.command("strip", epilog="Example:  adept delta strip ADAPTED OUT --json")
def delta_strip(
    adapted: Annotated[Path, typer.Argument(metavar="ADAPTED", help="a model with copies")],
    out: NewArg,
    as_json: JsonOption = False,
) -> None:
    """Give the base back, byte for byte."""
    import dataclasses

    with _quiet(as_json) as terminal, terminal.progress("stripping") as bar:
        from adept_ds.deltas.operations import strip_deltas

        found = strip_deltas(adapted, out, bar)
        text = f"base in {out}: {len(found.files)} weight files, {found.num_bytes / 2**20:.1f} MiB"
        text += f", fingerprint {found.fingerprint}"
        _show(terminal, as_json, dataclasses.asdict(found), lambda: terminal.say(text))


@app.command()
def version() -> None:
    """The version of adept-ds."""
    typer.echo(__version__)


@contextmanager
def _session(config: Config, ranks: Ranks | None = None, *, as_json: bool = False) -> Iterator[Run]:
    """Ranks joined, output diverted, model resolved: everything that a stage needs."""
    ranks = ranks or ranks_from_environment(os.environ)
    log = config.run_dir / "logs" / f"rank_{ranks.rank}.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"run_dir: '{config.run_dir}' cannot be written ({error.strerror}); choose another") from None
    with capture_output(log, is_main=ranks.is_main) as terminal, _keep_trace(log), StopRequest().listening() as stop:
        _tame_libraries()
        if as_json:
            terminal.mute()
        with terminal.console.status("starting"):
            init_distributed(ranks, config.dist_timeout_minutes)
            from adept_ds.run.stages import Run
        model_dir = resolve_model_dir("model", config.model)
        family: Family = family_of(model_dir)
        yield Run(config, model_dir, family, terminal, stop)
        # Not after an error: leaving the group would wait for peers that wait for this rank.
        shutdown()


@contextmanager
def _quiet(as_json: bool = False) -> Iterator[Terminal]:
    """For commands on plain directories: one process, libraries' chatter to a temporary file."""
    with tempfile.TemporaryDirectory() as folder, capture_output(Path(folder) / "log", is_main=True) as terminal:
        _tame_libraries()
        if as_json:
            terminal.mute()
        yield terminal


@contextmanager
def _keep_trace(log: Path) -> Iterator[None]:
    """The traceback of an unexpected error belongs into the log as well as on the terminal."""
    try:
        yield
    except AdeptError:
        raise
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        raise


def _tame_libraries() -> None:
    """After installation nothing touches the network unless the user allows it; the log keeps what libraries say."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.captureWarnings(True)


def _config_or_model(target: str, overrides: list[str] | None, tree: dict[str, Any]) -> Config:
    """The configuration file, or one made up for a plain model directory."""
    if not Path(target).is_dir():
        return load_config(Path(target), overrides or [])
    if overrides:
        raise InputError(f"'{overrides[0]}' changes a configuration, but '{target}' is a model; use options (--help)")
    scratch = Path(tempfile.gettempdir()) / f"adept_ds_{os.getuid()}"
    return parse_config(tree | {"model": target, "run_dir": str(scratch)}, "options")


def _only_argument(arguments: list[str] | None, name: str) -> Path:
    if not arguments or len(arguments) != 1:
        raise InputError(f"{name} is missing; give the directory to write as the second argument")
    return Path(arguments[0])


def _parse_number(option: str, text: str) -> int:
    """Typer's own complaint about a number would not repeat what was given."""
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{option}: '{text}' is no whole number; write for example {option} 4 (see --help)") from None


def _parse_layers(text: str | None) -> list[int]:
    try:
        return sorted({int(part) for part in (text or "").split(",")})
    except ValueError:
        raise InputError(f"--layers: '{text or ''}' is no list of layers; write for example --layers 12,17") from None


def _show(terminal: Terminal, as_json: bool, result: Any, as_text: Callable[[], None] | None = None) -> None:
    if as_json:
        terminal.console.print_json(json.dumps(result))
    elif as_text is not None:
        as_text()


def _complain(message: str, *, every_rank: bool = False) -> None:
    """One line on stderr; by default once per host, so that a launcher's ranks do not repeat each other."""
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    if every_rank or local_rank == "0":
        prefix = f"adept[rank {rank}]" if every_rank and os.environ.get("WORLD_SIZE", "1") != "1" else "adept"
        print(f"{prefix}: {message}", file=sys.stderr, flush=True)  # noqa: T201


def _is_usage_error(error: Exception) -> bool:
    return hasattr(error, "format_message") and hasattr(error, "exit_code")
