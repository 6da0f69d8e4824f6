"""A base, and models adapted from it without training: their copies hold random numbers, saved as the export does."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness.models import VOCABULARY, save_tiny_model
from harness.spoiling import marked_anew
from safetensors.torch import load_file, save_file

from adept_ds.base.files import read_json, write_json
from adept_ds.base.outputs import MARK_NAME
from adept_ds.deltas.operations import pack_copies
from adept_ds.weights.expansion import expand_checkpoint

MATH, LAW = [1, 3], [1, 4]  # both copy layer 1


@dataclass(frozen=True)
class Domains:
    """A base, and two models adapted from it."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def math(self) -> Path:
        return self.root / "math"

    @property
    def law(self) -> Path:
        return self.root / "law"

    def packages(self, out: Path) -> tuple[Path, Path]:
        pack_copies(self.math, out / "d_math", name="math")
        pack_copies(self.law, out / "d_law", name="law")
        return out / "d_math", out / "d_law"


def layer_of(name: str) -> int | None:
    """The first number in a tensor's name; the next would be an expert's."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def adapt(base: Path, out: Path, layers: list[int], seed: int) -> Path:
    """What a run exports, without the training."""
    expansion = expand_checkpoint(base, out, layers)
    generator = torch.Generator().manual_seed(seed)
    for file in sorted(out.glob("*.safetensors")):
        tensors = load_file(file)
        for name, tensor in sorted(tensors.items()):
            if layer_of(name) in expansion.copy_indices:
                tensors[name] = (torch.randn(tensor.shape, generator=generator) * 0.2).to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    return marked_anew(out)


def save_base(directory: Path, model_type: str, shard_size: str | None, dtype: torch.dtype = torch.float32) -> Path:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(directory, model_type), dtype=dtype)
    if shard_size:
        (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size=shard_size or "1GB")
    # Whatever a base may look like, it must come back as it was: odd spaces and line ends, companions.
    config = json.dumps(read_json(directory / "config.json"), indent=7).replace("\n", "\r\n")
    (directory / "config.json").write_bytes(config.encode())
    (directory / "LICENSE").write_bytes(b"free\r\n\xff")
    return directory


def make(root: Path, model_type: str, shard_size: str | None = None) -> Domains:
    base = save_base(root / "base", model_type, shard_size)
    adapt(base, root / "math", MATH, seed=1)
    adapt(base, root / "law", LAW, seed=2)
    return Domains(root)


def run_dir(domains: Domains, directory: Path) -> Path:
    """What a run leaves behind, as far as packing reads it."""
    shutil.copytree(domains.math, directory / "export")
    (directory / "config.yaml").write_text("model: base\n")
    losses = {"base": {"general": 3.0, "domain": 4.0}, "adapted": {"general": 3.01, "domain": 2.5}}
    rows = {model: {c: {"loss": loss, "tokens": 99} for c, loss in of.items()} for model, of in losses.items()}
    write_json(directory / "evaluation.json", rows)
    write_json(directory / "summary.json", {"steps": 7, "tokens": 800, "seconds": 1.5, "world_size": 2})
    return directory


def content(directory: Path) -> dict[str, bytes]:
    """Of all files but the mark, which says when they were written."""
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != MARK_NAME}


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits
