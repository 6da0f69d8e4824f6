"""The commands on plain directories: a model, an expanded model, a checkpoint."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from adept_ds.base.dial_record import label_of
from adept_ds.base.errors import InputError
from adept_ds.base.outputs import check_output
from adept_ds.base.terminal import Terminal
from adept_ds.cli.dial import AlphaOption, parse_alphas
from adept_ds.cli.evaluation_tables import print_evaluation
from adept_ds.cli.forms import JsonOption, OutArg, OverwriteOption
from adept_ds.cli.options import (
    LmEvalOption,
    MethodOption,
    ResultOption,
    TasksOption,
    check_result_file,
    tasks_section,
)
from adept_ds.cli.probe import probe_and_show
from adept_ds.cli.session import passing_session, quiet_session, show
from adept_ds.cli.summary import print_expansion
from adept_ds.config.checks import check_files, check_layers
from adept_ds.config.loading import parse_config
from adept_ds.config.resolved import resolve
from adept_ds.config.schema import Config
from adept_ds.models.directory import ModelDirectory, check_model_dir
from adept_ds.ranks.launchers import rank_from_environment
from adept_ds.report.presence import check_something_to_report
from adept_ds.run.prerequisites import check_texts

WorkDirOption = Annotated[
    Path | None,
    typer.Option(help="where packed text lies meanwhile; all hosts must see it (with MODEL)"),
]


def probe(
    model: Path,
    corpus: Annotated[list[Path] | None, typer.Option(help="general-competence corpus (with MODEL)")] = None,
    k: Annotated[str, typer.Option("-k", help="layers to choose, or auto (with MODEL)")] = "4",
    method: MethodOption = None,
    sequences: Annotated[int, typer.Option(help="sequences to probe (with MODEL)")] = 32,
    seq_len: Annotated[int, typer.Option(help="tokens of each (with MODEL)")] = 256,
    out: ResultOption = None,
    work_dir: WorkDirOption = None,
    as_json: JsonOption = False,
) -> None:
    section = {"corpus": [str(path) for path in corpus or []], "sequences": sequences, "seq_len": seq_len}
    if method not in (None, "all"):
        section["method"] = method
    config = _config(model, probe=section, expand={"k": k if k == "auto" else _parse_number("-k", k)})
    check_result_file(out)
    check_files("--corpus", corpus or [])
    launched = rank_from_environment(os.environ)
    settings = resolve(config, "probe", launched.world_size)
    check_texts(config, "probe")
    with passing_session(settings, launched, work_dir or (out and out.parent), as_json=as_json) as session:
        probe_and_show(session, method, out, as_json)


def expand(
    model: Path,
    out: OutArg,
    layers: Annotated[str | None, typer.Option(help="source layers to copy, for example 12,17 (with MODEL)")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be written (with MODEL)")] = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    selected = parse_layers(layers)
    check_layers(selected, ModelDirectory.resolve("MODEL", str(model)))
    with quiet_session(as_json) as terminal:
        from adept_ds.weights.expansion import describe_expansion, expand_checkpoint

        if dry_run:
            facts = describe_expansion(model, out, selected, overwrite=overwrite)
            show(terminal, as_json, facts, lambda: print_expansion(facts, terminal))
            return
        with terminal.progress("expanding") as bar:
            expansion = expand_checkpoint(model, out, selected, bar, overwrite=overwrite)
        show(terminal, as_json, expansion.to_json(), lambda: terminal.say(f"expanded model in {out}"))


def verify(
    source: Annotated[Path, typer.Argument(metavar="MODEL", help="the model that was expanded")],
    expanded: Annotated[Path, typer.Argument(metavar="EXPANDED", help="what was made from it")],
    logits: Annotated[
        bool | None, typer.Option("--logits/--no-logits", help="compare logits too; by default, where memory allows")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove that an expanded model is its source: tensor by tensor, and by logits on random tokens."""
    for name, directory in (("MODEL", source), ("EXPANDED", expanded)):
        check_model_dir(name, directory)
    with quiet_session(as_json) as terminal:
        from adept_ds.weights.verification import verify_expansion

        with terminal.progress("comparing") as bar:
            found = verify_expansion(source, expanded, bar, logits=logits)
        how = "logits equal bit for bit" if found.logits else "logits not compared"
        text = f"{found.tensors} tensors are what they must be ({found.num_bytes / 2**30:.2f} GiB), {how}"
        show(terminal, as_json, dataclasses.asdict(found), lambda: terminal.say(text))


