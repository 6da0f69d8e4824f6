"""A model as a Hugging Face directory: what can be known of it without reading weights or importing torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adept_ds.base.errors import InputError
from adept_ds.models.completeness import complete_weights
from adept_ds.models.config_values import check_form_of_weights, check_values
from adept_ds.models.families import Family
from adept_ds.models.family_table import FAMILIES
from adept_ds.models.weight_files import INDEX_NAME, weight_files


@dataclass(frozen=True)
class ModelDirectory:
    """What config.json says, looked up once."""

    path: Path
    config: dict[str, Any]
    """config.json as it lies on disk."""
    family: Family
    num_layers: int
    """Decoder layers."""

    @classmethod
    def read(cls, path: Path) -> ModelDirectory:
        """Raises `InputError`: config.json is missing or damaged, or of a model that cannot be expanded."""
        config = _read_config(path)
        family = _family(path, config)
        check_values(path, config, family)
        check_form_of_weights(path, config)
        return cls(path, config, family, config[family.layer_count_key])

    @classmethod
    def resolve(cls, key: str, model: str) -> ModelDirectory:
        """The directory that configuration key `key` names: itself, or the hub's snapshot of it.

        Raises:
            InputError: neither a directory nor to be had from the hub; or no complete model.
        """
        found = cls.read(resolve_model_dir(key, model))
        complete_weights(found)
        return found


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"model: '{path}/config.json' cannot be read ({error}); give a complete model") from None
    if not isinstance(config, dict):
        raise InputError(f"model: '{path}/config.json' holds no JSON object; give a complete model")
    return config


def _family(path: Path, config: dict[str, Any]) -> Family:
    """Raises `InputError`: the architecture is not in the table; the message lists those that are."""
    model_type, inner = config.get("model_type"), config.get("text_config")
    family = FAMILIES.get(str(model_type))
    if family is None and isinstance(inner, dict) and inner.get("model_type") in FAMILIES:
        raise InputError(
            f"model: '{path}' has architecture '{model_type}', which is not supported; "
            f"the '{inner['model_type']}' inside it is: save its language model alone, and give that directory"
        )
    if family is None:
        raise InputError(
            f"model: '{path}' has architecture '{model_type}', which is not supported; "
            f"supported: {', '.join(FAMILIES)} (CONTRIBUTING.md says how to add one)"
        )
    return family


@contextmanager
def understood_by_transformers(path: Path) -> Iterator[None]:
    """What transformers raises about a model's configuration or tensors becomes an `InputError` about its files."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(
            f"model: transformers cannot make a model of '{path}' ({reason}); give a complete model"
        ) from error


def check_model_dir(name: str, model: Path) -> None:
    """`model` holds a Hugging Face checkpoint whose weights can be read without running code from it.

    Raises:
        InputError: it does not, or it is not clear which files they are.
    """
    if not (model / "config.json").is_file():
        raise InputError(f"{name}: '{model}' has no config.json; give a Hugging Face model directory")
    if any(model.glob("*.safetensors")) or (model / INDEX_NAME).is_file():
        weight_files(model)
        return
    pickled = [*model.glob("*.bin"), *model.glob("*.pt"), *model.glob("*.pth")]
    if pickled:
        raise InputError(
            f"{name}: '{model}' has only pickled weights ({pickled[0].name}), which can run code when loaded; "
            "save it once with safetensors (model.save_pretrained(DIR)) and give that directory"
        )
    raise InputError(f"{name}: '{model}' has no *.safetensors weights; give a complete model directory")


def resolve_model_dir(name: str, model: str) -> Path:
    """The local directory of a model: itself, or the hub's snapshot of it.

    Raises:
        InputError: neither a directory nor to be had from the hub.
    """
    path = Path(model).expanduser()
    if not path.exists() and _looks_like_hub_name(model):
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(model, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf"]))
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{name}: '{model}' is no directory and not to be had from the hub ({reason})") from None
    if path.is_file():
        raise InputError(f"{name}: '{model}' is a file; give the Hugging Face model directory that it is in")
    if not path.is_dir():
        raise InputError(f"{name}: '{model}' does not exist; give a Hugging Face model directory")
    check_model_dir(name, path)
    return path


def _looks_like_hub_name(model: str) -> bool:
    parts = model.split("/")
    offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in {"1", "true", "yes", "on"}
    return len(parts) == 2 and all(parts) and not model.startswith((".", "~")) and not offline
