"""What a study compares, as configurations: each method with each of its settings, and what the study itself decides.

base, without what the method does not look at  <-  set of the method  <-  set of the setting  <-  the study's keys
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adept_ds.base.errors import InputError
from adept_ds.config.loading import parse_config, read_tree
from adept_ds.config.method import without_effect
from adept_ds.config.schema import Config
from adept_ds.study.schema import MethodEntry, Setting, Study
from adept_ds.study.texts import Texts, corpus_tree, held_out_tree

_DECIDED = {
    "run_dir": "study_dir",
    "method": "methods",
    "data.domain": "domain",
    "data.domain_eval": "domain",
    "data.general_eval": "general",
    "data.eval_sequences": "evaluation.sequences",
    "train.lr": "learning_rates",
    "train.seed": "seeds",
    "train.steps": "budget",
    "dial": "dial",
    "eval.dial": "dial",
    "eval.tasks": "evaluation.tasks",
    "eval.lm_eval": "evaluation.lm_eval",
}
"""Keys of a configuration, and where a study says them, for all cells alike or in turn."""

_BY_DEFAULT = {"data.replay": "general.train", "probe.corpus": "general.train"}
"""The same, but a method or a setting may have other texts."""

_IN_STEPS = ("train.eval_every", "train.checkpoint_every", "importance.every")
"""Keys that grow with the budget under `--scale`."""


@dataclass(frozen=True)
class Variant:
    """A method with a setting, before learning rate and seed."""

    entry: MethodEntry
    setting: str
    """'' where there is none."""
    rates: tuple[float, ...]
    tree: Mapping[str, Any]
    """Configuration, without what depends on cell or texts."""
    origin: str
    """For messages."""

    @property
    def label(self) -> str:
        return self.entry.title

    @property
    def name(self) -> str:
        """As `Trial.arm`."""
        return f"{self.label} ({self.setting})" if self.setting else self.label

    def config(self, study: Study, texts: Texts, *, lr: float, seed: int, steps: int, run_dir: Path) -> Config:
        """Of a cell. Raises `InputError`: it cannot work."""
        tree = copy.deepcopy(dict(self.tree))
        decided = {
            "run_dir": str(run_dir),
            "data.domain": corpus_tree(texts.train),
            "data.domain_eval": held_out_tree(texts.domain_eval),
            "data.general_eval": held_out_tree(texts.general_eval),
            "data.eval_sequences": study.evaluation.sequences,
            "train.lr": lr,
            "train.seed": seed,
            "train.steps": steps,
            "dial": None,  # a preset's too: a cell would be turned by documents that the study reports
            "eval.dial": list(study.dial),
            "eval.tasks": list(map(str, study.evaluation.tasks)),
            "eval.lm_eval": list(study.evaluation.lm_eval),
        }
        for key, value in decided.items():
            _put(tree, key, value)
        if _value(tree, "eval.diagnose") is None:
            _put(tree, "eval.diagnose", "never")  # a study is not about what went wrong, and some rates do
        if self._replays and _value(tree, "data.replay") is None:
            _put(tree, "data.replay", self._general(texts))
        config = parse_config(tree, self.origin)
        if (config.needs_probe or config.reads_general_text) and not config.probe.corpus:
            _put(tree, "probe.corpus", self._general(texts))
            config = parse_config(tree, self.origin)
        if config.guard is not None and config.guard.action != "warn":
            raise InputError(
                f"{self.origin}: guard.action: {config.guard.action} would choose rates or checkpoints by documents "
                "that the study reports; set it to warn, or remove guard"
            )
        return config

    @property
    def _replays(self) -> bool:
        return self.entry.method.replays or _value(self.tree, "importance.source") == "online"

    def _general(self, texts: Texts) -> list[dict[str, object]]:
        if not texts.general:
            raise InputError(f"{self.origin}: needs general text to replay or probe; list files in general.train")
        return corpus_tree(texts.general)


def variants_of(study: Study, path: Path, scale: float = 1.0) -> list[Variant]:
    """All of them, methods in order, each with its settings.

    Args:
        path: of the study, for messages; what `base` names is relative to the working directory.
        scale: by which the budget was multiplied.

    Raises:
        InputError: `base` is no configuration, or says what the study decides; so does a `set`.
    """
    base = study.base if isinstance(study.base, dict) else read_tree(study.base, "'model:' and 'train:'")
    flat = nested(base)
    _refuse_decided(flat, f"{path}: base", _DECIDED | _BY_DEFAULT)
    return [
        _variant(study, path, flat, entry, setting, scale)
        for entry in study.methods
        for setting in study.settings_of(entry)
    ]


def _variant(
    study: Study, path: Path, base: dict[str, Any], entry: MethodEntry, setting: Setting | None, scale: float
) -> Variant:
    of_method, of_setting = nested(entry.set), nested(setting.set if setting else {})
    _refuse_decided(of_method, f"{path}: methods: '{entry.title}'", _DECIDED)
    _refuse_decided(of_setting, f"{path}: settings: '{setting.label if setting else ''}'", _DECIDED)
    tree = _merged(_merged(_for_method(base, entry), of_method), of_setting)
    for key in _IN_STEPS:
        value = _value(tree, key)
        if isinstance(value, int) and value and scale != 1:
            _put(tree, key, max(1, round(value * scale)))
    tree["method"] = entry.method.model_dump(mode="json")
    where = f"{path}: method '{entry.title}'" + (f", setting '{setting.label}'" if setting else "")
    return Variant(entry, setting.label if setting else "", tuple(study.rates(entry)), tree, where)


def _for_method(base: dict[str, Any], entry: MethodEntry) -> dict[str, Any]:
    """The base, without sections that the method does not look at and keys that it decides itself."""
    tree = {key: copy.deepcopy(value) for key, value in base.items() if key not in without_effect(entry.method)}
    for section, keys in entry.method.presets.items():
        if isinstance(tree.get(section), dict):
            tree[section] = {key: value for key, value in tree[section].items() if key not in keys}
    return tree


def nested(tree: Mapping[str, Any]) -> dict[str, Any]:
    """With dotted keys written out: {a.b: 1, a: {c: 2}} is {a: {b: 1, c: 2}}."""
    result = dict[str, Any]()
    for key, value in tree.items():
        inner = nested(value) if isinstance(value, dict) else copy.deepcopy(value)
        for part in reversed(key.split(".")):
            inner = {part: inner}
        result = _merged(result, inner)
    return result


def _merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key, anything else is replaced."""
    merged = dict(tree)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _refuse_decided(tree: Mapping[str, Any], origin: str, decided: Mapping[str, str]) -> None:
    for key, where in decided.items():
        if _value(tree, key) is not None:
            raise InputError(f"{origin}: {key} is decided by the study; remove it, and say it in '{where}'")


def _value(tree: Mapping[str, Any], key: str) -> Any:
    node: Any = tree
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Raises nothing where there is no section: the schema will."""
    *sections, leaf = key.split(".")
    for section in sections:
        child = tree.get(section)
        if child is None:
            child = tree[section] = {}
        if not isinstance(child, dict):
            return
        tree = child
    tree[leaf] = value