def evaluate(
    model: Path,
    text: Annotated[list[Path] | None, typer.Option(help="held-out text (with MODEL)")] = None,
    tasks: TasksOption = None,
    lm_eval: LmEvalOption = None,
    seq_len: Annotated[int, typer.Option(help="tokens per sequence (with MODEL)")] = 1024,
    work_dir: WorkDirOption = None,
    as_json: JsonOption = False,
) -> None:
    asked = tasks_section(tasks, lm_eval)
    config = _config(model, data={"domain_eval": [str(path) for path in text or []], "seq_len": seq_len}, eval=asked)
    if text or not asked:
        check_files("--text", text or [])
    launched = rank_from_environment(os.environ)
    settings = resolve(config, "eval", launched.world_size)
    check_texts(config, "eval")
    with passing_session(settings, launched, work_dir, as_json=as_json) as session:
        from adept_ds.run.evaluate import evaluate_model
        from adept_ds.run.score_tasks import score_model

        results: dict[str, Any] = {}
        if text:
            results["model"] = {"text": evaluate_model(session, settings.model, "evaluating")["domain"].to_json()}
        if asked:
            (scores,) = score_model(session, settings.model, "the model")
            results["tasks"] = {"model": scores}
        show(session.terminal, as_json, results, lambda: print_evaluation(results, session.terminal))


def export(
    checkpoint: Path,
    out: OutArg,
    base: Annotated[
        Path | None,
        typer.Option(help="model it was trained from (with CHECKPOINT, or ADAPTED without copies)"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="source, float32 or bfloat16 (with CHECKPOINT)")] = "source",
    alpha: AlphaOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    alphas = parse_alphas(alpha)
    if (checkpoint / "config.json").is_file():
        _export_turned(checkpoint, out, alphas, base, dtype, overwrite=overwrite)
        return
    if alphas is not None:
        raise InputError(
            f"--alpha: '{checkpoint}' is no adapted model; export the checkpoint without it, and turn what comes out: "
            f"adept export OUT TURNED --alpha {alpha}"
        )
    if base is None:
        raise InputError("--base is missing; give what the checkpoint was trained from: run_dir/expanded, or the base")
    if dtype not in ("source", "float32", "bfloat16"):
        raise InputError(f"--dtype: '{dtype}' is not possible; use source, float32 or bfloat16")
    check_model_dir("--base", base)
    check_output(out, "export", {"CHECKPOINT": checkpoint, "--base": base}, overwrite=overwrite)  # before torch
    with quiet_session() as terminal:
        from adept_ds.run.export import export_learned

        with terminal.progress("exporting") as bar:
            trained = export_learned(base, checkpoint, out, dtype, bar, overwrite=overwrite)
        terminal.say(f"{trained} trained tensors; model in {out}")


def _export_turned(
    adapted: Path, out: Path, alphas: list[float] | None, base: Path | None, dtype: str, *, overwrite: bool
) -> None:
    if alphas is None:
        raise InputError(f"--alpha is missing; '{adapted}' is a model, no checkpoint: say how far it is turned up")
    if dtype != "source":
        raise InputError(f"--dtype: {dtype} has no effect on an adapted model, which keeps its own; leave it out")
    for name, directory in {"ADAPTED": adapted, **({"--base": base} if base else {})}.items():
        check_model_dir(name, directory)
    with quiet_session() as terminal:
        from adept_ds.weights.turning import write_turned

        with terminal.progress("turning") as bar:
            positions = write_turned(adapted, out, alphas, base, bar, overwrite=overwrite)
        terminal.say(f"at alpha {label_of(positions)}; model in {out}")


def report(run_dir: Path) -> None:
    check_something_to_report(run_dir)
    from adept_ds.report.page import write_report

    Terminal(sys.stdout).say(str(write_report(run_dir)))


def _config(model: Path, **sections: Any) -> Config:
    """What the options say, as a configuration; its run directory is never used (see `passing_session`)."""
    return parse_config(sections | {"model": str(model), "run_dir": os.devnull}, "options")


def _parse_number(option: str, text: str) -> int:
    """Typer's own complaint about a number would not repeat what was given."""
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{option}: '{text}' is no whole number; write for example {option} 4 (see --help)") from None


def parse_layers(text: str | None) -> list[int]:
    """'12,17', ascending, each once. Raises `InputError`: it is none."""
    try:
        return sorted({int(part) for part in (text or "").split(",")})
    except ValueError:
        raise InputError(f"--layers: '{text or ''}' is no list of layers; write for example --layers 12,17") from None
