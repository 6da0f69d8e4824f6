"""Commands with two forms: what goes with the other form is refused in one line, never without effect."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from harness.complaints import files_under, refused
from harness.fresh_process import run_fresh
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.cli import model_files, run
from adept_ds.cli.forms import JsonOption, OutArg, either
from adept_ds.config.schema import Config

WITH_DIRECTORY: dict[str, dict[str, str | None]] = {
    "probe": {
        "--corpus": "general.jsonl",
        "-k": "4",
        "--sequences": "32",
        "--seq-len": "256",
        "--work-dir": "work",
    },
    "expand": {"--layers": "1", "--dry-run": None, "--overwrite": None},
    "eval": {"--text": "heldout.jsonl", "--seq-len": "1024", "--work-dir": "work"},
    "export": {"--base": "expanded", "--dtype": "source", "--overwrite": None},
    "report": {},
}
"""Of each command with two forms, the options that go with a directory alone. Where there is a default, it is given:
an option that was typed is refused whatever it says."""

WITH_CONFIG: dict[str, dict[str, str | None]] = {
    "probe": {},
    "expand": {},
    "eval": {},
    "export": {"--step": "3"},
    "report": {},
}
"""The same of a configuration."""

FORMS: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    "probe": (run.probe, model_files.probe),
    "expand": (run.expand, model_files.expand),
    "eval": (run.evaluate, model_files.evaluate),
    "export": (run.export, model_files.export),
    "report": (run.report, model_files.report),
}


def given(table: dict[str, dict[str, str | None]]) -> list[Any]:
    return [
        pytest.param(command, [option] if value is None else [option, value], id=f"{command} {option}")
        for command, options in table.items()
        for option, value in options.items()
    ]


@pytest.mark.parametrize(("command", "option"), given(WITH_DIRECTORY))
def test_an_option_for_directories_is_refused_with_a_configuration(
    command: str, option: list[str], workspace: Workspace, tmp_path: Path
) -> None:
    config = workspace.config(tmp_path / "run")
    before = files_under(tmp_path)
    refused([command, config, *option], [f"adept: {option[0]} goes with", str(config), "leave it out"])
    refused([command, *option, config], [f"adept: {option[0]} goes with"])
    assert files_under(tmp_path) == before


@pytest.mark.parametrize(("command", "option"), given(WITH_CONFIG))
def test_an_option_for_configurations_is_refused_with_a_directory(
    command: str, option: list[str], workspace: Workspace, tmp_path: Path
) -> None:
    arguments = [command, workspace.model, tmp_path / "out", "--base", workspace.model, *option]
    refused(arguments, [f"adept: {option[0]} goes with CONFIG", str(workspace.model), "leave it out"])
    assert files_under(tmp_path) == set()


@pytest.mark.parametrize("command", FORMS)
def test_every_option_of_one_form_alone_stands_in_these_tables(command: str) -> None:
    on_config, on_directory = (inspect.signature(form).parameters for form in FORMS[command])
    alone = {"directory": set(on_directory) - set(on_config), "config": set(on_config) - set(on_directory)}
    first = {"config", "model", "checkpoint", "run_dir", "out"}  # the positional arguments
    for table, form in ((WITH_DIRECTORY, "directory"), (WITH_CONFIG, "config")):
        names = {option.lstrip("-").replace("-", "_") for option in table[command]}
        assert names == alone[form] - first, form


@pytest.mark.parametrize("command", FORMS)
def test_overrides_are_refused_with_a_directory(command: str, workspace: Workspace) -> None:
    """Even where one could be taken for the directory to write."""
    for override in ("train.lr=1", "model=other"):
        words = [f"'{override}' changes a configuration", str(workspace.model), "use options"]
        refused([command, workspace.model, override], words)


@pytest.mark.parametrize(
    "arguments", [["expand", "{model}", "{out}", "--layers", "1"], ["export", "{model}", "{out}", "--base", "{model}"]]
)
class TestOut:
    """The directory that is written is the second argument, and the last one."""

    def arguments(self, workspace: Workspace, arguments: list[str], out: list[str]) -> list[str]:
        filled = []
        for argument in arguments:
            filled += out if argument == "{out}" else [argument.format(model=workspace.model)]
        return filled

    def test_out_is_missing(self, arguments: list[str], workspace: Workspace) -> None:
        refused(self.arguments(workspace, arguments, []), ["OUT is missing", "second argument"])

    @pytest.mark.parametrize("second", ["{out}/second", "train.lr=1"])
    def test_out_is_given_twice(self, arguments: list[str], second: str, workspace: Workspace, tmp_path: Path) -> None:
        """Or followed by an override, which has nothing to override."""
        second = second.format(out=tmp_path)
        refused(
            self.arguments(workspace, arguments, [str(tmp_path / "first"), second]),
            [f"'{second}' is one argument too many", "OUT"],
        )
        assert files_under(tmp_path) == set()


@pytest.mark.parametrize("command", FORMS)
def test_a_target_that_does_not_exist_is_named_as_a_missing_configuration(command: str, tmp_path: Path) -> None:
    target = tmp_path / "nothing"
    refused([command, target], [f"{target}: no such configuration", "give"])
    for option, value in (WITH_DIRECTORY[command] | WITH_CONFIG[command]).items():
        words = [option] if value is None else [option, value]
        refused([command, target, *words], [f"{target}: no such configuration", "give"])


def test_a_wrong_option_is_refused_before_anything_heavy(workspace: Workspace, tmp_path: Path) -> None:
    ended = run_fresh("probe", workspace.config(tmp_path / "run"), "--corpus", "x.jsonl")
    assert (ended.code, ended.loaded) == (2, set())


# --- either, with forms of its own ---------------------------------------------------------------------------------


def app_of(seen: list[Any], command: Callable[..., None]) -> Callable[[list[str]], list[Any]]:
    app = typer.Typer()
    app.command()(command)

    def call(arguments: list[str]) -> list[Any]:
        seen.clear()
        app(arguments, standalone_mode=False)
        return list(seen)

    return call


def test_each_form_gets_its_own_options_with_their_defaults(workspace: Workspace, tmp_path: Path) -> None:
    seen: list[Any] = []

    def on_config(config: Config, step: Annotated[int, typer.Option()] = 7, as_json: JsonOption = False) -> None:
        seen.extend([config.train.steps, step, as_json])

    def on_directory(
        model: Path, out: OutArg, layers: Annotated[str, typer.Option()] = "1", as_json: JsonOption = False
    ) -> None:
        seen.extend([model, out, layers, as_json])

    call = app_of(seen, either(on_config, on_directory))
    config, model = str(workspace.config(tmp_path / "run")), str(workspace.model)
    assert call([config]) == [7, 7, False]
    assert call([config, "train.steps=9", "--step", "2", "--json"]) == [9, 2, True]
    assert call([model, "out"]) == [workspace.model, Path("out"), "1", False]
    assert call(["--json", model, "out", "--layers", "3,4"]) == [workspace.model, Path("out"), "3,4", True]
    with pytest.raises(InputError, match="--layers goes with MODEL"):
        call([config, "--layers", "1"])
    with pytest.raises(InputError, match="--step goes with CONFIG"):
        call([model, "out", "--step", "7"])


@pytest.mark.parametrize("command", FORMS)
def test_an_option_of_both_forms_is_the_same_in_both(command: str) -> None:
    """There is one help text and one default for it."""
    on_config, on_directory = (inspect.signature(form, eval_str=True).parameters for form in FORMS[command])
    shared = on_config.keys() & on_directory.keys()
    for name in shared:
        assert on_config[name].annotation is on_directory[name].annotation, name
        assert on_config[name].default == on_directory[name].default, name
