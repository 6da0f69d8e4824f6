"""Commands with two forms: on a configuration, or on a plain directory. They are told apart here, once.

    either(on_config, on_directory)

is a command whose first argument is CONFIG or a directory. It has the options of both functions; one that belongs to
the other form is refused, instead of having no effect.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from adept_ds.base.errors import InputError
from adept_ds.config.loading import load_config
from adept_ds.config.schema import Config

OutArg = Annotated[Path, typer.Argument(metavar="OUT", help="the new directory")]
ConfigArg = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration")]
OverridesArg = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides, dotted: train.lr=1e-4")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="replace what the same command wrote to OUT before")]
JsonOption = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


def either(
    on_config: Callable[..., None], on_directory: Callable[..., None], *, directory: str = "MODEL"
) -> Callable[..., None]:
    """A function for Typer that has the parameters of both, and calls the one that fits its first argument.

    Args:
        on_config: takes a checked configuration first, then options.
        on_directory: takes the path of a directory first, then OUT if it is declared as `OutArg`, then options.
        directory: what the directory is, in messages and help.
    """
    forms = {True: _parameters(on_directory), False: _parameters(on_config)}
    takes_out = "out" in forms[True] and forms[True]["out"].annotation is OutArg
    options = {name: p for form in (False, True) for name, p in forms[form].items() if p.annotation is not OutArg}

    def command(ctx: typer.Context, target: str, arguments: list[str] | None = None, **given: Any) -> None:
        is_directory = _leads_to_directory(target, directory)
        chosen, arguments = forms[is_directory], arguments or []
        for name in given.keys() - chosen.keys():
            source = ctx.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                option = next(parameter.opts[0] for parameter in ctx.command.params if parameter.name == name)
                raise InputError(_misplaced(option, target, directory, is_directory))
        fitting = {name: value for name, value in given.items() if name in chosen}
        if not is_directory:
            on_config(load_config(Path(target), arguments), **fitting)
        elif takes_out and not (arguments and _is_override(arguments[0])):
            on_directory(Path(target), _only_argument(arguments), **fitting)
        elif arguments:
            raise InputError(f"'{arguments[0]}' changes a configuration, but '{target}' is a directory; use options")
        else:
            on_directory(Path(target), **fitting)

    second = "[OUT | KEY=VALUE]..." if takes_out else "[KEY=VALUE]..."
    text = f"with {directory}: the new directory; with CONFIG: overrides" if takes_out else "with CONFIG: overrides"
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    target = Annotated[str, typer.Argument(metavar=f"CONFIG|{directory}", help="YAML configuration, or a directory")]
    rest = Annotated[list[str] | None, typer.Argument(metavar=second, help=text)]
    parameters = [
        inspect.Parameter("ctx", kind, annotation=typer.Context),
        inspect.Parameter("target", kind, annotation=target),
        inspect.Parameter("arguments", kind, annotation=rest, default=None),
        *options.values(),
    ]
    return _declared(command, parameters, on_config.__doc__)


def _leads_to_directory(target: str, directory: str) -> bool:
    """Raises `InputError`: there is nothing that `target` leads to."""
    try:
        if Path(target).exists():
            return Path(target).is_dir()
        reason = "no such configuration file or directory"
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    shown = target if len(target) <= 200 else f"{target[:197]}..."
    raise InputError(f"{shown}: {reason}; give a YAML file, or {directory}")


def _declared(
    command: Callable[..., None], parameters: list[inspect.Parameter], text: str | None
) -> Callable[..., None]:
    """The command as Typer shall see it."""
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = text
    return command


def _parameters(form: Callable[..., None]) -> dict[str, inspect.Parameter]:
    """By name, with real annotations; without the first, which is the configuration or the directory."""
    hints = typing.get_type_hints(form, include_extras=True)
    _, *parameters = inspect.signature(form).parameters.values()
    return {parameter.name: parameter.replace(annotation=hints[parameter.name]) for parameter in parameters}


def _misplaced(option: str, target: str, directory: str, is_directory: bool) -> str:
    if is_directory:
        return f"{option} goes with CONFIG, but '{target}' is a directory; leave it out"
    return (
        f"{option} goes with {directory}, but '{target}' is a configuration; leave it out, or override a key of it "
        "(`adept show CONFIG` lists them)"
    )


def _is_override(argument: str) -> bool:
    """Or it would name the directory that is written."""
    key, equals, _ = argument.partition("=")
    return bool(equals) and key.split(".")[0] in Config.model_fields


def _only_argument(arguments: list[str]) -> Path:
    if not arguments:
        raise InputError("OUT is missing; give the directory to write as the second argument")
    if len(arguments) > 1:
        raise InputError(f"'{arguments[1]}' is one argument too many; after a directory comes OUT, then options")
    return Path(arguments[0])


def on_config_only(form: Callable[..., None]) -> Callable[..., None]:
    """A command on a configuration alone: `form` takes it checked, then options."""
    options = _parameters(form)

    def command(config: Path, overrides: list[str] | None = None, **given: Any) -> None:
        form(load_config(config, overrides or []), **given)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [
        inspect.Parameter("config", kind, annotation=ConfigArg),
        inspect.Parameter("overrides", kind, annotation=OverridesArg, default=None),
        *options.values(),
    ]
    return _declared(command, parameters, form.__doc__)
