"""The key `method`: how the model is adapted. What there is to choose from is found, not listed.

Every file of the package `adept_ds.methods` declares one method: a subclass of `MethodSection` with the keys that it
has. The package lies above this one, since methods do things; so it is looked up by its name.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import BeforeValidator, Discriminator, Tag, TypeAdapter, ValidationError

from adept_ds.base.errors import InputError
from adept_ds.config.method import MethodSection
from adept_ds.config.section import METHOD

METHODS_PACKAGE = "adept_ds.methods"

DEFAULT_METHOD = "adept"


def known_methods() -> dict[str, type[MethodSection]]:
    """All there are, by name: in order, the default first."""
    package = importlib.import_module(METHODS_PACKAGE)
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    modules = [importlib.import_module(f"{METHODS_PACKAGE}.{name}") for name in names]
    found = {kind.model_fields["name"].default: kind for module in modules for kind in _declared_in(module)}
    return dict(sorted(found.items(), key=lambda method: (method[0] != DEFAULT_METHOD, method[0])))


def _declared_in(module: Any) -> Iterator[type[MethodSection]]:
    for _, kind in inspect.getmembers(module, inspect.isclass):
        if not issubclass(kind, MethodSection) or kind.__module__ != module.__name__:
            continue
        if not kind.model_fields["name"].is_required():  # else it is a base of others
            yield kind


_KNOWN = known_methods()


def _with_name(value: Any) -> Any:
    """A word stands for a section with that name alone. Raises `ValueError`: there is no such method."""
    section = {"name": value} if isinstance(value, str) else value
    if isinstance(section, dict):
        name = section.get("name")
        if name is None:
            raise ValueError(f"name is missing: write one of {', '.join(_KNOWN)}")
        if not isinstance(name, str) or name not in _KNOWN:
            raise ValueError(f"{name!r:.100} is no method: choose one of {', '.join(_KNOWN)}")
    return section


def _tag(value: Any) -> str:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return METHOD.format(name if name in _KNOWN else DEFAULT_METHOD)


if TYPE_CHECKING:
    AnyMethod = MethodSection
else:
    _ALTERNATIVES = tuple(Annotated[kind, Tag(METHOD.format(name))] for name, kind in _KNOWN.items())
    # typing.Union, because what it is of is known only now.
    AnyMethod = Annotated[Union[_ALTERNATIVES], Discriminator(_tag), BeforeValidator(_with_name)]  # noqa: UP007


def parse_method(section: Mapping[str, Any], origin: str) -> MethodSection:
    """What a dump of a method's section says.

    Raises:
        InputError: there is no such method, or it has no such keys.
    """
    try:
        parsed: MethodSection = TypeAdapter(AnyMethod).validate_python(dict(section) or DEFAULT_METHOD)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise InputError(f"'{origin}': method: {reason}; use the version of adept-ds that wrote it") from None
    return parsed


def chosen_method(tree: Any) -> type[MethodSection] | None:
    """The method of a configuration; None where what stands there is a mistake."""
    chosen = tree.get("method", DEFAULT_METHOD) if isinstance(tree, dict) else None
    name = chosen.get("name") if isinstance(chosen, dict) else chosen
    return _KNOWN.get(name) if isinstance(name, str) else None


def with_presets(tree: Any) -> Any:
    """A configuration with what its method gives to other sections.

    Raises:
        ValueError: another value stands there.
    """
    method = chosen_method(tree)
    if method is None:
        return tree  # a mistake of its own
    tree, name = dict(tree), method.model_fields["name"].default
    for section, values in method.presets.items():
        given = tree.get(section) or {}
        if not isinstance(given, dict):
            continue
        for key, value in values.items():
            if given.get(key, value) != value:
                raise ValueError(
                    f"{section}.{key}: {given[key]!r:.100} has no place beside method: {name}, which has {value!r} "
                    f"there: remove it, or choose another method"
                )
        if not (section == "expand" and given.get("layers") is not None):  # a list says it all
            tree[section] = dict(values) | given
    return tree
