"""What every method's section of the configuration has in common; see `known_methods` for which ones there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import SerializationInfo, SerializerFunctionWrapHandler, model_serializer

from adept_ds.config.section import Section

if TYPE_CHECKING:
    from adept_ds.config.schema import Config
    from adept_ds.models.directory import ModelDirectory
    from adept_ds.models.weight_files import Shapes

EVERY_KEY = "every key"
"""Context of a dump that shall be a section even where a word would do."""

_SECTIONS_OF_SOME = ("expand", "importance", "lr_policy", "anchor")
"""Sections that only some methods look at."""


class MethodSection(Section):
    """Base of all methods' keys; see `methods.shape.Method` for what else a method is."""

    name: str
    """Of the method; each restricts it to its own."""

    starts_from: ClassVar[Literal["base", "expanded"]] = "base"
    """The model that training starts from: the user's own, or one with copies of its layers."""
    sections: ClassVar[frozenset[str]] = frozenset()
    """Which of `expand`, `importance`, `lr_policy` and `anchor` it looks at."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"lr_policy": {"map": "constant"}}
    """Values that it gives to keys of other sections, by section; no others may be given there."""
    needs_general_text: ClassVar[bool] = False
    """Whether it reads `probe.corpus` for more than choosing layers."""
    estimates_again: ClassVar[bool] = False
    """Whether it estimates importances anew every `importance.every` steps, without `lr_policy`."""
    replays: ClassVar[bool] = False
    """Whether it cannot do without `data.replay`."""
    kept_per_element: ClassVar[int] = 0
    """Bytes that it keeps for each trained element, over all ranks, where the optimizer steps it; for a plan."""

    def check(self, config: Config) -> None:
        """Raises `ValueError`, in one line with the key, the value and the remedy: it cannot work with the rest."""

    def check_model(self, model: ModelDirectory, shapes: Callable[[], Shapes]) -> None:
        """Raises `InputError`: it cannot work with this model.

        Args:
            shapes: those of its tensors, looked up if they are asked for.
        """

    @property
    def makes_copies(self) -> bool:
        """Whether what it learns is in copies of layers."""
        return self.starts_from == "expanded"

    @property
    def chooses_layers(self) -> bool:
        """Whether it trains (copies of) certain layers, by `expand`."""
        return "expand" in self.sections

    @model_serializer(mode="wrap")
    def _one_word_if_all_is_said(self, serialize: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
        tree: dict[str, Any] = serialize(self)
        return tree if len(tree) > 1 or info.context == EVERY_KEY else self.name


def without_effect(method: MethodSection | type[MethodSection]) -> set[str]:
    """Sections that the method does not look at."""
    return {section for section in _SECTIONS_OF_SOME if section not in method.sections}
