"""`adept COMMAND` with arguments and files of any kind: exit code 0, or 2 with one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import typer
import yaml
from harness.domains import adapt
from harness.fuzzing import FaultError, Fuzzing, Kind, Sandbox, check_line, judged, mostly_quick, name_of, unchanged
from harness.inprocess import Ended, run_here
from harness.launching import free_port, rank_environment
from harness.made_up_run import make_run
from harness.models import save_tiny_model
from harness.mutations import changed_json, changed_lines, changed_safetensors, changed_yaml, odd_arguments, spoiled
from harness.rank_processes import RankProcess
from harness.workspace import Workspace
from hypothesis import strategies as st

from adept_ds.base.errors import InputError
from adept_ds.deltas.operations import pack_copies
from adept_ds.weights.expansion import expand_checkpoint

COMMANDS = {
    "show": ["show", "{inputs}/run.yaml", "train.lr=1e-4", "--json"],
    "run": ["run", "{inputs}/run.yaml", "train.steps=3"],
    "probe": ["probe", "{inputs}/run.yaml", "--method", "all", "--out", "{out}/result.json"],
    "probe MODEL": ["probe", "{inputs}/model", "--corpus", "{inputs}/general.jsonl", "-k", "2", "--sequences", "4",
                    "--seq-len", "24", "--json"],
    "expand": ["expand", "{inputs}/run.yaml", "expand.k=null", "expand.layers=[0, 3]"],
    "expand MODEL": ["expand", "{inputs}/base", "{out}/new", "--layers", "0,1", "--json"],
    "expand --dry-run": ["expand", "{inputs}/base", "{out}/new", "--layers", "1", "--dry-run"],
    "verify": ["verify", "{inputs}/base", "{inputs}/expanded", "--no-logits"],
    "train": ["train", "{inputs}/run.yaml"],
    "eval": ["eval", "{inputs}/run.yaml"],
    "eval MODEL": ["eval", "{inputs}/model", "--text", "{inputs}/domain.jsonl", "--seq-len", "32"],
    "export": ["export", "{inputs}/run.yaml", "--step", "4"],
    "export CHECKPOINT": ["export", "{inputs}/run/checkpoints/step_4", "{out}/new", "--base", "{inputs}/math"],
    "report": ["report", "{inputs}/run"],
    "delta pack": ["delta", "pack", "{inputs}/math", "{out}/package", "--name", "math", "--json"],
    "delta apply": ["delta", "apply", "{inputs}/base", "{inputs}/d_math", "{out}/new"],
    "delta strip": ["delta", "strip", "{inputs}/math", "{out}/new", "--overwrite"],
    "version": ["version"],
}  # fmt: skip
"""A valid line of each; those on a run end where their work would begin."""

NOTHING_TO_ACCEPT = {"train", "eval", "export", "export CHECKPOINT"}
"""The made-up run has nothing of what they begin with."""

OPTIONS = (
    *("--json", "--layers", "--out", "--method", "-k", "--base", "--dtype", "--name", "--only", "--text", "--step"),
    *("--corpus", "--work-dir", "--overwrite", "--no-logits", "--seq-len", "--sequences", "--dry-run", "-h"),
    "--local_rank=0",
)


def prepare(sandbox: Sandbox) -> Sandbox:
    inputs = sandbox.inputs
    save_tiny_model(inputs / "base", "llama", num_hidden_layers=2)
    expand_checkpoint(inputs / "base", inputs / "expanded", [0, 1])
    adapt(inputs / "base", inputs / "math", [0, 1], 1)
    pack_copies(inputs / "math", inputs / "d_math", name="math")
    make_run(inputs / "run")
    (inputs / "run" / "checkpoints" / "step_4").mkdir(parents=True)
    (inputs / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    tree = Workspace(inputs).tree(sandbox.out / "run", deepspeed=str(inputs / "zero3.json"))
    (inputs / "run.yaml").write_text(yaml.safe_dump(tree))
    return sandbox


@contextmanager
def where_work_begins() -> Iterator[None]:
    """Commands that load a model are accepted there."""
    with ExitStack() as stack:
        for place in ("adept_ds.cli.run.run_session", "adept_ds.cli.model_files.passing_session"):
            stack.enter_context(mock.patch(place, side_effect=typer.Exit(0)))
        yield


def in_place(sandbox: Sandbox, arguments: list[str]) -> list[str]:
    return [part.replace("{inputs}", str(sandbox.inputs)).replace("{out}", str(sandbox.out)) for part in arguments]


def run(sandbox: Sandbox, arguments: list[str]) -> None:
    """Raises `InputError` with the line that a refusal says."""
    line, here = in_place(sandbox, arguments), here_in(sandbox)

    def work() -> None:
        with where_work_begins():
            judge(run_here(line, here))

    judged(sandbox, work, [sandbox.inputs / "run" / "report.html", sandbox.inputs / "run" / ".report"])


def here_in(sandbox: Sandbox) -> Path:
    """Where commands run. What is above it may be written to as well: an argument may say so."""
    here = sandbox.out / "a" / "b" / "c"
    here.mkdir(parents=True)
    return here


def judge(ended: Ended) -> None:
    """Raises `InputError`: refused as it should be. Raises `FaultError`: ended otherwise."""
    if ended.code == 0:
        return
    if ended.code != 2:
        raise FaultError(f"exit code {ended.code}: {ended.err[-3000:]}")
    if not ended.err and "Usage:" in ended.out:  # without arguments it says which there are
        raise InputError("help")
    check_line(ended.err)
    raise InputError(ended.err.removeprefix("adept: ").removesuffix("\n"))


def arguments_kind(name: str) -> Kind:
    def mutations(inputs: Path) -> st.SearchStrategy[list[str]]:
        return st.one_of(st.just(COMMANDS[name]), *[odd_arguments(COMMANDS[name], OPTIONS)] * 9)

    weight = 0.02 if name == "report" else 0.3
    return Kind(f"adept {name}", mutations, run, ("",), weight, always_refused=name in NOTHING_TO_ACCEPT, messages=2)


CHANGES: dict[str, Callable[[bytes], st.SearchStrategy[bytes]]] = {
    "run.yaml": lambda content: changed_yaml(content, yaml.safe_load(content)),
    "zero3.json": changed_json,
    "general.jsonl": changed_lines,
    "model/config.json": changed_json,
    "model/model.safetensors": changed_safetensors,
    "model/tokenizer.json": changed_json,
    "model/tokenizer_config.json": changed_json,
    "base/config.json": changed_json,
    "base/model.safetensors": changed_safetensors,
    "math/expansion.json": changed_json,
    "expanded/expansion.json": changed_json,
    "expanded/config.json": changed_json,
    "expanded/model.safetensors": changed_safetensors,
    "math/base_files.json": changed_json,
    "math/.adept_output.json": changed_json,
    "d_math/delta.json": changed_json,
    "d_math/delta.safetensors": spoiled,
    "run/layer_importance.json": changed_json,
    "run/metrics.jsonl": changed_lines,
    "run/config.yaml": spoiled,
}
READERS = {
    "show": ("run.yaml", "zero3.json", "general.jsonl",
             "model/config.json", "model/model.safetensors", "model/tokenizer.json"),
    "probe MODEL": ("general.jsonl", "model/config.json", "model/tokenizer.json", "model/tokenizer_config.json"),
    "run": ("run.yaml", "zero3.json", "general.jsonl", "model/config.json"),
    "expand MODEL": ("base/config.json", "base/model.safetensors"),
    "verify": ("base/config.json", "expanded/expansion.json", "expanded/config.json", "expanded/model.safetensors"),
    "delta pack": ("math/expansion.json", "math/base_files.json", "math/.adept_output.json"),
    "delta apply": ("base/config.json", "d_math/delta.json", "d_math/delta.safetensors"),
    "delta strip": ("math/expansion.json", "math/base_files.json", "math/.adept_output.json"),
    "report": ("run/layer_importance.json", "run/metrics.jsonl", "run/config.yaml"),
}  # fmt: skip


@dataclass(frozen=True)
class Changed:
    """A file for a command."""

    file: str
    content: bytes


def changed_file(inputs: Path, file: str) -> st.SearchStrategy[Changed]:
    return CHANGES[file]((inputs / file).read_bytes()).map(partial(Changed, file))


def files_kind(name: str) -> Kind:
    def mutations(inputs: Path) -> st.SearchStrategy[Changed]:
        return st.one_of([changed_file(inputs, file) for file in READERS[name]])

    def read(sandbox: Sandbox, changed: Changed) -> None:
        with sandbox.holding(sandbox.inputs / changed.file, changed.content):
            run(sandbox, COMMANDS[name])

    return Kind(f"adept {name}, on files", mutations, read, ("",), 0.02 if name == "report" else 0.3, messages=2)


# --- in processes of their own -------------------------------------------------------------------------------------

REAL = {
    "probe MODEL": ("general.jsonl", "model/config.json", "model/model.safetensors", "model/tokenizer.json"),
    "eval MODEL": ("model/config.json", "model/model.safetensors", "model/tokenizer_config.json"),
    "expand": ("run.yaml", "model/config.json", "model/model.safetensors"),
    "verify": ("base/config.json", "expanded/expansion.json", "expanded/config.json", "expanded/model.safetensors"),
}


def really_run(sandbox: Sandbox, arguments: list[str]) -> None:
    with unchanged(sandbox):
        environment = rank_environment(0, 1, free_port()) | {"TMPDIR": str(sandbox.temporary)}
        line = ["-m", "adept_ds", *in_place(sandbox, arguments)]
        process = RankProcess(line, environment, here_in(sandbox))
        out, err = process.communicate(timeout=60.0)
    assert process.returncode is not None
    judge(Ended(process.returncode, out, err))


def real_kind(name: str) -> Kind:
    def mutations(inputs: Path) -> st.SearchStrategy[Any]:
        files = [changed_file(inputs, file) for file in REAL[name]]
        return st.one_of(st.just(COMMANDS[name]), odd_arguments(COMMANDS[name], OPTIONS), *files)

    def read(sandbox: Sandbox, given: Any) -> None:
        if isinstance(given, Changed):
            with sandbox.holding(sandbox.inputs / given.file, given.content):
                really_run(sandbox, COMMANDS[name])
        else:
            really_run(sandbox, given)

    return Kind(f"adept {name}, a process", mutations, read, ("",), 0.05, messages=2)


KINDS = [*map(arguments_kind, COMMANDS), *map(files_kind, READERS), *map(real_kind, REAL)]


@pytest.mark.parametrize(
    "kind", mostly_quick(KINDS, "adept report, on files", "adept probe MODEL, a process"), ids=name_of
)
def test_a_command_does_its_work_or_refuses_it_in_one_line(kind: Kind, sandbox: Sandbox, fuzzing: Fuzzing) -> None:
    fuzzing(kind, sandbox)
