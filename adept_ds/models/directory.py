"""TODO models.directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from adept_ds.base.errors import InputError
from adept_ds.models.families import Family
from adept_ds.models.family_table import FAMILIES


def read_model_config(model_dir: Path) -> dict[str, Any]:
    """config.json as it lies on disk. Raises `InputError` if it cannot be read."""
    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"model: '{model_dir}/config.json' cannot be read ({error}); give a complete model") from None
    if not isinstance(config, dict):
        raise InputError(f"model: '{model_dir}/config.json' holds no JSON object; give a complete model")
    return config


def family_of(model_dir: Path) -> Family:
    """The family of a model directory.

    Raises:
        InputError: the architecture is not in the table; the message lists those that are.
    """
    config = read_model_config(model_dir)
    model_type, inner = config.get("model_type"), config.get("text_config")
    family = FAMILIES.get(str(model_type))
    if family is None and isinstance(inner, dict) and inner.get("model_type") in FAMILIES:
        raise InputError(
            f"model: '{model_dir}' has architecture '{model_type}', which is not supported; "
            f"the '{inner['model_type']}' inside it is: save its language model alone, and give that directory"
        )
    if family is None:
        raise InputError(
            f"model: '{model_dir}' has architecture '{model_type}', which is not supported; "
            f"supported: {', '.join(FAMILIES)} (CONTRIBUTING.md says how to add one)"
        )
    return family


def layer_count(model_dir: Path) -> int:
    """How many decoder layers a model directory has. Raises `InputError` if its configuration does not say."""
    key = family_of(model_dir).layer_count_key
    count = read_model_config(model_dir).get(key)
    if not isinstance(count, int) or count < 1:
        raise InputError(f"model: '{model_dir}/config.json' has {key}={count!r}; give a complete model")
    return count


def check_model_dir(name: str, model: Path) -> None:
    """`model` holds a Hugging Face checkpoint whose weights can be read without running code from it."""
    if not (model / "config.json").is_file():
        raise InputError(f"{name}: '{model}' has no config.json; give a Hugging Face model directory")
    if any(model.glob("*.safetensors")):
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
    if not path.is_dir():
        raise InputError(f"{name}: '{model}' does not exist; give a Hugging Face model directory")
    check_model_dir(name, path)
    return path


def _looks_like_hub_name(model: str) -> bool:
    parts = model.split("/")
    offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in {"1", "true", "yes", "on"}
    return len(parts) == 2 and all(parts) and not model.startswith((".", "~")) and not offline
