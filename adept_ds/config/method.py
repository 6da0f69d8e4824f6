"""The key `method`: how the model is adapted. What there is to choose from is found, not listed.

Every file of the package `adept_ds.methods` declares one method: a subclass of `MethodSection` with the keys that it
has. The package lies above this one, since methods do things; so it is looked up by its name.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Union

from pydantic import (
    BeforeValidator,
    Discriminator,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    Tag,
    TypeAdapter,
    ValidationError,
    model_serializer,
)

from adept_ds.base.errors import InputError
from adept_ds.config.section import METHOD, Section

if TYPE_CHECKING:
    from adept_ds.config.schema import Config
    from adept_ds.models.directory import ModelDirectory

METHODS_PACKAGE = "adept_ds.methods"

DEFAULT_METHOD = "adept"

EVERY_KEY = "every key"
"""Context of a dump that shall be a section even where a word would do."""

_SECTIONS_OF_SOME = ("expand", "importance", "lr_policy")
"""Sections that only some methods look at."""


class MethodSection(Section):
    """Base of all methods' keys; see `methods.shape.Method` for what else a method is."""

    name: str
    """Of the method; each restricts it to its own."""

    sections: ClassVar[frozenset[str]] = frozenset()
    """Which of `expand`, `importance` and `lr_policy` it looks at."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"lr_policy": {"map": "constant"}}
    """Values that it gives to keys of other sections, by section; no others may be given there."""
    needs_general_text: ClassVar[bool] = False
    """Whether it reads `probe.corpus` for more than choosing layers."""
    replays: ClassVar[bool] = False
    """Whether it cannot do without `data.replay`."""

    def check(self, config: Config) -> None:
        """Raises `ValueError`, in one line with the key, the value and the remedy: it cannot work with the rest."""

    def check_model(self, model: ModelDirectory) -> None:
        """Raises `InputError`: it cannot work with this model. Reads headers alone."""

    @property
    def chooses_layers(self) -> bool:
        """Whether it trains (copies of) certain layers, by `expand`."""
        return "expand" in self.sections

    @model_serializer(mode="wrap")
    def _one_word_if_all_is_said(self, serialize: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
        tree: dict[str, Any] = serialize(self)
        return tree if len(tree) > 1 or info.context == EVERY_KEY else self.name


def known_methods() -> dict[str, type[MethodSection]]:
    """All there are, by name: in order, the default first."""
    package = importlib.import_module(METHODS_PACKAGE)
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    modules = [importlib.import_module(f"{METHODS_PACKAGE}.{name}") for name in names]
    found = {kind.model_fields["name"].default: kind for module in modules for kind in _declared_in(module)}
    return dict(sorted(found.items(), key=lambda method: (method[0] != DEFAULT_METHOD, method[0])))


def _declared_in(module: Any) -> Iterator[type[MethodSection]]:
    for _, kind in inspect.getmembers(module, inspect.isclass):
        if issubclass(kind, MethodSection) and kind.__module__ == module.__name__ and not inspect.isabstract(kind):
            if kind.model_fields["name"].is_required():  # a base of others
                continue
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


def with_presets(tree: Any) -> Any:
    """A configuration with what its method gives to other sections.

    Raises:
        ValueError: another value stands there.
    """
    chosen = tree.get("method", DEFAULT_METHOD) if isinstance(tree, dict) else None
    name = chosen.get("name") if isinstance(chosen, dict) else chosen
    if not isinstance(name, str) or name not in _KNOWN:
        return tree  # a mistake of its own
    tree = dict(tree)
    for section, values in _KNOWN[name].presets.items():
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


def without_effect(method: MethodSection) -> set[str]:
    """Sections that the method does not look at."""
    return {section for section in _SECTIONS_OF_SOME if section not in method.sections}
